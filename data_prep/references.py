"""Finds label maps that their tool got wrong, and takes them out of training.

    python -m data_prep.references --store=stores/cohort
    python -m data_prep.references --store=stores/cohort --drop-outliers

Every map is held against the same protocol of the cohort (volumes and positions of its structures), against the image
under it, and against the other tools on the same head (tissues, and FIRST's structures in MALP-EM). The scores go to
references.tsv of the store, by slot. With --drop-outliers a flagged map counts as absent: its voxels stay, and training
does not read them. dropped.tsv keeps which maps these are, with the scores and the limit by which they were dropped.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, get_type_hints

import numpy as np
from rich.console import Console
from rich.progress import track

import neuronet_jax
from data_prep.assemble import BUILD_LEASE, reopen, tidy
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS, TISSUES, is_comparable, tissue_classes
from neuronet_jax.lease import lease
from neuronet_jax.programs import DONE, Parser, number, run
from neuronet_jax.store.reader import Store, read_rejects
from neuronet_jax.store.writer import StoreWriter

REFERENCES = "references.tsv"
DROPPED = "dropped.tsv"
LIMIT = 4.5  # robust standard deviations; the docs state what it finds and what it flags wrongly
LEAST_MAPS = 8  # of a protocol; the deviations of fewer are no yardstick
_MAD_TO_SD = 1.4826  # of a normal distribution
_CAP = 20.0  # one structure that is missing must not outweigh all others
# The least standard deviations: a cohort of equals would make every difference an outlier.
_VOLUME_SD = 0.1  # of the logarithm of a volume: a tenth
_POSITION_SD = 0.05  # of the brain's own standard deviation along an axis, about 2 mm
_CONTRAST_SD = 0.02  # of a share of variance
_DICE_SD = 0.02
_FEW_VOXELS = 10  # added to each volume, so that structures of a few voxels do not deviate by chance

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measures:
    """The measures by which one head's maps are judged."""

    volumes: Mapping[str, np.ndarray]  # per protocol, voxels of each structure, float32 [k-1]
    centroids: Mapping[str, np.ndarray]  # float32 [k-1 3], in standard deviations of the brain from its centre
    contrast: Mapping[str, float]  # per protocol, the share of the image's variance between the structures
    dice: Mapping[tuple[str, str], float]  # per pair of protocols of two tools


@dataclass(frozen=True)
class Score:
    """One row of references.tsv: robust standard deviations from the cohort, NaN where nothing can be said."""

    slot: int
    protocol: str
    volume: float
    position: float
    contrast: float
    agreement: float  # with the other tool that agrees best
    flagged: str = ""  # volume, position, contrast, agreement, joined by commas


@dataclass(frozen=True)
class Dropped(Score):
    """One row of dropped.tsv: a map that counts as absent, with its score at that time."""

    limit: float = LIMIT  # which the flagged measures exceeded
    software: str = f"neuronet-jax {neuronet_jax.__version__}"


def measure(image: np.ndarray, maps: Mapping[str, np.ndarray]) -> Measures:
    """Measures the maps of one head, class indices uint8 [x y z], over its image, float32 [x y z]."""
    points = {name: np.nonzero(classes) for name, classes in maps.items()}
    # The centre of the brain is a median over tools, so that one failed map does not move it. The image votes too.
    votes = [found for name, found in points.items() if name != "fsl_first" and found[0].size]
    votes.append(np.nonzero(image > image.mean()))
    centre = np.median([[axis.mean() if axis.size else 0 for axis in found] for found in votes], axis=0)
    spread = np.median([[axis.std() if axis.size else 0 for axis in found] for found in votes], axis=0)
    volumes, centroids, contrast = {}, {}, {}
    for name, classes in maps.items():
        count = PROTOCOLS[name].num_classes
        values = classes[points[name]]
        voxels = np.bincount(values, minlength=count)[1:]
        sums = np.stack([np.bincount(values, axis, minlength=count)[1:] for axis in points[name]], axis=-1)  # [k-1 3]
        with np.errstate(invalid="ignore", divide="ignore"):
            centroids[name] = ((sums / voxels[:, None] - centre) / np.maximum(spread, 1)).astype(np.float32)
        volumes[name] = voxels.astype(np.float32)
        contrast[name] = _contrast(image[points[name]], values)
    pairs = itertools.combinations(maps, 2)
    return Measures(volumes, centroids, contrast, {pair: _dice(*pair, maps) for pair in pairs if _is_pair(*pair)})


