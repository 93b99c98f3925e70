"""Layers that both model families share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from neuronet_jax.config import GROUPS
from neuronet_jax.models import conv

EPSILON = 1e-3  # of every normalisation (the published value)
MOMENTUM = 0.99  # of every moving moment (the published value)


class Undrawn(np.random.Generator):
    """A generator that stands for draws whose shapes alone matter: under `eval_shape` they take no memory."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))


def fan_in_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draws weights by variance scaling with scale 1, fan-in, uniform: the published initialisation.

    The last axis is the output's. Weights are drawn on the host, because a compiled program with some hundred draws
    takes longer to compile than a training step.
    """
    if isinstance(rng, Undrawn):
        return jnp.zeros(shape, jnp.float32)
    limit = np.sqrt(3.0 / np.prod(shape[:-1]))
    return jnp.asarray(rng.uniform(-limit, limit, shape).astype(np.float32))


class Conv(nnx.Module):
    """A SAME convolution without bias, computed in the input's dtype."""

    def __init__(self, size: int, channels: int, filters: int, *, stride: int = 1, rng: np.random.Generator):
        self.stride = stride
        self.kernel = nnx.Param(fan_in_uniform(rng, (size, size, size, channels, filters)))

    def __call__(self, x: Float[Array, "b x y z c"]) -> Float[Array, "b u v w f"]:
        return conv.conv3d(x, self.kernel[...].astype(x.dtype), self.stride)


