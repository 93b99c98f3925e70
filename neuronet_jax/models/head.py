"""The fused readout: sums and labels from the scores of every class, block by block, never all scores at a time.

All of the readout but its last addition happens at half resolution or less. The last upsampling and the addition go
block by block (`head_blocks.py`), and so does whatever a loss sums over voxels (`head_tallies.py`). The scores of all
classes at full resolution, 1.4 GB for one 128³ crop, exist in neither pass: the backward pass computes a block's scores
again, and from them their gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Float, Integer

from neuronet_jax.models.head_blocks import Blocks, ClassesLast, XLast
from neuronet_jax.models.head_tallies import Groups, GroupsByChoice, GroupsByProduct, Tally
from neuronet_jax.models.readout import Readout


class Platform(NamedTuple):
    """The layout, block size and class sums of a platform."""

    layout: Callable[[tuple[int, ...], int, int], Blocks]
    groups: Callable[[tuple[int, ...], int], Groups]
    block_bytes: int  # scores that a device holds at a time, in float32


PLATFORMS = {
    "cpu": Platform(ClassesLast, GroupsByProduct, 2 * 2**20),  # two cores' second-level caches
    "tpu": Platform(XLast, GroupsByChoice, 24 * 2**20),  # a fraction of the 64 to 128 MiB of vector memory
    "default": Platform(ClassesLast, Groups, 128 * 2**20),  # fills a GPU
}


def scan(
    tally: Tally,
    features: list[Array],
    readout: Readout,
    labels: Integer[Array, "b p x y z"],
    classes: tuple[int, ...],
) -> Any:
    """Sums a tally over the voxels of each sample: a pytree of [b …]. `classes` per protocol, in the order of `labels`.

    The gradient by features and readout takes a second pass over the blocks.
    """
    return _scan((tally, classes), features, readout, labels)


def scan_weighted(
    tally: Tally,
    weights: Any,
    features: list[Array],
    readout: Readout,
    labels: Integer[Array, "b p x y z"],
    classes: tuple[int, ...],
) -> tuple[Float[Array, ""], Any]:
    """Returns Σ weights · sums, and the sums of `scan`, which have no gradient here.

    As the weights are known beforehand, one pass computes the sum and its gradient, where `scan` takes two.
    """
    return _scan_weighted((tally, classes), features, readout, labels, weights)


def sums_like(tally: Tally, samples: int, classes: tuple[int, ...]) -> Any:
    """Returns the shapes of the sums."""
    block = (2, 2, samples, 1, 1, 2)
    groups = Groups(classes, class_axis=6)
    scores = jax.ShapeDtypeStruct((*block, sum(classes)), jnp.float32)
    labels = jax.ShapeDtypeStruct((*block, len(classes)), jnp.uint8)
    return jax.eval_shape(partial(tally.sums, groups), scores, labels)


def zero_sums(tally: Tally, samples: int, classes: tuple[int, ...]) -> Any:
    """Returns sums over no voxels."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums_like(tally, samples, classes))


def labels(features: list[Array], readout: Readout, classes: tuple[int, ...]) -> Integer[Array, "b p x y z"]:
    """Returns the class of the highest score for every protocol, as uint8; the lower class on a tie."""
    return _on_platform(partial(_labels, classes), features, readout)


What = tuple[Tally, tuple[int, ...]]  # and the number of classes per protocol


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(what: What, features: list[Array], readout: Readout, labels: Array) -> Any:
    return _on_platform(partial(_sum_blocks, what), features, readout, labels)


def _scan_forward(what: What, *arguments: Any) -> tuple[Any, Any]:
    return _scan(what, *arguments), arguments


def _scan_backward(what: What, arguments: Any, by_sums: Any) -> Any:
    _, gradients = _on_platform(partial(_pull_blocks, what), by_sums, *arguments)
    return (*gradients, None)