def score(cohort: Mapping[int, Measures]) -> list[Score]:
    """Scores every map of a cohort, by slot.

    A map is flagged if its volumes or positions deviate by more than `LIMIT`, if it separates the image's intensities
    less than such maps do, or if no other tool agrees with it as tools usually do. The worst map of a head is judged
    first, and the others are not held against it.
    """
    agreement = _agreement(cohort)
    alone: dict[tuple[int, str], dict[str, float]] = {}  # scores that need no other map of the head
    for name in PROTOCOLS:
        slots = [slot for slot, measures in cohort.items() if name in measures.volumes]
        if len(slots) < LEAST_MAPS:
            alone |= {(slot, name): dict.fromkeys(("volume", "position", "contrast"), np.nan) for slot in slots}
            continue
        voxels = np.stack([cohort[slot].volumes[name] for slot in slots]) + _FEW_VOXELS  # [n k-1]
        total = voxels.sum(axis=1, keepdims=True)
        volume = np.maximum(
            _deviations(np.log(total), _VOLUME_SD)[:, 0],
            _deviations(np.log(voxels / total), _VOLUME_SD).mean(axis=1),
        )
        centroids = np.stack([cohort[slot].centroids[name] for slot in slots])  # [n k-1 3]
        there = np.isfinite(centroids).any(axis=(0, 2))
        position = np.nan_to_num(_deviations(centroids[:, there], _POSITION_SD)).max(axis=2).mean(axis=1)
        contrast = _shortfalls(np.array([cohort[slot].contrast[name] for slot in slots]), _CONTRAST_SD)
        for slot, *values in zip(slots, volume, position, contrast, strict=True):
            alone[slot, name] = dict(zip(("volume", "position", "contrast"), values, strict=True))
    return [row for slot in sorted(cohort) for row in _judge(slot, cohort[slot], alone, agreement[slot])]


def _judge(
    slot: int,
    measures: Measures,
    alone: Mapping[tuple[int, str], Mapping[str, float]],
    pairs: Mapping[tuple[str, str], float],
) -> list[Score]:
    """Scores the maps of one head."""
    failed = {name for name in measures.volumes if any(z > LIMIT for z in alone[slot, name].values())}
    while True:
        against = {  # of every map, its deviations from the maps that have not failed
            name: [z for pair, z in pairs.items() if name in pair and not (set(pair) - {name}) & failed]
            for name in measures.volumes
        }
        best = {name: min(deviations, default=np.nan) for name, deviations in against.items()}
        contradicted = [name for name, deviation in best.items() if name not in failed and deviation > LIMIT]
        if not contradicted:
            break
        failed.add(max(contradicted, key=lambda name: (len(against[name]), best[name])))
    rows = []
    for name in measures.volumes:
        values = {**alone[slot, name], "agreement": best[name]}
        reasons = [reason for reason, value in values.items() if value > LIMIT]
        rows.append(Score(slot, name, **{k: float(v) for k, v in values.items()}, flagged=",".join(reasons)))
    return rows


def _agreement(cohort: Mapping[int, Measures]) -> dict[int, dict[tuple[str, str], float]]:
    """Returns by slot, for each pair of maps, by how much less they agree than in the cohort; low Dice is positive."""
    found: dict[int, dict[tuple[str, str], float]] = {slot: {} for slot in cohort}
    for pair in {pair for measures in cohort.values() for pair in measures.dice}:
        slots = [slot for slot, measures in cohort.items() if np.isfinite(measures.dice.get(pair, np.nan))]
        if len(slots) < LEAST_MAPS:
            continue
        values = np.array([cohort[slot].dice[pair] for slot in slots])
        for slot, deviation in zip(slots, _shortfalls(values, _DICE_SD), strict=True):
            found[slot][pair] = float(deviation)
    return found


