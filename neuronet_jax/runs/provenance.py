"""The origin of weights and results, as typed data with a stable JSON form.

Other programs read that JSON, in `release.json`, `dataset_description.json`, `sub-…_provenance.json` and `summary.json`
of an evaluation. It names no subject and no path.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from neuronet_jax.errors import NeuronetError
from neuronet_jax.store.schema import StoreInfo

_FIX = "copy the run again, or fetch the release again"


@dataclass(frozen=True)
class Imported:
    """The files of different software that a network's weights were read from."""

    source: str  # such as "TensorFlow SavedModel"
    axes: str  # where the axes of its training arrays pointed, such as SAL
    sha256: dict[str, str]  # per file

    def to_json(self) -> dict[str, Any]:
        return {"from": self.source, "axes": self.axes, "sha256": self.sha256}

    @classmethod
    def from_json(cls, content: Any) -> "Imported":
        """Raises NeuronetError if a field is missing or of the wrong type."""
        fields = _typed(content, {"from": str, "axes": str, "sha256": dict}, {}, "imported")
        return cls(fields["from"], fields["axes"], fields["sha256"])


@dataclass(frozen=True)
class Origin:
    """The origin of one network's weights."""

    config: str = ""  # name of the settings
    step: int = 0  # of the checkpoint
    split_hash: str = ""  # of the store: who is in training, validation and test
    weights_sha256: str = ""
    note: str = ""  # for every report, such as: a demonstration on synthetic heads
    imported: Imported | None = None

    def to_json(self) -> dict[str, Any]:
        if self == UNKNOWN_ORIGIN:
            return {}
        content = {name: getattr(self, name) for name in ("config", "step", "split_hash", "weights_sha256")}
        if self.note:
            content["note"] = self.note
        if self.imported:
            content["imported"] = self.imported.to_json()
        return content

    @classmethod
    def from_json(cls, content: Any) -> "Origin":
        """Raises NeuronetError if a field is of the wrong type; leaves out fields that this version does not know."""
        optional = {"config": str, "step": int, "split_hash": str, "weights_sha256": str, "note": str, "imported": dict}
        fields = _typed(content, {}, optional, "provenance")
        if "imported" in fields:
            fields["imported"] = Imported.from_json(fields["imported"])
        return cls(**fields)


UNKNOWN_ORIGIN = Origin()  # of a network that comes from no run


@dataclass(frozen=True)
class Provenance:
    """The origin of a result, apart from its input: networks, calibration and options."""

    members: tuple[Origin, ...] = ()  # the networks, several for an ensemble
    calibration_sha256: str = ""  # of the calibration of predicted Dice; empty without one
    options: Mapping[str, Any] = field(default_factory=dict)  # of the segmentation, where not at their default

    @property
    def note(self) -> str:
        """The notes of all members, each once."""
        return "; ".join(dict.fromkeys(member.note for member in self.members if member.note))

    def to_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if len(self.members) == 1:
            content = self.members[0].to_json()
        elif self.members:
            content["ensemble"] = [member.to_json() for member in self.members]
            if self.note:
                content["note"] = self.note
        if self.calibration_sha256:
            content["calibration_sha256"] = self.calibration_sha256
        return {**content, **self.options}


@dataclass(frozen=True)
class TrainingData:
    """The data that a run was trained on, as the run itself describes them."""

    protocols: tuple[str, ...]
    voxel_size_mm: float
    grid: tuple[int, ...] = ()  # voxels along x, y, z; empty where it is not known
    split_hash: str = ""  # who is in training, validation and test; empty where it is not known
    note: str = ""
    imported: Imported | None = None  # where the weights were not trained here
    store: Mapping[str, Any] = field(default_factory=dict)  # provenance of the store: its software, sources, settings
    content_hash: str = ""  # which scans and label maps; empty where it is not known
    begun_with: Origin | None = None  # the weights before the first step, where they were not drawn

    @classmethod
    def of_store(cls, info: StoreInfo, begun_with: Origin | None = None) -> "TrainingData":
        """Describes a store. What the notes of earlier weights say, such as their licence, holds for the new ones."""
        notes = (str(info.provenance.get("note", "")), begun_with.note if begun_with else "")
        note = "; ".join(dict.fromkeys(filter(None, notes)))
        # stores of version 0.1.0 hold the hash of a withdrawal list, from which few ids could be found
        origin = {name: value for name, value in info.provenance.items() if name != "exclude_hash"}
        return cls(
            info.protocols,
            info.voxel_size_mm,
            info.grid,
            info.split_hash,
            note,
            store=origin,
            content_hash=info.subjects_hash,
            begun_with=begun_with,
        )

    def differences(self, other: "TrainingData") -> list[str]:
        """Describes in what `other` data differ, as far as both are known; where the store lies does not matter."""
        names = ("protocols", "voxel_size_mm", "grid", "split_hash", "content_hash")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name} was {mine!r}, is {its!r}" for name, mine, its in pairs if mine and its and mine != its]

    def to_json(self) -> bytes:
        content = asdict(self)
        for name, part in (("imported", self.imported), ("begun_with", self.begun_with)):
            content[name] = part.to_json() if part else None
        return (json.dumps({"schema": 1, **content}, indent=2) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> "TrainingData":
        """Raises NeuronetError if the data are damaged or of a newer schema."""
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise NeuronetError(f"the description of the training data is not JSON ({error}); {_FIX}") from error
        required = {"schema": int, "protocols": list, "voxel_size_mm": float, "grid": list, "split_hash": str}
        required |= {"note": str, "store": dict}
        optional = {"imported": dict, "begun_with": dict, "content_hash": str}
        fields = _typed(content, required, optional, "training data")
        if (schema := fields.pop("schema")) > 1:
            raise NeuronetError(
                f"the training data have schema {schema}, this version reads up to 1: update neuronet-jax"
            )
        imported = Imported.from_json(fields["imported"]) if "imported" in fields else None
        begun_with = Origin.from_json(fields["begun_with"]) if "begun_with" in fields else None
        lists = {name: tuple(fields[name]) for name in ("protocols", "grid")}
        return cls(**{**fields, **lists, "imported": imported, "begun_with": begun_with}).checked()

    def checked(self) -> "TrainingData":
        """Returns itself. Raises NeuronetError for values that no store has."""
        rules = {
            "protocols": all(isinstance(name, str) for name in self.protocols),
            "grid": all(type(side) is int and side > 0 for side in self.grid),
            "voxel_size_mm": isinstance(self.voxel_size_mm, float) and 0 < self.voxel_size_mm < math.inf,
        }
        for name, holds in rules.items():
            if not holds:
                raise NeuronetError(f"{name!r} of the training data cannot be {getattr(self, name)!r:.80}; {_FIX}")
        return self


def _typed(content: Any, required: dict[str, type], optional: dict[str, type], what: str) -> dict[str, Any]:
    """Returns the fields of `content` with these names, after checking their types. None counts as absent."""
    if not isinstance(content, dict):
        raise NeuronetError(f"{what} must be a JSON object, got {content!r:.80}; {_FIX}")
    fields = {}
    for name, kind in {**required, **optional}.items():
        value = content.get(name)
        if value is None and name in optional:
            continue
        if type(value) is not kind:
            raise NeuronetError(f"{name!r} of {what} must be of type {kind.__name__}, got {value!r:.80}; {_FIX}")
        fields[name] = value
    return fields
