import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from surface_distance import compute_dice_coefficient

from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation.metrics import dice_per_class, mean_dice, summarise

LABELS = hnp.arrays(np.uint8, (3, 4, 5), elements=st.integers(0, 4))


def test_hand_derived_overlap():
    reference = np.array([0, 1, 1, 1, 2, 2])
    predicted = np.array([0, 1, 1, 2, 2, 0])
    table = dice_per_class(reference, predicted, 3)
    # background: 1 shared of 1 + 2; class 1: 2 shared of 3 + 2; class 2: 1 shared of 2 + 2
    np.testing.assert_allclose(table.dice, [2 / 3, 4 / 5, 1 / 2], rtol=1e-15)
    assert table.reference_voxels.tolist() == [1, 3, 2]
    assert table.predicted_voxels.tolist() == [2, 2, 2]
    assert mean_dice(table) == pytest.approx((4 / 5 + 1 / 2) / 2)  # the background is not counted


def test_F11_empty_in_both_is_not_applicable_and_left_out():
    table = dice_per_class(np.array([0, 1, 1]), np.array([0, 1, 1]), 3)
    assert math.isnan(table.dice[2]) and table.reference_voxels[2] == table.predicted_voxels[2] == 0
    assert mean_dice(table) == 1.0


@pytest.mark.parametrize(("reference", "predicted"), [([0, 1, 2], [0, 1, 0]), ([0, 1, 0], [0, 1, 2])])
def test_F11_empty_in_one_scores_zero_and_counts(reference, predicted):
    table = dice_per_class(np.array(reference), np.array(predicted), 3)
    assert table.dice[2] == 0.0
    assert mean_dice(table) == 0.5  # class 1 is perfect, class 2 is not dropped


def test_F11_background_alone_has_no_score():
    assert math.isnan(mean_dice(dice_per_class(np.zeros(8, np.uint8), np.zeros(8, np.uint8), 4)))


@given(LABELS, LABELS)
def test_equals_the_naive_form_and_surface_distance(reference, predicted):
    table = dice_per_class(reference, predicted, 5)
    for index in range(5):
        a, b = reference == index, predicted == index
        assert table.reference_voxels[index] == a.sum() and table.predicted_voxels[index] == b.sum()
        if not (a.any() or b.any()):
            assert math.isnan(table.dice[index])
            continue
        assert table.dice[index] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), rel=1e-14)
        assert table.dice[index] == pytest.approx(compute_dice_coefficient(a, b), rel=1e-14)


@given(LABELS, LABELS)
def test_is_symmetric_and_bounded(reference, predicted):
    one, other = dice_per_class(reference, predicted, 5), dice_per_class(predicted, reference, 5)
    np.testing.assert_array_equal(one.dice, other.dice)
    assert np.nanmin(one.dice) >= 0 and np.nanmax(one.dice) <= 1


def test_a_different_grid_and_unknown_labels_are_refused():
    with pytest.raises(NeuronetError, match="one grid"):
        dice_per_class(np.zeros((2, 3)), np.zeros((3, 2)), 2)
    with pytest.raises(NeuronetError, match=r"prediction holds labels 0\.\.7"):
        dice_per_class(np.array([0, 1]), np.array([0, 7]), 4)


def test_summary_over_subjects():
    summary = summarise([0.8, 0.9, math.nan])
    assert (summary.mean, summary.minimum, summary.subjects) == (pytest.approx(0.85), 0.8, 2)
    assert summary.sd == pytest.approx(0.1 / math.sqrt(2))
    assert str(summary) == "0.8500 ± 0.0707 [0.800]"
    assert math.isnan(summarise([0.5]).sd) and math.isnan(summarise([]).mean)
