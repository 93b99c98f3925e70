"""Sums over the voxels of a block, and their gradient by the scores: what a loss is made of.

`PerVoxel` sums any function of one voxel's scores and labels, and differentiates it as it stands. `CrossEntropy` and
`SoftDice` are two such sums with their gradient in closed form.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from neuronet_jax.models.readout import membership, spans

# One voxel's scores [k] in float32 and label [] in int32 of each protocol, by name → a pytree of float32 arrays
VoxelFunction = Callable[[dict[str, Array], dict[str, Array]], Any]


class Groups:
    """The classes of each protocol in a block, whose classes (`k`) or protocols (`p`) lie along one axis."""

    def __init__(self, classes: tuple[int, ...], class_axis: int):
        self.classes, self.class_axis = classes, class_axis
        index = np.concatenate([np.arange(count) for count in classes]).astype(np.float32)  # within its protocol
        self.index = index.reshape(1, 1, 1, 1, 1, *self._around(-1))

    def softmax(self, scores: Float[Array, "*k"]) -> tuple[Float[Array, "*p"], Float[Array, "*k"], Float[Array, "*p"]]:
        """Returns the highest score of each protocol, exp(score − highest), and the sum of that."""
        top = self._each(scores, jnp.max)
        exponential = jnp.exp(scores - self.spread(top))
        return top, exponential, self.total(exponential)

    def probability(self, scores: Float[Array, "*k"]) -> Float[Array, "*k"]:
        """Computes the softmax within each protocol."""
        _, exponential, norm = self.softmax(scores)
        return exponential * self.spread(1.0 / norm)

    def truth(self, labels: Integer[Array, "*p"]) -> Bool[Array, "*k"]:
        """Tells whether a class is the labelled one."""
        return self.spread(labels.astype(jnp.float32)) == self.index

    def highest(self, scores: Float[Array, "*k"]) -> Integer[Array, "*p"]:
        """Returns the index of the highest score within each protocol, uint8: the lower one on a tie, 0 where scores
        are NaN.

        A comparison and a minimum, which vectorise where an argmax does not.
        """
        is_top = scores == self.spread(self._each(scores, jnp.max))
        first = self._each(jnp.where(is_top, self.index, np.float32(256)), jnp.min)
        return jnp.where(first < 256, first, 0).astype(jnp.uint8)

    def total(self, x: Float[Array, "*k"]) -> Float[Array, "*p"]:
        """Sums over the classes of each protocol."""
        return self._each(x, jnp.sum)

    def spread(self, x: Float[Array, "*p"]) -> Float[Array, "*k"]:
        """Repeats a protocol's value for each of its classes."""
        parts = [
            jnp.broadcast_to(jax.lax.slice_in_dim(x, p, p + 1, axis=self.class_axis), (*x.shape[:5], *shape))
            for p, shape in enumerate(self._around(count, x.shape[5:]) for count in self.classes)
        ]
        return jnp.concatenate(parts, axis=self.class_axis)

    def per_sample(self, block: Array) -> Float[Array, "b n"]:
        """Sums over space; `n` are classes or protocols."""
        return jnp.sum(block, axis=tuple(axis for axis in range(7) if axis not in (2, self.class_axis)))

    def per_class(self, values: Float[Array, "b n"]) -> Array:
        """Shapes values per sample so that they broadcast with a block; `n` are classes or protocols."""
        b, n = values.shape
        return values.reshape(1, 1, b, 1, 1, *self._around(n))

    def split(self, x: Float[Array, "*k"]) -> list[Array]:
        """Returns the classes of each protocol apart."""
        return [jax.lax.slice_in_dim(x, a, b, axis=self.class_axis) for a, b in spans(self.classes)]

    def _each(self, x: Float[Array, "*k"], reduce: Callable[..., Array]) -> Float[Array, "*p"]:
        parts = [reduce(part, axis=self.class_axis, keepdims=True) for part in self.split(x)]
        return jnp.concatenate(parts, axis=self.class_axis)

    def _around(self, count: int, last: tuple[int, ...] = (1, 1)) -> tuple[int, int]:
        """Returns the last two sides of a block, with `count` along the axis of classes."""
        return (count, last[1]) if self.class_axis == 5 else (last[0], count)


class GroupsByProduct(Groups):
    """The same sums as products with a 0/1 matrix: 4 classes do not fill a CPU's vector. Classes lie last."""

    def __init__(self, classes: tuple[int, ...], class_axis: int):
        super().__init__(classes, class_axis)
        self.members = membership(classes)

    def total(self, x: Float[Array, "*k"]) -> Float[Array, "*p"]:
        return jnp.matmul(x, self.members, precision="highest")

    def spread(self, x: Float[Array, "*p"]) -> Float[Array, "*k"]:
        return jnp.matmul(x, self.members.T, precision="highest")


