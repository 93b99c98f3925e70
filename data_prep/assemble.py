"""Makes a store of sources, shard by shard, and continues one: after a kill, after damage, with changed files.

What a subject was made of is known by the fingerprints of its files (`inputs.tsv`). A finished shard is kept while they
hold; where a file has changed, the shard is built again, and no other.
"""

import collections
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import neuronet_jax
from data_prep import cluster
from data_prep.outcome import Bar, BuildReport, TooManyRejects, report
from data_prep.shard import INPUTS, ShardRows, build_shard, inputs_from_tsv, inputs_to_tsv
from data_prep.sources.files import are_unchanged
from data_prep.sources.source import Source, check
from data_prep.subject import Settings
from data_prep.verify import damaged
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.images.headers import DEFAULT_LIMITS, Limits
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.lease import lease
from neuronet_jax.store.reader import PURGING, Store, read_rejects
from neuronet_jax.store.schema import StoreInfo, Subject, rejects_to_tsv
from neuronet_jax.store.writer import StoreWriter

HEAD_MM = (
    192,
    224,
    192,
)  # holds an adult brain with room for a crop to move; the published work cropped to about this size
MAX_REJECT_FRACTION = 0.05
BUILD_LEASE = "unfinished-build.lease"

log = logging.getLogger(__name__)


