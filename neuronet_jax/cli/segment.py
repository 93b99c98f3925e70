"""`neuronet segment`."""

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.programs import DONE, FAILED, PARTIAL, Parser, number, shown, some


def add(commands: Any) -> None:
    command = commands.add_parser(
        "segment",
        help="segment T1-weighted scans of heads, each on its own grid",
        description="Writes label maps and volumes of T1-weighted heads: raw scans in any orientation and voxel size.",
        statuses={FAILED: "an error, or no input could be used", PARTIAL: "some inputs were rejected; see summary.tsv"},
        epilog="""\
examples:
  one scan, with the network that ships with the package
    neuronet segment T1.nii.gz --out=labels

  one scan, with a network of your own
    neuronet segment T1.nii.gz --run=runs/all_targets --out=labels

  a BIDS dataset, two protocols
    neuronet segment bids --run=runs/all_targets --out=bids/derivatives/neuronet --protocols=fsl_fast,malp_em

  the scans of a list: a path per line, or a table with the columns id and t1
    neuronet segment @cohort.csv --run=runs/all_targets --out=labels

  a cohort on eight machines of a Slurm cluster, then one table of all scans
    sbatch --array=1-8 --wrap='neuronet segment bids --run=runs/all_targets --out=labels --shard=$SLURM_ARRAY_TASK_ID/8'
    neuronet segment bids --run=runs/all_targets --out=labels

  more accurate, in four times the time: an ensemble of two runs, each on the scan and its mirror image
    neuronet segment T1.nii.gz --run=runs/a --run=runs/b --flip --out=labels

  the probability of a structure in each voxel
    neuronet segment T1.nii.gz --run=runs/all_targets --out=labels --posteriors=fsl_first:LeftHippocampus

  replace the results with those of a newer model
    neuronet segment T1.nii.gz --run=runs/newer --out=labels --overwrite

To continue a command that was stopped, run it again: scans with complete results are skipped. An unusable input does
not stop the others; summary.tsv lists the outcome of each.

results, a BIDS derivative dataset:
  labels/sub-01/anat/sub-01_seg-malpem_dseg.nii.gz   labels in the tool's own ids, on the grid of the input
  labels/sub-01/anat/sub-01_volumes.tsv              voxels and mm³ of every structure
  labels/sub-01/anat/sub-01_agreement.tsv            Dice between the tools, for every region that they share
  labels/sub-01/anat/sub-01_desc-agreement_dseg.nii.gz   number of tools that agree on the tissue
  labels/sub-01/anat/sub-01_desc-brain_mask.nii.gz   the brain: what at least half of the tools label
  labels/sub-01/anat/sub-01_quality.tsv              entropy and predicted Dice of every structure
  labels/sub-01/anat/sub-01_report.html              pictures, volumes, agreement and warnings on one page
  labels/sub-01/anat/sub-01_provenance.json          the model, options and input of these results
  labels/seg-malpem_dseg.tsv                         the meaning of the ids
  labels/volumes.tsv                                 a row for each scan, a column for each structure
  labels/report.html                                 all scans on one page
  labels/summary.tsv                                 a row for each input; for a shard: summary_shard-1-of-8.tsv
These three tell of all scans in the folder, also of those of earlier commands.
""",
    )
    command.add_argument(
        "inputs",
        nargs="+",
        type=some(str),
        metavar="INPUT",
        help="a .nii, .nii.gz or .mgz file, a folder (its *_T1w images at any depth and the images directly in it), "
        "a raw BIDS dataset, or @FILE with a path per line or, as .csv or .tsv, the column t1 and optionally id",
    )
    command.add_argument("--out", required=True, type=some(Path), metavar="DIR", help="output folder")
    add_options(command)
    command.set_defaults(command=segment)


