"""`neuronet bids`: the conventions of BIDS Apps."""

import argparse
from pathlib import Path
from typing import Any

from neuronet_jax.cli import segment
from neuronet_jax.errors import NeuronetError
from neuronet_jax.programs import FAILED, PARTIAL, some


def add(commands: Any) -> None:
    command = commands.add_parser(
        "bids",
        help="segment a BIDS dataset, with the arguments of a BIDS App",
        description="Segments the T1w images of a BIDS dataset into a derivative dataset, as `neuronet segment` does.",
        statuses={FAILED: "an error, or no input could be used", PARTIAL: "some inputs were rejected; see summary.tsv"},
        epilog="""\
examples:
  every participant
    neuronet bids bids bids/derivatives/neuronet participant --run=runs/all_targets

  two participants, one session
    neuronet bids bids labels participant --run=runs/all_targets --participant-label 01 02 --session-label 1
""",
    )
    command.add_argument("bids_dir", type=some(Path), metavar="BIDS_DIR", help="a raw BIDS dataset")
    command.add_argument("output_dir", type=some(Path), metavar="OUTPUT_DIR", help="the derivative dataset to write")
    command.add_argument("analysis_level", choices=("participant",), help="scans are segmented one by one")
    for name in ("participant", "session"):
        command.add_argument(
            f"--{name}-label", nargs="+", action="extend", default=[], metavar="LABEL", help=f"only these {name}s"
        )
    command.add_argument(
        "--skip-bids-validation",
        action="store_true",
        help="accept a dataset whose description or file names break the rules of BIDS",
    )
    segment.add_options(command)
    command.set_defaults(command=_bids)


def _bids(args: argparse.Namespace) -> int:
    from rich.console import Console

    from neuronet_jax.results import cohort, raw_bids

    folder, advice = args.bids_dir, "add --skip-bids-validation"
    if not folder.is_dir():
        raise NeuronetError(f"there is no folder {folder}")
    if not args.skip_bids_validation:
        raw_bids.check_description(folder, advice)
    chosen, left_out = raw_bids.choose(folder, raw_bids.images(folder), args.participant_label, args.session_label)
    if not args.skip_bids_validation:
        raw_bids.check_names(chosen, advice)
    if left_out:
        cohort.say(f"without a T1w image, and left out: {', '.join(left_out)}", Console(stderr=True, quiet=args.quiet))
    args.inputs, args.out = [str(image.path) for image in chosen], args.output_dir
    return segment.segment(args)
