"""A run as training leaves it, small enough to be used by real processes."""

from dataclasses import replace
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from experiments.flags import load
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs import restore as restoring
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Origin, TrainingData
from neuronet_jax.training import mesh, step

RUN_PROTOCOLS = ("fsl_fast", "fsl_first")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """Returns the folder of a run with two protocols and untrained weights."""
    return _run(tmp_path_factory.mktemp("run"), RUN_PROTOCOLS)


@pytest.fixture(scope="session")
def tiny_run_of_all(tmp_path_factory) -> Path:
    """Returns the folder of a run with all protocols."""
    return _run(tmp_path_factory.mktemp("run"), tuple(PROTOCOLS))


def _run(folder: Path, protocols: tuple[str, ...]) -> Path:
    config = load("all_targets:demo")
    settings = replace(config.model, filters=(2, 4), compute_dtype="float32")
    config = replace(config, protocols=protocols, model=settings)
    _, state = step.init_state(config, mesh.make_mesh(config, jax.devices()[:1]))
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(1, state, {}, config)
    RunDirectory(folder).describe(config, TrainingData(protocols, 2.0, (32, 32, 32), split_hash="abc"))
    return folder


@pytest.fixture(scope="session")
def noisy_heads(tmp_path_factory) -> Path:
    """Returns a folder with eight 2 mm scans of blobs, in two shapes and orientations."""
    folder = tmp_path_factory.mktemp("heads")
    for number in range(8):
        rng = np.random.default_rng(number)
        shape = (60, 70, 64) if number % 2 else (64, 60, 70)
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
        data = 600.0 * (np.sum(grid**2, axis=0) < 0.8) + rng.normal(0, 20, shape)
        for centre in rng.uniform(-0.6, 0.6, (9, 3, 1, 1, 1)):
            data += rng.uniform(-300, 500) * (np.sum((grid - centre) ** 2, axis=0) < 0.06)
        affine = np.diag([2.0 if number % 3 else -2.0, 2, 2, 1])
        nib.save(nib.Nifti1Image(np.clip(data, 0, None).astype(np.int16), affine), folder / f"head{number}.nii.gz")
    return folder


@pytest.fixture
def run(monkeypatch, tmp_path, threshold_network) -> str:
    """Returns the option `--run` of a run whose network is fast, and whose labels are known."""
    config = replace(load("tissue:demo"), protocols=("fsl_fast", "fsl_first"))
    model = Model(threshold_network, config, 2.0, Origin("test"))
    monkeypatch.setattr(restoring, "restore", lambda run: model)
    return f"--run={tmp_path}"


@pytest.fixture
def heads(tmp_path) -> Path:
    """Returns a folder with 2 mm scans: a is good, b truncated, c constant, and d without orientation."""
    rng = np.random.default_rng(0)
    for name in "abc":
        data = np.zeros((60, 70, 64), np.int16)
        data[10:50, 10:60, 10:54] = 7 if name == "c" else rng.integers(500, 900, (40, 50, 44))
        data = np.full_like(data, 5) if name == "c" else data
        nib.save(nib.Nifti1Image(data, np.diag([-2.0, 2, 2, 1])), tmp_path / f"{name}.nii.gz")
    whole = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    lost = nib.Nifti1Image(data * 0 + rng.integers(0, 900, data.shape, np.int16), np.diag([2.0, 2, 2, 1]))
    lost.set_sform(None, code=0)
    lost.set_qform(None, code=0)
    nib.save(lost, tmp_path / "d.nii.gz")
    return tmp_path
