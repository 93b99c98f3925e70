"""The wall-clock time of a run, by what it was spent on.

    spent = Goodput()
    with spent.on("input"):
        batch = next(data)

Within nested blocks, time counts for the innermost one alone. Steps run ahead of the program that starts them: a wait
for a step's result counts as time of that step, and a wait for a batch counts even while the device still computes.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

# What time is spent on; the rest is "other". The first one alone moves the training on.
KINDS: tuple[str, ...] = ("step", "input", "compile", "evaluate", "save", "restore")


class Goodput:
    """A clock of one run, from its making on."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._began = now()
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._open: list[str] = []  # the blocks that are open, innermost last
        self._since = self._began  # when the innermost one went on

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Counts the time of the block for `kind`, one of KINDS."""
        self._turn()
        self._open.append(kind)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        """Gives the time since the last turn to the innermost block."""
        now = self._now()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each kind so far, and of all others as "other"; together they are the whole run."""
        self._turn()
        other = self._since - self._began - sum(self._seconds.values())
        return {**self._seconds, "other": max(other, 0.0)}  # sums of floats may differ in the last digit

    def metrics(self) -> dict[str, float]:
        """Returns the seconds by the names of metrics, and the share of steps in all of them as `goodput`."""
        seconds = self.seconds()
        share = seconds["step"] / max(sum(seconds.values()), 1e-9)
        return {f"seconds/{kind}": value for kind, value in seconds.items()} | {"goodput": share}

    def describe(self) -> str:
        """Returns one line such as `time: step 80.0 s (80 %), input 20.0 s (20 %)`, largest first."""
        seconds = self.seconds()
        whole = max(sum(seconds.values()), 1e-9)
        largest = sorted(seconds.items(), key=lambda entry: -entry[1])
        parts = (f"{kind} {value:.1f} s ({100 * value / whole:.0f} %)" for kind, value in largest)
        return f"time: {', '.join(parts)}"
