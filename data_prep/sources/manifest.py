"""The members of a cohort: manifest, splits and withdrawn participants, checked before any image is read.

Messages give row numbers, never subject ids: ids are pseudonyms and stay out of logs.
"""

import csv
import difflib
import hashlib
import io
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.schema import SPLITS, is_id

MOST_FAULTS = 20  # rows that one message names: as many as a person repairs before trying again
_NEAR = 0.75  # likeness of a mistyped column, such as fsl_fats or malpem, to the known one

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One subject's input: the image and the available label maps, by protocol."""

    id: str
    t1: Path
    labels: dict[str, Path]
    split: str = ""  # train, validation or test; empty until assigned


class _Faults:
    """Collects what is wrong with a table, so that one message names it all."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def add(self, text: str) -> None:
        self._found.append(text)

    def raise_any(self) -> None:
        """Raises NeuronetError with the first MOST_FAULTS faults, a line each."""
        if len(self._found) > 1:
            shown = self._found[:MOST_FAULTS]
            more = [f"and {len(self._found) - MOST_FAULTS} more"] if len(self._found) > MOST_FAULTS else []
            raise NeuronetError("\n  ".join([f"{len(self._found)} rows cannot be used:", *shown, *more]))
        if self._found:
            raise NeuronetError(self._found[0])


def read_manifest(path: Path) -> list[Source]:
    """Reads a table with the columns `id,t1,fsl_fast,fsl_first,spm_tissue,malp_em,malp_em_tissue[,split]`, in row
    order.

    Paths are absolute or relative to the manifest; an empty cell means an absent map. `sub-01` is the id 01, as in the
    lists of `neuronet segment`. Further columns are left out, and reported. Raises NeuronetError for missing columns or
    cells, for a column that nearly has a known name, and with E_ID, E_DUPLICATE, E_SPLIT, and E_LEAK for a subject in
    two splits. It names all rows that are wrong, up to MOST_FAULTS.
    """
    rows = _table(path, "id", "t1")
    known = ("id", "t1", *PROTOCOLS, "split")
    unknown = [name for name in rows[0] if name not in known]
    for name in unknown:
        if near := difflib.get_close_matches(name.lower(), known, 1, _NEAR):
            raise NeuronetError(f"the manifest has the column {name!r}; did you mean {near[0]!r}?")
    if unknown:
        log.warning("columns of the manifest that are not used: %s", ", ".join(map(repr, unknown)))
    faults, sources = _Faults(), []
    for number, row in enumerate(rows, start=2):  # row 1 is the header, as in a spreadsheet
        if not row["t1"]:
            faults.add(f"row {number} of the manifest has no t1 image")
        labels = {name: path.parent / row[name] for name in PROTOCOLS if row.get(name)}
        sources.append(Source(_bare(row["id"]), path.parent / row["t1"], labels, row.get("split", "")))
    _check(sources, faults)
    return sources


def check_sources(sources: Sequence[Source]) -> None:
    """Raises NeuronetError: E_ID, E_SPLIT, E_DUPLICATE for a subject listed twice, E_LEAK for one in two splits."""
    _check(sources, _Faults())


def _check(sources: Sequence[Source], faults: _Faults) -> None:
    if not sources:
        raise NeuronetError("the manifest lists no subject")
    first: dict[str, int] = {}
    for number, source in enumerate(sources, start=2):
        if not is_id(source.id):
            faults.add(_bad_id(number))
            continue
        if source.split and source.split not in SPLITS:
            faults.add(f"E_SPLIT: row {number} has the split {source.split!r}; it must be {', '.join(SPLITS)}")
        earlier = first.setdefault(source.id, number)
        if earlier != number:
            other = sources[earlier - 2]
            if other.split != source.split:
                faults.add(
                    f"E_LEAK: rows {earlier} and {number} are one subject in {other.split or 'no split'} and "
                    f"{source.split or 'no split'}; all visits of a subject belong to one split"
                )
            else:
                faults.add(f"E_DUPLICATE: rows {earlier} and {number} are the same subject; keep one visit")
    faults.raise_any()


def assign_splits(sources: Sequence[Source], splits: Path | None = None) -> list[Source]:
    """Gives every subject a split: the manifest's own, or the file's `id,split`, or 90 / 5 / 5 % by a hash of the id.

    The hash depends on the id alone, so a subject keeps its split when the cohort grows. Raises NeuronetError E_SPLIT
    if some subjects have no split or manifest and file disagree, and E_LEAK if the file puts a subject into two splits.
    """
    table = _read_splits(splits) if splits else {}
    if not splits and not any(source.split for source in sources):
        return [replace(source, split=_hash_split(source.id)) for source in sources]
    faults, assigned = _Faults(), []
    for number, source in enumerate(sources, start=2):
        split = source.split or table.get(source.id, "")
        if not split:
            faults.add(f"E_SPLIT: the subject of row {number} has no split; give every subject one, or none at all")
        elif table.get(source.id, split) != split:
            faults.add(f"E_SPLIT: row {number} is {split} in the manifest and {table[source.id]} in the splits file")
        assigned.append(replace(source, split=split))
    faults.raise_any()
    return assigned


def read_ids(path: Path) -> dict[str, int]:
    """Reads a withdrawal list: one id per line. Further columns and a header `id` or `eid` are ignored.

    Returns the line of each id, so that messages can name lines instead of participants.
    """
    faults, ids = _Faults(), {}
    for number, line in enumerate(_text(path).splitlines(), start=1):
        cell = re.split(r"[,;\t ]", line.strip(), maxsplit=1)[0].strip('"')
        if not cell or (number == 1 and cell.lower() in ("id", "eid")):
            continue
        if is_id(_bare(cell)):
            ids.setdefault(_bare(cell), number)
        else:
            faults.add(_bad_id(number))
    faults.raise_any()
    return ids


def unknown_lines(excluded: Mapping[str, int], known: Collection[str], where: str) -> str:
    """Says which lines of a withdrawal list name nobody in `where`; empty if all do."""
    lines = [number for id_, number in excluded.items() if id_ not in known]
    if not lines:
        return ""
    listed = ", ".join(map(str, lines[:MOST_FAULTS])) + (" and others" if len(lines) > MOST_FAULTS else "")
    return f"{len(lines)} of {len(excluded)} ids to exclude are not in {where}; lines of the list: {listed}"


def ids_hash(ids: Collection[str]) -> str:
    """Returns the sha256 of the sorted ids, which identifies a withdrawal list without naming anybody."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()


