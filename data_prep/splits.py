"""Training, validation and test: by participant, over all visits.

    python -m data_prep.splits --table=participants.tsv --out=splits.csv --stratify=site,age,sex --seed=1
    python -m data_prep.splits --table=participants.tsv --out=splits.csv --published

Writes the table `id,split` for `data_prep.build --splits`. Without a table, a build splits by a hash of the id. A table
is written once and kept, because a stratified split of a cohort that has grown is a different one.
"""

import argparse
import hashlib
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.sources.source import Source, bad_id
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.files import Files
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.spreadsheets import Faults, Row, read_table
from neuronet_jax.store.schema import SPLITS, bare_id, is_id

NONE = "none"  # in a splits file: the participant is left out of the store
FRACTIONS = (0.9, 0.05, 0.05)  # of SPLITS
PUBLISHED = (5000, 10, 713)  # participants of SPLITS, by sorted EID (Rajchl et al., 2018)
_BINS = 5  # of a column with more than twice as many different numbers, such as age
_IDS = ("id", "eid", "participant_id")  # columns; the last is that of BIDS' participants.tsv


def assign_splits(sources: Sequence[Source], splits: Path | None = None) -> list[Source]:
    """Gives every subject a split: the manifest's own, or the file's `id,split`, or 90 / 5 / 5 % by a hash of the id.

    The hash depends on the id alone, so a subject keeps its split when the cohort grows. Subjects with the split
    `none` in the file are left out. Raises NeuronetError E_SPLIT if some subjects have no split or manifest and file
    disagree, and E_LEAK if the file puts a subject into two splits.
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
        if split != NONE:
            assigned.append(replace(source, split=split))
    faults.raise_any()
    return assigned


def published(ids: Sequence[str]) -> dict[str, str]:
    """Returns the published split by sorted id: 5,000 to train, 10 to validate, 713 to test, and `none` for the rest.

    Raises NeuronetError for fewer participants.
    """
    if len(ids) < sum(PUBLISHED):
        raise NeuronetError(f"the published split needs {sum(PUBLISHED)} participants, and the table has {len(ids)}")
    ordered = sorted(ids, key=lambda id_: (int(id_), id_)) if all(id_.isdigit() for id_ in ids) else sorted(ids)
    names = [name for name, count in zip(SPLITS, PUBLISHED, strict=True) for _ in range(count)]
    return dict(zip(ordered, [*names, *[NONE] * (len(ids) - len(names))], strict=True))


def stratified(
    strata: Mapping[str, tuple[str, ...]], seed: int = 0, fractions: Sequence[float] = FRACTIONS
) -> dict[str, str]:
    """Returns a split in which every stratum has its share, as far as numbers allow; `strata` gives that of each id.

    Participants are ordered by stratum, at random within it, and each gets the split that lacks most so far. So any
    stretch of that order has the fractions to within a participant for each split.
    """
    order = sorted(strata, key=lambda id_: (strata[id_], hashlib.sha256(f"{seed} {id_}".encode()).digest()))
    given = np.zeros(len(fractions))
    split = {}
    for count, id_ in enumerate(order, start=1):
        lacking = int(np.argmax(count * np.asarray(fractions) - given))
        given[lacking] += 1
        split[id_] = SPLITS[lacking]
    return split


def read_strata(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns the stratum of each participant: its cells in `columns`, with numbers such as ages in fifths.

    An empty cell is a stratum of its own. Raises NeuronetError for a missing column, a bad id, and visits of one
    participant whose cells differ.
    """
    id_column = next((name for name in _IDS if name in rows[0][1]), None)
    if id_column is None:
        raise NeuronetError(f"the table needs one of the columns {', '.join(_IDS)}")
    if missing := [name for name in columns if name not in rows[0][1]]:
        raise NeuronetError(f"--stratify: the table has no column {missing[0]!r}")
    faults, cells, first = Faults(), {}, {}
    for number, row in rows:
        id_ = bare_id(row[id_column])
        if not is_id(id_):
            faults.add(bad_id(number))
        elif cells.setdefault(id_, [row[name] for name in columns]) != [row[name] for name in columns]:
            faults.add(f"rows {first[id_]} and {number} are one participant with different {', '.join(columns)}")
        first.setdefault(id_, number)
    faults.raise_any()
    binned = [_binned(column) for column in zip(*cells.values(), strict=True)]
    return dict(zip(cells, zip(*binned, strict=True) if columns else [()] * len(cells), strict=True))