class GroupsByChoice(Groups):
    """The same with choices in place of concatenations, each of which a TPU writes to memory as a block of its own."""

    def spread(self, x: Float[Array, "*p"]) -> Float[Array, "*k"]:
        first, *others = (jax.lax.slice_in_dim(x, p, p + 1, axis=self.class_axis) for p in range(len(self.classes)))
        place = np.arange(self.index.size).reshape(self.index.shape)  # among the classes of all protocols
        spread = jnp.broadcast_to(first, (*x.shape[:5], *self._around(self.index.size, x.shape[5:])))
        for (start, _), value in zip(spans(self.classes)[1:], others, strict=True):
            spread = jnp.where(place >= start, value, spread)
        return spread


class Tally(Protocol):
    """A sum over the voxels of each sample, in float32."""

    def sums(self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"]) -> Any:
        """Sums over a block's voxels: a pytree of [b …]."""
        ...

    def gradient(
        self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"], by_sums: Any
    ) -> Float[Array, "*k"]:
        """Turns a gradient by the sums into that by the block's scores."""
        ...


class PerVoxel(NamedTuple):
    """Sums of any function of a voxel, differentiated as it stands.

    `function` may close over constants, but over nothing that JAX traces.
    """

    function: VoxelFunction
    protocols: tuple[str, ...]  # those of the network, in its order

    def sums(self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"]) -> Any:
        voxels = jax.vmap(self._of_voxel, in_axes=6 - groups.class_axis)  # w
        for _ in range(5):
            voxels = jax.vmap(voxels)  # j i b u y
        found = voxels(groups.split(scores), jnp.split(labels, len(self.protocols), axis=groups.class_axis))
        return jax.tree.map(lambda x: jnp.sum(x, axis=(0, 1, 3, 4, 5)), found)  # b …

    def gradient(
        self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"], by_sums: Any
    ) -> Float[Array, "*k"]:
        _, pull = jax.vjp(lambda scores: self.sums(groups, scores, labels), scores)
        return pull(by_sums)[0]

    def _of_voxel(self, scores: list[Array], labels: list[Array]) -> Any:
        truth = [label[0].astype(jnp.int32) for label in labels]
        return self.function(
            dict(zip(self.protocols, scores, strict=True)), dict(zip(self.protocols, truth, strict=True))
        )


class CrossEntropy(NamedTuple):
    """Sums of each protocol's cross-entropy, [b p]. A score's gradient is probability − truth."""

    def sums(self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"]) -> Float[Array, "b p"]:
        top, _, norm = groups.softmax(scores)
        of_truth = groups.total(jnp.where(groups.truth(labels), scores, 0.0))
        return groups.per_sample(jnp.log(norm) + top - of_truth)

    def gradient(
        self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"], by_sums: Float[Array, "b p"]
    ) -> Float[Array, "*k"]:
        by_voxel = groups.spread(groups.per_class(by_sums))
        return by_voxel * (groups.probability(scores) - groups.truth(labels).astype(jnp.float32))


class Overlap(NamedTuple):
    """The sums of soft Dice."""

    intersection: Float[Array, "b k"]  # probability on the voxels of the class
    predicted: Float[Array, "b k"]  # probability everywhere
    reference: Float[Array, "b k"]  # voxels of the class


class SoftDice(NamedTuple):
    """The sums of soft Dice. A sum Σ vq of weighted probabilities has the gradient q (v − Σ vq) by the scores."""

    def sums(self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"]) -> Overlap:
        probability, truth = groups.probability(scores), groups.truth(labels)
        overlap = jnp.where(truth, probability, 0.0)
        return Overlap(*map(groups.per_sample, (overlap, probability, truth.astype(jnp.float32))))

    def gradient(
        self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"], by_sums: Overlap
    ) -> Float[Array, "*k"]:
        probability, truth = groups.probability(scores), groups.truth(labels)
        value = groups.per_class(by_sums.predicted) + jnp.where(truth, groups.per_class(by_sums.intersection), 0.0)
        return probability * (value - groups.spread(groups.total(probability * value)))


class Together(NamedTuple):
    """Several tallies in one pass, which computes the scores once. Their sums are a tuple."""

    tallies: tuple[Tally, ...]

    def sums(self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"]) -> tuple[Any, ...]:
        return tuple(tally.sums(groups, scores, labels) for tally in self.tallies)

    def gradient(
        self, groups: Groups, scores: Float[Array, "*k"], labels: Integer[Array, "*p"], by_sums: tuple[Any, ...]
    ) -> Float[Array, "*k"]:
        parts = [t.gradient(groups, scores, labels, by) for t, by in zip(self.tallies, by_sums, strict=True)]
        return sum(parts[1:], parts[0])
