"""The fused head: every protocol's class scores at once, slab by slab, never the whole volume of them.

A readout is one matrix and bias per scale for all classes of all protocols side by side (`k` of them, 169 for five
protocols):

    scores = up(… up(f₃A₃ + b₃) + f₂A₂ + b₂ …) + f₀A₀ + b₀

All but the last addition happens at half resolution or less. The last upsampling, the addition and what the caller
wants of the scores (loss sums or labels) go slab by slab along x, so that the tensor of all classes at full
resolution (1.4 GB for one 128³ crop) exists in neither pass; the backward pass computes a slab's scores again. Within
a slab the voxels stay sorted by the parity of y and z, as upsampling makes them: interleaving the few channels of
features and labels the same way is cheaper than interleaving all classes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from neuronet_jax.models import conv

# Scores held at a time. Small enough to stay in a CPU's last-level cache, large enough to fill an accelerator.
SLAB_BYTES = {"cpu": 8 * 2**20, "other": 128 * 2**20}


class Readout(NamedTuple):
    """The linear map from features to the scores of all classes: per scale, finest first, a matrix [c k] and a bias
    [k].
    """

    matrices: list[Array]
    biases: list[Array]

    @classmethod
    def join(cls, decoders: list[list[tuple[Array, Array]]]) -> "Readout":
        """Sets the matrices and biases of several protocols side by side."""
        scales = list(zip(*decoders, strict=True))
        return cls(
            [jnp.concatenate([matrix for matrix, _ in scale], axis=1) for scale in scales],
            [jnp.concatenate([bias for _, bias in scale]) for scale in scales],
        )

    def at(self, scale: int, features: Float[Array, "*n c"]) -> Float[Array, "*n k"]:
        """The scores that one scale's features contribute."""
        bias = self.biases[scale].astype(features.dtype).reshape((1,) * (features.ndim - 1) + (-1,))
        return features @ self.matrices[scale].astype(features.dtype) + bias


class Sums(NamedTuple):
    """What the losses need of a batch, summed over space; softmax is taken within each protocol."""

    cross_entropy: Float[Array, "b p"]
    intersection: Float[Array, "b k"]  # probability on the voxels of the class
    predicted: Float[Array, "b k"]  # probability everywhere
    reference: Float[Array, "b k"]  # voxels of the class


def scores(features: list[Array], readout: Readout) -> Float[Array, "b x y z k"]:
    """All scores at full resolution, the plain way: for small inputs, and what the fused form is tested against."""
    return conv.upsample(_half_scores(features, readout)) + readout.at(0, features[0])


def loss_sums(
    features: list[Array], readout: Readout, labels: Integer[Array, "b p x y z"], classes: tuple[int, ...]
) -> Sums:
    """The sums of cross-entropy and soft Dice per sample, in float32. `classes` per protocol, in the order of
    `labels`.
    """

    def step(total: Sums, slab: Any) -> tuple[Sums, None]:
        slab_features, slab_halves, slab_labels = slab
        slab_scores = _parity_scores(slab_features, slab_halves, readout)
        return jax.tree.map(jnp.add, total, voxel_sums(slab_scores, _parities(slab_labels), classes)), None

    b, k = labels.shape[0], sum(classes)
    zeros = Sums(jnp.zeros((b, len(classes))), jnp.zeros((b, k)), jnp.zeros((b, k)), jnp.zeros((b, k)))
    slabs = _slabs(features, readout, jnp.moveaxis(labels, 1, -1))
    return jax.lax.scan(jax.checkpoint(step), zeros, slabs)[0]


def voxel_sums(
    scores: Float[Array, "b x y z k"], labels: Integer[Array, "b x y z p"], classes: tuple[int, ...]
) -> Sums:
    """The sums over the voxels given."""
    space = (1, 2, 3)
    parts = []
    for p, (start, stop) in enumerate(spans(classes)):
        logits = scores[..., start:stop].astype(jnp.float32)
        truth = labels[..., p : p + 1].astype(jnp.int32) == jnp.arange(stop - start).reshape(1, 1, 1, 1, -1)
        log_total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        probability = jnp.exp(logits - log_total)
        cross_entropy = log_total[..., 0] - jnp.sum(jnp.where(truth, logits, 0.0), axis=-1)
        parts.append(
            (
                jnp.sum(cross_entropy, axis=space)[:, None],
                jnp.sum(jnp.where(truth, probability, 0.0), axis=space),
                jnp.sum(probability, axis=space),
                jnp.sum(truth, axis=space, dtype=jnp.float32),
            )
        )
    return Sums(*(jnp.concatenate(column, axis=1) for column in zip(*parts, strict=True)))


