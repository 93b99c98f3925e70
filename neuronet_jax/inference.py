"""From an image to label maps on its own grid: `restore` a trained model, then `segment` anything with it.

The way of an image: conform (RAS+, the model's voxel size) → whiten → pad to a shape bucket → network → crop → tool ids
→ back onto the input's grid. Volumes that would not fit into memory go through the network in tiles, whose labels equal
those of the whole volume.
"""

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import jax
import nibabel as nib
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from nibabel.spatialimages import SpatialImage

from neuronet_jax import intensity, nifti, space
from neuronet_jax.checkpoint import Checkpoints
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models import build
from neuronet_jax.schema import StoreInfo

BUCKET = 32  # sides are padded to multiples of it: heads come in few shapes, so programs are compiled rarely
VOXEL_BYTES = 640  # peak memory of the network per voxel: 560 by the compiler for five protocols in float32, rounded up
MEMORY_SHARE = 0.6  # of the device's memory that one volume may take


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network and what is needed to apply it to any head."""

    network: Any  # nnx module whose `labels(image f32[b x y z 1])` gives u8[b p x y z] in the order of config.protocols
    config: Config
    voxel_size_mm: float  # of the grid that it was trained on
    provenance: dict[str, Any] = field(default_factory=dict)  # where the weights come from, as JSON
    max_voxels: int = 0  # larger volumes are tiled; 0: what the device's memory allows

    def labels(self, image: Float[np.ndarray, "b x y z 1"]) -> UInt8[np.ndarray, "b p x y z"]:
        """The network's class indices, compiled once per shape."""
        return np.asarray(_labels(*self._parts, image))

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        return nnx.split(self.network, graph=False)

    @property
    def voxel_budget(self) -> int:
        return self.max_voxels or int(MEMORY_SHARE * _memory_bytes() / VOXEL_BYTES)


@partial(jax.jit, static_argnums=0)
def _labels(structure: Any, arrays: Any, image: jax.Array) -> jax.Array:
    # the structure is part of the key: models that differ in weights alone, as in validation, share programs
    return nnx.merge(structure, arrays).labels(image)


def restore(run: str | os.PathLike[str]) -> Model:
    """The model of a run directory (local or gs://): its best checkpoint by validation Dice, else the latest.

    The averaged weights are taken where the run kept them. Raises NeuronetError where the folder is no run, or its
    checkpoints are damaged or do not fit this release.
    """
    run = os.fspath(run)
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
            warnings.warn(f"{error}; taking the latest sound checkpoint instead", stacklevel=2)
            state, step = checkpoints.restore_params(target)
    finally:
        checkpoints.close()
    params, moments = state["average"] if averaged else (state["params"], state["moments"])
    provenance = {"config": config.name, "step": step, "split_hash": info.split_hash}
    if note := info.provenance.get("note"):  # such as: a demonstration on synthetic heads
        provenance["note"] = note
    return Model(nnx.merge(structure, params, moments), config, info.voxel_size_mm, provenance)


