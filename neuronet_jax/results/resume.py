"""Which heads have their results already: what a command given again, whatever ended the first, need not do again.

Every head leaves a record beside its results, OUT/sub-01/anat/sub-01_provenance.json: which model, options and input
they come from, and what was written. It is begun before the first result and completed after the last one.
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
from neuronet_jax.results.bids import GENERATOR, Target
from neuronet_jax.results.tables import Row

PROGRAM = f"{GENERATOR} {__version__}"
CALIBRATION = {"calibration_sha256": None}  # what of the provenance changes nothing but predicted Dice
LISTED = 3  # heads that an error names: enough to see what is the matter


@dataclass(frozen=True)
class Records:
    """What says of each head whether its results are complete, and what they come from."""

    provenance: dict[str, Any]  # what results depend on beside the input: model and options, as JSON
    protocols: Sequence[str]
    posteriors: Sequence[str] = ()

    def unfinished(self, targets: Sequence[Target], overwrite: bool) -> tuple[list[Target], dict[str, Row]]:
        """The heads still to do, and by stem the rows of those that are complete.

        Raises NeuronetError, before anything is computed, where results of another model, input or options, or results
        that somebody changed, would be replaced without `overwrite`.
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
                "there are results that this command would not give:\n" + "\n".join(refused) + "\n"
                "give --overwrite to replace them, or choose another --out folder"
            )
        return todo, finished

    def begin(self, target: Target, source: dict[str, Any]) -> None:
        """Says that results of this model and input may lie under their names from now on, perhaps not all of them."""
        self._write(
            target, {"program": PROGRAM, "model": self.provenance, "input": source, "protocols": list(self.protocols)}
        )

    def complete(self, target: Target, row: Row) -> None:
        """Says that everything of this head is written."""
        begun = json.loads(target.record.read_text(encoding="utf-8"))
        files = {path.name: path.stat().st_size for path in target.results(self.protocols, self.posteriors)}
        self._write(target, {**begun, "files": files, "row": asdict(row)})

    def _look(self, target: Target) -> tuple[Row | None, str]:
        """The row of a head that is complete; else why its results must not be replaced, empty if they may."""
        try:
            record = json.loads(target.record.read_text(encoding="utf-8"))
            program, model, source, protocols = (record[name] for name in ("program", "model", "input", "protocols"))
        except FileNotFoundError:
            there = [path.name for path in target.results(self.protocols, self.posteriors) if path.exists()]
            return None, f"{there[0]} exists and nothing says where it comes from" if there else ""
        except (OSError, ValueError, KeyError, TypeError) as error:
            return None, f"{target.record.name} cannot be read ({error})"
        wanted = json.loads(json.dumps(self.provenance))
        if (program, model) != (PROGRAM, wanted):
            if program == PROGRAM and {**model, **CALIBRATION} == {**wanted, **CALIBRATION}:
                return None, "its predicted Dice is of another calibration of the run, or of none"
            return None, "its results are of another model, of other options or of another release"
        if not _is_input(target.source, source):
            return None, "its results are of another input file"
        if "row" not in record:  # begun, not completed
            return None, ""
        if not set(self.protocols) <= set(protocols):
            return None, f"its results are of {', '.join(protocols)} only"
        sizes = {name: _size(target.folder / name) for name in record["files"]}
        if changed := [name for name, size in sizes.items() if size not in (None, record["files"][name])]:
            return None, f"{changed[0]} was changed since it was written"
        return None if None in sizes.values() else Row(**record["row"]), ""

    def _write(self, target: Target, record: dict[str, Any]) -> None:
        target.folder.mkdir(parents=True, exist_ok=True)
        Files(str(target.folder.absolute())).write(target.record.name, json.dumps(record, indent=2).encode() + b"\n")


def identify(path: Path) -> dict[str, Any]:
    """What tells an input file from any other, without its folder, which may say more than its name."""
    with path.open("rb") as file:
        return {"file": path.name, **_stamp(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _is_input(path: Path, known: dict[str, Any]) -> bool:
    """Whether the file is the one of a record: untouched since, or at least of the same content."""
    try:
        stamp = _stamp(path)
        if stamp == {name: known[name] for name in stamp}:
            return True
        return stamp["bytes"] == known["bytes"] and identify(path)["sha256"] == known["sha256"]
    except OSError:  # a file that is gone; reading it will say so
        return False


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _size(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return None