def _deviations(values: np.ndarray, least_sd: float) -> np.ndarray:
    """Returns the distances from the median over the first axis, in robust standard deviations, at most `_CAP`."""
    centre = np.nanmedian(values, axis=0)
    sd = np.maximum(np.nanmedian(np.abs(values - centre), axis=0) * _MAD_TO_SD, least_sd)
    return np.minimum(np.abs(values - centre) / sd, _CAP)


def _shortfalls(values: np.ndarray, least_sd: float) -> np.ndarray:
    """Returns the deviations of values below the median, 0 for the others."""
    return np.where(values < np.median(values), _deviations(values, least_sd), 0)


def _contrast(intensities: np.ndarray, classes: np.ndarray) -> float:
    """Returns the share of the intensities' variance that lies between the classes (eta squared), 0 of no voxels."""
    if intensities.size < 2 or np.ptp(intensities) == 0:
        return 0.0
    values = intensities.astype(np.float64) - intensities.mean(dtype=np.float64)
    sizes = np.maximum(np.bincount(classes), 1)
    return float((np.bincount(classes, values) ** 2 / sizes).sum() / (values**2).sum())


def _is_pair(first: str, second: str) -> bool:
    """Tells whether two protocols can be held against each other: two tools, and FIRST with MALP-EM only."""
    return PROTOCOLS[first].tool != PROTOCOLS[second].tool and (
        "fsl_first" not in (first, second) or "malp_em" in (first, second)
    )


def _dice(first: str, second: str, maps: Mapping[str, np.ndarray]) -> float:
    """Returns the mean Dice over the classes that two protocols have in common, 0 if a map has none of them."""
    tables, count = _common(first, second)
    a, b = (table[maps[name]] for name, table in zip((first, second), tables, strict=True))
    sizes = np.bincount(a.ravel(), minlength=count) + np.bincount(b.ravel(), minlength=count)
    both = np.bincount(a[a == b], minlength=count)
    return float(np.mean(2 * both[1:] / np.maximum(sizes[1:], 1)))


@functools.cache
def _common(first: str, second: str) -> tuple[tuple[np.ndarray, np.ndarray], int]:
    """Returns for two protocols the common class of each of their classes, 0 for none, and the number of these."""
    if "fsl_first" in (first, second):
        names = [structure.name for structure in PROTOCOLS["fsl_first"].structures]
        tables = [
            np.array([names.index(s.name) if s.name in names else 0 for s in PROTOCOLS[protocol].structures], np.uint8)
            for protocol in (first, second)
        ]
        return (tables[0], tables[1]), len(names)
    kept = [tissue for tissue in TISSUES if is_comparable(tissue, first, second)]
    number_of = np.array([0, *(kept.index(t) + 1 if t in kept else 0 for t in TISSUES)], np.uint8)
    tables = [number_of[tissue_classes(protocol)[PROTOCOLS[protocol].ids]] for protocol in (first, second)]
    return (tables[0], tables[1]), len(kept) + 1


# ---- the store ------------------------------------------------------------------------------------------------------


def score_store(store: Store, threads: int = 4, progress: bool = False) -> list[Score]:
    """Scores the maps of a store, those that an earlier call has dropped too."""
    earlier = [*read_dropped(store), *read_scores(Files(store.dest))]
    dropped = {(row.slot, row.protocol) for row in earlier if row.flagged}

    def measured(subject) -> Measures:
        labels = store.read_labels(subject.slot, store.info.protocols)
        there = zip(store.info.protocols, subject.present, labels, strict=True)
        maps = {name: map_ for name, has, map_ in there if has or (subject.slot, name) in dropped}
        return measure(store.read_image(subject.slot), maps)

    with ThreadPoolExecutor(threads) as pool:
        console = Console(stderr=True)
        found = track(pool.map(measured, store.subjects), "scoring", len(store.subjects), console=console,
                      transient=True, disable=not progress)  # fmt: skip
        cohort = dict(zip((subject.slot for subject in store.subjects), found, strict=True))
    for name in store.info.protocols:
        if (count := sum(name in measures.volumes for measures in cohort.values())) < LEAST_MAPS:
            log.warning("%s has %d maps, too few to judge by: at least %d are needed", name, count, LEAST_MAPS)
    return score(cohort)


