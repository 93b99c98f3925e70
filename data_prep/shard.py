"""Builds one shard from its subjects' files, in one worker, and records the outcome."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.manifest import Source
from data_prep.subject import Settings, prepare
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.files import Files
from neuronet_jax.lease import lease
from neuronet_jax.store.schema import Record, Reject, Subject, subjects_from_tsv, subjects_to_tsv
from neuronet_jax.store.writer import StoreWriter

_RETRY_AFTER_S = (1, 5, 25)  # a network file system recovers within half a minute, or needs a person


@dataclass(frozen=True)
class ShardRows:
    """The table rows of one shard, and at the same time the record that it is done."""

    slot: int
    subjects: tuple[Subject, ...]
    rejects: tuple[Reject, ...]

    @staticmethod
    def name(slot: int) -> str:
        return f"unfinished-{slot:08d}.json"

    @classmethod
    def read(cls, files: Files, slot: int) -> "ShardRows | None":
        data = files.read(cls.name(slot))
        if data is None:
            return None
        fields = json.loads(data)
        return cls(
            slot, subjects_from_tsv(fields["subjects"].encode()), tuple(Reject(*row) for row in fields["rejects"])
        )

    def write(self, files: Files) -> None:
        rejects = [dataclasses.astuple(reject) for reject in self.rejects]
        fields = {"subjects": subjects_to_tsv(self.subjects).decode(), "rejects": rejects}
        files.write(self.name(self.slot), json.dumps(fields).encode())


def build_shard(
    store: str, first_slot: int, sources: Sequence[Source], settings: Settings, duplicates: dict[str, int]
) -> ShardRows | NeuronetError:
    """Prepares and writes one shard, then its record.

    Errors are returned instead of raised: Dask would log a raised one with the arguments, which name subjects.
    """
    try:
        with lease(Files(store), f"unfinished-{first_slot:08d}.lease"):
            return _build_shard(StoreWriter.open(store), first_slot, sources, settings, duplicates)
    except NeuronetError as error:
        return error


def _build_shard(
    writer: StoreWriter, first_slot: int, sources: Sequence[Source], settings: Settings, duplicates: dict[str, int]
) -> ShardRows:
    writer.files.delete(ShardRows.name(first_slot))
    records: list[Record | None] = []
    rejects = []
    for slot, source in enumerate(sources, first_slot):
        try:
            if source.id in duplicates:
                raise RejectError("E_DUPLICATE", f"the image is identical to that of slot {duplicates[source.id]}")
            records.append(_prepare(source, slot, settings))
        except RejectError as error:
            records.append(None)
            rejects.append(Reject(source.id, error.code, error.reason))
    if any(records):
        writer.write_shard(first_slot, records)
    else:
        writer.delete_shard(first_slot)
    rows = ShardRows(first_slot, tuple(record.subject for record in records if record), tuple(rejects))
    rows.write(writer.files)
    return rows


def _prepare(source: Source, slot: int, settings: Settings) -> Record:
    """Runs `prepare` with bounded retries of reading. An unforeseen error becomes a reject that names its place in the
    code.
    """
    for wait_s in (*_RETRY_AFTER_S, None):
        try:
            return prepare(source, slot, settings)
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
