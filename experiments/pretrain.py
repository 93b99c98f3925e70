"""Trains the network that ships, from a cohort and label maps to a release, in one command.

    python -m experiments.pretrain --manifest=cohort.csv --maps=label_maps --out=runs/pretrained [--config.FIELD=…]

For every grid, from coarse to fine: builds the store of brains, paints heads, and trains from the weights of the grid
before. Settings hold for every grid. Each step is a separate command, printed before it runs; Ctrl-C while one trains
saves. The same command continues with the first step that is not done.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments.steps import STATUSES, run_step
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation.scoring import validation_of
from neuronet_jax.programs import DONE, Parser, number, run
from neuronet_jax.runs.calibration import load_calibration
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import RELEASE
from neuronet_jax.runs.restore import restore
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

HEADS_PER_BRAIN = 6
NOTE = "weights for non-commercial use, CC BY-NC 4.0"  # of the labels that the shipped network learned from


class Step(NamedTuple):
    module: str
    command: Callable[[Sequence[str]], int]
    arguments: list[str]
    is_done: Callable[[], bool]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.pretrain", description=__doc__, settings=True, statuses=STATUSES)
    parser.add_argument(
        "--config",
        default="pretrained",
        metavar="NAME",
        help="settings of the last grid; its variants, such as pretrained:2mm, are those of the others "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--voxel-sizes-mm",
        type=_sizes,
        default="2,1.5,1",
        metavar="MM,…",
        help="grids, from coarse to fine (default: %(default)s)",
    )
    parser.add_argument("--manifest", required=True, metavar="CSV", help="stripped brains, as for data_prep.build")
    parser.add_argument("--maps", required=True, metavar="DIR", help="whole-head label maps, as for data_prep.heads")
    parser.add_argument(
        "--validation", type=number(int, 0), default=2, help="maps kept for validation (default: %(default)s)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for stores, runs and, at last, the release")
    parser.add_argument("--note", default=NOTE, help="for every report of the release (default: %(default)s)")
    return run(parser, _pretrain, arguments)


def _pretrain(options: argparse.Namespace) -> int:
    from experiments import flags

    flags.load("all_targets", options.overrides)  # refuses wrong settings before the stores are made
    for step in _steps(options):
        if step.is_done():
            continue
        if status := run_step(step.module, step.command, step.arguments):
            return status
        if not step.is_done():
            print("stopped as asked; the same command continues", flush=True)
            return DONE
    print(f"the release is in {options.out}/release")
    return DONE


def _steps(options: argparse.Namespace) -> Iterator[Step]:
    """Gives the steps in their order. A step reads what the ones before have made."""
    from data_prep import build
    from experiments import evaluate, flags, train
    from neuronet_jax import cli

    workdir = ""
    for voxel_size_mm in options.voxel_sizes_mm:
        grid, size = f"{voxel_size_mm:g}mm", f"--voxel-size-mm={voxel_size_mm:g}"
        start, workdir = workdir, f"{options.out}/run-{grid}"
        brains, heads = f"{options.out}/brains-{grid}", f"{options.out}/heads-{grid}"
        given = [f"--manifest={options.manifest}", f"--store={brains}", size]
        yield Step("data_prep.build", build.main, given, partial(_is_store, brains))
        given = [f"--maps={options.maps}", f"--brains={brains}", f"--heads-per-brain={HEADS_PER_BRAIN}"]
        given += [f"--validation={options.validation}", f"--store={heads}", size]
        yield Step("data_prep.heads", partial(_paint, heads), given, partial(_is_store, heads))
        name = options.config if voxel_size_mm == options.voxel_sizes_mm[-1] else f"{options.config}:{grid}"
        settings = [f"--config.data.store={brains}", f"--config.data.stores={heads}", *options.overrides]
        given = [f"--config={name}", f"--workdir={workdir}", "--resume", "--begin", *settings]
        given += [f"--init={start}"] if start else []
        steps = flags.load(name, settings).steps
        yield Step("experiments.train", train.main, given, partial(_is_trained, workdir, steps))
    given = [f"--run={workdir}", "--calibrate"]  # on all validation subjects; the training has taken some of them
    yield Step("experiments.evaluate", evaluate.main, given, partial(_is_calibrated, workdir, [brains, heads]))
    release = f"{options.out}/release"
    given = ["export", f"--run={workdir}", f"--out={release}", "--weights-only", f"--note={options.note}"]
    yield Step("neuronet_jax", cli.main, given, (Path(release) / RELEASE).exists)


def _sizes(text: str) -> tuple[float, ...]:
    sizes = tuple(map(number(float, 0.2, 10), text.split(",")))
    if sorted(set(sizes), reverse=True) != list(sizes):
        raise argparse.ArgumentTypeError(f"the grids go from coarse to fine, got {text}")
    return sizes


def _paint(store: str, arguments: Sequence[str]) -> int:
    from data_prep import heads

    shutil.rmtree(store, ignore_errors=True)  # half a store, which is not continued
    return heads.main(arguments)


def _is_store(path: str) -> bool:
    """Tells whether a store is finished. Raises NeuronetError if it is, but damaged: nothing paints over that."""
    try:
        Store.open(path)
    except StoreError as error:
        if error.code != "E_INCOMPLETE":
            raise
        return False
    return True


def _is_trained(workdir: str, steps: int) -> bool:
    try:
        return Checkpoints(workdir, read_only=True).latest() == steps
    except NeuronetError:  # nothing yet
        return False


def _is_calibrated(workdir: str, stores: Sequence[str]) -> bool:
    subjects = validation_of([Store.open(path) for path in stores])
    return load_calibration(workdir, restore(workdir).origin.step).heads == sum(
        any(subject.present) for _, subject in subjects
    )


if __name__ == "__main__":
    sys.exit(main())
