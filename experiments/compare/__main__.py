"""Compares one network for all protocols with one for each, at equal budgets: trains, scores, tests, draws.

    python -m experiments.compare --out=comparison --config.data.store=/data/cohort --config.steps=20000
    python -m experiments.compare --out=comparison --variants=all_targets,fsl_fast --seeds=5 --config.data.store=…
    python -m experiments.compare --out=comparison --families=neuronet,reference --trials=10 --config.data.store=…

Settings `--config.FIELD=VALUE` hold for all networks; steps are those of the network of all protocols. Budgets and what
takes part in them are in `plan.py`, the tests in `statistics.py`, variants of one network in `family.py`.

The same command given again continues: a finished network is never trained again, an interrupted one goes on with the
very next batch. Given several times at once, on one machine or on many with one file system, the commands share the
networks among them; each takes the next that nobody has. As a Slurm array: `sbatch --array=1-8 --wrap="…"`.
"""

import argparse
import contextlib
import csv
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from experiments import flags
from experiments.compare import cell as cells
from experiments.compare import page, tuning
from experiments.compare.plan import BUDGETS, Arm, Cell, Plan, make_plan
from experiments.evaluate import SUMMARY
from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.lease import lease
from neuronet_jax.programs import DONE, INTERRUPTED, PARTIAL, SETTING, Parser, number, run
from neuronet_jax.results.cohort import duration

