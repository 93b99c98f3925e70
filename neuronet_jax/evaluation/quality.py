"""How good a segmentation probably is, before anyone has looked at it.

The network's own doubt gives an expected Dice of every structure. On the run's validation heads, whose true Dice is
known, that expectation is calibrated; the result lies with the run as `quality.json` and turns the doubt about a new
head into a predicted Dice per structure and one score. Validation heads have also chosen the checkpoint, so all this is
a little too hopeful, and it holds for heads like those.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from neuronet_jax.errors import CodedWarning, NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.inference.segmentation import Confidence
from neuronet_jax.labels import PROTOCOLS

FILE = "quality.json"
SCHEMA_VERSION = 1
FALSE_ALARMS = 0.05  # of good heads that the threshold may flag: one in twenty can be looked at by a person
PRIOR_SPREAD = 0.1  # Σ(x − x̄)² that speaks for a slope of 1: as much as ten structures spread by ±0.1 say
PRIOR_HEADS = 2  # heads that speak for a structure being like its protocol's others
LEAST_HEADS = 3  # for a threshold: two scores have one difference, which tells no spread
LEAST_SPREAD = 0.01  # of scores: a point of Dice less is no alarm, however alike the validation heads are

Sample = Mapping[str, tuple[np.ndarray, np.ndarray]]  # of one head, per protocol: expected and true Dice, each [k]


@dataclass(frozen=True)
class Line:
    """Predicted Dice of one protocol's structures: `slope` · expected + `offsets`, within 0 and 1."""

    slope: float  # never negative: more doubt never predicts a better Dice
    offsets: tuple[float, ...]  # per class
    error: float | None  # mean absolute error on heads that the fit had not seen; None with a single head


@dataclass(frozen=True)
class Threshold:
    """The score under which a head is flagged, and what is known of its false alarms."""

    score: float
    false_alarms: int  # validation heads flagged by the threshold of the others
    heads: int
    rate_at_most: float  # upper 95 % confidence bound of the rate (Clopper and Pearson, Biometrika 1934)


@dataclass(frozen=True)
class Calibration:
    """What the validation heads of a run say. Holds no subject ids."""

    step: int  # of the checkpoint
    heads: int  # 0: uncalibrated
    lines: dict[str, Line]
    threshold: Threshold | None  # None with fewer than three heads
    why_not: str = ""  # why there are no heads

    def provenance(self) -> dict[str, str]:
        """What predictions of Dice come from: with another calibration they are others."""
        return {"calibration_sha256": _digest(asdict(self))} if self.heads else {}

    def describe(self) -> str:
        """One sentence for reports."""
        if not self.heads:
            return f"uncalibrated: {self.why_not}"
        heads = f"calibrated on {self.heads} validation head{'s' * (self.heads != 1)}"
        if self.threshold is None:
            return f"{heads}, too few for a threshold (it takes {LEAST_HEADS})"
        t = self.threshold
        return (
            f"{heads}; heads under {t.score:.3f} are flagged, which is meant for {FALSE_ALARMS:.0%} of good heads and "
            f"was so for {t.false_alarms} of these {t.heads} (95 % sure: for at most {t.rate_at_most:.0%})"
        )


@dataclass(frozen=True)
class Quality:
    """The prediction for one head."""

    entropy: dict[str, np.ndarray]  # per protocol float64 [k]: mean nats per voxel of the class, NaN where it has none
    predicted: dict[str, np.ndarray]  # per protocol float64 [k]: Dice, NaN where there is nothing to compare
    score: float  # mean over protocols of the mean over structures; NaN without confidences
    calibration: str  # what it rests on, or why it is uncalibrated
    warnings: tuple[str, ...]  # W_QUALITY: the score is below the threshold


def expected_dice(confidence: Confidence) -> Float[np.ndarray, "k"]:
    """Dice 2 Σp / (voxels + Σ everywhere p) that the probabilities themselves expect; the first sum is over the class.

    Exact where voxels are independent and many. NaN where less than half a voxel is expected and none found.
    """
    total = confidence.voxels + confidence.probability
    return np.where(total >= 0.5, 2 * confidence.certain / np.maximum(total, 0.5), np.nan)


def mean_entropy(confidence: Confidence) -> Float[np.ndarray, "k"]:
    """Nats per voxel of each class; NaN where it has no voxel."""
    return np.where(confidence.voxels > 0, confidence.entropy / np.maximum(confidence.voxels, 1), np.nan)


def uncalibrated(why: str) -> Calibration:
    """No calibration: the network's own expectation is taken as it is."""
    return Calibration(0, 0, {}, None, why)


UNKNOWN = uncalibrated("nothing is known of the run")


def assess(confidence: Mapping[str, Confidence], calibration: Calibration = UNKNOWN) -> Quality:
    """What to expect of one head."""
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
    """Mean over protocols of the mean predicted Dice over foreground structures, as the published scores are means."""
    means = [values[1:][~np.isnan(values[1:])] for values in predicted.values()]
    means = [float(values.mean()) for values in means if values.size]
    return float(np.mean(means)) if means else float("nan")


