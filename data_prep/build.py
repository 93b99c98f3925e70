"""From images and label maps on disk to a finished store.

    python -m data_prep.build --manifest=cohort.csv --store=stores/cohort
    python -m data_prep.build --manifest=cohort.csv --store=gs://bucket/cohort --scheduler=tcp://head:8786

One task is one whole shard: its subjects are read, checked, conformed and written by one worker, once. A build that
was killed is continued by the same command: shards with a record of their own are done. Unusable subjects go to
rejects.tsv with a code and a reason.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

import neuronet_jax
from data_prep import cluster
from data_prep.shard import ShardRows, build_shard
from data_prep.sources.manifest import (
    Source,
    assign_splits,
    check_sources,
    ids_hash,
    read_ids,
    read_manifest,
    unknown_lines,
)
from data_prep.subject import Settings, image_hash
from data_prep.verify import damaged
from neuronet_jax.codes import explain
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.images.nifti import DEFAULT_LIMITS, Limits
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.lease import lease
from neuronet_jax.programs import DONE, PARTIAL, Parser, number, run
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Reject, StoreInfo, Subject, rejects_from_tsv, rejects_to_tsv
from neuronet_jax.store.writer import StoreWriter

HEAD_MM = (
    192,
    224,
    192,
)  # holds an adult brain with room for a crop to move; the published work cropped to about this size
_MAX_REJECT_FRACTION = 0.05

log = logging.getLogger(__name__)


class TooManyRejects(NeuronetError):
    """More subjects were rejected than the caller allows. The store stays unfinished; rejects.tsv is written."""

    def __init__(self, reason: str, codes: dict[str, int]):
        super().__init__(reason)
        self.codes = codes  # subjects per E_… code


@dataclass(frozen=True)
class BuildReport:
    """The outcome of a build. `rejects` names subjects, so it must stay out of logs."""

    subjects: dict[str, int]  # per split
    rejects: tuple[Reject, ...]
    warnings: dict[str, int]  # subjects per W_… code
    excluded: int
    seconds: float
    already: bool = False  # whether the store was finished, and sound as far as `repair` asked, so nothing was built
    repaired: int = 0  # damaged subjects that were built again

    @property
    def rejected(self) -> dict[str, int]:
        """Number of subjects per E_… code."""
        return dict(collections.Counter(reject.code for reject in self.rejects))


def build(
    manifest: Path,
    store: str,
    *,
    voxel_size_mm: float = 1.0,
    grid: tuple[int, int, int] | None = None,
    exclude: Path | None = None,
    splits: Path | None = None,
    **options: Any,
) -> BuildReport:
    """Builds the store of a manifest (columns in `data_prep.sources.manifest`); `options` as for `build_sources`."""
    excluded = read_ids(Path(exclude)) if exclude else {}
    sources = assign_splits(read_manifest(Path(manifest)), Path(splits) if splits else None)
    if unknown := unknown_lines(excluded, {source.id for source in sources}, "the manifest"):
        log.warning(unknown)
    if absent := [name for name in PROTOCOLS if not any(name in source.labels for source in sources)]:
        log.warning("the manifest has no map of %s: the store will lack these protocols", ", ".join(absent))
    return build_sources(sources, store, voxel_size_mm=voxel_size_mm, grid=grid, excluded=excluded, **options)


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
    max_reject_fraction: float = _MAX_REJECT_FRACTION,
    missing: Literal["keep", "reject"] = "keep",
    resample_labels: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    note: str = "",
    repair: bool = False,
    progress: bool = False,
) -> BuildReport:
    """Builds the store at `store` from `sources`, or continues it. A store finished from the same input is left as it
    is; with `repair` it is read, and its shards with damage or rejects are built again.

    Subjects in `excluded` are left out without a trace; `note` is kept in the store's provenance. Raises NeuronetError
    for a bad cohort, a place that holds a different store, or failed writing, and TooManyRejects.
    """
    start = time.monotonic()
    check_sources(sources)
    kept = [source for source in sources if source.id not in set(excluded)]
    protocols = tuple(name for name in PROTOCOLS if any(name in source.labels for source in kept))
    if not protocols:
        raise NeuronetError("no subject has a label map: check the manifest's columns and --exclude")
    settings = Settings(protocols, grid or default_grid(voxel_size_mm), voxel_size_mm, missing, resample_labels, limits)
    shard_subjects = shard_subjects or min(max(len(kept) // 16, 1), 8)  # small cohorts still feed several workers
    provenance = _provenance(kept, settings, excluded, note)

    files = Files(store)
    finished, faults = None, {}
    if files.read("COMPLETE") is not None:
        finished = Store.open(store)
        if finished.info.provenance != provenance or finished.info.shard_subjects != shard_subjects:
            raise NeuronetError(
                f"E_EXISTS: {store} holds a finished store of different input or settings; choose a different place"
            )
        faults = damaged(finished) if repair else {}
        if not faults:
            rejects = read_rejects(files)
            _tidy(files)
            excluded_now = len(sources) - len(kept)
            return _report(finished.subjects, rejects, excluded_now, time.monotonic() - start, already=True)
    with lease(files, "unfinished-build.lease"):
        if finished is not None:
            _reopen(finished, faults)
        writer = _writer(store, settings, len(kept), shard_subjects, provenance)
        shards = {slot: tuple(kept[slot : slot + shard_subjects]) for slot in range(0, len(kept), shard_subjects)}
        with _progress(progress, len(kept)) as advance:
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
        writer.finalize(subjects, rejects)
        _tidy(files)
    return _report(subjects, rejects, len(sources) - len(kept), time.monotonic() - start, repaired=len(faults))


def _reopen(store: Store, faults: Collection[int]) -> None:
    """Makes a finished store unfinished, as if its shards with a faulty slot or a hole had not been built yet."""
    files, info = Files(store.dest), store.info
    for first in range(0, info.slots, info.shard_subjects):
        rows = tuple(subject for subject in store.subjects if info.shard_of(subject.slot) == first)
        whole = len(rows) == min(info.shard_subjects, info.slots - first)
        if whole and not any(subject.slot in faults for subject in rows):
            ShardRows(first, rows, ()).write(files)
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
    duplicates: dict[str, int] = {}
    while todo := [slot for slot in shards if slot not in rows]:
        tasks = {f"shard-{slot}": (writer.dest, slot, shards[slot], settings, duplicates) for slot in todo}
        for result in run(tasks):
            if isinstance(result, NeuronetError):
                raise result
            rows[result.slot] = result
            advance(len(shards[result.slot]))
        # images with two ids are known only now: their shards are written again without the second one
        for subject, first in _duplicates(rows):
            duplicates[subject.id] = first
            again = rows.pop(writer.info.shard_of(subject.slot), None)
            advance(-len(shards[again.slot]) if again else 0)
    return rows


def _finished(writer: StoreWriter, slots: Iterable[int]) -> dict[int, ShardRows]:
    """Returns the rows of the shards that an earlier run wrote.

    Shards with rejects are built again, because somebody may have repaired the files.
    """
    there = set(writer.files.names("unfinished-"))
    with ThreadPoolExecutor(32) as pool:  # a bucket answers many requests at once
        found = pool.map(
            lambda slot: ShardRows.read(writer.files, slot), (s for s in slots if ShardRows.name(s) in there)
        )
    return {rows.slot: rows for rows in found if rows is not None and not rows.rejects and writer.has_shard(rows.slot)}


def default_grid(voxel_size_mm: float) -> tuple[int, int, int]:
    """Returns the voxels that hold `HEAD_MM`, in multiples of 16: three halvings, then an even split over 2 devices."""
    x, y, z = (16 * math.ceil(math.ceil(side / voxel_size_mm) / 16) for side in HEAD_MM)
    return x, y, z


def _provenance(sources: Sequence[Source], settings: Settings, excluded: Collection[str], note: str) -> dict[str, Any]:
    """Returns the origin and settings of the store, without paths or ids. Equal builds have equal provenance."""
    rows = [f"{source.id}\t{source.split}\t{','.join(sorted(source.labels))}\n" for source in sources]
    return json.loads(
        json.dumps(
            {
                "software": f"neuronet-jax {neuronet_jax.__version__}",
                "sources_hash": hashlib.sha256("".join(rows).encode()).hexdigest(),
                "exclude_hash": ids_hash(excluded),
                "settings": dataclasses.asdict(settings),
                **({"note": note} if note else {}),
            }
        )
    )


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
    if info.provenance != provenance or info.shard_subjects != shard_subjects:
        raise NeuronetError(
            f"E_EXISTS: {store} holds an unfinished store of different input or settings; delete it or choose a "
            "different place"
        )
    return StoreWriter.open(store)


def _duplicates(rows: dict[int, ShardRows]) -> list[tuple[Subject, int]]:
    """Returns every subject whose image an earlier slot already has, with that slot."""
    first: dict[str, int] = {}
    subjects = [subject for slot in sorted(rows) for subject in rows[slot].subjects]
    return [(s, first[image_hash(s)]) for s in subjects if first.setdefault(image_hash(s), s.slot) != s.slot]


def read_rejects(files: Files) -> list[Reject]:
    return rejects_from_tsv(files.read("rejects.tsv") or b"")


def _tidy(files: Files) -> None:
    """Removes the files that only an unfinished store needs."""
    for name in [*files.names("unfinished-"), "unfinished.json"]:
        files.delete(name)


def _report(
    subjects: Sequence[Subject], rejects: Sequence[Reject], excluded: int, seconds: float, **outcome: Any
) -> BuildReport:
    splits = collections.Counter(subject.split for subject in subjects)
    warnings = collections.Counter(code for subject in subjects for code in subject.warnings)
    return BuildReport(dict(splits), tuple(rejects), dict(sorted(warnings.items())), excluded, seconds, **outcome)


class _Rate(ProgressColumn):
    def render(self, task: Any) -> str:
        return f"{task.speed:.2f} subjects/s" if task.speed else ""


class _progress:
    """A progress bar with rate and time left; `with` gives the function that advances it."""

    def __init__(self, shown: bool, total: int):
        columns = (TextColumn("building"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown, speed_estimate_period=120)
        self._task = self._bar.add_task("building", total=total)

    def __enter__(self):
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


# ---- command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    statuses = {PARTIAL: "more rejects than --max-reject-fraction; the store is unfinished"}
    parser = Parser("python -m data_prep.build", description=__doc__, statuses=statuses)
    add = parser.add_argument
    add("--store", required=True, help="the store to write: a local path, gs://bucket/path or s3://bucket/path")
    add(
        "--manifest",
        type=Path,
        required=True,
        help="CSV: id,t1,fsl_fast,fsl_first,spm_tissue,malp_em,malp_em_tissue[,split]",
    )
    add("--exclude", type=Path, help="ids of withdrawn participants, one per line")
    add(
        "--splits",
        type=Path,
        help="CSV id,split for a manifest without that column (default: 90/5/5 %% by a hash of the id)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=number(int, 0), help="processes on this machine (default: one per core; 0: in this process)"
    )
    where.add_argument("--scheduler", help="address of a Dask scheduler, e.g. of dask-jobqueue on Slurm")
    add("--repair", action="store_true", help="read a finished store, and build shards with damage or rejects again")
    add("--voxel-size-mm", type=number(float, 0.2, 10), default=1.0)  # as the limits of an image
    add("--grid", type=_grid, help="voxels X,Y,Z of the stored volumes (default: 192x224x192 mm)")
    add(
        "--shard-subjects",
        type=number(int, 1),
        help="subjects per shard, the unit of writing (default: 8, fewer in a small cohort)",
    )
    add("--max-reject-fraction", type=number(float, 0, 1), default=_MAX_REJECT_FRACTION)
    add("--missing", choices=("keep", "reject"), default="keep", help="subjects that lack some of the label maps")
    add("--resample-labels", action="store_true", help="accept label maps on a different grid than the image's")
    add("--transform", choices=("sform", "qform", "reject"), default="sform", help="which one to use if the two differ")
    add("--assume-ras", action="store_true", help="accept images without orientation; left and right are then a guess")
    return run(parser, _build, arguments)


def _build(args: argparse.Namespace) -> int:
    options = vars(args)
    limits = Limits(transform=options.pop("transform"), assume_ras=options.pop("assume_ras"))
    try:
        report = build(**options, limits=limits, progress=True)
    except TooManyRejects as error:
        print("\n".join([f"python -m data_prep.build: error: {error}", *_explained(error.codes)]), file=sys.stderr)
        return PARTIAL
    print(summary(report))
    if report.already and not options["repair"]:
        print("nothing was built; data_prep.verify checks the store, and --repair builds damaged shards again")
    return DONE


def summary(report: BuildReport) -> str:
    """Returns the report in a few lines, without ids."""

    def counts(table: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in table.items()) or "none"

    total = sum(report.subjects.values())
    took = "the store is finished already" if report.already else f"in {report.seconds:.1f} s"
    if report.repaired:
        took += f", {report.repaired} of them damaged and built again"
    lines = [
        f"{total} subjects ({counts(report.subjects)}) {took}",
        f"rejected: {counts(report.rejected)}; warnings: {counts(report.warnings)}; excluded: {report.excluded}",
    ]
    return "\n".join([*lines, *_explained(report.rejected | report.warnings)])


def _explained(codes: Iterable[str]) -> list[str]:
    return [f"{code}: {explain(code)}" for code in codes]


def _grid(text: str) -> tuple[int, int, int]:
    try:
        x, y, z = (int(side) for side in text.split(","))
        if min(x, y, z) < 1:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a grid is X,Y,Z in voxels, such as 192,224,192; got {text!r}") from error
    return x, y, z


if __name__ == "__main__":
    sys.exit(main())
