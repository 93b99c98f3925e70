"""`neuronet completion`."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from neuronet_jax.programs import DONE, Parser

SHELLS = ("bash", "zsh", "fish", "tcsh")
_FOLDERS = ("DIR", "RUN", "OUT", "SAVED_MODEL_DIR", "BIDS_DIR", "OUTPUT_DIR")  # metavars of what takes a folder
_FILES = ("FILE", "INPUT")


def add(commands: Any, parser: Callable[[], Parser]) -> None:
    """Declares the command. `parser` makes the parser whose options are completed."""
    command = commands.add_parser(
        "completion",
        help="print what completes commands, options and files in a shell",
        description="Prints a script that completes the commands, options and files of neuronet in a shell.",
        epilog="""\
examples:
  bash: what ~/.bashrc may hold
    eval "$(neuronet completion bash)"

  zsh: what ~/.zshrc may hold, after compinit
    eval "$(neuronet completion zsh)"

  fish: once, and again after an update
    neuronet completion fish > ~/.config/fish/completions/neuronet.fish

  tcsh: what ~/.tcshrc may hold
    neuronet completion tcsh > ~/.neuronet.tcsh; source ~/.neuronet.tcsh
""",
    )
    command.add_argument("shell", choices=SHELLS, help="the shell to print a script for")
    command.set_defaults(command=_completion, parser=parser)


def _completion(args: argparse.Namespace) -> int:
    import shtab

    parser = args.parser()
    for action in _actions(parser):  # without this, a shell that has the script completes no file names any more
        if action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY
        elif action.metavar in _FILES:
            action.complete = shtab.FILE
    print(shtab.complete(parser, args.shell))
    return DONE


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """Yields the arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
