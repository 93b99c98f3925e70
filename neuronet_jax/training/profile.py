"""A profile of some steps, for TensorBoard or Perfetto, where a config asks for one."""

import logging
import os
from typing import Any

import jax

from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs.directory import PROFILE, RunDirectory

log = logging.getLogger(__name__)


class Profile:
    """A trace from before the first of `steps` to after the last, below `run_dir`, by process 0 only.

    A profiler that fails is reported, and training goes on.
    """

    def __init__(self, run_dir: str | os.PathLike, steps: tuple[int, int] | None, process_index: int = 0):
        """Raises NeuronetError for a run in a bucket, where the profiler cannot write."""
        path = RunDirectory(run_dir).path
        if steps and "://" in path:
            raise NeuronetError(f"config.profile_steps needs a --workdir on a disk, got {path}")
        self._folder = f"{path}/{PROFILE}"
        self._first, self._last = steps if steps and process_index == 0 else (0, 0)
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace, if this is its first step."""
        if step == self._first:
            try:
                jax.profiler.start_trace(self._folder)
                self._running = True
            except Exception as error:
                log.warning("no profile: %s", error)

    def after(self, step: int, state: Any) -> None:
        """Ends the trace, if this is its last step. It then waits for the step."""
        if self._running and step >= self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace, if it is still running."""
        if not self._running:
            return
        self._running = False
        try:
            jax.profiler.stop_trace()
            log.warning("the profile of the steps %d to %d is in %s", self._first, self._last, self._folder)
        except Exception as error:
            log.warning("no profile: %s", error)
