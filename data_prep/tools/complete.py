"""Completes a cohort: runs tools for the label maps that its visits lack, and keeps the maps.

The maps of a visit lie in OUT/TOOL/ID or OUT/TOOL/ID_VISIT, with the tool's log and `made.json`, which says from which
scan and by which commands they were made. A folder has that name only when its maps are complete and checked. The same
call goes on where it was interrupted, and runs a tool again for a scan or for commands that have changed. A visit whose
tool fails stays without that map, and its log stays as OUT/TOOL/ID.log.

Until then, a tool works in a hidden folder of OUT/TOOL, whose name tells the process, but no participant. Those of
processes that have ended are removed by the next call.
"""

import dataclasses
import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.progress import track

from data_prep.sources.files import Fingerprint, is_unchanged, stamp
from data_prep.sources.source import Source, locate
from data_prep.tools import process
from data_prep.tools.process import ToolError
from data_prep.tools.tools import SCAN, TOOLS
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.images import nifti
from neuronet_jax.images.headers import DEFAULT_LIMITS, Limits
from neuronet_jax.images.space import Volume
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.lease import has_ended, this_process

MADE = "made.json"
_GRID_MM = 1e-3  # by which the affine of a map may differ from the scan's
_ABANDONED_HOURS = 7 * 24  # of a working folder of a different machine: several times what the slowest tool may take

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The tools to run, and how."""

    tools: tuple[str, ...]  # of TOOLS
    out: Path
    words: Mapping[str, tuple[str, ...]]  # a tool's leading words, where they are not its own
    stripped: bool = False  # scans are skull-stripped already
    jobs: int = 1  # tools at the same time
    hours: float | None = None  # time limit of every tool, where it is not the tool's own


class Completed(NamedTuple):
    """A cohort, and how many of its label maps' tools failed."""

    sources: list[Source]
    failed: int
    tried: int


class _Task(NamedTuple):
    tool: str
    index: int  # of the visit


def complete(
    sources: Sequence[Source], settings: Settings, limits: Limits = DEFAULT_LIMITS, progress: bool = False
) -> Completed:
    """Returns the sources with the maps that were made for them. Maps that a source has are not made again.

    Raises NeuronetError if a program is not there, before any is run.
    """
    for name in settings.tools:
        _require(name, settings)
    for name in settings.tools:
        _sweep(settings.out / name)
    located = [_located(source) for source in sources]
    tasks = [
        _Task(name, index)
        for index, source in enumerate(located)
        for name in settings.tools
        if source and any(protocol not in source.labels for protocol in TOOLS[name].protocols)
    ]
    stop = threading.Event()  # what runs is ended, and nothing new is begun

    def work(task: _Task) -> dict[str, Path] | None:
        source = located[task.index]
        assert source is not None
        if stop.is_set():
            return None
        try:
            return _maps_of(source, task.tool, settings, limits)
        except (ToolError, RejectError) as error:
            row, folder = source.row or task.index + 1, settings.out / task.tool
            log.warning("W_TOOL: %s, row %d: %s; its log is in %s", task.tool, row, error, folder)
            return None
        except OSError as error:  # of what is written: a scan that cannot be read is a RejectError
            folder = settings.out / task.tool
            raise NeuronetError(
                f"E_IO: cannot write in {folder}: {error.strerror}; run it again to continue"
            ) from error

    completed, failed = list(sources), 0
    with ThreadPoolExecutor(settings.jobs) as pool, process.ending():
        try:
            found = track(pool.map(work, tasks), "running tools", len(tasks), console=Console(stderr=True),
                          disable=not progress)  # fmt: skip
            for task, maps in zip(tasks, found, strict=True):
                source, there = completed[task.index], located[task.index]
                failed += maps is None
                made = {name: path for name, path in (maps or {}).items() if there and name not in there.labels}
                completed[task.index] = dataclasses.replace(source, labels={**source.labels, **made})
        except BaseException:
            stop.set()
            raise
    return Completed(completed, failed, len(tasks))


