"""A trained network with what is needed to apply it: `restore` reads one, or an ensemble, from training runs."""

import hashlib
import os
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.config import Config
from neuronet_jax.devices import over_cores
from neuronet_jax.errors import CodedWarning, NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.models.network import build
from neuronet_jax.store.schema import StoreInfo
from neuronet_jax.inference.tiling import MEMORY_SHARE, memory_bytes

# Peak memory per voxel, five protocols in float32: 7.6 GiB were measured on CPU for a head of 192 × 224 × 224, with its
# confidence and its interpolation.
VOXEL_BYTES = 850


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network and what is needed to apply it to any head."""

    # nnx module; `features(image f32[b x y z 1])` gives its features and readout, `labels(image)` u8[b p x y z], both
    # with the protocols in the order of config.protocols
    network: Any
    config: Config
    voxel_size_mm: float  # of the grid that it was trained on
    provenance: dict[str, Any] = field(default_factory=dict)  # where the weights come from, as JSON
    max_voxels: int = 0  # larger volumes are tiled; 0: what the device's memory allows
    others: tuple["Model", ...] = ()  # further members of an ensemble, whose scores are averaged with this one's

    def labels(self, image: Float[np.ndarray, "b x y z 1"]) -> UInt8[np.ndarray, "b p x y z"]:
        """The class indices of this network alone, compiled once per shape."""
        return np.asarray(_labels(*self.parts, over_cores(image, 2, self.config.model.stride)))

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """Structure and arrays of the network: what a compiled program takes."""
        return nnx.split(self.network, graph=False)

    @property
    def members(self) -> tuple["Model", ...]:
        return (self, *self.others)

    @property
    def voxel_budget(self) -> int:
        return self.max_voxels or int(MEMORY_SHARE * memory_bytes() / VOXEL_BYTES)


@partial(jax.jit, static_argnums=0)
def _labels(structure: Any, arrays: Any, image: jax.Array) -> jax.Array:
    # the structure is part of the key: models that differ in weights alone, as in validation, share programs
    return nnx.merge(structure, arrays).labels(image)


def restore(run: str | os.PathLike[str], *more: str | os.PathLike[str]) -> Model:
    """The model of a run directory (local or gs://): its best checkpoint by validation Dice, else the latest. Or that
    of a release, as `neuronet export` writes it.

    With several runs their ensemble: the mean of the scores of all. The averaged weights are taken where a run kept
    them. Raises NeuronetError where a folder is no run, its checkpoints are damaged or do not fit this release, or the
    runs predict different protocols or work at different voxel sizes.
    """
    return ensemble(_restore(os.fspath(run)), *(_restore(os.fspath(other)) for other in more))


def ensemble(first: Model, *others: Model) -> Model:
    """One model that averages the scores of all. Raises NeuronetError where they do not predict the same."""
    for other in others:
        for what, mine, its in (
            ("protocols", ", ".join(first.config.protocols), ", ".join(other.config.protocols)),
            ("voxel size in mm", first.voxel_size_mm, other.voxel_size_mm),
        ):
            if mine != its:
                raise NeuronetError(f"an ensemble needs models of one {what}, got {mine} and {its}: run them apart")
    if not others:
        return first
    provenance: dict[str, Any] = {"ensemble": [model.provenance for model in (first, *others)]}
    if note := "; ".join(dict.fromkeys(m.provenance["note"] for m in (first, *others) if "note" in m.provenance)):
        provenance["note"] = note
    return replace(first, provenance=provenance, others=others)


def _restore(run: str) -> Model:
    if Files(run).read("release.json") is not None:
        from neuronet_jax.runs.release import restore_release

        return restore_release(run)
    data = Files(run).read("store.json")
    if data is None:
        raise NeuronetError(f"{run} holds no run (no store.json); --run takes the --workdir of a training run")
    info = StoreInfo.from_json(data)
    checkpoints = Checkpoints(run, read_only=True)
    try:
        step = checkpoints.best() or checkpoints.latest()
        if step is None:
            raise NeuronetError(f"{run} holds no finished checkpoint yet; train longer, or give another --run")
        config = checkpoints.config(step)
        shapes = nnx.eval_shape(lambda: build(config.model, config.protocols, config.seed))
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
    # anew from the host: not bound to the device that they were read to
    params, moments = jax.tree.map(lambda array: jnp.asarray(np.asarray(array)), weights)
    provenance = {
        "config": config.name,
        "step": step,
        "split_hash": info.split_hash,
        "weights_sha256": weights_sha256(params, moments),
    }
    if note := info.provenance.get("note"):  # such as: a demonstration on synthetic heads
        provenance["note"] = note
    if imported := info.provenance.get("imported"):  # the files that the weights come from
        provenance["imported"] = imported
    return Model(nnx.merge(structure, params, moments), config, info.voxel_size_mm, provenance)


def weights_sha256(params: Any, moments: Any) -> str:
    """Names the weights, wherever they are stored: SHA-256 over path, type, shape and little-endian values of each
    array, in the order of the paths.
    """
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "moments": moments})
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
    for path in sorted(named):
        array = named[path].astype(named[path].dtype.newbyteorder("<"))
        digest.update(f"{path} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
