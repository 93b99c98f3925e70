"""Checkpoints of a run: state, data position and config, written in the background and checked on reading.

    WORKDIR/checkpoints/<step>/state      arrays by path (`params/encoder/…`), Orbax's sharded format
                               position   JSON, written by the first process: the data position, the same for all
                               run        JSON: schema, versions, config, score, shape and dtype of every array
                               manifest.sha256   checksum of every file above; `sha256sum -c` reads it

Orbax writes into a temporary directory and renames it last; the manifest is written just before that. A checkpoint is
finished if and only if its directory is named by a step and holds a manifest.

Only verified checkpoints are read. One with a damaged file is reported and passed over, whatever it is asked for.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from types import TracebackType
from typing import Any, NamedTuple, TypeVar, cast

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import multihost

from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import children
from neuronet_jax.runs import arrays
from neuronet_jax.runs.checkpoint_info import CheckpointInfo
from neuronet_jax.runs.checksums import covered, read_checked, write_manifest
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.inspection import Inspection, is_finished, is_step
from neuronet_jax.runtime import gathered

_POSITION = "position.json"
# Arrays may take this many times the bytes of their files before a checkpoint counts as forged: zeros, such as fresh
# moments of an optimiser, compress to almost nothing, weights hardly at all. Small ones are never suspicious.
_MOST_INFLATION, _SMALL_BYTES = 64, 2**26

Read = TypeVar("Read")
log = logging.getLogger(__name__)


class Restored(NamedTuple):
    state: Any  # the target's tree; its leaves are jax.Arrays with the target's shardings
    data_position: Any  # as given to `save`; None after `reset_data`
    step: int


class Checkpoints:
    """The checkpoints of one run. Every process of the run makes one and calls the same methods in the same order.

    `run_dir` is local or gs://. The `keep` latest checkpoints stay, and the one with the best score. With `read_only`,
    nothing is written, removed or renamed, so a different job may be writing.

    Every method raises NeuronetError. The next `check`, `save`, `wait` or `close` raises the error of a background
    save.
    """

    def __init__(self, run_dir: str | os.PathLike, keep: int = 3, read_only: bool = False):
        """Raises NeuronetError if the directory is missing (`read_only`) or cannot be written."""
        _check_place(RunDirectory(run_dir).path)
        self._folder = epath.Path(RunDirectory(run_dir).checkpoints)
        self._keep = keep
        self._read_only = read_only
        self._saving: int | None = None  # the step that Orbax is writing
        self._inspection = Inspection(self._folder, quiet=read_only)
        if not read_only:
            self._probe()
        elif not self._folder.is_dir():
            raise NeuronetError(f"there are no checkpoints in {run_dir}; --run takes the --workdir of a training run")
        self._tidy()
        self._manager = None if read_only else self._writer()

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, oldest first."""
        return self._inspection.steps()

    def sound(self) -> list[int]:
        """Returns the steps of the finished checkpoints whose files match their checksums, oldest first.

        Files are hashed once, and again when they have changed since. The others are reported once.
        """
        return [step for step in self.steps() if not self._inspection.fault(step)]

    @property
    def faults(self) -> dict[int, str]:
        """The faults of the checkpoints that were passed over, by step."""
        return self._inspection.faults

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self, sound: Sequence[int] | None = None) -> int | None:
        """Returns the sound step of the highest score (of several, the latest), or None if none has a score.

        Give the result of `sound()` where it is at hand: looking at every file again costs requests in a bucket.
        """
        scores = {step: self._score(step) for step in (self.sound() if sound is None else sound)}
        return max((step for step in scores if scores[step] is not None), key=lambda s: (scores[s], s), default=None)

    def config(self, step: int) -> Config:
        """Returns the settings with which the checkpoint of `step` was trained."""
        return Config.from_fields(self._inspection.info(step).config)

    def save(self, step: int, state: Any, data_position: Any, config: Config, score: float | None = None) -> None:
        """Copies `state` off the devices, then returns. The rest continues in the background.

        `state` is any pytree of arrays. `data_position` is any JSON, the same in every process (a Grain
        iterator's `get_state()`). `score` is the mean validation Dice, if just measured; the best checkpoint is kept.
        Raises NeuronetError if `step` is not later than all checkpoints, because nothing would be saved.
        """
        manager = self._manager
        if manager is None:
            raise NeuronetError(f"checkpoint {step} was not saved: these checkpoints were opened with read_only")
        self.wait()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise NeuronetError(
                f"checkpoint {step} was not saved: there is a later one, {latest}; "
                "resume from the latest one, or give a new --workdir"
            )
        leaves = arrays.flatten(state)
        info = CheckpointInfo(
            config=config.to_fields(),
            score=float(score) if score is not None and math.isfinite(score) else None,
            arrays=arrays.describe(leaves),
            key_impls={path: str(jax.random.key_impl(leaf)) for path, leaf in leaves.items() if arrays.is_key(leaf)},
            versions={name: metadata.version(name) for name in ("jax", "orbax-checkpoint", "grain")},
        )
        self._saving = step
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave({path: arrays.raw(leaf) for path, leaf in leaves.items()}),
            position=_PositionSave(data_position),
            run=ocp.args.JsonSave(info.to_fields()),
        )
        try:
            saved = manager.save(step, args=items, force=True)
        except Exception as error:
            raise NeuronetError(f"checkpoint {step} could not be saved: {error}") from error
        if not saved:
            raise NeuronetError(f"checkpoint {step} was not saved: Orbax skipped it")

    def check(self) -> None:
        """Raises NeuronetError if a background save has failed. Cheap enough for every step."""
        if self._manager and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the background save, then removes checkpoints beyond `keep`."""
        if self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise NeuronetError(f"checkpoint {self._saving} could not be saved: {error}") from error
        if self._saving is not None:
            step, self._saving = self._saving, None
            if multihost.process_index() == 0:
                self._inspection.vouch(step)
                self._remove_old()

    def close(self) -> None:
        """Waits for the background save and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            try:
                if self._manager:
                    self._manager.close()
            except Exception as error:
                raise NeuronetError(f"the checkpoints in {self._folder} could not be closed: {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.close()
        except NeuronetError as failure:
            if error is None:
                raise
            log.warning("%s", failure)  # the first error is the one that says why the run ends

    def restore(
        self,
        target: Any,
        step: int | None = None,
        strict: bool = False,
        reset_data: bool = False,
        added: Collection[str] = (),
    ) -> Restored:
        """Restores the checkpoint of `step`, or the latest one, to the devices of `target`.

        `target` is the state's tree with arrays or `jax.ShapeDtypeStruct`s as leaves. Their shardings decide (one
        device without them), whatever devices wrote the checkpoint. Without `step`, a damaged checkpoint is set aside
        with a warning and the one before is taken; with `strict` or a `step` it is an error. Raises NeuronetError on a
        difference in tree, shape, dtype or kind of random key, naming every path, and if the data position is
        missing, unless `reset_data`. Paths in `added`, which a checkpoint of an older release lacks, keep the arrays of
        `target`.
        """
        step = self._sound(step, strict)

        def read() -> Restored:
            position = None if reset_data else self._position(step)
            return Restored(self._arrays(step, target, part=False, added=added), position, step)

        return _together(read)

    def restore_params(self, target: Any, step: int | None = None, strict: bool = False) -> tuple[Any, int]:
        """Restores a part of the state: `target` is any subtree with its path kept, such as `{"params": …}`.

        Returns that tree and its step.
        """
        step = self._sound(step, strict)
        return _together(lambda: self._arrays(step, target, part=True)), step

    def _score(self, step: int) -> float | None:
        try:
            return self._inspection.info(step).score
        except NeuronetError:  # of a newer release, or damaged this moment
            return None

    def _sound(self, step: int | None, strict: bool) -> int:
        """Returns the step to restore: `step`, or the latest whose files every process finds sound.

        The processes judge one checkpoint after the other and tell each other, so that all of them take the same one,
        or raise the same error, even if a file is damaged while they read or only one of them cannot read it.
        """
        self.wait()
        purpose = "looking for a sound checkpoint"
        lists = [[step]] if step is not None else gathered(self.steps(), purpose)
        problem = "there is none"
        for candidate in sorted({found for each in lists for found in each}, reverse=True):
            verdicts = gathered(self._inspection.fault(candidate), purpose)
            if not any(verdicts):
                if self._manager:
                    self._manager.reload()  # Orbax forgets the ones set aside
                return candidate
            process = next(index for index, fault in enumerate(verdicts) if fault)
            problem = (f"process {process}: " if len(verdicts) > 1 else "") + verdicts[process]
            if strict or step is not None:
                break
            if not verdicts[multihost.process_index()] and not self._read_only:
                log.warning("CHECKPOINT %d IS DAMAGED: %s. It is passed over.", candidate, problem)
            if multihost.process_index() == 0 and not self._read_only and (self._folder / str(candidate)).exists():
                self._rename(candidate, "damaged")
        if self._manager:
            self._manager.reload()
        wanted = f"checkpoint {step}" if step is not None else "any checkpoint"
        raise NeuronetError(
            f"cannot restore {wanted} of {self._folder.parent}: {problem}; sound ones: {self.sound() or 'none'}"
        )

    def _arrays(self, step: int, target: Any, part: bool, added: Collection[str] = ()) -> Any:
        every, info = arrays.flatten(target), self._inspection.info(step)
        kept = {path: leaf for path, leaf in every.items() if path in added and path not in info.arrays}
        if kept:
            log.warning("checkpoint %d is of an older release without %s, which begin anew", step, ", ".join(kept))
        wanted = {path: leaf for path, leaf in every.items() if path not in kept}
        if differences := arrays.differences(info.arrays, arrays.describe(wanted), part):
            raise NeuronetError(f"checkpoint {step} does not fit this model:\n  " + "\n  ".join(differences))
        self._check_size(step, sum(leaf.size * leaf.dtype.itemsize for leaf in wanted.values()))
        try:
            found = arrays.read(self._folder / str(step) / "state", wanted, info.key_impls, part)
        except Exception as error:
            raise NeuronetError(f"checkpoint {step} cannot be read: {error}") from error
        return jax.tree.unflatten(jax.tree.structure(target), [{**found, **kept}[path] for path in every])

    def _position(self, step: int) -> Any:
        folder = self._folder / str(step) / "position"
        names = [path.name for path in children(folder)]
        older = sorted(name for name in names if name.startswith("process_0_of_"))  # one per process before 0.2
        if _POSITION not in names and not older:
            raise NeuronetError(f"checkpoint {step} holds no data position; give --reset-data to restart the data")
        name = _POSITION if _POSITION in names else older[0]
        try:
            return json.loads(read_checked(self._folder / str(step), f"position/{name}"))
        except (ValueError, RecursionError) as error:
            raise NeuronetError(
                f"checkpoint {step}: {name} is not JSON ({error}); give --reset-data to restart the data"
            ) from error

    def _check_size(self, step: int, wanted_bytes: int) -> None:
        """Raises NeuronetError if arrays of `wanted_bytes` cannot come from the files of `step`, before any is made."""
        folder = self._folder / str(step)
        held_bytes = sum((folder / name).stat().length for name in covered(folder))
        if wanted_bytes > max(_SMALL_BYTES, _MOST_INFLATION * held_bytes):
            raise NeuronetError(
                f"checkpoint {step} claims arrays of {wanted_bytes} bytes, but its files hold {held_bytes}: it was "
                "changed; copy the run again"
            )

    def _probe(self) -> None:
        """Writes and removes a file, so that a run that cannot save ends before its first step."""
        probe = self._folder / f".probe-{multihost.process_index()}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(2**20))
            probe.unlink()
        except OSError as error:
            raise NeuronetError(f"cannot write checkpoints: {error}; give a --workdir that can be written") from error

    def _tidy(self) -> None:
        """Reports directories that look like checkpoints but are not finished; a writer moves them out of the way."""
        if multihost.process_index() == 0:
            for path in children(self._folder):
                if path.name.endswith(".deleting") and not self._read_only:
                    path.rmtree()
                elif is_step(path.name) and not is_finished(path):
                    log.warning("checkpoint %s was never finished and is ignored", path.name)
                    if not self._read_only:
                        self._rename(int(path.name), "unfinished")
        if not self._read_only:
            multihost.sync_global_processes("neuronet_jax:tidy")

    def _remove_old(self) -> None:
        """Removes old sound checkpoints, after a newer one is finished. The first process calls it.

        Renames first: half a checkpoint never has a step's name. Damaged ones stay for a person to judge.
        """
        sound = self.sound()
        for step in sorted(set(sound) - {*sound[-self._keep :], self.best(sound)}):
            try:
                self._rename(step, "deleting").rmtree()
            except OSError as error:
                log.warning("checkpoint %d could not be removed: %s", step, error)

    def _rename(self, step: int, why: str) -> epath.Path:
        aside = self._folder / f"{step}.{why}"
        if aside.exists():
            aside.rmtree()
        return (self._folder / str(step)).rename(aside)

    def _writer(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def _write_manifest(self) -> None:
        """Writes the manifest. Orbax calls this in its thread, on the first process, after the last file, before the
        commit.
        """
        for temporary in ocp.utils.tmp_checkpoints(self._folder):
            if temporary.get_final().name == str(self._saving):
                write_manifest(temporary.get())


def _check_place(path: str) -> None:
    """Raises NeuronetError for a bucket that checkpoints cannot be written to here."""
    if path.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise NeuronetError(f"checkpoints in {path} need gcsfs: pip install 'neuronet-jax[gcs]'")
    if "://" in path and not path.startswith("gs://"):
        raise NeuronetError(
            f"checkpoints are kept on a file system or at gs://, got {path}: give a different --workdir"
        )


def _together(read: Callable[[], Read]) -> Read:
    """Returns what `read` returns, once every process has read. Raises NeuronetError in all if it fails in one."""
    result, failure = None, None
    try:
        result = read()
    except NeuronetError as error:
        failure = error
    failures = gathered(failure and str(failure), "reading a checkpoint")
    if failure is not None:
        raise failure
    for process, told in enumerate(failures):
        if told is not None:
            raise NeuronetError(f"process {process} could not read the checkpoint: {told}")
    return cast(Read, result)


class _Position(ocp.CheckpointHandler):
    """One JSON file, written by Orbax."""

    def save(self, directory: epath.Path, args: "_PositionSave") -> None:
        if multihost.process_index() == 0:
            (directory / _POSITION).write_text(json.dumps(args.position))

    def restore(self, directory: epath.Path, args: object = None) -> None:
        raise NotImplementedError("the file is read without Orbax, see Checkpoints._position")


@ocp.args.register_with_handler(_Position, for_save=True, for_restore=True)
@dataclasses.dataclass
class _PositionSave(ocp.args.CheckpointArgs):
    position: Any
