"""The recipe of the network that ships, on grids of 6 and 4 mm: real stores, trainings and a release."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import nibabel as nib
import numpy as np
import pytest

from experiments import pretrain, train
from neuronet_jax.programs import USAGE
from neuronet_jax.runs.calibration import load_calibration
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.restore import restore
from neuronet_jax.training.mesh import make_mesh

SHAPE, AFFINE = (40, 48, 40), np.diag([4.0, 4, 4, 1])
CONFIG = """\
from experiments.configs.common import config

def get_config(variant=""):
    settings = config(("fsl_fast",), "demo")
    settings.update({
        "data": {"crop": (16, 16, 16)}, "model": {"filters": (4, 6)}, "batch": 2, "steps": {"6mm": 1, "": 2}[variant],
        "augment": {"intensity": 0.0, "flip": False}, "evaluate_subjects": 1, "checkpoint_every": 1, "log_every": 1,
    })
    return settings
"""


def ball(radius: float) -> np.ndarray:
    middle = (np.array(SHAPE).reshape(3, 1, 1, 1) - 1) / 2
    return ((np.indices(SHAPE) - middle) ** 2).sum(axis=0) <= radius**2


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The options of the command: four stripped brains and two maps of heads, all of them balls."""
    (tmp_path / "small.py").write_text(CONFIG)
    maps = tmp_path / "maps"
    maps.mkdir()
    for number in range(2):
        ids = np.zeros(SHAPE, np.int16)
        for id_, radius in ((511, 19), (515, 17), (24, 15), (3, 13), (2, 10)):
            ids[ball(radius - number)] = id_
        nib.Nifti1Image(ids, AFFINE).to_filename(maps / f"map{number}.nii.gz")
    with (tmp_path / "cohort.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "t1", "fsl_fast", "split"))
        for number, split in enumerate(("train", "train", "validation", "validation")):
            brain = ball(12 - number / 2).astype(np.uint8)
            noise = np.random.default_rng(number).normal(500, 20, SHAPE)
            nib.Nifti1Image((brain * noise).astype(np.int16), AFFINE).to_filename(tmp_path / f"t1_{number}.nii.gz")
            tissues = np.where(ball(8), 3, 2).astype(np.uint8) * brain  # white and grey matter
            nib.Nifti1Image(tissues, AFFINE).to_filename(tmp_path / f"fast_{number}.nii.gz")
            rows.writerow((number, f"t1_{number}.nii.gz", f"fast_{number}.nii.gz", split))
    return [
        f"--manifest={tmp_path / 'cohort.csv'}",
        f"--maps={maps}",
        f"--out={tmp_path / 'out'}",
        "--validation=1",
        f"--config={tmp_path / 'small.py'}",
        "--voxel-sizes-mm=6,4",
    ]


@pytest.mark.soak  # compiles two networks to train and to validate: a minute
def test_from_files_to_a_release_and_on_from_where_it_stopped(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", train.main
    monkeypatch.setattr(train, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))  # compiles sooner

    def interrupted(arguments: list[str]) -> int:
        """Ends the last training as a signal does: after a step, saved, with status 0."""
        return whole([*arguments, "--config.steps=1"])

    (out / "heads-6mm").mkdir(parents=True)
    (out / "heads-6mm" / "unfinished.json").write_text("{}")  # of a command that was killed
    monkeypatch.setattr(train, "main", interrupted)
    assert pretrain.main(given) == 0
    assert "stopped as asked; the same command continues" in capsys.readouterr().out
    assert not (out / "release").exists()

    monkeypatch.setattr(train, "main", whole)
    assert pretrain.main(given) == 0
    printed = capsys.readouterr().out
    assert "small.py:6mm" not in printed and "data_prep" not in printed  # done before
    assert Checkpoints(out / "run-4mm", read_only=True).latest() == 2
    origin = restore(out / "release").origin
    assert origin.note == pretrain.NOTE
    calibration = load_calibration(str(out / "release"), origin.step)
    assert calibration.heads == 4  # brains and painted heads, two each; training took one each
    data = RunDirectory(out / "run-4mm").training_data()
    assert data is not None and data.begun_with is not None
    assert (data.begun_with.config, data.begun_with.step) == ("small:6mm", 1)
    assert Checkpoints(out / "run-6mm", read_only=True).latest() == 1

    assert pretrain.main(given) == 0
    assert capsys.readouterr().out == f"the release is in {out}/release\n"


def test_a_damaged_store_is_named_and_kept(
    given: list[str], tmp_path: Path, build_store: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("brains-6mm", "heads-6mm"):
        build_store(str(tmp_path / "out" / name), ("train", "validation"))
    described = tmp_path / "out" / "heads-6mm" / "store.json"
    described.write_text(described.read_text() + " ")
    assert pretrain.main(given) == 1
    assert "E_MISMATCH" in capsys.readouterr().err
    assert described.read_text().endswith(" ")  # nothing was painted over it


def test_a_wrong_setting_is_refused_before_anything_is_built(given: list[str], tmp_path: Path) -> None:
    assert pretrain.main([*given, "--config.optimizer.rate=1"]) == USAGE
    assert not (tmp_path / "out").exists()


def test_grids_go_from_coarse_to_fine(given: list[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain.main([*given, "--voxel-sizes-mm=1,2"])
