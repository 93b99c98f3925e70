"""The calibration of a run's predicted Dice and volumes on its validation subjects, and its file.

`evaluation.quality` and `evaluation.intervals` compute a calibration and apply it.
"""

import hashlib
import json
import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

from neuronet_jax.errors import CodedWarning, NeuronetError
from neuronet_jax.files import MOST_BYTES
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.directory import QUALITY, RunDirectory

SCHEMA_VERSION = 1
FALSE_ALARMS = 0.05  # share of good scans that the threshold may flag: a person can check one in twenty
COVERAGE = 0.9  # share of volumes that their interval should hold
LEAST_SUBJECTS = 3  # for a threshold: two scores have one difference, which gives no spread


@dataclass(frozen=True)
class Line:
    """The prediction of Dice for one protocol's structures: `slope` · expected + `offsets`, within 0 and 1."""

    slope: float  # never negative: more uncertainty never predicts a better Dice
    offsets: tuple[float, ...]  # per class
    error: float | None  # mean absolute error on subjects left out of the fit; None with a single subject


@dataclass(frozen=True)
class Threshold:
    """The score below which a scan is flagged, and its measured false alarms."""

    score: float
    false_alarms: int  # validation subjects flagged by the threshold of the others
    heads: int  # number of validation subjects; this is its name in the file
    rate_at_most: float  # upper 95 % confidence bound of the rate (Clopper and Pearson, Biometrika 1934)


@dataclass(frozen=True)
class Spread:
    """The distance of reference volumes from predicted ones, for one protocol's structures, as natural logarithms."""

    bias: tuple[float, ...]  # per class, of reference over predicted volume
    edges_mm3: tuple[float, ...]  # predicted volumes between the classes of sizes, ascending
    half_widths: tuple[float, ...]  # per class of sizes: holds for COVERAGE of the volumes
    coverage: float | None  # share of the volumes of left-out subjects within their intervals; None: too few to say


@dataclass(frozen=True)
class Calibration:
    """The calibration from a run's validation subjects. It holds no subject ids."""

    step: int  # of the checkpoint
    heads: int  # number of validation subjects, 0: uncalibrated; this is its name in the file
    lines: dict[str, Line]
    threshold: Threshold | None  # None with fewer than three subjects
    why_not: str = ""  # why there are no subjects
    volumes: dict[str, Spread] = field(default_factory=dict)  # empty in files of earlier releases

    @property
    def sha256(self) -> str:
        """Returns the digest that names the calibration in provenances; empty if there is none."""
        return _digest(_fields(self)) if self.heads else ""

    def describe(self) -> str:
        """Returns one sentence for reports."""
        if not self.heads:
            return f"uncalibrated: {self.why_not}"
        subjects = f"calibrated on {self.heads} validation subject{'s' * (self.heads != 1)}"
        if self.threshold is None:
            return f"{subjects}, too few for a threshold (it takes {LEAST_SUBJECTS})"
        t = self.threshold
        return (
            f"{subjects}; scans below {t.score:.3f} are flagged (intended: {FALSE_ALARMS:.0%} of good scans; measured: "
            f"{t.false_alarms} of these {t.heads}, at most {t.rate_at_most:.0%} with 95 % confidence)"
        )


def uncalibrated(why: str) -> Calibration:
    """Returns an empty calibration, with which the expected Dice is used as it is."""
    return Calibration(0, 0, {}, None, why)


UNKNOWN = uncalibrated("nothing is known about the run")


def save_calibration(run: str, calibration: Calibration) -> None:
    """Writes RUN/quality.json."""
    RunDirectory(run).files.write(QUALITY, calibration_to_json(calibration))


def calibration_to_json(calibration: Calibration) -> bytes:
    """Returns the content of quality.json, which carries its own checksum."""
    content = {"schema_version": SCHEMA_VERSION, **_fields(calibration)}
    content.pop("why_not")
    content["sha256"] = _digest(content)
    return (json.dumps(content, indent=1) + "\n").encode()


def load_calibration(run: str, step: int) -> Calibration:
    """Reads the calibration of the run's checkpoint or release. An unusable file gives an empty one and a Python
    warning.
    """
    try:
        data = RunDirectory(run).files.read(QUALITY, MOST_BYTES)
        if data is None:
            return uncalibrated(f"the run has no {QUALITY}")
        content = json.loads(data)
        if content.pop("sha256") != _digest(content):
            raise ValueError("its checksum does not match")
        if content.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"its schema version is not {SCHEMA_VERSION}")
        calibration = _from_json(content)
        if calibration.step == step:
            return calibration
        why = f"the run's {QUALITY} belongs to step {calibration.step}, its weights to step {step}"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, NeuronetError) as error:
        why = f"the run's {QUALITY} cannot be used ({error})"
    again = f"renew it with `python -m experiments.evaluate --run={run} --calibrate`"
    warnings.warn(CodedWarning("W_UNCALIBRATED", f"{why}: predicted Dice is uncalibrated; {again}"), stacklevel=2)
    return uncalibrated(why)


def _from_json(content: dict[str, Any]) -> Calibration:
    lines = {
        name: Line(float(line["slope"]), tuple(map(float, line["offsets"])), line["error"])
        for name, line in content["lines"].items()
    }
    if any(name not in PROTOCOLS or len(line.offsets) != PROTOCOLS[name].num_classes for name, line in lines.items()):
        raise ValueError("its protocols differ from this release's")
    threshold = Threshold(**content["threshold"]) if content["threshold"] is not None else None
    heads = content["heads"]
    if type(heads) is not int or heads < 1:
        raise ValueError(f"it is of {heads!r:.80} heads")
    volumes = {name: _spread(name, content) for name, content in content.get("volumes", {}).items()}
    numbers = [value for line in lines.values() for value in (line.slope, *line.offsets, line.error)]
    numbers += [threshold.score, threshold.rate_at_most, threshold.false_alarms, threshold.heads] if threshold else []
    numbers += [value for s in volumes.values() for value in (*s.bias, *s.edges_mm3, *s.half_widths, s.coverage)]
    if not all(value is None or abs(float(value)) < math.inf for value in numbers):
        raise ValueError("it holds numbers that are not finite")
    return Calibration(content["step"], heads, lines, threshold, volumes=volumes)


def _spread(name: str, content: dict[str, Any]) -> Spread:
    bias, edges_mm3, half_widths = (tuple(map(float, content[field])) for field in ("bias", "edges_mm3", "half_widths"))
    if name not in PROTOCOLS or len(bias) != PROTOCOLS[name].num_classes or len(half_widths) != len(edges_mm3) + 1:
        raise ValueError("its volumes do not fit the protocols of this release")
    return Spread(bias, edges_mm3, half_widths, content["coverage"])


def _fields(calibration: Calibration) -> dict[str, Any]:
    """Returns the fields as plain data, those of an earlier release if there is no more."""
    content = asdict(calibration)
    if not calibration.volumes:
        content.pop("volumes")
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
