"""A run as training leaves it, small enough to be used by real processes."""

from dataclasses import replace
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from experiments.flags import load
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.provenance import TrainingData
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
