"""The input files of a subject, on disk or in an archive, and what tells whether they have changed.

A file is known by its size and its time of modification and, once it was read whole, by a SHA-256 of its content. The
record of it in a store names neither path nor participant.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_prep.sources.zips import Member
from neuronet_jax.errors import RejectError
from neuronet_jax.images.nifti import Readable, open_regular

_BLOCK = 2**20  # bytes

Input = Path | Member


class Fingerprint(NamedTuple):
    """The identity of an input file. For a member of an archive, size and time are those of the archive."""

    bytes: int  # -1 if there was no file
    modified_ns: int
    sha256: str  # of the content; empty if it was not read to its end


def on_disk(file: Input) -> Path:
    """Returns the file itself, or the archive that holds it."""
    return file.archive if isinstance(file, Member) else file


def stamp(file: Input) -> Fingerprint:
    """Returns size and time of modification, without reading the file."""
    try:
        status = os.stat(on_disk(file))
    except OSError:
        return Fingerprint(-1, 0, "")
    return Fingerprint(status.st_size, status.st_mtime_ns, "")


def is_unchanged(file: Input, known: Fingerprint) -> bool:
    """Tells whether a file still has the content that was read. One with its old size and time is not read again."""
    now = stamp(file)
    if now[:2] == known[:2]:
        return True
    return now.bytes >= 0 and known.sha256 != "" and _sha256(file) == known.sha256


def are_unchanged(files: Mapping[str, Input], known: Mapping[str, Fingerprint]) -> bool:
    """Tells whether the input files of a subject, by name, are those that were read."""
    return set(files) == set(known) and all(is_unchanged(file, known[name]) for name, file in files.items())


def _sha256(file: Input) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(file) if isinstance(file, Path) else file.open() as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except (OSError, RejectError):
        return ""
    return digest.hexdigest()


@dataclasses.dataclass
class Tracked(Readable):
    """An input whose fingerprint is taken while it is read."""

    file: Input
    fingerprint: Fingerprint = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = stamp(self.file)

    @property
    def name(self) -> str:
        return self.file.name

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """Opens the bytes. At the end of a block without an error, reads the rest and keeps the fingerprint.

        Raises RejectError E_IO for a file that changes meanwhile.
        """
        before = self.fingerprint = stamp(self.file)
        with open_regular(self.file) if isinstance(self.file, Path) else self.file.open() as stream:
            hashing = _Hashing(stream)
            yield hashing
            while hashing.read(_BLOCK):
                pass
        if stamp(self.file) != before:
            raise RejectError("E_IO", "the file changed while it was read; run the build again when it is complete")
        self.fingerprint = before._replace(sha256=hashing.digest.hexdigest())


class _Hashing:
    """A stream that hashes what is read of it, from the beginning on."""

    def __init__(self, stream: IO[bytes]):
        self._stream: Any = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self.digest.update(block)
        return block

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count

    def seek(self, place: int) -> int:
        if place:
            raise OSError("only the beginning can be sought")
        self.digest = hashlib.sha256()
        return self._stream.seek(0)
