"""Augmentation on the device, inside the training step. `draw` draws all parameters of a sample; other functions apply
them.

A strength of 0 is exactly the identity and costs nothing, because the code is not even traced.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from neuronet_jax.config import AugmentConfig
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.training import artefacts

# At strength 1. The ranges cover what scanners and protocols change in T1 images; each is a normal's standard
# deviation.
LOG_GAMMA, LOG_GAIN, OFFSET, LOG_BIAS, NOISE = 0.2, 0.1, 0.1, 0.15, 0.2
ROTATION_DEGREES, LOG_SCALE, SHEAR = 7.0, 0.07, 0.03
DISPLACEMENT = 0.02  # of the crop's side, at control points a quarter of it apart
BLUR = 0.8  # voxels: the standard deviation of the point spread, along each axis on its own
_POINTS, _REACH = 5, 3  # control points per axis; voxels on either side that blur mixes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parameters:
    """The augmentation parameters of one sample."""

    flip: Bool[Array, ""]
    log_gamma: Float[Array, ""]
    log_gain: Float[Array, ""]
    offset: Float[Array, ""]
    log_bias: Float[Array, "3 3 3"]  # coefficients of the bias field's cosines
    noise: Float[Array, ""]
    noise_key: Array
    matrix: Float[Array, "3 3"]  # from output to input voxels, about the centre
    displacement: Float[Array, "3 5 5 5"]  # of control points, in sides of the crop
    blur: Float[Array, "3"]  # voxels


def augment(batch: dict[str, Array], key: Array, config: AugmentConfig, protocols: tuple[str, ...]) -> dict[str, Array]:
    """Augments `image` [b x y z 1] and `labels` [b p x y z] of a batch, each sample with its own parameters."""
    image, labels = batch["image"], batch["labels"]
    keys = jax.random.split(key, image.shape[0])
    parameters = jax.vmap(lambda k: draw(k, config))(keys)
    if config.flip:
        image, labels = jax.vmap(lambda i, s, p: mirror(i, s, p.flip, protocols))(image, labels, parameters)
    if config.spatial or config.elastic:

        def move(image: Array, labels: Array, p: Parameters) -> tuple[Array, Array]:
            return warp(image, labels, p.matrix, p.displacement if config.elastic else None)

        image, labels = jax.vmap(move)(image, labels, parameters)
    if config.resolution:
        image = jax.vmap(lambda i, p: blur(i, p.blur))(image, parameters)
    if config.intensity:
        image = jax.vmap(change_intensity)(image, parameters)
    if config.artefacts:
        faults = jax.vmap(lambda k: artefacts.draw(jax.random.fold_in(k, 1), config.artefacts))(keys)
        image, labels = jax.vmap(artefacts.apply)(image, labels, faults)
    return {**batch, "image": image, "labels": labels}


def draw(key: Array, config: AugmentConfig) -> Parameters:
    """Draws all parameters of one sample."""
    keys = iter(jax.random.split(key, 12))
    light, space = config.intensity, config.spatial

    def normal(deviation: float, shape: tuple[int, ...] = ()) -> Array:
        # Truncated: rare extremes do not occur in scanners.
        return deviation * jax.random.truncated_normal(next(keys), -2.0, 2.0, shape)

    rotation = artefacts.rotation(jnp.deg2rad(normal(space * ROTATION_DEGREES, (3,))))
    scale = jnp.diag(jnp.exp(normal(space * LOG_SCALE, (3,))))
    shear = jnp.eye(3) + jnp.triu(normal(space * SHEAR, (3, 3)), 1)
    return Parameters(
        flip=jax.random.bernoulli(next(keys)),
        log_gamma=normal(light * LOG_GAMMA),
        log_gain=normal(light * LOG_GAIN),
        offset=normal(light * OFFSET),
        log_bias=normal(light * LOG_BIAS, (3, 3, 3)),
        noise=jnp.abs(normal(light * NOISE)),
        noise_key=next(keys),
        matrix=rotation @ scale @ shear,
        displacement=normal(config.elastic * DISPLACEMENT, (3, _POINTS, _POINTS, _POINTS)),
        blur=jnp.abs(normal(config.resolution * BLUR, (3,))),
    )


def mirror(
    image: Float[Array, "x y z 1"], labels: Integer[Array, "p x y z"], flip: Bool[Array, ""], protocols: tuple[str, ...]
) -> tuple[Array, Array]:
    """Mirrors left-right (x, in RAS+ order) if `flip` is set; every structure takes its partner's label."""
    partners = [np.asarray(PROTOCOLS[name].partners, np.uint8) for name in protocols]
    swapped = jnp.stack([jnp.asarray(table)[labels[p, ::-1].astype(jnp.int32)] for p, table in enumerate(partners)])
    return jnp.where(flip, image[::-1], image), jnp.where(flip, swapped, labels)


