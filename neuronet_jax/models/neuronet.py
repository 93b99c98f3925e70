"""The default network: one shared encoder with an upward path, and one linear decoder per protocol.

The published network's finest features are a linear filter of the image, so it draws every class boundary at half
resolution. Here the coarse features travel back up (as in a U-Net), and non-linear units refine them at every scale,
full resolution included, before each protocol's decoder. All protocols share the upward path, so five cost little more
than one. The last step stays linear, so that the fused head serves this network too.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from neuronet_jax.models import conv
from neuronet_jax.models.layers import Conv, Norm, ResidualUnit, fan_in_uniform, groups_of, normalised_conv
from neuronet_jax.models.readout import Readout

MOMENTUM = (
    0.95  # moving moments settle within 60 steps, so that short runs are validated fairly (the published .99 takes 300)
)


class UpUnit(nnx.Module):
    """Adds the coarser features, projected and upsampled, to a scale's own, and refines the sum by a residual
    convolution.
    """

    def __init__(self, coarse: int, fine: int, norm: str, rng: np.random.Generator):
        self.lateral = Conv(1, coarse, fine, rng=rng)
        self.norm = Norm(fine, MOMENTUM, groups_of(norm, fine))
        self.conv = Conv(3, fine, fine, rng=rng)

    def __call__(self, coarse: Array, fine: Array, train: bool, inside: Array | None = None) -> Array:
        x = fine + conv.upsample(self.lateral(coarse))
        return x + normalised_conv(self.norm, self.conv, x, train, inside)


class Encoder(nnx.Module):
    """A downward path of residual units and an upward path of `UpUnit`s."""

    def __init__(self, filters: tuple[int, ...], norm: str, rng: np.random.Generator):
        scales = list(itertools.pairwise(filters))
        self.stem = Conv(3, 1, filters[0], rng=rng)
        self.down = nnx.List(
            ResidualUnit(fine, coarse, stride=2, momentum=MOMENTUM, norm=norm, rng=rng) for fine, coarse in scales
        )
        self.same = nnx.List(ResidualUnit(c, c, momentum=MOMENTUM, norm=norm, rng=rng) for _, c in scales)
        self.up = nnx.List(UpUnit(coarse, fine, norm, rng) for fine, coarse in scales)
        self.norms = nnx.List(Norm(c, MOMENTUM, groups_of(norm, c)) for c in filters)

    def __call__(self, image: Float[Array, "b x y z 1"], train: bool) -> list[Array]:
        """Returns features per scale, finest first, normalised and rectified: [b x y z 16], [b x/2 y/2 z/2 32], …"""
        fine = self.stem(image)
        coarse = self.coarse(*self.down[0].enter(fine, train), train)
        return self.readable([self.up[0](coarse[0], fine, train), *coarse], train)

    def enter(self, image: Float[Array, "b x y z 1"], inside: Array) -> tuple[Array, Array]:
        """Returns what `coarse` takes, of a window of an image (see `ResidualUnit.enter`)."""
        return self.down[0].enter(self.stem(image), False, inside)

    def coarse(self, entered: Array, identity: Array, train: bool) -> list[Array]:
        """Returns the features of all scales but the finest, as `readable` takes them."""
        features = [self.same[0](self.down[0].leave(entered, identity, train), train)]
        for down, same in zip(self.down[1:], self.same[1:], strict=True):
            features.append(same(down(features[-1], train), train))
        for scale in reversed(range(1, len(self.up))):
            features[scale - 1] = self.up[scale](features[scale], features[scale - 1], train)
        return features

    def finest(self, image: Float[Array, "b x y z 1"], coarse: Array, inside: Array) -> Array:
        """Returns the finest readable features of a window; those of its two outermost voxels are wrong.

        `coarse` are the features of the next scale in the same window, zero beyond the volume.
        """
        return jax.nn.relu6(self.norms[0](self.up[0](coarse, self.stem(image), False, inside), False))

    def range(self, image: Float[Array, "b x y z 1"], coarse: Array) -> tuple[Array, Array]:
        """Returns bounds [c] of `finest` in a window, by interval arithmetic from what costs little."""
        stem, unit, kernel = self.stem(image)[:, 1:-1, 1:-1, 1:-1], self.up[0], self.up[0].conv.kernel[...]
        low, high = (a + b for a, b in zip(_range(stem), _range(unit.lateral(coarse)), strict=True))
        least, most = _rectified_range(unit.norm, low, high)
        positive, negative = (jnp.sum(part, axis=(0, 1, 2)) for part in (jax.nn.relu(kernel), -jax.nn.relu(-kernel)))
        low, high = low + least @ positive + most @ negative, high + most @ positive + least @ negative
        return _rectified_range(self.norms[0], low, high)

    def readable(self, features: list[Array], train: bool) -> list[Array]:
        """Normalises and rectifies features of the coarsest scales, of all where all are given."""
        norms = self.norms[len(self.norms) - len(features) :]
        return [jax.nn.relu6(norm(f, train)) for norm, f in zip(norms, features, strict=True)]


def _range(x: Float[Array, "b x y z c"]) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    return jnp.min(x, axis=(0, 1, 2, 3)), jnp.max(x, axis=(0, 1, 2, 3))


def _rectified_range(norm: Norm, low: Array, high: Array) -> tuple[Array, Array]:
    """Returns the range of relu6 after a normalisation."""
    scale, shift = norm.affine(norm.mean[...], norm.variance[...])
    ends = jax.nn.relu6(low * scale + shift), jax.nn.relu6(high * scale + shift)
    return jnp.minimum(*ends), jnp.maximum(*ends)


class Decoder(nnx.Module):
    """One protocol's linear decoder: a matrix per scale and one bias."""

    def __init__(self, filters: tuple[int, ...], classes: int, rng: np.random.Generator):
        self.kernels = nnx.List(nnx.Param(fan_in_uniform(rng, (c, classes))) for c in filters)
        self.bias = nnx.Param(jnp.zeros(classes))

    def __call__(self) -> list[tuple[Array, Array]]:
        """Returns one matrix [c k] and bias [k] per scale."""
        bias = self.bias[...]
        return [(k[...], bias if scale == 0 else jnp.zeros_like(bias)) for scale, k in enumerate(self.kernels)]


class Decoders(nnx.Module):
    """The decoders of all protocols."""

    def __init__(self, filters: tuple[int, ...], classes: dict[str, int], rng: np.random.Generator):
        self.order = tuple(classes)  # a pytree's dictionaries come back sorted
        self.protocols = nnx.Dict({name: Decoder(filters, k, rng) for name, k in classes.items()})

    def __call__(self, features: list[Array], train: bool) -> Readout:
        del features, train  # nothing here depends on the batch
        return Readout.join([self.protocols[name]() for name in self.order])
