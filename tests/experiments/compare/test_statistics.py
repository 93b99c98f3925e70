"""The statistics of a comparison against scipy and values derived by hand."""

import numpy as np
import pytest
from scipy import stats

from experiments.compare.statistics import bootstrap, compare, holm, wilcoxon


def test_the_least_p_of_three_subjects_is_a_quarter():
    assert wilcoxon(np.array([0.9, 0.8, 0.7]), np.array([0.8, 0.6, 0.4])) == pytest.approx(2 / 2**3)


def test_wilcoxon_is_that_of_scipy():
    rng = np.random.default_rng(0)
    arm, baseline = rng.normal(0.3, 1, 17), rng.normal(0, 1, 17)
    assert wilcoxon(arm, baseline) == pytest.approx(stats.wilcoxon(arm, baseline)[1])


def test_infinite_distances_rank_last_and_cancel():
    inf = np.inf
    # differences: −∞, 1, 2, none: the ranks of the signs −, +, + are 3, 1, 2, as those of (−9, 1, 2)
    found = wilcoxon(np.array([4.0, 3.0, 5.0, inf]), np.array([inf, 2.0, 3.0, inf]))
    assert found == pytest.approx(stats.wilcoxon([-9.0, 1.0, 2.0])[1])


def test_nothing_that_differs_has_p_one_and_nothing_to_compare_has_none():
    assert wilcoxon(np.array([0.5, np.inf]), np.array([0.5, np.inf])) == 1.0
    assert np.isnan(wilcoxon(np.array([np.nan]), np.array([0.5])))


def test_holm_by_hand():
    # sorted .005 ×4, .01 ×3, .03 ×2, .04 ×1, and never less than the one before
    assert holm([0.01, 0.04, np.nan, 0.03, 0.005]) == pytest.approx([0.03, 0.06, np.nan, 0.06, 0.02], nan_ok=True)
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([]) == []


def test_bootstrap_over_subjects_is_that_of_scipy():
    rng = np.random.default_rng(1)
    baseline = rng.normal(0.7, 0.1, 40)
    arm = baseline + rng.normal(0.02, 0.03, 40)
    reference = stats.bootstrap(
        (arm, baseline), lambda a, b, axis: (a - b).mean(axis), paired=True, method="percentile", rng=0
    ).confidence_interval
    assert bootstrap(arm[None], baseline[None]) == pytest.approx((reference.low, reference.high), abs=1e-3)


def test_subjects_that_all_gain_alike_leave_no_interval():
    baseline = np.array([[0.1, 0.5, 0.9]])
    assert bootstrap(baseline + 0.2, baseline) == pytest.approx((0.2, 0.2))


def test_seeds_that_differ_widen_the_interval():
    baseline = np.tile(np.linspace(0.6, 0.8, 5), (3, 1))
    arm = baseline + np.array([[0.0], [0.1], [0.2]])  # by seed alone
    low, high = bootstrap(arm, baseline)
    assert (low, high) == pytest.approx((0.0, 0.2), abs=0.02)  # from three draws of the worst seed to three of the best


def test_subjects_without_a_score_are_left_out_of_both():
    arm, baseline = np.array([[0.9, np.nan, 0.7]]), np.array([[0.8, 0.1, 0.5]])
    found = compare(arm, baseline)
    assert (found.subjects, found.difference) == (2, pytest.approx(0.15))
    assert found.p == pytest.approx(0.5)  # two subjects: 2 / 2²
    assert np.isnan(compare(np.array([[np.nan]]), np.array([[0.5]])).p)
