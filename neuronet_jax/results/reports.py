"""Parts that the HTML pages share: their templates, how values are written, and facts that several pages state.

Every page is one self-contained file without scripts: switches are the browser's own controls, and style does the rest.
"""

import base64
import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from neuronet_jax import __version__
from neuronet_jax.codes import explain
from neuronet_jax.results.tables import Row
from neuronet_jax.runs.provenance import Provenance

if TYPE_CHECKING:
    import jinja2


@cache
def environment() -> "jinja2.Environment":
    """Returns the template environment, which escapes every inserted value."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("neuronet_jax"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found.globals["version"] = __version__
    found.filters["number"] = _number
    found.filters["percent"] = lambda value: "–" if math.isnan(value) else f"{value:.0%}"
    found.filters["ml"] = ml
    return found


def embed(picture: bytes) -> str:
    """Returns a PNG or WebP picture as a data URL."""
    kind = "webp" if picture[8:12] == b"WEBP" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def explained(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Lists every code of the scans, its meaning and remedy, and how many scans have it; errors come first."""
    counts = Counter(code for row in rows for code in (row.code, *row.warnings.split(",")) if code != "n/a")
    return [(code, explain(code), count) for code, count in sorted(counts.items())]


def facts(provenance: Provenance) -> dict[str, Any]:
    """Returns the origin of the labels, with the members of an ensemble side by side. The note has its own place."""
    shared = {name: value for name, value in provenance.to_json().items() if name not in ("note", "ensemble")}
    if len(provenance.members) == 1:
        return shared
    members = [member.to_json() for member in provenance.members]
    names = dict.fromkeys(name for member in members for name in member if name != "note")
    return shared | {name: ", ".join(str(member.get(name, "n/a")) for member in members) for name in names}


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def ml(mm3: float) -> str:
    if math.isnan(mm3):
        return "–"
    ml = mm3 / 1000
    return f"{ml:.0f}" if ml >= 100 else f"{ml:.1f}" if ml >= 10 else f"{ml:.2f}"


def css(color: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
