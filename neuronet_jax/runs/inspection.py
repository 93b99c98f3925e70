"""Finds the checkpoints of a folder that are finished and sound: their files are as they were written."""

import logging
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import children
from neuronet_jax.runs.checkpoint_info import CheckpointInfo, NewerSchemaError
from neuronet_jax.runs.checksums import MANIFEST, damage, read_checked, signature

log = logging.getLogger(__name__)


class Inspection:
    """The verdicts of this process on the checkpoints below `folder`. Files are hashed once, and again when they have
    changed since.
    """

    def __init__(self, folder: epath.Path, quiet: bool):
        """Logs each fault once, unless `quiet`."""
        self._folder, self._quiet = folder, quiet
        self._known: dict[int, tuple[Any, str]] = {}  # per step: the files when they were verified, and their fault
        self.faults: dict[int, str] = {}  # what was found wrong, by step

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, oldest first."""
        return sorted(int(path.name) for path in children(self._folder) if is_step(path.name) and is_finished(path))

    def info(self, step: int) -> CheckpointInfo:
        """Returns what the checkpoint says about itself. Raises NeuronetError if that is damaged or too new."""
        try:
            return CheckpointInfo.from_json(read_checked(self._folder / str(step), "run/metadata"))
        except NeuronetError as error:
            raise type(error)(f"checkpoint {step} has {error}") from error

    def fault(self, step: int) -> str:
        """Returns what is wrong with the files of `step`, or ""."""
        folder, files = self._folder / str(step), self._files(step)
        before, fault = self._known.get(step, (None, ""))
        if files is not None and files == before:
            return fault
        finished = is_finished(folder)
        fault = (damage(folder) or self._misfit(step)) if finished else "it is not there or was never finished"
        self._known[step] = (files, fault)
        if fault and folder.exists() and self.faults.get(step) != fault:  # else a writer has just removed it
            self.faults[step] = fault
            if not self._quiet:
                log.warning("CHECKPOINT %d IS DAMAGED: %s. It is passed over.", step, fault)
        return fault

    def vouch(self, step: int) -> None:
        """Takes the files of `step` for sound, because they were hashed a moment ago, for their manifest."""
        if is_finished(self._folder / str(step)):
            self._known[step] = (self._files(step), "")

    def _files(self, step: int) -> Any:
        """Returns the signature of the files of `step`, or None if there is none: they are then judged every time."""
        try:
            return signature(self._folder / str(step))
        except OSError:
            return None

    def _misfit(self, step: int) -> str:
        """Returns why no release wrote this `run/metadata`, or ""."""
        try:
            self.info(step)
        except NewerSchemaError:  # sound; whoever restores it is told
            return ""
        except NeuronetError as error:
            return str(error)
        return ""


def is_step(name: str) -> bool:
    """Tells whether a folder has the name of a step, as Orbax writes it: no leading zeros, no digits beyond ASCII."""
    return name.isdecimal() and name.isascii() and name == str(int(name))


def is_finished(folder: epath.Path) -> bool:
    """Tells whether a checkpoint was committed, with its manifest."""
    return ocp.utils.is_checkpoint_finalized(folder) and (folder / MANIFEST).exists()
