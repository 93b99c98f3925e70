"""Writes a store, shard by shard, from many processes, and finishes it once."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.store.arrays import gaps, open_arrays, shard_key
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import (
    FOREGROUND_POINTS,
    SCHEMA_VERSION,
    Record,
    Reject,
    StoreError,
    StoreInfo,
    Subject,
    check_subjects,
    rejects_to_tsv,
    split_hash,
    subjects_to_tsv,
)


class StoreWriter:
    """A store being written, shard by shard. Many processes may `open` it and write different shards."""

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
        """Creates the empty arrays. Raises StoreError E_EXISTS if there is already a store, finished or not."""
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
                "E_EXISTS", f"{dest} holds a finished store, which is read-only; choose a different place or delete it"
            )
        if writer.files.read("unfinished.json") is not None:
            raise StoreError("E_EXISTS", f"{dest} holds an unfinished store; continue it or delete it")
        try:
            open_arrays(dest, info, None, create=True, write=True)
        except ValueError as error:
            raise StoreError("E_EXISTS", f"cannot make the arrays of {dest}; choose an empty place. {error}") from error
        writer.files.write("unfinished.json", info.to_json())  # last: from now on workers may open it
        return writer

    @classmethod
    def open(cls, dest: str, concurrency: int | None = None) -> "StoreWriter":
        """Joins an unfinished store. `concurrency` bounds this process's codec and request threads.

        Raises StoreError E_READ_ONLY for a finished store, E_INCOMPLETE if none was created.
        """
        files = Files(dest)
        if files.read("COMPLETE") is not None:
            raise StoreError(
                "E_READ_ONLY",
                f"{dest} is finished and read-only; write elsewhere, or remove subjects with data_prep.purge",
            )
        data = files.read("unfinished.json")
        if data is None:
            raise StoreError("E_INCOMPLETE", f"{dest} holds no store to write to; create it first")
        return cls(dest, StoreInfo.from_json(data), concurrency)

    @classmethod
    def reopen(cls, dest: str, info: StoreInfo | None = None) -> "StoreWriter":
        """Returns a finished store to the unfinished state, to purge subjects; `finalize` finishes it again. `info`
        replaces its description.
        """
        info = info or Store.open(dest).info
        blank = {"subjects": 0, "subjects_hash": "", "split_hash": "", "schema_version": SCHEMA_VERSION}
        writer = cls(dest, dataclasses.replace(info, **blank))
        writer.files.write("unfinished.json", writer.info.to_json())
        writer.files.delete("COMPLETE")
        return writer

    def __getstate__(self) -> dict[str, Any]:
        return {"dest": self.dest, "info": self.info, "files": self.files, "_concurrency": self._concurrency}

    @functools.cached_property
    def _open(self) -> dict[str, Any]:
        return open_arrays(self.dest, self.info, self._concurrency, write=True)

    def write_shard(self, first_slot: int, records: Sequence[Record | None]) -> None:
        """Writes the shard of the slots first_slot, first_slot + 1, …; None leaves a hole. Replaces an old shard.

        The image is written last, so a shard with an image is complete (`has_shard`). Raises NeuronetError for a wrong
        slot, shape or dtype, and StoreError E_IO if writing fails.
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
        self.delete_shard(first_slot)  # TensorStore would merge into an old shard and fill its holes
        for name, array in self._open.items():
            try:
                with ts.Transaction() as transaction:  # one write per shard file
                    for slot, record in enumerate(records, first_slot):
                        if record is not None:
                            place, value = array.with_transaction(transaction)[slot], getattr(record, name)
                            # no copy: it would hold the shard twice until the transaction ends
                            place.write(value, can_reference_source_data_indefinitely=True).result()
            except Exception as error:
                raise StoreError(
                    "E_IO", f"cannot write {name} of the shard at slot {first_slot} in {self.dest}: {error}"
                ) from error

    def has_shard(self, first_slot: int) -> bool:
        """Tells whether the shard was written completely (False also for a shard of holes only)."""
        key = shard_key("image", first_slot // self.info.shard_subjects)
        return key in self.files.names(key)

    def delete_shard(self, first_slot: int) -> None:
        """Removes the shard's chunks from every array, the image first."""
        for name in ("image", "labels", "foreground"):
            self.files.delete(shard_key(name, first_slot // self.info.shard_subjects))

    def finalize(self, subjects: Sequence[Subject], rejects: Sequence[Reject]) -> StoreInfo:
        """Writes subjects.tsv, rejects.tsv, store.json and, last, COMPLETE. From then on the store is read-only.

        Raises StoreError E_SHARD_MISSING if a subject's shard was never written, and E_LEAK, E_ID or E_MISMATCH for
        rows.
        """
        check_subjects(subjects, self.info)
        if missing := gaps(self.files, self.info, subjects):
            raise StoreError(
                "E_SHARD_MISSING",
                f"{len(missing)} shards were never written, the first is {missing[0]}; resume the build",
            )
        table = subjects_to_tsv(subjects)
        info = dataclasses.replace(
            self.info,
            subjects=len(subjects),
            subjects_hash=hashlib.sha256(table).hexdigest(),
            split_hash=split_hash(subjects),
        )
        self.files.write("subjects.tsv", table)
        self.files.write("rejects.tsv", rejects_to_tsv(rejects))
        self.files.write("store.json", info.to_json())
        self.files.write("COMPLETE", (hashlib.sha256(info.to_json()).hexdigest() + "\n").encode())
        self.files.delete("unfinished.json")
        return info
