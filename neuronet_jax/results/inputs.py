"""Finds the scans that a command line names: files, folders, BIDS datasets and lists."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.spreadsheets import lines, read_table, read_text
from neuronet_jax.store.schema import bare_id, is_id

IMAGES = (".nii.gz", ".nii", ".mgz")
TABLES = (".csv", ".tsv")
_LISTS = (*TABLES, ".txt", ".list", ".lst")  # names that no image has: somebody forgot the @
_NOT_SCANS = ("derivatives", "sourcedata")  # in a BIDS dataset: results, and the data before conversion
_NAMED = 3  # files that an error names: enough to see the problem


class Scan(NamedTuple):
    """An input file and the name of its results."""

    path: Path
    name: str  # the results take this name: the file name, or the id from a list
    row: str = ""  # where a list names it, such as "row 3 of cohort.csv"


class Refused(NamedTuple):
    """An input that cannot be segmented whatever its file holds, because its results can have no name."""

    path: Path
    code: str
    reason: str


class Found(NamedTuple):
    """The inputs that a command line names."""

    scans: list[Scan]  # each once, in the order given
    refused: list[Refused]
    lists: list[Path]


def find(inputs: Sequence[str]) -> Found:
    """Finds the scans of files, folders, BIDS datasets and lists (`@FILE`).

    A file among others need not exist: it is rejected later like any other bad input. Raises NeuronetError for a folder
    or list without scans, and if none of the files exists; UsageError for a list without its @.
    """
    found: dict[str, Scan] = {}
    refused: list[Refused] = []
    lists: list[Path] = []
    for text in inputs:
        path = Path(text)
        if text.startswith("@"):
            scans, bad = _listed(Path(text[1:]))
            refused += bad
            lists.append(Path(text[1:]))
        elif path.is_dir():
            scans = [Scan(file, file.name) for file in _in_folder(path)]
        elif path.suffix.lower() in _LISTS:
            raise UsageError(f"{text} is not an image; to segment the scans that it lists, write @{text}")
        else:
            scans = [Scan(path, path.name)]
        for scan in scans:
            if not re.search("[A-Za-z0-9]", bare(scan.name)):
                refused.append(
                    Refused(
                        scan.path,
                        "E_ID",
                        "names of results use letters and digits (A-Z, a-z, 0-9), and this file's name has none: "
                        "rename it, or give it an id in a list",
                    )
                )
                continue
            earlier = found.setdefault(os.path.abspath(scan.path), scan)
            if earlier.row and scan.row and earlier.name != scan.name:
                raise NeuronetError(f"{earlier.row} and {scan.row} are one file with two ids: remove one of them")
    scans = list(found.values())
    if scans and not any(os.path.exists(scan.path) for scan in scans):
        named = [f"{scan.path}{_hint(scan.path)}" for scan in scans[:_NAMED]]
        more = [f"and {len(scans) - _NAMED} more"] if len(scans) > _NAMED else []
        raise NeuronetError(f"none of the inputs exists: {', '.join([*named, *more])}")
    return Found(scans, refused, lists)


def _hint(path: Path) -> str:
    """Returns the nearest name beside a missing file, or the folder that is missing already."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return f" (there is no folder {path.parent})"
    near = difflib.get_close_matches(path.name, names, 1)
    return f" (did you mean {path.with_name(near[0])}?)" if near else ""


def _in_folder(folder: Path) -> list[Path]:
    """Returns the T1w images of a BIDS dataset or a part of one. In any other folder, images directly in it count too.

    Of those, images with other BIDS suffixes (`sub-01_T2w.nii.gz`) count only if there is nothing else.
    """
    is_bids = _is_raw_bids(folder)
    scans = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NOT_SCANS and not name.startswith(".")]
        if not is_bids or Path(place).name == "anat":
            scans += [Path(place, name) for name in names if name.endswith(("_T1w.nii.gz", "_T1w.nii"))]
    if not is_bids:
        direct = [path for path in folder.iterdir() if path.name.lower().endswith(IMAGES)]
        scans = [*scans, *(path for path in direct if not path.name.startswith("sub-"))] or direct
    scans = sorted({path for path in scans if not path.name.startswith(".")})
    if not scans:
        raise NeuronetError(
            f"{folder} has no *_T1w.nii.gz at any depth, and no .nii.gz, .nii or .mgz directly in it: name the files, "
            f"such as {folder}/*/T1.nii.gz (convert DICOM files with dcm2niix)"
        )
    return scans


def _is_raw_bids(folder: Path) -> bool:
    """Tells whether `folder` is the root of a raw BIDS dataset. Raises NeuronetError for a BIDS dataset of a different
    type.
    """
    description = folder / "dataset_description.json"
    if not description.exists():
        return False
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NeuronetError(f"{description} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise NeuronetError(f"{description} must hold an object {{…}}: correct it, or name the images")
    kind = content.get("DatasetType", "raw")  # BIDS' own default
    if kind != "raw":
        raise NeuronetError(f"{folder} is a BIDS dataset of type {kind!r}: give the raw dataset, or name the images")
    return True


def _listed(path: Path) -> tuple[list[Scan], list[Refused]]:
    """Reads a list: one path per line, or a table (.csv, .tsv) with the column `t1` and, optionally, `id` for result
    names.

    Paths are absolute or relative to the list. The manifest of `data_prep.build` is such a table. A row with an id that
    cannot name results is refused alone.
    """
    if path.suffix in TABLES:
        rows = [(number, row["t1"], row.get("id", "").strip()) for number, row in read_table(path, "t1")]
    else:
        rows = [(number, line.strip(), "") for number, line in lines(read_text(path)) if not line.startswith("#")]
    scans, refused = [], []
    for number, file, identity in rows:
        row = f"row {number} of {path.name}"
        if not file:
            continue
        label = bare_id(identity)
        if identity and not is_id(label):
            reason = f"the id in {row} must consist of letters and digits (A-Z, a-z, 0-9): change it there"
            refused.append(Refused(path.parent / file, "E_ID", reason))
        else:
            name = f"sub-{label}_T1w.nii.gz" if identity else Path(file).name
            scans.append(Scan(path.parent / file, name, row))
    if not scans and not refused:
        raise NeuronetError(f"the list {path} names no scans")
    return scans, refused


def bare(name: str) -> str:
    """Returns the name without the suffix of an image."""
    return re.sub(r"(\.nii\.gz|\.nii|\.mgz)$", "", name, flags=re.IGNORECASE)
