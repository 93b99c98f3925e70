"""Runs every step within minutes, on synthetic heads: train, segment a held-out scan, evaluate, report.

    python -m experiments.demo [--out=DIR] [--config=all_targets:demo] [--config.FIELD=…]

Each step is a separate command, printed before it runs. The numbers say nothing about real brains.
"""

import argparse
import csv
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep.demo.cohort import demo_manifest, ensure_demo_store
from experiments.steps import STATUSES, run_step
from neuronet_jax.programs import DONE, Parser, run

_PYTHON = shlex.quote(os.path.relpath(sys.executable))  # that of `make`, which is in no PATH


def held_out_head(store: Path) -> Path:
    """Returns the T1 image of the demo cohort's first test subject, as a scanner would have written it."""
    manifest = demo_manifest(store)
    with manifest.open(encoding="utf-8", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["split"] == "test")
    return manifest.parent / row["t1"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.demo", description=__doc__, settings=True, statuses=STATUSES)
    parser.add_argument("--out", default=time.strftime("runs/demo-%Y%m%d-%H%M%S"), help="output folder")
    parser.add_argument("--config", default="all_targets:demo", help="settings, as for experiments.train")
    return run(parser, _demo, arguments)


def _demo(options: argparse.Namespace) -> int:
    from experiments import evaluate, flags, report, train
    from neuronet_jax import cli

    start = time.monotonic()
    flags.load(options.config, options.overrides)  # refuses wrong settings before the cohort is made
    workdir, scores, heads, page = (f"{options.out}/{name}" for name in ("run", "evaluation", "heads", "report.html"))
    store = ensure_demo_store()
    overrides = [f"--config.data.store={store}", *options.overrides]
    head = held_out_head(store)
    steps: list[tuple[str, Callable[[Sequence[str]], int], list[str]]] = [
        ("experiments.train", train.main, [f"--config={options.config}", f"--workdir={workdir}", *overrides]),
        ("neuronet_jax", cli.main, ["segment", str(head), f"--run={workdir}", f"--out={heads}"]),
        ("experiments.evaluate", evaluate.main, [f"--run={workdir}", "--split=test", f"--out={scores}"]),
        ("experiments.report", report.main, [f"--run={workdir}", f"--eval={scores}", f"--out={page}"]),
    ]
    for step in steps:
        if status := run_step(*step):
            return status
    (scan,) = Path(heads).glob("sub-*/anat/*_report.html")
    print(f"""
The demo took {(time.monotonic() - start) / 60:.0f} minutes. Open in a browser:
  {scan}
    the held-out head, with the five label maps that the network gives it
  {page}
    scores and pictures of all test heads
To move through the head, or to segment one of your own with the network that ships:
  {_PYTHON} -m neuronet_jax view {shlex.join([heads, str(head)])}
  {_PYTHON} -m neuronet_jax segment T1.nii.gz --out=labels""")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