VARIANTS = ("all_targets", "tissue", *PROTOCOLS)
LEASE, TRIALS = "cell.lease", "trials.json"
TUNING_SEED = 1_000_003  # of the trials' networks, which no seed of the comparison repeats
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # which training saves at

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked to stop; what was training is saved."""


class Pace:
    """Counts finished networks, whoever trained them, and estimates the time that the others take."""

    def __init__(self, plan: Plan, out: Path):
        pairs = [(plan.cell(arm, seed).name, arm) for arm in plan.arms for seed in range(plan.seeds)]
        self._operations, self._out = {name: arm.steps * arm.operations for name, arm in pairs}, out
        self._began_s = time.monotonic()
        self._before = sum(self._finished().values())  # operations

    def _finished(self) -> dict[str, float]:
        return {name: size for name, size in self._operations.items() if cells.is_scored(self._out / "cells" / name)}

    def __str__(self) -> str:
        finished = self._finished()
        done, total = sum(finished.values()), sum(self._operations.values())
        told = f"{len(finished)} of {len(self._operations)} networks finished"
        if self._before < done < total:
            per_operation_s = (time.monotonic() - self._began_s) / (done - self._before)
            told += f", about {duration((total - done) * per_operation_s)} left"
        return told


def work(plan: Plan, out: Path, split: str, trials: int) -> list[str]:
    """Trains and scores what is unfinished and free. Returns the names of the cells that failed."""
    tuned = {arm: tune(plan, arm, out, trials) for arm in plan.arms} if trials else {}
    pace = Pace(plan, out)
    failed = []
    for seed in range(plan.seeds):
        for arm in plan.arms:
            settings = tuned.get(arm, ())
            if settings is None:  # somebody else's trials are not finished
                continue
            cell = plan.cell(arm, seed, settings)
            if cell.name not in failed and not _do(cell, out / "cells" / cell.name, split, pace):
                failed.append(cell.name)
    return failed


def tune(plan: Plan, arm: Arm, out: Path, trials: int) -> tuple[str, ...] | None:
    """Runs the trials of an arm that are missing. Returns the best settings as overrides; None while others do it.

    Raises NeuronetError if a trial fails.
    """
    folder = out / "tuning" / arm.name / f"{arm.steps}-steps"
    files = Files(str(folder.absolute()))
    with _held(folder) as mine:
        found = [(entry["settings"], entry["dice"]) for entry in json.loads(files.read(TRIALS) or b"[]")]
        while mine and len(found) < trials:
            settings = tuning.propose(found, TUNING_SEED)
            cell = plan.cell(arm, TUNING_SEED, _overrides(settings))
            place = folder / f"trial-{len(found) + 1}"
            if _in_own_process(cell, place, "validation", surfaces=False):
                raise NeuronetError(f"a trial failed: see {place}/log.txt")
            summary = json.loads((place / cells.EVALUATION / SUMMARY).read_text())
            means = [row["mean"] for row in summary["protocols"].values()]
            found.append((settings, sum(means) / len(means)))
            record = [{"settings": dict(s), "dice": dice} for s, dice in found]
            files.write(TRIALS, (json.dumps(record, indent=1) + "\n").encode())
    return _overrides(tuning.best(found[:trials])) if len(found) >= trials else None


def _overrides(settings: tuning.Settings) -> tuple[str, ...]:
    return tuple(f"{SETTING}{field}={value!r}" for field, value in settings.items())


def _do(cell: Cell, folder: Path, split: str, pace: Pace) -> bool:
    """Trains and scores a cell that is unfinished and free. Tells whether it did not fail."""
    config = cell.config()
    if cells.finished(folder, config):
        return True
    with _held(folder) as mine:
        if not mine or cells.finished(folder, config):  # a different command has it, or just had it
            return True
        log.info("training %s; %s", cell.name, pace)
        if _in_own_process(cell, folder, split):
            log.error("%s failed: see %s", cell.name, folder / "log.txt")
            return False
    return True


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Holds the lease of a folder for the block, and tells whether nobody else does."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lease(Files(str(folder.absolute())), LEASE))
            free = True
        except NeuronetError as error:
            if not str(error).startswith("E_LEASE"):
                raise
            free = False
        yield free


def _in_own_process(cell: Cell, folder: Path, split: str, surfaces: bool = True) -> int:
    """Runs `cell.py` and returns its exit status. Raises Stopped after a signal, once the cell is saved."""
    command = [sys.executable, "-m", cells.__name__, f"--config={cell.variant}", f"--out={folder}", f"--split={split}"]
    command += [] if surfaces else ["--no-surfaces"]
    asked: list[int] = []
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("ab") as told:
        # in a session of its own: the terminal's Ctrl-C then reaches it once, from here
        process = subprocess.Popen(
            [*command, *cell.overrides], stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True
        )

        def forward(signum: int, _: FrameType | None) -> None:
            asked.append(signum)
            process.send_signal(signum)

        earlier = {signum: signal.signal(signum, forward) for signum in _SIGNALS}
        try:
            status = process.wait()
        finally:
            for signum, handler in earlier.items():
                signal.signal(signum, handler)
    if asked:
        raise Stopped
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    statuses = {PARTIAL: "networks failed, or are not finished", INTERRUPTED: "stopped by a signal, and saved"}
    parser = Parser("python -m experiments.compare", description=__doc__, settings=True, statuses=statuses)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the comparison")
    parser.add_argument(
        "--variants", type=_names, default=VARIANTS, metavar="NAME,…", help=f"configs (default: {','.join(VARIANTS)})"
    )
    parser.add_argument(
        "--families", type=_names, default=("neuronet",), metavar="NAME,…", help="model.family (default: neuronet)"
    )
    parser.add_argument(
        "--budgets", type=_names, default=BUDGETS, metavar="NAME,…", help=f"of {', '.join(BUDGETS)} (default: both)"
    )
    parser.add_argument(
        "--seeds", type=number(int, 1), default=3, metavar="N", help="networks of each kind (default: 3)"
    )
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="to score (default: test)")
    parser.add_argument(
        "--trials", type=number(int, 0), default=0, metavar="N", help="tuning trials for each network (default: none)"
    )
    parser.add_argument(
        "--failed", type=Path, metavar="FILE", help="table of references that failed, with columns id and protocol"
    )
    return run(parser, _compare, arguments)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _compare(options: argparse.Namespace) -> int:
    runtime.plain()
    log.setLevel(logging.INFO)
    if unknown := sorted(set(options.budgets) - set(BUDGETS)):
        raise UsageError(f"--budgets takes {' and '.join(BUDGETS)}, got {unknown[0]!r}")
    if options.trials and options.split == "validation":
        raise UsageError("--trials chooses settings on the validation split: score on --split=test")
    if not flags.load(options.variants[0], options.overrides).data.store:
        raise UsageError("a comparison needs a store: add --config.data.store=…")
    failed = read_failed(options.failed) if options.failed else ()
    plan = make_plan(options.variants, options.families, options.budgets, options.seeds, options.overrides)
    log.info("%d networks, below %s", len(plan.cells()), options.out)
    try:
        wrong = work(plan, options.out, options.split, options.trials)
    except Stopped:
        log.warning("stopped as asked; the same command continues")
        return INTERRUPTED
    page.write(plan, options.out, options.split, failed)
    print(f"written to {options.out}/comparison.md and comparison.html")
    finished = all(cells.is_scored(options.out / "cells" / cell.name) for cell in plan.cells())
    return DONE if finished and not wrong else PARTIAL


def read_failed(path: Path) -> set[tuple[str, str]]:
    """Reads a table (.tsv or .csv) of subjects and protocols. Raises NeuronetError if it is none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t"))
        found = {(row["id"], row["protocol"]) for row in rows}
    except (OSError, UnicodeDecodeError, KeyError) as error:
        raise NeuronetError(f"--failed={path} is no table with the columns id and protocol ({error})") from error
    if unknown := sorted({protocol for _, protocol in found} - set(PROTOCOLS)):
        raise NeuronetError(f"--failed={path} names {unknown[0]!r}; the protocols are {', '.join(PROTOCOLS)}")
    return found


if __name__ == "__main__":
    sys.exit(main())
