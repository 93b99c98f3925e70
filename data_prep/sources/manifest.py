"""The members of a cohort: manifest, splits and withdrawn participants, checked before any image is read.

Messages give row numbers, never subject ids: ids are pseudonyms and stay out of logs.
"""

import csv
import hashlib
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.schema import SPLITS, is_id


@dataclass(frozen=True)
class Source:
    """One subject's input: the image and the available label maps, by protocol."""

    id: str
    t1: Path
    labels: dict[str, Path]
    split: str = ""  # train, validation or test; empty until assigned


def read_manifest(path: Path) -> list[Source]:
    """Reads a table with the columns `id,t1,fsl_fast,fsl_first,spm_tissue,malp_em,malp_em_tissue[,split]`, in row
    order.

    Paths are absolute or relative to the manifest; an empty cell means an absent map. Raises NeuronetError for missing
    columns or cells, E_ID, E_DUPLICATE, E_SPLIT, and E_LEAK for a subject in two splits.
    """
    rows = _table(path, "id", "t1")
    known = {"id", "t1", "split", *PROTOCOLS}
    if unknown := sorted(set(rows[0]) - known):
        raise NeuronetError(
            f"the manifest has the unknown column {unknown[0]!r}; its columns are {', '.join(sorted(known))}"
        )
    sources = []
    for number, row in enumerate(rows, start=2):  # row 1 is the header, as in a spreadsheet
        if not row["t1"]:
            raise NeuronetError(f"row {number} of the manifest has no t1 image")
        labels = {name: path.parent / row[name] for name in PROTOCOLS if row.get(name)}
        sources.append(Source(_checked_id(row["id"], number), path.parent / row["t1"], labels, row.get("split", "")))
    check_sources(sources)
    return sources


def check_sources(sources: Sequence[Source]) -> None:
    """Raises NeuronetError: E_ID, E_SPLIT, E_DUPLICATE for a subject listed twice, E_LEAK for one in two splits."""
    if not sources:
        raise NeuronetError("the manifest lists no subject")
    first: dict[str, int] = {}
    for number, source in enumerate(sources, start=2):
        _checked_id(source.id, number)
        if source.split and source.split not in SPLITS:
            raise NeuronetError(f"E_SPLIT: row {number} has the split {source.split!r}; it must be {', '.join(SPLITS)}")
        earlier = first.setdefault(source.id, number)
        if earlier != number:
            other = sources[earlier - 2]
            if other.split != source.split:
                raise NeuronetError(
                    f"E_LEAK: rows {earlier} and {number} are one subject in {other.split or 'no split'} and "
                    f"{source.split or 'no split'}; all visits of a subject belong to one split"
                )
            raise NeuronetError(f"E_DUPLICATE: rows {earlier} and {number} are the same subject; keep one visit")


def assign_splits(sources: Sequence[Source], splits: Path | None = None) -> list[Source]:
    """Gives every subject a split: the manifest's own, or the file's `id,split`, or 90 / 5 / 5 % by a hash of the id.

    The hash depends on the id alone, so a subject keeps its split when the cohort grows. Raises NeuronetError E_SPLIT
    if some subjects have no split or manifest and file disagree, and E_LEAK if the file puts a subject into two splits.
    """
    table = _read_splits(splits) if splits else {}
    if not splits and not any(source.split for source in sources):
        return [replace(source, split=_hash_split(source.id)) for source in sources]
    assigned = []
    for number, source in enumerate(sources, start=2):
        split = source.split or table.get(source.id, "")
        if not split:
            raise NeuronetError(
                f"E_SPLIT: the subject of row {number} has no split; give every subject one, or none at all"
            )
        if table.get(source.id, split) != split:
            raise NeuronetError(
                f"E_SPLIT: row {number} is {split} in the manifest and {table[source.id]} in the splits file"
            )
        assigned.append(replace(source, split=split))
    return assigned


def read_ids(path: Path) -> set[str]:
    """Reads a withdrawal list: one id per line. Further columns and a header `id` or `eid` are ignored."""
    ids = set()
    for number, line in enumerate(_text(path).splitlines(), start=1):
        cell = re.split(r"[,;\t ]", line.strip(), maxsplit=1)[0].strip('"')
        if cell and not (number == 1 and cell.lower() in ("id", "eid")):
            ids.add(_checked_id(cell, number))
    return ids


def ids_hash(ids: Collection[str]) -> str:
    """Returns the sha256 of the sorted ids, which identifies a withdrawal list without naming anybody."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def _read_splits(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, row in enumerate(_table(path, "id", "split"), start=2):
        id_ = _checked_id(row["id"], number)
        if row["split"] not in SPLITS:
            raise NeuronetError(
                f"E_SPLIT: row {number} of the splits file has {row['split']!r}, not {', '.join(SPLITS)}"
            )
        if table.setdefault(id_, row["split"]) != row["split"]:
            raise NeuronetError(
                f"E_LEAK: row {number} of the splits file puts its subject into a second split ({row['split']})"
            )
    return table


def _hash_split(id_: str) -> str:
    percent = int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def _checked_id(id_: str, number: int) -> str:
    if not is_id(id_):
        raise NeuronetError(
            f"E_ID: the id in row {number} must consist of ASCII letters and digits only; rename the subject"
        )
    return id_


def _table(path: Path, *required: str) -> list[dict[str, str]]:
    """Reads the rows of a CSV or TSV file that must have the columns `required`."""
    text = _text(path)
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",", restkey="")
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    if missing := [name for name in required if name not in columns]:
        raise NeuronetError(f"{path.name} must have the columns {', '.join(required)}; {missing[0]!r} is missing")
    rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if None in row.values() or "" in row:
            raise NeuronetError(f"row {number} of {path.name} must have {len(columns)} cells, as its header does")
    if not rows:
        raise NeuronetError(f"{path.name} has no rows")
    return [{name: value if name == "id" else value.strip() for name, value in row.items()} for row in rows]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise NeuronetError(f"cannot read {path}: {error}; check the path, or whether you may read it") from error
