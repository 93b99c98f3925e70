"""Reads a finished store: whole volumes, and crops by chunk."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Integer

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files, local_path
from neuronet_jax.store import arrays
from neuronet_jax.store.schema import (
    REPAIR,
    Reject,
    StoreError,
    StoreInfo,
    Subject,
    check_subjects,
    rejects_from_tsv,
    split_hash,
    subjects_from_tsv,
)

PURGING = "purge.json"  # the slots that an unfinished purge removes


class Store:
    """A finished store, read-only. It is cheap to send to a different process, which opens the arrays itself."""

    def __init__(self, dest: str, info: StoreInfo, subjects: tuple[Subject, ...], concurrency: int | None):
        self.dest, self.info, self.subjects, self._concurrency = dest, info, subjects, concurrency

    @classmethod
    def open(cls, dest: str | os.PathLike[str], concurrency: int | None = None) -> "Store":
        """Checks and opens the store at a local path, gs:// or s3://. `concurrency` bounds codec and request threads.

        Raises StoreError E_INCOMPLETE without COMPLETE, E_MISMATCH if hashes, counts, shapes or types disagree,
        E_SCHEMA for a different version, E_LEAK for a subject in two splits, and E_SYMLINK for links that leave the
        store.
        """
        dest = os.fspath(dest)
        if (root := local_path(dest)) is not None:
            _check_links(root)
        files = Files(dest)
        complete, data = files.read("COMPLETE"), files.read("store.json")
        if complete is None or data is None:
            raise StoreError(
                "E_INCOMPLETE", f"{dest} holds no finished store (no COMPLETE marker); finish data_prep.build first"
            )
        if files.read(PURGING) is not None:
            raise StoreError("E_INCOMPLETE", f"a purge of {dest} was interrupted; run data_prep.purge again first")
        info = StoreInfo.from_json(data)
        if hashlib.sha256(data).hexdigest() != complete.decode(errors="replace").strip():
            raise StoreError(
                "E_MISMATCH", f"store.json of {dest} was changed after the store was finished; rebuild the store"
            )
        table = files.read("subjects.tsv") or b""
        if hashlib.sha256(table).hexdigest() != info.subjects_hash:
            raise StoreError(
                "E_MISMATCH",
                f"subjects.tsv of {dest} does not match store.json; rebuild the store",
            )
        subjects = subjects_from_tsv(table)
        if len(subjects) != info.subjects or split_hash(subjects) != info.split_hash:
            raise StoreError(
                "E_MISMATCH",
                f"{dest} lists {len(subjects)} subjects, but store.json says {info.subjects}; rebuild the store",
            )
        check_subjects(subjects, info)
        store = cls(dest, info, subjects, concurrency)
        for name, metadata in arrays.array_metadata(info).items():
            array = store._arrays[name]
            if array.shape != tuple(metadata["shape"]) or array.dtype.name != metadata["data_type"]:
                raise StoreError(
                    "E_MISMATCH",
                    f"{name} of {dest} must be {metadata['data_type']} {tuple(metadata['shape'])} by store.json, "
                    f"but the array is {array.dtype.name} {array.shape}; rebuild the store",
                )
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {"dest": self.dest, "info": self.info, "subjects": self.subjects, "_concurrency": self._concurrency}

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        try:
            return arrays.open_arrays(self.dest, self.info, self._concurrency)
        except ValueError as error:
            raise StoreError("E_MISMATCH", f"cannot open the arrays of {self.dest}: {error}") from error

    def split(self, name: str) -> list[Subject]:
        """Returns the subjects of train, validation or test, in the order of their slots."""
        return [subject for subject in self.subjects if subject.split == name]

    def gaps(self) -> list[str]:
        """Returns the file names of missing shards."""
        return arrays.gaps(Files(self.dest), self.info, self.subjects)

    def with_concurrency(self, concurrency: int) -> "Store":
        """Returns the same store with bounded codec threads and requests in flight per process."""
        return type(self)(self.dest, self.info, self.subjects, concurrency)

    def read_image(self, slot: int, start: Sequence[int] = (0, 0, 0), shape: Sequence[int] | None = None) -> np.ndarray:
        """Returns the raw intensities of a box (default: the whole volume), float32 [x y z]."""
        return self._read([self._image(slot, start, shape)])[0]

    def read_labels(
        self,
        slot: int,
        protocols: Sequence[str],
        start: Sequence[int] = (0, 0, 0),
        shape: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Returns class indices in the order of `protocols`, uint8 [p x y z]."""
        return self._read([self._labels(slot, protocols, start, shape)])[0]

    def read_crop(
        self, slot: int, start: Sequence[int], shape: Sequence[int], protocols: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the image float32 [x y z] and labels uint8 [p x y z] of one box, with all chunks requested at once.

        Raises NeuronetError for a box outside the grid, and StoreError E_SHARD_MISSING, E_CRC or E_IO naming the slot.
        """
        image, labels = self._read([self._image(slot, start, shape), self._labels(slot, protocols, start, shape)])
        return image, labels

    def read_crops_into(
        self,
        images: Float[np.ndarray, "b x y z"],
        labels: Integer[np.ndarray, "b p x y z"],
        slots: Sequence[int],
        starts: Sequence[Sequence[int]],
        protocols: Sequence[str],
    ) -> None:
        """Reads many crops, all in flight together, into float32 and uint8 arrays, which give the shape of the boxes.
        Chunks are decoded and then copied once. Raises as `read_crop`.
        """
        shape = images.shape[1:]
        views = [self._image(slot, start, shape) for slot, start in zip(slots, starts, strict=True)]
        views += [self._labels(slot, protocols, start, shape) for slot, start in zip(slots, starts, strict=True)]
        places = zip(views, (*images, *labels), strict=True)
        self._await(views, [ts.array(place, copy=False, write=True).write(view.array) for view, place in places])

    def read_foregrounds(self, slots: Sequence[int]) -> list[np.ndarray]:
        """Returns the labelled voxel positions of each slot on the stored grid, int16 [n 3]."""
        return self._read([self._view("foreground", slot) for slot in slots])

    def read_foreground(self, slot: int) -> np.ndarray:
        """Returns the labelled voxel positions of one slot on the stored grid, int16 [n 3]."""
        return self.read_foregrounds([slot])[0]

    def _view(self, name: str, slot: int) -> "_View":
        if not 0 <= slot < self.info.slots:
            raise NeuronetError(f"the store has the slots 0…{self.info.slots - 1}, got {slot}")
        return _View(name, slot, self._arrays[name][int(slot)])

    def _image(self, slot: int, start: Sequence[int], shape: Sequence[int] | None) -> "_View":
        view = self._view("image", slot)
        return dataclasses.replace(view, array=view.array[self._box(start, shape)])

    def _labels(
        self, slot: int, protocols: Sequence[str], start: Sequence[int], shape: Sequence[int] | None
    ) -> "_View":
        if unknown := [name for name in protocols if name not in self.info.protocols]:
            raise NeuronetError(f"the store holds the protocols {', '.join(self.info.protocols)}, not {unknown[0]!r}")
        indices = [self.info.protocols.index(name) for name in protocols]
        view = self._view("labels", slot)
        return dataclasses.replace(view, array=view.array[indices][(slice(None), *self._box(start, shape))])

    def _box(self, start: Sequence[int], shape: Sequence[int] | None) -> tuple[slice, ...]:
        stop = self.info.grid if shape is None else tuple(a + n for a, n in zip(start, shape, strict=True))
        box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        if any(not 0 <= axis.start < axis.stop <= side for axis, side in zip(box, self.info.grid, strict=True)):
            raise NeuronetError(f"a box must lie in the grid {self.info.grid}, got start {start} and shape {shape}")
        return box

    def _read(self, views: Sequence["_View"]) -> list[np.ndarray]:
        return [np.asarray(found) for found in self._await(views, [view.array.read() for view in views])]

    def _await(self, views: Sequence["_View"], futures: Sequence[Any]) -> list[Any]:
        """Returns the results of reading views, all of which are in flight."""
        found = []
        for view, future in zip(views, futures, strict=True):
            try:
                found.append(future.result())
            except ValueError as error:
                raise _read_error(self.dest, view.name, view.slot, str(error)) from error
        return found


@dataclasses.dataclass(frozen=True)
class _View:
    """An unread part of an array, with its name and slot for errors."""

    name: str
    slot: int
    array: Any


def read_rejects(files: Files) -> list[Reject]:
    """Reads rejects.tsv of a store; none if there is no such file."""
    return rejects_from_tsv(files.read("rejects.tsv") or b"")


def _read_error(dest: str, name: str, slot: int, text: str) -> StoreError:
    place = f"{name} of the subject in slot {slot} (see subjects.tsv) in {dest}"
    status = text.split(":", 1)[0]
    if status == "NOT_FOUND":
        return StoreError("E_SHARD_MISSING", f"{place} is missing; {REPAIR}. {text}")
    if status in ("DATA_LOSS", "FAILED_PRECONDITION", "OUT_OF_RANGE", "INVALID_ARGUMENT"):
        return StoreError("E_CRC", f"{place} is damaged; {REPAIR}. {text}")
    return StoreError("E_IO", f"cannot read {place}. {text}")


def _check_links(root: Path) -> None:
    """Raises StoreError for a link out of the store, through which other files could be read as data."""
    for folder, folders, names in os.walk(root):
        for name in folders + names:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise StoreError(
                    "E_SYMLINK",
                    f"{path.relative_to(root)} is a link out of the store {root}; replace it with the files",
                )