def drop(store: Store, scores: Collection[Score]) -> int:
    """Marks flagged maps as absent, and returns their number. If it is killed, data_prep.build finishes the store."""
    flagged = {(row.slot, row.protocol): row for row in scores if row.flagged}
    subjects, dropped = [], []
    for subject in store.subjects:
        named = list(zip(store.info.protocols, subject.present, strict=True))
        now = [flagged[subject.slot, name] for name, has in named if has and (subject.slot, name) in flagged]
        dropped += [Dropped(*dataclasses.astuple(row)) for row in now]
        present = tuple(has and (subject.slot, name) not in flagged for name, has in named)
        subjects.append(dataclasses.replace(subject, present=present))
    if dropped:
        files = Files(store.dest)
        with lease(files, BUILD_LEASE):
            rejects = read_rejects(files)
            rows = sorted([*read_dropped(store), *dropped], key=lambda row: (row.slot, row.protocol))
            _write(files, DROPPED, Dropped, rows)  # first: without the drop, its new rows mean nothing
            reopen(Store(store.dest, store.info, tuple(subjects), None), ())
            StoreWriter.open(store.dest).finalize(subjects, rejects)
            tidy(files)
    return len(dropped)


def write_scores(files: Files, scores: Sequence[Score]) -> None:
    """Writes references.tsv, a row for each map."""
    _write(files, REFERENCES, Score, scores)


def read_scores(files: Files) -> list[Score]:
    """Reads references.tsv; an empty list without one."""
    return _read(files, REFERENCES, Score)


def read_dropped(store: Store) -> list[Dropped]:
    """Returns the maps that were dropped and are absent still: a build with --repair brings some back."""
    present = {
        (subject.slot, name)
        for subject in store.subjects
        for name, has in zip(store.info.protocols, subject.present, strict=True)
        if has
    }
    return [row for row in _read(Files(store.dest), DROPPED, Dropped) if (row.slot, row.protocol) not in present]


def forget(files: Files, slots: Collection[int]) -> None:
    """Removes what both tables say about `slots`. The scores go as a whole: they are relative to the cohort."""
    files.delete(REFERENCES)
    if files.read(DROPPED) is not None:
        _write(files, DROPPED, Dropped, [row for row in _read(files, DROPPED, Dropped) if row.slot not in slots])


_Row = TypeVar("_Row", bound=Score)


def _write(files: Files, name: str, kind: type[_Row], rows: Sequence[_Row]) -> None:
    table = [[str(v) if isinstance(v, str | int) else f"{v:.4g}" for v in dataclasses.astuple(row)] for row in rows]
    header = [field.name for field in dataclasses.fields(kind)]
    files.write(name, "".join("\t".join(cells) + "\n" for cells in [header, *table]).encode())


def _read(files: Files, name: str, kind: type[_Row]) -> list[_Row]:
    lines = (files.read(name) or b"").decode().splitlines()[1:]
    types = list(get_type_hints(kind).values())
    return [kind(*(type_(cell) for type_, cell in zip(types, line.split("\t"), strict=True))) for line in lines]


# ---- command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m data_prep.references", description=__doc__)
    parser.add_argument("--store", required=True, help="a local path, gs://bucket/path or s3://bucket/path")
    parser.add_argument("--threads", type=number(int, 1), default=4, help="subjects read at the same time")
    parser.add_argument("--drop-outliers", action="store_true", help="mark flagged maps as absent")
    return run(parser, _references, arguments)


def _references(options: argparse.Namespace) -> int:
    store = Store.open(options.store)
    scores = score_store(store, options.threads, progress=True)
    write_scores(Files(options.store), scores)
    flagged = collections.Counter(row.protocol for row in scores if row.flagged)
    counts = ", ".join(f"{name} {n}" for name, n in sorted(flagged.items())) or "none"
    print(f"{len(scores)} label maps scored; flagged: {counts}; see {REFERENCES} of the store")
    if options.drop_outliers:
        print(f"{drop(store, scores)} maps are now absent; training and evaluation leave them out")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
