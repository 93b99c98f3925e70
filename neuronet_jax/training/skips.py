"""Updates that the step refused: a record of their batches, and the end of a run that has too many of them.

A step refuses what is not finite, and spikes (see `step.py`). One bad batch is tolerated, a broken run is not.
"""

import json
import logging
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs.directory import SKIPPED, RunDirectory, records
from neuronet_jax.training.pipeline import HostBatch

MOST_IN_A_ROW = 10  # with shuffled crops, so many bad batches one after the other mean that the weights are bad
# Trouble scattered over a run: a tenth of the updates lost is no longer a few bad scans, whose crops would come up in
# proportion to their number. The share means nothing before there are some steps.
MOST_SHARE, LEAST_STEPS = 0.1, 100

log = logging.getLogger(__name__)


class TooManySkippedError(Exception):
    """A run that skipped too many updates to be worth going on."""


class Skips:
    """The skipped updates of a run. Every process of the run makes one and calls the same methods in the same order.

    Steps run ahead of the program that starts them. `add` therefore only keeps what belongs to a step, and `look`,
    where the program waits for its metrics anyway, sees which steps were skipped. Their batches are written to
    skipped.jsonl: the slots of the store and the first voxels of the crops, no subject.
    """

    def __init__(self, run_dir: str | os.PathLike, resume_step: int = 0):
        """Drops the lines of an earlier run after `resume_step`, because those steps are run again."""
        self._files = RunDirectory(run_dir).files
        self._recent: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []
        self._failed = False
        if jax.process_index() == 0:
            self._write(lambda lines: [line for line in lines if line["step"] <= resume_step])

    def add(self, step: int, metrics: dict[str, jax.Array], batch: HostBatch) -> None:
        """Remembers the batch of a step, without waiting for its result."""
        own = np.column_stack([batch["slot"], batch["start"]])  # [b 4], a copy
        self._recent.append((step, {name: metrics[name] for name in _KEPT}, own))

    def look(self) -> None:
        """Records the updates that were skipped since the last look. Raises TooManySkippedError if there are too many
        of them.
        """
        steps = [
            (step, {name: float(value) for name, value in metrics.items()}, own) for step, metrics, own in self._recent
        ]
        self._recent = []
        if refused := [entry for entry in steps if entry[1]["skipped"]]:
            self._record(refused)
            log.warning(
                "%d %s skipped up to step %d: loss or gradient not finite, or far above its average; see %s",
                *(len(refused), "update" if len(refused) == 1 else "updates", steps[-1][0], SKIPPED),
            )
        in_a_row = max((int(values["skipped"]) for _, values, _ in steps), default=0)
        if in_a_row > MOST_IN_A_ROW:
            raise TooManySkippedError(f"{in_a_row} updates in a row were skipped up to step {steps[-1][0]}")
        if steps and steps[-1][0] >= LEAST_STEPS:
            step, total = steps[-1][0], int(steps[-1][1]["skipped_total"])
            if total > MOST_SHARE * step:
                raise TooManySkippedError(f"{total} of the first {step} updates were skipped")

    def _record(self, refused: list[tuple[int, dict[str, float], np.ndarray]]) -> None:
        own = np.stack([own for _, _, own in refused])  # [n b 4]
        # All processes see the same metrics, so all of them come here.
        rows = np.asarray(multihost_utils.process_allgather(own)) if jax.process_count() > 1 else own[np.newaxis]
        if jax.process_index() != 0:
            return
        lines = []
        for number, (step, values, _) in enumerate(refused):
            crops = rows[:, number].reshape(-1, 4)  # [processes b 4] → [b 4]
            seen = {name: values[name] if math.isfinite(values[name]) else None for name in ("loss", "gradient_norm")}
            lines.append({"step": step, **seen, "slots": crops[:, 0].tolist(), "starts": crops[:, 1:].tolist()})
        self._write(lambda before: [*before, *lines])

    def _write(self, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
        try:
            before = self._files.read(SKIPPED) or b""
            after = "".join(f"{json.dumps(line)}\n" for line in change(records(before))).encode()
            if after != before:
                self._files.write(SKIPPED, after)
        except NeuronetError as error:
            if not self._failed:
                self._failed = True
                log.warning("%s cannot be written; training continues without it: %s", SKIPPED, error)


_KEPT = ("loss", "gradient_norm", "skipped", "skipped_total")  # metrics of a step
