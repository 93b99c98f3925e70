"""Small whole files under a local path, gs:// or s3://, through one interface (TensorStore's key-value stores).

Only these three kinds of place are accepted. Everything else that TensorStore could open (http, memory, file:// URLs,
JSON specs, `|` chains) is refused before TensorStore sees it. The usual variables AWS_ENDPOINT_URL and AWS_REGION
select S3-compatible servers. Credentials come from each cloud's own chain.
"""

import functools
import os
import re
from pathlib import Path
from typing import Any

import tensorstore as ts
from etils import epath

from neuronet_jax.errors import NeuronetError

# A bucket that does not answer is an error after half a minute; TensorStore's own limit is a quarter of an hour.
_PATIENCE = {"max_retries": 8, "initial_delay": "200ms", "max_delay": "8s"}
RETRIES = {"gcs_request_retries": _PATIENCE, "s3_request_retries": _PATIENCE}  # for a TensorStore context
# Of a description (JSON, a manifest of checksums), which takes some kB: a larger one is damaged, and stays unread.
MOST_BYTES = 2**24
_BUCKET = re.compile(r"(gs|s3)://([A-Za-z0-9][A-Za-z0-9._-]*)/?([^|?#]*)")


def kvstore_spec(dest: str, name: str = "") -> dict[str, Any]:
    """Returns TensorStore's spec of the folder `name` below `dest`. Raises NeuronetError for other kinds of place."""
    folder = f"{name}/" if name else ""
    if match := _BUCKET.fullmatch(dest):
        scheme, bucket, prefix = match.groups()
        prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        if ".." in prefix.split("/"):
            raise NeuronetError(f"a store's address must not contain '..', got {dest!r}")
        if scheme == "gs":
            return {"driver": "gcs", "bucket": bucket, "path": prefix + folder}
        spec = {"driver": "s3", "bucket": bucket, "path": prefix + folder}
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint
        if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
            spec["aws_region"] = region
        return spec
    if not dest or "://" in dest or "|" in dest or dest.lstrip().startswith("{"):
        raise NeuronetError(f"a store is a local path, gs://bucket/path or s3://bucket/path, got {dest!r}")
    return {"driver": "file", "path": f"{Path(dest).expanduser().resolve().as_posix().rstrip('/')}/{folder}"}


def local_path(dest: str) -> Path | None:
    """Returns the resolved directory of a local store, or None for a bucket."""
    spec = kvstore_spec(dest)
    return Path(spec["path"]) if spec["driver"] == "file" else None


class Files:
    """Small whole files below `dest`.

    Readers see a write entirely or not at all: on disk it is a temporary name and a rename, in a bucket one put. Every
    failure is a NeuronetError that starts with E_IO.
    """

    def __init__(self, dest: str):
        self.dest = dest
        self._spec = kvstore_spec(dest)

    @functools.cached_property
    def _store(self) -> Any:
        return ts.KvStore.open(self._spec, context=_context()).result()

    def __getstate__(self) -> dict[str, Any]:  # an open key-value store stays in its process
        return {"dest": self.dest, "_spec": self._spec}

    def read(self, name: str, most_bytes: int | None = None) -> bytes | None:
        """Returns the content, or None if there is no such file. One on disk with more than `most_bytes` is refused
        before it is read.
        """
        try:
            if most_bytes is not None and self._spec["driver"] == "file":
                _check_length(Path(self._spec["path"]) / name, most_bytes)
            result = self._store.read(name).result()
        except Exception as error:
            raise _io_error("read", self.dest, name, error) from error
        return bytes(result.value) if result.state == "value" else None

    def write(self, name: str, data: bytes) -> None:
        """Creates or replaces the file."""
        try:
            self._store.write(name, data).result()
        except Exception as error:
            raise _io_error("write", self.dest, name, error) from error

    def read_version(self, name: str) -> tuple[bytes | None, bytes]:
        """Returns the content, or None if there is no such file, and its version for `replace`."""
        try:
            result = self._store.read(name).result()
        except Exception as error:
            raise _io_error("read", self.dest, name, error) from error
        return (bytes(result.value) if result.state == "value" else None), result.stamp.generation

    def replace(self, name: str, data: bytes | None, version: bytes) -> bytes | None:
        """Writes the file, or removes it for None, if it still has that version, in one atomic operation.

        Returns the new version, or None if a different process has changed the file since.
        """
        try:
            return self._store.write(name, data, if_equal=version).result().generation or None
        except Exception as error:
            raise _io_error("replace", self.dest, name, error) from error

    def delete(self, name: str) -> None:
        """Removes the file, without an error if there is none."""
        try:
            self._store.write(name, None).result()
        except Exception as error:
            raise _io_error("delete", self.dest, name, error) from error

    def names(self, prefix: str = "") -> list[str]:
        """Returns the sorted names of the files that start with `prefix` (ASCII)."""
        after = (
            prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
        )  # the first name beyond the prefix; "" means no bound
        try:
            keys = self._store.list(ts.KvStore.KeyRange(prefix, after)).result()
        except Exception as error:
            raise _io_error("list", self.dest, prefix, error) from error
        return sorted(key.decode() for key in keys)


@functools.cache
def _context() -> Any:
    return ts.Context(RETRIES)


def _check_length(path: Path, most_bytes: int) -> None:
    if path.exists() and (length := path.stat().st_size) > most_bytes:
        raise ValueError(f"it has {length} bytes, more than {most_bytes}: it is damaged; copy it again")


def _io_error(verb: str, dest: str, name: str, error: Exception) -> NeuronetError:
    return NeuronetError(f"E_IO: cannot {verb} {name!r} in {dest}: {error}")


def children(folder: epath.Path) -> list[epath.Path]:
    """Returns what lies in `folder`; nothing if it does not exist, as in a bucket before the first file."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def user_cache() -> Path:
    """Returns the folder for files that can be made again: the demo cohort and compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuronet-jax"
