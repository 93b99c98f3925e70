"""Removes withdrawn participants from a store: their voxels, their rows, and their names.

    python -m data_prep.purge --store=stores/cohort --exclude=withdrawn.csv

Only the shards that hold one of them are written again. The other subjects of such a shard are saved aside meanwhile,
so that the same command completes a killed purge. Until then the store is unfinished, and training refuses it.
"""

import argparse
import dataclasses
import io
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from data_prep.build import read_rejects
from data_prep.sources.manifest import ids_hash, read_ids, unknown_lines
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Record, StoreInfo, Subject, subjects_from_tsv
from neuronet_jax.store.writer import StoreWriter


def purge(store: str, excluded: Collection[str]) -> int:
    """Removes the subjects `excluded` and returns their number. Raises NeuronetError if there is no store to purge."""
    files = Files(store)
    if files.read("COMPLETE") is None:
        info, table = files.read("store.json"), files.read("subjects.tsv")
        if info is None or table is None or files.read("unfinished.json") is None:
            raise NeuronetError(f"{store} holds no finished store; finish data_prep.build with --exclude instead")
        source = Store(store, StoreInfo.from_json(info), subjects_from_tsv(table), None)  # an earlier purge was killed
    else:
        source = Store.open(store)
    withdrawn = [subject for subject in source.subjects if subject.id in excluded]
    kept = [subject for subject in source.subjects if subject.id not in excluded]
    if not kept:
        raise NeuronetError("no subject would be left; delete the store instead")
    writer = StoreWriter.open(store) if files.read("COMPLETE") is None else StoreWriter.reopen(store)
    for first in sorted({writer.info.shard_of(subject.slot) for subject in withdrawn}):
        rest = [subject for subject in kept if writer.info.shard_of(subject.slot) == first]
        _rewrite(source, writer, first, rest)
    writer.info = dataclasses.replace(
        writer.info, provenance={**writer.info.provenance, "exclude_hash": ids_hash(excluded)}
    )
    writer.finalize(kept, [reject for reject in read_rejects(files) if reject.id not in excluded])
    return len(withdrawn)


def _rewrite(source: Store, writer: StoreWriter, first: int, rest: Sequence[Subject]) -> None:
    """Rewrites the shard at slot `first` with the subjects `rest` only."""
    if not rest:
        writer.delete_shard(first)
        return
    aside = f"purge-{first:08d}.npz"
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
    return run(parser, _purge, arguments)


def _known_ids(store: str) -> set[str]:
    """Returns the ids of a store's subjects and rejects; none if there is no store."""
    files = Files(store)
    table = files.read("subjects.tsv")
    subjects = subjects_from_tsv(table) if table else ()
    return {row.id for row in (*subjects, *read_rejects(files))}


def _purge(options: argparse.Namespace) -> int:
    excluded, known = read_ids(options.exclude), _known_ids(options.store)
    count = purge(options.store, excluded)
    print(f"{count} subjects removed from {options.store}")
    if unknown := unknown_lines(excluded, known, "the store"):
        print(unknown)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
