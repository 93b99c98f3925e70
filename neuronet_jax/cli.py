"""The command line, `neuronet`. What is heavy is imported when a command runs, so that --help answers at once."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuronet_jax.errors import NeuronetError, RejectError

if TYPE_CHECKING:
    from neuronet_jax.inference import Model
    from neuronet_jax.outputs import Row, Target

DONE, FAILED, REJECTED = 0, 1, 3  # exit status; 2 is argparse's own

_EXAMPLES = """\
examples:
  one head, all protocols of the run
    neuronet segment T1.nii.gz --run=runs/all_targets --out=labels

  a BIDS dataset, two protocols; goes on past bad files and lists them in labels/summary.tsv
    neuronet segment bids/sub-*/anat/*_T1w.nii.gz --run=runs/all_targets --out=labels --protocols=fsl_fast,malp_em

  again, with a newer model
    neuronet segment T1.nii.gz --run=runs/newer --out=labels --overwrite

results, a BIDS derivative dataset:
  labels/sub-01/anat/sub-01_seg-malpem_dseg.nii.gz   labels in the tool's own ids, on the grid of the input
  labels/sub-01/anat/sub-01_volumes.tsv              voxels and mm³ of every structure
  labels/seg-malpem_dseg.tsv                         what the ids mean

exit status: 0 all done, 1 nothing could be done, 2 wrong arguments, 3 some inputs were rejected (see summary.tsv)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except NeuronetError as error:
        print(f"neuronet: {error}", file=sys.stderr)
        return FAILED


def _parser() -> argparse.ArgumentParser:
    text = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EXAMPLES}
    parser = argparse.ArgumentParser(
        "neuronet", description="One network that reproduces the outputs of FSL, SPM and MALP-EM.", **text
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "segment",
        help="label maps of T1-weighted heads, on their own grids",
        description="Label maps and volumes of T1-weighted heads: raw, in any orientation and voxel size.",
        allow_abbrev=False,
        **text,
    )
    command.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".nii, .nii.gz or .mgz")
    command.add_argument("--run", required=True, metavar="DIR", help="workdir of a training run")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    command.add_argument("--protocols", metavar="NAME,…", help="some of the run's protocols (default: all)")
    command.add_argument("--overwrite", action="store_true", help="replace results that exist")
    command.add_argument(
        "--assume_ras", action="store_true", help="accept files without orientation; left and right are then a guess"
    )
    command.set_defaults(command=_segment)
    return parser


def _segment(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import track

    from neuronet_jax import nifti, outputs
    from neuronet_jax.compilation import keep_compiled
    from neuronet_jax.inference import restore

    keep_compiled()
    model = restore(args.run)
    protocols = _choose(args.protocols, model.config.protocols)
    targets = outputs.plan(args.inputs, args.out, protocols, args.overwrite)
    outputs.prepare(args.out, protocols, model.provenance, args.overwrite)

    console = Console(stderr=True)
    limits = nifti.Limits(assume_ras=args.assume_ras)
    heads = _segment_all(model, targets, protocols, limits, args.overwrite)
    rows: list[Row] = []
    try:
        for row in track(heads, "segmenting", len(targets), console=console, disable=not console.is_terminal):
            rows.append(row)
            if row.status == "rejected":
                console.print(
                    f"{row.output} ({row.input}): {row.code}: {row.reason}", style="red", markup=False, highlight=False
                )
            elif row.warnings != "n/a":
                console.print(
                    f"{row.output} ({row.input}): {row.warnings}", style="yellow", markup=False, highlight=False
                )
    finally:
        outputs.write_summary(args.out, rows)
    done = sum(row.status == "done" for row in rows)
    print(f"{done} of {len(rows)} heads segmented in {args.out}")
    return DONE if done == len(rows) else REJECTED


def _choose(text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    wanted = known if text is None else tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in wanted if name not in known]:
        raise NeuronetError(f"--protocols: this run predicts {', '.join(known)}, not {unknown[0]!r}")
    return tuple(dict.fromkeys(wanted))


def _segment_all(
    model: "Model", targets: list["Target"], protocols: Sequence[str], limits: Any, overwrite: bool
) -> Iterator["Row"]:
    """What became of each head, in order. The next head is read and the last one written while the network runs."""
    from neuronet_jax import nifti, outputs
    from neuronet_jax.inference import segment_volume

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        volumes = [reader.submit(nifti.read_image, target.source, limits) for target in targets[:1]]
        rows: list[Future[Row] | Row] = []
        for index, target in enumerate(targets):
            if index + 1 < len(targets):
                volumes.append(reader.submit(nifti.read_image, targets[index + 1].source, limits))
            try:
                volume = volumes.pop(0).result()
                maps = segment_volume(model, volume, protocols)
                note = model.provenance.get("note", "")
                rows.append(writer.submit(outputs.write, target, volume, maps, overwrite, note))
            except RejectError as error:
                rows.append(outputs.Row(target.source.name, target.stem, "rejected", error.code, error.reason))
            if len(rows) > 1:  # two heads wait at most, however slow the disk
                yield _result(rows.pop(0))
        yield from map(_result, rows)


def _result(row: "Future[Row] | Row") -> "Row":
    return row.result() if isinstance(row, Future) else row
