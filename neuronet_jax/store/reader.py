"""The store: a population of conformed heads and their label maps as sharded zarr3 arrays, written once, read by chunk.

    DEST/image       float32 [subject x y z]           raw intensities on the common grid
    DEST/labels      uint8   [subject protocol x y z]  class indices
    DEST/foreground  int16   [subject point axis]      labelled voxel positions, to place crops without reading volumes
    DEST/subjects.tsv, rejects.tsv, store.json and, last, COMPLETE (the hash of store.json)

A shard holds whole subjects and is written once by one worker; an inner chunk of one subject, all protocols together,
is the unit of reading. Chunks and indexes carry a crc32c. Background is stored; a missing chunk is an error.

Measured on a whole 192×224×192 head with five label maps (2 cores, no cache): milliseconds for image and labels of
random crops of 64³ / 96³ / 128³ by the side of a chunk: 16 6/15/29, 32 4/10/20, 48 6/13/20, 64 13/17/26; one chunk per
protocol (32) 5/11/23 and three times the requests. zstd takes 7.6 MB per subject, lz4 13.2 (128³: 14 ms), no codec 74.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files, kvstore_spec, local_path
from neuronet_jax.store.schema import FOREGROUND_POINTS, SCHEMA_VERSION, Record, Reject, StoreError, StoreInfo, Subject, array_metadata, check_subjects, sample_foreground, shard_key, split_hash, subjects_from_tsv, subjects_to_tsv

__all__ = ["Record", "Reject", "Store", "StoreError", "StoreInfo", "StoreWriter", "Subject", "sample_foreground"]

CACHE_BYTES = 64 * 2**20  # shard indexes and foreground points between reads; volumes of a large cohort never fit


def _open_arrays(
    dest: str, info: StoreInfo, concurrency: int | None, create: bool = False, write: bool = False
) -> dict[str, Any]:
    """Opens each array. `concurrency` bounds codec threads and requests in flight; None is TensorStore's choice."""
    requests = {"file": "file_io_concurrency", "gcs": "gcs_request_concurrency", "s3": "s3_request_concurrency"}
    driver = kvstore_spec(dest)["driver"]
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    if concurrency is not None:
        limit = {"limit": concurrency}
        context = ts.Context({"data_copy_concurrency": limit, requests[driver]: limit}, parent=context)
    arrays = {}
    for name, metadata in array_metadata(info).items():
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore_spec(dest, name),
            "fill_missing_data_reads": False,  # a missing chunk is an error
            "store_data_equal_to_fill_value": True,  # so background must be there
            "recheck_cached_data": False,  # finished stores do not change
        }
        if create:
            spec["metadata"] = metadata
        arrays[name] = ts.open(spec, context=context, read=True, write=write, create=create, open=True).result()
    return arrays


