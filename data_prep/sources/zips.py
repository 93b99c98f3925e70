"""Members of zip archives, read as a stream and by name: an archive is never unpacked.

Only members that somebody asked for by their exact name are opened, so that a name such as `../../x` leads nowhere.
Archives with such names, and members that lie about themselves, are refused with E_ZIP.
"""

import contextlib
import stat
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from neuronet_jax.errors import RejectError

_RATIO = 200  # an image is compressed before it is packed; zip itself then gains nothing
_MOST_MEMBERS = 20_000  # UK Biobank's archives have about a hundred
_CONTENT_FAULTS = (zipfile.BadZipFile, zlib.error)
_FAULTS = (*_CONTENT_FAULTS, NotImplementedError, EOFError, ValueError, RuntimeError)  # of a damaged directory


@dataclass(frozen=True)
class Member:
    """A file in a zip archive."""

    archive: Path
    path: str  # within the archive, such as T1/T1.nii.gz

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """Opens the content. Raises RejectError E_ZIP and E_ZIP_MEMBER, and OSError."""
        with _opened(self.archive) as archive:
            found = [info for info in archive.infolist() if info.filename == self.path]
            if len(found) != 1:
                raise RejectError("E_ZIP_MEMBER", f"the archive has {len(found)} members {self.path}, and needs one")
            _check(found[0])
            with contextlib.ExitStack() as stack:
                with _explained():
                    stream = stack.enter_context(archive.open(found[0]))
                with _explained(_CONTENT_FAULTS):
                    yield stream


def names(archive: Path) -> list[str]:
    """Returns the names of all members. Raises RejectError E_ZIP, and OSError if the file cannot be read."""
    with _opened(archive) as opened:
        return [info.filename for info in opened.infolist()]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with contextlib.ExitStack() as stack:
        with _explained():
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = archive.infolist()
        if len(members) > _MOST_MEMBERS:
            raise RejectError("E_ZIP", f"the archive has {len(members)} members, more than {_MOST_MEMBERS}")
        for info in members:
            # zipfile turns the separators of Windows into "/"
            if info.filename.startswith("/") or ":" in info.filename or ".." in info.filename.split("/"):
                raise RejectError("E_ZIP", "a member's name leads out of the archive; download the archive again")
        yield archive


def _check(info: zipfile.ZipInfo) -> None:
    if stat.S_ISLNK(info.external_attr >> 16):
        raise RejectError("E_ZIP", "the member is a link; download the archive again")
    if info.flag_bits & 1:
        raise RejectError("E_ZIP", "the member is encrypted; decrypt the archive with UK Biobank's own program first")
    if info.file_size > _RATIO * max(info.compress_size, 1):
        raise RejectError("E_ZIP", f"the member inflates {info.file_size / max(info.compress_size, 1):.0f} times")


@contextlib.contextmanager
def _explained(faults: tuple[type[Exception], ...] = _FAULTS) -> Iterator[None]:
    """Turns the many exceptions of a damaged archive into E_ZIP. Raises OSError for a disk that failed."""
    try:
        yield
    except faults as error:
        if isinstance(error.__context__, OSError):  # which zipfile takes for a file that is no archive
            raise error.__context__ from None
        raise RejectError("E_ZIP", f"the archive is damaged ({type(error).__name__}); download it again") from error
