"""From sums over space to one number."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from neuronet_jax.config import LossConfig
from neuronet_jax.models.head import Sums
from neuronet_jax.models.readout import spans


def combine(
    sums: Sums, present: Bool[Array, "b p"], voxels: int, classes: tuple[int, ...], weights: LossConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, " p"]]]:
    """The loss, and its parts per protocol: `cross_entropy` [p] and, where it weighs, `dice` [p] (soft, 1 is perfect).

    Cross-entropy is the mean over the voxels of the samples that have the protocol. Dice takes the whole batch as one
    volume and averages over the classes that occur in it, background left out: a class that a crop does not hold says
    nothing about its overlap, and cross-entropy already punishes predicting it. Protocols weigh equally; one that no
    sample has weighs nothing.
    """
    of_sample, weight = entropy_weights(present, voxels)
    cross_entropy = (of_sample * sums.cross_entropy).sum(axis=0)
    loss, parts = weights.cross_entropy * jnp.sum(weight * cross_entropy), {"cross_entropy": cross_entropy}
    if weights.dice > 0:
        has = present.astype(jnp.float32)  # b p
        dice = jnp.stack([_soft_dice(sums, has[:, p], span) for p, span in enumerate(spans(classes))])
        loss, parts = loss + weights.dice * jnp.sum(weight * (1.0 - dice)), parts | {"dice": dice}
    return loss, parts


def entropy_weights(present: Bool[Array, "b p"], voxels: int) -> tuple[Float[Array, "b p"], Float[Array, " p"]]:
    """What each sample's sum of cross-entropy weighs in its protocol's mean, and what each protocol in the loss."""
    has = present.astype(jnp.float32)
    weight = present.any(axis=0).astype(jnp.float32)
    return has / (jnp.maximum(has.sum(axis=0, keepdims=True), 1.0) * voxels), weight / jnp.maximum(weight.sum(), 1.0)


def _soft_dice(sums: Sums, has: Float[Array, " b"], span: tuple[int, int]) -> Float[Array, ""]:
    foreground = slice(span[0] + 1, span[1])
    intersection, predicted, reference = (
        (has[:, None] * part[:, foreground]).sum(axis=0) for part in (sums.intersection, sums.predicted, sums.reference)
    )
    occurs = (reference > 0).astype(jnp.float32)
    # One voxel is added above and below: a class of a few voxels must not swing the mean from 0 to 1 by one of them.
    dice = (2.0 * intersection + 1.0) / (predicted + reference + 1.0)
    # Where nothing occurs the protocol has no Dice to improve: 1, with no gradient.
    count = occurs.sum()
    return jnp.where(count > 0, (occurs * dice).sum() / jnp.maximum(count, 1.0), 1.0)
