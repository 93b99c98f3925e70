"""Early ends of a run: on request (signals of the scheduler or the keyboard), or because it has stalled."""

import faulthandler
import logging
import os
import signal
import sys
import threading
from types import TracebackType

import jax
from jax.experimental import multihost_utils

from neuronet_jax.programs import STALLED

log = logging.getLogger(__name__)


class StopRequest:
    """A flag that SIGTERM, SIGINT and SIGUSR1 set, to be checked after every step.

        with StopRequest() as stop:
            for step in …:
                …
                if stop.requested(step):
                    break  # save, then exit 0

    After that, Ctrl-C ends the process at once. In a run of several processes, one signal to one of them is enough:
    JAX's preemption service, which handles SIGTERM there, gives all of them the same answer at the same step.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        self._distributed = jax.process_count() > 1
        signals = (
            [signal.SIGINT, signal.SIGUSR1] if self._distributed else [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM]
        )
        self._previous = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Tells whether to save and stop after `step`. Every process must ask at every step."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # first: whoever reads the message may interrupt at once
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step; Ctrl-C ends at once\n".encode())
        if self._distributed:
            os.kill(os.getpid(), signal.SIGTERM)


class Watchdog:
    """A thread that ends the process with STALLED when the run makes no progress.

    After `timeout_s` without `progress`, it warns and writes the stacks of all threads to stderr. After twice that time
    it writes them again and exits, so that a scheduler can restart the job. Causes are, for example, a hung reader or a
    lost peer in a collective. It counts its own ticks instead of reading the clock: a process that was suspended has
    not stalled.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._moves = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def progress(self) -> None:
        """Records progress. Call it after every step, evaluated subject and save."""
        self._moves += 1

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        tick_s = self._timeout_s / 20
        moves, still_s, warned = 0, 0.0, False
        while not self._closed.wait(tick_s):
            if moves != self._moves:
                moves, still_s, warned = self._moves, 0.0, False
                continue
            still_s += tick_s
            if still_s >= self._timeout_s and not warned:
                warned = True
                log.warning("no progress for %.3g s; the run ends after as long again without progress", still_s)
                faulthandler.dump_traceback(all_threads=True)
            if still_s >= 2 * self._timeout_s:
                log.error("no progress for %.3g s: ending the process with status %d", still_s, STALLED)
                faulthandler.dump_traceback(all_threads=True)
                sys.stdout.flush()
                os._exit(STALLED)  # a stalled main thread cannot raise
