"""The published NeuroNet, operation by operation (Rajchl et al., MIDL 2018, arXiv 1806.04224, and its reference code).

The decoders are linear, so they are not run as a chain of upsamplings of K channels but folded into one matrix per
scale (`head.py` applies them). With z₃ = f₃W₃, z_s = up(z_{s+1}) + BN_s(f_sV_s) and logits = z₀L, upsampling commutes
with every mixing of channels. Hence logits = up³(f₃W₃L) + Σ_s upˢ(f_sA_s + b_s) with A_s = V_s diag(γ_s/σ_s) L and
b_s = (β_s − μ_sγ_s/σ_s) L.
"""

import itertools

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from neuronet_jax.models.layers import Conv, Norm, ResidualUnit, channel_covariance, fan_in_uniform
from neuronet_jax.models.readout import Readout


class Encoder(nnx.Module):
    """A plain convolution at full resolution, then two residual units per scale, the first of stride 2."""

    def __init__(self, filters: tuple[int, ...], norm: str, rng: np.random.Generator):
        assert norm == "batch", "the decoders are folded through batch norm (see `check` in config.py)"
        self.stem = Conv(3, 1, filters[0], rng=rng)
        self.units = nnx.List(
            unit
            for channels, wider in itertools.pairwise(filters)
            for unit in (ResidualUnit(channels, wider, stride=2, rng=rng), ResidualUnit(wider, wider, rng=rng))
        )

    def __call__(self, image: Float[Array, "b x y z 1"], train: bool) -> list[Array]:
        """Returns the features per scale, finest first: [b x y z 16], [b x/2 y/2 z/2 32], …"""
        fine = self.stem(image)
        return [fine, *self.coarse(*self.units[0].enter(fine, train), train)]

    def enter(self, image: Float[Array, "b x y z 1"], inside: Array) -> tuple[Array, Array]:
        """Returns what `coarse` takes, of a window of an image (see `ResidualUnit.enter`)."""
        return self.units[0].enter(self.stem(image), False, inside)

    def coarse(self, entered: Array, identity: Array, train: bool) -> list[Array]:
        """Returns the features of all scales but the finest."""
        features = [self.units[1](self.units[0].leave(entered, identity, train), train)]
        for down, same in zip(self.units[2::2], self.units[3::2], strict=True):
            features.append(same(down(features[-1], train), train))
        return features

    def finest(self, image: Float[Array, "b x y z 1"], coarse: Array, inside: Array) -> Array:
        """Returns the finest features of a window; those of its outermost voxels are wrong."""
        del coarse, inside
        return self.stem(image)

    def range(self, image: Float[Array, "b x y z 1"], coarse: Array) -> tuple[Array, Array]:
        """Returns the least and the largest value [c] of `finest` in a window."""
        del coarse
        features = self.stem(image)[:, 2:-2, 2:-2, 2:-2]
        return jnp.min(features, axis=(0, 1, 2, 3)), jnp.max(features, axis=(0, 1, 2, 3))

    def readable(self, features: list[Array], train: bool) -> list[Array]:
        """Returns the features as they are: the decoders normalise."""
        del train
        return features


class Decoder(nnx.Module):
    """One protocol's parameters: a projection and a normalisation per scale, and the final mixing of classes."""

    def __init__(self, filters: tuple[int, ...], classes: int, rng: np.random.Generator):
        self.projections = nnx.List(nnx.Param(fan_in_uniform(rng, (c, classes))) for c in filters)
        self.norms = nnx.List(Norm(classes) for _ in filters[:-1])
        self.last = nnx.Param(fan_in_uniform(rng, (classes, classes)))

    def __call__(self, features: list[Array], moments: list[tuple[Array, Array]] | None) -> list[tuple[Array, Array]]:
        """Returns one matrix [c k] and bias [k] per scale. `moments` are those of the features, in training."""
        last = self.last[...]
        pairs = []
        for scale, norm in enumerate(self.norms):
            projection = self.projections[scale][...]  # c k
            if moments is None:
                mean, variance = norm.mean[...], norm.variance[...]
            else:
                feature_mean, covariance = moments[scale]
                mean = feature_mean @ projection
                variance = jnp.sum(projection * (covariance @ projection), axis=0)  # diag(Vᵀ Cov V)
                norm.update(mean, variance, features[scale].size // features[scale].shape[-1])
            gain, shift = norm.affine(mean, variance)
            pairs.append(((projection * gain[None, :]) @ last, shift @ last))
        coarsest = self.projections[-1][...] @ last
        return [*pairs, (coarsest, jnp.zeros(coarsest.shape[1]))]


class Decoders(nnx.Module):
    """The decoders of all protocols."""

    def __init__(self, filters: tuple[int, ...], classes: dict[str, int], rng: np.random.Generator):
        self.order = tuple(classes)  # a pytree's dictionaries come back sorted
        self.protocols = nnx.Dict({name: Decoder(filters, k, rng) for name, k in classes.items()})

    def __call__(self, features: list[Array], train: bool) -> Readout:
        # The batch moments of u = fV follow from those of f, which all protocols share; u itself is not needed.
        moments = [channel_covariance(f) for f in features[:-1]] if train else None
        return Readout.join([self.protocols[name](features, moments) for name in self.order])
