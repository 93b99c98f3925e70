"""Predicted Dice: hand-derived values, laws of the calibration, and the promised rate of false alarms."""

import numpy as np
import pytest
from scipy import stats

from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation import quality
from neuronet_jax.inference.segmentation import Confidence
from neuronet_jax.labels import PROTOCOLS

MALP_EM = PROTOCOLS["malp_em"].num_classes


def _samples(heads: int, slope: float = 0.5, noise: float = 0.01, seed: int = 0) -> list[quality.Sample]:
    """Returns subjects whose true Dice is a line of the expected one, with an offset per structure and noise."""
    rng = np.random.default_rng(seed)
    offsets = 0.3 + rng.normal(0, 0.08, MALP_EM)
    samples = []
    for _ in range(heads):
        expected = rng.uniform(0.5, 0.95, MALP_EM)
        samples.append({"malp_em": (expected, np.clip(slope * expected + offsets + rng.normal(0, noise), 0, 1))})
    return samples


def test_hand_derived_expectation_and_entropy():
    confidence = Confidence(*np.array([[90, 8, 0, 0], [88, 6, 0, 0], [91, 6.8, 0.2, 3.0], [4.5, 2, 0, 0.0]]))
    expected = quality.expected_dice(confidence)
    np.testing.assert_allclose(expected, [176 / 181, 12 / 14.8, np.nan, 0])  # 0.2 voxels count as none, 3 as missed
    np.testing.assert_allclose(quality.mean_entropy(confidence), [0.05, 0.25, np.nan, np.nan])


def test_certain_labels_expect_perfection_and_the_background_does_not_count():
    voxels = np.array([1e6, 10, 20, 30.0])
    certain = Confidence(voxels, voxels, voxels, 0 * voxels)
    found = quality.assess({"fsl_fast": certain})
    assert found.score == 1 and found.calibration.startswith("uncalibrated") and found.warnings == ()
    worse = Confidence(voxels, voxels * [0.1, 1, 1, 1], voxels, 0 * voxels)
    assert quality.assess({"fsl_fast": worse}).score == 1
    assert np.isnan(quality.assess({}).score)  # the fast mode has no confidences


def test_the_score_is_the_mean_over_protocols_of_means_over_structures():
    predicted = {"fsl_fast": np.array([0, 0.9, 0.7, np.nan]), "spm_tissue": np.array([0, 0.4, 0.4, 0.4])}
    assert quality.score(predicted) == pytest.approx((0.8 + 0.4) / 2)


@pytest.mark.parametrize("heads", [2, 5, 20])
def test_calibration_predicts_new_heads_better_than_the_expectation(heads):
    line = quality.calibrate(_samples(heads), 1).lines["malp_em"]
    errors, raw = [], []
    for sample in _samples(heads + 30)[heads:]:  # the generator continues with subjects of the same structures
        expected, true = sample["malp_em"]
        errors.append(np.abs(quality._predict(line, expected) - true)[1:])
        raw.append(np.abs(expected - true)[1:])
    assert np.mean(errors) < (0.5 if heads < 20 else 0.2) * np.mean(raw)
    assert line.error == pytest.approx(np.mean(errors), rel=0.6)  # its own estimate


def test_right_expectations_stay_as_they_are():
    samples = [{"malp_em": (expected, expected)} for expected in (sample["malp_em"][0] for sample in _samples(3))]
    line = quality.calibrate(samples, 1).lines["malp_em"]
    assert line.slope == 1 and np.abs(line.offsets).max() < 1e-12 and line.error == pytest.approx(0)


def test_more_uncertainty_never_predicts_a_better_dice():
    perverse = [{"malp_em": (e, 0.95 - 0.5 * e)} for e in (sample["malp_em"][0] for sample in _samples(4))]
    line = quality.calibrate(perverse, 1).lines["malp_em"]
    assert line.slope == 0
    predicted = quality._predict(line, np.linspace(0, 1, MALP_EM))
    assert predicted.min() >= 0 and predicted.max() <= 1


