"""Intervals for the volumes of structures, from scans whose reference volumes are known.

The ratio of reference to predicted volume has a bias for each structure, and a spread that small structures have more
of. Both are fitted on a run's validation subjects. The interval of a new volume is that volume times the bias, wider by
a factor that held for 90 % of the left-out structures (split conformal prediction; Lei et al., J. Am. Stat. Assoc.
2018). Structures of one head are not independent, so the promise is weaker than for as many heads: the coverage that
was measured on left-out heads is part of the result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.calibration import COVERAGE, Spread

PRIOR_SUBJECTS = 2  # weight, in subjects, of the bias that all structures of a protocol share
LEAST_IN_CLASS = 20  # volumes in a class of sizes: fewer give no 90 % that is not their maximum
MOST_CLASSES = 3  # of sizes

Measured = Mapping[str, tuple[np.ndarray, np.ndarray]]  # of one subject, per protocol: predicted, reference, mm³ [k]


def fit(samples: Sequence[Measured]) -> dict[str, Spread]:
    """Returns, per protocol, the spread of volumes. Protocols whose volumes are too few for 90 % are left out."""
    found = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        volumes = [sample[name] for sample in samples if name in sample]
        if (spread := _spread(volumes)) is not None:
            found[name] = spread
    return found


def intervals_of(mm3: Mapping[str, np.ndarray], spreads: Mapping[str, Spread]) -> dict[str, np.ndarray]:
    """Returns, per calibrated protocol, the lower and upper ends in mm³ of every class, float64 [2 k].

    `mm3` has, per protocol, the volume of every id, float64 [256].
    """
    return {
        name: np.stack(interval(spreads[name], volumes[PROTOCOLS[name].ids]))
        for name, volumes in mm3.items()
        if name in spreads
    }


def describe(spreads: Mapping[str, Spread], names: Sequence[str]) -> str:
    """Returns the measured coverage of these protocols, in one sentence for reports; empty without protocols."""
    if not names:
        return ""
    measured = {name: spreads[name].coverage for name in names}
    known = ", ".join(f"{name} {share:.0%}" for name, share in measured.items() if share is not None)
    unknown = ", ".join(name for name, share in measured.items() if share is None)
    sentences = [f"Volumes of left-out validation scans within it: {known}."] if known else []
    return " ".join([*sentences, *([f"Too few to measure that: {unknown}."] if unknown else [])])


def interval(spread: Spread, mm3: Float[np.ndarray, "k"]) -> tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k"]]:
    """Returns the lower and upper ends in mm³. NaN for the background and for structures that were not found."""
    known = np.where(mm3 > 0, mm3, np.nan)
    known[0] = np.nan
    middle = known * np.exp(spread.bias)
    factor = np.exp(np.array(spread.half_widths)[np.searchsorted(spread.edges_mm3, mm3)])
    return middle / factor, middle * factor


def _spread(volumes: Sequence[tuple[np.ndarray, np.ndarray]]) -> Spread | None:
    """Returns the spread with its coverage of subjects that each were left out of the fit."""
    spread = _fit(volumes)
    if spread is None:
        return None
    inside = total = 0
    for index, (predicted, reference) in enumerate(volumes):
        if (others := _fit([*volumes[:index], *volumes[index + 1 :]])) is None:
            return spread
        low, high = interval(others, predicted)
        inside += int(np.sum((low <= reference) & (reference <= high)))
        total += int(np.sum(~np.isnan(low)))
    return replace(spread, coverage=round(inside / total, 4))


def _fit(volumes: Sequence[tuple[np.ndarray, np.ndarray]]) -> Spread | None:
    """Returns the spread without its coverage, or None if there are too few volumes."""
    if len(volumes) < 2:
        return None  # the bias of a subject comes from others
    predicted, reference = (np.stack(values) for values in zip(*volumes, strict=True))  # [n k]
    found = predicted > 0
    found[:, 0] = False
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(reference / predicted)  # -inf for a structure that only the network has
    errors = []
    for index in range(len(volumes)):
        others = np.delete(np.arange(len(volumes)), index)
        errors.append(np.abs(ratios[index] - _bias(ratios[others], found[others])))
    sizes, errors = predicted[found], np.stack(errors)[found]
    count = min(MOST_CLASSES, max(1, len(sizes) // LEAST_IN_CLASS))
    edges = np.quantile(sizes, np.arange(1, count) / count)
    classes = np.searchsorted(edges, sizes)
    half_widths = [_quantile(errors[classes == c]) for c in range(count)]
    if not all(map(math.isfinite, half_widths)):
        return None
    bias = tuple(round(float(value), 6) for value in _bias(ratios, found))
    return Spread(bias, tuple(round(float(e), 3) for e in edges), tuple(round(w, 6) for w in half_widths), None)


def _bias(ratios: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Returns the mean log ratio of each structure, shrunk towards the common one. [n k] → [k]"""
    known = found & np.isfinite(ratios)
    values = np.where(known, ratios, 0)
    common = values.sum() / max(known.sum(), 1)
    return common + (values - common * known).sum(axis=0) / (known.sum(axis=0) + PRIOR_SUBJECTS)


def _quantile(errors: np.ndarray) -> float:
    """Returns the error that one more volume exceeds with probability 1 − COVERAGE at most; inf with too few."""
    rank = math.ceil((len(errors) + 1) * COVERAGE)
    return float(np.sort(errors)[rank - 1]) if rank <= len(errors) else math.inf
