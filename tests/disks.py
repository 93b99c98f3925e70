"""Real disks for tests: one that fills up, and one whose blocks cannot be read. Mounting them takes root."""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_FIBMAP = 1  # ioctl of Linux: the block on the device that holds a block of a file
_BLOCK = 1024  # bytes, of the failing disk


def _call(*command: str) -> None:
    """Runs a program that only root may run here, or skips the test."""
    if not shutil.which(command[0]):
        pytest.skip(f"needs the program {command[0]} to make a disk")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"disks cannot be mounted here: {done.stderr.strip()}")


@contextlib.contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(parents=True)
    _call("mount", *options, str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class SmallDisk:
    """A disk in memory, of which as much is taken as a test needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._filler = folder / "filler"

    def leave(self, size: int) -> None:
        """Takes all but `size` bytes."""
        self.free()
        status = os.statvfs(self.folder)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - size)

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """Mounts an empty disk of `size` bytes at `folder`. Writing more is ENOSPC."""
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield SmallDisk(folder)


class FailingDisk:
    """A disk whose end can be torn off: reading there is EIO. Only what was written last lies there."""

    def __init__(self, folder: Path, image: Path):
        self.folder, self._image = folder, image
        self._rest = b""
        self._kept = 0

    def tear(self, file: Path, share: float) -> None:
        """Makes the blocks of `file` unreadable, from a share of it on."""
        with file.open("rb") as opened:
            os.sync()
            size = os.fstat(opened.fileno()).st_size
            wanted = struct.pack("i", int(share * (size - 1)) // _BLOCK)
            (block,) = struct.unpack("i", fcntl.ioctl(opened.fileno(), _FIBMAP, wanted))
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is in memory needs no disk
        self._kept = block * _BLOCK
        self._rest = self._image.read_bytes()[self._kept :]
        os.truncate(self._image, self._kept)

    def mend(self) -> None:
        with self._image.open("r+b") as opened:
            opened.seek(self._kept)
            opened.write(self._rest)


@contextlib.contextmanager
def failing_disk(folder: Path, image: Path, size: int = 2**23) -> Iterator[FailingDisk]:
    """Mounts an empty disk at `folder`, whose blocks are those of the file `image`."""
    with image.open("wb") as file:
        file.truncate(size)
    _call("mkfs.ext2", "-q", "-b", str(_BLOCK), str(image))  # without a journal, which might lie in the torn part
    with _mounted(folder, "-o", "loop,noatime", str(image)):
        found = subprocess.run(["losetup", "-j", str(image)], capture_output=True, text=True, check=True).stdout
        _call("losetup", "--direct-io=on", found.partition(":")[0])  # else blocks beyond the end read as zeros
        yield FailingDisk(folder, image)
