"""Reads a block's scores on any grid whose axes are parallel to the network's: labels, posteriors, sums of confidence.

Interpolation and the readout are both linear, so they commute: the finest features (few channels) and the scores of
the coarser scales (an eighth of the voxels) are interpolated first, and their channels are mixed last. The scores of
all classes exist for one plane of the new grid at a time, along x. The weights of interpolation are arguments, so one
program serves every scan of a scanner.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from neuronet_jax.inference.blocks import BLOCK, FINE, HALF, Fields
from neuronet_jax.inference.tiling import rounded_up
from neuronet_jax.labels import MALP_EM_TO_TISSUE
from neuronet_jax.models import conv
from neuronet_jax.models.readout import membership, spans

ROWS = 8  # rows of the new grid per block are padded to a multiple of it
# Voxels count towards the confidence where the background is less than e^7, 1,100 times, as likely as some structure.
DOUBT_NATS = 7.0
TISSUES = np.equal(np.arange(6)[:, None], MALP_EM_TO_TISSUE[None, :]).astype(np.float32)  # [tissue class]: the merge
_PRECISE = jax.lax.Precision.HIGH  # the default would round positions and scores to bfloat16 on a TPU


class Axis(NamedTuple):
    """Rows of the new grid along one axis, in blocks, as arrays, so that grids share programs.

    Each block has `t` rows; those beyond its own are zero.
    """

    fine: np.ndarray  # float32 [b t FINE]: weights of the block's voxels
    half: np.ndarray  # float32 [b t HALF]
    counted: np.ndarray  # float32 [b t]: 1 for the block's own rows


class Axes(NamedTuple):
    """The rows of the new grid along x, y and z."""

    x: Axis
    y: Axis
    z: Axis
    planes: np.ndarray  # int32 []: rows along x that some block has

    def of(self, block: Int[Array, "3"]) -> "Axes":
        """Returns the rows of one block, without `b`."""
        x, y, z = (
            jax.tree.map(lambda rows, i=i: jax.lax.dynamic_index_in_dim(jnp.asarray(rows), block[i], 0, False), axis)
            for i, axis in enumerate(self[:3])
        )
        return Axes(x, y, z, self.planes)


class Reading(NamedTuple):
    """The requested outputs, part of the program's key."""

    classes: tuple[int, ...]  # of each protocol, side by side
    tissue_of: int | None = None  # the protocol (malp_em) whose merge to tissues is read as one more, at the end
    posteriors: tuple[tuple[int, int], ...] = ()  # pairs of protocol and class
    confidence: bool = False

    @property
    def columns(self) -> int:
        """Number of columns of the sums."""
        tissues = 0 if self.tissue_of is None else len(TISSUES)
        return sum(self.classes) + tissues if self.confidence else 0


class Found(NamedTuple):
    """The outputs of one block; rows beyond its own are undefined."""

    labels: UInt8[Array, "u p v w"]
    posteriors: Float[Array, "u s v w"]
    sums: Float[Array, "4 k"]  # as in Confidence; tissues follow all classes


def rows(positions: np.ndarray, blocks: Sequence[np.ndarray]) -> Axis:
    """Returns the rows of an axis at float64 `positions` [n], in voxels of the volume; `blocks` are the indices of the
    rows in each block of it.
    """
    count = rounded_up(max(map(len, blocks)), ROWS)
    axes = []
    upsampling = conv.upsampling_matrix(HALF)[2:-2]  # of FINE voxels
    for b, index in enumerate(blocks):
        fine = _linear(positions[index] - b * BLOCK)
        parts = (fine, fine @ upsampling, np.ones(len(index)))
        axes.append([np.pad(part, [(0, count - len(index))] + [(0, 0)] * (part.ndim - 1)) for part in parts])
    return Axis(*(np.stack(parts).astype(np.float32) for parts in zip(*axes, strict=True)))


def read(volume: Fields, grid: Axes, reading: Reading) -> Found:
    """Reads one block on its part of the grid."""
    u, v, w = (len(axis.counted) for axis in grid[:3])
    empty = Found(
        jnp.zeros((u, len(reading.classes), v, w), jnp.uint8),
        jnp.zeros((u, len(reading.posteriors), v, w), jnp.float32),
        jnp.zeros((4, reading.columns), jnp.float32),
    )

    # x of the whole block at once, as one product, and before it loops over planes
    fine = jnp.einsum("ux,xcyz->ucyz", grid.x.fine, volume.fine.astype(jnp.float32), precision=_PRECISE)
    half = jnp.einsum("ux,xkyz->ukyz", grid.x.half, volume.half, precision=_PRECISE)

    def plane(x: Any, done: Found) -> Found:
        scores = _scores(volume, fine[x], half[x], grid)
        best, leads, chosen = zip(*(_largest(scores[a:b]) for a, b in spans(reading.classes)), strict=True)
        done = done._replace(labels=done.labels.at[x].set(jnp.stack(chosen)))
        if reading.posteriors or reading.confidence:
            softmax = _softmax(scores, jnp.stack(best), reading)
            if reading.posteriors:
                done = done._replace(posteriors=done.posteriors.at[x].set(_posteriors(softmax, reading)))
            if reading.confidence:
                across, along, up = (jnp.asarray(axis.counted) for axis in grid[:3])
                weight = across[x] * along[:, None] * up[None, :]
                doubtful = jnp.where(jnp.stack(leads) > -DOUBT_NATS, weight[None], 0.0)
                done = done._replace(sums=done.sums + _sums(softmax, jnp.stack(chosen), doubtful, reading))
        return done

    return jax.lax.fori_loop(0, grid.planes, plane, empty)


