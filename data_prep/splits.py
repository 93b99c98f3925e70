"""Training, validation and test: by participant, over all visits."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.sources.source import Source, bad_id
from neuronet_jax.spreadsheets import Faults, read_table
from neuronet_jax.store.schema import SPLITS, bare_id, is_id


def assign_splits(sources: Sequence[Source], splits: Path | None = None) -> list[Source]:
    """Gives every subject a split: the manifest's own, or the file's `id,split`, or 90 / 5 / 5 % by a hash of the id.

    The hash depends on the id alone, so a subject keeps its split when the cohort grows. Raises NeuronetError E_SPLIT
    if some subjects have no split or manifest and file disagree, and E_LEAK if the file puts a subject into two splits.
    """
    table = _read_splits(splits) if splits else {}
    if not splits and not any(source.split for source in sources):
        return [replace(source, split=_hash_split(source.id)) for source in sources]
    faults, assigned = Faults(), []
    for position, source in enumerate(sources, start=1):
        row = source.row or position
        split = source.split or table.get(source.id, "")
        if not split:
            faults.add(f"E_SPLIT: the subject of row {row} has no split; give every subject one, or none at all")
        elif table.get(source.id, split) != split:
            faults.add(f"E_SPLIT: row {row} is {split} in the manifest and {table[source.id]} in the splits file")
        assigned.append(replace(source, split=split))
    faults.raise_any()
    return assigned


def _read_splits(path: Path) -> dict[str, str]:
    faults, table = Faults(), {}
    for number, row in read_table(path, "id", "split"):
        id_ = bare_id(row["id"])
        if not is_id(id_):
            faults.add(bad_id(number))
        elif row["split"] not in SPLITS:
            faults.add(f"E_SPLIT: row {number} of the splits file has {row['split']!r}, not {', '.join(SPLITS)}")
        elif table.setdefault(id_, row["split"]) != row["split"]:
            faults.add(f"E_LEAK: row {number} of the splits file puts its subject into a second split ({row['split']})")
    faults.raise_any()
    return table


def _hash_split(id_: str) -> str:
    percent = int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"
