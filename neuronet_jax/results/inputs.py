"""Finds the scans that a command line names: files, folders, BIDS datasets and lists."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from neuronet_jax.errors import NeuronetError
from neuronet_jax.store.schema import is_id

IMAGES = (".nii.gz", ".nii", ".mgz")
_NOT_SCANS = ("derivatives", "sourcedata")  # in a BIDS dataset: results, and the data before conversion


class Scan(NamedTuple):
    """An input file and the name of its results."""

    path: Path
    name: str  # the results take this name: the file name, or the id from a list


def find(inputs: Sequence[str]) -> list[Scan]:
    """Returns the scans of files, folders, BIDS datasets and lists (`@FILE`), each once, in the order given.

    A file need not exist; a missing one is rejected later like any other bad input. Raises NeuronetError for a folder
    or list without scans.
    """
    found: dict[str, Scan] = {}
    for text in inputs:
        path = Path(text)
        if text.startswith("@"):
            scans = _listed(Path(text[1:]))
        elif path.is_dir():
            scans = [Scan(file, file.name) for file in _in_folder(path)]
        else:
            scans = [Scan(path, path.name)]
        for scan in scans:
            found.setdefault(os.path.abspath(scan.path), scan)
    return list(found.values())


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
        kind = json.loads(description.read_text(encoding="utf-8")).get("DatasetType", "raw")  # BIDS' own default
    except (OSError, ValueError, AttributeError) as error:
        raise NeuronetError(f"{description} cannot be read: {error}") from error
    if kind != "raw":
        raise NeuronetError(f"{folder} is a BIDS dataset of type {kind!r}: give the raw dataset, or name the images")
    return True


def _listed(path: Path) -> list[Scan]:
    """Reads a list: one path per line, or a table (.csv, .tsv) with the column `t1` and, optionally, `id` for result
    names.

    Paths are absolute or relative to the list. The manifest of `data_prep.build` is such a table.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig drops the byte order mark that spreadsheets add
    except (OSError, ValueError) as error:
        raise NeuronetError(f"the list {path} cannot be read: {error}") from error
    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(text.splitlines(), delimiter="," if path.suffix == ".csv" else "\t")
        if "t1" not in (table.fieldnames or []):
            raise NeuronetError(
                f"{path} has the columns {table.fieldnames}, but no 't1': give the scans' column that name"
            )
        rows = [((row["t1"] or "").strip(), (row.get("id") or "").strip()) for row in table]
    else:
        rows = [(line.strip(), "") for line in text.splitlines() if not line.startswith("#")]
    scans = [Scan(path.parent / file, _name(identity) or Path(file).name) for file, identity in rows if file]
    if not scans:
        raise NeuronetError(f"the list {path} names no scans")
    return scans


def _name(identity: str) -> str:
    """Returns the BIDS name of a subject's scan, or an empty string without an id."""
    label = identity.removeprefix("sub-")
    if identity and not is_id(label):
        raise NeuronetError(f"E_ID: an id must consist of letters and digits (A-Z, a-z, 0-9), got {identity!r}")
    return f"sub-{label}_T1w.nii.gz" if identity else ""
