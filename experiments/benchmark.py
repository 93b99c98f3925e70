"""Speed and memory, side by side in one run on one machine.

    python -m experiments.benchmark                         a training step and inference, against PyTorch
    python -m experiments.benchmark --size=128 --dtype=bfloat16 --against=torch-compile,torch-eager:float32    on a GPU
    python -m experiments.benchmark --what=head --against=jax-whole,torch-eager,dipy    a whole head, also classically
    python -m experiments.benchmark --input                 the input pipeline, alone and under a training step
    python -m experiments.benchmark --topology=v5e:2x4      a TPU slice, compiled for ahead of time (extra `tpu`)

Every contender runs in a process of its own, so that its peak memory is its own, and the runs alternate, A B A B, so that what
else happens on the machine falls on all. First they show that they do the same: equal logits and losses from equal weights.
Ratios are what to read; seconds depend on the machine. The tables go to OUT/benchmark.md and OUT/benchmark.json.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.contenders import CONTENDERS, Job

LOGITS_TOLERANCE = 1e-3  # of the logits' standard deviation; float32 sums in another order differ by 1e-5
LOSS_TOLERANCE = 1e-3  # relative, after up to two steps of Adam, whose first ones amplify rounding of tiny gradients
SAMPLE_SECONDS = 0.5  # faster work is repeated within a sample: shorter ones measure the scheduler


class Failed(Exception):
    """A contender gave up; the message says why."""


class Process:
    """A contender in its own process, asked by `ask`."""

    def __init__(self, job: Job):
        self.job = job
        command = [sys.executable, "-m", "experiments.contenders", json.dumps(dataclasses.asdict(job))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises Failed where the contender did, or where its process died."""
        assert self.process.stdin
        assert self.process.stdout
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed(f"its process ended with status {self.process.wait()} (-9: killed, mostly for want of memory)")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.close()  # no more requests: it leaves by itself
        except BrokenPipeError:
            pass
        self.process.wait()
        self.process.stdout.close()


@dataclasses.dataclass
class Result:
    """What one contender did at one task."""

    job: Job
    seconds: list[float] = dataclasses.field(default_factory=list)  # per piece of work, one value per repeat
    memory: dict[str, float] = dataclasses.field(default_factory=dict)  # GiB by kind
    about: dict[str, str] = dataclasses.field(default_factory=dict)
    failure: str = ""

    @property
    def name(self) -> str:
        return f"{self.job.contender}:{self.job.dtype}"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def peak(self) -> float:
        """GiB on the device, or of the process where the device is the CPU."""
        return self.memory.get("device", self.memory.get("rss", math.nan))


