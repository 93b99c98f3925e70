"""Finds scans that are already segmented, so that a command run again skips them.

Every scan has a record beside its results, OUT/sub-01/anat/sub-01_provenance.json: the model, options and input that
they come from, and the files written. The record is begun before the first result and completed after the last.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuronet_jax import __version__
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.programs import shown
from neuronet_jax.results.bids import GENERATOR, Target
from neuronet_jax.results.extras import files_of
from neuronet_jax.results.tables import Row, row_of
from neuronet_jax.runs.provenance import Provenance

PROGRAM = f"{GENERATOR} {__version__}"
CALIBRATION = {"calibration_sha256": None}  # the part of the provenance that affects predicted Dice only
LISTED = 3  # scans that an error lists: enough to see the problem


@dataclass(frozen=True)
class Records:
    """The records of all scans: whether results are complete, and where they come from."""

    provenance: Provenance
    protocols: Sequence[str]
    posteriors: Sequence[str] = ()
    also: Sequence[str] = ()  # see `extras`

    def unfinished(self, targets: Sequence[Target], overwrite: bool) -> tuple[list[Target], dict[str, Row]]:
        """Returns the scans still to do and, by stem, the rows of those that are complete.

        Raises NeuronetError, before anything is computed, if results would be replaced without `overwrite` that come
        from a different model, input or options, or that somebody has changed.
        """
        todo, finished, refused = [], {}, []
        for target in targets:
            row, reason = self._look(target)
            if row is not None:
                finished[target.stem] = row
                continue
            todo.append(target)
            if reason:
                refused.append(f"  {target.stem}: {reason}")
        if refused and not overwrite:
            if len(refused) > LISTED:
                refused[LISTED:] = [f"  and {len(refused) - LISTED} more"]
            raise NeuronetError(
                "the output folder holds results that differ from this command's:\n" + "\n".join(refused) + "\n"
                "add --overwrite to replace them, or choose a different --out folder"
            )
        return todo, finished

    def begin(self, target: Target, source: dict[str, Any]) -> None:
        """Records that results of this model and input may exist from now on, perhaps not all of them."""
        model = self.provenance.to_json()
        self._write(target, {"program": PROGRAM, "model": model, "input": source, "protocols": list(self.protocols)})

    def complete(self, target: Target, row: Row) -> None:
        """Records that all results of this scan are written."""
        begun = json.loads(target.record.read_text(encoding="utf-8"))
        files = {path.name: path.stat().st_size for path in target.results(self.protocols, self.posteriors)}
        self._write(target, {**begun, "files": files, "row": asdict(row)})

    def _look(self, target: Target) -> tuple[Row | None, str]:
        """Returns the row of a complete scan, or the reason not to replace its results (empty if there is none)."""
        try:
            record = json.loads(target.record.read_text(encoding="utf-8"))
            program, model, source, protocols = (record[name] for name in ("program", "model", "input", "protocols"))
        except FileNotFoundError:
            there = [path.name for path in target.results(self.protocols, self.posteriors) if path.exists()]
            return None, f"{there[0]} exists and its origin is not recorded" if there else ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"{target.record.name} cannot be read ({error})"
        wanted = json.loads(json.dumps(self.provenance.to_json()))
        if (program, model) != (PROGRAM, wanted):
            if program == PROGRAM and {**model, **CALIBRATION} == {**wanted, **CALIBRATION}:
                return None, "its predicted Dice comes from a different calibration of the run, or from none"
            return None, "its results come from a different model, different options or a different release"
        if not _is_input(target.source, source):
            return None, "its results come from a different input file"
        if "row" not in record:  # begun, not completed
            return None, ""
        if not set(self.protocols) <= set(protocols):
            return None, f"it has results for {', '.join(protocols)} only"
        if not all(path.exists() for path in files_of(target, self.protocols, self.also)):
            return None, ""  # somebody wants them now
        sizes = {name: _size(target.folder / name) for name in record["files"]}
        if changed := [name for name, size in sizes.items() if size not in (None, record["files"][name])]:
            return None, f"{changed[0]} was changed since it was written"
        return None if None in sizes.values() else row_of(record["row"]), ""

    def _write(self, target: Target, record: dict[str, Any]) -> None:
        target.folder.mkdir(parents=True, exist_ok=True)
        Files(str(target.folder.absolute())).write(target.record.name, json.dumps(record, indent=2).encode() + b"\n")


def finished_rows(out: Path) -> list[Row]:
    """Returns the rows of all scans below `out` whose results are complete, of whatever model and input."""
    rows = []
    for path in (*out.glob("sub-*/anat/*_provenance.json"), *out.glob("sub-*/ses-*/anat/*_provenance.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and (row := row_of(record.get("row"))) is not None:
            rows.append(row)
    return rows


def identify(path: Path) -> dict[str, Any]:
    """Returns the properties that identify an input file, without its folder, which may reveal more than its name."""
    with path.open("rb") as file:
        return {"file": shown(path.name), **_stamp(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_input(path: Path, known: dict[str, Any]) -> bool:
    """Tells whether the file is the recorded one: not modified since, or at least with the same content."""
    try:
        stamp = _stamp(path)
        if stamp == {name: known[name] for name in stamp}:
            return True
        return stamp["bytes"] == known["bytes"] and identify(path)["sha256"] == known["sha256"]
    except OSError:  # the file is gone; reading it will report that
        return False


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _size(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None
