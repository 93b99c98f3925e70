"""Removes, measures and records labels that lie apart from the brain, and leaves reference maps as they are."""

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from neuronet_jax.cli import main
from neuronet_jax.images import nifti
from neuronet_jax.inference.cleanup import clean_up
from neuronet_jax.labels import PROTOCOLS

LABEL: Any = ndimage.label  # its types differ between releases of SciPy's stubs
VOXEL_ML = 0.008  # of 2 mm
SPACING_MM = (20.0, 20.0, 20.0)  # so large that no voxel is part of a bridge


def _row(out: Path) -> dict[str, str]:
    with (out / "summary.tsv").open(newline="") as file:
        (row,) = csv.DictReader(file, delimiter="\t")
    return row


def _head(path: Path, *boxes: tuple[slice, ...]) -> np.ndarray:
    """Writes an image whose labels, by the network of the tests, are these boxes; returns them."""
    labelled = np.zeros((80, 80, 80), bool)
    for box in boxes:
        labelled[box] = True
    noise = np.random.default_rng(0).integers(0, 20, labelled.shape)
    nib.save(nib.Nifti1Image((labelled * 900 + noise).astype(np.int16), np.diag([2.0, 2, 2, 1])), path)
    return labelled


def test_pieces_apart_are_removed_measured_and_recorded(run, tmp_path):
    brain, piece = np.s_[10:60, 10:60, 30:70], np.s_[20:35, 20:35, 5:15]
    labelled = _head(tmp_path / "neck.nii.gz", brain, piece)
    command = ["segment", str(tmp_path / "neck.nii.gz"), run]
    assert main([*command, f"--out={tmp_path / 'clean'}"]) == 0
    assert main([*command, f"--out={tmp_path / 'raw'}", "--no-clean-up"]) == 0
    removed_ml = 15 * 15 * 10 * VOXEL_ML
    for name, kept, row in (("clean", brain, f"{removed_ml:.1f}"), ("raw", np.s_[:], "n/a")):
        anat = tmp_path / name / "sub-neck" / "anat"
        for protocol in ("fslfast", "fslfirst"):
            ids = nifti.read_labels(anat / f"sub-neck_seg-{protocol}_dseg.nii.gz").data
            expected = np.zeros_like(labelled)
            expected[kept] = labelled[kept]
            np.testing.assert_array_equal(ids > 0, expected)
            sidecar = json.loads((anat / f"sub-neck_seg-{protocol}_dseg.json").read_text())
            assert sidecar.get("RemovedMillilitres") == (removed_ml if name == "clean" else None)
        assert _row(tmp_path / name)["removed_ml"] == row
        assert ("W_PIECES" in _row(tmp_path / name)["warnings"]) == (name == "clean")  # 18 ml
        record = json.loads((anat / "sub-neck_provenance.json").read_text())
        assert record["model"].get("clean_up", True) == (name == "clean")
    assert f"{removed_ml:.1f} ml</dd>" in (tmp_path / "clean/sub-neck/anat/sub-neck_report.html").read_text()


def test_a_neck_on_a_bridge_is_removed_too(run, tmp_path):
    neck, bridge = np.s_[20:50, 20:50, 5:20], np.s_[34:36, 34:36, 20:30]  # the bridge is 4 mm wide
    _head(tmp_path / "neck.nii.gz", np.s_[10:60, 10:60, 30:70], bridge, neck)
    assert main(["segment", str(tmp_path / "neck.nii.gz"), run, f"--out={tmp_path / 'out'}"]) == 0
    for path in (tmp_path / "out").rglob("*_dseg.nii.gz"):
        ids = nifti.read_labels(path).data
        assert ids[10:60, 10:60, 30:70].all() and not ids[neck].any(), path.name
    row = _row(tmp_path / "out")
    assert float(row["removed_ml"]) >= 30 * 30 * 15 * VOXEL_ML and "W_PIECES" in row["warnings"]


