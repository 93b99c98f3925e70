"""The loss: a weighted sum of terms, each from sums over the voxels of a crop to one number.

`terms` lists them. docs/architecture.md shows how to add one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from neuronet_jax.config import LossConfig
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.models.head_tallies import CrossEntropy, Overlap, PerVoxel, SoftDice, Tally
from neuronet_jax.models.readout import spans

Metrics = dict[str, Float[Array, ""]]

# [tissue structure] 1 where the tissue holds the structure: MALP-EM's own merge
_TISSUE_OF = np.equal(np.arange(MALP_EM_TO_TISSUE.max() + 1)[:, None], MALP_EM_TO_TISSUE[None, :]).astype(np.float32)
_LEAST = np.float32(1e-30)  # a probability below it counts as that in a logarithm, whose slope stays finite in float32


class Crops(NamedTuple):
    """The data about the crops of a batch that the sums do not contain."""

    present: Bool[Array, "b p"]  # whether a crop's subject has the protocol
    voxels: int  # of one crop
    protocols: tuple[str, ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Returns the begin and end of each protocol's classes."""
        return spans(tuple(PROTOCOLS[name].num_classes for name in self.protocols))


class Term(NamedTuple):
    """One summand of the loss. A sample that lacks a protocol must neither count for it nor have a gradient from it."""

    weight: float
    tally: Tally  # what is summed over the voxels of each sample
    value: Callable[[Any, Crops], tuple[Float[Array, ""], Metrics]]  # sums → the loss, and what a run's metrics show
    is_linear: bool  # the value is linear in the sums, so that one pass over the voxels gives value and gradient


def terms(config: LossConfig, protocols: tuple[str, ...]) -> tuple[Term, ...]:
    """Returns the summands that have a weight."""
    if config.class_balance > 0:

        def value(sums: "ClassEntropy", crops: Crops) -> tuple[Array, Metrics]:
            return balanced_cross_entropy(sums, crops, config.class_balance)

        entropy = Term(config.cross_entropy, PerVoxel(entropy_by_class, protocols), value, is_linear=False)
    else:
        entropy = Term(config.cross_entropy, CrossEntropy(), cross_entropy, is_linear=True)
    every = (
        entropy,
        Term(config.dice, SoftDice(), soft_dice, is_linear=False),
        Term(config.consistency, PerVoxel(tissue_divergence, protocols), consistency, is_linear=True),
    )
    return tuple(term for term in every if term.weight > 0)


def total(summands: tuple[Term, ...], sums: tuple[Any, ...], crops: Crops) -> tuple[Float[Array, ""], Metrics]:
    """Adds the terms up. `sums` has those of each term's tally."""
    loss, metrics = jnp.float32(0.0), {}
    for term, of_term in zip(summands, sums, strict=True):
        value, shown = term.value(of_term, crops)
        loss, metrics = loss + term.weight * value, metrics | shown
    return loss, metrics


# --- Cross-entropy


def cross_entropy(sums: Float[Array, "b p"], crops: Crops) -> tuple[Float[Array, ""], Metrics]:
    """Averages each protocol's cross-entropy over the voxels of the samples that have it, then over the protocols."""
    has = crops.present.astype(jnp.float32)
    mean = (has * sums).sum(axis=0) / (jnp.maximum(has.sum(axis=0), 1.0) * crops.voxels)
    return _mean_of_protocols(mean, crops), _named("cross_entropy", mean, crops)


class ClassEntropy(NamedTuple):
    """Sums by the true class of each voxel."""

    entropy: Float[Array, "b k"]
    voxels: Float[Array, "b k"]


def entropy_by_class(scores: dict[str, Array], labels: dict[str, Array]) -> ClassEntropy:
    """Returns a voxel's cross-entropy, at its true class of each protocol."""
    entropy, voxels = [], []
    for name, of_class in scores.items():
        truth = (jnp.arange(len(of_class)) == labels[name]).astype(jnp.float32)
        entropy.append(-truth * jax.nn.log_softmax(of_class))
        voxels.append(truth)
    return ClassEntropy(jnp.concatenate(entropy), jnp.concatenate(voxels))


