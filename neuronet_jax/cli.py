"""The command line, `neuronet`.

Heavy modules are imported when a command runs, so that --help answers at once. A command is two functions: `_add_NAME`
declares its arguments and examples, `_NAME` runs it.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.programs import DONE, FAILED, INTERRUPTED, PARTIAL, Parser, run, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    status = run(_parser(), _command, arguments)
    if status == INTERRUPTED and arguments is None:  # a program, which need not wait for the scans in its threads:
        sys.stdout.flush()  # files of results appear only when they are complete
        sys.stderr.flush()
        os._exit(status)
    return status


def _command(args: argparse.Namespace) -> int:
    from neuronet_jax import runtime

    runtime.plain()
    return args.command(args)


def _parser() -> Parser:
    parser = Parser(
        "neuronet",
        description="One network that reproduces the outputs of FSL, SPM and MALP-EM on T1-weighted heads.",
        epilog="""\
examples:
  neuronet segment T1.nii.gz --run=runs/all_targets --out=labels
  neuronet COMMAND --help    options, results and more examples
""",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_segment(commands)
    _add_import_dltk(commands)
    _add_export(commands)
    return parser


def _add_segment(commands: Any) -> None:
    command = commands.add_parser(
        "segment",
        help="segment T1-weighted scans of heads, each on its own grid",
        description="Writes label maps and volumes of T1-weighted heads: raw scans in any orientation and voxel size.",
        statuses={FAILED: "an error, or no input could be used", PARTIAL: "some inputs were rejected; see summary.tsv"},
        epilog="""\
