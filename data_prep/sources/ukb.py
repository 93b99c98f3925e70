"""An archive of UK Biobank: field 20252, zipped or unpacked, with outputs of further tools beside it.

    EID_20252_2_0.zip       participant, field, instance (2: first imaging visit, 3: repeat), array
    EID_20252_2_0/T1/…      the same, unpacked

Of each visit, the T1-weighted scan and the maps of FAST and FIRST are taken. They share one grid. SPM and MALP-EM are
run by each study itself; their maps are found by a pattern of their path.
"""

import logging
import os
import re
import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

from data_prep.sources.files import Input
from data_prep.sources.source import Source
from data_prep.sources.zips import Member
from neuronet_jax.errors import NeuronetError

_VISIT = re.compile(r"([0-9]+)_20252_([0-9]+)_([0-9]+)(\.zip)?", re.IGNORECASE)
_T1 = "T1/T1.nii.gz"
_FAST = {"seg": "T1/T1_fast/T1_brain_seg.nii.gz", "pveseg": "T1/T1_fast/T1_brain_pveseg.nii.gz"}
_FIRST = "T1/T1_first/T1_first_all_fast_firstseg.nii.gz"
_FIELDS = ("eid", "instance")  # of a pattern

log = logging.getLogger(__name__)


def read_archive(
    folder: Path,
    *,
    fast: Literal["seg", "pveseg"] = "seg",
    instances: Collection[str] = (),
    outputs: Mapping[str, str] | None = None,
) -> list[Source]:
    """Lists the visits in `folder`, at any depth, by participant and instance.

    `fast` chooses FAST's hard segmentation or the one by the largest partial volume. `instances` keeps some of the
    visits (default: all). `outputs` gives, by protocol, a pattern with {eid} and {instance} of the path of a map.
    A zip is preferred to its unpacked folder. A visit that is there several times, or lacks its scan, is refused alone.
    Raises NeuronetError if nothing is found, for a wrong pattern, and for a pattern that fits no file.
    """
    if not folder.is_dir():
        raise NeuronetError(f"--ukb: there is no folder {folder}; give the one that holds EID_20252_2_0.zip and others")
    maps = {"fsl_fast": _FAST[fast], "fsl_first": _FIRST}
    found: dict[tuple[str, str], dict[str, Path]] = {}  # the zip or folder of each array, by participant and instance
    twice: set[tuple[str, str]] = set()
    for path, match in _visits(folder):
        eid, instance, array = match[1], match[2], match[3]
        if instances and instance not in instances:
            continue
        key, is_zip = (eid, instance), match[4] is not None
        arrays = found.setdefault(key, {})
        earlier = arrays.get(array)
        if earlier is not None and (earlier.suffix.lower() == ".zip") == is_zip:
            twice.add(key)
        if earlier is None or is_zip:
            arrays[array] = path
        if len(arrays) > 1:
            twice.add(key)
    if not found:
        wanted = f" of the instances {', '.join(sorted(instances))}" if instances else ""
        raise NeuronetError(f"{folder} holds no EID_20252_INSTANCE_ARRAY.zip and no such folder{wanted}, at any depth")
    sources = []
    for (eid, instance), arrays in sorted(found.items(), key=lambda visit: tuple(map(int, visit[0]))):
        source = _source(min(arrays.values()), eid, instance, maps)
        if (eid, instance) in twice:
            source = replace(source, problem=("E_DUPLICATE", "the archive holds this visit several times; keep one"))
        sources.append(source)
    for protocol, pattern in (outputs or {}).items():
        sources = _joined(sources, protocol, pattern)
    return sources


def _visits(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    """Yields zips and unpacked folders with the parts of their names, in the order of their paths."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if (match := _VISIT.fullmatch(name)) and match[4]:
                yield Path(place, name), match
        for name in [name for name in folders if _VISIT.fullmatch(name)]:
            folders.remove(name)  # a visit holds no further visits
            match = _VISIT.fullmatch(name)
            if match and not match[4]:
                yield Path(place, name), match


def _source(path: Path, eid: str, instance: str, maps: Mapping[str, str]) -> Source:
    if path.suffix.lower() == ".zip":
        members: dict[str, Input] = {name: Member(path, member) for name, member in maps.items()}
        return Source(eid, Member(path, _T1), members, visit=instance)
    there: dict[str, Input] = {name: path / member for name, member in maps.items() if (path / member).exists()}
    problem = None
    if not (path / _T1).exists():
        judged = (path / "T1" / "unusable").is_dir()
        reason = "UK Biobank judged the scan unusable" if judged else "unpack the archive again"
        problem = ("E_ZIP_MEMBER", f"the folder lacks {_T1}; {reason}")
    return Source(eid, path / _T1, there, visit=instance, problem=problem)


def _joined(sources: Sequence[Source], protocol: str, pattern: str) -> list[Source]:
    """Adds the maps of a protocol that exist at the paths of a pattern."""
    option = f"--{protocol.replace('_', '-')}" if protocol != "spm_tissue" else "--spm"
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
    except ValueError as error:
        raise NeuronetError(f"{option}: {pattern} is no pattern: {error}") from error
    if "eid" not in fields or not fields <= set(_FIELDS):
        raise NeuronetError(
            f"{option}: a pattern has the fields {{eid}} and {{instance}}, as in /spm/{{eid}}_{{instance}}.nii.gz; got "
            f"{pattern}"
        )
    participants = len({source.id for source in sources})
    if "instance" not in fields and participants < len(sources):
        raise NeuronetError(
            f"{option}: {len(sources) - participants} visits are repeats, which {pattern} does not tell apart; add "
            "{instance} to it, or choose one visit with --instances=2"
        )
    paths = [Path(pattern.format(eid=source.id, instance=source.visit)) for source in sources]
    with ThreadPoolExecutor(32) as pool:  # a network file system answers many requests at once
        there = list(pool.map(Path.exists, paths))
    if not any(there):
        raise NeuronetError(f"{option}: no file fits {pattern}; correct the pattern")
    if missing := there.count(False):
        log.warning("%s: %d of %d visits have no such file", option, missing, len(sources))
    return [
        replace(source, labels={**source.labels, protocol: path}) if exists else source
        for source, path, exists in zip(sources, paths, there, strict=True)
    ]
