"""The conventions of all programs: spelling of options, exit statuses, and error reports."""

import argparse
import difflib
import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from neuronet_jax import __version__, namesakes
from neuronet_jax.errors import NeuronetError, UsageError

DONE, FAILED, USAGE, PARTIAL = 0, 1, 2, 3  # argparse itself ends with 2
NOT_FINITE, OUT_OF_MEMORY, STALLED = 4, 5, 6  # of a training run
INTERRUPTED = 130  # the shells' status for Ctrl-C: 128 + SIGINT

STATUSES = {
    DONE: "done",
    FAILED: "an error; the message says what to do",
    USAGE: "wrong options",
    INTERRUPTED: "stopped by Ctrl-C",
}
SETTING = "--config."  # prefix of options that set a field of the config


class Parser(argparse.ArgumentParser):
    """A parser with `--version`, whose help ends with the exit statuses.

    Options are written in full. Their words are joined by `-`; `_` is accepted too. The fields of `--config.FIELD` are
    spelled with `_`, as in the config. `statuses` adds to STATUSES or replaces some. With `settings`, `parse_args`
    returns options `--config.FIELD` unparsed in the attribute `overrides`.
    """

    def __init__(self, *args: Any, statuses: Mapping[int, str] | None = None, settings: bool = False, **kwargs: Any):
        common = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **common, **kwargs)
        lines = [f"  {status:<4}{meaning}" for status, meaning in sorted((STATUSES | dict(statuses or {})).items())]
        self.epilog = "\n".join([*([self.epilog.rstrip(), ""] if self.epilog else []), "exit status:", *lines])
        self._settings = settings
        self.add_argument("--version", action="version", version=f"neuronet {__version__}")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)  # only operands follow
        given[:end] = [spelled(argument) for argument in given[:end]]
        self._refuse_unknown(given[:end])
        return super().parse_known_args(given, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore
        found, rest = self.parse_known_args(args, namespace)
        if self._settings:
            found.overrides = rest
        elif rest:
            self.error(f"unexpected arguments: {' '.join(rest)}")
        return found

    def _refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Ends the program at an unknown option, before argparse complains about missing ones."""
        known = self._option_string_actions
        for argument in arguments:
            name = argument.partition("=")[0]
            if self._subparsers is not None and not name.startswith("-"):
                self._refuse_unknown_command(argument)
                return  # the options of a command follow
            if name in known or not name.startswith("-") or _is_number(name) or name == "-":
                continue
            if not (self._settings and name.startswith(SETTING)):
                near = difflib.get_close_matches("--" + name.lstrip("-"), known, 1)
                self.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))

    def _refuse_unknown_command(self, name: str) -> None:
        commands = [c for action in self._subparsers._group_actions for c in action.choices or ()]  # type: ignore
        if name not in commands:
            near = difflib.get_close_matches(name, commands, 1)
            if os.path.exists(name):
                self.error(f"a command comes first, such as `{self.prog} {commands[0]} {name}`")
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(commands)}"
            self.error(f"there is no command {name}; {hint}")


def spelled(argument: str) -> str:
    """Spells the name of an option as the help does: `--voxel_size_mm=2` becomes `--voxel-size-mm=2`."""
    name, equals, value = argument.partition("=")
    if name.startswith(SETTING):
        return SETTING + name.removeprefix(SETTING).replace("-", "_") + equals + value
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def shown(text: str) -> str:
    """Returns the text as a terminal, a table or a page may show it.

    File names may hold control characters and bytes that are not UTF-8. These become `\\xNN`; line ends stay.
    """
    return "".join(c if c == "\n" or c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def some(kind: type) -> Callable[[str], Any]:
    """Returns a type for `add_argument` that takes any text but an empty one, such as that of an unset shell variable.

    As a path, an empty text would be the current folder.
    """

    def parse(text: str) -> Any:
        if not text.strip():
            raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
        return kind(text)

    return parse


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Returns a type for `add_argument` that takes a number of this kind from `least` to `most`, and says so."""
    takes = f"{'a whole number' if kind is int else 'a number'} from {least:g}"
    takes += f" to {most:g}" if most < math.inf else ""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"it takes {takes}, got {text!r}")
        return value

    return parse


def run(parser: Parser, command: Callable[[argparse.Namespace], int], arguments: Sequence[str] | None) -> int:
    """Runs `command` with the options in `arguments` and returns the exit status. An error becomes one message."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name that is not UTF-8 must not end the program
    options = parser.parse_args(arguments)
    try:
        namesakes.require()
        return command(options)
    except NeuronetError as error:
        print(f"{parser.prog}: error: {shown(str(error))}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped by Ctrl-C; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
