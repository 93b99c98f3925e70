"""The command line, `neuronet`.

Heavy modules are imported when a command runs, so that --help answers at once. Each command has its module here, or
shares it: a function `add…` declares its arguments and examples, another runs it.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from neuronet_jax.cli import bids_app, completion, networks, segment, view
from neuronet_jax.programs import INTERRUPTED, Parser, run


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
  neuronet segment T1.nii.gz --out=labels
  neuronet COMMAND --help    options, results and more examples
""",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    segment.add(commands)
    bids_app.add(commands)
    view.add(commands)
    networks.add_import_dltk(commands)
    networks.add_export(commands)
    completion.add(commands, _parser)
    return parser