def _memory_bytes() -> int:
    """What the first device can hold; on CPU, the machine's memory or what the container or job may use of it."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if limit := statistics.get("bytes_limit"):
        return limit
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    granted = Path("/sys/fs/cgroup/memory.max")
    text = granted.read_text().strip() if granted.exists() else "max"
    return machine if text == "max" else min(machine, int(text))


@overload
def segment(model: Model, image: np.ndarray, protocols: Sequence[str] | None = None) -> dict[str, np.ndarray]: ...
@overload
def segment(
    model: Model, image: str | Path | SpatialImage, protocols: Sequence[str] | None = None
) -> dict[str, nib.Nifti1Image]: ...
def segment(model: Model, image: Any, protocols: Sequence[str] | None = None) -> dict[str, Any]:
    """The label map of each protocol (default: all of the model's), in the tool's own ids.

    `image` is an array [x y z] in RAS+ order at the model's voxel size, the path of a .nii, .nii.gz or .mgz file, or a
    nibabel image; raw intensities, any orientation and voxel size for the last two. An array gives uint8 arrays of its
    shape, a file or a nibabel image gives NIfTI images on its grid with its qform, sform and codes.
    Raises RejectError with the code of what is wrong with the image, NeuronetError for protocols that the model lacks.
    """
    if isinstance(image, (str, os.PathLike, SpatialImage)):
        volume = nifti.check_image(image) if isinstance(image, SpatialImage) else nifti.read_image(Path(image))
        maps = segment_volume(model, volume, protocols)
        return {name: nifti.labels_image(labels, volume) for name, labels in maps.items()}
    array = np.asarray(image)
    if array.ndim != 3:
        raise RejectError("E_NDIM", f"one three-dimensional image [x y z] is needed, got the shape {array.shape}")
    if array.dtype.kind not in "iuf":
        raise RejectError("E_DTYPE", f"voxels must be plain integers or floats, got {array.dtype}")
    return _to_ids(predict(model, *_whiten(array)), _indices(model, protocols))


def segment_volume(model: Model, volume: nifti.Volume, protocols: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """As `segment`, for a checked volume: uint8 arrays of tool ids on the volume's own grid."""
    indices = _indices(model, protocols)
    array, affine = space.conform(volume.data, volume.affine, model.voxel_size_mm, is_label=False)
    classes = predict(model, *_whiten(array))
    target = space.Grid(volume.data.shape, volume.affine)
    return {name: space.to_grid(ids, affine, target) for name, ids in _to_ids(classes, indices).items()}


def predict(model: Model, image: Float[np.ndarray, "x y z"], background: float = 0.0) -> UInt8[np.ndarray, "p x y z"]:
    """Class indices of every protocol for a whitened image of any shape; `background` is what lies beyond it."""
    sides = image.shape
    step = math.lcm(BUCKET, _stride(model))
    bucket = tuple(-(-side // step) * step for side in sides)
    padded = np.pad(
        image.astype(np.float32, copy=False),
        [(0, whole - side) for side, whole in zip(sides, bucket, strict=True)],
        constant_values=background,
    )
    margin = receptive_margin(model.config.model.filters)
    tile = _tile_shape(bucket, model.voxel_budget, step, margin)
    while True:
        try:
            classes = _predict_tiles(model, padded, tile, margin)
            return classes[:, : sides[0], : sides[1], : sides[2]]
        except jax.errors.JaxRuntimeError as error:
            smaller = _tile_shape(tile, math.prod(tile) // 2, step, margin)
            if "RESOURCE_EXHAUSTED" not in str(error) or smaller == tile:
                raise
            warnings.warn(f"the device ran out of memory with tiles of {tile}; going on with {smaller}", stacklevel=2)
            tile = smaller


def _predict_tiles(model: Model, image: np.ndarray, tile: tuple[int, ...], margin: int) -> np.ndarray:
    """Class indices [p x y z] of an image that fills its bucket, from tiles of one shape."""
    classes = np.empty((len(model.config.protocols), *image.shape), np.uint8)
    for boxes in itertools.product(*(_windows(n, t, margin) for n, t in zip(image.shape, tile, strict=True))):
        starts, kept = zip(*boxes, strict=True)
        inside = tuple(slice(a, a + t) for a, t in zip(starts, tile, strict=True))
        labels = model.labels(image[inside][None, ..., None])[0]  # p x y z
        core = tuple(slice(k.start - a, k.stop - a) for a, k in zip(starts, kept, strict=True))
        classes[(slice(None), *kept)] = labels[(slice(None), *core)]
    return classes


def _windows(side: int, tile: int, margin: int) -> Iterator[tuple[int, slice]]:
    """Where the tiles of an axis start, and which part of the axis each of them is believed on.

    A tile's labels differ from the whole volume's only within `margin` of its faces that cut through the volume.
    """
    if tile >= side:
        yield 0, slice(0, side)
        return
    for start in [*range(0, side - tile, tile - 2 * margin), side - tile]:
        yield start, slice(start + margin if start else 0, start + tile - margin if start < side - tile else side)


def _tile_shape(bucket: tuple[int, ...], budget: int, step: int, margin: int) -> tuple[int, ...]:
    """The bucket, its longest sides halved until it fits the budget of voxels or halos would leave nothing."""
    least = 2 * margin + step
    least = -(-least // step) * step
    tile = list(bucket)
    while math.prod(tile) > budget and max(tile) > least:
        axis = tile.index(max(tile))
        tile[axis] = max(least, -(-tile[axis] // 2 // step) * step)
    return tuple(tile)


def receptive_margin(filters: tuple[int, ...]) -> int:
    """Voxels beyond which the image cannot change a label, for both families, as a multiple of the coarsest stride.

    Each scale s down adds 4·2ˢ (a strided kernel of 4 and three of 3), the way back up at most 3·2ˢ⁻¹ (one kernel of 3,
    one linear interpolation), the first convolution 1.
    """
    scales = range(1, len(filters))
    reach = 1 + sum(4 * 2**s for s in scales) + sum(3 * 2 ** (s - 1) for s in scales)
    stride = 2 ** (len(filters) - 1)
    return -(-reach // stride) * stride


def _stride(model: Model) -> int:
    return 2 ** (len(model.config.model.filters) - 1)


def _whiten(image: np.ndarray) -> tuple[np.ndarray, float]:
    """The image prepared as a store's are, and the value of its background (raw 0), which padding continues."""
    with np.errstate(over="ignore"):  # beyond float32 becomes Inf, which the statistics refuse
        image = image.astype(np.float32, copy=False)
    clipped, _ = intensity.clip_spikes(image)
    statistics = intensity.statistics(clipped)
    return intensity.whiten(clipped, statistics.mean, statistics.std), -statistics.mean / statistics.std


def _indices(model: Model, protocols: Sequence[str] | None) -> dict[str, int]:
    """The position of each wanted protocol among the model's."""
    known = model.config.protocols
    wanted = known if protocols is None else tuple(protocols)
    if unknown := [name for name in wanted if name not in known]:
        raise NeuronetError(f"this model predicts {', '.join(known)}, not {unknown[0]!r}; choose among those")
    return {name: known.index(name) for name in wanted}


def _to_ids(classes: np.ndarray, indices: dict[str, int]) -> dict[str, np.ndarray]:
    return {name: PROTOCOLS[name].to_ids(classes[index]) for name, index in indices.items()}
