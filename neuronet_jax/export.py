"""A trained network as one program for other machines: whitening, network and tool ids, in StableHLO.

`export` writes a release (see `runs/release.py`) with programs for CPU, CUDA and TPU in one file. Running it needs jax,
numpy, safetensors and flatbuffers (for jax's own reader of such files), and nothing from this library:

    import json, jax, jax.export, numpy as np
    from pathlib import Path
    from safetensors.numpy import load_file

    release = json.loads(Path("release/release.json").read_text())
    entry = release["programs"][0]
    program = jax.export.deserialize(bytearray(Path("release", entry["file"]).read_bytes()))
    weights = load_file("release/weights.safetensors")
    image = np.load("image.npy").astype(np.float32)  # [x y z] RAS+, release["voxel_size_mm"] voxels, raw intensities
    sides = entry["shape"] or [-(-side // entry["multiple_of"]) * entry["multiple_of"] for side in image.shape]
    padded = np.pad(image, [(0, whole - side) for whole, side in zip(sides, image.shape)])
    labels = jax.jit(program.call)(weights, padded, np.array(image.shape, np.int32))
    labels = {name: np.asarray(ids)[tuple(map(slice, image.shape))] for name, ids in labels.items()}
    # {protocol: uint8 [x y z]} of tool ids; release["labels"][protocol] lists their meaning

The weights are arguments, so the program is small and serves any weights of the same config. The third argument is the
shape of the image within the padded array; the statistics cover that part only. If `segment` would refuse the image
(all zero, constant, NaN), every label is background.
"""

import math
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export as jax_export
from jaxtyping import Array, Bool, Float, Int

from neuronet_jax.errors import NeuronetError
from neuronet_jax.inference.volume import BUCKET
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.network import abstract
from neuronet_jax.runs.calibration import UNKNOWN, Calibration
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.release import Program, release, weight_name

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
    model: Model,
    folder: str | os.PathLike[str],
    shapes: Sequence[tuple[int, int, int]] = (),
    calibration: Calibration = UNKNOWN,
) -> None:
    """Writes the model as a release into `folder` (local, gs:// or s3://), with its program and its run's calibration.

    Without `shapes`, one program takes all sides that are multiples of 32. With `shapes`, whose sides must be such
    multiples, there is one program for each. Raises NeuronetError for other shapes, if the network can only be traced
    for one shape at a time, and if `folder` already holds a release.
    """
    step = math.lcm(BUCKET, model.config.model.stride)
    for shape in shapes:
        if any(side < step or side % step for side in shape):
            raise NeuronetError(f"--shape takes three multiples of {step}, got {','.join(map(str, shape))}")
    labels, weights = _traceable(model)
    programs = []
    for shape in shapes or (None,):
        sides = shape or tuple(step * side for side in jax_export.symbolic_shape("i, j, k"))
        arguments = (weights, jax.ShapeDtypeStruct(sides, jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32))
        try:
            exported = jax_export.export(jax.jit(labels), platforms=PLATFORMS)(*arguments)
        except jax.errors.InconclusiveDimensionOperation as error:
            raise NeuronetError(
                "this network can only be traced for one shape at a time: give one with --shape=X,Y,Z"
            ) from error
        name = f"segment{''.join(f'-{side}' for side in shape or ())}.jax_export"
        programs.append(Program(name, shape, step, PLATFORMS, bytes(exported.serialize())))
    release(model, folder, programs, calibration)


def _traceable(model: Model) -> tuple[Callable[..., dict[str, Array]], dict[str, jax.ShapeDtypeStruct]]:
    """Returns the function to export and the shapes of its first argument."""
    config, protocols = model.config.model, model.config.protocols
    config = config.on("cpu")  # float32 for "auto": right on every platform
    shapes = abstract(config, protocols)
    structure, state = nnx.split(shapes, graph=False)
    variables = nnx.to_flat_state(state)

    def labels(weights: dict[str, Array], image: Float[Array, "x y z"], sides: Int[Array, "3"]) -> dict[str, Array]:
        """Returns {protocol: uint8 [x y z]}, tool ids."""
        filled = [(path, variable.replace(weights[weight_name(path)])) for path, variable in variables]
        network = nnx.merge(structure, nnx.from_flat_state(filled))
        whitened, usable = whiten(image, sides)
        whitened = jax.lax.optimization_barrier(whitened)  # compiles the network as in `segment`, for the same labels
        classes = network.labels(whitened[None, ..., None])[0]  # p x y z
        ids = {name: _to_ids(classes[p], name) for p, name in enumerate(protocols)}
        return {name: jnp.where(usable, found, jnp.uint8(0)) for name, found in ids.items()}

    return labels, {weight_name(path): jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in variables}


