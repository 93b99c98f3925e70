"""Runs a program with a time limit. What it starts ends with it."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

GRACE_S = 10.0  # between being asked to end and being killed: container engines stop their containers meanwhile
# The first process of a group: it waits for the end of its input, a pipe of which this process alone has the other end.
# Whatever ends this process closes that, SIGKILL included. Then it does to the group what `_end` would.
_WATCH = """trap '' TERM; read -r _; kill -s TERM 0; sleep "$1"; kill -s KILL 0"""

_running: set[int] = set()  # process groups, of all threads


class ToolError(Exception):
    """A program is missing, failed, took too long, or left no usable output. The text names no participant."""


def run(command: Sequence[str], folder: Path, log: Path, limit_s: float) -> None:
    """Runs a command in `folder`, with its output appended to the file `log`.

    Raises ToolError if the program cannot be started, ends with a status other than 0, or takes longer than `limit_s`.
    The program has a process group of its own, which ends with it and with this process, whatever the reason.
    """
    with log.open("ab") as output, _group() as group:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, process_group=group
            )
        except OSError as error:
            raise ToolError(f"{command[0]} cannot be started: {error.strerror}") from error
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise ToolError(f"{command[0]} took longer than {limit_s / 3600:g} hours and was ended") from None
        finally:
            _end(process, group)
    if status:
        raise ToolError(f"{command[0]} ended with {f'signal {-status}' if status < 0 else f'status {status}'}")


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Ends all programs if the block is left by an error, Ctrl-C or SIGTERM: in their own groups, they hear of none."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if in_main else None
    try:
        yield
    except BaseException:
        for group in tuple(_running):
            _signal(group, signal.SIGTERM)  # the thread that waits for it does the rest
        raise
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _group() -> Iterator[int]:
    """Gives a process group, and ends all that is left in it. It ends with this process even if that is killed."""
    watcher = subprocess.Popen(
        ["sh", "-c", _WATCH, "sh", f"{GRACE_S:g}"],
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    _running.add(watcher.pid)
    try:
        with watcher:
            try:
                yield watcher.pid
            finally:
                _signal(watcher.pid, signal.SIGKILL)
    finally:
        _running.discard(watcher.pid)


def _end(process: subprocess.Popen[bytes], group: int) -> None:
    """Ends the process and all that it has started."""
    if process.poll() is None:
        _signal(group, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    _signal(group, signal.SIGKILL)  # children may be left even of a process that has ended
    process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
