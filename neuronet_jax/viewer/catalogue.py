"""The scans and maps that the viewer shows of a folder of results, and the files that it may therefore serve."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results import cohort_page
from neuronet_jax.results.bids import Target, bids_label, plan
from neuronet_jax.results.inputs import find
from neuronet_jax.results.pictures import votes_colors
from neuronet_jax.results.resume import finished_rows
from neuronet_jax.results.tables import volumes_of

_IMAGES = re.compile(r"_(?:dseg|probseg|mask)\.(?:nii\.gz|mgz)$")
_PROTOCOLS = {bids_label(name): name for name in PROTOCOLS}


@dataclass(frozen=True)
class Catalogue:
    """The scans of a folder, in the order in which to look at them, and the files that they need."""

    scans: list[dict[str, Any]]  # as the page gets them
    tables: dict[str, dict[str, list[Any]]]  # names and colours of the labels of each kind of map
    files: Mapping[str, Path]  # by address below the page's own


def catalogue(out: Path, scans: Mapping[str, Path]) -> Catalogue:
    """Returns the catalogue of `out`. `scans` are the images that the results were made from, by their results' stem.

    A link that leads out of the folder is left out.
    """
    files: dict[str, Path] = {}
    shown = []
    if (out / "report.html").is_file():
        files["report.html"] = out / "report.html"
    rows = finished_rows(out)
    for row in cohort_page.in_order(rows, volumes_of(out, {row.output for row in rows})):
        target = Target(Path(row.input), out, row.output)
        maps = [*_maps(target, files)]
        if target.report.is_file():
            files[target.report.relative_to(out).as_posix()] = target.report
        scan = {"name": row.output, "maps": maps, "image": None, "warnings": row.warnings.replace("n/a", ""),
                "predicted_dice": row.predicted_dice,
                "page": _address(target.report.relative_to(out)) if target.report.is_file() else None}  # fmt: skip
        if (path := scans.get(row.output)) and _is_recorded(target, path):
            files[f"scans/{row.output}/{path.name}"] = path
            scan["image"] = _address(Path("scans", row.output, path.name))
        shown.append(scan)
    inside = {name: path for name, path in files.items() if name.startswith("scans/") or _is_inside(path, out)}
    return Catalogue(shown, _tables(), inside)


def images_of(out: Path, inputs: Sequence[str]) -> dict[str, Path]:
    """Returns the scans that a command line names, by the stem of their results in `out`.

    Raises NeuronetError as `neuronet segment` does.
    """
    return {target.stem: target.source for target in plan(find(inputs).scans, out, ())} if inputs else {}


def check_folder(out: Path) -> None:
    """Raises NeuronetError if `out` holds no results."""
    if not out.is_dir():
        raise NeuronetError(f"there is no folder {out}: give the --out of `neuronet segment`")
    if not finished_rows(out):
        raise NeuronetError(f"{out} holds no finished results: give the --out of `neuronet segment`")


def _maps(target: Target, files: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Yields the maps of a scan, label maps of protocols first, and enters their files."""
    found = [path for path in sorted(target.folder.glob(f"{target.stem}_*")) if _IMAGES.search(path.name)]
    for path in sorted(found, key=lambda path: "dseg" not in path.name or "_seg-" not in path.name):
        address = path.relative_to(target.out)
        files[address.as_posix()] = path
        kind = path.name.removeprefix(f"{target.stem}_")
        protocol = _PROTOCOLS.get((re.match(r"seg-([a-z]+)_", kind) or [""] * 2)[1], "")
        yield {
            "title": _IMAGES.sub("", kind) if "probseg" in kind or not protocol else protocol,
            "table": "" if "dseg" not in kind else protocol or "votes",
            "file": _address(address),
        }


def _tables() -> dict[str, dict[str, list[Any]]]:
    tables = {name: [(s.id, s.name, s.color) for s in protocol.structures] for name, protocol in PROTOCOLS.items()}
    tables["votes"] = [(i, f"{i} protocols agree", color) for i, color in enumerate(votes_colors(4))]
    # NiiVue raises whatever is in the lowest 2/256 of a table to there: without an id below it, the background of a
    # table of more than 128 ids gets the colour of id 1.
    tables = {name: [(-1, "", (0, 0, 0)), *rows] for name, rows in tables.items()}
    return {
        name: {
            "I": [i for i, _, _ in rows], "labels": [label for _, label, _ in rows],
            "A": [255 * (i > 0) for i, _, _ in rows],
            **{channel: [color[n] for _, _, color in rows] for n, channel in enumerate("RGB")},
        }
        for name, rows in tables.items()
    }  # fmt: skip


def _is_recorded(target: Target, path: Path) -> bool:
    """Tells whether a scan is the one that the results were made from, by the name and size in their record."""
    try:
        known = json.loads(target.record.read_text(encoding="utf-8"))["input"]
        return (known["file"], known["bytes"]) == (path.name, path.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_inside(path: Path, out: Path) -> bool:
    return path.resolve().is_relative_to(out.resolve())


def _address(path: Path) -> str:
    return quote(path.as_posix())
