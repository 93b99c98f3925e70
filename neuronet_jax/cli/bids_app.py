"""`neuronet bids`: the conventions of BIDS Apps."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuronet_jax.cli import segment
from neuronet_jax.errors import NeuronetError
from neuronet_jax.programs import FAILED, PARTIAL


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
    command.add_argument("bids_dir", type=Path, help="a raw BIDS dataset")
    command.add_argument("output_dir", type=Path, help="the derivative dataset to write")
    command.add_argument("analysis_level", choices=("participant",), help="scans are segmented one by one")
    for name in ("participant", "session"):
        command.add_argument(
            f"--{name}-label", nargs="+", action="extend", default=[], metavar="LABEL", help=f"only these {name}s"
        )
    command.add_argument(
        "--skip-bids-validation", action="store_true", help="accept a folder without a valid dataset_description.json"
    )
    segment.add_options(command)
    command.set_defaults(command=_bids)


def _bids(args: argparse.Namespace) -> int:
    if not args.bids_dir.is_dir():
        raise NeuronetError(f"there is no folder {args.bids_dir}")
    if not args.skip_bids_validation:
        _check(args.bids_dir)
    args.inputs = [str(path) for path in _scans(args.bids_dir, args.participant_label, args.session_label)]
    args.out = args.output_dir
    return segment.segment(args)


def _check(folder: Path) -> None:
    """Raises NeuronetError if the dataset's description is missing, or lacks what BIDS requires."""
    path = folder / "dataset_description.json"
    advice = "correct it (the BIDS validator tells more), or add --skip-bids-validation"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NeuronetError(f"{path} cannot be read ({error}): {advice}") from error
    if missing := [name for name in ("Name", "BIDSVersion") if not isinstance(content, dict) or name not in content]:
        raise NeuronetError(f"{path} lacks {' and '.join(missing)}: {advice}")
    if content.get("DatasetType", "raw") != "raw":
        raise NeuronetError(f"{folder} is a dataset of type {content['DatasetType']!r}: give the raw dataset")


def _scans(folder: Path, participants: Sequence[str], sessions: Sequence[str]) -> list[Path]:
    """Returns the T1w images of these participants and sessions, of all if none is named.

    Raises NeuronetError for a label that no image has, and if no image is left.
    """
    found = [
        path
        for pattern in ("sub-*/anat/*_T1w.nii*", "sub-*/ses-*/anat/*_T1w.nii*")
        for path in sorted(folder.glob(pattern))
        if path.name.endswith((".nii", ".nii.gz"))
    ]
    chosen = found
    for entity, labels in (("sub", participants), ("ses", sessions)):
        wanted = [label.removeprefix(f"{entity}-") for label in labels]
        have = {path: match[1] for path in found if (match := re.search(rf"{entity}-([A-Za-z0-9]+)", path.name))}
        if unknown := [label for label in wanted if label not in have.values()]:
            raise NeuronetError(f"{folder} has no T1w image of {', '.join(f'{entity}-{label}' for label in unknown)}")
        chosen = [path for path in chosen if not wanted or have.get(path) in wanted]
    if not chosen:
        raise NeuronetError(f"{folder} has no T1w image (sub-*/[ses-*/]anat/*_T1w.nii.gz) that was asked for")
    return chosen
