"""The folder of results, OUT: one dataset, which many commands may fill, one after the other or at the same time.

Its tables and its page always tell of all scans in the folder. A scan that is done has its row in its own record (see
`resume`); only rejected inputs are known from summary.tsv alone. summary.tsv is changed by one atomic operation, so
that of two commands that end together neither loses the rows of the other.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neuronet_jax import __version__
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation import agreement
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results import cohort_page
from neuronet_jax.results.bids import GENERATOR, Target, bids_label
from neuronet_jax.results.reports import embed
from neuronet_jax.results.resume import finished_rows
from neuronet_jax.results.tables import (
    Row,
    color_table,
    label_table,
    read_tsv,
    rows_of,
    summary_table,
    tsv,
    volumes_of,
    votes_table,
    write_text,
)
from neuronet_jax.runs.calibration import UNKNOWN, Calibration
from neuronet_jax.runs.provenance import Provenance

DESCRIPTION, SUMMARY = "dataset_description.json", "summary.tsv"
_NO_BIDS = (  # files without a name in BIDS
    *("summary*.tsv", "volumes.tsv", "*_volumes.tsv", "*_agreement.tsv", "*_quality.tsv", "*_provenance.json"),
    *("*_lut.txt", "*report.html", "*_thumbnail.webp", "*.stats", "*.mgz", "qc.tsv"),
)


@dataclass
class Dataset:
    """The dataset in `out`, as one command sees it. Making one touches nothing."""

    out: Path
    protocols: Sequence[str]
    provenance: Provenance
    overwrite: bool = False
    _begun: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def check(self) -> None:
        """Raises NeuronetError, before anything is computed or written, if `out` cannot be written, or holds a
        different dataset or results of a different provenance.
        """
        there = next(path for path in (self.out.absolute(), *self.out.absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise NeuronetError(f"cannot write to {self.out}: {there} is not a folder; choose a different --out folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise NeuronetError(
                f"cannot write to {self.out}: you may not write to {there}; choose a different --out folder"
            )
        try:
            text = (self.out / DESCRIPTION).read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise NeuronetError(f"{self.out / DESCRIPTION} cannot be read ({error}); choose another --out") from error
        try:
            found = json.loads(text)
            name, tools = found.get("Name"), [tool.get("Name") for tool in found.get("GeneratedBy", [])]
        except (ValueError, AttributeError, TypeError):
            found, name, tools = None, "damaged", []
        if tools != [GENERATOR]:
            raise NeuronetError(f"{self.out} holds a different dataset, {name!r}: choose a different --out folder")
        if found != self._description() and not self.overwrite:
            raise NeuronetError(
                f"{self.out} holds results of a different model or different options: add --overwrite to replace them, "
                "or choose a different --out folder"
            )

    def begin(self) -> None:
        """Writes the description and the look-up tables, once: before the first results, and not without any.

        Raises NeuronetError if they cannot be written.
        """
        with self._lock:
            if self._begun:
                return
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                write_text(self.out / DESCRIPTION, json.dumps(self._description(), indent=2) + "\n")
                write_text(self.out / ".bidsignore", "\n".join(_NO_BIDS) + "\n")
                for name in self.protocols:
                    write_text(self.out / f"seg-{bids_label(name)}_dseg.tsv", label_table(PROTOCOLS[name]))
                    write_text(self.out / f"seg-{bids_label(name)}_lut.txt", color_table(PROTOCOLS[name]))
                if (voters := sum(name in agreement.VOTERS for name in self.protocols)) > 1:
                    write_text(self.out / "desc-agreement_dseg.tsv", votes_table(voters))
            except OSError as error:
                raise NeuronetError(f"cannot write to {self.out}: {error}; choose a different --out folder") from error
            self._begun = True

    def exists(self) -> bool:
        """Tells whether there are results, of this command or an earlier one."""
        return self._begun or (self.out / DESCRIPTION).exists()

    def _description(self) -> dict:
        tables = {name: PROTOCOLS[name].version for name in self.protocols}
        made_by = {**self.provenance.to_json(), "label_tables_sha256": tables}
        return {
            "Name": f"{GENERATOR} segmentations",
            "BIDSVersion": "1.10.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": GENERATOR, "Version": __version__, "Description": json.dumps(made_by)}],
        }


def update_summary(out: Path, rows: Sequence[Row]) -> None:
    """Puts the rows of a command into OUT/summary.tsv, among those of all other inputs, sorted by name."""
    files = Files(str(out.absolute()))
    while True:
        text, version = files.read_version(SUMMARY)
        rejected = [row for row in rows_of((text or b"").decode(errors="replace")) if row.status == "rejected"]
        merged: Mapping[str, Row] = {row.key: row for row in (*rejected, *finished_rows(out), *rows)}
        table = summary_table(sorted(merged.values(), key=lambda row: row.key)).encode()
        if table == text or files.replace(SUMMARY, table, version) is not None:
            return


def write_cohort(out: Path, provenance: Provenance, calibration: Calibration = UNKNOWN, report: bool = True) -> None:
    """Writes OUT/volumes.tsv and, with `report`, report.html, about all scans in `out` and in its summary.tsv.

    It reads the small tables and thumbnails of the scans, not their pages. Raises NeuronetError if writing fails.
    """
    files = Files(str(out.absolute()))
    while True:
        text, version = files.read_version(SUMMARY)
        _write_cohort(out, rows_of((text or b"").decode(errors="replace")), provenance, calibration, report)
        if files.read_version(SUMMARY)[1] == version:  # else a different command has ended meanwhile, with more scans
            return


def _write_cohort(
    out: Path, rows: Sequence[Row], provenance: Provenance, calibration: Calibration, report: bool
) -> None:
    table = volumes_of(out, {row.output for row in rows if row.status == "done"})
    write_text(out / "volumes.tsv", tsv([["scan", *table.columns], *table.rows()]))
    if not report:
        return
    ordered = cohort_page.in_order(rows, table)
    thumbnails: dict[str, str] = {}
    agreements = {}
    for target in (Target(Path(row.input), out, row.output) for row in ordered if row.status == "done"):
        if target.table("agreement").exists():
            agreements[target.stem] = read_tsv(target.table("agreement"))
        if target.report.exists():
            wanted = len(thumbnails) < cohort_page.MOST_THUMBNAILS and target.thumbnail.exists()
            thumbnails[target.stem] = embed(target.thumbnail.read_bytes()) if wanted else ""
    page = cohort_page.render_cohort(ordered, table, agreements, thumbnails, calibration, provenance)
    write_text(out / "report.html", page)
