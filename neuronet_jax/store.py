"""The store: a population of conformed heads and their label maps as sharded zarr3 arrays, written once, read by chunk.

    DEST/image       float32 [subject x y z]           raw intensities on the common grid
    DEST/labels      uint8   [subject protocol x y z]  class indices
    DEST/foreground  int16   [subject point axis]      labelled voxel positions, to place crops without reading volumes
    DEST/subjects.tsv, rejects.tsv, store.json and, last, COMPLETE (the hash of store.json)

A shard holds whole subjects and is written once by one worker; an inner chunk of one subject (and protocol) is the unit of
reading. Every chunk and index carries a crc32c. All-background chunks are stored, so a missing chunk is always an error.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files, kvstore_spec, local_path

SCHEMA_VERSION = 1
FOREGROUND_POINTS = 2048  # 12 kB per subject: enough that no two epochs place the same crop, small beside one chunk
CACHE_BYTES = 64 * 2**20  # holds the shard indexes (16 bytes per chunk) between reads
_CODEC = {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle"}}
_ID = re.compile(r"[A-Za-z0-9]+")
_SPLITS = ("train", "validation", "test")


class StoreError(NeuronetError):
    """A store that cannot be used as asked. `code`: E_SHARD_MISSING, E_CRC, E_IO, E_INCOMPLETE, E_MISMATCH, E_SCHEMA, E_LEAK, …"""

    def __init__(self, code: str, reason: str):
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason

    def __reduce__(self):  # both arguments survive the way back from a worker process
        return type(self), (self.code, self.reason)


@dataclass(frozen=True)
class Subject:
    """One row of subjects.tsv. Affines are float64 4×4 voxel → RAS+ mm, kept as nested tuples."""

    slot: int  # position along the arrays' first axis
    id: str
    split: str  # train, validation or test
    present: tuple[bool, ...]  # per protocol of the store
    mean: float  # of the whole conformed volume, for whitening
    std: float
    source_shape: tuple[int, ...]  # the input file's own grid
    source_affine: tuple[tuple[float, ...], ...]
    affine: tuple[tuple[float, ...], ...]  # of the stored grid
    conformed_shape: tuple[int, ...]
    origin: tuple[int, ...]  # voxel of the conformed volume at the stored grid's corner; negative where padded
    warnings: tuple[str, ...] = ()
    content_hash: str = ""


@dataclass(frozen=True)
class Reject:
    """One row of rejects.tsv."""

    id: str
    code: str
    reason: str


@dataclass(frozen=True)
class Record:
    """What is stored of one subject."""

    image: np.ndarray  # float32 [x y z]
    labels: np.ndarray  # uint8 [p x y z], zeros for absent protocols
    foreground: np.ndarray  # int16 [n 3], from `sample_foreground`
    subject: Subject


@dataclass(frozen=True)
class StoreInfo:
    """store.json. While a store is being written its counts and hashes are zero and empty."""

    schema_version: int
    protocols: tuple[str, ...]
    grid: tuple[int, int, int]  # voxels along x, y, z (RAS+)
    voxel_size_mm: float
    slots: int  # length of the arrays; rejected subjects leave holes
    shard_subjects: int
    chunk: int  # voxels per side of an inner chunk
    provenance: dict[str, Any]
    subjects: int = 0
    subjects_hash: str = ""  # sha256 of subjects.tsv
    split_hash: str = ""

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "StoreInfo":
        """Raises StoreError E_SCHEMA for another version, E_MISMATCH for fields that are missing or unknown."""
        try:
            fields = json.loads(data)
            version = fields["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError("E_MISMATCH", f"store.json is not readable ({error}); rebuild the store") from error
        if version != SCHEMA_VERSION:
            fix = "update neuronet_jax" if version > SCHEMA_VERSION else "rebuild the store"
            raise StoreError(
                "E_SCHEMA", f"the store has schema version {version}, this release reads {SCHEMA_VERSION}; {fix}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise StoreError(
                "E_MISMATCH", f"store.json has unexpected fields {sorted(set(fields) ^ names)}; rebuild the store"
            )
        fields["protocols"], fields["grid"] = tuple(fields["protocols"]), tuple(fields["grid"])
        return cls(**fields)

    def shard_of(self, slot: int) -> int:
        """First slot of the shard that holds `slot`."""
        return slot - slot % self.shard_subjects


def split_hash(subjects: Sequence[Subject]) -> str:
    """sha256 over the sorted pairs of id and split: changes when, and only when, somebody changes sides."""
    lines = sorted(f"{subject.id}\t{subject.split}\n" for subject in subjects)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sample_foreground(
    labels: np.ndarray, present: Sequence[bool], seed: int, points: int = FOREGROUND_POINTS
) -> np.ndarray:
    """int16 [points 3]: labelled voxels of `labels` (uint8 [p x y z]), drawn with replacement.

    Half are uniform over the voxels labelled in any present protocol; half first draw a structure uniformly among all those of
    the present protocols, then one of its voxels, so that the accumbens is seen as often as the white matter.
    Raises NeuronetError where nothing is labelled.
    """
    rng = np.random.default_rng(seed)
    maps = labels[np.asarray(present, bool)].reshape(-1, labels[0].size)  # [p voxels]
    anywhere = np.flatnonzero(maps.any(axis=0))
    if anywhere.size == 0:
        raise NeuronetError("foreground needs at least one labelled voxel, got background only")
    uniform = anywhere[rng.integers(anywhere.size, size=points - points // 2)]
    structures: list[np.ndarray] = []  # the flat voxel indices of each structure
    for classes in maps:
        order = anywhere[np.argsort(classes[anywhere], kind="stable")]
        counts = np.bincount(classes[anywhere])
        structures += [voxels for voxels in np.split(order, np.cumsum(counts)[:-1])[1:] if voxels.size]
    chosen = [structures[i] for i in rng.integers(len(structures), size=points // 2)]
    balanced = np.array([voxels[rng.integers(voxels.size)] for voxels in chosen], dtype=np.int64)
    return np.stack(np.unravel_index(np.concatenate([uniform, balanced]), labels.shape[1:]), axis=-1).astype(np.int16)


# --- subjects.tsv: one column per field, tuples as JSON ------------------------------------------------------------------------


def subjects_to_tsv(subjects: Sequence[Subject]) -> bytes:
    """Rows in the order of the slots; floats by repr, so that they read back exactly."""
    names = [field.name for field in dataclasses.fields(Subject)]
    lines = ["\t".join(names)]
    for subject in sorted(subjects, key=lambda subject: subject.slot):
        values = (getattr(subject, name) for name in names)
        lines.append("\t".join(value if isinstance(value, str) else json.dumps(value) for value in values))
    return ("\n".join(lines) + "\n").encode()


def subjects_from_tsv(data: bytes) -> tuple[Subject, ...]:
    """Inverse of `subjects_to_tsv`. Raises StoreError E_MISMATCH for other columns."""
    header, *rows = data.decode().splitlines()
    names = [field.name for field in dataclasses.fields(Subject)]
    if header.split("\t") != names:
        raise StoreError("E_MISMATCH", f"subjects.tsv must have the columns {names}, got {header.split(chr(9))}")
    strings = ("id", "split", "content_hash")
    subjects = []
    for row in rows:
        values = dict(zip(names, row.split("\t"), strict=True))
        subjects.append(Subject(**{n: v if n in strings else _tuples(json.loads(v)) for n, v in values.items()}))
    return tuple(subjects)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check_subjects(subjects: Sequence[Subject], info: StoreInfo) -> None:
    slots: set[int] = set()
    splits: dict[str, str] = {}
    for subject in subjects:
        if not _ID.fullmatch(subject.id):
            raise StoreError("E_ID", f"the subject id in slot {subject.slot} must be letters and digits only")
        if not 0 <= subject.slot < info.slots or subject.slot in slots:
            raise StoreError("E_MISMATCH", f"slot {subject.slot} is given twice or outside 0…{info.slots - 1}")
        if subject.split not in _SPLITS or len(subject.present) != len(info.protocols):
            raise StoreError(
                "E_MISMATCH", f"slot {subject.slot} needs a split of {_SPLITS} and one `present` per protocol"
            )
        if splits.setdefault(subject.id, subject.split) != subject.split:
            raise StoreError(
                "E_LEAK",
                f"the subject of slot {subject.slot} is in {subject.split} and {splits[subject.id]}; choose one",
            )
        slots.add(subject.slot)


# --- arrays --------------------------------------------------------------------------------------------------------------------


def _arrays(info: StoreInfo) -> dict[str, dict[str, Any]]:
    """zarr3 metadata of each array."""
    sides = tuple(-(-side // info.chunk) * info.chunk for side in info.grid)  # a shard is a whole number of chunks
    cube = (info.chunk,) * 3
    protocols = len(info.protocols)
    per_shard = info.shard_subjects

    def array(dtype: str, shape: tuple, shard: tuple, chunk: tuple, names: tuple) -> dict[str, Any]:
        inner = {
            "chunk_shape": chunk,
            "codecs": [{"name": "bytes"}, _CODEC, {"name": "crc32c"}],
            "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        }
        return {
            "shape": shape,
            "data_type": dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            "dimension_names": names,
        }

    n, points = info.slots, FOREGROUND_POINTS
    volume = ("x", "y", "z")
    return {
        "foreground": array(
            "int16", (n, points, 3), (per_shard, points, 3), (1, points, 3), ("subject", "point", "axis")
        ),
        "labels": array(
            "uint8",
            (n, protocols, *info.grid),
            (per_shard, protocols, *sides),
            (1, 1, *cube),
            ("subject", "protocol", *volume),
        ),
        "image": array("float32", (n, *info.grid), (per_shard, *sides), (1, *cube), ("subject", *volume)),
    }


def _shard_key(name: str, number: int) -> str:
    return f"{name}/c/{number}" + "/0" * {"foreground": 2, "labels": 4, "image": 3}[name]


def _open_array(dest: str, name: str, concurrency: int | None, **options: Any) -> Any:
    limits = {} if concurrency is None else {"limit": concurrency}
    kvstore = kvstore_spec(dest, name)
    requests = {"file": "file_io_concurrency", "gcs": "gcs_request_concurrency", "s3": "s3_request_concurrency"}[
        kvstore["driver"]
    ]
    spec = {
        "driver": "zarr3",
        "kvstore": kvstore,
        "fill_missing_data_reads": False,  # a missing chunk is an error
        "store_data_equal_to_fill_value": True,  # so background must be there
        "recheck_cached_data": False,  # finished stores do not change
        "context": {
            "cache_pool": {"total_bytes_limit": CACHE_BYTES},
            "data_copy_concurrency": limits,
            requests: limits,
        },
    }
    if "metadata" in options:
        spec["metadata"] = options.pop("metadata")
    return ts.open(spec, **options).result()


class StoreWriter:
    """Writes a store shard by shard. Any number of processes may `open` the same unfinished store and write different shards."""

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
        for name, metadata in _arrays(info).items():
            _open_array(dest, name, None, metadata=metadata, create=True, open=True)
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
        """Takes a finished store back into the unfinished state, so that subjects can be purged; `finalize` ends it again."""
        info = Store.open(dest).info
        writer = cls(dest, dataclasses.replace(info, subjects=0, subjects_hash="", split_hash=""))
        writer.files.write("unfinished.json", writer.info.to_json())
        writer.files.delete("COMPLETE")
        return writer

    def __getstate__(self) -> dict[str, Any]:
        return {"dest": self.dest, "info": self.info, "files": self.files, "_concurrency": self._concurrency}

    @functools.cached_property
    def _open(self) -> dict[str, Any]:
        return {
            name: _open_array(self.dest, name, self._concurrency, read=True, write=True) for name in _arrays(self.info)
        }

    def write_shard(self, first_slot: int, records: Sequence[Record | None]) -> None:
        """Writes the shard of the slots first_slot, first_slot + 1, …; None leaves a hole. Replaces what was there.

        The image comes last, so a shard whose image exists is whole (`has_shard`).
        Raises NeuronetError for a wrong slot, shape or dtype, StoreError E_IO where writing fails (nothing half-written remains visible).
        """
        info = self.info
        if first_slot % info.shard_subjects or not 0 < len(records) <= min(
            info.shard_subjects, info.slots - first_slot
        ):
            raise NeuronetError(
                f"a shard starts at a multiple of {info.shard_subjects} and holds at most that many of {info.slots} slots, "
                f"got {len(records)} records at slot {first_slot}"
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
        key = _shard_key("image", first_slot // self.info.shard_subjects)
        return key in self.files.names(key)

    def delete_shard(self, first_slot: int) -> None:
        """Removes the shard's chunks from every array, the image first."""
        for name in ("image", "labels", "foreground"):
            self.files.delete(_shard_key(name, first_slot // self.info.shard_subjects))

    def finalize(self, subjects: Sequence[Subject], rejects: Sequence[Reject]) -> StoreInfo:
        """Writes subjects.tsv, rejects.tsv, store.json and, last, COMPLETE; the store is read-only from then on.

        Raises StoreError E_SHARD_MISSING, listing the gaps, where a subject's shard was never written; E_LEAK, E_ID, E_MISMATCH for bad rows.
        """
        _check_subjects(subjects, self.info)
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
        for name in _arrays(info)
        for there in [set(files.names(f"{name}/c/"))]
        for number in numbers
        if (key := _shard_key(name, number)) not in there
    ]


class Store:
    """A finished store, read-only. Cheap to send to another process: arrays open on first use, in the process that reads."""

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
        _check_subjects(subjects, info)
        store = cls(dest, info, subjects, concurrency)
        for name, metadata in _arrays(info).items():
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
        arrays = {}
        for name in _arrays(self.info):
            try:
                arrays[name] = _open_array(self.dest, name, self._concurrency, read=True, write=False)
            except ValueError as error:
                raise StoreError("E_MISMATCH", f"cannot open {name} of {self.dest}: {error}") from error
        return arrays

    def split(self, name: str) -> list[Subject]:
        """The subjects of train, validation or test, in the order of their slots."""
        return [subject for subject in self.subjects if subject.split == name]

    def gaps(self) -> list[str]:
        """Names of the shards that should be there and are not."""
        return _gaps(Files(self.dest), self.info, self.subjects)

    def read_image(self, slot: int, start: Sequence[int] = (0, 0, 0), shape: Sequence[int] | None = None) -> np.ndarray:
        """float32 [x y z], raw intensities of a box (default: the whole volume)."""
        return self._read(slot, {"image": self._arrays["image"][(slot, *self._box(start, shape))]})["image"]

    def read_labels(
        self, slot: int, protocols: Sequence[str], start: Sequence[int] = (0, 0, 0), shape: Sequence[int] | None = None
    ) -> np.ndarray:
        """uint8 [p x y z], class indices in the order of `protocols`."""
        return self._read(slot, {"labels": self._labels(slot, protocols, start, shape)})["labels"]

    def read_crop(
        self, slot: int, start: Sequence[int], shape: Sequence[int], protocols: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 [x y z] and labels uint8 [p x y z] of one box, all chunks requested at once.

        Raises NeuronetError for a box outside the grid, StoreError E_SHARD_MISSING, E_CRC or E_IO naming the slot.
        """
        image = self._arrays["image"][(slot, *self._box(start, shape))]
        read = self._read(slot, {"image": image, "labels": self._labels(slot, protocols, start, shape)})
        return read["image"], read["labels"]

    def read_foreground(self, slot: int) -> np.ndarray:
        """int16 [n 3], voxel positions on the stored grid."""
        return self._read(slot, {"foreground": self._arrays["foreground"][slot]})["foreground"]

    def _labels(self, slot: int, protocols: Sequence[str], start: Sequence[int], shape: Sequence[int] | None) -> Any:
        if unknown := [name for name in protocols if name not in self.info.protocols]:
            raise NeuronetError(f"the store holds the protocols {', '.join(self.info.protocols)}, not {unknown[0]!r}")
        indices = [self.info.protocols.index(name) for name in protocols]
        return self._arrays["labels"][slot][indices][(slice(None), *self._box(start, shape))]

    def _box(self, start: Sequence[int], shape: Sequence[int] | None) -> tuple[slice, ...]:
        stop = self.info.grid if shape is None else tuple(a + n for a, n in zip(start, shape, strict=True))
        box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
        if any(not 0 <= axis.start < axis.stop <= side for axis, side in zip(box, self.info.grid, strict=True)):
            raise NeuronetError(
                f"a box must lie in the grid {self.info.grid}, got start {tuple(start)} and shape {shape}"
            )
        return box

    def _read(self, slot: int, views: dict[str, Any]) -> dict[str, np.ndarray]:
        if not 0 <= slot < self.info.slots:
            raise NeuronetError(f"the store has the slots 0…{self.info.slots - 1}, got {slot}")
        futures = {name: view.read() for name, view in views.items()}  # all in flight before the first is awaited
        read = {}
        for name, future in futures.items():
            try:
                read[name] = np.asarray(future.result())
            except ValueError as error:
                raise _read_error(self.dest, name, slot, str(error)) from error
        return read


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