def _binned(column: Sequence[str]) -> list[str]:
    """Returns the cells of a column, with many different numbers replaced by their fifth."""
    try:
        numbers = np.array([float(cell) if cell else np.nan for cell in column])
    except ValueError:
        return list(column)
    known = numbers[np.isfinite(numbers)]
    if len(np.unique(known)) <= 2 * _BINS:
        return list(column)
    edges = np.quantile(known, np.arange(1, _BINS) / _BINS)
    return [str(np.searchsorted(edges, number)) if np.isfinite(number) else "" for number in numbers]


def _read_splits(path: Path) -> dict[str, str]:
    faults, table = Faults(), {}
    for number, row in read_table(path, "id", "split"):
        id_ = bare_id(row["id"])
        if not is_id(id_):
            faults.add(bad_id(number))
        elif row["split"] not in (*SPLITS, NONE):
            faults.add(f"E_SPLIT: row {number} of the splits file has {row['split']!r}, not {', '.join(SPLITS)}")
        elif table.setdefault(id_, row["split"]) != row["split"]:
            faults.add(f"E_LEAK: row {number} of the splits file puts its subject into a second split ({row['split']})")
    faults.raise_any()
    return table


def _hash_split(id_: str) -> str:
    percent = int.from_bytes(hashlib.sha256(id_.encode()).digest()[:8], "big") % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


# ---- command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m data_prep.splits", description=__doc__)
    add = parser.add_argument
    add(
        "--table",
        type=Path,
        required=True,
        help="CSV or TSV with a column id, eid or participant_id, such as a manifest",
    )
    add("--out", type=Path, required=True, help="the table to write; it must not exist")
    add("--stratify", default="", metavar="SITE,AGE,SEX", help="columns whose values each split has in equal shares")
    add("--seed", type=int, help="of the random order within a stratum (default: 0)")
    add("--fractions", metavar="90,5,5", help="per cent to train, validate and test")
    add("--published", action="store_true", help="5,000 / 10 / 713 participants by sorted id, the others left out")
    return run(parser, _splits, arguments)


def _splits(args: argparse.Namespace) -> int:
    columns = [name.strip() for name in args.stratify.split(",") if name.strip()]
    if args.published and (columns or args.seed is not None or args.fractions):
        raise UsageError("--published is one split by sorted id; leave out --stratify, --seed and --fractions")
    if args.out.exists():
        raise NeuronetError(f"{args.out} exists, and a store may depend on it; choose a different --out")
    strata = read_strata(read_table(args.table), columns)
    if args.published:
        split = published(list(strata))
    else:
        split = stratified(strata, args.seed or 0, _fractions(args.fractions) if args.fractions else FRACTIONS)
    text = io.StringIO()
    text.write("id,split\n")
    text.writelines(f"{id_},{split[id_]}\n" for id_ in sorted(split))
    Files(str(args.out.parent.absolute())).write(args.out.name, text.getvalue().encode())
    counts = {name: list(split.values()).count(name) for name in (*SPLITS, NONE)}
    print(", ".join(f"{name} {count}" for name, count in counts.items() if count) + f", written to {args.out}")
    return DONE


def _fractions(text: str) -> tuple[float, ...]:
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    if len(parts) != len(SPLITS) or min(parts) < 0 or abs(sum(parts) - 100) > 1e-6:
        raise UsageError(f"--fractions takes three numbers that add up to 100, such as 90,5,5; got {text!r}")
    return tuple(part / 100 for part in parts)


if __name__ == "__main__":
    sys.exit(main())
