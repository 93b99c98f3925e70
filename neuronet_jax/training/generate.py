"""Images drawn from tissues, on the device, inside the training step: `draw` the parameters, `paint` with them.

Training thus sees whole heads of every brightness although few are labelled, as in SynthSeg (Billot et al., Medical
Image Analysis 86, 2023). Deformation, blur, bias field and noise come after, from `augment.py`, as for scans.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neuronet_jax.tissues import AIR, TISSUES

# The statistics by which a painted head is whitened. A scan's depend on how much air its field of view holds: from
# stripped brains in tight boxes to whole heads, in units of the brightness of white matter.
WHITENING_MEAN, WHITENING_STD = (0.1, 0.45), (0.22, 0.42)
COARSE = 4  # voxels between the points of the texture's coarse part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Palette:
    """The brightness of one head's tissues; tissue 0 is unused."""

    brightness: Float[Array, "k"]
    texture: Float[Array, "k"]
    texture_key: Array
    mean: Float[Array, ""]  # for whitening
    std: Float[Array, ""]


def draw(key: Array, any_contrast: float, scanned: Array) -> Palette:
    """Draws a palette: T1-like, or for the share `any_contrast` of the heads without a `scanned` voxel, of any kind."""
    keys = jax.random.split(key, 7)
    means, spreads, textures = (
        jnp.asarray([0.0, *values], jnp.float32)
        for values in zip(*((t.brightness, t.spread, t.texture) for t in TISSUES), strict=True)
    )
    count = len(TISSUES) + 1
    t1 = means + spreads * jax.random.truncated_normal(keys[0], -2.0, 2.0, (count,))
    anything = jax.random.uniform(keys[1], (count,), minval=0.0, maxval=1.2).at[AIR].set(means[AIR])
    chosen = jax.random.bernoulli(keys[2], any_contrast) & ~scanned
    return Palette(
        brightness=jnp.maximum(jnp.where(chosen, anything, t1), 0.0),
        texture=textures * jax.random.uniform(keys[3], (), minval=0.5, maxval=1.5),
        texture_key=keys[4],
        mean=jax.random.uniform(keys[5], (), minval=WHITENING_MEAN[0], maxval=WHITENING_MEAN[1]),
        std=jax.random.uniform(keys[6], (), minval=WHITENING_STD[0], maxval=WHITENING_STD[1]),
    )


def paint(volume: Float[Array, "x y z 1"], palette: Palette) -> Float[Array, "x y z 1"]:
    """Returns the whitened image of a painted volume: a brightness for each voxel of a tissue (see `tissues.py`)."""
    tissue = jnp.clip(-volume, 0.0, len(TISSUES)).astype(jnp.int32)
    values = palette.brightness[tissue] + palette.texture[tissue] * _grain(volume.shape[:3], palette.texture_key)
    image = jnp.where(volume < 0, jnp.maximum(values, 0.0), volume)
    return (image - palette.mean) / palette.std


def whole(volume: Float[np.ndarray, "x y z"], seed: int) -> Float[np.ndarray, "x y z"]:
    """Returns a whole painted volume as a T1-like image, not whitened: brightness, float32 ≥ 0."""
    palette = draw(jax.random.key(seed), 0.0, jnp.asarray(True))
    return np.asarray(paint(jnp.asarray(volume)[..., None], palette) * palette.std + palette.mean)[..., 0]


def generate(batch: dict[str, Array], key: Array, any_contrast: float) -> dict[str, Array]:
    """Paints the samples of `image` [b x y z 1] whose `painted` [b] is set. The others are scans, and stay."""

    def one(volume: Array, painted: Array, key: Array) -> Array:
        palette = draw(key, any_contrast, jnp.any(volume > 0))
        return jnp.where(painted, paint(volume, palette), volume)

    image = batch["image"]
    keys = jax.random.split(key, image.shape[0])
    return {**batch, "image": jax.vmap(one)(image, batch["painted"], keys)}


def _grain(shape: tuple[int, ...], key: Array) -> Float[Array, "x y z 1"]:
    """Returns noise of about unit variance, half of it fine, half of it as wide as muscles and fat are."""
    fine, coarse = jax.random.split(key)
    knots = jax.random.normal(coarse, tuple(side // COARSE + 2 for side in shape))
    wide = jax.image.resize(knots, shape, "linear") * 1.5**1.5  # linear mixing leaves 2/3 of the variance per axis
    return (0.5**0.5 * (jax.random.normal(fine, shape) + wide))[..., None]
