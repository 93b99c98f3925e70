"""Compares speed and memory with other implementations, side by side on one machine.

    python -m experiments.benchmark                         a training step and inference, against PyTorch
    python -m experiments.benchmark --size=128 --dtype=bfloat16 --against=torch-compile,torch-eager:float32    on a GPU
    python -m experiments.benchmark --what=head,head-resampled --against=torch-eager,dipy --run=RUN    whole heads
    python -m experiments.benchmark --what=head --against=torch-eager --run=neuronet_jax/pretrained    what ships
    python -m experiments.benchmark --against=tensorflow@tf-2.15/bin/python    in an environment of its own
    python -m experiments.benchmark --input                 the input pipeline, alone and under a training step
    python -m experiments.benchmark --preparation --manifest=cohort.csv    from files to a store, by 1 and 2 workers
    python -m experiments.benchmark --topology=v5e:2x4      a TPU slice, compiled for ahead of time (extra `tpu`)
    python -m experiments.benchmark --topology=cpu --size=64    the same prediction for this CPU, beside its measurement

Every contender runs in a separate process, so that its peak memory is its own. The runs alternate, A B A B, so that
other load on the machine affects all of them. Before timing, the contenders must agree: equal logits and losses from
equal weights. Compare the ratios; seconds depend on the machine. The tables go to OUT/benchmark.md and
OUT/benchmark.json.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark.contender import Job
from experiments.benchmark.heads import HEADS, save_weights, template_head
from experiments.benchmark.race import Failed, Measurement, agreement, race, table
from experiments.benchmark.serve import CONTENDERS
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.programs import DONE, Parser, number, run

WHATS = ("train", "inference", *HEADS)


def machine() -> str:
    """Returns the CPU, the number of cores that this process may use, and the system."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores, {platform.system()}"


def contenders(arguments: argparse.Namespace, what: str, folder: Path) -> list[Job]:
    """Returns our job first, then the others: NAME[:DTYPE][@PYTHON]."""
    jobs = []
    for entry in ["jax", *filter(None, arguments.against.split(","))]:
        contender, _, python = entry.partition("@")
        name, _, dtype = contender.partition(":")
        if python and not os.access(python, os.X_OK):
            raise UsageError(
                f"--against={entry}: after @ comes the Python of a different environment; {python} does not run"
            )
        if name not in CONTENDERS:
            raise UsageError(f"--against takes {', '.join(CONTENDERS)}, got {name!r}")
        if dtype not in ("", "float32", "bfloat16"):
            raise UsageError(f"--against={entry}: the dtypes are float32 and bfloat16, got {dtype!r}")
        if name == "dipy" and what not in HEADS:
            continue  # it segments whole heads only
        head, weights = (str(folder / f"{what}.nii"), _weights(arguments, folder)) if what in HEADS else ("", "")
        numbers = (arguments.size, arguments.batch, head, arguments.tile)
        jobs.append(Job(name, dtype or arguments.dtype, what, *numbers, weights, python))
    return jobs


def _weights(arguments: argparse.Namespace, folder: Path) -> str:
    return str(folder / "weights.npz") if arguments.run else ""


def versions(results: Sequence[Measurement]) -> list[str]:
    """Returns a line for each contender with the versions of its libraries."""
    return [f"{r.job.label}: " + ", ".join(f"{k} {v}" for k, v in r.about.items()) + "." for r in results if r.about]


