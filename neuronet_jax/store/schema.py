"""The contents of a store: the rows of subjects.tsv and the fields of store.json.

A change of any of these raises the schema version. Version 2 added the column `visit`; version 1 is still read.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuronet_jax.errors import CodedError, NeuronetError

SCHEMA_VERSION = 2
_READ = (1, 2)  # schema versions
FOREGROUND_POINTS = (
    2048  # 12 kB per subject, less than a chunk; enough that crops rarely repeat over some hundred epochs
)
PAINTED = "painted"  # provenance["image"] of a store of painted volumes
REPAIR = "the data_prep.build command of the store, with --repair, builds that shard again"
SPLITS = ("train", "validation", "test")
_ID = re.compile(r"[A-Za-z0-9]+")  # what BIDS accepts as a label, and every file system as a name


class StoreError(CodedError):
    """An error of a store, with a code: E_SHARD_MISSING, E_CRC, E_IO, E_INCOMPLETE, E_MISMATCH, …"""


@dataclass(frozen=True)
class Subject:
    """One row of subjects.tsv. Affines are float64 4×4 voxel → RAS+ mm, kept as nested tuples."""

    slot: int  # position along the arrays' first axis
    id: str  # of the participant
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
    visit: str = ""  # letters and digits; empty where there is one visit only

    @property
    def name(self) -> str:
        """The participant with the visit, as BIDS joins them: 1001, or 1001_ses-2."""
        return f"{self.id}_ses-{self.visit}" if self.visit else self.id

    @property
    def image_hash(self) -> str:
        """The part of the content hash that identifies the image; empty where it is not known."""
        return self.content_hash[:64]


@dataclass(frozen=True)
class Reject:
    """One row of rejects.tsv."""

    id: str
    code: str
    reason: str
    visit: str = ""


@dataclass(frozen=True)
class Record:
    """The stored data of one subject."""

    image: np.ndarray  # float32 [x y z]
    labels: np.ndarray  # uint8 [p x y z], zeros for absent protocols
    foreground: np.ndarray  # int16 [n 3], from `sample_foreground`
    subject: Subject


# The JSON types of store.json.
_KINDS = {
    **{"protocols": list, "grid": list, "voxel_size_mm": float, "provenance": dict, "subjects_hash": str},
    **{"slots": int, "shard_subjects": int, "chunk": int, "subjects": int, "split_hash": str},
}


@dataclass(frozen=True)
class StoreInfo:
    """The fields of store.json. While a store is being written, its counts and hashes are zero and empty."""

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
        """Reads store.json. Raises StoreError E_SCHEMA for a different version, E_MISMATCH for missing or unknown
        fields.
        """
        try:
            fields = json.loads(data)
            version = fields["schema_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError("E_MISMATCH", f"store.json is not readable ({error}); rebuild the store") from error
        if version not in _READ:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            fix = "update neuronet_jax" if newer else "rebuild the store"
            raise StoreError(
                "E_SCHEMA", f"the store has schema version {version}, but this release reads {SCHEMA_VERSION}; {fix}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != names:
            raise StoreError(
                "E_MISMATCH", f"store.json has unexpected fields {sorted(set(fields) ^ names)}; rebuild the store"
            )
        for name, kind in _KINDS.items():
            if type(fields[name]) is not kind:
                raise StoreError(
                    "E_MISMATCH",
                    f"{name!r} of store.json must be a {kind.__name__}, got {fields[name]!r:.80}; rebuild the store",
                )
        fields["protocols"], fields["grid"] = tuple(fields["protocols"]), tuple(fields["grid"])
        return cls(**fields)

    @property
    def painted(self) -> bool:
        """True if images hold tissues, whose brightness training draws (`neuronet_jax.tissues`), not scans."""
        return self.provenance.get("image") == PAINTED

    def shard_of(self, slot: int) -> int:
        """Returns the first slot of the shard that holds `slot`."""
        return slot - slot % self.shard_subjects


def is_id(text: str) -> bool:
    """Tells whether `text` can name a subject: ASCII letters and digits only."""
    return _ID.fullmatch(text) is not None


def bare_id(text: str) -> str:
    """Returns an id without BIDS' prefix: 01 for sub-01."""
    return text.removeprefix("sub-")


