"""One writer per shard: a small file names the writer, and shows whether it is still alive.

A dead process on this machine is detected at once. Any other writer (a second build, an abandoned Dask worker) rewrites
its lease every few seconds, so a lease that stays unchanged has no owner.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files

BEAT_S = 10.0
_PATIENCE_S = 60.0  # six missed beats: longer than a network file system or a bucket stalls

_held: set[str] = set()  # this process's live tokens: its own old leases are stale too


@contextlib.contextmanager
def lease(files: Files, name: str) -> Iterator[None]:
    """Holds the file `name` for the duration of the block. Raises NeuronetError E_LEASE if a live process holds it."""
    token = uuid.uuid4().hex
    _held.add(token)
    stop = threading.Event()
    try:
        _acquire(files, name, token)
        beat = threading.Thread(target=_beat, args=(files, name, token, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            files.delete(name)
    finally:
        _held.discard(token)


def _content(token: str, count: int) -> bytes:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": token, "beat": count}).encode()


def _acquire(files: Files, name: str, token: str) -> None:
    if files.claim(name, _content(token, 0)):
        return
    found = files.read(name)
    if found is not None and _is_alive(files, name, found):
        holder = json.loads(found)
        raise NeuronetError(
            f"E_LEASE: {name} is held by process {holder['pid']} on {holder['host']}; wait for it, or stop it first"
        )
    # if several processes see a stale lease, one may take it over: claiming its successor is atomic
    successor = f"{name}.{json.loads(found)['token']}" if found else name
    if not files.claim(successor, _content(token, 0)):
        raise NeuronetError(
            f"E_LEASE: {name} was just taken over by a different process; wait for it, or stop it first"
        )
    files.write(name, _content(token, 0))
    if successor != name:
        files.delete(successor)


def _is_alive(files: Files, name: str, found: bytes) -> bool:
    holder = json.loads(found)
    if holder["host"] == socket.gethostname():
        if holder["pid"] == os.getpid():
            return holder["token"] in _held
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # the process is alive and belongs to a different user
            pass
    waited = 0.0
    while waited < _PATIENCE_S:
        time.sleep(BEAT_S / 2)
        waited += BEAT_S / 2
        if files.read(name) != found:
            return True
    return False


def _beat(files: Files, name: str, token: str, stop: threading.Event) -> None:
    count = 0
    while not stop.wait(BEAT_S):
        count += 1
        with contextlib.suppress(NeuronetError):  # a failed write counts as a missed beat
            files.write(name, _content(token, count))
