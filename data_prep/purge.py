"""Removes withdrawn participants from a store: their voxels, their rows, and their names.

    python -m data_prep.purge --store=stores/cohort --exclude=withdrawn.csv

Only the shards that hold one of them are written again. The other subjects of such a shard are saved aside meanwhile.
A purge that was killed is continued by the next one, whatever its list: the slots that are to be removed are written
down first, and the rows go before the voxels. Until then the store is unfinished, and training refuses it.
"""

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from data_prep.assemble import BUILD_LEASE
from data_prep.references import forget
from data_prep.shard import INPUTS, inputs_from_tsv, inputs_to_tsv
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.lease import lease
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.store.reader import PURGING, Store, read_rejects
from neuronet_jax.store.schema import (
    Record,
    StoreInfo,
    Subject,
    rejects_to_tsv,
    subjects_from_tsv,
    subjects_to_tsv,
)
from neuronet_jax.store.withdrawal import read_ids, unknown_lines
from neuronet_jax.store.writer import StoreWriter

_ASIDE = "purge-"  # prefix of the files with the other subjects of a shard


def purge(store: str, excluded: Collection[str]) -> int:
    """Removes the subjects `excluded` and returns their number. Raises NeuronetError if there is no store to purge."""
    files = Files(store)
    with lease(files, BUILD_LEASE):
        return _purge(files, excluded)


def _purge(files: Files, excluded: Collection[str]) -> int:
    source, pending = _open(files)
    withdrawn = [subject for subject in source.subjects if subject.id in excluded]
    kept = [subject for subject in source.subjects if subject.id not in excluded and subject.slot not in pending]
    if not kept:
        raise NeuronetError("no subject would be left; delete the store instead")
    slots = pending | {subject.slot for subject in withdrawn}
    files.write(PURGING, json.dumps(sorted(slots)).encode())  # first: from now on every purge removes them
    provenance = {name: value for name, value in source.info.provenance.items() if name != "exclude_hash"}
    if slots:
        provenance["purged"] = True  # the manifest describes a different store now
    writer = StoreWriter.reopen(files.dest, dataclasses.replace(source.info, provenance=provenance))
    rejects = [reject for reject in read_rejects(files) if reject.id not in excluded]
    files.write("subjects.tsv", subjects_to_tsv(kept))
    files.write("rejects.tsv", rejects_to_tsv(rejects))
    if slots:
        forget(files, slots)  # maps that were dropped stay absent
    if inputs := inputs_from_tsv(files.read(INPUTS) or b""):
        there = {subject.slot for subject in kept}
        files.write(INPUTS, inputs_to_tsv({slot: of for slot, of in inputs.items() if slot in there}))
    for first in sorted({writer.info.shard_of(slot) for slot in slots}):
        rest = [subject for subject in kept if writer.info.shard_of(subject.slot) == first]
        _rewrite(source, writer, first, rest)
    for name in files.names(_ASIDE):
        files.delete(name)
    files.delete(PURGING)  # before the store is finished: a finished one has nothing left to remove
    writer.finalize(kept, rejects)
    return len(withdrawn)


def _open(files: Files) -> tuple[Store, set[int]]:
    """Returns the store and the slots that an earlier purge still had to remove. Raises NeuronetError without one."""
    pending = files.read(PURGING)
    if pending is None and files.read("COMPLETE") is not None:
        return Store.open(files.dest), set()
    unfinished, table = files.read("unfinished.json"), files.read("subjects.tsv")
    info = unfinished or files.read("store.json")
    if pending is None and unfinished is not None and StoreInfo.from_json(unfinished).provenance.get("purged"):
        pending = b"[]"  # only the last steps are missing
    if info is None or table is None or pending is None:
        raise NeuronetError(f"{files.dest} holds no finished store; finish data_prep.build with --exclude instead")
    try:
        slots = set(json.loads(pending))
    except (ValueError, TypeError) as error:
        raise NeuronetError(f"E_MISMATCH: {PURGING} of {files.dest} is damaged; build the store anew") from error
    return Store(files.dest, StoreInfo.from_json(info), subjects_from_tsv(table), None), slots


def _rewrite(source: Store, writer: StoreWriter, first: int, rest: Sequence[Subject]) -> None:
    """Rewrites the shard at slot `first` with the subjects `rest` only."""
    if not rest:
        writer.delete_shard(first)
        return
    aside = f"{_ASIDE}{first:08d}.npz"
    content = writer.files.read(aside)
    if content is None:
        arrays = {}
        for subject in rest:
            arrays[f"image{subject.slot}"] = source.read_image(subject.slot)
            arrays[f"labels{subject.slot}"] = source.read_labels(subject.slot, source.info.protocols)
            arrays[f"foreground{subject.slot}"] = source.read_foreground(subject.slot)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
        writer.files.write(aside, content)
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        records: list[Record | None] = [None] * min(writer.info.shard_subjects, writer.info.slots - first)
        for subject in rest:
            image, labels, foreground = (arrays[f"{name}{subject.slot}"] for name in ("image", "labels", "foreground"))
            records[subject.slot - first] = Record(image, labels, foreground, subject)
    writer.write_shard(first, records)
    writer.files.delete(aside)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m data_prep.purge", description=__doc__)
    parser.add_argument("--store", required=True, help="a local path, gs://bucket/path or s3://bucket/path")
    parser.add_argument("--exclude", required=True, type=Path, help="ids of withdrawn participants, one per line")
    return run(parser, _command, arguments)


def _known_ids(store: str) -> set[str]:
    """Returns the ids of a store's subjects and rejects; none if there is no store."""
    files = Files(store)
    table = files.read("subjects.tsv")
    subjects = subjects_from_tsv(table) if table else ()
    return {row.id for row in (*subjects, *read_rejects(files))}


def _command(options: argparse.Namespace) -> int:
    excluded, known = read_ids(options.exclude), _known_ids(options.store)
    count = purge(options.store, excluded)
    print(f"{count} subjects removed from {options.store}")
    if unknown := unknown_lines(excluded, known, "the store"):
        print(unknown)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
