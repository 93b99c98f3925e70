"""Class scores read on any grid whose axes are parallel to the network's: labels, posteriors, sums of confidence.

Interpolation and the readout are both linear, so they commute: the finest features (few channels) and the scores of
the coarser scales (an eighth of the voxels) are interpolated, and the last mixing of channels comes after. What is
wanted is read plane by plane along x; scores of all classes exist for one plane of the new grid at a time, on the
device. The two neighbouring planes are mixed first, then y and z follow as matrix products, whose weights are
arguments: one program serves every scan of a scanner.

Averages over mirrored or shifted heads and over several networks need nothing more: their finest features stand side by
side, with a row of the readout for each, and the coarser scores are summed (`average`).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from neuronet_jax.inference.tiling import rounded_up
from neuronet_jax.labels import MALP_EM_TO_TISSUE
from neuronet_jax.models import conv
from neuronet_jax.models.readout import Readout, membership, spans

# Windows of y and z grow in steps of this many voxels, so that heads of one scanner share a program: brains differ by
# some 30 mm, and most fit 192 mm of a grid of 1 mm.
WINDOW = 64
ROWS = 16  # planes of the new grid are padded to a multiple of it
TISSUES = np.equal(np.arange(6)[:, None], MALP_EM_TO_TISSUE[None, :]).astype(np.float32)  # [tissue class]: the merge
_PRECISE = jax.lax.Precision.HIGH  # the default would round positions and scores to bfloat16 on a TPU


class Fields(NamedTuple):
    """Everything that the scores of a volume follow from: `scores = fine·matrix + bias + upsampled half`."""

    fine: Float[Array, "x c y z"]  # the finest features
    half: Float[Array, "x/2 k y/2 z/2"]  # scores of the coarser scales, float32
    matrix: Float[Array, "c k"]  # float32
    bias: Float[Array, "k"]  # float32


class Axes(NamedTuple):
    """Where the planes of the new grid lie, as arrays, so that grids share programs. Rows beyond the grid are zero."""

    planes: np.ndarray  # int32 []: how many planes of x there are; those after it are not read
    x_fine: tuple[np.ndarray, np.ndarray]  # int32 [u], float32 [u 2]: first voxel, weights of it and the next
    x_half: tuple[np.ndarray, np.ndarray]  # int32 [u], float32 [u 3]
    starts: np.ndarray  # int32 [2]: even first voxel of the window along y and z
    y: tuple[np.ndarray, np.ndarray]  # float32 [v y], [v y/2], over the window
    z: tuple[np.ndarray, np.ndarray]  # float32 [w z], [w z/2]
    counted: tuple[np.ndarray, np.ndarray, np.ndarray]  # float32 [u], [v], [w]: 1 where the sums count the voxel


class Reading(NamedTuple):
    """What is read of the scores. Part of the program's key."""

    classes: tuple[int, ...]  # of each protocol, side by side
    tissue_of: int | None = None  # the protocol (malp_em) whose merge to tissues is read as one more, at the end
    posteriors: tuple[tuple[int, int], ...] = ()  # pairs of protocol and class
    confidence: bool = False

    @property
    def columns(self) -> int:
        """Of the sums."""
        tissues = 0 if self.tissue_of is None else len(TISSUES)
        return sum(self.classes) + tissues if self.confidence else 0


class Planes(NamedTuple):
    """What was read, plane by plane; what lies beyond the grid means nothing."""

    labels: UInt8[Array, "u p v w"]
    posteriors: Float[Array, "u s v w"]
    sums: Float[Array, "u 4 k"]  # as in Confidence; the tissues' after all classes


def fields(features: list[Array], readout: Readout) -> Fields:
    """Of one volume's features [1 x y z c] per scale, finest first."""

    def mixed(scale: int) -> Array:  # x k y z
        small = jnp.moveaxis(features[scale][0], -1, 1)
        matrix = readout.matrices[scale].astype(small.dtype)
        scores = jnp.einsum("ck,xcyz->xkyz", matrix, small, preferred_element_type=jnp.float32)
        return scores + readout.biases[scale].astype(jnp.float32).reshape(1, -1, 1, 1)

    coarsest = len(features) - 1
    half = mixed(coarsest)
    for scale in reversed(range(1, coarsest)):
        for axis in (3, 2, 0):
            half = conv.upsample_axis(half, axis)
        half = half + mixed(scale)
    matrix, bias = (part[0].astype(jnp.float32) for part in readout)
    return Fields(jnp.moveaxis(features[0][0], -1, 1), half, matrix, bias)


