"""A BIDS dataset: raw scans, and label maps in its derivatives.

    sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz
    derivatives/fsl/sub-01/ses-2/anat/sub-01_ses-2_seg-fslfast_dseg.nii.gz

A map of a protocol is a `dseg` whose entity `seg` is the protocol's name without underscores, with the tool's own ids,
as `neuronet segment` names its results. Sessions are visits. bids2table (the extra `bids`) lists the files.
"""

import collections
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.sources.files import Input
from data_prep.sources.source import Source, check
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results.bids import GENERATOR

_SPACES = (None, "", "T1w", "orig")  # names that BIDS and tools give to the grid of the scan
_SEGMENTATIONS = {name.replace("_", ""): name for name in PROTOCOLS}

log = logging.getLogger(__name__)


def read_dataset(folder: Path) -> list[Source]:
    """Lists the sessions with a T1-weighted scan in a raw dataset, with the label maps of the derivatives inside it.

    A session with several scans, or several maps of a protocol, is refused alone. Results of `neuronet segment` are
    left out. Raises NeuronetError without bids2table, for a folder that is no raw dataset, and if it has no scan.
    """
    try:
        import bids2table
    except ImportError as error:
        raise NeuronetError("--bids needs the package bids2table: pip install 'neuronet-jax[bids]'") from error
    if _described(folder).get("DatasetType", "raw") != "raw":  # BIDS' own default
        raise NeuronetError(f"{folder} is no raw BIDS dataset; give the folder above its derivatives")
    scans: dict[tuple[str, str], list[Path]] = collections.defaultdict(list)
    maps: dict[tuple[str, str], dict[str, list[Path]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for root in sorted(bids2table.find_bids_datasets(folder)):
        about = _described(root)
        if any(GENERATOR in str(tool) for tool in about.get("GeneratedBy", ())):  # a network must not learn from one
            log.warning("%s holds results of this program, which are not taken as references", root.relative_to(folder))
            continue
        for row in _rows(bids2table.index_dataset(root)):
            visit, path = (row["sub"], row["ses"] or ""), Path(row["root"], row["path"])
            if root == folder and row["suffix"] == "T1w" and row["ext"] in (".nii", ".nii.gz"):
                scans[visit].append(path)
            elif protocol := _protocol(row):
                maps[visit][protocol].append(path)
    if not scans:
        raise NeuronetError(f"{folder} has no sub-*/anat/*_T1w.nii.gz, with or without sessions")
    sources = [_source(*visit, found, maps[visit]) for visit, found in sorted(scans.items())]
    check(sources)
    return sources


def _rows(table: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of an Arrow table, one batch in memory as dictionaries."""
    columns = ["sub", "ses", "suffix", "ext", "space", "seg", "root", "path"]
    for batch in table.select(columns).to_batches(max_chunksize=10_000):
        yield from batch.to_pylist()


def _protocol(row: Mapping[str, Any]) -> str | None:
    """Returns the protocol of which a file is a map on the grid of the scan."""
    is_map = row["suffix"] == "dseg" and row["ext"] in (".nii", ".nii.gz", ".mgz") and row["space"] in _SPACES
    return _SEGMENTATIONS.get(row["seg"] or "") if is_map else None


def _source(id_: str, session: str, scans: list[Path], maps: Mapping[str, list[Path]]) -> Source:
    problem = None
    if len(scans) > 1:
        problem = ("E_DUPLICATE", f"the session has {len(scans)} T1-weighted scans; keep one of them")
    if several := [name for name, paths in maps.items() if len(paths) > 1]:
        problem = problem or (
            "E_DUPLICATE",
            f"the derivatives have several maps of {', '.join(several)}; keep one each",
        )
    labels: dict[str, Input] = {name: maps[name][0] for name in PROTOCOLS if name in maps}
    return Source(id_, scans[0], labels, visit=session, problem=problem)


def _described(root: Path) -> dict[str, Any]:
    """Returns dataset_description.json. Raises NeuronetError if it is missing, damaged, or no object."""
    path = root / "dataset_description.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NeuronetError(f"{path} cannot be read ({error}); every BIDS dataset has one") from error
    if not isinstance(content, dict):
        raise NeuronetError(f"{path} must hold an object {{…}}, not {json.dumps(content):.40}: correct it")
    return content