examples:
  one scan, all protocols of the run
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
        metavar="INPUT",
        help="a .nii, .nii.gz or .mgz file, a folder (its *_T1w images at any depth and the images directly in it), "
        "a raw BIDS dataset, or @FILE with a path per line or, as .csv or .tsv, the column t1 and optionally id",
    )
    command.add_argument(
        "--run",
        required=True,
        action="append",
        metavar="DIR",
        help="folder of a run or release; repeat it for an ensemble",
    )
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    command.add_argument(
        "--protocols", type=_names, metavar="NAME,…", help="a selection of the run's protocols (default: all)"
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
        help="probability maps of structures, named PROTOCOL:STRUCTURE as in the label tables",
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
    command.set_defaults(command=_segment)


def _shard(text: str) -> tuple[int, int]:
    """Parses "I/N"."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard: write 1/8, 2/8, … 8/8")
    return int(index), int(count)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _segment(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronet_jax import runtime
    from neuronet_jax.images import nifti
    from neuronet_jax.inference.segment import check_request
    from neuronet_jax.inference.segmentation import Options
    from neuronet_jax.results import bids, cohort, dataset, reports, tables
    from neuronet_jax.results import inputs as scans
    from neuronet_jax.results.resume import Records
    from neuronet_jax.runs.calibration import load_calibration, uncalibrated
    from neuronet_jax.runs.provenance import Provenance
    from neuronet_jax.runs.restore import restore
    from neuronet_jax.runtime import keep_compiled

    with _wrong_options():
        options = Options(
            args.flip, args.crops, args.fast, args.posteriors, args.consistent_tissue, not args.no_clean_up
        )
    found = scans.find(args.inputs)

    keep_compiled()
    console = Console(stderr=True)
    console.print(runtime.start(), highlight=False)
    model = restore(*args.run)
    derived = ("malp_em_tissue",) if options.consistent_tissue else ()
    protocols = tuple(dict.fromkeys(args.protocols or (*model.config.protocols, *derived)))
    with _wrong_options():
        check_request(model, protocols, options)
    if len(args.run) == 1:
        calibration = load_calibration(args.run[0], model.origin.step)
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
    records = Records(provenance, protocols, options.posteriors)
    todo, rows = records.unfinished(targets, args.overwrite)

    there = len(rows)
    limits = nifti.Limits(assume_ras=args.assume_ras)
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
    print(shown(f"{done} of {of} scans segmented{where}" + (f", {there} of them earlier" if there else "")))
    for code, meaning, count in reports.explained(ordered):
        print(f"{code} ({count} {'scan' if count == 1 else 'scans'}): {meaning}")
    if todo:
        print(work.timing(len(todo)))
    return DONE if done == of else PARTIAL if done else FAILED


def _told(args: argparse.Namespace) -> str:
    """Returns the options that decide about the labels, for the pages: without folders, which may reveal more."""
    told = [f"--run={Path(run).name}" for run in args.run]
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


def _add_import_dltk(commands: Any) -> None:
    command = commands.add_parser(
        "import-dltk",
        help="make a run from the published NeuroNet weights",
        description="Makes a run from a published TensorFlow SavedModel, without TensorFlow. The grid is 1 mm.",
        epilog="""\
examples:
  the published network for all five protocols (neuronet_all.tar.gz, unpacked)
    neuronet import-dltk neuronet_all/1514764800 --out=runs/published
    neuronet segment T1.nii.gz --run=runs/published --out=labels

  a network whose classes fit two protocols: name the right one
    neuronet import-dltk spm_tissue/1514764800 --out=runs/published_spm --config=spm_tissue
""",
    )
    command.add_argument(
        "saved_model", type=Path, metavar="SAVED_MODEL_DIR", help="the folder of saved_model.pb and variables/"
    )
    command.add_argument("--out", required=True, metavar="RUN", help="the run to write")
    command.add_argument(
        "--config", metavar="NAME", help="the network's name, if its classes fit several (fsl_fast, spm_tissue)"
    )
    command.add_argument(
        "--axes",
        default="SAL",
        metavar="XYZ",
        help="directions of the axes of its training arrays (default: %(default)s, as the authors read UK Biobank's "
        "files)",
    )
    command.set_defaults(command=_import_dltk)


def _import_dltk(args: argparse.Namespace) -> int:
    from neuronet_jax.dltk import import_run

    config = import_run(args.saved_model, args.out, args.config, args.axes)
    print(f"{args.out} holds the published network {config.name}: {', '.join(config.protocols)}")
    return DONE


def _add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained network as one program with its weights, for use without this library",
        description="Writes a run as StableHLO, safetensors and JSON. Programs take arrays [x y z] in RAS+ order at "
        "the run's voxel size; reorienting and resampling are left to the caller.",
        epilog="""\
examples:
  a program for images of any size (sides padded to multiples of 32), with its weights
    neuronet export --run=runs/all_targets --out=release

  programs for two fixed sizes
    neuronet export --run=runs/all_targets --out=release --shape=192,224,192 --shape=256,256,256

  the folder is also a run
    neuronet segment T1.nii.gz --run=release --out=labels

  how to run the program without this library
    python -c "import neuronet_jax.export; help(neuronet_jax.export)"

results:
  release/segment.jax_export    StableHLO for CPU, CUDA and TPU: whitening, network, tool ids
  release/weights.safetensors   its first argument
  release/release.json          config, protocols, label tables, voxel size, provenance, checksums
  release/quality.json          calibration of predicted Dice, if the run has one
  release/manifest.sha256       for sha256sum -c
""",
    )
    command.add_argument("--run", required=True, metavar="DIR", help="folder of a run or release")
    command.add_argument("--out", required=True, metavar="DIR", help="output folder")
    command.add_argument(
        "--shape",
        action="append",
        default=[],
        type=_shape,
        metavar="X,Y,Z",
        help="write a program for this size only, in multiples of 32; may be repeated",
    )
    command.set_defaults(command=_export)


def _shape(text: str) -> tuple[int, ...]:
    sides = text.split(",")
    if len(sides) != 3 or not all(side.strip().isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write X,Y,Z, such as 192,224,192")
    return tuple(int(side) for side in sides)


def _export(args: argparse.Namespace) -> int:
    from neuronet_jax.export import export
    from neuronet_jax.runs.calibration import load_calibration
    from neuronet_jax.runs.restore import restore

    model = restore(args.run)
    calibration = load_calibration(args.run, model.origin.step)
    export(model, args.out, args.shape, calibration)
    print(f"{args.out} holds the program, its weights and their description; sha256sum -c manifest.sha256 checks them")
    print(f"predicted Dice of `segment --run={args.out}`: {calibration.describe()}")
    return DONE
