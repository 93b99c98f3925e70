"""The ways in which things go wrong: a bad input, a bad use of the library, and what can be gone on from.

Messages say the rule, the offending value and the fix.
"""


class NeuronetError(Exception):
    """The library was asked for something that it cannot do. The message says what to change."""


class UsageError(NeuronetError):
    """A program was called with options that it does not take. The message says which ones it takes."""


class CodedError(NeuronetError):
    """An error with a stable `code` (`E_CRC`, `E_AFFINE`, …), which other programs select on; people read `reason`."""

    def __init__(self, code: str, reason: str):
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self):  # both arguments survive the way back from a worker process
        return type(self), (self.code, self.reason)


class RejectError(CodedError):
    """One input is unusable; a cohort goes on without it."""


class CodedWarning(UserWarning):
    """Something is not as it was asked for, and the program goes on. Codes as those of CodedError, `W_…`."""

    def __init__(self, code: str, reason: str):
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.code, self.reason)