def _read_splits(path: Path) -> dict[str, str]:
    faults, table = _Faults(), {}
    for number, row in enumerate(_table(path, "id", "split"), start=2):
        id_ = _bare(row["id"])
        if not is_id(id_):
            faults.add(_bad_id(number))
        elif row["split"] not in SPLITS:
            faults.add(f"E_SPLIT: row {number} of the splits file has {row['split']!r}, not {', '.join(SPLITS)}")
        elif table.setdefault(id_, row["split"]) != row["split"]:
            faults.add(f"E_LEAK: row {number} of the splits file puts its subject into a second split ({row['split']})")
    faults.raise_any()
    return table


def _hash_split(id_: str) -> str:
    percent = int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def _bare(id_: str) -> str:
    """Returns the id without BIDS' prefix."""
    return id_.removeprefix("sub-")


def _bad_id(number: int) -> str:
    return f"E_ID: the id in row {number} must consist of ASCII letters and digits only; rename the subject"


def _table(path: Path, *required: str) -> list[dict[str, str]]:
    """Reads the rows of a CSV or TSV file that must have the columns `required`."""
    text = _text(path)
    header = text.split("\n", 1)[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",", restkey="")
    columns = [name.strip() for name in reader.fieldnames or []]
    reader.fieldnames = columns
    if missing := [name for name in required if name not in columns]:
        raise NeuronetError(f"{path.name} must have the columns {', '.join(required)}; {missing[0]!r} is missing")
    rows, faults = list(reader), _Faults()
    for number, row in enumerate(rows, start=2):
        if None in row.values() or "" in row:
            faults.add(f"row {number} of {path.name} must have {len(columns)} cells, as its header does")
    faults.raise_any()
    if not rows:
        raise NeuronetError(f"{path.name} has no rows")
    return [{name: value if name == "id" else value.strip() for name, value in row.items()} for row in rows]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise NeuronetError(f"cannot read {path}: {error}; check the path, or whether you may read it") from error
