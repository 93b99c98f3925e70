"""What a program says on the side: one plain line for each warning, whoever gives it."""

import logging
import sys
import warnings
from typing import Any


def plain() -> None:
    """Makes this process write warnings and log messages to stderr as lines without file, logger and level.

    Those names mean something to a developer; to a user, the code at the start of a warning does.
    """
    warnings.formatwarning = _line
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.root.handlers:  # absl, which comes with Orbax, may have made one already
        if type(handler) is logging.StreamHandler:  # not those by which tests listen
            handler.setFormatter(logging.Formatter("%(message)s"))


def _line(message: Any, *_: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