def warp(
    image: Float[Array, "x y z 1"],
    labels: Integer[Array, "p x y z"],
    matrix: Float[Array, "3 3"],
    displacement: Float[Array, "3 5 5 5"] | None = None,
) -> tuple[Array, Array]:
    """Rotates, scales and shears about the centre, and displaces smoothly: linear for the image, nearest for labels.

    `displacement`, in sides of the crop, is interpolated between its points. Beyond the border, the border's value
    continues.
    """
    shape = labels.shape[1:]
    centre = (jnp.asarray(shape, jnp.float32) - 1.0) / 2.0
    axes = [jnp.arange(n, dtype=jnp.float32) - c for n, c in zip(shape, centre, strict=True)]
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"))  # 3 x y z
    source = jnp.einsum("ij,jxyz->ixyz", matrix, grid) + centre.reshape(3, 1, 1, 1)
    if displacement is not None:
        sides = jnp.asarray(shape, jnp.float32).reshape(3, 1, 1, 1)
        source = source + jax.image.resize(displacement, (3, *shape), "cubic") * sides
    moved = jax.scipy.ndimage.map_coordinates(image[..., 0], list(source), order=1, mode="nearest")
    nearest = [jnp.clip(jnp.round(s).astype(jnp.int32), 0, n - 1) for s, n in zip(source, shape, strict=True)]
    return moved[..., None], labels[:, nearest[0], nearest[1], nearest[2]]


def blur(image: Float[Array, "x y z 1"], sigmas: Float[Array, "3"]) -> Float[Array, "x y z 1"]:
    """Blurs by a Gaussian of its own standard deviation, in voxels, along each axis: thick slices, partial volume."""
    offsets = jnp.arange(-_REACH, _REACH + 1, dtype=jnp.float32)
    for axis in range(3):
        weights = jax.nn.softmax(-0.5 * (offsets / jnp.maximum(sigmas[axis], 1e-3)) ** 2)
        side = image.shape[axis]
        padded = jnp.pad(image, [(_REACH, _REACH) if a == axis else (0, 0) for a in range(4)], mode="edge")
        shifted = [jax.lax.slice_in_dim(padded, k, k + side, axis=axis) for k in range(2 * _REACH + 1)]
        image = sum((w * s for w, s in zip(weights, shifted, strict=True)), jnp.zeros_like(image))
    return image


def change_intensity(image: Float[Array, "x y z 1"], p: Parameters) -> Float[Array, "x y z 1"]:
    """Changes contrast (gamma), bias field, noise, gain and offset of a whitened image.

    Gamma and bias act above the darkest value, so that air stays dark.
    """
    low, high = jnp.min(image), jnp.max(image)
    span = jnp.maximum(high - low, 1e-6)
    unit = jnp.clip((image - low) / span, 1e-6, 1.0)  # a power's gradient at 0 is not finite
    changed = span * unit ** jnp.exp(p.log_gamma) * _bias_field(image.shape[:3], p.log_bias)[..., None] + low
    noise = p.noise * jax.random.normal(p.noise_key, image.shape)
    return jnp.exp(p.log_gain) * changed + p.offset + noise


def _bias_field(shape: tuple[int, ...], coefficients: Float[Array, "3 3 3"]) -> Float[Array, "x y z"]:
    """Returns exp of a sum of products of cosines with 0, ½ and 1 period per axis, without the constant."""
    bases = [jnp.cos(jnp.pi * jnp.arange(3.0)[:, None] * (jnp.arange(float(n)) + 0.5)[None, :] / n) for n in shape]
    varying = coefficients.at[0, 0, 0].set(0.0)
    return jnp.exp(jnp.einsum("ijk,ix,jy,kz->xyz", varying, *bases))