def test_one_subject_with_three_structures_hardly_changes_the_slope():
    expected, true = np.array([1, 0.80, 0.81, 0.82]), np.array([1, 0.60, 0.80, 0.95])  # a slope of 17.5 by itself
    calibration = quality.calibrate([{"fsl_fast": (expected, true)}], 1)
    assert 1 < calibration.lines["fsl_fast"].slope < 1.1
    assert calibration.threshold is None and calibration.lines["fsl_fast"].error is None
    assert "too few for a threshold" in calibration.describe()
    with pytest.raises(NeuronetError, match="no validation subjects"):
        quality.calibrate([], 1)


def test_absent_structures_are_left_out():
    samples = _samples(3)
    for sample in samples:
        sample["malp_em"][1][14:16] = np.nan  # never in a reference
        sample["malp_em"][0][7] = np.nan
    calibration = quality.calibrate(samples, 1)
    assert np.isfinite(calibration.lines["malp_em"].offsets).all()


def test_a_head_without_a_reference_has_a_score_of_all_protocols_but_no_say_on_the_lines():
    """Scores of some protocols and of all are not comparable: those of a protocol that is easy are higher."""
    easy = (np.full(4, 0.95), np.full(4, 0.95))
    both = [{**sample, "fsl_fast": easy} for sample in _samples(5, noise=0)]
    unknown = (both[4]["malp_em"][0], np.full(MALP_EM, np.nan))
    calibration = quality.calibrate([*both[:4], {"malp_em": unknown, "fsl_fast": easy}], 1)
    alone = quality.calibrate(both[:4], 1)
    assert calibration.lines["malp_em"].offsets == alone.lines["malp_em"].offsets
    assert calibration.threshold is not None and alone.threshold is not None and calibration.heads == 5
    assert calibration.threshold.score == pytest.approx(alone.threshold.score, abs=0.02)
    never = quality.calibrate([{"malp_em": unknown, "fsl_fast": easy}] * 3, 1)
    assert set(never.lines) == {"fsl_fast"}  # a protocol without any reference


def test_one_good_head_in_twenty_is_flagged_as_promised():
    rng = np.random.default_rng(0)
    trials, flagged = 1500, 0
    for _ in range(trials):
        scores = rng.normal(0.8, 0.05, 6)
        threshold = quality._threshold(scores[:5])
        assert threshold is not None
        flagged += scores[5] < threshold.score
    assert flagged / trials == pytest.approx(quality.FALSE_ALARMS, abs=0.018)  # three standard errors
    assert quality._threshold(np.array([0.8, 0.9])) is None


def test_false_alarms_are_counted_with_the_subject_left_out_and_bounded():
    threshold = quality._threshold(np.array([0.80, 0.81, 0.79, 0.80, 0.82, 0.20]))
    assert threshold is not None and (threshold.false_alarms, threshold.heads) == (1, 6)
    # one of six: the rate at which one or none would be seen in 5 % of trials
    assert stats.binom.cdf(1, 6, threshold.rate_at_most) == pytest.approx(0.05, abs=1e-5)
    alike = quality._threshold(np.array([0.8, 0.8, 0.8]))
    assert alike is not None and alike.score < 0.79  # 0.01 Dice is no alarm


def test_a_scan_below_the_threshold_is_flagged(tmp_path):
    calibration = quality.calibrate(_samples(8), 3)
    assert calibration.threshold is not None
    counts = np.full(MALP_EM, 1000.0)
    good = Confidence(counts, counts * 0.8, counts, counts)
    bad = Confidence(counts, counts * 0.1, counts, counts)
    assert quality.assess({"malp_em": good}, calibration).warnings == ()
    found = quality.assess({"malp_em": bad}, calibration)
    assert found.warnings == ("W_QUALITY",) and "8 validation subjects" in found.calibration
    # the score of different protocols is not comparable with the threshold
    tissue = Confidence(*np.full((4, 4), 10.0))
    assert quality.assess({"malp_em": bad, "fsl_fast": tissue}, calibration).warnings == ()
    rows = quality.table(found)
    assert rows[0] == ["protocol", "index", "name", "entropy_nats", "predicted_dice"] and len(rows) == MALP_EM