def _to_ids(classes: Int[Array, "x y z"], protocol: str) -> Int[Array, "x y z"]:
    ids = PROTOCOLS[protocol].ids.astype(np.uint8)
    is_identity = np.array_equal(ids, np.arange(len(ids)))  # look-ups are slow on CPU, and only FIRST needs one
    return classes if is_identity else jnp.asarray(ids)[classes]


def whiten(image: Float[Array, "x y z"], sides: Int[Array, "3"]) -> tuple[Float[Array, "x y z"], Bool[Array, ""]]:
    """Whitens an image as `intensity` does, to the last bit, but traced: clips spikes, then gives mean 0 and variance
    1.

    The image is the box of `sides` at the array's corner. Beyond it lies the value of raw 0. Also returns whether
    `intensity` would accept the image.
    """
    grid = [jax.lax.broadcasted_iota(jnp.int32, image.shape, axis) < sides[axis] for axis in range(3)]
    inside = grid[0] & grid[1] & grid[2]
    counted = inside & (image != 0)
    count = jnp.sum(counted, dtype=jnp.int32)
    last = jnp.maximum(count, 1) - 1
    ranks = jnp.stack([last // 1000, last - (last + 999) // 1000])  # of the 0.1st and 99.9th percentile, in integers
    low, high = _order_statistics(image, counted, ranks)
    least = jnp.min(jnp.where(counted, image, jnp.inf))
    most = jnp.max(jnp.where(counted, image, -jnp.inf))
    with jax.enable_x64(True):
        wide, total = jnp.float64, jnp.prod(sides.astype(jnp.int64)).astype(jnp.float64)
        margin = 3 * (high.astype(wide) - low.astype(wide))
        lowest = jnp.minimum(low.astype(wide) - margin, 0.0).astype(jnp.float32)
        highest = (high.astype(wide) + margin).astype(jnp.float32)
        spikes = (least < lowest) | (most > highest)
        image = jnp.where(spikes, jnp.clip(image, lowest, highest), image)
        mean = jnp.sum(jnp.where(inside, image, 0).astype(wide)) / total
        squares = jnp.where(inside, jnp.square(image.astype(wide) - mean), 0.0)
        std = jnp.sqrt(jnp.sum(squares) / total)
        usable = (count > 0) & jnp.isfinite(mean) & jnp.isfinite(std) & (std > 1e-6 * jnp.abs(mean))
        shift, scale, background = (v.astype(jnp.float32) for v in (mean, 1 / std, -mean / std))
    return jnp.where(inside, (image - shift) * scale, background), usable


def _order_statistics(
    image: Float[Array, "x y z"], counted: Bool[Array, "x y z"], ranks: Int[Array, "n"]
) -> Float[Array, "n"]:
    """Returns the values of these ranks (0 is the smallest) among the counted voxels.

    A bisection over the bits of a float, which order like integers once the sign is accounted for. On CPU it is six
    times faster than sorting a whole head.
    """
    top = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(image, jnp.uint32)
    keys = jnp.where(counted, jnp.where(bits >= top, ~bits, bits | top), jnp.uint32(0xFFFFFFFF))

    def settle(i: Array, found: Array) -> Array:
        tried = found | (top >> i.astype(jnp.uint32))
        below = jnp.stack([jnp.sum(keys < value, dtype=jnp.int32) for value in tried])
        return jnp.where(below <= ranks, tried, found)  # the largest key with no more than `rank` below it

    found = jax.lax.fori_loop(0, 32, settle, jnp.zeros(ranks.shape, jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found >= top, found ^ top, ~found), jnp.float32)
