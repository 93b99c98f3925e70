"""Intervals of volumes: values derived by hand, laws, the promised coverage, and the file that holds them."""

import dataclasses
import json

import numpy as np
import pytest

from neuronet_jax.evaluation import intervals
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.calibration import (
    Calibration,
    Line,
    Spread,
    calibration_to_json,
    load_calibration,
    save_calibration,
)

MALP_EM = PROTOCOLS["malp_em"].num_classes
FAST = Spread((0.0, np.log(2), 0.0, 0.0), (100.0,), (np.log(3), np.log(1.5)), 0.91)


def _heads(count: int, spread: float = 0.1, seed: int = 0) -> list[intervals.Measured]:
    """Returns volumes with a bias per structure and a spread that is three times as large below 1,000 mm³."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(200), np.log(50_000), MALP_EM))
    bias = rng.normal(0.1, 0.05, MALP_EM)
    heads = []
    for _ in range(count):
        predicted = sizes * np.exp(rng.normal(0, 0.1, MALP_EM))
        errors = rng.normal(0, spread, MALP_EM) * np.where(sizes < 1000, 3, 1)
        heads.append({"malp_em": (predicted, predicted * np.exp(bias + errors))})
    return heads


def test_hand_derived_ends():
    low, high = intervals.interval(FAST, np.array([1e6, 60.0, 0.0, 300.0]))
    np.testing.assert_allclose(low, [np.nan, 60 * 2 / 3, np.nan, 200])  # no background, nothing where nothing was found
    np.testing.assert_allclose(high, [np.nan, 60 * 2 * 3, np.nan, 450])


def test_hand_derived_quantile():
    assert intervals._quantile(np.arange(1.0, 10)) == 9  # ⌈10 · 0.9⌉ = 9th of nine
    assert intervals._quantile(np.arange(1.0, 20)) == 18  # ⌈20 · 0.9⌉ = 18th of nineteen
    assert intervals._quantile(np.arange(8.0)) == np.inf  # eight values bound no 90 %


@pytest.mark.parametrize("heads", [3, 8])
def test_nine_of_ten_volumes_of_new_heads_lie_within(heads):
    spread = intervals.fit(_heads(heads))["malp_em"]
    inside = []
    for head in _heads(heads + 40)[heads:]:  # the generator continues with heads of the same structures
        predicted, reference = head["malp_em"]
        low, high = intervals.interval(spread, predicted)
        inside.append(((low <= reference) & (reference <= high))[1:].mean())
    assert 0.86 < np.mean(inside) < 0.97
    assert spread.coverage == pytest.approx(np.mean(inside), abs=0.06)  # its own estimate
    assert spread.half_widths[0] > 1.5 * spread.half_widths[-1]  # small structures spread more


def test_a_structure_that_only_the_network_has_widens_the_interval():
    heads = _heads(3)
    for head in heads:
        head["malp_em"][1][1:30] = 0  # a fifth of all
    assert "malp_em" not in intervals.fit(heads)  # no width holds for 90 %


def test_too_few_volumes_give_no_interval():
    predicted = np.array([9.0, 1, 2, 3]) * 1e4
    tissue = [{"fsl_fast": (predicted, 1.1 * predicted)}] * 3
    assert intervals.fit(tissue)["fsl_fast"].coverage is None  # six volumes of two heads bound no 90 %
    assert intervals.fit(tissue[:2]) == {} and intervals.fit([]) == {}
    assert intervals.describe(intervals.fit(tissue), ["fsl_fast"]) == "Too few to measure that: fsl_fast."


def test_only_calibrated_protocols_have_ends():
    mm3 = {"fsl_fast": np.full(256, 300.0), "spm_tissue": np.full(256, 300.0)}
    ends = intervals.intervals_of(mm3, {"fsl_fast": FAST})
    assert list(ends) == ["fsl_fast"]
    np.testing.assert_allclose(ends["fsl_fast"][:, 1], [400, 900])


def test_the_file_keeps_them_and_files_of_earlier_releases_open(tmp_path):
    lines = {"fsl_fast": Line(1.0, (0.0,) * 4, None)}
    without = Calibration(7, 3, lines, None)
    assert "volumes" not in json.loads(calibration_to_json(without))  # the digest of results stays that of before
    for calibration in (without, dataclasses.replace(without, volumes={"fsl_fast": FAST})):
        save_calibration(str(tmp_path), calibration)
        assert load_calibration(str(tmp_path), 7) == calibration


@pytest.mark.parametrize("change", [{"bias": (0.0,)}, {"half_widths": (1.0,)}, {"half_widths": (1.0, float("inf"))}])
def test_volumes_that_do_not_fit_are_not_used(tmp_path, change):
    lines = {"fsl_fast": Line(1.0, (0.0,) * 4, None)}
    save_calibration(
        str(tmp_path), Calibration(7, 3, lines, None, volumes={"fsl_fast": dataclasses.replace(FAST, **change)})
    )
    with pytest.warns(UserWarning, match="W_UNCALIBRATED"):
        assert load_calibration(str(tmp_path), 7).heads == 0
