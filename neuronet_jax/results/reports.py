"""HTML report pages: one for each scan and one for the cohort, each a single self-contained file.

A scan's page is written with its results. Its comparison with the other scans is known only at the end of a cohort, and
is then inserted between two markers of the page.
"""

import base64
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuronet_jax import __version__
from neuronet_jax.codes import explain
from neuronet_jax.evaluation.agreement import Agreement
from neuronet_jax.evaluation.plausibility import BRAIN_MM3
from neuronet_jax.evaluation.quality import Quality
from neuronet_jax.images.space import Volume, voxel_mm3
from neuronet_jax.labels import PROTOCOLS, REGIONS
from neuronet_jax.results.bids import Target
from neuronet_jax.results.pictures import Slices, colors_of, votes_colors
from neuronet_jax.results.tables import Row, Volumes
from neuronet_jax.runs.calibration import Calibration
from neuronet_jax.runs.provenance import Provenance

if TYPE_CHECKING:
    import jinja2

FAR = 3.5  # robust deviations of an outlier (Iglewicz and Hoaglin, "How to detect and handle outliers", 1993)
LEAST_FOR_OUTLIERS = 10  # scans: with fewer, the median absolute deviation is hardly known
MOST_OUTLIERS, MOST_THUMBNAILS, LOWEST = 40, 200, 5  # as many as a person looks through; 200 pictures are 5 MB
_BEGIN, _END = "<!-- among others -->", "<!-- /among others -->"  # in scan.html; no other text can contain them
_KEY = 8  # classes whose colours a caption can explain


@dataclass(frozen=True)
class ScanPage:
    """The contents of one scan's page."""

    name: str
    volume: Volume
    maps: Mapping[str, np.ndarray]  # tool ids, on the volume's grid
    agreement: Agreement
    quality: Quality
    warnings: tuple[str, ...]
    provenance: Provenance
    removed_ml: Mapping[str, float] = field(default_factory=dict)  # per protocol, by the clean-up; empty without it


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
    found.filters["ml"] = _ml
    return found


def embed(png: bytes) -> str:
    """Returns a picture as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def render_scan(page: ScanPage) -> str:
    """Returns the page of one scan as HTML."""
    per_voxel_mm3 = voxel_mm3(page.volume.affine)
    mm3 = {
        name: np.sum([np.bincount(plane.ravel(), minlength=256) for plane in ids], axis=0) * per_voxel_mm3
        for name, ids in page.maps.items()
    }
    slices = Slices(page.volume, np.any([ids > 0 for ids in page.maps.values()], axis=0))
    first = next(iter(page.maps))
    return environment().get_template("scan.html").render(
        scan=page.name,
        note=page.provenance.note,
        warnings=[(code, _measured(code, mm3) + explain(code)) for code in page.warnings],
        score=page.quality.score,
        calibration=page.quality.calibration,
        unanimous=page.agreement.unanimous(),
        consistency=page.agreement.consistency,
        brain_mm3=max(float(volumes[1:].sum()) for volumes in mm3.values()),
        removed_ml=max(page.removed_ml.values(), default=math.nan),
        pictures=_pictures(slices, page),
        thumbnail=embed(slices.png(page.maps[first], colors_of(PROTOCOLS[first]), count=1)),
        protocols=list(page.maps),
        regions=_regions(page, mm3),
        everything=[_everything(name, page.quality, volumes) for name, volumes in mm3.items()],
        provenance=_facts(page.provenance),
    )  # fmt: skip


def _measured(code: str, mm3: Mapping[str, np.ndarray]) -> str:
    """Returns the figures behind a warning, where there are some."""
    if code != "W_BRAIN_VOLUME":
        return ""
    found = []
    for name in mm3.keys() - {"fsl_first"}:
        volume_mm3 = float(mm3[name][1:].sum())
        if size := "too small" if volume_mm3 < BRAIN_MM3[0] else "too large" if volume_mm3 > BRAIN_MM3[1] else "":
            found.append(f"{name}: {_ml(volume_mm3)} ml, {size}")
    return f"{'; '.join(sorted(found))}. "


def place_among(page: str, scan: str, volumes: Volumes) -> str:
    """Returns the page of `scan` with its comparison with `volumes`, in place of an earlier one."""
    number = volumes.scans.index(scan)
    rows = []
    for name, protocol, values in _shared(volumes):
        others = values[~np.isnan(values)]
        if not math.isnan(values[number]) and len(others) > 1:
            rows.append(_place(name, protocol, values[number], others))
    text = environment().get_template("among.html").render(scans=len(volumes.scans), rows=rows)
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{text}\n{_END}{after}"


def thumbnail(page: str) -> str:
    """Returns the small picture of a scan's page, as a data URL."""
    found = re.search(r'<img id="thumbnail" alt="" hidden src="(data:image/png;base64,[A-Za-z0-9+/=]*)">', page)
    return found[1] if found else ""


