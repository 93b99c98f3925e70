"""The calibration of a run's predicted Dice: what the validation heads said, and the file that keeps it.

`evaluation.quality` computes a calibration and applies it.
"""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from neuronet_jax.errors import CodedWarning
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS

QUALITY = "quality.json"
SCHEMA_VERSION = 1
FALSE_ALARMS = 0.05  # of good heads that the threshold may flag: one in twenty can be looked at by a person
LEAST_HEADS = 3  # for a threshold: two scores have one difference, which tells no spread


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


def uncalibrated(why: str) -> Calibration:
    """No calibration: the network's own expectation is taken as it is."""
    return Calibration(0, 0, {}, None, why)


UNKNOWN = uncalibrated("nothing is known of the run")


def save_calibration(run: str, calibration: Calibration) -> None:
    """Writes RUN/quality.json."""
    Files(run).write(QUALITY, calibration_to_json(calibration))


def calibration_to_json(calibration: Calibration) -> bytes:
    """The content of quality.json, which carries its own checksum."""
    content = {"schema_version": SCHEMA_VERSION, **asdict(calibration)}
    content.pop("why_not")
    content["sha256"] = _digest(content)
    return (json.dumps(content, indent=1) + "\n").encode()


def load_calibration(run: str, step: int) -> Calibration:
    """The calibration of the run's checkpoint or release; uncalibrated, with a Python warning where there is a file."""
    data = Files(run).read(QUALITY)
    if data is None:
        return uncalibrated(f"the run has no {QUALITY}")
    try:
        content = json.loads(data)
        if content.pop("sha256") != _digest(content):
            raise ValueError("it does not have its checksum")
        if content.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"it has another schema version than {SCHEMA_VERSION}")
        calibration = _from_json(content)
        if calibration.step == step:
            return calibration
        why = f"the run's {QUALITY} is of step {calibration.step}, its weights are of step {step}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"the run's {QUALITY} cannot be used ({error})"
    again = f"write it again with `python -m experiments.evaluate --run={run} --calibrate`"
    warnings.warn(CodedWarning("W_UNCALIBRATED", f"{why}: predicted Dice is uncalibrated; {again}"), stacklevel=2)
    return uncalibrated(why)


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
