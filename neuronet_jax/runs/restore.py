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
from neuronet_jax.models.network import build
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import TRAINING_DATA, RunDirectory
from neuronet_jax.runs.model import Model, ensemble
from neuronet_jax.runs.provenance import Origin
from neuronet_jax.runs.release import restore_release


def restore(run: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Model:
    """Reads the model of a run directory (local or gs://): its best checkpoint by validation Dice, else the latest.

    A release, as `neuronet export` writes it, works too. Several runs give their ensemble: the mean of their scores.
    Averaged weights are used if a run has them. Raises NeuronetError if a folder is not a run, if its checkpoints are
    damaged or do not fit this release, or if the runs predict different protocols or work at different voxel sizes.
    """
    return ensemble(_restore(os.fspath(run)), *(_restore(os.fspath(other)) for other in more))


def _restore(run: str) -> Model:
    folder = RunDirectory(run)
    if folder.is_release():
        return restore_release(run)
    data = folder.training_data()
    if data is None:
        raise NeuronetError(f"{run} holds no run (no {TRAINING_DATA}); --run takes the --workdir of a training run")
    checkpoints = Checkpoints(run, read_only=True)
    try:
        step = checkpoints.best() or checkpoints.latest()
        if step is None:
            raise NeuronetError(f"{run} holds no finished checkpoint yet; train longer, or give a different --run")
        config = checkpoints.config(step)
        settings = config.model.on(jax.local_devices()[0].platform)
        shapes = nnx.eval_shape(lambda: build(settings, config.protocols, config.seed))
        structure, params, moments = nnx.split(shapes, nnx.Param, nnx.BatchStat, graph=False)
        averaged = config.optimizer.ema_decay > 0
        target = {"average": (params, moments)} if averaged else {"params": params, "moments": moments}
        try:
            state, step = checkpoints.restore_params(target, step)
        except NeuronetError as error:
            warnings.warn(
                CodedWarning("W_CHECKPOINT", f"{error}; taking the latest sound checkpoint instead"), stacklevel=3
            )
            state, step = checkpoints.restore_params(target)
    finally:
        checkpoints.close()
    weights = state["average"] if averaged else (state["params"], state["moments"])
    # copied through the host, so that they are not bound to the device that read them
    params, moments = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), weights)
    digest = weights_sha256(params, moments)
    origin = Origin(config.name, step, data.split_hash, digest, data.note, data.imported)
    return Model(nnx.merge(structure, params, moments), config, data.voxel_size_mm, origin)


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