def render_cohort(
    rows: Sequence[Row],
    volumes: Volumes,
    agreements: Mapping[str, Sequence[Mapping[str, str]]],
    thumbnails: Mapping[str, str],
    calibration: Calibration,
    provenance: Provenance,
) -> str:
    """Returns a page with the scans of one command (`rows`) and the volumes of all scans in its folder, as HTML.

    `agreements` has the rows of each scan's agreement table, `thumbnails` a data URL of each scan's small picture.
    """
    shown = [
        {**vars(row), "remarks": row.warnings.replace("n/a", "").replace(",", ", "),
         "link": _link(row.output) if row.output in thumbnails else ""}
        for row in rows
    ]  # fmt: skip
    scored = sorted((row for row in rows if row.predicted_dice != "n/a"), key=lambda row: float(row.predicted_dice))
    pictures = [{"name": name, "link": _link(name), "source": source} for name, source in thumbnails.items() if source]
    return environment().get_template("cohort.html").render(
        rows=shown,
        done=sum(row.status == "done" for row in rows),
        note=provenance.note,
        warned=explained(rows),
        calibration=calibration.describe() if scored else "",
        lowest=[row.output for row in scored[:LOWEST]] if len(scored) > LOWEST else [],
        thumbnails=pictures[:MOST_THUMBNAILS],
        hidden=max(0, len(pictures) - MOST_THUMBNAILS),
        scans=len(volumes.scans),
        agreement=_agreement(agreements),
        distribution=[_distribution(*shared) for shared in _shared(volumes)] if len(volumes.scans) > 1 else [],
        outliers=_outliers(volumes),
        far=FAR,
        provenance=_facts(provenance),
    )  # fmt: skip