class _Softmax(NamedTuple):
    """Softmax of one plane, protocols side by side: a class's probability is its power over its protocol's total."""

    powers: Float[Array, "k v w"]  # exp(score − highest score of the protocol)
    total: Float[Array, "p v w"]
    entropy: Float[Array, "p v w"]  # nats
    tissue: Float[Array, "t v w"]  # probability of the merged tissues, where they are read


def _scores(volume: Fields, fine: Array, half: Array, grid: Axes) -> Float[Array, "k v w"]:
    """Returns the scores of one plane, whose fine [c y z] and half [k y z] are already interpolated along x."""

    def interpolated(plane: Array, y: Any, z: Any) -> Array:
        rows = jnp.einsum("vy,cyz->cvz", y, plane, precision=_PRECISE)
        return jnp.einsum("cvz,wz->cvw", rows, z, precision=_PRECISE)  # last, for it leaves classes the slowest axis

    mixed = jnp.einsum("ck,cvw->kvw", volume.matrix, interpolated(fine, grid.y.fine, grid.z.fine), precision=_PRECISE)
    return interpolated(half, grid.y.half, grid.z.half) + mixed + volume.bias.reshape(-1, 1, 1)


def _largest(scores: Float[Array, "k v w"]) -> tuple[Array, Array, Array]:
    """Returns the highest score, the best structure's lead over the background, and the class of the highest score.

    On a tie, the lower class is taken. It is a chain of comparisons because XLA's argmax is five times slower on CPU.
    """
    best, chosen = scores[1], jnp.ones(scores.shape[1:], jnp.uint8)
    for k in range(2, len(scores)):
        better = scores[k] > best
        best = jnp.where(better, scores[k], best)
        chosen = jnp.where(better, jnp.uint8(k), chosen)
    lead = best - scores[0]
    return jnp.maximum(best, scores[0]), lead, jnp.where(lead > 0, chosen, jnp.uint8(0))


def _softmax(scores: Array, best: Array, reading: Reading) -> _Softmax:
    """Returns the softmax within each protocol, by products with the class-to-protocol matrix.

    They are fastest on CPU, and keep XLA from copying the chain of comparisons behind `best` into each of its uses.
    """
    member = membership(reading.classes)
    logits = scores - jnp.einsum("kp,pvw->kvw", member, best, precision=_PRECISE)
    powers = jnp.exp(logits)
    total = jnp.einsum("kp,kvw->pvw", member, powers, precision=_PRECISE)
    heat = jnp.einsum("kp,kvw->pvw", member, powers * logits, precision=_PRECISE)
    tissue = jnp.zeros((0, *scores.shape[1:]))
    if reading.tissue_of is not None:
        a, b = spans(reading.classes)[reading.tissue_of]
        tissue = jnp.einsum("tk,kvw->tvw", TISSUES, powers[a:b], precision=_PRECISE) / total[None, reading.tissue_of]
    return _Softmax(powers, total, jnp.log(total) - heat / total, tissue)


def _posteriors(softmax: _Softmax, reading: Reading) -> Float[Array, "s v w"]:
    starts = [a for a, _ in spans(reading.classes)]
    return jnp.stack([
        softmax.powers[starts[p] + k] / softmax.total[p] if p < len(starts) else softmax.tissue[k]
        for p, k in reading.posteriors
    ])  # fmt: skip


def _sums(
    softmax: _Softmax, chosen: UInt8[Array, "p v w"], weight: Float[Array, "p v w"], reading: Reading
) -> Float[Array, "4 k"]:
    """Returns the plane's share of the confidence."""
    member = membership(reading.classes)
    index = np.concatenate([np.arange(k, dtype=np.float32) for k in reading.classes])
    label = jnp.einsum("kp,pvw->kvw", member, chosen.astype(jnp.float32), precision=_PRECISE)
    own = (label == index[:, None, None]).astype(jnp.float32)  # 1 where the class is chosen

    def of_own(classes: Array, values: Array) -> Array:
        """Sums each class's share of its own protocol's values."""
        return jnp.sum(member * jnp.einsum("kvw,pvw->kp", classes, values, precision=_PRECISE), axis=1)

    voxels = of_own(own, weight)
    certain = of_own(own, weight / softmax.total)  # the chosen class's power is 1
    everywhere = of_own(softmax.powers, weight / softmax.total)
    sums = jnp.stack([voxels, certain, everywhere, of_own(own, weight * softmax.entropy)])
    if reading.tissue_of is None:
        return sums
    here = weight[reading.tissue_of][None]
    merged = jnp.asarray(MALP_EM_TO_TISSUE)[chosen[reading.tissue_of].astype(jnp.int32)]
    own = jnp.where(merged[None] == np.arange(len(TISSUES), dtype=np.uint8)[:, None, None], here, 0)
    entropy = jnp.sum(jax.scipy.special.entr(softmax.tissue), axis=0)
    parts = [own, own * softmax.tissue, here * softmax.tissue, own * entropy[None]]
    return jnp.concatenate([sums, jnp.stack([jnp.sum(part, axis=(1, 2)) for part in parts])], axis=1)


def _linear(positions: np.ndarray) -> Float[np.ndarray, "n FINE"]:
    """Returns the matrix of linear interpolation at positions from 0 to BLOCK, in voxels of the block."""
    low = np.floor(positions).astype(int)
    matrix = np.zeros((len(positions), FINE))
    index = np.arange(len(positions))
    matrix[index, low] = 1 - (positions - low)
    matrix[index, low + 1] = positions - low
    return matrix