class Norm(nnx.Module):
    """Normalisation by moments of a batch in training, by moving ones otherwise.

    `groups` 0 takes the moments over batch and space (batch norm, Ioffe and Szegedy 2015). Otherwise each crop has its
    own, over space and over each of so many groups of channels (group norm, Wu and He 2018); as many groups as channels
    make instance norm (Ulyanov et al. 2016).

    All kinds use moving moments outside training, so that a block of a whole head has the same features as the head,
    however it is cut. For group and instance norm that is an approximation: the mean of the crops' own moments.

    The biased variance normalises. Batch norm's moving variance is updated by the unbiased one, as in the published
    network's fused kernel.
    """

    def __init__(self, channels: int, momentum: float = MOMENTUM, groups: int = 0):
        self.momentum, self.groups = momentum, groups
        zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        self.gamma = nnx.Param(jnp.asarray(ones))
        self.beta = nnx.Param(jnp.asarray(zeros))
        self.mean = nnx.BatchStat(jnp.asarray(zeros))
        self.variance = nnx.BatchStat(jnp.asarray(ones))

    def __call__(self, x: Float[Array, "b x y z c"], train: bool) -> Float[Array, "b x y z c"]:
        scale, shift = self.coefficients(x, train)
        return x * _broadcast(scale, x) + _broadcast(shift, x)

    def coefficients(self, x: Float[Array, "b x y z c"], train: bool) -> tuple[Array, Array]:
        """Returns the scale and shift per channel that normalise x."""
        if train and self.groups:
            mean, variance = group_moments(x, self.groups)  # b c
            self.move(jnp.mean(mean, axis=0), jnp.mean(variance, axis=0))
        elif train:
            mean, variance = channel_moments(x)
            self.update(mean, variance, x.size // x.shape[-1])
        else:
            mean, variance = self.mean[...], self.variance[...]
        return self.affine(mean, variance)

    def affine(self, mean: Float[Array, "*b c"], variance: Float[Array, "*b c"]) -> tuple[Array, Array]:
        """Returns the scale and shift per channel for these moments."""
        gamma, beta = (jnp.broadcast_to(p[...], mean.shape) for p in (self.gamma, self.beta))
        scale = gamma * jax.lax.rsqrt(variance + EPSILON)
        return scale, beta - mean * scale

    def update(self, mean: Float[Array, " c"], variance: Float[Array, " c"], count: int) -> None:
        """Moves the moving moments towards the moments of a batch of `count` values per channel."""
        self.move(mean, variance * (count / max(count - 1, 1)))

    def move(self, mean: Float[Array, " c"], variance: Float[Array, " c"]) -> None:
        """Moves the moving moments towards these."""
        mean, variance = jax.lax.stop_gradient((mean, variance))
        self.mean.set_value(self.momentum * self.mean[...] + (1 - self.momentum) * mean)
        self.variance.set_value(self.momentum * self.variance[...] + (1 - self.momentum) * variance)


def _broadcast(vector: Float[Array, "*b c"], x: Float[Array, "b x y z c"]) -> Array:
    """Returns values per channel, of all crops or of each, with the rank of x."""
    crops = vector.shape[0] if vector.ndim == 2 else 1
    return vector.astype(x.dtype).reshape(crops, 1, 1, 1, -1)


def group_moments(x: Float[Array, "b x y z c"], groups: int) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Returns the mean and biased variance of each crop's groups of channels, per channel, in float32, from centred
    values.
    """
    x = x.astype(jnp.float32)

    def shared(of_channel: Float[Array, "b c"]) -> Float[Array, "b c"]:
        """Averages over the channels of a group."""
        b, c = of_channel.shape
        of_group = jnp.mean(of_channel.reshape(b, groups, c // groups), axis=2, keepdims=True)
        return jnp.broadcast_to(of_group, (b, groups, c // groups)).reshape(b, c)

    mean = shared(jnp.mean(x, axis=(1, 2, 3)))
    return mean, shared(jnp.mean(jnp.square(x - _broadcast(mean, x)), axis=(1, 2, 3)))


def groups_of(norm: str, channels: int) -> int:
    """Returns the groups of `Norm` for `model.norm`."""
    return {"batch": 0, "group": GROUPS, "instance": channels}[norm]


def channel_moments(x: Float[Array, "b x y z c"]) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
    """Returns the mean and biased variance per channel, in float32, from centred values."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=(0, 1, 2, 3))
    return mean, jnp.mean(jnp.square(x - _broadcast(mean, x)), axis=(0, 1, 2, 3))


def channel_covariance(x: Float[Array, "b x y z c"]) -> tuple[Float[Array, " c"], Float[Array, "c c"]]:
    """Returns the mean and biased covariance of the channels, in float32, from centred values."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=(0, 1, 2, 3))
    centred = x - _broadcast(mean, x)
    count = x.size // x.shape[-1]
    return mean, jnp.einsum("bxyzc,bxyzd->cd", centred, centred) / count


def normalised_conv(norm: Norm, layer: Conv, x: Array, train: bool, inside: Array | None = None) -> Array:
    """Applies normalisation, relu6 and convolution.

    Where x is a window of a volume, `inside` [1 x y z 1] is 1 on voxels of the volume and 0 beyond it: the convolution
    must see zeros there, and not what the normalisation makes of them.
    The backward pass recomputes the convolution's input from x; stored, it would take half of a step's memory.
    """

    @jax.checkpoint
    def forward(x: Array, scale: Array, shift: Array, kernel: Array) -> Array:
        y = jax.nn.relu6(x * _broadcast(scale, x) + _broadcast(shift, x))
        if inside is not None:
            y = y * inside.astype(y.dtype)
        return conv.conv3d(y, kernel.astype(y.dtype), layer.stride)

    return forward(x, *norm.coefficients(x, train), layer.kernel[...])


class ResidualUnit(nnx.Module):
    """Pre-activation unit: norm, relu6 and convolution, twice, added to the identity.

    With stride 2 the first kernel is 4³ (twice the stride) and the identity is max-pooled. If the channels grow, the
    identity is padded with zero channels, the smaller half before.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        *,
        stride: int = 1,
        momentum: float = MOMENTUM,
        norm: str = "batch",
        rng: np.random.Generator,
    ):
        self.stride = stride
        self.padding = ((filters - channels) // 2, (filters - channels) - (filters - channels) // 2)
        self.norm0 = Norm(channels, momentum, groups_of(norm, channels))
        self.conv0 = Conv(3 if stride == 1 else 2 * stride, channels, filters, stride=stride, rng=rng)
        self.norm1 = Norm(filters, momentum, groups_of(norm, filters))
        self.conv1 = Conv(3, filters, filters, rng=rng)

    def __call__(self, x: Float[Array, "b x y z c"], train: bool) -> Float[Array, "b u v w f"]:
        return self.leave(*self.enter(x, train), train)

    def enter(
        self, x: Float[Array, "b x y z c"], train: bool, inside: Array | None = None
    ) -> tuple[Float[Array, "b u v w f"], Float[Array, "b u v w c"]]:
        """Returns the first convolution and the identity: all that the unit computes at the resolution of x.

        `inside` as in `normalised_conv`.
        """
        y = normalised_conv(self.norm0, self.conv0, x, train, inside)
        return y, conv.max_pool(x) if self.stride == 2 else x

    def leave(self, y: Array, identity: Array, train: bool) -> Float[Array, "b u v w f"]:
        """Returns the unit's output from what `enter` returned."""
        y = normalised_conv(self.norm1, self.conv1, y, train)
        return y + jnp.pad(identity, ((0, 0),) * 4 + (self.padding,))