_scan.defvjp(_scan_forward, _scan_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan_weighted(what: What, features: list[Array], readout: Readout, labels: Array, weights: Any) -> Any:
    sums = _on_platform(partial(_sum_blocks, what), features, readout, labels)
    return _inner(weights, sums), sums


def _weighted_forward(
    what: What, features: list[Array], readout: Readout, labels: Array, weights: Any
) -> tuple[Any, Any]:
    sums, gradients = _on_platform(partial(_pull_blocks, what), weights, features, readout, labels)
    return (_inner(weights, sums), sums), gradients


def _weighted_backward(what: What, gradients: Any, by_result: tuple[Array, Any]) -> Any:
    scaled = jax.tree.map(lambda gradient: by_result[0].astype(gradient.dtype) * gradient, gradients)
    return (*scaled, None, None)


_scan_weighted.defvjp(_weighted_forward, _weighted_backward)


def _inner(a: Any, b: Any) -> Float[Array, ""]:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def _on_platform(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(platform, *arguments)` with the platform that the program is lowered for."""
    if any(export.is_symbolic_dim(side) for array in jax.tree.leaves(arguments) for side in array.shape):
        return function(PLATFORMS["default"], *arguments)  # other layouts need known sides
    branches = {name: partial(function, platform) for name, platform in PLATFORMS.items()}
    return jax.lax.platform_dependent(*arguments, **branches)


class _Volume:
    """A volume in blocks: the parts that its scores follow from, as a platform lays them out."""

    def __init__(self, platform: Platform, classes: tuple[int, ...], features: list[Array], readout: Readout):
        self.matrix, self.bias = readout.matrices[0], readout.biases[0]
        # Every block is split among all devices of the mesh, as crops and y are.
        block_bytes = platform.block_bytes * max(1, jax.sharding.get_abstract_mesh().size)
        self.blocks = platform.layout(features[0].shape, self.matrix.shape[1], block_bytes)
        self.groups = platform.groups(classes, self.blocks.class_axis)
        self.fine, self.halves = self.blocks.volume(features[0]), self.blocks.halves(features[1:], readout)

    def scores(self, index: Array) -> Float[Array, "*k"]:
        return self.blocks.scores(index, self.fine, self.halves, self.matrix, self.bias)


def _sum_blocks(what: What, platform: Platform, features: list[Array], readout: Readout, labels: Array) -> Any:
    tally, classes = what
    volume = _Volume(platform, classes, features, readout)
    blocks, truth = volume.blocks, volume.blocks.truth(labels)

    def step(total: Any, index: Array) -> tuple[Any, None]:
        here = tally.sums(volume.groups, volume.scores(index), blocks.cut(index, truth))
        return jax.tree.map(jnp.add, total, here), None

    return jax.lax.scan(step, _zeros(tally, labels, classes), jnp.arange(blocks.count))[0]


def _pull_blocks(
    what: What, platform: Platform, by_sums: Any, features: list[Array], readout: Readout, labels: Array
) -> tuple[Any, tuple[list[Array], Readout]]:
    """Returns the sums, and the gradients by features and readout that follow from those by the sums."""
    tally, classes = what
    volume = _Volume(platform, classes, features, readout)
    blocks, truth = volume.blocks, volume.blocks.truth(labels)
    fine, halves, matrix, bias = volume.fine, volume.halves, volume.matrix, volume.bias
    _, pull_halves = jax.vjp(blocks.halves, features[1:], readout)

    def step(total: tuple[Any, ...], index: Array) -> tuple[tuple[Any, ...], None]:
        sums, by_fine, by_halves, by_matrix, by_bias = total
        scores, here = volume.scores(index), blocks.cut(index, truth)
        gradient = tally.gradient(volume.groups, scores, here, by_sums)
        by_block, *by_readout = blocks.gradients(index, gradient, fine, matrix)
        return (
            jax.tree.map(jnp.add, sums, tally.sums(volume.groups, scores, here)),
            blocks.put(index, by_fine, by_block),
            blocks.add_half_gradient(index, by_halves, gradient),
            by_matrix + by_readout[0],
            by_bias + by_readout[1],
        ), None

    zeros = (
        _zeros(tally, labels, classes),
        *(jnp.zeros_like(fine), blocks.half_begin(halves), jnp.zeros(matrix.shape), jnp.zeros(bias.shape)),
    )
    sums, by_fine, by_halves, by_matrix, by_bias = jax.lax.scan(step, zeros, jnp.arange(blocks.count))[0]
    by_coarse, by_readout = pull_halves(blocks.half_total(by_halves))
    by_readout.matrices[0], by_readout.biases[0] = by_matrix, by_bias  # which `halves` does not read
    return sums, ([blocks.volume_back(by_fine), *by_coarse], by_readout)


def _zeros(tally: Tally, labels: Array, classes: tuple[int, ...]) -> Any:
    return zero_sums(tally, labels.shape[0], classes)


def _labels(
    classes: tuple[int, ...], platform: Platform, features: list[Array], readout: Readout
) -> Integer[Array, "b p x y z"]:
    volume = _Volume(platform, classes, features, readout)
    blocks = volume.blocks

    def step(chosen: Array, index: Array) -> tuple[Array, None]:
        return blocks.put(index, chosen, volume.groups.highest(volume.scores(index))), None

    empty = blocks.volume(jnp.zeros((*features[0].shape[:4], len(classes)), jnp.uint8))
    chosen, _ = jax.lax.scan(step, empty, jnp.arange(blocks.count))
    return jnp.moveaxis(blocks.volume_back(chosen), -1, 1)
