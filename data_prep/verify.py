"""Reads every chunk of every subject of a store, and reports damage and gaps.

    python -m data_prep.verify --store=stores/cohort

Chunks are checked by their crc32c, subjects by their hash at preparation. Subjects are named by slot (subjects.tsv
gives the id). `data_prep.build … --repair` builds the damaged shards again.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import track

from data_prep.shard import ShardRows
from data_prep.subject import content_hash
from neuronet_jax.files import Files, local_path
from neuronet_jax.programs import DONE, FAILED, Parser, number, run
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import REPAIR, StoreError, StoreInfo, Subject


def verify(store: str, threads: int = 4) -> Iterator[str]:
    """Yields one line per fault: gaps of an unfinished store, damaged or changed subjects of a finished one.

    Raises NeuronetError if the store's own tables disagree (see `Store.open`).
    """
    files = Files(store)
    unfinished = files.read("unfinished.json")
    if files.read("COMPLETE") is None and unfinished is not None:
        info = StoreInfo.from_json(unfinished)
        yield "E_INCOMPLETE: the store is not finished; run the command that builds it again"
        for slot in range(0, info.slots, info.shard_subjects):
            if ShardRows.read(files, slot) is None:
                yield f"E_SHARD_MISSING: the shard at slot {slot} has not been written yet"
        return
    yield from damaged(Store.open(store), threads).values()


def damaged(store: Store, threads: int = 4) -> dict[int, str]:
    """Reads every subject of a finished store. Returns the faults by slot."""

    def fault(subject: Subject) -> str | None:
        try:
            image = store.read_image(subject.slot)
            labels = store.read_labels(subject.slot, store.info.protocols)
            foreground = store.read_foreground(subject.slot)
        except StoreError as error:
            return str(error)
        if content_hash(image, labels, foreground) != subject.content_hash:
            return f"E_MISMATCH: slot {subject.slot} has changed since it was prepared; {REPAIR}"
        return None

    with ThreadPoolExecutor(threads) as pool:  # reading, decompressing and hashing all release the interpreter
        faults = zip(store.subjects, pool.map(fault, store.subjects), strict=True)
        return {subject.slot: text for subject, text in faults if text is not None}


def remove_locks(store: str) -> int:
    """Deletes the lock files of killed writers in a local store (TensorStore's `.__lock`) and returns their number."""
    root = local_path(store)
    stale: Sequence[Path] = list(root.rglob("*.__lock")) if root else []
    for path in stale:
        path.unlink()
    return len(stale)


def main(arguments: Sequence[str] | None = None) -> int:
    statuses = {DONE: "the store is sound", FAILED: "something is damaged or missing, or the store cannot be read"}
    parser = Parser("python -m data_prep.verify", description=__doc__, statuses=statuses)
    parser.add_argument("--store", required=True, help="a local path, gs://bucket/path or s3://bucket/path")
    parser.add_argument("--threads", type=number(int, 1), default=4, help="subjects read at the same time")
    parser.add_argument("--fix", action="store_true", help="delete lock files of killed writers (none may be running)")
    return run(parser, _verify, arguments)


def _verify(options: argparse.Namespace) -> int:
    console = Console(stderr=True)
    if options.fix:
        console.print(f"{remove_locks(options.store)} stale lock files deleted")
    faults = list(track(verify(options.store, options.threads), "verifying", console=console, transient=True))
    for line in faults:
        print(line)
    print(f"{len(faults)} faults in {options.store}" if faults else f"{options.store} is sound")
    return FAILED if faults else DONE


if __name__ == "__main__":
    sys.exit(main())
