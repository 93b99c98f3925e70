"""The notes of a person about scans: OUT/qc.tsv, a row for each scan with a verdict."""

import csv
import datetime
from pathlib import Path

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.programs import shown
from neuronet_jax.results.tables import tsv

NAME = "qc.tsv"
VERDICTS = ("good", "bad", "unsure")
COLUMNS = ("scan", "verdict", "remark", "date")
MOST_CHARACTERS = 1000  # of a remark


class Notes:
    """The notes in the folder `out`. Several viewers, and an editor, may write them at the same time."""

    def __init__(self, out: Path):
        self._files = Files(str(out.absolute()))

    def all(self) -> dict[str, dict[str, str]]:
        """Returns the rows by scan."""
        return _rows(self._files.read(NAME))

    def put(self, scan: str, verdict: str, remark: str) -> None:
        """Replaces the note of a scan, or removes it if both are empty; the file changes entirely or not at all.

        Raises NeuronetError for a verdict that is not among VERDICTS, and if the file cannot be written.
        """
        if verdict not in ("", *VERDICTS):
            raise NeuronetError(f"a verdict is one of {', '.join(VERDICTS)}, got {verdict!r}")
        remark = shown(" ".join(remark[:MOST_CHARACTERS].split()))
        if remark.startswith(("=", "+", "-", "@")):
            remark = f"'{remark}"  # a spreadsheet must not compute it
        row = {"scan": scan, "verdict": verdict, "remark": remark, "date": datetime.date.today().isoformat()}
        while True:
            text, version = self._files.read_version(NAME)
            rows = _rows(text)
            rows.pop(scan, None)
            if verdict or remark:
                rows[scan] = row
            table = tsv([COLUMNS, *([rows[name].get(c) or "" for c in COLUMNS] for name in sorted(rows))])
            if self._files.replace(NAME, table.encode(), version) is not None:
                return


def _rows(text: bytes | None) -> dict[str, dict[str, str]]:
    lines = (text or b"").decode("utf-8", errors="replace").splitlines()
    table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return {row["scan"]: row for row in table if row.get("scan")}