def build_sources(
    sources: Sequence[Source],
    store: str,
    *,
    voxel_size_mm: float = 1.0,
    grid: tuple[int, int, int] | None = None,
    excluded: Collection[str] = (),
    workers: int | None = None,
    scheduler: str | None = None,
    shard_subjects: int | None = None,
    max_reject_fraction: float = MAX_REJECT_FRACTION,
    missing: Literal["keep", "reject"] = "keep",
    resample_labels: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    note: str = "",
    repair: bool = False,
    progress: bool = False,
) -> BuildReport:
    """Builds the store at `store` from `sources`, or continues it. A store finished from the same input is left as it
    is; with `repair` it is read, and its shards with damage or changed files are built again.

    Subjects in `excluded` are left out without a trace; `note` is kept in the store's provenance. Raises NeuronetError
    for a bad cohort, a place that holds a different store, a finished store whose files have changed (E_CHANGED,
    without `repair`), or failed writing, and TooManyRejects.
    """
    start = time.monotonic()
    check(sources)
    left_out = set(excluded)
    kept = [source for source in sources if source.id not in left_out]
    protocols = tuple(name for name in PROTOCOLS if any(name in source.labels for source in kept))
    if not protocols:
        raise NeuronetError("no subject has a label map: check the manifest's columns and --exclude")
    settings = Settings(protocols, grid or default_grid(voxel_size_mm), voxel_size_mm, missing, resample_labels, limits)
    shard_subjects = shard_subjects or min(max(len(kept) // 16, 1), 8)  # small cohorts still feed several workers
    provenance = _provenance(kept, settings, note)
    excluded_now = len(sources) - len(kept)

    files = Files(store)
    if files.read(PURGING) is not None:
        raise NeuronetError(f"E_INCOMPLETE: a purge of {store} was interrupted; run data_prep.purge again first")
    finished, again = None, set()
    if files.read("COMPLETE") is not None:
        finished = Store.open(store)
        if finished.info.provenance.get("purged"):
            raise NeuronetError(
                f"E_EXISTS: {store} was purged since it was built, and its input still holds what was removed; use the "
                "store as it is, or build in a different place with --exclude"
            )
        if _differs(finished.info, provenance, shard_subjects):
            raise NeuronetError(
                f"E_EXISTS: {store} holds a finished store of different input or settings; choose a different place"
            )
        again = _changed(files, kept)
        if again and not repair:
            raise NeuronetError(
                f"E_CHANGED: the files of {len(again)} subjects have changed since {store} was built; add --repair to "
                "build their shards again, or choose a different place"
            )
        if repair:
            again |= set(damaged(finished))
        if not again:
            rejects = read_rejects(files)
            tidy(files)
            return report(finished.subjects, rejects, excluded_now, time.monotonic() - start, already=True)
    with lease(files, BUILD_LEASE):
        if finished is not None:
            reopen(finished, again)
        writer = _writer(store, settings, len(kept), shard_subjects, provenance)
        shards = {slot: tuple(kept[slot : slot + shard_subjects]) for slot in range(0, len(kept), shard_subjects)}
        with Bar(progress, len(kept)) as advance:
            rows = _build_shards(
                writer, shards, settings, lambda tasks: cluster.run(build_shard, tasks, workers, scheduler), advance
            )
        subjects = [subject for slot in sorted(rows) for subject in rows[slot].subjects]
        rejects = [reject for slot in sorted(rows) for reject in rows[slot].rejects]
        if len(rejects) > max_reject_fraction * len(kept):
            files.write("rejects.tsv", rejects_to_tsv(rejects))
            codes = dict(sorted(collections.Counter(reject.code for reject in rejects).items()))
            counts = ", ".join(f"{code} {n}" for code, n in codes.items())
            raise TooManyRejects(
                f"{len(rejects)} of {len(kept)} subjects were rejected ({counts}), more than "
                f"{max_reject_fraction:.1%}; see rejects.tsv in the store, repair the files or raise "
                "--max-reject-fraction, and run it again",
                codes,
            )
        inputs = {slot: files_of for record in rows.values() for slot, files_of in record.inputs.items()}
        files.write(INPUTS, inputs_to_tsv(inputs))
        writer.finalize(subjects, rejects)
        tidy(files)
    return report(subjects, rejects, excluded_now, time.monotonic() - start, repaired=len(again))


def _changed(files: Files, kept: Sequence[Source]) -> set[int]:
    """Returns the slots of a finished store whose input files are no longer those that were read."""
    data = files.read(INPUTS)
    if data is None:
        log.warning("%s was built by an earlier version: whether its files have changed since is not known", files.dest)
        return set()
    try:
        inputs = inputs_from_tsv(data)
    except ValueError as error:
        raise NeuronetError(f"E_MISMATCH: {INPUTS} of {files.dest} is damaged; build the store anew") from error
    with ThreadPoolExecutor(32) as pool:  # a network file system answers many requests at once
        same = pool.map(lambda slot: are_unchanged(kept[slot].files, inputs.get(slot, {})), range(len(kept)))
        return {slot for slot, unchanged in enumerate(same) if not unchanged}


def reopen(store: Store, again: Collection[int]) -> None:
    """Makes a finished store unfinished, as if its shards with a slot in `again`, or with a hole, had not been built
    yet.
    """
    files, info = Files(store.dest), store.info
    inputs = inputs_from_tsv(files.read(INPUTS) or b"")
    for first in range(0, info.slots, info.shard_subjects):
        slots = range(first, min(first + info.shard_subjects, info.slots))
        rows = tuple(subject for subject in store.subjects if subject.slot in slots)
        if len(rows) == len(slots) and not set(slots) & set(again):
            ShardRows(first, rows, (), {slot: inputs.get(slot, {}) for slot in slots}).write(files)
    StoreWriter.reopen(store.dest)  # last: a build that is killed before finds the store still finished


def _build_shards(
    writer: StoreWriter,
    shards: dict[int, tuple[Source, ...]],
    settings: Settings,
    run: Callable[[dict[str, tuple]], Iterator[Any]],
    advance: Callable[[int], None],
) -> dict[int, ShardRows]:
    """Builds the shards that an earlier run has not finished. Returns the rows of every shard, by first slot."""
    rows = _finished(writer, shards)
    advance(sum(len(shards[slot]) for slot in rows))
    duplicates: dict[int, int] = {}  # slot of an image that occurred before: slot of its first occurrence
    while todo := [slot for slot in shards if slot not in rows]:
        tasks = {f"shard-{slot}": (writer.dest, slot, shards[slot], settings, duplicates) for slot in todo}
        for result in run(tasks):
            if isinstance(result, NeuronetError):
                raise result
            rows[result.slot] = result
            advance(len(shards[result.slot]))
        # images with two ids are known only now: their shards are written again without the second one
        for subject, first in _duplicates(rows):
            duplicates[subject.slot] = first
            again = rows.pop(writer.info.shard_of(subject.slot), None)
            advance(-len(shards[again.slot]) if again else 0)
    return rows


def _finished(writer: StoreWriter, shards: Mapping[int, Sequence[Source]]) -> dict[int, ShardRows]:
    """Returns the rows of the shards that an earlier run wrote from the files as they are now.

    Shards with rejects are built again, because somebody may have repaired the files.
    """
    there = set(writer.files.names("unfinished-"))

    def record(first: int) -> ShardRows | None:
        rows = ShardRows.read(writer.files, first) if ShardRows.name(first) in there else None
        if rows is None or rows.rejects or not writer.has_shard(first):
            return None
        sources = enumerate(shards[first], first)
        same = all(are_unchanged(source.files, rows.inputs.get(slot, {})) for slot, source in sources)
        return rows if same else None

    with ThreadPoolExecutor(32) as pool:  # a bucket answers many requests at once
        return {rows.slot: rows for rows in pool.map(record, shards) if rows is not None}


def default_grid(voxel_size_mm: float) -> tuple[int, int, int]:
    """Returns the voxels that hold `HEAD_MM`, in multiples of 16: three halvings, then an even split over 2 devices."""
    x, y, z = (16 * math.ceil(math.ceil(side / voxel_size_mm) / 16) for side in HEAD_MM)
    return x, y, z


def _provenance(sources: Sequence[Source], settings: Settings, note: str) -> dict[str, Any]:
    """Returns the origin and settings of the store, without paths or ids. Equal builds have equal provenance.

    Who was excluded is not in it: a list of few ids would be found from its hash.
    """
    rows = [f"{source.id}\t{source.split}\t{','.join(sorted(source.labels))}\t{source.visit}\n" for source in sources]
    return json.loads(
        json.dumps(
            {
                "software": f"neuronet-jax {neuronet_jax.__version__}",
                "sources_hash": hashlib.sha256("".join(rows).encode()).hexdigest(),
                "settings": dataclasses.asdict(settings),
                **({"note": note} if note else {}),
            }
        )
    )


def _differs(info: StoreInfo, provenance: Mapping[str, Any], shard_subjects: int) -> bool:
    return info.provenance != provenance or info.shard_subjects != shard_subjects


def _writer(store: str, settings: Settings, slots: int, shard_subjects: int, provenance: dict[str, Any]) -> StoreWriter:
    data = Files(store).read("unfinished.json")
    if data is None:
        return StoreWriter.create(
            store,
            protocols=settings.protocols,
            grid=settings.grid,
            voxel_size_mm=settings.voxel_size_mm,
            slots=slots,
            shard_subjects=shard_subjects,
            provenance=provenance,
        )
    info = StoreInfo.from_json(data)
    if _differs(info, provenance, shard_subjects):
        raise NeuronetError(
            f"E_EXISTS: {store} holds an unfinished store of different input or settings; delete it or choose a "
            "different place"
        )
    return StoreWriter.open(store)


def _duplicates(rows: dict[int, ShardRows]) -> list[tuple[Subject, int]]:
    """Returns every subject whose image an earlier slot already has, with that slot."""
    first: dict[str, int] = {}
    subjects = [subject for slot in sorted(rows) for subject in rows[slot].subjects]
    return [(s, first[s.image_hash]) for s in subjects if first.setdefault(s.image_hash, s.slot) != s.slot]


def tidy(files: Files) -> None:
    """Removes the files that only an unfinished store needs."""
    for name in [*files.names("unfinished-"), "unfinished.json"]:
        files.delete(name)
