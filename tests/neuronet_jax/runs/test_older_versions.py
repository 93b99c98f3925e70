"""Runs and releases of older versions open, and give the same labels as before.

goldens/run_v1       two steps of training by version 0.1.0: two protocols, a network of 12 kB
        release_v1   its export, by the same version
        labels_v1    the labels of `_head()` from that version's `segment` with them
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from neuronet_jax.errors import NeuronetError
from neuronet_jax.inference.segment import segment
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.runs.calibration import load_calibration
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.restore import restore
from neuronet_jax.training.mesh import make_mesh
from neuronet_jax.training.step import ADDED, init_state

GOLDENS = Path(__file__).parent / "goldens"
WEIGHTS = "edf8985e12c65b6fda533b00f7a03cdaa0c72d67faa70c8114026eda64cc3258"


def _head() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 20, (18, 20, 17)).astype(np.float32)


@pytest.mark.parametrize("name", ["run_v1", "release_v1"])
def test_a_golden_run_and_release_segment_as_they_did(name):
    model = restore(GOLDENS / name)
    assert (model.config.protocols, model.voxel_size_mm) == (("fsl_fast", "fsl_first"), 2.0)
    assert model.provenance.to_json() == {
        "config": "tissue:demo",
        "step": 1,
        "split_hash": "39f3498772ee7571128826c759cc538337d085b913f28707c4a509857cc69bba",
        "weights_sha256": WEIGHTS,
        "note": "made for a test",
    }
    assert load_calibration(str(GOLDENS / name), 1).heads == 2
    labels = segment(model, _head(), options=Options(clean_up=False))
    with np.load(GOLDENS / "labels_v1.npz") as golden:
        assert labels.keys() == golden.keys()
        for protocol, expected in golden.items():  # another processor may round a tie differently
            assert (labels[protocol] == expected).mean() > 0.999, protocol


def test_training_continues_from_a_golden_run(tmp_path, caplog):
    """The whole state fits: parameters, moments, optimiser, averages and the position in the data. What the older
    version did not count begins at zero.
    """
    shutil.copytree(GOLDENS / "run_v1", tmp_path / "run")
    with Checkpoints(tmp_path / "run") as checkpoints:
        config = checkpoints.config(1)
        _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
        with pytest.raises(NeuronetError, match="skipped_total: not in the checkpoint"):
            checkpoints.restore(state, strict=True)
        restored = checkpoints.restore(state, strict=True, added=ADDED)
    assert int(restored.state.step) == 1 and restored.data_position is not None
    assert [int(getattr(restored.state, name)) for name in ADDED] == [0, 0, 0]
    assert "of an older release without skipped_total, norm_average, norms, which begin anew" in caplog.text
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 2