def test_a_labelled_neck_is_too_large_and_not_a_cut_brain(run, tmp_path, capsys):
    _head(tmp_path / "long.nii.gz", np.s_[5:75, 5:75, 0:70])  # 2,744 ml that reach the lower border
    assert main(["segment", str(tmp_path / "long.nii.gz"), run, f"--out={tmp_path / 'out'}"]) == 0
    warnings = _row(tmp_path / "out")["warnings"].split(",")
    assert "W_BRAIN_VOLUME" in warnings and "W_CUT" not in warnings
    page = (tmp_path / "out" / "sub-long" / "anat" / "sub-long_report.html").read_text()
    assert "fsl_fast: 2744 ml, too large." in page and "too small:" not in page
    _head(tmp_path / "cut.nii.gz", np.s_[5:75, 5:75, 0:50])  # 1,960 ml: possible, and cut
    assert main(["segment", str(tmp_path / "cut.nii.gz"), run, f"--out={tmp_path / 'cut'}"]) == 0
    warnings = _row(tmp_path / "cut")["warnings"].split(",")
    assert "W_CUT" in warnings and "W_BRAIN_VOLUME" not in warnings


@pytest.mark.parametrize("name", PROTOCOLS)
def test_cleaning_equals_the_largest_component_and_is_idempotent(name):
    rng = np.random.default_rng(0)
    classes = np.kron(rng.integers(0, 4, (10, 10, 10)), np.ones((3, 3, 3))).astype(np.uint8)
    classes[rng.random(classes.shape) < 0.4] = 0
    before = classes.copy()
    maps, counts = clean_up({name: classes}, SPACING_MM)
    cleaned, removed = maps[name], counts[name]
    np.testing.assert_array_equal(classes, before)  # the caller's array stays
    assert removed == np.count_nonzero(before != cleaned) > 0 and not cleaned[before != cleaned].any()
    wholes = [cleaned == k for k in (1, 2, 3)] if name == "fsl_first" else [cleaned > 0]
    for whole, mask in zip(wholes, [before == k for k in (1, 2, 3)] if len(wholes) > 1 else [before > 0], strict=True):
        labelled, count = LABEL(mask)
        assert count > 1 and LABEL(whole)[1] == 1
        assert np.count_nonzero(whole) == np.bincount(labelled.ravel())[1:].max()
    again, nothing = clean_up({name: cleaned}, SPACING_MM)
    assert nothing == {name: 0} and again[name] is cleaned
    assert clean_up({name: np.zeros_like(classes)}, SPACING_MM)[1] == {name: 0}


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.7, 1.0, 2.5)])
@pytest.mark.parametrize("names", [["fsl_fast"], ["malp_em"], [*PROTOCOLS]])
def test_what_hangs_on_the_brain_by_a_bridge_is_removed(spacing_mm, names):
    """A neck of 160 ml at the end of a bridge 6 mm wide. Sulci of 4 mm cut into half of the brain from above."""
    sides_mm = [np.arange(0.5, length / side) * side for length, side in zip((70, 110, 140), spacing_mm, strict=True)]
    x, y, z = np.meshgrid(*sides_mm, indexing="ij")
    brain = ((x - 35) / 30) ** 2 + ((y - 55) / 50) ** 2 + ((z - 95) / 35) ** 2 < 1
    brain &= ~((z > 110) & (y < 55) & (y % 10 > 6))
    bridge = (abs(x - 35) < 3) & (abs(y - 55) < 3) & (z > 40) & (z < 70)
    neck = (abs(x - 35) < 25) & (abs(y - 55) < 40) & (z > 5) & (z < 45)
    classes = (brain | bridge | neck).astype(np.uint8)
    assert LABEL(classes)[1] == 1  # all of it is the largest component
    cleaned, removed = clean_up(dict.fromkeys(names, classes), spacing_mm)
    for name in names:
        kept = cleaned[name] > 0
        np.testing.assert_array_equal(kept & brain, brain)
        assert not (kept & (z < 45)).any()
        assert removed[name] == np.count_nonzero(classes) - np.count_nonzero(kept)


def test_reference_maps_stay_as_they_are(real_data):
    """Two of the 15 brains; the docstring of `cleanup` has the figures for all."""
    for subject in ("1000", "1002"):
        folder = real_data / "cohort" / subject
        maps = {name: p.to_classes(nifti.read_labels(folder / p.filename).data) for name, p in PROTOCOLS.items()}
        for asked in (maps, {"malp_em": maps["malp_em"]}):
            for name, removed in clean_up(asked, (1.0, 1.0, 1.0))[1].items():
                assert removed <= 0.0005 * np.count_nonzero(maps[name]), name
