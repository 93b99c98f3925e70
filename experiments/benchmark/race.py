"""Runs contenders in turn and compares their results."""

import contextlib
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import heads
from experiments.benchmark.contender import Job
from experiments.benchmark.heads import HEADS
from neuronet_jax.errors import NeuronetError

LOGITS_TOLERANCE = 1e-3  # of the logits' standard deviation; float32 sums in a different order differ by 1e-5
LOSS_TOLERANCE = 1e-3  # relative, after up to two steps of Adam, which first amplify the rounding of tiny gradients
SAMPLE_SECONDS = 0.5  # faster work is repeated within a sample: shorter ones measure the scheduler


class Failed(Exception):
    """A contender failed; the message says why."""


class Process:
    """A contender in its own process, which answers `ask`."""

    def __init__(self, job: Job):
        self.job = job
        command = [
            job.python or sys.executable,
            "-m",
            "experiments.benchmark.serve",
            json.dumps(dataclasses.asdict(job)),
        ]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and returns the answer. Raises Failed if the contender or its process failed."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"its process ended with status {self.process.wait()} (-9: killed, usually out of memory)")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # no more requests: the process ends by itself
        self.process.wait()
        self.process.stdout.close()


@dataclasses.dataclass
class Measurement:
    """The measurements of one contender at one task."""

    job: Job
    seconds: list[float] = dataclasses.field(default_factory=list)  # per piece of work, one value per repeat
    memory: dict[str, float] = dataclasses.field(default_factory=dict)  # GiB by kind
    about: dict[str, str] = dataclasses.field(default_factory=dict)
    failure: str = ""
    agreement: float = math.nan  # share of a whole head's voxels with the first contender's label

    @property
    def name(self) -> str:
        return f"{self.job.label}:{self.job.dtype}"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def peak(self) -> float:
        """Peak GiB of the device, or of the process if the device is the CPU."""
        return self.memory.get("device", self.memory.get("rss", math.nan))

    @property
    def running(self) -> float:
        return self.memory.get("device", self.memory.get("running", math.nan))


def agreement(jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    """Returns the largest difference of logits (in their standard deviations) and losses (relative) to the first
    contender.

    Raises Failed if one exceeds its tolerance. A contender with a different network, or one that is missing, is left
    out.
    """
    numbers: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            path = Path(folder) / f"{len(numbers)}.npz"
            with Process(job) as process:
                try:
                    compared = process.ask(do="numbers", path=str(path))["compared"]
                except Failed as failure:
                    if job is jobs[0]:
                        raise
                    print(f"{job.label} does not run: {failure}")
                    continue
            if compared:
                numbers[job.label] = dict(np.load(path))
    names = list(numbers)
    return {name: _differences(name, numbers[name], names[0], numbers[names[0]]) for name in names[1:]}


def _differences(
    name: str, ours: dict[str, np.ndarray], reference: str, theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    logits = max(
        float(np.abs(ours[key] - value).max() / value.std()) for key, value in theirs.items() if key != "losses"
    )
    losses = float(np.abs(ours["losses"] / theirs["losses"] - 1).max())
    if not (logits <= LOGITS_TOLERANCE and losses <= LOSS_TOLERANCE):
        raise Failed(
            f"{name} and {reference} do not compute the same: logits differ by {logits:.1e}, losses by {losses:.1e}"
        )
    return {"logits": logits, "losses": losses}


def race(jobs: Sequence[Job], repeats: int) -> list[Measurement]:
    """Runs the contenders in turn. One that fails is out, with the reason.

    Raises Failed if the label maps of a whole head differ from the first contender's.
    """
    results = [Measurement(job) for job in jobs]
    processes = [Process(job) for job in jobs]
    maps: list[dict[str, np.ndarray]] = []
    try:
        times = []
        for result, process in zip(results, processes, strict=True):
            if result.job.what in HEADS:
                _attempt(result, process, lambda p, r=result: _compare_labels(p, r, maps))
            times.append(None if result.failure else _attempt(result, process, _warm_up))
        for _ in range(repeats):
            for result, process, count in zip(results, processes, times, strict=True):
                if not result.failure:
                    sample = _attempt(result, process, lambda p, n=count: p.ask(do="time", times=n)["seconds"])
                    result.seconds += [sample] if sample else []
        for result, process in zip(results, processes, strict=True):
            if not result.failure:
                answer = process.ask(do="memory")
                result.memory, result.about = answer["memory"], answer["about"]
    finally:
        for process in processes:
            process.__exit__()
    return results


def _compare_labels(process: Process, result: Measurement, maps: list[dict[str, np.ndarray]]) -> None:
    """Sets the agreement of the contender's label maps with the first ones in `maps`, and adds its own to `maps`."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "labels.npz")
        if not process.ask(do="labels", path=path)["compared"]:
            return
        maps.append(dict(np.load(path)))
    result.agreement = heads.agreement(maps[0], maps[-1])
    needed = heads.AGREEMENT_IN_TILES if result.job.tile else heads.AGREEMENT
    if not result.agreement >= needed:
        raise NeuronetError(
            f"{result.name} and the first contender label different heads: they agree on "
            f"{100 * result.agreement:.3f} % of all voxels, and {100 * needed:g} % are needed"
        )


def _warm_up(process: Process) -> int:
    """Prepares, compiles and runs the work. Returns how many pieces of work make one sample."""
    process.ask(do="time", times=1)
    process.ask(do="settle")
    seconds = process.ask(do="time", times=1)["seconds"]
    return max(1, math.ceil(SAMPLE_SECONDS / seconds))


def _attempt(result: Measurement, process: Process, action: Any) -> Any:
    try:
        return action(process)
    except Failed as failure:
        result.failure, result.seconds = str(failure), []
        return None


def table(results: Sequence[Measurement]) -> str:
    """Returns a Markdown table. Ratios are to the first contender: above 1, the first one is faster or smaller.

    The peak is that of the whole process, compilation included. The running peak counts from the second piece of work
    on.
    """
    first = results[0]
    ratio = f"÷ {first.job.label}"
    lines = [
        f"| {first.job.what} | dtype | seconds | range | {ratio} | peak GiB | {ratio} | running GiB | {ratio} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if r.failure:
            lines.append(f"| {r.job.label} | {r.job.dtype} | {r.failure} | | | | | | |")
            continue
        spread = f"{min(r.seconds):.3f} to {max(r.seconds):.3f}"
        lines.append(
            f"| {r.job.label} | {r.job.dtype} | {r.median:.3f} | {spread} | {r.median / first.median:.2f} "
            f"| {r.peak:.2f} | {r.peak / first.peak:.2f} | {r.running:.2f} | {r.running / first.running:.2f} |"
        )
    return "\n".join(lines)
