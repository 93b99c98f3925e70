"""Scores of raw scans on their own grids, by the command and by hand-derived Dice."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from experiments import score
from experiments.flags import load
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Origin

NAMES = ("fsl_fast", "fsl_first")
AFFINE = np.diag([-2.0, 2, 2, 1])  # 2 mm, left to right reversed


@pytest.fixture
def command(threshold_network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command on `tmp_path / "cohort.csv"`, whose scans are a bright box."""
    model = Model(
        threshold_network, replace(load("tissue:demo"), protocols=NAMES), 2.0, Origin("tissue:demo", 7, "abc")
    )
    monkeypatch.setattr(score, "restore", lambda *runs: model)
    rows = ["id,t1,fsl_fast,fsl_first,split"]
    for number, split in enumerate(("test", "train", "test")):
        image = np.full((48, 44, 50), 5, np.float32)
        image[10:20, 10:20, 10:20] = 500
        fast, first = np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint8)
        fast[10:20, 10:20, 10:20] = 1
        first[10:20, 10:20, 10:15] = 10  # half of the left thalamus that is found there
        for name, data in (("t1", image), ("fast", fast), ("first", first)):
            nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / f"{name}{number}.nii.gz")
        first_map = f"first{number}.nii.gz" if number != 2 else ""
        rows.append(f"p{number},t1{number}.nii.gz,fast{number}.nii.gz,{first_map},{split}")
    (tmp_path / "cohort.csv").write_text("\n".join(rows) + "\n")
    fixed = (f"--manifest={tmp_path / 'cohort.csv'}", f"--out={tmp_path / 'scores'}")
    return lambda *options: score.main([*fixed, *options])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_every_scan_of_the_split_is_scored_once(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--split=test") == 0
    written = (tmp_path / "scores" / "summary.json").read_text()
    fast, first = (json.loads(written)["protocols"][name] for name in NAMES)
    assert (fast["mean"], fast["subjects"]) == (1.0, 2)
    assert (first["mean"], first["subjects"]) == (pytest.approx(2 / 3), 1)  # 2·500 / (500 + 1000); one scan has no map
    assert "p0" not in written and json.loads(written)["grid"] == "of each scan"
    found = {(r["subject"], r["protocol"], r["index"]): r["dice"] for r in _rows(tmp_path / "scores" / "dice.tsv")}
    assert {key: value for key, value in found.items() if value != "nan"} == {
        ("p0", "fsl_fast", "1"): "1.000000",
        ("p2", "fsl_fast", "1"): "1.000000",
        ("p0", "fsl_first", "10"): "0.666667",
    }
    assert command("--split=test") == 1 and "add --overwrite to replace it" in capsys.readouterr().err


def test_maps_that_cannot_be_compared_are_refused(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = nib.Nifti1Image(np.zeros((48, 44, 50), np.uint8), AFFINE + np.eye(4, k=3))
    nib.save(moved, tmp_path / "fast1.nii.gz")
    assert command("--split=train") == 1
    said = capsys.readouterr().err
    assert "row 3 of the manifest: E_GEOMETRY: the map of fsl_fast lies on a different grid than its scan" in said
    (tmp_path / "t11.nii.gz").unlink()
    assert command("--split=train") == 1
    assert f"row 3 of the manifest: E_IO: {tmp_path / 't11.nii.gz'}: the file cannot be read" in capsys.readouterr().err
    assert command("--split=validation") == 1
    assert "no row of the manifest's validation has a label map of fsl_fast, fsl_first" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()
