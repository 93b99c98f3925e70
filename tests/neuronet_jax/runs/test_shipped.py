"""The network that ships with the package, and its card."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

import neuronet_jax
from experiments.flags import load
from neuronet_jax import cli
from neuronet_jax.errors import NeuronetError
from neuronet_jax.images import nifti
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs import directory
from neuronet_jax.runs.calibration import load_calibration
from neuronet_jax.runs.directory import SHIPPED
from neuronet_jax.runs.model import Model

MOST_WEIGHTS_BYTES = 12_000_000  # what a wheel can carry
HELD_OUT = "1015"  # of the validation split of the cohort
ROOT = Path(__file__).resolve().parents[3]
CARD = SHIPPED / "MODEL_CARD.md"


@pytest.fixture(scope="module")
def model() -> Model:
    return neuronet_jax.restore()


def test_it_knows_every_protocol_and_says_whose_weights_they_are(model: Model) -> None:
    assert model.config.protocols == tuple(PROTOCOLS) and model.config.name == "pretrained"
    assert "CC BY-NC" in model.origin.note and model.config.data.store == ""
    assert (SHIPPED / "weights.safetensors").stat().st_size < MOST_WEIGHTS_BYTES


def test_its_quality_scores_are_calibrated(model: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration = load_calibration(str(SHIPPED), model.origin.step)
    assert calibration.heads >= 3 and set(calibration.lines) == set(PROTOCOLS)


def test_the_card_is_of_these_weights(model: Model) -> None:
    text = CARD.read_text(encoding="utf-8")
    assert model.origin.weights_sha256 in text and f"{model.voxel_size_mm:g} mm" in text
    assert re.search(rf"\b{model.origin.step:,} steps\b", text)
    assert text == (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")  # the same on the pages


def test_the_recipe_is_the_one_that_it_was_trained_with(model: Model, tmp_path: Path) -> None:
    """Older weights under a newer recipe would make the card wrong. The length may change: weights can go on."""
    recipe = load("pretrained", [f"--config.data.store={tmp_path}"])
    for part in ("protocols", "model", "augment", "loss", "batch", "seed"):
        assert getattr(model.config, part) == getattr(recipe, part)
    assert model.config.data.weights == recipe.data.weights and model.config.data.crop == recipe.data.crop


def test_one_command_segments_a_scan_with_it_and_says_so(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a brain that it was not trained on, all deep structures are where they are, left and right apart."""
    subject, out = real_data / "cohort" / HELD_OUT, tmp_path / "labels"
    assert (
        cli.main(["segment", str(subject / "T1.nii.gz"), f"--out={out}", "--protocols=fsl_first", "--no-report"]) == 0
    )
    assert "no --run: using the network that ships with neuronet-jax (1 mm; " in capsys.readouterr().err
    (written,) = out.rglob("*_dseg.nii.gz")
    ours, theirs = (nifti.read_labels(path).data for path in (written, subject / "T1_first_all_fast_firstseg.nii.gz"))
    ids = [structure.id for structure in PROTOCOLS["fsl_first"].structures if structure.id]
    dice = [2 * np.sum((ours == i) & (theirs == i)) / (np.sum(ours == i) + np.sum(theirs == i)) for i in ids]
    assert min(dice) > 0.3 and np.mean(dice) > 0.7


def test_an_installation_without_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "SHIPPED", tmp_path)
    with pytest.raises(NeuronetError, match=r"this installation holds no trained network .* name one with --run"):
        neuronet_jax.restore()