def balanced_cross_entropy(sums: ClassEntropy, crops: Crops, power: float) -> tuple[Float[Array, ""], Metrics]:
    """Averages cross-entropy over voxels weighted by their class: n^−power, n being the class's voxels in the batch.

    With power 0 every voxel weighs the same; with power 1 every class that occurs does, however small. Generalised
    Dice weighs classes by the same rule, with power 2 (Sudre et al., DLMIA 2017, arXiv 1707.03237).
    """
    has, means = crops.present.astype(jnp.float32), []
    for p, (start, stop) in enumerate(crops.spans):
        entropy, voxels = ((has[:, p, None] * part[:, start:stop]).sum(axis=0) for part in sums)  # k
        weight = jnp.where(voxels > 0, jnp.maximum(voxels, 1.0) ** -power, 0.0)
        means.append((weight * entropy).sum() / jnp.maximum((weight * voxels).sum(), _LEAST))
    mean = jnp.stack(means)
    return _mean_of_protocols(mean, crops), _named("balanced_cross_entropy", mean, crops)


# --- Soft Dice


def soft_dice(sums: Overlap, crops: Crops) -> tuple[Float[Array, ""], Metrics]:
    """Returns 1 − the mean soft Dice of the protocols; the metrics show Dice (1 is perfect).

    Dice takes the whole batch as one volume and averages over the classes that occur in it, without the background: a
    class that a crop does not hold says nothing about its overlap, and cross-entropy already punishes predicting it.
    """
    has = crops.present.astype(jnp.float32)
    dice = jnp.stack([_dice_of_protocol(sums, has[:, p], span) for p, span in enumerate(crops.spans)])
    return _mean_of_protocols(1.0 - dice, crops), _named("dice", dice, crops)


def _dice_of_protocol(sums: Overlap, has: Float[Array, " b"], span: tuple[int, int]) -> Float[Array, ""]:
    foreground = slice(span[0] + 1, span[1])
    intersection, predicted, reference = ((has[:, None] * part[:, foreground]).sum(axis=0) for part in sums)
    occurs = (reference > 0).astype(jnp.float32)
    # One voxel is added above and below: a class of a few voxels must not swing the mean from 0 to 1 by one of them.
    dice = (2.0 * intersection + 1.0) / (predicted + reference + 1.0)
    # Where nothing occurs the protocol has no Dice to improve: 1, with no gradient.
    count = occurs.sum()
    return jnp.where(count > 0, (occurs * dice).sum() / jnp.maximum(count, 1.0), 1.0)


# --- Consistency of the structures with the tissues


def tissue_divergence(scores: dict[str, Array], labels: dict[str, Array]) -> Float[Array, ""]:
    """Returns a voxel's Jensen–Shannon divergence (Lin, IEEE Trans. Inf. Theory 1991), in nats, between the predicted
    tissues and those that the predicted structures imply.

    It is symmetric, so that each protocol learns from the other, and at most ln 2, so that no voxel outweighs the rest.
    """
    del labels  # it compares predictions
    implied = jnp.matmul(_TISSUE_OF, jax.nn.softmax(scores["malp_em"]), precision="highest")
    predicted = jax.nn.softmax(scores["malp_em_tissue"])
    middle = jnp.log(jnp.maximum(0.5 * (implied + predicted), _LEAST))
    parts = [q * (jnp.log(jnp.maximum(q, _LEAST)) - middle) for q in (implied, predicted)]
    return 0.5 * jnp.sum(parts[0] + parts[1])


def consistency(sums: Float[Array, " b"], crops: Crops) -> tuple[Float[Array, ""], Metrics]:
    """Averages the divergence over the voxels of the samples that have both protocols."""
    both = [crops.present[:, crops.protocols.index(name)] for name in ("malp_em", "malp_em_tissue")]
    has = (both[0] & both[1]).astype(jnp.float32)
    mean = (has * sums).sum() / (jnp.maximum(has.sum(), 1.0) * crops.voxels)
    return mean, {"consistency": mean}


# --- What the terms share


def _mean_of_protocols(values: Float[Array, " p"], crops: Crops) -> Float[Array, ""]:
    """Averages over the protocols with equal weights. A protocol that no sample has weighs nothing."""
    weight = crops.present.any(axis=0).astype(jnp.float32)
    return jnp.sum(weight * values) / jnp.maximum(weight.sum(), 1.0)


def _named(name: str, values: Float[Array, " p"], crops: Crops) -> Metrics:
    return {f"{name}/{protocol}": values[p] for p, protocol in enumerate(crops.protocols)}
