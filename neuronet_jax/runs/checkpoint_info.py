"""The description that a checkpoint carries of itself, in the file `run/metadata`, checked before it is relied on.

Its checksum tells that it is as it was written, not that a sound program wrote it.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from neuronet_jax.errors import NeuronetError

SCHEMA = 1  # raised when a release can no longer read what an older one wrote


class NewerSchemaError(NeuronetError):
    """A checkpoint of a newer release, which is sound but cannot be read here."""


@dataclass(frozen=True)
class CheckpointInfo:
    """The fields of `run/metadata`."""

    config: dict[str, Any]  # as `Config.to_fields` gives it
    score: float | None  # mean validation Dice, where it was just measured
    arrays: dict[str, list[Any]]  # path: [dtype, shape]
    key_impls: dict[str, str]  # path of a random key: its implementation
    versions: dict[str, str]  # of the packages that wrote it
    schema: int = SCHEMA

    def to_fields(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, text: bytes) -> "CheckpointInfo":
        """Raises NewerSchemaError for a newer schema, NeuronetError for anything else that no release writes."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise NeuronetError(f"run/metadata is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise NeuronetError(f"run/metadata must be a JSON object, got {fields!r:.80}")
        schema = fields.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise NewerSchemaError(
                f"schema {schema}, this release reads up to {SCHEMA}: install the neuronet-jax that wrote it, or a "
                "newer one"
            )
        for name, holds in _RULES.items():
            if name not in fields or not holds(fields[name]):
                raise NeuronetError(f"{name!r} of run/metadata is missing or damaged: {fields.get(name)!r:.80}")
        return cls(**{name: fields[name] for name in _RULES})


def _is_array(described: Any) -> bool:
    if not isinstance(described, list) or len(described) != 2 or not isinstance(described[1], list):
        return False
    dtype, shape = described
    return isinstance(dtype, str) and all(type(side) is int and side >= 0 for side in shape)


def _is_score(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and math.isfinite(value))


def _is_words(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(word, str) for word in value.values())


_RULES = {
    "schema": lambda value: type(value) is int and value >= 1,
    "versions": _is_words,
    "config": lambda value: isinstance(value, dict),
    "score": _is_score,
    "arrays": lambda value: isinstance(value, dict) and all(map(_is_array, value.values())),
    "key_impls": _is_words,
}
