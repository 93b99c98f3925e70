"""Trains and scores one network of a comparison, in a process of its own, so that its memory is its own.

    python -m experiments.compare.cell --config=NAME --out=CELL --split=test [--config.FIELD=…]

`CELL/run` is the run, `CELL/evaluation` its scores. A cell with scores is finished. An interrupted one continues with
the very next batch when the same command is given again.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import flags
from experiments.evaluate import SUMMARY, evaluate
from experiments.train import spread_over_cores, train
from neuronet_jax import runtime
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.programs import DONE, INTERRUPTED, Parser, run
from neuronet_jax.runs.directory import RunDirectory, changes
from neuronet_jax.runs.restore import restore
from neuronet_jax.store.reader import Store

EVALUATION = "evaluation"  # folder of a cell's scores


def is_scored(folder: Path) -> bool:
    """Tells whether a cell has its scores: their summary is written last."""
    return (folder / EVALUATION / SUMMARY).is_file()


def finished(folder: Path, config: Config) -> bool:
    """Tells whether a cell has its scores. Raises NeuronetError if they are those of different settings."""
    if not is_scored(folder):
        return False
    earlier = RunDirectory(folder / "run").config()
    if earlier is None:
        raise NeuronetError(f"{folder} has scores but no run: remove the folder, to train it again")
    if changed := changes(earlier, config):
        raise NeuronetError(
            f"{folder} was trained with different settings: {'; '.join(changed)}. Give the comparison a different --out"
        )
    return True


def train_and_score(config: Config, folder: Path, split: str, surfaces: bool = True) -> bool:
    """Trains and scores, and tells whether that was done to the end: a signal saves the run and stops."""
    state = train(config, str(folder / "run"), resume=True, begin=True)
    if int(state.step) < config.steps:
        return False
    store = Store.open(config.data.store)
    evaluate(restore(str(folder / "run")), store, split, folder / EVALUATION, surfaces, overwrite=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.compare.cell", description=__doc__, settings=True)
    parser.add_argument("--config", required=True, metavar="NAME", help="a named config, as for experiments.train")
    parser.add_argument("--out", required=True, type=Path, metavar="CELL", help="folder of the cell")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--no-surfaces", action="store_true", help="Dice alone")
    return run(parser, _cell, arguments)


def _cell(options: argparse.Namespace) -> int:
    runtime.plain()
    config = flags.load(options.config, options.overrides)
    runtime.keep_compiled()
    spread_over_cores(config)
    done = train_and_score(config, options.out, options.split, not options.no_surfaces)
    return DONE if done else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
