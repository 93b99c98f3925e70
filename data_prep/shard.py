"""Builds one shard from its subjects' files, in one worker, and records the outcome."""

import contextlib
import ctypes
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.files import Fingerprint, Tracked
from data_prep.sources.source import Source, locate
from data_prep.subject import Settings, prepare
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.files import Files
from neuronet_jax.lease import Lease, lease
from neuronet_jax.store.schema import Record, Reject, StoreError, Subject, subjects_from_tsv, subjects_to_tsv
from neuronet_jax.store.writer import StoreWriter

_RETRY_AFTER_S = (1, 5, 25)  # a network file system recovers within half a minute, or needs a person
INPUTS = "inputs.tsv"
_COLUMNS = ("slot", "input", *Fingerprint._fields)

Inputs = dict[int, dict[str, Fingerprint]]  # what the subject of each slot was made of, by slot and column


@dataclass(frozen=True)
class ShardRows:
    """The table rows of one shard, and at the same time the record that it is done."""

    slot: int
    subjects: tuple[Subject, ...]
    rejects: tuple[Reject, ...]
    inputs: Inputs

    @staticmethod
    def name(slot: int) -> str:
        return f"unfinished-{slot:08d}.json"

    @classmethod
    def read(cls, files: Files, slot: int) -> "ShardRows | None":
        """Returns the record; None for a shard that is not done, or whose record is unreadable."""
        data = files.read(cls.name(slot))
        try:
            fields = json.loads(data or b"")
            subjects = subjects_from_tsv(fields["subjects"].encode())
            rejects = tuple(Reject(*row) for row in fields["rejects"])
            return cls(slot, subjects, rejects, inputs_from_tsv(fields["inputs"].encode()))
        except (ValueError, KeyError, TypeError, AttributeError, StoreError):
            return None

    def write(self, files: Files) -> None:
        rejects = [dataclasses.astuple(reject) for reject in self.rejects]
        tables = {"subjects": subjects_to_tsv(self.subjects), "inputs": inputs_to_tsv(self.inputs)}
        fields = {name: table.decode() for name, table in tables.items()} | {"rejects": rejects}
        files.write(self.name(self.slot), json.dumps(fields).encode())


def inputs_to_tsv(inputs: Inputs) -> bytes:
    """Returns the table of input files, which names neither paths nor participants."""
    rows = [(slot, name, *print_) for slot, files in sorted(inputs.items()) for name, print_ in files.items()]
    return "".join("\t".join(map(str, row)) + "\n" for row in [_COLUMNS, *rows]).encode()


def inputs_from_tsv(data: bytes) -> Inputs:
    """Reads the table of `inputs_to_tsv`. Raises ValueError if it is damaged."""
    inputs: Inputs = {}
    for line in data.decode().splitlines()[1:]:
        slot, name, size, modified_ns, sha256 = line.split("\t")
        inputs.setdefault(int(slot), {})[name] = Fingerprint(int(size), int(modified_ns), sha256)
    return inputs


def build_shard(
    store: str, first_slot: int, sources: Sequence[Source], settings: Settings, duplicates: Mapping[int, int]
) -> ShardRows | NeuronetError:
    """Prepares and writes one shard, then its record.

    Errors are returned instead of raised: Dask would log a raised one with the arguments, which name subjects.
    """
    try:
        with lease(Files(store), f"unfinished-{first_slot:08d}.lease") as owned:
            return _build_shard(StoreWriter.open(store), owned, first_slot, sources, settings, duplicates)
    except NeuronetError as error:
        return error
    finally:
        _release_memory()


def _release_memory() -> None:
    """Gives freed memory back to the system. glibc keeps much of that of threads, more with every shard."""
    with contextlib.suppress(OSError, AttributeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)


def _build_shard(
    writer: StoreWriter,
    owned: Lease,
    first_slot: int,
    sources: Sequence[Source],
    settings: Settings,
    duplicates: Mapping[int, int],
) -> ShardRows:
    writer.files.delete(ShardRows.name(first_slot))
    records: list[Record | None] = []
    rejects = []
    inputs: Inputs = {}
    for slot, source in enumerate(sources, first_slot):
        tracked = {name: Tracked(file) for name, file in source.files.items()}
        try:
            if slot in duplicates:
                raise RejectError("E_DUPLICATE", f"the image is identical to that of slot {duplicates[slot]}")
            records.append(_prepare(source, tracked, slot, settings))
        except RejectError as error:
            records.append(None)
            rejects.append(Reject(source.id, error.code, error.reason, source.visit))
        inputs[slot] = {name: file.fingerprint for name, file in tracked.items()}
    _release_memory()
    owned.confirm()  # a worker that was frozen for a minute has lost its shard to a different one
    if any(records):
        writer.write_shard(first_slot, records)
    else:
        writer.delete_shard(first_slot)
    rows = ShardRows(first_slot, tuple(record.subject for record in records if record), tuple(rejects), inputs)
    owned.confirm()
    rows.write(writer.files)
    return rows


def _prepare(source: Source, tracked: Mapping[str, Any], slot: int, settings: Settings) -> Record:
    """Runs `prepare` with bounded retries of reading. An unforeseen error becomes a reject that names its place in the
    code.
    """
    for wait_s in (*_RETRY_AFTER_S, None):
        try:
            located = locate(source)
            labels = {name: tracked[name] for name in located.labels}
            return prepare(dataclasses.replace(located, t1=tracked["t1"], labels=labels), slot, settings)
        except RejectError as error:
            if error.code != "E_IO" or wait_s is None or _is_permanent(error):
                raise
            time.sleep(wait_s)
        except Exception as error:  # one strange file must not stop a cohort of 50,000
            trace = error.__traceback__
            while trace and trace.tb_next:
                trace = trace.tb_next
            where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
            raise RejectError(
                "E_INTERNAL", f"{type(error).__name__} at {where}"
            ) from error  # the error's text may name files
    raise AssertionError("unreachable")


def _is_permanent(error: RejectError) -> bool:
    causes = (error.__cause__, getattr(error.__cause__, "__cause__", None))
    return any(isinstance(cause, FileNotFoundError | PermissionError | NotADirectoryError) for cause in causes)
