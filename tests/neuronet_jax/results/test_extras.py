"""The brain mask, its volumes, and what is written on request, through the real command."""

import csv
import math
import re

import nibabel as nib
import numpy as np
import pytest
from nibabel.freesurfer.mghformat import MGHImage

from neuronet_jax.cli import main
from neuronet_jax.evaluation import volumetry
from neuronet_jax.runs.calibration import Calibration, Spread, save_calibration


def test_mask_and_volumes_by_hand():
    fast = np.zeros((9, 9, 9), np.uint8)
    fast[1:8, 1:8, 1:8] = 1  # CSF around
    fast[2:7, 2:7, 2:7] = 2  # GM
    fast[3:6, 3:6, 3:6] = 3  # WM
    fast[4, 4, 4] = 0  # a hole
    spm = np.where(fast == 1, 0, fast)  # no CSF
    first = np.where(fast == 3, 17, 0).astype(np.uint8)
    maps = {"fsl_fast": fast, "fsl_first": first, "spm_tissue": spm}
    mm3 = volumetry.volumes_mm3(volumetry.voxel_counts(maps), np.diag([2.0, 1, 1, 1]))
    assert mm3["fsl_first"][17] == 2 * 26
    assert volumetry.brain_mm3(mm3) == 2 * (125 - 1)
    assert volumetry.intracranial_mm3(mm3) == 2 * ((343 - 1) + (125 - 1)) / 2
    mask = volumetry.brain_mask(maps)
    assert mask is not None and mask.sum() == 343 and mask[4, 4, 4] == 1  # half of two tools, and no hole
    third = volumetry.brain_mask({**maps, "malp_em": np.where(spm > 0, 4, 0), "malp_em_tissue": fast})
    assert third is not None and third.sum() == 125  # MALP-EM counts once, by its structures
    assert volumetry.brain_mask({"fsl_first": first}) is None and np.isnan(
        volumetry.brain_mm3({"fsl_first": mm3["fsl_first"]})
    )


def test_volumes_have_the_intervals_of_the_runs_calibration(run, heads, tmp_path):
    """Twice what the network finds, times or by 1.5; FIRST is not calibrated."""
    spread = Spread((0.0, math.log(2), 0.0, 0.0), (), (math.log(1.5),), 0.91)
    save_calibration(str(tmp_path), Calibration(0, 3, {}, None, volumes={"fsl_fast": spread}))
    out = tmp_path / "out"
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={out}"]) == 0
    with (out / "sub-a" / "anat" / "sub-a_volumes.tsv").open(newline="") as file:
        rows = {(row["protocol"], row["name"]): row for row in csv.DictReader(file, delimiter="\t")}
    found = rows["fsl_fast", "CSF"]
    volume, low, high = (float(found[name]) for name in ("volume_mm3", "low_mm3", "high_mm3"))
    assert volume > 0 and low == pytest.approx(2 * volume / 1.5, abs=0.1) and high == pytest.approx(3 * volume, abs=0.1)
    others = [row for name, row in rows.items() if name != ("fsl_fast", "CSF")]
    assert {row["low_mm3"] for row in others} == {row["high_mm3"] for row in others} == {"n/a"}
    page = (out / "sub-a" / "anat" / "sub-a_report.html").read_text()
    assert "fsl_fast 91%" in page and f"{low / 1000:.0f}" in page
    assert re.findall('number">(.* to .*)', page) == [f"{low:.0f} to {high:.0f}"]  # what was not found has none


def test_what_is_asked_for_is_written_later_too(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={out}", "--no-report"]
    assert main(command) == 0
    folder = out / "sub-a" / "anat"
    assert not [*folder.glob("*.stats"), *folder.glob("*.mgz"), *folder.glob("*res-1mm*")]
    assert main([*command, "--also=stats,mgz,1mm"]) == 0
    source = nib.Nifti1Image.from_filename(heads / "a.nii.gz")
    assert source.affine is not None
    labels = np.asarray(nib.Nifti1Image.from_filename(folder / "sub-a_seg-fslfirst_dseg.nii.gz").dataobj)
    mgz = MGHImage.from_filename(folder / "sub-a_seg-fslfirst_dseg.mgz")
    np.testing.assert_array_equal(np.asarray(mgz.dataobj), labels)
    assert mgz.affine is not None
    np.testing.assert_allclose(mgz.affine, source.affine)
    fine = nib.Nifti1Image.from_filename(folder / "sub-a_seg-fslfirst_res-1mm_dseg.nii.gz")
    assert fine.affine is not None
    assert nib.aff2axcodes(fine.affine) == ("R", "A", "S") and set(fine.header.get_zooms()) == {1.0}
    here = np.argwhere(np.asarray(fine.dataobj) == 10)[::500]
    there = np.linalg.inv(source.affine) @ fine.affine @ np.c_[here, np.ones(len(here))].T
    assert len(here) > 50 and (labels[tuple(np.round(there[:3] - 1e-6).astype(int))] == 10).mean() > 0.9  # ties go down
    text = (folder / "sub-a_seg-fslfirst.stats").read_text()
    row = re.search(r"^ +1 +10 +(\d+) +([\d.]+)  LeftThalamusProper +([\d.]+)", text, re.MULTILINE)
    assert row and int(row[1]) == (labels == 10).sum() and float(row[2]) == 8 * (labels == 10).sum()
    assert float(row[3]) == pytest.approx(source.get_fdata()[labels == 10].mean(), abs=1e-3)
    with (out / "summary.tsv").open(newline="") as file:
        (summary,) = csv.DictReader(file, delimiter="\t")
    measured = re.search(r"# Measure EstimatedTotalIntraCranialVol, eTIV, [\w ]+, ([\d.]+), mm\^3", text)
    assert measured and float(measured[1]) / 1000 == pytest.approx(float(summary["intracranial_ml"]), abs=0.05)
    mask = np.asarray(nib.Nifti1Image.from_filename(folder / "sub-a_desc-brain_mask.nii.gz").dataobj)
    fast = np.asarray(nib.Nifti1Image.from_filename(folder / "sub-a_seg-fslfast_dseg.nii.gz").dataobj)
    assert set(np.unique(mask)) == {0, 1} and (mask >= (fast > 0)).all()
    assert main([*command, "--also=nifti"]) == 2
    assert "--also takes stats, mgz, 1mm, not 'nifti'" in capsys.readouterr().err
