"""One owner at a time: a small file names the process that owns a run or a shard, and shows whether it is alive.

It works on disk, on a shared file system and in a bucket: every change is a conditional write, so of several processes
that see an abandoned lease exactly one gets it. A process of this machine that has ended is detected at once. Any other
owner rewrites its lease every few seconds, so a lease that stays unchanged has no owner.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files

BEAT_S = 10.0
_PATIENCE_S = 60.0  # six missed beats: longer than a network file system or a bucket stalls

_held: set[str] = set()  # tokens of this process's live leases: a token that is not here is that of an earlier block

log = logging.getLogger(__name__)


class Lease:
    """A lease that this process holds."""

    def __init__(self, files: Files, name: str):
        self._files, self._name = files, name
        self._owner = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "token": uuid.uuid4().hex,
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self._beats = 0
        self._version = b""
        self._lost = False
        self._turn = threading.Lock()  # one conditional write at a time, each with the version of the last
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def check(self) -> None:
        """Raises NeuronetError E_LEASE if a different process has taken the lease over. Cheap enough for every step."""
        if self._lost:
            raise NeuronetError(
                f"E_LEASE: {self._place} was taken over while this process did not answer for {_PATIENCE_S:.0f} s; "
                "let the new owner continue"
            )

    def confirm(self) -> None:
        """Raises NeuronetError E_LEASE, as `check` does, after asking the file itself: before work becomes final."""
        with self._turn:
            if not self._lost:
                self._renew()
        self.check()

    @property
    def _place(self) -> str:
        return f"{self._files.dest}/{self._name}"

    def _acquire(self) -> None:
        found, version = self._files.read_version(self._name)
        if found is not None:
            holder = _parsed(found)
            if self._is_alive(holder, version):
                raise NeuronetError(
                    f"E_LEASE: {self._files.dest} is in use since {holder['since']} by process {holder['pid']} on "
                    f"{holder['host']}, see {self._name}; wait for it, or stop it first"
                )
            log.warning(
                "taking over %s from process %s on %s, which is gone", self._place, holder["pid"], holder["host"]
            )
        taken = self._files.replace(self._name, self._content(), version)
        if taken is None:
            raise NeuronetError(f"E_LEASE: a different process was faster to take {self._place}; let it work")
        self._version = taken
        self._thread.start()

    def _is_alive(self, holder: dict[str, Any], version: bytes) -> bool:
        if holder["machine"] and holder["machine"] == self._owner["machine"]:
            if holder["pid"] == os.getpid():
                return holder["token"] in _held
            return _started(holder["pid"]) == holder["started"] != ""
        waited = 0.0
        while waited < _PATIENCE_S:
            time.sleep(BEAT_S / 2)
            waited += BEAT_S / 2
            if self._files.read_version(self._name)[1] != version:
                return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with self._turn, contextlib.suppress(NeuronetError):  # a failed write counts as a missed beat
                self._renew()
            if self._lost:
                return

    def _renew(self) -> None:
        """Writes the next beat, or learns that a different process has taken the file. The caller has the turn."""
        self._beats += 1
        version = self._files.replace(self._name, self._content(), self._version)
        self._lost = version is None
        self._version = version or self._version

    def _release(self) -> None:
        self._ended.set()
        self._thread.join()
        if not self._lost:
            self._files.replace(self._name, None, self._version)

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "beat": self._beats}).encode()


@contextlib.contextmanager
def lease(files: Files, name: str) -> Iterator[Lease]:
    """Holds the file `name` for the duration of the block.

    Raises NeuronetError E_LEASE, which names host and time, if a live process holds it.
    """
    mine = Lease(files, name)
    token = mine._owner["token"]
    _held.add(token)
    try:
        mine._acquire()
        try:
            yield mine
        except BaseException:
            with contextlib.suppress(NeuronetError):  # a server that has gone is named by what failed first
                mine._release()
            raise
        mine._release()
    finally:
        _held.discard(token)


def this_process() -> str:
    """Names this process in letters, digits and `-`: its machine, its id there, and when it started."""
    return f"{_short_machine()}-{os.getpid()}-{_started(os.getpid())}"


def has_ended(process: str) -> bool | None:
    """Tells whether the process of a name by `this_process` has ended. None where that cannot be seen from here: for a
    process of a different machine, or of this one before it was started anew.
    """
    machine, _, rest = process.partition("-")
    pid, _, started = rest.partition("-")
    if not _machine() or machine != _short_machine() or not pid.isdigit():
        return None
    return _started(int(pid)) != started


def _parsed(found: bytes) -> dict[str, Any]:
    """Returns the owner that a lease names. An unreadable one names nobody, and only its beats speak for it."""
    unknown = {"host": "an unknown host", "machine": "", "pid": 0, "started": "", "token": "", "since": "unknown time"}
    try:
        content = json.loads(found)
        return unknown | {name: type(unknown[name])(content[name]) for name in unknown if name in content}
    except (ValueError, TypeError):
        return unknown


def _machine() -> str:
    """Identifies the space in which process ids are valid: two containers of one host name are two machines."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _short_machine() -> str:
    return hashlib.sha256(_machine().encode()).hexdigest()[:16]


def _started(pid: int) -> str:
    """Returns when a process of this machine started, in the kernel's ticks; empty if it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = status.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return "" if state in "ZX" else fields[18]
