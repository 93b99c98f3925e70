"""The manifest of a checkpoint: the checksum of each of its files, in the format of `sha256sum -c`."""

import hashlib
import os
from collections.abc import Iterator

from etils import epath

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import MOST_BYTES, children

MANIFEST = "manifest.sha256"
_COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax touches these after the manifest, in the commit


def write_manifest(folder: epath.Path) -> None:
    """Writes the manifest of everything below `folder`."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in covered(folder)]
    (folder / MANIFEST).write_text("".join(lines))


def damage(folder: epath.Path) -> str:
    """Returns the first fault of the files below `folder`, by its manifest, or "" if there is none."""
    try:
        listed = _listed(folder)
        if different := set(listed) ^ set(covered(folder)):
            return f"{sorted(different)[0]} is missing or not in the manifest"
        for name, digest in listed.items():
            if _sha256(folder / name) != digest:
                return f"{name} does not have its checksum"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return ""


def read_checked(folder: epath.Path, name: str) -> bytes:
    """Returns the content of a description below `folder`. Raises NeuronetError if it is missing, too long, or does not
    have its checksum in the manifest.
    """
    try:
        if (length := (folder / name).stat().length) > MOST_BYTES:
            raise NeuronetError(f"{name} has {length} bytes, more than {MOST_BYTES}")
        content, listed = (folder / name).read_bytes(), _listed(folder)
    except (OSError, ValueError) as error:
        raise NeuronetError(f"{name} cannot be read ({error})") from error
    if listed.get(name) != hashlib.sha256(content).hexdigest():
        raise NeuronetError(f"{name} does not have its checksum")
    return content


def signature(folder: epath.Path) -> tuple[tuple[str, float, int], ...]:
    """Returns name, time and length of each file below `folder`: with equal ones, they need not be hashed again."""
    return tuple((name, *_time_and_length(folder / name)) for name in [*covered(folder), MANIFEST])


def covered(folder: epath.Path) -> list[str]:
    """Returns the files below `folder` that its manifest covers, as sorted relative paths."""

    def walk(path: epath.Path, prefix: str) -> Iterator[str]:
        for child in children(path):
            if child.is_dir():
                yield from walk(child, f"{prefix}{child.name}/")
            else:
                yield prefix + child.name

    return sorted(set(walk(folder, "")) - {MANIFEST, *_COMMIT_FILES})


def _time_and_length(path: epath.Path) -> tuple[float, int]:
    if "://" in os.fspath(path):
        stat = path.stat()
        return stat.mtime, stat.length
    local = os.stat(path)  # in nanoseconds, where etils has whole seconds
    return local.st_mtime_ns, local.st_size


def _listed(folder: epath.Path) -> dict[str, str]:
    """Returns the digest of each file by the manifest."""
    manifest = folder / MANIFEST
    if manifest.stat().length > MOST_BYTES:
        raise ValueError(f"{MANIFEST} has more than {MOST_BYTES} bytes")
    lines = [line.partition("  ") for line in manifest.read_text().splitlines()]
    return {name: digest for digest, _, name in lines}


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:  # piece by piece: a file may be larger than the memory
        while piece := stream.read(2**22):
            digest.update(piece)
    return digest.hexdigest()
