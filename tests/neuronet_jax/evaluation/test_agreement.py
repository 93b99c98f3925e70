"""Agreement between protocols, against counts by hand and a naive implementation."""

import itertools

import numpy as np
import pytest

from neuronet_jax.evaluation import agreement
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS, REGIONS, TISSUES, tissue_of

SHAPE = (7, 6, 5)
UNIT = np.diag([2.0, 1.0, 1.5, 1.0])  # 3 mm³


def _random_maps() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.choice(protocol.ids, SHAPE).astype(np.uint8) for name, protocol in PROTOCOLS.items()}


def _pair(result: agreement.Agreement, region: str, first: str, second: str) -> agreement.Pair:
    named = [p for p in result.pairs if p.kind != "merge"]  # a merged class may have a tissue's name
    (found,) = [p for p in named if (p.region, p.first, p.second) == (region, first, second)]
    return found


def test_every_pair_of_protocols_is_compared_on_all_they_share():
    maps = _random_maps()
    result = agreement.compare(maps, UNIT)
    expected = {
        (region.kind, region.name, one, other)
        for region in REGIONS
        for one, other in itertools.combinations(maps, 2)
        if one in region.ids and other in region.ids
    } | {("merge", s.name, "malp_em", "malp_em_tissue") for s in PROTOCOLS["malp_em_tissue"].structures[1:]}
    assert {(p.kind, p.region, p.first, p.second) for p in result.pairs} == expected
    assert len(result.pairs) == len(expected) == 3 * 6 + 15 + 5
    for region in REGIONS:
        for one, other in itertools.combinations(region.ids, 2):
            a, b = np.isin(maps[one], region.ids[one]), np.isin(maps[other], region.ids[other])
            pair = _pair(result, region.name, one, other)
            assert pair.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), rel=1e-14, nan_ok=True)
            assert (pair.first_mm3, pair.second_mm3) == (pytest.approx(a.sum() * 3), pytest.approx(b.sum() * 3))


def test_the_votes_are_those_of_a_naive_count():
    maps = _random_maps()
    result = agreement.compare(maps, UNIT)
    assert result.voters == ("fsl_fast", "spm_tissue", "malp_em", "malp_em_tissue") and result.votes is not None
    for voxel in np.ndindex(SHAPE):
        says = [
            next((t for t, r in zip(TISSUES, REGIONS, strict=False) if maps[name][voxel] in r.ids[name]), None)
            for name in result.voters
        ]
        expected = 0 if not any(says) else max(says.count(answer) for answer in says)
        assert result.votes[voxel] == expected, says
    matter = np.any([np.isin(maps[n], r.ids[n]) for r in REGIONS[1:3] for n in result.voters], axis=0)
    assert result.unanimous == pytest.approx((result.votes[matter] == 4).mean())


def test_csf_of_different_definitions_enters_no_mean():
    result = agreement.compare(_random_maps(), UNIT)
    alike = [
        p.dice for p in result.pairs if (p.kind, p.region) == ("tissue", "CSF") and p.first[0] + p.second[0] in "fs mm"
    ]
    assert len(alike) == 2  # FAST and SPM; MALP-EM's two
    assert result.mean("tissue", "CSF") == pytest.approx(np.mean(alike))
    assert len([p for p in result.pairs if p.kind == "tissue"]) == 3 * 6  # the table still has all of them


def test_hand_derived_votes():
    fast = np.array([0, 1, 1, 2, 3, 3], np.uint8).reshape(6, 1, 1)
    spm = np.array([0, 0, 1, 3, 3, 2], np.uint8).reshape(6, 1, 1)
    tissue = np.array([0, 0, 1, 4, 4, 4], np.uint8).reshape(6, 1, 1)  # none, none, ventricles, then white matter
    result = agreement.compare({"fsl_fast": fast, "spm_tissue": spm, "malp_em_tissue": tissue}, np.eye(4))
    assert result.votes is not None and result.votes.ravel().tolist() == [0, 2, 3, 2, 3, 2]
    assert _pair(result, "WM", "fsl_fast", "spm_tissue").dice == 2 * 1 / (2 + 2)
    assert _pair(result, "WM", "spm_tissue", "malp_em_tissue").dice == 2 * 2 / (2 + 3)
    assert np.isnan(result.consistency) and result.mean("tissue") == pytest.approx(
        np.nanmean([p.dice for p in result.pairs if p.region != "CSF" or p.second == "spm_tissue"])
    )


def test_consistent_malp_em_maps_agree_everywhere():
    maps = _random_maps()
    maps["malp_em_tissue"] = MALP_EM_TO_TISSUE[maps["malp_em"]]
    assert agreement.compare(maps, UNIT).consistency == 1
    maps["malp_em_tissue"] = np.where(maps["malp_em_tissue"] == 4, 3, maps["malp_em_tissue"]).astype(np.uint8)
    result = agreement.compare(maps, UNIT)
    (white,) = [p for p in result.pairs if (p.kind, p.region) == ("merge", "WM")]
    assert white.dice == 0 and white.second_mm3 == 0 and result.consistency < 1


def test_F11_a_region_that_neither_has_is_not_applicable_and_one_that_a_single_map_has_scores_zero():
    first, malp_em = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    first[0] = 10  # left thalamus
    result = agreement.compare({"fsl_first": first, "malp_em": malp_em}, UNIT)
    assert _pair(result, "LeftThalamusProper", "fsl_first", "malp_em").dice == 0
    assert np.isnan(_pair(result, "BrainStem", "fsl_first", "malp_em").dice)
    assert result.votes is None and result.mean("structure") == 0
    rows = agreement.table(result)
    assert rows[0] == list(agreement.COLUMNS) and len(rows) == 16
    assert ["structure", "BrainStem", "fsl_first", "malp_em", "n/a", "0", "0"] in rows


def test_tissues_follow_the_tools():
    malp_em = {s.name: tissue_of(s) for s in PROTOCOLS["malp_em"].structures}
    assert malp_em["RightCerebellumExterior"] == "GM" and malp_em["RightCerebellumWhiteMatter"] == "WM"
    assert malp_em["CSF"] == "CSF" and malp_em["LeftLateralVentricle"] == "CSF"
    assert malp_em["BrainStem"] == "GM"  # MALP-EM's own merge
    assert malp_em["Background"] is None and malp_em["RightCerebralExterior"] is None
    assert {name for region in REGIONS[:3] for name in region.ids} == set(PROTOCOLS) - {"fsl_first"}
    first = {s.name for s in PROTOCOLS["fsl_first"].structures[1:]}
    assert {region.name for region in REGIONS[3:]} == first
