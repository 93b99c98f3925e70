"""The scores of all finished cells, as arrays over seeds, subjects and structures."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from experiments.compare.cell import EVALUATION, is_scored
from experiments.compare.plan import Arm, Plan
from experiments.compare.statistics import Comparison, compare, holm, wilcoxon
from experiments.evaluate import DICE
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results.tables import read_tsv
from neuronet_jax.runs.directory import RunDirectory

Scores = Float[np.ndarray, "s n k"]  # seed, subject, foreground structure
Failed = Collection[tuple[str, str]]  # subjects and protocols whose reference failed


@dataclass(frozen=True)
class Metric:
    """A score of structures, and how a subject's structures become one number."""

    name: str
    column: str  # of dice.tsv
    title: str
    over_structures: Callable[[np.ndarray], np.ndarray]  # [… k] to […]


def _median(values: np.ndarray) -> np.ndarray:
    """Returns the median over structures: the upper of two middle values, so that it is a measured distance."""
    ordered = np.sort(values, axis=-1)  # NaN last
    known = (~np.isnan(values)).sum(axis=-1)
    return np.take_along_axis(ordered, np.minimum(known // 2, values.shape[-1] - 1)[..., None], -1)[..., 0]


def _mean(values: np.ndarray) -> np.ndarray:
    known = ~np.isnan(values)
    return np.where(
        known.any(axis=-1), np.where(known, values, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1), np.nan
    )


METRICS = (
    Metric("dice", "dice", "Dice, mean over structures", _mean),
    # A structure that is missed has an infinite distance. The median shows it if half of them are.
    Metric("hd95_mm", "hd95_mm", "HD95 in mm, median over structures", _median),
)


@dataclass(frozen=True)
class ArmScores:
    """Scores and costs of the finished cells of one arm."""

    arm: Arm
    seeds: tuple[int, ...]
    by_protocol: dict[str, dict[str, Scores]]  # protocol, metric
    seconds: tuple[float, ...]  # per seed, of training: compilation, input and steps
    memory_bytes: int  # the most of any seed

    def of_subjects(self, protocol: str, metric: Metric) -> Float[np.ndarray, "s n"]:
        return metric.over_structures(self.by_protocol[protocol][metric.name])


def read(plan: Plan, out: Path, failed: Failed = ()) -> list[ArmScores]:
    """Reads the finished cells of every arm that has any. Scores against references in `failed` become NaN."""
    found = []
    for arm in plan.arms:
        names = {seed: out / "cells" / plan.cell(arm, seed).name for seed in range(plan.seeds)}
        done = {seed: folder for seed, folder in names.items() if is_scored(folder)}
        if not done:
            continue
        tables = [read_tsv(folder / EVALUATION / DICE) for folder in done.values()]
        metrics = [RunDirectory(folder / "run").metrics() for folder in done.values()]
        found.append(
            ArmScores(
                arm,
                tuple(done),
                {protocol: _arrays(tables, protocol, failed) for protocol in arm.protocols},
                tuple(_seconds(rows) for rows in metrics),
                max(int(row.get("peak_memory_bytes", 0)) for rows in metrics for row in rows),
            )
        )
    return found


def _arrays(tables: Sequence[Sequence[Mapping[str, str]]], protocol: str, failed: Failed) -> dict[str, Scores]:
    """Returns the array of every metric. Raises NeuronetError if the cells have scored different subjects."""
    rows = [[row for row in table if row["protocol"] == protocol] for table in tables]
    subjects = [list(dict.fromkeys(row["subject"] for row in table)) for table in tables]
    if any(names != subjects[0] for names in subjects):
        raise NeuronetError("the cells of an arm have scored different subjects: give the comparison a new --out")
    place = {name: number for number, name in enumerate(subjects[0])}
    structure = {str(s.id): s.index - 1 for s in PROTOCOLS[protocol].structures[1:]}
    arrays = {}
    for metric in METRICS:
        values = np.full((len(tables), len(place), len(structure)), np.nan)
        for seed, table in enumerate(rows):
            for row in table:
                if metric.column in row and (row["subject"], protocol) not in failed:
                    values[seed, place[row["subject"]], structure[row["index"]]] = float(row[metric.column])
        arrays[metric.name] = values
    return arrays


def _seconds(rows: Sequence[Mapping[str, float]]) -> float:
    """Returns the seconds that went into training, over all sittings: the clock starts again with each."""
    clock = [sum(row.get(f"seconds/{kind}", 0.0) for kind in ("step", "input", "compile")) for row in rows]
    clock = [seconds for seconds in clock if seconds]
    ends = [now for now, after in zip(clock, [*clock[1:], 0.0], strict=True) if after < now]
    return sum(ends)


@dataclass(frozen=True)
class Contrast:
    """An arm against the arm that it is judged by, on one protocol and metric."""

    budget: str
    metric: str
    protocol: str
    arm: str
    baseline: str
    found: Comparison
    p_holm: float  # corrected for all contrasts of the budget and metric


def contrasts(arms: Sequence[ArmScores]) -> list[Contrast]:
    """Compares every arm with that of the protocol alone, and with the first arm of the same protocols."""
    found = []
    for budget in dict.fromkeys(scores.arm.budget for scores in arms):
        mine = [scores for scores in arms if scores.arm.budget == budget]
        first = {scores.arm.protocols: scores.arm for scores in reversed(mine)}
        for metric in METRICS:
            rows: list[tuple[str, str, str, Comparison]] = []
            for scores in mine:
                for other in mine:
                    a, b = scores.arm, other.arm
                    alone = a.family == b.family and len(b.protocols) == 1 < len(a.protocols)
                    changed = b == first[a.protocols] != a
                    for protocol in a.protocols if alone or changed else ():
                        if protocol in b.protocols:
                            sides = (scores.of_subjects(protocol, metric), other.of_subjects(protocol, metric))
                            rows.append((protocol, a.name, b.name, compare(*sides)))
            corrected = holm([row[-1].p for row in rows])
            found += [Contrast(budget, metric.name, *row, p) for row, p in zip(rows, corrected, strict=True)]
    return found


def structures(arms: Sequence[ArmScores]) -> list[list[str]]:
    """Returns a table of every structure: mean and sd over subjects, of the means over seeds; header first.

    `p_holm` compares with the network of that protocol alone, corrected for the structures of the protocol.
    """
    rows: list[list[str]] = [
        ["budget", "arm", "protocol", "index", "name", "metric", "mean", "sd", "subjects", "p_holm"]
    ]
    for scores in arms:
        alone = {
            (other.arm.budget, other.arm.family, other.arm.protocols): other.by_protocol
            for other in arms
            if len(other.arm.protocols) == 1
        }
        for protocol, metrics in scores.by_protocol.items():
            base = alone.get((scores.arm.budget, scores.arm.family, (protocol,)))
            for metric in METRICS:
                values = metrics[metric.name].mean(axis=0)  # [n k]
                p = [float("nan")] * values.shape[1]
                if base is not None and len(scores.arm.protocols) > 1:
                    single = base[protocol][metric.name].mean(axis=0)
                    p = holm([wilcoxon(values[:, k], single[:, k]) for k in range(values.shape[1])])
                for s in PROTOCOLS[protocol].structures[1:]:
                    column = values[:, s.index - 1]
                    column = column[~np.isnan(column)]
                    mean = f"{column.mean():.4f}" if column.size else "n/a"
                    sd = f"{column.std(ddof=1):.4f}" if column.size > 1 and np.isfinite(column).all() else "n/a"
                    corrected = "n/a" if np.isnan(p[s.index - 1]) else f"{p[s.index - 1]:.4f}"
                    told = (scores.arm.budget, scores.arm.name, protocol, str(s.id), s.name, metric.name)
                    rows.append([*told, mean, sd, str(column.size), corrected])
    return rows
