"""The manifest of a checkpoint: the checksum of each of its files, in the format of `sha256sum -c`."""

import hashlib
from collections.abc import Iterator

from etils import epath

from neuronet_jax.files import children

MANIFEST = "manifest.sha256"
_COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax touches these after the manifest, in the commit


def write_manifest(folder: epath.Path) -> None:
    """Writes the manifest of everything below `folder`."""
    lines = [f"{_sha256(folder / name)}  {name}\n" for name in covered(folder)]
    (folder / MANIFEST).write_text("".join(lines))


def damage(folder: epath.Path) -> str:
    """Returns the first fault of the files below `folder`, by its manifest, or "" if there is none."""
    try:
        lines = [line.partition("  ") for line in (folder / MANIFEST).read_text().splitlines()]
        listed = {name: digest for digest, _, name in lines}
        if different := set(listed) ^ set(covered(folder)):
            return f"{sorted(different)[0]} is missing or not in the manifest"
        for name, digest in listed.items():
            if _sha256(folder / name) != digest:
                return f"{name} does not have its checksum"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return ""


def covered(folder: epath.Path) -> list[str]:
    """Returns the files below `folder` that its manifest covers, as sorted relative paths."""

    def walk(path: epath.Path, prefix: str) -> Iterator[str]:
        for child in children(path):
            if child.is_dir():
                yield from walk(child, f"{prefix}{child.name}/")
            else:
                yield prefix + child.name

    return sorted(set(walk(folder, "")) - {MANIFEST, *_COMMIT_FILES})


def _sha256(path: epath.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