class StoreWriter:
    """Writes a store shard by shard; many processes may `open` an unfinished store and write different shards."""

    def __init__(self, dest: str, info: StoreInfo, concurrency: int | None = None):
        self.dest, self.info, self.files, self._concurrency = dest, info, Files(dest), concurrency

    @classmethod
    def create(
        cls,
        dest: str,
        *,
        protocols: Sequence[str],
        grid: Sequence[int],
        voxel_size_mm: float,
        slots: int,
        shard_subjects: int,
        provenance: dict[str, Any],
        chunk: int = 32,
    ) -> "StoreWriter":
        """Makes the empty arrays. Raises StoreError E_EXISTS where a store, finished or not, is already there."""
        x, y, z = (int(side) for side in grid)
        info = StoreInfo(
            SCHEMA_VERSION, tuple(protocols), (x, y, z), float(voxel_size_mm), slots, shard_subjects, chunk, provenance
        )
        if min(x, y, z, slots, shard_subjects, chunk, len(info.protocols)) < 1:
            raise NeuronetError(
                f"a store needs a positive grid, slots, shard_subjects, chunk and a protocol, got {info}"
            )
        writer = cls(dest, info)
        if writer.files.read("COMPLETE") is not None:
            raise StoreError(
                "E_EXISTS", f"{dest} holds a finished store, which is read-only; choose another place or delete it"
            )
        if writer.files.read("unfinished.json") is not None:
            raise StoreError("E_EXISTS", f"{dest} holds an unfinished store; continue it or delete it")
        try:
            _open_arrays(dest, info, None, create=True, write=True)
        except ValueError as error:
            raise StoreError("E_EXISTS", f"cannot make the arrays of {dest}; choose an empty place. {error}") from error
        writer.files.write("unfinished.json", info.to_json())  # last: from here on workers may open it
        return writer

    @classmethod
    def open(cls, dest: str, concurrency: int | None = None) -> "StoreWriter":
        """Joins an unfinished store; `concurrency` bounds this process's codec and request threads.

        Raises StoreError E_READ_ONLY for a finished store, E_INCOMPLETE where nothing was created.
        """
        files = Files(dest)
        if files.read("COMPLETE") is not None:
            raise StoreError(
                "E_READ_ONLY",
                f"{dest} is finished and read-only; write to another place, or remove subjects by purging",
            )
        data = files.read("unfinished.json")
        if data is None:
            raise StoreError("E_INCOMPLETE", f"{dest} holds no store to write to; create it first")
        return cls(dest, StoreInfo.from_json(data), concurrency)

    @classmethod
    def reopen(cls, dest: str) -> "StoreWriter":
        """Takes a finished store back into the unfinished state, to purge subjects; `finalize` ends it again."""
        info = Store.open(dest).info
        writer = cls(dest, dataclasses.replace(info, subjects=0, subjects_hash="", split_hash=""))
        writer.files.write("unfinished.json", writer.info.to_json())
        writer.files.delete("COMPLETE")
        return writer

    def __getstate__(self) -> dict[str, Any]:
        return {"dest": self.dest, "info": self.info, "files": self.files, "_concurrency": self._concurrency}

    @functools.cached_property
    def _open(self) -> dict[str, Any]:
        return _open_arrays(self.dest, self.info, self._concurrency, write=True)

    def write_shard(self, first_slot: int, records: Sequence[Record | None]) -> None:
        """Writes the shard of the slots first_slot, first_slot + 1, …; None leaves a hole. Replaces what was there.

        The image comes last, so a shard whose image exists is whole (`has_shard`).
        Raises NeuronetError for a wrong slot, shape or dtype, StoreError E_IO where writing fails (no half shard).
        """
        info = self.info
        if first_slot % info.shard_subjects or not 0 < len(records) <= min(
            info.shard_subjects, info.slots - first_slot
        ):
            raise NeuronetError(
                f"a shard starts at a multiple of {info.shard_subjects} and holds at most that many of {info.slots} "
                f"slots, got {len(records)} records at slot {first_slot}"
            )
        volumes = {"image": ("float32", info.grid), "labels": ("uint8", (len(info.protocols), *info.grid))}
        expected = volumes | {"foreground": ("int16", (FOREGROUND_POINTS, 3))}
        for slot, record in enumerate(records, first_slot):
            if record is None:
                continue
            if record.subject.slot != slot:
                raise NeuronetError(f"the record of slot {slot} belongs to slot {record.subject.slot}")
            for name, (dtype, shape) in expected.items():
                value = getattr(record, name)
                if value.dtype != dtype or value.shape != tuple(shape):
                    raise NeuronetError(
                        f"{name} of slot {slot} must be {dtype} {tuple(shape)}, got {value.dtype} {value.shape}"
                    )
            if not np.isfinite(record.image).all():
                raise NeuronetError(f"image of slot {slot} must be finite")
        self.delete_shard(first_slot)  # TensorStore would merge into an old shard, and a hole must stay a hole
        for name, array in self._open.items():
            try:
                with ts.Transaction() as transaction:  # one write per shard file
                    for slot, record in enumerate(records, first_slot):
                        if record is not None:
                            array.with_transaction(transaction)[slot].write(getattr(record, name)).result()
            except Exception as error:
                raise StoreError(
                    "E_IO", f"cannot write {name} of the shard at slot {first_slot} in {self.dest}: {error}"
                ) from error

    def has_shard(self, first_slot: int) -> bool:
        """Whether the shard was written entirely (False also for one that holds only holes)."""
        key = shard_key("image", first_slot // self.info.shard_subjects)
        return key in self.files.names(key)

    def delete_shard(self, first_slot: int) -> None:
        """Removes the shard's chunks from every array, the image first."""
        for name in ("image", "labels", "foreground"):
            self.files.delete(shard_key(name, first_slot // self.info.shard_subjects))

    def finalize(self, subjects: Sequence[Subject], rejects: Sequence[Reject]) -> StoreInfo:
        """Writes subjects.tsv, rejects.tsv, store.json and, last, COMPLETE; the store is read-only from then on.

        Raises StoreError E_SHARD_MISSING where a subject's shard was never written; E_LEAK, E_ID, E_MISMATCH for rows.
        """
        check_subjects(subjects, self.info)
        if missing := _gaps(self.files, self.info, subjects):
            raise StoreError(
                "E_SHARD_MISSING",
                f"{len(missing)} shards were never written, the first is {missing[0]}; resume the build",
            )
        table = subjects_to_tsv(subjects)
        rows = ["id\tcode\treason"] + [
            "\t".join(" ".join(v.split()) for v in dataclasses.astuple(reject)) for reject in rejects
        ]
        info = dataclasses.replace(
            self.info,
            subjects=len(subjects),
            subjects_hash=hashlib.sha256(table).hexdigest(),
            split_hash=split_hash(subjects),
        )
        self.files.write("subjects.tsv", table)
        self.files.write("rejects.tsv", ("\n".join(rows) + "\n").encode())
        self.files.write("store.json", info.to_json())
        self.files.write("COMPLETE", (hashlib.sha256(info.to_json()).hexdigest() + "\n").encode())
        self.files.delete("unfinished.json")
        return info


def _gaps(files: Files, info: StoreInfo, subjects: Sequence[Subject]) -> list[str]:
    numbers = sorted({subject.slot // info.shard_subjects for subject in subjects})
    return [
        key
        for name in array_metadata(info)
        for there in [set(files.names(f"{name}/c/"))]
        for number in numbers
        if (key := shard_key(name, number)) not in there
    ]


class Store:
    """A finished store, read-only. Cheap to send to another process: the arrays open in the process that reads."""

    def __init__(self, dest: str, info: StoreInfo, subjects: tuple[Subject, ...], concurrency: int | None):
        self.dest, self.info, self.subjects, self._concurrency = dest, info, subjects, concurrency

    @classmethod
    def open(cls, dest: str | os.PathLike[str], concurrency: int | None = None) -> "Store":
        """Checks and opens the store at a local path, gs:// or s3://; `concurrency` bounds codec and request threads.

        Raises StoreError E_INCOMPLETE without COMPLETE, E_MISMATCH where hashes, counts, shapes or types disagree,
        E_SCHEMA for another version, E_LEAK for a subject in two splits, E_SYMLINK for links that leave the store.
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
        info = StoreInfo.from_json(data)
        if hashlib.sha256(data).hexdigest() != complete.decode(errors="replace").strip():
            raise StoreError(
                "E_MISMATCH", f"store.json of {dest} was changed after the store was finished; rebuild the store"
            )
        table = files.read("subjects.tsv") or b""
        if hashlib.sha256(table).hexdigest() != info.subjects_hash:
            raise StoreError(
                "E_MISMATCH",
                f"subjects.tsv of {dest} is not the one that store.json was written with; rebuild the store",
            )
        subjects = subjects_from_tsv(table)
        if len(subjects) != info.subjects or split_hash(subjects) != info.split_hash:
            raise StoreError(
                "E_MISMATCH",
                f"{dest} lists {len(subjects)} subjects, store.json says {info.subjects}; rebuild the store",
            )
        check_subjects(subjects, info)
        store = cls(dest, info, subjects, concurrency)
        for name, metadata in array_metadata(info).items():
            array = store._arrays[name]
            if array.shape != tuple(metadata["shape"]) or array.dtype.name != metadata["data_type"]:
                raise StoreError(
                    "E_MISMATCH",
                    f"{name} of {dest} must be {metadata['data_type']} {tuple(metadata['shape'])} by store.json, "
                    f"the array is {array.dtype.name} {array.shape}; rebuild the store",
                )
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {"dest": self.dest, "info": self.info, "subjects": self.subjects, "_concurrency": self._concurrency}

    @functools.cached_property
    def _arrays(self) -> dict[str, Any]:
        try:
            return _open_arrays(self.dest, self.info, self._concurrency)
        except ValueError as error:
            raise StoreError("E_MISMATCH", f"cannot open the arrays of {self.dest}: {error}") from error

    def split(self, name: str) -> list[Subject]:
        """The subjects of train, validation or test, in the order of their slots."""
        return [subject for subject in self.subjects if subject.split == name]

    def gaps(self) -> list[str]:
        """Names of the shards that should be there and are not."""
        return _gaps(Files(self.dest), self.info, self.subjects)

    def with_concurrency(self, concurrency: int) -> "Store":
        """The same store, its codec threads and requests in flight bounded per process."""
        return type(self)(self.dest, self.info, self.subjects, concurrency)

    def read_image(self, slot: int, start: Sequence[int] = (0, 0, 0), shape: Sequence[int] | None = None) -> np.ndarray:
        """float32 [x y z], raw intensities of a box (default: the whole volume)."""
        return self._read([self._image(slot, start, shape)])[0]

    def read_labels(
        self,
        slot: int,
        protocols: Sequence[str],
        start: Sequence[int] = (0, 0, 0),
        shape: Sequence[int] | None = None,
    ) -> np.ndarray:
        """uint8 [p x y z], class indices in the order of `protocols`."""
        return self._read([self._labels(slot, protocols, start, shape)])[0]

    def read_crop(
        self, slot: int, start: Sequence[int], shape: Sequence[int], protocols: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 [x y z] and labels uint8 [p x y z] of one box, all chunks requested at once.

        Raises NeuronetError for a box outside the grid, StoreError E_SHARD_MISSING, E_CRC or E_IO naming the slot.
        """
        return self.read_crops([slot], [start], shape, protocols)[0]

    def read_crops(
        self, slots: Sequence[int], starts: Sequence[Sequence[int]], shape: Sequence[int], protocols: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`read_crop` of many boxes, all in flight together."""
        images = [self._image(slot, start, shape) for slot, start in zip(slots, starts, strict=True)]
        labels = [self._labels(slot, protocols, start, shape) for slot, start in zip(slots, starts, strict=True)]
        read = self._read(images + labels)
        return list(zip(read[: len(images)], read[len(images) :], strict=True))

    def read_foregrounds(self, slots: Sequence[int]) -> list[np.ndarray]:
        """int16 [n 3] of each slot: labelled voxel positions on the stored grid."""
        return self._read([self._view("foreground", slot) for slot in slots])

    def read_foreground(self, slot: int) -> np.ndarray:
        """int16 [n 3], labelled voxel positions on the stored grid."""
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
        futures = [view.array.read() for view in views]  # all in flight before the first is awaited
        read = []
        for view, future in zip(views, futures, strict=True):
            try:
                read.append(np.asarray(future.result()))
            except ValueError as error:
                raise _read_error(self.dest, view.name, view.slot, str(error)) from error
        return read


@dataclasses.dataclass(frozen=True)
class _View:
    """A part of an array, not yet read, and what to call it in an error."""

    name: str
    slot: int
    array: Any


def _read_error(dest: str, name: str, slot: int, text: str) -> StoreError:
    place = f"{name} of the subject in slot {slot} (subjects.tsv names it) in {dest}"
    status = text.split(":", 1)[0]
    if status == "NOT_FOUND":
        return StoreError("E_SHARD_MISSING", f"{place} is not there; rebuild that shard. {text}")
    if status in ("DATA_LOSS", "FAILED_PRECONDITION", "OUT_OF_RANGE", "INVALID_ARGUMENT"):
        return StoreError("E_CRC", f"{place} is damaged; rebuild that shard. {text}")
    return StoreError("E_IO", f"cannot read {place}. {text}")


def _check_links(root: Path) -> None:
    """A link inside the store that leads out of it could serve other files as data (or be served them)."""
    for folder, folders, names in os.walk(root):
        for name in folders + names:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise StoreError(
                    "E_SYMLINK", f"{path.relative_to(root)} is a link out of the store {root}; replace it by the files"
                )