def split_hash(subjects: Sequence[Subject]) -> str:
    """Returns the sha256 of the sorted pairs of id and split. It changes if and only if a subject's split changes."""
    lines = sorted(f"{subject.id}\t{subject.split}\n" for subject in subjects)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sample_foreground(
    labels: np.ndarray, present: Sequence[bool], seed: int, points: int = FOREGROUND_POINTS
) -> np.ndarray:
    """Draws labelled voxels of `labels` (uint8 [p x y z]) with replacement. Returns int16 [points 3].

    Half are uniform over the voxels labelled in any present protocol. For the other half, a structure is drawn
    uniformly among those of the present protocols, then one of its voxels: small structures are seen as often as white
    matter. Raises NeuronetError if nothing is labelled.
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


def subjects_to_tsv(subjects: Sequence[Subject]) -> bytes:
    """Returns the table of subjects in the order of the slots. Floats are written by repr, so that they read back
    exactly.
    """
    names = [field.name for field in dataclasses.fields(Subject)]
    lines = ["\t".join(names)]
    for subject in sorted(subjects, key=lambda subject: subject.slot):
        values = (getattr(subject, name) for name in names)
        lines.append("\t".join(value if isinstance(value, str) else json.dumps(value) for value in values))
    return ("\n".join(lines) + "\n").encode()


def subjects_from_tsv(data: bytes) -> tuple[Subject, ...]:
    """Reads the table of `subjects_to_tsv`. Raises StoreError E_MISMATCH for different columns."""
    header, *rows = data.decode(errors="replace").splitlines() or [""]
    names = [field.name for field in dataclasses.fields(Subject)]
    columns = header.split("\t")
    if columns != names and [*columns, "visit"] != names:  # version 1 has no visits
        raise StoreError("E_MISMATCH", f"subjects.tsv must have the columns {names}, got {columns}")
    strings = ("id", "split", "content_hash", "visit")
    subjects = []
    for row in rows:
        fields: dict[str, Any] = dict(zip(columns, row.split("\t"), strict=True))
        subjects.append(Subject(**{n: v if n in strings else _tuples(json.loads(v)) for n, v in fields.items()}))
    return tuple(subjects)


def rejects_to_tsv(rejects: Iterable[Reject]) -> bytes:
    """Returns the content of rejects.tsv. White space within a reason becomes single spaces."""
    names = [field.name for field in dataclasses.fields(Reject)]
    rows = [[" ".join(value.split()) for value in dataclasses.astuple(reject)] for reject in rejects]
    return "".join("\t".join(row) + "\n" for row in [names, *rows]).encode()


def rejects_from_tsv(data: bytes) -> list[Reject]:
    """Reads the table of `rejects_to_tsv`."""
    return [Reject(*line.split("\t")) for line in data.decode().splitlines()[1:]]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def check_subjects(subjects: Sequence[Subject], info: StoreInfo) -> None:
    """Raises StoreError E_ID, E_MISMATCH or E_LEAK for invalid rows."""
    slots: set[int] = set()
    splits: dict[str, str] = {}
    images: dict[str, str] = {}
    for subject in subjects:
        if not is_id(subject.id) or (subject.visit and not is_id(subject.visit)):
            raise StoreError("E_ID", f"the subject id in slot {subject.slot} must be letters and digits only")
        if not 0 <= subject.slot < info.slots or subject.slot in slots:
            raise StoreError("E_MISMATCH", f"slot {subject.slot} is given twice or outside 0…{info.slots - 1}")
        if subject.split not in SPLITS or len(subject.present) != len(info.protocols):
            raise StoreError(
                "E_MISMATCH", f"slot {subject.slot} needs a split of {SPLITS} and one `present` per protocol"
            )
        if splits.setdefault(subject.id, subject.split) != subject.split:
            raise StoreError(
                "E_LEAK",
                f"the subject of slot {subject.slot} is in {subject.split} and {splits[subject.id]}; choose one",
            )
        if subject.image_hash and images.setdefault(subject.image_hash, subject.split) != subject.split:
            raise StoreError(
                "E_LEAK",
                f"the image of slot {subject.slot} is in {subject.split} and {images[subject.image_hash]}; build the "
                "store anew",
            )
        slots.add(subject.slot)
