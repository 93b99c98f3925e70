"""Tables that people write: CSV and TSV files, in which every line is one row.

A quoted cell cannot run over lines here. So a stray quote is an error with the number of its line, and can never hide
the rows that follow it. Messages give line numbers, never cells: a cell may identify a person.
"""

import collections
import csv
import re
from collections.abc import Iterator
from pathlib import Path

from neuronet_jax.errors import NeuronetError, shortened

MOST_FAULTS = 20  # rows that one message names: as many as a person repairs before trying again
Row = tuple[int, dict[str, str]]  # number of the line, from 1; cells by column, stripped but for `id`


class Faults:
    """Collects what is wrong with a table, so that one message names it all."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, text: str) -> None:
        self._found.append(text)

    def raise_any(self) -> None:
        """Raises NeuronetError with the first MOST_FAULTS faults, a line each."""
        if len(self._found) > 1:
            shown = shortened(self._found, MOST_FAULTS)
            raise NeuronetError("\n  ".join([f"{len(self._found)} rows cannot be used:", *shown]))
        if self._found:
            raise NeuronetError(self._found[0])


def read_text(path: Path) -> str:
    """Reads a file as UTF-8. Raises NeuronetError if that is impossible."""
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets write a byte order mark
    except (OSError, ValueError) as error:
        raise NeuronetError(f"cannot read {path}: {error}; check the path, or whether you may read it") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, with their numbers.

    Only line feeds and carriage returns end a line. `str.splitlines` also splits at characters such as U+2028, which
    no other program counts.
    """
    for number, line in enumerate(re.split("\r\n|\n|\r", text), start=1):
        if line.strip():
            yield number, line


def read_table(path: Path, *required: str) -> list[Row]:
    """Reads a CSV or TSV file that has a header with the columns `required`, and returns its rows, one for each line.

    Raises NeuronetError for a missing or repeated column, a stray quote, a row with too few or too many cells, and a
    table without rows. It names all such lines, up to MOST_FAULTS.
    """
    content = list(lines(read_text(path)))
    if not content:
        raise NeuronetError(f"{path.name} is empty; its first row must name the columns {', '.join(required)}")
    delimiter = "\t" if "\t" in content[0][1] else ","
    faults, rows = Faults(), []
    columns = [cell.strip() for cell in _cells(*content[0], delimiter, path.name, faults)]
    faults.raise_any()
    if repeated := [name for name, count in collections.Counter(columns).items() if name and count > 1]:
        raise NeuronetError(f"{path.name} has the column {repeated[0]!r} more than once; remove one of them")
    if missing := [name for name in required if name not in columns]:
        raise NeuronetError(f"{path.name} must have the columns {', '.join(required)}; {missing[0]!r} is missing")
    for number, line in content[1:]:
        before = len(faults)
        cells = _cells(number, line, delimiter, path.name, faults)
        if len(faults) > before:
            continue
        if len(cells) != len(columns):
            faults.add(
                f"row {number} of {path.name} must have {len(columns)} cells, as its header does; it has {len(cells)}"
            )
        else:
            row = dict(zip(columns, cells, strict=True))
            rows.append((number, {name: cell if name == "id" else cell.strip() for name, cell in row.items()}))
    faults.raise_any()
    if not rows:
        raise NeuronetError(f"{path.name} has no rows")
    return rows


def _cells(number: int, line: str, delimiter: str, name: str, faults: Faults) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error:
        faults.add(
            f'row {number} of {name} has a stray quote ("): remove it, or close it in the same row; a cell that holds '
            "a quote writes it twice"
        )
        return []