def labels(features: list[Array], readout: Readout, classes: tuple[int, ...]) -> Integer[Array, "b p x y z"]:
    """The class of the highest score for every protocol, as uint8; the lower class on a tie."""

    def step(_: None, slab: Any) -> tuple[None, Array]:
        slab_features, slab_halves = slab
        slab_scores = _parity_scores(slab_features, slab_halves, readout)
        chosen = [jnp.argmax(slab_scores[..., a:b], axis=-1).astype(jnp.uint8) for a, b in spans(classes)]
        return None, _interleave(jnp.stack(chosen, axis=-1))

    _, slabs = jax.lax.scan(step, None, _slabs(features, readout))  # s b m y z p
    b, x = features[0].shape[:2]
    whole = jnp.moveaxis(slabs, 0, 1).reshape(b, x, *slabs.shape[3:])
    return jnp.moveaxis(whole, -1, 1)


def spans(classes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where each protocol's classes begin and end among all `k`."""
    ends = [sum(classes[: i + 1]) for i in range(len(classes))]
    return [(end - count, end) for end, count in zip(ends, classes, strict=True)]


def _half_scores(features: list[Array], readout: Readout) -> Float[Array, "b x/2 y/2 z/2 k"]:
    coarsest = len(features) - 1
    total = readout.at(coarsest, features[coarsest])
    for scale in reversed(range(1, coarsest)):
        total = conv.upsample(total) + readout.at(scale, features[scale])
    return total


def _slabs(features: list[Array], readout: Readout, *full: Array) -> tuple[Array, ...]:
    """Full-resolution features, half-resolution scores upsampled along x, and `full` arrays, cut along x for a scan:
    [s b m …].
    """
    halves = conv.upsample_axis(_half_scores(features, readout), 1)  # b x y/2 z/2 k
    b, x, y, z, _ = features[0].shape
    budget = SLAB_BYTES.get(jax.default_backend(), SLAB_BYTES["other"])
    most = max(1, budget // (4 * b * y * z * halves.shape[-1]))
    thickness = max(m for m in range(1, x + 1) if x % m == 0 and m <= most)

    def cut(array: Array) -> Array:
        return jnp.moveaxis(array.reshape(b, x // thickness, thickness, *array.shape[2:]), 1, 0)

    return tuple(cut(array) for array in (features[0], halves, *full))


def _parity_scores(features: Array, halves: Array, readout: Readout) -> Float[Array, "b 4m y/2 z/2 k"]:
    """A slab's scores, its voxels sorted as by `_parities`."""
    upsampled = [part for rows in conv.upsample_parts(halves, 2) for part in conv.upsample_parts(rows, 3)]
    return jnp.concatenate(upsampled, axis=1) + readout.at(0, _parities(features))


def _parities(x: Float[Array, "b m y z c"]) -> Float[Array, "b 4m y/2 z/2 c"]:
    """The voxels of even/even, even/odd, odd/even and odd/odd y and z, one after the other."""
    b, m, y, z, c = x.shape
    sorted_ = x.reshape(b, m, y // 2, 2, z // 2, 2, c)
    return jnp.concatenate([sorted_[:, :, :, i, :, j] for i in (0, 1) for j in (0, 1)], axis=1)


def _interleave(x: Float[Array, "b 4m y/2 z/2 c"]) -> Float[Array, "b m y z c"]:
    """Undoes `_parities`."""
    b, m, y, z, c = x.shape
    sorted_ = x.reshape(b, 2, 2, m // 4, y, z, c)  # b i j m y/2 z/2 c
    return sorted_.transpose(0, 3, 4, 1, 5, 2, 6).reshape(b, m // 4, 2 * y, 2 * z, c)