def add_options(command: Parser) -> None:
    """Declares the options that do not depend on how inputs are named."""
    command.add_argument(
        "--run",
        action="append",
        type=some(str),
        metavar="DIR",
        help="folder of a run or release; repeat it for an ensemble (default: the network that ships with the package)",
    )
    command.add_argument(
        "--protocols",
        type=_names,
        metavar="NAME,…",
        help="a selection of fsl_fast, fsl_first, spm_tissue, malp_em, malp_em_tissue (default: all of the run)",
    )
    command.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="segment only the Ith of N equal parts of the inputs (I from 1 to N)",
    )
    command.add_argument("--flip", action="store_true", help="average with the mirror image: twice the time")
    command.add_argument(
        "--crops", type=int, default=1, metavar="N", help="average over N positions of the grid: N times the time"
    )
    command.add_argument(
        "--fast", action="store_true", help="the head's box alone, labels of the nearest voxel, no averages"
    )
    command.add_argument(
        "--posteriors",
        type=_names,
        default=(),
        metavar="NAME,…",
        help="probability maps of structures, named PROTOCOL:STRUCTURE as in the label tables, such as "
        "fsl_first:LeftHippocampus",
    )
    command.add_argument(
        "--also",
        type=_names,
        default=(),
        metavar="NAME,…",
        help="further files: stats (FreeSurfer’s tables), mgz (label maps), 1mm (label maps with 1 mm voxels)",
    )
    command.add_argument(
        "--consistent-tissue", action="store_true", help="derive malp_em_tissue from malp_em, so that the two agree"
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results of a different model, options or input; complete results of this command are kept",
    )
    command.add_argument(
        "--assume-ras", action="store_true", help="accept files without orientation; left and right are then a guess"
    )
    command.add_argument(
        "--no-clean-up",
        action="store_true",
        help="keep labels that lie apart from the brain (see summary.tsv: removed_ml)",
    )
    command.add_argument("--no-report", action="store_true", help="write no HTML pages")
    command.add_argument(
        "--device", choices=("cpu", "gpu", "tpu"), help="where the network runs (default: the fastest)"
    )
    command.add_argument("--threads", type=number(int, 1), metavar="N", help="use at most N CPU cores")
    command.add_argument("--quiet", action="store_true", help="print errors and rejected inputs only")
    command.add_argument(
        "--log-file",
        type=some(Path),
        metavar="FILE",
        help="append what happens, with the time, to FILE; it names the scans",
    )


