"""The fused head: the loss and the labels of every protocol, block by block, never the whole volume of scores.

All but the last addition of the readout happens at half resolution or less. The last upsampling, the addition and what
the caller wants of the scores (loss sums or labels) go block by block (`blocks.py`), so that the tensor of all classes
at full resolution (1.4 GB for one 128³ crop) exists in neither pass: the backward pass computes a block's scores again,
and from them in closed form what the loss says about them.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from neuronet_jax.models.head_blocks import Blocks, Form, Protocols, on_platform
from neuronet_jax.models.readout import Readout, spans


class Sums(NamedTuple):
    """What the losses need of a batch, summed over space; softmax is taken within each protocol."""

    cross_entropy: Float[Array, "b p"]
    intersection: Float[Array, "b k"]  # probability on the voxels of the class
    predicted: Float[Array, "b k"]  # probability everywhere
    reference: Float[Array, "b k"]  # voxels of the class


def voxel_sums(
    scores: Float[Array, "b x y z k"], labels: Integer[Array, "b x y z p"], classes: tuple[int, ...]
) -> Sums:
    """The sums over the voxels given, the plain way."""
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


def loss_sums(
    features: list[Array],
    readout: Readout,
    labels: Integer[Array, "b p x y z"],
    classes: tuple[int, ...],
) -> Sums:
    """The sums of cross-entropy and soft Dice per sample, in float32. `classes` per protocol, in the order of
    `labels`.
    """
    return _full_sums(classes, features, readout, labels)


def weighted_entropy(
    features: list[Array],
    readout: Readout,
    labels: Integer[Array, "b p x y z"],
    classes: tuple[int, ...],
    weights: Float[Array, "b p"],
) -> tuple[Float[Array, ""], Float[Array, "b p"]]:
    """The weighted sum of all cross-entropies, and each of them, per sample and summed over space, without gradient.

    As the weights are known beforehand, one pass computes the sum and its gradient, where `loss_sums` takes two.
    """
    return _weighted(classes, features, readout, labels, weights)


def labels(features: list[Array], readout: Readout, classes: tuple[int, ...]) -> Integer[Array, "b p x y z"]:
    """The class of the highest score for every protocol, as uint8; the lower class on a tie."""
    return on_platform(partial(_labels, classes), features, readout)


# The loss: the sums forward; backward, their closed-form gradient by score, carried on to features and readout.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _full_sums(classes: tuple[int, ...], features: list[Array], readout: Readout, labels: Array) -> Sums:
    return on_platform(partial(_sum_blocks, classes, True), features, readout, labels)


def _full_sums_forward(classes: tuple[int, ...], *arguments: Any) -> tuple[Sums, Any]:
    return _full_sums(classes, *arguments), arguments


def _full_sums_backward(classes: tuple[int, ...], arguments: Any, sensitivity: Sums) -> Any:
    _, gradients = on_platform(partial(_pull_blocks, classes, True), sensitivity, *arguments)
    return (*gradients, None)


_full_sums.defvjp(_full_sums_forward, _full_sums_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(classes: tuple[int, ...], features: list[Array], readout: Readout, labels: Array, weights: Array) -> Any:
    sums = on_platform(partial(_sum_blocks, classes, False), features, readout, labels).cross_entropy
    return jnp.sum(weights * sums), sums


def _weighted_forward(
    classes: tuple[int, ...], features: list[Array], readout: Readout, labels: Array, weights: Array
) -> tuple[Any, Any]:
    nothing = jnp.zeros((weights.shape[0], sum(classes)))
    sensitivity = Sums(weights, nothing, nothing, nothing)
    sums, gradients = on_platform(partial(_pull_blocks, classes, False), sensitivity, features, readout, labels)
    return (jnp.sum(weights * sums), sums), gradients


def _weighted_backward(classes: tuple[int, ...], gradients: Any, sensitivity: tuple[Array, Array]) -> Any:
    scaled = jax.tree.map(lambda gradient: sensitivity[0].astype(gradient.dtype) * gradient, gradients)
    return (*scaled, None, None)


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _sum_blocks(
    classes: tuple[int, ...], dice: bool, form: Form, features: list[Array], readout: Readout, labels: Array
) -> Sums:
    matrix, bias = readout.matrices[0], readout.biases[0]
    blocks = Blocks(form, features[0].shape, matrix.shape[1])
    fine, halves = blocks.volume(features[0]), blocks.halves(features[1:], readout)
    truth = blocks.volume(jnp.moveaxis(labels, 1, -1))
    protocols = Protocols(form, classes)

    def step(total: Sums, index: Array) -> tuple[Sums, None]:
        scores = blocks.scores(index, fine, halves, matrix, bias)
        here = protocols.truth(blocks.cut(index, truth))
        top, exponential, norm = protocols.softmax(scores)
        cross_entropy = blocks.per_sample(protocols.entropy(scores, here, top, norm))
        if not dice:
            return total._replace(cross_entropy=total.cross_entropy + cross_entropy), None
        probability = exponential * protocols.spread(1.0 / norm)
        overlap = jnp.where(here, probability, 0.0)
        parts = Sums(cross_entropy, *map(blocks.per_sample, (overlap, probability, here.astype(jnp.float32))))
        return jax.tree.map(jnp.add, total, parts), None

    b, k = labels.shape[0], matrix.shape[1]
    zeros = Sums(jnp.zeros((b, len(classes))), jnp.zeros((b, k)), jnp.zeros((b, k)), jnp.zeros((b, k)))
    return jax.lax.scan(step, zeros, jnp.arange(blocks.count))[0]


def _pull_blocks(
    classes: tuple[int, ...],
    dice: bool,
    form: Form,
    sensitivity: Sums,
    features: list[Array],
    readout: Readout,
    labels: Array,
) -> tuple[Float[Array, "b p"], tuple[list[Array], Readout]]:
    """Gradients by features and readout from those by the sums; before them, without `dice`, the sums of cross-entropy
    themselves.

    With probabilities q and truth t, cross-entropy gives a score the gradient q − t, and a sum Σ vq of weighted
    probabilities gives it q (v − Σ vq).
    """
    matrix, bias = readout.matrices[0], readout.biases[0]
    blocks = Blocks(form, features[0].shape, matrix.shape[1])
    fine = blocks.volume(features[0])
    halves, pull_halves = jax.vjp(blocks.halves, features[1:], readout)
    truth = blocks.volume(jnp.moveaxis(labels, 1, -1))
    protocols = Protocols(form, classes)
    of_entropy = protocols.spread(blocks.per_class(sensitivity.cross_entropy))
    of_overlap, of_predicted = blocks.per_class(sensitivity.intersection), blocks.per_class(sensitivity.predicted)

    def step(total: tuple[Array, ...], index: Array) -> tuple[tuple[Array, ...], None]:
        cross_entropy, fine_gradient, half_gradient, matrix_gradient, bias_gradient = total
        scores = blocks.scores(index, fine, halves, matrix, bias)
        here = protocols.truth(blocks.cut(index, truth))
        top, exponential, norm = protocols.softmax(scores)
        probability = exponential * protocols.spread(1.0 / norm)
        gradient = of_entropy * (probability - here.astype(jnp.float32))
        if dice:
            value = of_predicted + jnp.where(here, of_overlap, 0.0)
            gradient += probability * (value - protocols.spread(protocols.sums(probability * value)))
        else:
            cross_entropy += blocks.per_sample(protocols.entropy(scores, here, top, norm))
        by_fine, by_matrix, by_bias = blocks.unmix(gradient.astype(fine.dtype), blocks.cut(index, fine), matrix)
        return (
            cross_entropy,
            blocks.put(index, fine_gradient, by_fine),
            blocks.add_halves(index, half_gradient, gradient),
            matrix_gradient + by_matrix,
            bias_gradient + by_bias,
        ), None

    sums = jnp.zeros_like(sensitivity.cross_entropy)
    zeros = sums, jnp.zeros_like(fine), jnp.zeros_like(halves), jnp.zeros(matrix.shape), jnp.zeros(bias.shape)
    sums, by_fine, by_halves, by_matrix, by_bias = jax.lax.scan(step, zeros, jnp.arange(blocks.count))[0]
    by_coarse, by_readout = pull_halves(by_halves)
    by_readout.matrices[0], by_readout.biases[0] = by_matrix, by_bias  # which `halves` does not read
    return sums, ([blocks.volume_back(by_fine), *by_coarse], by_readout)


def _labels(
    classes: tuple[int, ...], form: Form, features: list[Array], readout: Readout
) -> Integer[Array, "b p x y z"]:
    matrix, bias = readout.matrices[0], readout.biases[0]
    blocks = Blocks(form, features[0].shape, matrix.shape[1])
    fine, halves = blocks.volume(features[0]), blocks.halves(features[1:], readout)
    protocols = Protocols(form, classes)

    def step(chosen: Array, index: Array) -> tuple[Array, None]:
        scores = blocks.scores(index, fine, halves, matrix, bias)
        return blocks.put(index, chosen, protocols.highest(scores)), None

    empty = blocks.volume(jnp.zeros((*features[0].shape[:4], len(classes)), jnp.uint8))
    chosen, _ = jax.lax.scan(step, empty, jnp.arange(blocks.count))
    return jnp.moveaxis(blocks.volume_back(chosen), -1, 1)