def agreement(jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    """Largest difference of logits (in their standard deviations) and losses (relative) to the first contender.

    Raises Failed where one exceeds its tolerance. A contender with another network, or that is not there, is left out.
    """
    numbers: dict[str, dict[str, np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            path = Path(folder) / f"{job.contender}.npz"
            with Process(job) as process:
                try:
                    compared = process.ask(do="numbers", path=str(path))["compared"]
                except Failed as failure:
                    print(f"{job.contender} does not run: {failure}")
                    continue
            if compared:
                numbers[job.contender] = dict(np.load(path))
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
        raise Failed(f"{name} and {reference} do not compute the same: logits differ by {logits:.1e}, losses by {losses:.1e}")
    return {"logits": logits, "losses": losses}


def race(jobs: Sequence[Job], repeats: int) -> list[Result]:
    """Runs the contenders by turns; one that fails is out, with the reason."""
    results = [Result(job) for job in jobs]
    processes = [Process(job) for job in jobs]
    try:
        times = [_attempt(result, process, _warm_up) for result, process in zip(results, processes, strict=True)]
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


def _warm_up(process: Process) -> int:
    """Prepares, compiles and runs; returns how many pieces of work make one sample."""
    process.ask(do="time", times=1)
    seconds = process.ask(do="time", times=1)["seconds"]
    return max(1, math.ceil(SAMPLE_SECONDS / seconds))


def _attempt(result: Result, process: Process, action: Any) -> Any:
    try:
        return action(process)
    except Failed as failure:
        result.failure, result.seconds = str(failure), []
        return None


def table(results: Sequence[Result]) -> str:
    """Markdown; ratios are to the first contender: above 1 it is the faster, the smaller."""
    first = results[0]
    lines = [
        f"| {first.job.what} | dtype | seconds | range | ÷ {first.job.contender} | peak GiB | ÷ {first.job.contender} |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        if r.failure:
            lines.append(f"| {r.job.contender} | {r.job.dtype} | {r.failure} | | | | |")
            continue
        spread = f"{min(r.seconds):.3f} to {max(r.seconds):.3f}"
        lines.append(
            f"| {r.job.contender} | {r.job.dtype} | {r.median:.3f} | {spread} | {r.median / first.median:.2f} "
            f"| {r.peak:.2f} | {r.peak / first.peak:.2f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """CPU, cores that this process may use, system."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {platform.system()}"


def template_head(path: Path) -> None:
    """The MNI152 template at 1 mm, skull-stripped, which comes with nilearn: a whole head to segment."""
    from nilearn.datasets import load_mni152_template

    np.save(path, np.asarray(load_mni152_template(resolution=1).dataobj, np.float32))


def contenders(arguments: argparse.Namespace, what: str, head: str) -> list[Job]:
    """Ours first, then the others: NAME or NAME:DTYPE."""
    jobs = []
    for entry in ["jax", *filter(None, arguments.against.split(","))]:
        name, _, dtype = entry.partition(":")
        if name not in CONTENDERS:
            raise SystemExit(f"--against takes {', '.join(CONTENDERS)}, got {name!r}")
        if dtype not in ("", "float32", "bfloat16"):
            raise SystemExit(f"--against={entry}: the dtypes are float32 and bfloat16, got {dtype!r}")
        if (name == "dipy" and what != "head") or (name == "jax-whole" and what != "head"):
            continue  # these segment whole heads only
        jobs.append(Job(name, dtype or arguments.dtype, what, arguments.size, arguments.batch, head))
    return jobs


def compare(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    whats = arguments.what.split(",")
    if unknown := set(whats) - {"train", "inference", "head"}:
        raise SystemExit(f"--what takes train, inference, head, got {sorted(unknown)[0]!r}")
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "head.npy"
        if "head" in whats:
            template_head(head)
        jobs = {what: contenders(arguments, what, str(head)) for what in whats}
        unique = {job.contender: job for job in jobs[whats[0]]}
        differences = agreement(list(unique.values()))
        lines = [f"# Benchmark\n\n{machine()}. Crop {arguments.size}³, batch {arguments.batch}, five protocols, "]
        lines[0] += f"medians of {arguments.repeats} alternating runs.\n"
        for name, d in differences.items():
            lines.append(f"{name} computes the same: logits to {d['logits']:.0e} of their sd, losses to {d['losses']:.0e}.")
        everything: dict[str, Any] = {"machine": machine(), "agreement": differences, "arguments": vars(arguments)}
        for what in whats:
            results = race(jobs[what], arguments.repeats)
            lines += ["", table(results)]
            everything[what] = [dataclasses.asdict(r) | {"median": r.median} for r in results]
        versions = {k: v for r in results for k, v in r.about.items()}
        lines += ["", ", ".join(f"{k} {v}" for k, v in versions.items()) + "."]
    text = "\n".join(lines) + "\n"
    print(text)
    (out / "benchmark.md").write_text(text)
    (out / "benchmark.json").write_text(json.dumps(everything, indent=2))
    print(f"Written to {out / 'benchmark.md'} and {out / 'benchmark.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="voxels along each side of the crop, a multiple of 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the activations")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", default="train,inference", help="of train, inference, head")
    parser.add_argument("--against", default="torch-eager,torch-compile,jax-plain", help="NAME[:DTYPE], by commas")
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--input", action="store_true", help="measure the input pipeline")
    parser.add_argument("--topology", help="measure what XLA plans for a TPU slice, such as v5e:2x4")
    arguments = parser.parse_args()
    if arguments.size < 8 or arguments.size % 8:
        parser.error(f"--size must be a multiple of 8, got {arguments.size}")
    if arguments.topology:
        from experiments import benchmark_topology

        benchmark_topology.measure(arguments.topology, arguments.size, arguments.dtype, Path(arguments.out))
    elif arguments.input:
        from experiments import benchmark_input

        benchmark_input.measure(arguments.size, arguments.batch, arguments.dtype, Path(arguments.out))
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