def compare(arguments: argparse.Namespace) -> None:
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    whats = arguments.what.split(",")
    if unknown := set(whats) - set(WHATS):
        raise UsageError(f"--what takes {', '.join(WHATS)}, got {sorted(unknown)[0]!r}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what in set(whats) & set(HEADS):
            template_head(folder / f"{what}.nii", HEADS[what].spacing_mm, HEADS[what].shape)
        if arguments.run:
            save_weights(arguments.run, folder / "weights.npz")
        jobs = {what: contenders(arguments, what, folder) for what in whats}
        crops = [what for what in whats if what not in HEADS]  # for whole heads, the labels are compared instead
        differences = agreement(list({job.label: job for job in jobs[crops[0]]}.values())) if crops else {}
        lines = [f"# Benchmark\n\n{machine()}. Crop {arguments.size}³, batch {arguments.batch}, five protocols, "]
        lines[0] += f"medians of {arguments.repeats} alternating runs.\n"
        for name, d in differences.items():
            lines.append(
                f"{name} computes the same: logits to {d['logits']:.0e} of their sd, losses to {d['losses']:.0e}."
            )
        everything: dict[str, Any] = {"machine": machine(), "agreement": differences, "arguments": vars(arguments)}
        for what in whats:
            results = race(jobs[what], arguments.repeats)
            lines += ["", table(results)]
            lines += [
                f"\n{r.job.label} finds the same labels on {100 * r.agreement:.4f} % of all voxels."
                for r in results[1:]
                if not math.isnan(r.agreement)
            ]
            everything[what] = [dataclasses.asdict(r) | {"median": r.median} for r in results]
        lines += ["", *versions(results)]
    text = "\n".join(lines) + "\n"
    print(text)
    (out / "benchmark.md").write_text(text)
    (out / "benchmark.json").write_text(json.dumps(everything, indent=2))
    print(f"Written to {out / 'benchmark.md'} and {out / 'benchmark.json'}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.benchmark", description=__doc__)
    parser.add_argument("--size", type=int, help="voxels along each side of the crop (default: 96, for --topology 128)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the activations")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", default="train,inference", help=f"jobs among {', '.join(WHATS)}, separated by commas")
    parser.add_argument(
        "--against",
        default="torch-eager,torch-compile,jax-plain",
        help="contenders NAME[:DTYPE][@PYTHON], separated by commas",
    )
    parser.add_argument(
        "--tile",
        type=int,
        default=0,
        help="voxels along each side of the tiles in which PyTorch takes a whole head (default: 0, in one piece)",
    )
    parser.add_argument("--run", default="", help="folder of a trained run, whose weights segment the whole heads")
    parser.add_argument("--out", default="runs/benchmark")
    parser.add_argument("--input", action="store_true", help="measure the input pipeline")
    parser.add_argument("--store", default="", help="store for --input (default: the demo cohort enlarged to 1 mm)")
    parser.add_argument("--preparation", action="store_true", help="measure the preparation of data")
    parser.add_argument("--manifest", default="", help="cohort for --preparation, whose scans are repeated")
    parser.add_argument("--subjects", type=number(int, 1), default=60, help="for --preparation (default: 60)")
    parser.add_argument(
        "--voxel-size-mm", type=number(float, 0.2, 10), default=1.0, help="with --preparation (default: 1)"
    )
    parser.add_argument("--topology", help="predict the step of a TPU slice, such as v5e:2x4, or of this cpu")
    return run(parser, _benchmark, arguments)


def _benchmark(arguments: argparse.Namespace) -> int:
    arguments.size = arguments.size or (128 if arguments.topology else 96)
    if arguments.size < 8 or arguments.size % 8:
        raise UsageError(f"--size must be a multiple of 8, got {arguments.size}")
    if arguments.topology == "cpu":
        from experiments.benchmark import here

        here.measure(arguments.size, Path(arguments.out))
    elif arguments.topology:
        from experiments.benchmark import topology

        topology.measure(arguments.topology, arguments.size, Path(arguments.out))
    elif arguments.preparation:
        from experiments.benchmark import preparation

        out, workers = Path(arguments.out), (1, 2)
        preparation.measure(arguments.manifest, arguments.subjects, arguments.voxel_size_mm, workers, out)
    elif arguments.input:
        from experiments.benchmark import input as pipeline

        out = Path(arguments.out)
        pipeline.measure(arguments.store, arguments.size, arguments.batch, arguments.dtype, out)
    else:
        try:
            compare(arguments)
        except Failed as failure:
            raise NeuronetError(str(failure)) from failure
    return DONE


if __name__ == "__main__":
    sys.exit(main())
