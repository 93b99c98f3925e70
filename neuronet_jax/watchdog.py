"""A thread that ends the process when progress stops: a hang costs a whole allocation, an exit is requeued."""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

EXIT_STALLED = 6  # the exit code of a process that stopped making progress

_log = logging.getLogger(__name__)


def _exit() -> None:
    os._exit(EXIT_STALLED)  # the stalled thread cannot be asked, so nothing is unwound


class Watchdog:
    """Warns when no `beat` came for `seconds`, and after twice that writes every thread's stack to stderr and exits.

        with Watchdog(300, "training") as watchdog:
            for batch in batches:
                ...
                watchdog.beat()

    `on_stall` replaces the exit (code 6). Daemon worker processes end with this one.
    """

    def __init__(self, seconds: float, what: str, on_stall: Callable[[], None] = _exit):
        self._seconds, self._what, self._on_stall = seconds, what, on_stall
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watchdog-{what}", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def beat(self) -> None:
        """Says that progress was made."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        warned = 0.0  # the beat that was warned about
        while not self._stop.wait(self._seconds / 10):
            last = self._last
            still = time.monotonic() - last
            if still > 2 * self._seconds:
                print(f"{self._what} made no progress for {still:.0f} s; the threads stand here:", file=sys.stderr)
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                self._on_stall()
                return
            if still > self._seconds and warned != last:
                _log.warning("%s made no progress for %.0f s; ends at %.0f s", self._what, still, 2 * self._seconds)
                warned = last
