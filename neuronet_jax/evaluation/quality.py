"""Predicted quality of a segmentation, without a reference.

The network's probabilities give an expected Dice of every structure. On the run's validation subjects, whose true Dice
is known, that expectation is calibrated. The calibration is stored with the run as `quality.json`. It turns the
probabilities of a new scan into a predicted Dice per structure and one score. The validation subjects have also chosen
the checkpoint, so the predictions are slightly optimistic, and they hold only for similar scans.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from neuronet_jax.errors import NeuronetError
from neuronet_jax.inference.segmentation import Confidence
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.calibration import FALSE_ALARMS, LEAST_SUBJECTS, UNKNOWN, Calibration, Line, Threshold

PRIOR_SPREAD = 0.1  # Σ(x − x̄)² in favour of a slope of 1: the weight of ten structures that spread by ±0.1
PRIOR_SUBJECTS = 2  # weight, in subjects, of the offset that all structures of a protocol share
LEAST_SPREAD = 0.01  # of scores: 0.01 Dice less is no alarm, however similar the validation subjects are

# Of one subject, per protocol: expected and true Dice, each [k]; the latter is NaN without a reference.
Sample = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Quality:
    """The predicted quality of one scan."""

    entropy: dict[str, np.ndarray]  # per protocol float64 [k]: mean nats per voxel of the class, NaN if it has none
    predicted: dict[str, np.ndarray]  # per protocol float64 [k]: Dice, NaN if there is nothing to compare
    score: float  # mean over protocols of the mean over structures; NaN without confidences
    calibration: str  # its basis, or why there is none
    warnings: tuple[str, ...]  # W_QUALITY: the score is below the threshold


def expected_dice(confidence: Confidence) -> Float[np.ndarray, "k"]:
    """Returns the Dice 2 Σp / (voxels + Σ everywhere p) that the probabilities imply; the first sum is over the class.

    Exact for many independent voxels. NaN if less than half a voxel is expected and none is found.
    """
    total = confidence.voxels + confidence.probability
    return np.where(total >= 0.5, 2 * confidence.certain / np.maximum(total, 0.5), np.nan)


def mean_entropy(confidence: Confidence) -> Float[np.ndarray, "k"]:
    """Returns the mean entropy of each class in nats per voxel; NaN for a class without voxels."""
    return np.where(confidence.voxels > 0, confidence.entropy / np.maximum(confidence.voxels, 1), np.nan)


def assess(confidence: Mapping[str, Confidence], calibration: Calibration = UNKNOWN) -> Quality:
    """Returns the predicted quality of one scan."""
    lines, threshold = calibration.lines, calibration.threshold
    expected = {name: expected_dice(values) for name, values in confidence.items()}
    predicted = {name: _predict(lines.get(name), values) for name, values in expected.items()}
    value = score(predicted)
    flagged = threshold is not None and set(lines) == set(predicted) and value < threshold.score
    return Quality(
        {name: mean_entropy(values) for name, values in confidence.items()},
        predicted,
        value,
        calibration.describe(),
        ("W_QUALITY",) if flagged else (),
    )


def score(predicted: Mapping[str, np.ndarray]) -> float:
    """Returns the mean over protocols of the mean predicted Dice over foreground structures, as in the published
    scores.
    """
    means = [values[1:][~np.isnan(values[1:])] for values in predicted.values()]
    means = [float(values.mean()) for values in means if values.size]
    return float(np.mean(means)) if means else float("nan")


def calibrate(samples: Sequence[Sample], step: int) -> Calibration:
    """Fits the calibration to subjects whose true Dice is known.

    Each protocol has one slope for all structures, shrunk towards 1 (which holds if the probabilities are right), and
    one offset per structure, shrunk towards their common one: with few subjects, a structure has too few points for a
    line of its own. The threshold is the lower end of the one-sided prediction interval for one more subject's score
    (Student's t), from scores that each leave their own subject out of the fit. Protocols without any reference are
    left out. Raises NeuronetError without subjects.
    """
    known = {name for sample in samples for name, (_, true) in sample.items() if not np.isnan(true[1:]).all()}
    samples = [{name: values for name, values in sample.items() if name in known} for sample in samples]
    if not any(samples):
        raise NeuronetError("nothing to calibrate on: the store has no validation subjects with references")
    lines = _fit(samples)
    if len(samples) == 1:
        return Calibration(step, 1, lines, None)
    errors: dict[str, list[np.ndarray]] = {name: [] for name in lines}
    scores = []
    for index, sample in enumerate(samples):
        others = _fit([*samples[:index], *samples[index + 1 :]])
        predicted = {name: _predict(others.get(name), expected) for name, (expected, _) in sample.items()}
        scores.append(score(predicted))
        for name, (_, true) in sample.items():
            errors[name].append(np.abs(predicted[name] - true)[1:])
    lines = {
        name: Line(line.slope, line.offsets, _round(float(np.nanmean(np.concatenate(errors[name])))))
        for name, line in lines.items()
    }
    return Calibration(step, len(samples), lines, _threshold(np.array(scores)))


def table(quality: Quality) -> list[list[str]]:
    """Returns the rows of `sub-…_quality.tsv`, header first: the foreground structures of every protocol."""
    rows = [["protocol", "index", "name", "entropy_nats", "predicted_dice"]]
    for name, predicted in quality.predicted.items():
        for s in PROTOCOLS[name].structures[1:]:
            values = (quality.entropy[name][s.index], predicted[s.index])
            rows.append([name, str(s.id), s.name, *("n/a" if np.isnan(v) else f"{v:.4f}" for v in values)])
    return rows


def _predict(line: Line | None, expected: np.ndarray) -> np.ndarray:
    if line is None:
        return expected
    return np.clip(line.slope * expected + np.array(line.offsets), 0, 1)


def _fit(samples: Sequence[Sample]) -> dict[str, Line]:
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: _line([sample[name] for sample in samples if name in sample]) for name in names}


def _line(subjects: Sequence[tuple[np.ndarray, np.ndarray]]) -> Line:
    expected, true = (np.stack(values) for values in zip(*subjects, strict=True))  # [n k]
    known = ~np.isnan(expected) & ~np.isnan(true)
    known[:, 0] = False  # the background is not a structure, and would dominate
    if not known.any():
        return Line(1.0, (0.0,) * expected.shape[1], None)
    x, y = expected[known] - expected[known].mean(), true[known] - true[known].mean()
    slope = max(0.0, float((x @ y + PRIOR_SPREAD) / (x @ x + PRIOR_SPREAD)))
    residuals = np.where(known, true - slope * np.where(known, expected, 0), 0)  # [n k]
    common = residuals.sum() / known.sum()
    count = known.sum(axis=0)  # [k]
    own = (residuals - common * known).sum(axis=0) / (count + PRIOR_SUBJECTS)
    return Line(_round(slope), tuple(_round(value) for value in common + own), None)


def _threshold(scores: np.ndarray) -> Threshold | None:
    from scipy import stats

    def lower_end(values: np.ndarray) -> float:
        n = len(values)
        spread = max(float(values.std(ddof=1)), LEAST_SPREAD)
        return float(values.mean() - stats.t.ppf(1 - FALSE_ALARMS, n - 1) * spread * np.sqrt(1 + 1 / n))

    scores = scores[~np.isnan(scores)]
    n = len(scores)
    if n < LEAST_SUBJECTS:
        return None
    alarms = sum(scores[i] < lower_end(np.delete(scores, i)) for i in range(n))
    bound = float(stats.beta.ppf(0.95, alarms + 1, n - alarms)) if alarms < n else 1.0
    return Threshold(_round(lower_end(scores)), int(alarms), n, _round(bound))


def _round(value: float) -> float:
    return round(float(value), 6)  # Dice has no more meaningful digits, and people read the file
