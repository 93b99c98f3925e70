"""Laws of the label tables, and the facts that are easily got wrong."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.labels import MALP_EM_CENTROIDS_MM, MALP_EM_TO_TISSUE, MALP_EM_VOLUMES_MM3, PROTOCOLS

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=list(PROTOCOLS))


def test_protocols_and_their_class_counts():
    assert {name: protocol.num_classes for name, protocol in PROTOCOLS.items()} == {
        "fsl_fast": 4,
        "fsl_first": 16,
        "spm_tissue": 4,
        "malp_em": 139,
        "malp_em_tissue": 6,
    }
    assert list(PROTOCOLS) == ["fsl_fast", "fsl_first", "spm_tissue", "malp_em", "malp_em_tissue"]
    assert len({protocol.filename for protocol in PROTOCOLS.values()}) == 5


@each_protocol
def test_classes_are_in_order_and_background_is_first(protocol):
    assert [structure.index for structure in protocol.structures] == list(range(protocol.num_classes))
    assert (protocol.structures[0].id, protocol.structures[0].name) == (0, "Background")
    for values in ([s.name for s in protocol.structures], [s.id for s in protocol.structures]):
        assert len(set(values)) == protocol.num_classes


@each_protocol
def test_ids_and_classes_round_trip(protocol):
    classes = np.random.default_rng(0).integers(0, protocol.num_classes, (5, 6, 7), dtype=np.uint8)
    ids = protocol.to_ids(classes)
    assert ids.dtype == np.uint8
    for dtype in (np.uint8, np.int16, np.int32, np.uint64):
        back = protocol.to_classes(ids.astype(dtype))
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, classes)
    np.testing.assert_array_equal(protocol.to_classes(protocol.ids), np.arange(protocol.num_classes))
    assert protocol.to_classes(np.zeros((0, 3), np.int16)).shape == (0, 3)


@each_protocol
def test_A18_unknown_ids_are_refused_and_listed(protocol):
    with pytest.raises(RejectError, match=r"E_LABEL_SET: -3, 200, 4000 not among") as caught:
        protocol.to_classes(np.array([0, 4000, -3, 200, 0, 200]))
    assert caught.value.code == "E_LABEL_SET"


def test_A18_an_id_inside_the_range_but_not_in_the_table_is_refused():
    with pytest.raises(RejectError, match="E_LABEL_SET: 14, 15 not among the fsl_first ids"):
        PROTOCOLS["fsl_first"].to_classes(np.array([[10, 14], [15, 58]]))


def test_wrong_dtypes_and_classes_are_refused():
    with pytest.raises(NeuronetError, match="float64"):
        PROTOCOLS["fsl_fast"].to_classes(np.zeros(3))
    with pytest.raises(NeuronetError, match="classes 0 to 3"):
        PROTOCOLS["fsl_fast"].to_ids(np.array([0, 4]))


@each_protocol
def test_partners_are_an_involution_that_swaps_sides_only(protocol):
    partners = protocol.partners
    np.testing.assert_array_equal(partners[partners], np.arange(protocol.num_classes))
    for structure in protocol.structures:
        partner = protocol.structures[structure.partner]
        swapped = {"left": "right", "right": "left"}.get(structure.side, structure.side)
        assert partner.side == swapped
        assert (structure.index == partner.index) == (structure.side in ("midline", "NA"))
        assert partner.tissue == structure.tissue
        assert partner.mapping == structure.mapping
        assert partner.name == structure.name.replace("Left", "*").replace("Right", "Left").replace("*", "Right")
        assert structure.name.startswith(structure.side.title()) or structure.side in ("midline", "NA")


@each_protocol
def test_mirroring_twice_is_the_identity_and_keeps_the_set_of_pairs(protocol):
    classes = np.random.default_rng(1).integers(0, protocol.num_classes, (6, 5, 4), dtype=np.uint8)
    mirrored = protocol.mirror(classes)
    assert mirrored.dtype == classes.dtype
    np.testing.assert_array_equal(protocol.mirror(mirrored), classes)
    np.testing.assert_array_equal(mirrored[0], protocol.partners[classes[-1]])
    every = np.arange(protocol.num_classes)
    np.testing.assert_array_equal(np.unique(protocol.mirror(every)), every)


def test_parity_of_the_index_does_not_tell_the_side():
    # The brain stem (7) and the CSF (18) each shift the alternation, and the basal forebrain is listed left first.
    right_first = {(right, right + 1) for right in (3, 5, *range(8, 18, 2), *range(19, 35, 2), *range(41, 139, 2))}
    malp_em = PROTOCOLS["malp_em"].structures
    assert {(s.index, s.partner) for s in malp_em if s.side == "right"} == right_first | {(40, 39)}
    assert [s.index for s in malp_em if s.side == "midline"] == [1, 2, 7, 18, 35, 36, 37, 38]
    assert (malp_em[39].name, malp_em[39].side) == ("LeftBasalForebrain", "left")
    assert (malp_em[40].name, malp_em[40].side) == ("RightBasalForebrain", "right")


@pytest.mark.parametrize("name", ["malp_em", "fsl_first"])
def test_sides_agree_with_the_centroids(name):
    malp_em = {structure.name: structure.index for structure in PROTOCOLS["malp_em"].structures}
    for structure in PROTOCOLS[name].structures:
        x_mm = MALP_EM_CENTROIDS_MM[malp_em[structure.name], 0]
        if structure.side in ("left", "right") and np.isfinite(x_mm):
            assert (x_mm < 0) == (structure.side == "left"), structure  # RAS+: left is negative


@pytest.mark.parametrize("name", ["fsl_fast", "spm_tissue"])
def test_whole_brain_tissues(name):
    structures = PROTOCOLS[name].structures
    assert [(s.id, s.name, s.mapping) for s in structures[1:]] == [(1, "CSF", 3), (2, "GM", 1), (3, "WM", 2)]


def test_first_ids():
    # copied by hand from FreeSurfer's colour table
    expected = {10: "LeftThalamusProper", 11: "LeftCaudate", 12: "LeftPutamen", 13: "LeftPallidum", 16: "BrainStem"}
    expected |= {17: "LeftHippocampus", 18: "LeftAmygdala", 26: "LeftAccumbensArea", 49: "RightThalamusProper"}
    expected |= {50: "RightCaudate", 51: "RightPutamen", 52: "RightPallidum", 53: "RightHippocampus"}
    expected |= {54: "RightAmygdala", 58: "RightAccumbensArea"}
    assert {s.id: s.name for s in PROTOCOLS["fsl_first"].structures[1:]} == expected
    assert PROTOCOLS["fsl_first"].ids.tolist() == [0, *sorted(expected)]


def test_tissue_is_exactly_the_merge_of_malp_em():
    members = {
        0: {0},
        1: {1, 2, 21, 22, 23, 24},
        2: {*range(3, 12), 19, 20, *range(25, 33), *range(35, 41)},
        3: set(range(41, 139)),
        4: {12, 13, 16, 17},
        5: {14, 15, 18, 33, 34},
    }
    assert {tissue: set(np.flatnonzero(tissue == MALP_EM_TO_TISSUE)) for tissue in range(6)} == members
    assert [s.tissue for s in PROTOCOLS["malp_em"].structures] == MALP_EM_TO_TISSUE.tolist()
    assert [s.name for s in PROTOCOLS["malp_em_tissue"].structures[3:5]] == ["CorticalGM", "WM"]
    np.testing.assert_array_equal(MALP_EM_TO_TISSUE[PROTOCOLS["malp_em"].partners], MALP_EM_TO_TISSUE)


def test_centroids_and_volumes():
    assert MALP_EM_CENTROIDS_MM.shape == (139, 3)
    assert MALP_EM_VOLUMES_MM3.shape == (139,)
    missing = np.flatnonzero(np.isnan(MALP_EM_CENTROIDS_MM[:, 0]))
    assert missing.tolist() == [0, 14, 15]
    assert np.flatnonzero(MALP_EM_VOLUMES_MM3 == 0).tolist() == [0, 14, 15]
    np.testing.assert_array_equal(MALP_EM_CENTROIDS_MM[19], [26.5, *MALP_EM_CENTROIDS_MM[19, 1:]])


@each_protocol
def test_colors_can_be_told_apart(protocol):
    colors = np.array([structure.color for structure in protocol.structures])
    assert colors.min() >= 0
    assert colors.max() <= 255
    for a, b in itertools.combinations(range(protocol.num_classes), 2):
        assert np.abs(colors[a] - colors[b]).sum() >= 10, (a, b)


def test_tables_cannot_be_changed():
    for array in (PROTOCOLS["malp_em"].ids, PROTOCOLS["malp_em"].partners, MALP_EM_TO_TISSUE, MALP_EM_VOLUMES_MM3):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_the_tables_import_without_jax():
    program = "import sys, neuronet_jax; n = len(neuronet_jax.PROTOCOLS); print(n, 'jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "5 False\n"


def test_the_version_of_a_table_identifies_its_meaning():
    """The version changes with the meaning of a label, not with its colour."""
    first, *others = PROTOCOLS["fsl_fast"].structures
    swapped = (first, dataclasses.replace(others[0], name="GM"), *others[1:])
    painted = (first, dataclasses.replace(others[0], color=(1, 2, 3)), *others[1:])
    version = PROTOCOLS["fsl_fast"].version
    assert dataclasses.replace(PROTOCOLS["fsl_fast"], structures=swapped).version != version
    assert dataclasses.replace(PROTOCOLS["fsl_fast"], structures=painted).version == version
    assert len({protocol.version for protocol in PROTOCOLS.values()}) == 4  # FAST and SPM have one table
