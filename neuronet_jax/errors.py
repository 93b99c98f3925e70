"""The kinds of errors: a bad input, wrong use of the library, and problems after which a program continues.

Messages give the rule, the offending value and the fix.
"""

from collections.abc import Sequence


class NeuronetError(Exception):
    """A request that the library cannot fulfil. The message says what to change."""


class UsageError(NeuronetError):
    """Wrong options of a program. The message says which ones it takes."""


class CodedError(NeuronetError):
    """An error with a stable `code` (`E_CRC`, `E_AFFINE`, …) for programs, and a `reason` for people."""

    def __init__(self, code: str, reason: str):
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self):  # keeps both arguments on the way back from a worker process
        return type(self), (self.code, self.reason)


class RejectError(CodedError):
    """An unusable input. A cohort continues without it."""


class CodedWarning(UserWarning):
    """A problem after which the program continues. Codes are as for CodedError, `W_…`."""

    def __init__(self, code: str, reason: str):
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.code, self.reason)


def shortened(items: Sequence[str], most: int) -> list[str]:
    """Returns the first `most` items, and how many more there are: as much of a list as a message can hold."""
    return [*items[:most], *([f"and {len(items) - most} more"] if len(items) > most else [])]
