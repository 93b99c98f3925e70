"""`neuronet completion`."""

import argparse
from collections.abc import Callable
from typing import Any

from neuronet_jax.programs import DONE, Parser

SHELLS = ("bash", "zsh", "tcsh")


def add(commands: Any, parser: Callable[[], Parser]) -> None:
    """Declares the command. `parser` makes the parser whose options are completed."""
    command = commands.add_parser(
        "completion",
        help="print what completes commands and options in a shell",
        description="Prints a script that completes the commands and options of neuronet in a shell.",
        epilog="""\
examples:
  bash: what ~/.bashrc may hold
    eval "$(neuronet completion bash)"

  zsh: what a file _neuronet in a folder of $fpath should hold
    neuronet completion zsh
""",
    )
    command.add_argument("shell", choices=SHELLS)
    command.set_defaults(command=_completion, parser=parser)


def _completion(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(args.parser(), args.shell))
    return DONE