def average(members: Iterable[Fields]) -> Fields:
    """The fields whose scores are the mean of the members'. Takes one after the other, so that few exist at a time."""
    fine, matrices, half, bias = [], [], None, None
    for member in members:
        fine.append(member.fine)
        matrices.append(member.matrix)
        half = member.half if half is None else half + member.half
        bias = member.bias if bias is None else bias + member.bias
    assert half is not None and bias is not None
    if len(fine) == 1:
        return Fields(fine[0], half, matrices[0], bias)
    share = jnp.float32(1 / len(fine))
    together = jnp.concatenate([part.astype(fine[0].dtype) for part in fine], axis=1)
    return Fields(together, half * share, jnp.concatenate(matrices) * share, bias * share)


def aligned(member: Fields, flip: bool, shift: int) -> Fields:
    """The fields of the volume itself, from those of the volume mirrored along x and then moved on by `shift` voxels
    (even, wrapping round) along every axis.
    """
    fine, half = member.fine, member.half
    if shift:
        fine, half = jnp.roll(fine, (-shift,) * 3, (0, 2, 3)), jnp.roll(half, (-shift // 2,) * 3, (0, 2, 3))
    return member._replace(fine=fine[::-1], half=half[::-1]) if flip else member._replace(fine=fine, half=half)


def axes(
    positions: Sequence[np.ndarray],
    shape: Sequence[int],
    planes: int,
    counted: Sequence[np.ndarray] | None = None,
) -> Axes:
    """The grid at float64 `positions` [u], [v], [w], evenly spaced, at least one each, in voxels of fields of `shape`.

    `planes` is the most of x that any grid of the same program has; `counted` says which positions the sums count.
    """
    counted = [np.ones(len(p)) for p in positions] if counted is None else counted
    fine = [_linear(p, side) for p, side in zip(positions, shape, strict=True)]
    x, y, z = ((matrix, matrix @ conv.upsampling_matrix(matrix.shape[1] // 2)) for matrix in fine)
    planes = rounded_up(planes, ROWS)
    first = np.floor(positions[0]).astype(int)
    x_fine, x_half = (
        _taps(matrix, np.clip(start, 0, matrix.shape[1] - taps), taps, planes)
        for matrix, start, taps in ((x[0], first, 2), (x[1], first // 2 - 1, 3))
    )
    starts, windows, rows = [], [], [planes]
    for matrices, p, side in ((y, positions[1], shape[1]), (z, positions[2], shape[2])):
        low = max(0, int(p.min()) // 2 * 2 - 2)  # a half-resolution neighbour more on either side
        length = min(side, rounded_up(min(side, int(p.max()) + 4) - low, WINDOW))
        low = min(low, side - length)
        spacing = float(np.abs(np.diff(p)).max(initial=0)) or length  # those held at the volume's edge repeat
        count = rounded_up(max(len(p), int((length - 1) / spacing) + 1), ROWS)
        window = matrices[0][:, low : low + length], matrices[1][:, low // 2 : (low + length) // 2]
        windows.append(tuple(_padded(matrix, count) for matrix in window))
        starts.append(low)
        rows.append(count)
    ones = [_padded(mask, count) for mask, count in zip(counted, rows, strict=True)]
    return Axes(
        planes=np.asarray(len(positions[0]), np.int32),
        x_fine=x_fine,
        x_half=x_half,
        starts=np.asarray(starts, np.int32),
        y=windows[0],
        z=windows[1],
        counted=(ones[0], ones[1], ones[2]),
    )


@partial(jax.jit, static_argnums=2)
def read(volume: Fields, grid: Axes, reading: Reading) -> Planes:
    """What `reading` asks for, on the grid."""
    u, v, w = (len(mask) for mask in grid.counted)
    empty = Planes(
        jnp.zeros((u, len(reading.classes), v, w), jnp.uint8),
        jnp.zeros((u, len(reading.posteriors), v, w), jnp.float32),
        jnp.zeros((u, 4, reading.columns), jnp.float32),
    )

    def plane(x: Any, done: Planes) -> Planes:
        scores = _scores(volume, grid, x)
        best, chosen = zip(*(_largest(scores[a:b]) for a, b in spans(reading.classes)), strict=True)
        new = Planes(jnp.stack(chosen), jnp.zeros((0, v, w)), jnp.zeros((4, 0)))
        if reading.posteriors or reading.confidence:
            softmax = _softmax(scores, jnp.stack(best), reading)
            if reading.posteriors:
                new = new._replace(posteriors=_posteriors(softmax, reading))
            if reading.confidence:
                across, along, up = map(jnp.asarray, grid.counted)
                weight = across[x] * along[:, None] * up[None, :]
                new = new._replace(sums=_sums(softmax, jnp.stack(chosen), weight, reading))
        return jax.tree.map(lambda whole, part: whole.at[x].set(part), done, new)

    return jax.lax.fori_loop(0, grid.planes, plane, empty)


class _Softmax(NamedTuple):
    """Of one plane, all protocols side by side: a class's probability is its power over its protocol's total."""

    powers: Float[Array, "k v w"]  # exp(score − highest score of the protocol)
    total: Float[Array, "p v w"]
    entropy: Float[Array, "p v w"]  # nats
    tissue: Float[Array, "t v w"]  # probability of the merged tissues, where they are read


def _scores(volume: Fields, grid: Axes, x: Int[Array, ""]) -> Float[Array, "k v w"]:
    """Of one plane: interpolated along x, y and z, in this order."""

    def interpolated(field: Array, taps: Any, scale: int, y: Any, z: Any) -> Array:
        starts, weights = taps
        corner = (starts[x], jnp.int32(0), grid.starts[0] // scale, grid.starts[1] // scale)
        near = jax.lax.dynamic_slice(field, corner, (weights.shape[1], field.shape[1], y.shape[1], z.shape[1]))
        plane = jnp.sum(near.astype(jnp.float32) * weights[x].reshape(-1, 1, 1, 1), axis=0)  # c y z
        rows = jnp.einsum("vy,cyz->cvz", y, plane, precision=_PRECISE)
        return jnp.einsum("cvz,wz->cvw", rows, z, precision=_PRECISE)  # last, for it leaves classes the slowest axis

    fine = interpolated(volume.fine, grid.x_fine, 1, grid.y[0], grid.z[0])
    coarse = interpolated(volume.half, grid.x_half, 2, grid.y[1], grid.z[1])
    mixed = jnp.einsum("ck,cvw->kvw", volume.matrix, fine, precision=_PRECISE)
    return coarse + mixed + volume.bias.reshape(-1, 1, 1)


def _largest(scores: Float[Array, "k v w"]) -> tuple[Array, Array]:
    """The highest score and its class, the lower class on a tie. As a chain of comparisons: XLA's argmax is five times
    slower on CPU.
    """
    best, chosen = scores[0], jnp.zeros(scores.shape[1:], jnp.uint8)
    for k in range(1, len(scores)):
        better = scores[k] > best
        best = jnp.where(better, scores[k], best)
        chosen = jnp.where(better, jnp.uint8(k), chosen)
    return best, chosen


def _softmax(scores: Array, best: Array, reading: Reading) -> _Softmax:
    """Sums over a protocol's classes, and the way back, are products with the matrix of who belongs to whom: the
    fastest way on CPU, and XLA cannot copy the chain of comparisons behind `best` into each of its uses.
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
    softmax: _Softmax, chosen: UInt8[Array, "p v w"], weight: Float[Array, "v w"], reading: Reading
) -> Float[Array, "4 k"]:
    """The plane's share of the confidence."""
    member = membership(reading.classes)
    index = np.concatenate([np.arange(k, dtype=np.float32) for k in reading.classes])
    label = jnp.einsum("kp,pvw->kvw", member, chosen.astype(jnp.float32), precision=_PRECISE)
    own = (label == index[:, None, None]).astype(jnp.float32)  # of 1 where the class is chosen

    def of_own(classes: Array, values: Array) -> Array:
        """Sums of each class's share of its own protocol's values."""
        return jnp.sum(member * jnp.einsum("kvw,pvw->kp", classes, values, precision=_PRECISE), axis=1)

    voxels = jnp.einsum("kvw,vw->k", own, weight, precision=_PRECISE)
    certain = of_own(own, weight[None] / softmax.total)  # the chosen class's power is 1
    everywhere = of_own(softmax.powers, weight[None] / softmax.total)
    sums = jnp.stack([voxels, certain, everywhere, of_own(own, weight[None] * softmax.entropy)])
    if reading.tissue_of is None:
        return sums
    merged = jnp.asarray(MALP_EM_TO_TISSUE)[chosen[reading.tissue_of].astype(jnp.int32)]
    own = jnp.where(merged[None] == np.arange(len(TISSUES), dtype=np.uint8)[:, None, None], weight[None], 0)
    entropy = jnp.sum(jax.scipy.special.entr(softmax.tissue), axis=0)
    parts = [own, own * softmax.tissue, weight[None] * softmax.tissue, own * entropy[None]]
    return jnp.concatenate([sums, jnp.stack([jnp.sum(part, axis=(1, 2)) for part in parts])], axis=1)


def _linear(positions: np.ndarray, side: int) -> np.ndarray:
    """[position voxel]: linear interpolation."""
    low = np.clip(np.floor(positions).astype(int), 0, max(side - 2, 0))
    matrix = np.zeros((len(positions), side))
    rows = np.arange(len(positions))
    matrix[rows, low] = 1 - (positions - low)
    matrix[rows, low + 1] = positions - low
    return matrix


def _taps(matrix: np.ndarray, starts: np.ndarray, taps: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `taps` entries of each row from its start on, the only ones that are not zero; padded to `count` rows."""
    weights = np.take_along_axis(matrix, starts[:, None] + np.arange(taps), axis=1)
    return np.pad(starts, (0, count - len(starts))).astype(np.int32), _padded(weights, count)


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1)).astype(np.float32)
