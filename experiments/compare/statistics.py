"""Statistics of two arms: paired tests over subjects, and intervals over subjects and seeds.

The subjects are those of one split, so tests and intervals are about further subjects like these. Whether other
training subjects would change the order of the arms, one split cannot tell.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

DRAWS = 10_000  # of the bootstrap: the ends of a 95 % interval then have 250 draws beyond them
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Arm minus baseline, of one score."""

    difference: float  # of the means over seeds and subjects
    low: float  # ends of the bootstrap interval
    high: float
    p: float  # Wilcoxon's signed-rank test over subjects, not corrected
    subjects: int  # that both arms have a score of


def compare(arm: Float[np.ndarray, "s n"], baseline: Float[np.ndarray, "t n"], seed: int = 0) -> Comparison:
    """Compares the scores of an arm with those of a baseline: a row per seed, a column per subject.

    Subjects without a score in either are left out; NaN if none is left.
    """
    both = ~(np.isnan(arm).any(axis=0) | np.isnan(baseline).any(axis=0))
    arm, baseline = arm[:, both], baseline[:, both]
    if not both.any():
        return Comparison(math.nan, math.nan, math.nan, math.nan, 0)
    low, high = bootstrap(arm, baseline, seed)
    with np.errstate(invalid="ignore"):  # of infinite distances
        difference = float(arm.mean() - baseline.mean())
    return Comparison(difference, low, high, wilcoxon(arm.mean(axis=0), baseline.mean(axis=0)), int(both.sum()))


def wilcoxon(arm: Float[np.ndarray, "n"], baseline: Float[np.ndarray, "n"]) -> float:
    """Returns the two-sided p of the signed-rank test (Wilcoxon, Biometrics Bulletin 1945).

    It is 1 if nothing differs, and NaN without a subject that has both scores.
    It is exact for up to 50 subjects without ties. The least p of n subjects is 2^(1 − n): .25 of 3, .06 of 5.
    """
    with np.errstate(invalid="ignore"):
        differences = np.where(arm == baseline, 0.0, arm - baseline)  # ∞ − ∞ too
    differences = differences[~np.isnan(differences)]
    if not differences.size:
        return float("nan")
    differences = differences[differences != 0]
    if not differences.size:
        return 1.0
    with warnings.catch_warnings():  # of few subjects, which the docstring and the page tell
        warnings.simplefilter("ignore")
        tested: Any = stats.wilcoxon(np.sign(differences) * stats.rankdata(np.abs(differences)))
        return float(tested.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number, in their order (Holm, Scand. J. Statistics 1979). NaN stays NaN."""
    values = np.asarray(p, float)
    corrected = np.full(values.shape, np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else steps
    return corrected.tolist()


def bootstrap(
    arm: Float[np.ndarray, "s n"], baseline: Float[np.ndarray, "t n"], seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """Returns the percentile interval of the difference of means (Efron and Tibshirani, 1993).

    Every draw takes subjects with replacement, the same ones for both arms, and seeds with replacement, for each arm on
    its own. NaN with infinite scores. With a single seed, the interval says nothing about seeds.
    """
    if not (np.isfinite(arm).all() and np.isfinite(baseline).all()):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)

    def weights(count: int) -> np.ndarray:
        return rng.multinomial(count, np.full(count, 1 / count), draws) / count  # [draws count]

    subjects = weights(arm.shape[1])
    means = [np.einsum("ds,sn,dn->d", weights(len(scores)), scores, subjects) for scores in (arm, baseline)]
    low, high = np.quantile(means[0] - means[1], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