def _located(source: Source) -> Source | None:
    try:
        return locate(source)
    except RejectError:
        return None  # the build says why


def _require(name: str, settings: Settings) -> None:
    """Raises NeuronetError if the first program that a tool runs is not there."""
    (program, *_), *_ = _commands(name, settings)
    if not shutil.which(program):
        raise NeuronetError(
            f"--run-tools={name} needs the program {program}, which is not on the PATH; install it, or name what comes "
            f"before its arguments, such as --tool {name}='apptainer exec --bind {{folder}} --pwd {{folder}} image.sif'"
        )


def _commands(name: str, settings: Settings) -> list[list[str]]:
    tool = TOOLS[name]
    return tool.commands(settings.words.get(name, tool.words), settings.stripped)


def _maps_of(source: Source, name: str, settings: Settings, limits: Limits) -> dict[str, Path]:
    """Returns the maps of one visit, made now or before."""
    tool, commands = TOOLS[name], _commands(name, settings)
    key = "_".join(filter(None, (source.id, source.visit)))
    final = settings.out / name / key
    if _is_made(final, source, commands):
        return {protocol: final / f"{protocol}.nii.gz" for protocol in tool.protocols}
    # Nobody else's: a second command with the same OUT works in a folder of its own, and the last to finish counts.
    work = settings.out / name / f".{this_process()}.{uuid.uuid4().hex}"
    note = settings.out / name / f"{key}.log"
    work.mkdir(parents=True)
    note.unlink(missing_ok=True)
    try:
        started, before = time.monotonic(), stamp(source.t1)
        scan = nifti.read_image(source.t1, limits)
        nib.save(nib.Nifti1Image(scan.data, scan.affine), work / SCAN)
        tool.prepare(work)
        hours = settings.hours or tool.hours
        for command in commands:
            words = [word.replace("{folder}", str(work.absolute())) for word in command]
            process.run(words, work, note, hours * 3600)
        ready = work / "ready"
        ready.mkdir()
        for protocol, found in tool.maps(work).items():
            _check(protocol, found, scan)
            nifti.write_labels(ready / f"{protocol}.nii.gz", found.data, scan)
        made = {"scan": list(before), "commands": commands, "seconds": round(time.monotonic() - started)}
        (ready / MADE).write_text(json.dumps(made) + "\n")
        note.rename(ready / "log.txt")
        shutil.rmtree(final, ignore_errors=True)
        ready.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {protocol: final / f"{protocol}.nii.gz" for protocol in tool.protocols}


def _sweep(folder: Path) -> None:
    """Removes the working folders of processes that were killed. On a cluster, others may be at work in `folder`."""
    for work in folder.glob(".*.*"):
        ended = has_ended(work.name[1:].partition(".")[0])
        if ended or (ended is None and _idle_hours(work) > _ABANDONED_HOURS):
            shutil.rmtree(work, ignore_errors=True)


def _idle_hours(folder: Path) -> float:
    """Returns the time since anything in a folder was last written; 0 if it goes away meanwhile."""
    try:
        return (time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))) / 3600
    except OSError:
        return 0.0


def _is_made(final: Path, source: Source, commands: Sequence[Sequence[str]]) -> bool:
    """Tells whether the maps are there, of this scan and by these commands."""
    try:
        made = json.loads((final / MADE).read_text())
        return made["commands"] == commands and is_unchanged(source.t1, Fingerprint(*made["scan"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check(protocol: str, found: Volume, scan: Volume) -> None:
    """Raises ToolError for a map on a different grid or without a label, and RejectError for one with unknown ids."""
    if found.data.shape != scan.data.shape or np.abs(found.affine - scan.affine).max() > _GRID_MM:
        raise ToolError(f"its map of {protocol} lies on a different grid than the scan")
    if not PROTOCOLS[protocol].to_classes(found.data).any():
        raise ToolError(f"its map of {protocol} is empty")