def calibrate(samples: Sequence[Sample], step: int) -> Calibration:
    """The calibration from heads whose true Dice is known.

    Per protocol one slope for all structures, drawn to 1 (which holds if the probabilities are right), and an offset
    per structure, drawn to their common one: with few heads a structure has too few points for a line of its own. The
    threshold is the lower end of the one-sided prediction interval for one more head's score (Student's t), from
    scores that each leave their own head out of the fit. Raises NeuronetError without heads.
    """
    if not samples:
        raise NeuronetError("nothing to calibrate on: the store has no validation heads with references")
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
        name: Line(line.slope, line.offsets, _round(np.nanmean(np.concatenate(errors[name]))))
        for name, line in lines.items()
    }
    return Calibration(step, len(samples), lines, _threshold(np.array(scores)))


def save(run: str, calibration: Calibration) -> None:
    """Writes RUN/quality.json."""
    Files(run).write(FILE, to_json(calibration))


def to_json(calibration: Calibration) -> bytes:
    """The content of quality.json, which carries its own checksum."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(calibration)}
    content.pop("why_not")
    content["sha256"] = _digest(content)
    return (json.dumps(content, indent=1) + "\n").encode()


def load(run: str, step: int) -> Calibration:
    """The calibration of the run's checkpoint or release; uncalibrated, with a Python warning where there is a file."""
    data = Files(run).read(FILE)
    if data is None:
        return uncalibrated(f"the run has no {FILE}")
    try:
        content = json.loads(data)
        if content.pop("sha256") != _digest(content):
            raise ValueError("it does not have its checksum")
        if content.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"it has another schema version than {SCHEMA_VERSION}")
        calibration = _from_json(content)
        if calibration.step == step:
            return calibration
        why = f"the run's {FILE} is of step {calibration.step}, its weights are of step {step}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"the run's {FILE} cannot be used ({error})"
    again = f"write it again with `python -m experiments.evaluate --run={run} --calibrate`"
    warnings.warn(CodedWarning("W_UNCALIBRATED", f"{why}: predicted Dice is uncalibrated; {again}"), stacklevel=2)
    return uncalibrated(why)


def table(quality: Quality) -> list[list[str]]:
    """The rows of `sub-…_quality.tsv`, its header first: foreground structures of every protocol."""
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


def _line(heads: Sequence[tuple[np.ndarray, np.ndarray]]) -> Line:
    expected, true = (np.stack(values) for values in zip(*heads, strict=True))  # [n k]
    known = ~np.isnan(expected) & ~np.isnan(true)
    known[:, 0] = False  # the background is no structure, and huge
    if not known.any():
        return Line(1.0, (0.0,) * expected.shape[1], None)
    x, y = expected[known] - expected[known].mean(), true[known] - true[known].mean()
    slope = max(0.0, float((x @ y + PRIOR_SPREAD) / (x @ x + PRIOR_SPREAD)))
    residuals = np.where(known, true - slope * np.where(known, expected, 0), 0)  # [n k]
    common = residuals.sum() / known.sum()
    count = known.sum(axis=0)  # [k]
    own = (residuals - common * known).sum(axis=0) / (count + PRIOR_HEADS)
    return Line(_round(slope), tuple(_round(value) for value in common + own), None)


def _threshold(scores: np.ndarray) -> Threshold | None:
    from scipy import stats

    def lower_end(values: np.ndarray) -> float:
        n = len(values)
        spread = max(float(values.std(ddof=1)), LEAST_SPREAD)
        return float(values.mean() - stats.t.ppf(1 - FALSE_ALARMS, n - 1) * spread * np.sqrt(1 + 1 / n))

    scores = scores[~np.isnan(scores)]
    n = len(scores)
    if n < LEAST_HEADS:
        return None
    alarms = sum(scores[i] < lower_end(np.delete(scores, i)) for i in range(n))
    bound = float(stats.beta.ppf(0.95, alarms + 1, n - alarms)) if alarms < n else 1.0
    return Threshold(_round(lower_end(scores)), int(alarms), n, _round(bound))


def _from_json(content: dict[str, Any]) -> Calibration:
    lines = {
        name: Line(float(line["slope"]), tuple(map(float, line["offsets"])), line["error"])
        for name, line in content["lines"].items()
    }
    if any(name not in PROTOCOLS or len(line.offsets) != PROTOCOLS[name].num_classes for name, line in lines.items()):
        raise ValueError("its protocols are not those of this release")
    threshold = content["threshold"]
    return Calibration(content["step"], content["heads"], lines, threshold and Threshold(**threshold))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _round(value: float) -> float:
    return round(float(value), 6)  # a Dice has no more digits, and the file is read by people