def _shard(text: str) -> tuple[int, int]:
    """Parses "I/N"."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard: write 1/8, 2/8, … 8/8")
    return int(index), int(count)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def segment(args: argparse.Namespace) -> int:
    """Segments `args.inputs` into `args.out`."""
    from rich.console import Console

    from neuronet_jax import runtime
    from neuronet_jax.images.headers import Limits
    from neuronet_jax.inference.segment import check_request
    from neuronet_jax.inference.segmentation import Options
    from neuronet_jax.results import bids, cohort, dataset, extras, reports, tables
    from neuronet_jax.results import inputs as scans
    from neuronet_jax.results.resume import Records
    from neuronet_jax.runs.calibration import load_calibration, uncalibrated
    from neuronet_jax.runs.directory import shipped
    from neuronet_jax.runs.provenance import Provenance
    from neuronet_jax.runs.restore import restore
    from neuronet_jax.runtime import keep_compiled

    with _wrong_options():
        options = Options(
            args.flip, args.crops, args.fast, args.posteriors, args.consistent_tissue, not args.no_clean_up
        )
    extras.check_kinds(args.also)
    found = scans.find(args.inputs)

    keep_compiled()
    runtime.use(args.device, args.threads)
    console = Console(stderr=True, quiet=args.quiet)
    if args.log_file:
        _log_to(args.log_file)
    cohort.say(runtime.start(), console)
    runs = args.run or [shipped()]
    model = restore(*runs)
    if not args.run:
        grid, note = f"{model.voxel_size_mm:g} mm", model.origin.note
        cohort.say(f"no --run: using the network that ships with neuronet-jax ({grid}; {note})", console)
    derived = ("malp_em_tissue",) if options.consistent_tissue else ()
    protocols = tuple(dict.fromkeys(args.protocols or (*model.config.protocols, *derived)))
    with _wrong_options():
        check_request(model, protocols, options)
    if len(runs) == 1:
        calibration = load_calibration(runs[0], model.origin.step)
    else:
        calibration = uncalibrated("an ensemble cannot use the calibration of one of its runs")
    provenance = Provenance(model.provenance.members, calibration.sha256, options.changed())
    results = dataset.Dataset(args.out, protocols, provenance, args.overwrite)
    results.check()
    targets = bids.plan(found.scans, args.out, protocols, options.posteriors, found.lists)
    refused = [tables.refused_row(*refusal) for refusal in found.refused]
    if args.shard is not None:
        targets = cohort.shard(targets, *args.shard)
        refused = refused if args.shard[0] == 1 else []  # one of the shards tells of them
    records = Records(provenance, protocols, options.posteriors, args.also)
    todo, rows = records.unfinished(targets, args.overwrite)

    there = len(rows)
    limits = Limits(assume_ras=args.assume_ras)
    work = cohort.Cohort(model, results, options, limits, records, calibration, not args.no_report, _told(args))
    for row in refused:
        cohort.report(row, console)
    try:
        for row in work.run(todo, console):
            rows[row.output] = row
    finally:
        ordered = [*refused, *(rows[target.stem] for target in targets if target.stem in rows)]
        if results.exists():  # nothing is written before there is a result
            if args.shard is None:
                dataset.update_summary(args.out, ordered)
            else:
                name = "summary_shard-{}-of-{}.tsv".format(*args.shard)
                tables.write_text(args.out / name, tables.summary_table(ordered))
    if results.exists() and args.shard is None:  # a shard does not know the others, and leaves the rest to the command
        dataset.write_cohort(args.out, provenance, calibration, not args.no_report)  # without --shard
    done, of = sum(row.status == "done" for row in ordered), len(targets) + len(refused)
    where = f" in {args.out}" if results.exists() else f"; nothing was written to {args.out}"
    _conclude(shown(f"{done} of {of} scans segmented{where}" + (f", {there} of them earlier" if there else "")), args)
    for code, meaning, count in reports.explained(ordered):
        _conclude(f"{code} ({count} {'scan' if count == 1 else 'scans'}): {meaning}", args)
    if todo and work.network_s:
        _conclude(work.timing(len(todo)), args)
    return DONE if done == of else PARTIAL if done else FAILED


def _conclude(text: str, args: argparse.Namespace) -> None:
    """Prints a line of the result, unless --quiet, and logs it."""
    from neuronet_jax.results import cohort

    cohort.LOG.info(text)
    if not args.quiet:
        print(text)


def _log_to(path: Path) -> None:
    """Appends what happens to a file, a line each, with the time. Raises NeuronetError if it cannot be written."""
    from neuronet_jax.results import cohort

    try:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise NeuronetError(f"cannot write --log-file={path}: {error}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for earlier in cohort.LOG.handlers[:]:  # of an earlier command in this process
        cohort.LOG.removeHandler(earlier)
        earlier.close()
    cohort.LOG.addHandler(handler)
    cohort.LOG.setLevel(logging.INFO)
    cohort.LOG.propagate = False  # the terminal has its own lines


def _told(args: argparse.Namespace) -> str:
    """Returns the options that decide about the labels, for the pages: without folders, which may reveal more."""
    told = [f"--run={Path(run).name}" for run in args.run or ()]
    for name in ("protocols", "posteriors"):
        told += [f"--{name}={','.join(getattr(args, name))}"] if getattr(args, name) else []
    told += [f"--crops={args.crops}"] if args.crops > 1 else []
    switches = ("flip", "fast", "consistent_tissue", "no_clean_up", "assume_ras")
    return " ".join([*told, *(f"--{name.replace('_', '-')}" for name in switches if getattr(args, name))])


@contextlib.contextmanager
def _wrong_options() -> Iterator[None]:
    """Reports requests that no input could fulfil as wrong options."""
    try:
        yield
    except NeuronetError as error:
        raise UsageError(str(error)) from error
