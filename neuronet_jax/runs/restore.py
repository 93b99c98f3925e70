"""Reads a trained model, or an ensemble of several, from training runs and releases."""

import hashlib
import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neuronet_jax.errors import CodedWarning, NeuronetError
from neuronet_jax.models.network import abstract
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import TRAINING_DATA, RunDirectory, shipped
from neuronet_jax.runs.model import Model, ensemble
from neuronet_jax.runs.provenance import Origin, TrainingData
from neuronet_jax.runs.release import restore_release


def restore(*runs: str | os.PathLike[str]) -> Model:
    """Reads the model of a run directory (local or gs://): its best checkpoint by validation Dice, else the latest.

    Without a run, it is the network that ships with the package. A release, as `neuronet export` writes it, works too.
    Several runs give their ensemble: the mean of their scores.
    Averaged weights are used if a run has them. Raises NeuronetError if a folder is not a run, if its checkpoints are
    damaged or do not fit this release, or if the runs predict different protocols or work at different voxel sizes.
    """
    return ensemble(*(_restore(os.fspath(run)) for run in runs or (shipped(),)))


def _restore(run: str) -> Model:
    model = restore_release(run) if RunDirectory(run).is_release() else _restore_run(run)
    leaves = jax.tree.leaves(nnx.state(model.network, graph=False))
    if not all(np.isfinite(leaf).all() for leaf in leaves):
        raise NeuronetError(
            f"the weights in {run} are not all finite numbers; copy the run, or fetch the release, again"
        )
    return model


def _restore_run(run: str) -> Model:
    data = RunDirectory(run).training_data()
    if data is None:
        raise NeuronetError(f"{run} holds no run (no {TRAINING_DATA}); --run takes the --workdir of a training run")
    with Checkpoints(run, read_only=True) as checkpoints:
        if checkpoints.latest() is None:
            raise NeuronetError(f"{run} holds no finished checkpoint yet; train longer, or give a different --run")
        sound = checkpoints.sound()
        for step, fault in checkpoints.faults.items():
            _passed_over(f"checkpoint {step} of {run} is damaged and passed over: {fault}")
        if not sound:
            raise NeuronetError(f"all checkpoints of {run} are damaged; copy the run again")
        # The best, else the latest. A sound one may still not fit its own config, or a writer has just removed it.
        first_error = None
        for step in dict.fromkeys([checkpoints.best(sound) or sound[-1], *reversed(sound)]):
            try:
                return _read(checkpoints, step, data)
            except NeuronetError as error:
                first_error = first_error or error
                if step != sound[0]:
                    _passed_over(f"{error}; taking a different sound checkpoint instead")
        assert first_error is not None
        raise first_error


def _read(checkpoints: Checkpoints, step: int, data: TrainingData) -> Model:
    """Returns the model of one checkpoint."""
    config = checkpoints.config(step)
    network = abstract(config.model.on(jax.local_devices()[0].platform), config.protocols)
    structure, params, moments = nnx.split(network, nnx.Param, nnx.BatchStat, graph=False)
    averaged = config.optimizer.ema_decay > 0
    target = {"average": (params, moments)} if averaged else {"params": params, "moments": moments}
    state, _ = checkpoints.restore_params(target, step)
    weights = state["average"] if averaged else (state["params"], state["moments"])
    # copied through the host, so that they are not bound to the device that read them
    params, moments = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), weights)
    digest = weights_sha256(params, moments)
    origin = Origin(config.name, step, data.split_hash, digest, data.note, data.imported)
    return Model(nnx.merge(structure, params, moments), config, data.voxel_size_mm, origin)


def _passed_over(why: str) -> None:
    warnings.warn(CodedWarning("W_CHECKPOINT", why), stacklevel=5)


def weights_sha256(params: Any, moments: Any) -> str:
    """Returns a SHA-256 that identifies the weights, wherever they are stored.

    It covers path, type, shape and little-endian values of each array, in the order of the paths.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "moments": moments})
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    for path in sorted(named):
        array = named[path].astype(named[path].dtype.newbyteorder("<"))
        digest.update(f"{path} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