def explained(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """Lists every code of the scans, its meaning and remedy, and how many scans have it; errors come first."""
    counts = Counter(code for row in rows for code in (row.code, *row.warnings.split(",")) if code != "n/a")
    return [(code, explain(code), count) for code, count in sorted(counts.items())]


def _facts(provenance: Provenance) -> dict[str, Any]:
    """Returns the origin of the labels, with the members of an ensemble side by side. The note has its own place."""
    shared = {name: value for name, value in provenance.to_json().items() if name not in ("note", "ensemble")}
    if len(provenance.members) == 1:
        return shared
    members = [member.to_json() for member in provenance.members]
    names = dict.fromkeys(name for member in members for name in member if name != "note")
    return shared | {name: ", ".join(str(member.get(name, "n/a")) for member in members) for name in names}


def _pictures(slices: Slices, page: ScanPage) -> list[dict[str, Any]]:
    pictures = [{"title": "T1", "source": embed(slices.png()), "key": []}]
    for name, ids in page.maps.items():
        protocol = PROTOCOLS[name]
        few = protocol.structures[1:] if protocol.num_classes <= _KEY else ()
        pictures.append(
            {
                "title": f"{protocol.tool} ({name})",
                "source": embed(slices.png(ids, colors_of(protocol))),
                "key": [(s.name, _css(s.color)) for s in few],
            }
        )
    if page.agreement.votes is not None:
        voters = len(page.agreement.voters)
        colors = votes_colors(voters)
        pictures.append(
            {
                "title": "Agreement on tissue",
                "source": embed(slices.png(page.agreement.votes, np.array(colors, np.float64))),
                "key": [
                    (f"{votes} of {voters}", _css(colors[votes])) for votes in range(voters, 0, -1) if votes > 1
                ],
            }
        )  # fmt: skip
    return pictures


def _regions(page: ScanPage, mm3: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns the volumes by protocol, and the mean Dice of the pairs, of each region that several protocols label."""
    rows = []
    for region in REGIONS:
        if len(region.ids.keys() & mm3.keys()) == 0:
            continue
        pairs = [p.dice for p in page.agreement.pairs if (p.kind, p.region) == (region.kind, region.name)]
        pairs = [dice for dice in pairs if not math.isnan(dice)]
        volumes = [float(mm3[name][list(region.ids[name])].sum()) if name in region.ids else math.nan for name in mm3]
        rows.append({"name": region.name, "volumes": volumes, "dice": float(np.mean(pairs)) if pairs else math.nan})
    return rows


def _everything(name: str, quality: Quality, mm3: np.ndarray) -> dict[str, Any]:
    protocol = PROTOCOLS[name]
    unknown = np.full(protocol.num_classes, np.nan)
    entropy, predicted = quality.entropy.get(name, unknown), quality.predicted.get(name, unknown)
    return {
        "title": f"{protocol.tool} ({name})",
        "rows": [
            {"id": s.id, "name": s.name, "mm3": mm3[s.id], "entropy": entropy[s.index], "dice": predicted[s.index]}
            for s in protocol.structures[1:]
        ],
    }


def _agreement(agreements: Mapping[str, Sequence[Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Returns the mean and lowest Dice of every region and pair of protocols, over the scans to which it applies."""
    found: dict[tuple[str, ...], list[tuple[float, str]]] = defaultdict(list)
    for scan, rows in agreements.items():
        for row in rows:
            if row["kind"] != "merge" and row["dice"] != "n/a":
                found[row["region"], row["first"], row["second"]].append((float(row["dice"]), scan))
    return [
        {
            "region": region, "first": first, "second": second, "scans": len(values),
            "mean": float(np.mean([dice for dice, _ in values])), "lowest": min(values)[0], "scan": min(values)[1],
        }
        for (region, first, second), values in found.items()
    ]  # fmt: skip


def _shared(volumes: Volumes) -> list[tuple[str, str, np.ndarray]]:
    """Returns name, protocol and mm³ [scan] of every region that several protocols label and any scan has."""
    found = [(r.name, name, volumes.of(name, ids)) for r in REGIONS for name, ids in r.ids.items()]
    return [(name, protocol, values) for name, protocol, values in found if not np.isnan(values).all()]


def _place(name: str, protocol: str, value: float, values: np.ndarray) -> dict[str, Any]:
    least, most, median = float(values.min()), float(values.max()), float(np.median(values))
    return {
        "name": name,
        "protocol": protocol,
        "value": value,
        "median": median,
        "tick": _x(median, least, most, 160),
        "dot": _x(value, least, most, 160),
        "share": float((values < value).sum() / (len(values) - 1)),
        "extreme": abs(_deviations(values, value)) > FAR and len(values) >= LEAST_FOR_OUTLIERS,
    }


def _distribution(name: str, protocol: str, values: np.ndarray) -> dict[str, Any]:
    values = values[~np.isnan(values)]
    least, most = float(values.min()), float(values.max())
    dots = sorted({_x(float(value), least, most, 220) for value in values})  # scans that share a pixel share a dot
    return {
        "name": name, "protocol": protocol, "least": least, "most": most, "median": float(np.median(values)),
        "dots": dots,
    }  # fmt: skip


def _outliers(volumes: Volumes) -> list[dict[str, Any]]:
    rows = []
    if len(volumes.scans) >= LEAST_FOR_OUTLIERS:
        for column, values in zip(volumes.columns, volumes.values.T, strict=True):
            protocol, _, name = column.partition(".")
            known = values[~np.isnan(values)]
            for scan, value in zip(volumes.scans, values, strict=True):
                if not math.isnan(value) and abs(z := _deviations(known, value)) > FAR:
                    rows.append({"scan": scan, "name": name, "protocol": protocol, "value": value, "z": z,
                                 "median": float(np.median(known))})  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row["z"]))[:MOST_OUTLIERS]


def _deviations(values: np.ndarray, value: float) -> float:
    """Returns how many robust standard deviations `value` is above the median, or 0 if the values have no spread."""
    median = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - median))  # equals the standard deviation of a normal distribution
    return float((value - median) / spread) if spread > 0 else 0.0


def _x(value: float, least: float, most: float, width: int) -> float:
    """Returns the position of a value on a drawn line, in pixels."""
    share = (value - least) / (most - least) if most > least else 0.5
    return round(6 + share * (width - 12), 1)


def _link(stem: str) -> str:
    return Target(Path(), Path(), stem).report.as_posix()


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _ml(mm3: float) -> str:
    if math.isnan(mm3):
        return "–"
    ml = mm3 / 1000
    return f"{ml:.0f}" if ml >= 100 else f"{ml:.1f}" if ml >= 10 else f"{ml:.2f}"


def _css(color: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
