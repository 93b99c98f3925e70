"""Cuts volumes of scores into blocks, in one of two layouts.

Within a block the voxels stay sorted by parity, as upsampling makes them: interleaving the few channels of features
and labels the same way is cheaper than interleaving all classes. Each platform has its layout (`PLATFORMS` in
`head.py`).
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Integer

from neuronet_jax.models import conv
from neuronet_jax.models.readout import Readout, half_scores

Start = tuple[Any, ...]  # one index per axis, numbers or traced


class Blocks(abc.ABC):
    """Volumes [b x y z c] cut into blocks. A layout says which of their axes are u and w.

    A block has `pairs` pairs of planes along u, all of y (a mesh may have split it, see `mesh.py`) and `width` voxels
    of half resolution along w. Its axes are [j i b u y …], j and i being the parities of y and u, and then w and k in
    the layout's order.
    """

    class_axis: int  # of a block
    pairs: int
    width: int
    columns: int  # blocks along w
    count: int

    def scores(self, index: Array, fine: Array, halves: Array, matrix: Array, bias: Array) -> Float[Array, "*block k"]:
        """Computes all scores of a block, in float32.

        `fine` is the volume of the finest features, and `halves` holds the scores at half resolution.
        """
        half = jax.lax.dynamic_slice(halves, self._half_start(index), self._half_shape(halves)).astype(jnp.float32)
        half = _parts(half, 1)  # i b u y …
        half = _parts(_padded(half, 3), 3)  # j i b u y …
        block = self.cut(index, fine)
        return self.mix(half, block, matrix.astype(block.dtype), bias.astype(jnp.float32))

    def gradients(
        self, index: Array, gradient: Float[Array, "*block k"], fine: Array, matrix: Array
    ) -> tuple[Array, Array, Array]:
        """Turns a block's gradient by the scores into those by its features, the matrix [c k] and the bias [k]."""
        block = self.cut(index, fine)
        low = gradient.astype(block.dtype)
        by_block, by_matrix = self.unmix(low, block, matrix.astype(low.dtype))
        others = tuple(axis for axis in range(7) if axis != self.class_axis)
        return by_block, by_matrix, jnp.sum(low.astype(jnp.float32), axis=others)

    def half_begin(self, halves: Array) -> Any:
        """Returns a gradient by `halves` to which nothing was added yet."""
        return jnp.zeros_like(halves)

    def add_half_gradient(self, index: Array, total: Any, gradient: Array) -> Any:
        """Adds what a block's gradient by the scores contributes to the gradient by `halves`, blocks in their order."""
        half, start = self._half_gradient(gradient), self._half_start(index)
        half = half.astype(total.dtype)
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, half.shape) + half, start)

    def half_total(self, total: Any) -> Array:
        """Returns the gradient by `halves` to which all blocks have added."""
        return total

    def _half_gradient(self, gradient: Array) -> Array:
        gradient = self.unwiden(gradient)
        return _parts_back(_cropped(_parts_back(gradient, 3), 3), 1)  # b u y …

    def cut(self, index: Array, volume: Array) -> Array:
        """Takes a block out of a volume of few channels."""
        block = jax.lax.dynamic_slice(volume, self._start(index), self._shape(volume))
        b, u, y, *last = block.shape
        split = block.reshape(b, u // 2, 2, y // 2, 2, *last)  # b u i y j …
        return split.transpose(4, 2, 0, 1, 3, 5, 6)

    def put(self, index: Array, volume: Array, block: Array) -> Array:
        """Undoes `cut`: writes a block into a volume."""
        j, i, b, u, y, *last = block.shape
        joined = block.transpose(2, 3, 1, 4, 0, 5, 6).reshape(b, u * i, y * j, *last)
        return jax.lax.dynamic_update_slice(volume, joined, self._start(index))

    def truth(self, labels: Integer[Array, "b p x y z"]) -> Array:
        """Orders the axes of labels as those of a volume, with a protocol in place of each channel."""
        return self.volume(jnp.moveaxis(labels, 1, -1))

    def _start(self, index: Array) -> Start:
        return tuple(2 * start for start in self._half_start(index))

    @abc.abstractmethod
    def volume(self, x: Float[Array, "b x y z c"]) -> Array:
        """Orders a volume's axes as the layout has them."""

    @abc.abstractmethod
    def volume_back(self, x: Array) -> Float[Array, "b x y z c"]:
        """Undoes `volume`."""

    @abc.abstractmethod
    def halves(self, coarse: list[Array], readout: Readout) -> Array:
        """Computes the scores at half resolution, with a plane of zeros on both sides of the axes that are cut.

        `coarse` holds all features but the finest.
        """

    @abc.abstractmethod
    def mix(self, half: Array, block: Array, matrix: Array, bias: Array) -> Array:
        """Adds the contribution of a block's features to that of half resolution, upsampled along u and y."""

    @abc.abstractmethod
    def unmix(self, gradient: Array, block: Array, matrix: Array) -> tuple[Array, Array]:
        """Turns a block's gradient by the scores into those by its features and the matrix."""

    @abc.abstractmethod
    def unwiden(self, gradient: Array) -> Array:
        """Undoes the upsampling along w, for a gradient."""

    @abc.abstractmethod
    def _shape(self, volume: Array) -> tuple[int, ...]:
        """Returns the shape of a block in a volume of few channels."""

    @abc.abstractmethod
    def _half_start(self, index: Array) -> Start:
        """Returns where a block starts in `halves`."""

    @abc.abstractmethod
    def _half_shape(self, halves: Array) -> tuple[int, ...]:
        """Returns the shape of a block in `halves`, its neighbours included."""


class ClassesLast(Blocks):
    """Volumes as [b x y z c], cut along x and z: classes fill a CPU's vectors and a GPU's threads."""

    class_axis = 6  # j i b u y w k

    def __init__(self, shape: tuple[int, ...], classes: int, block_bytes: int):
        b, x, y, z, _ = shape
        if any(map(export.is_symbolic_dim, shape)):  # an exported program for any sides: multiples of 32
            self.pairs, self.width = 1, 16
        else:
            voxel_bytes = 4 * classes
            self.pairs = _largest_divisor(x // 2, block_bytes // (voxel_bytes * 2 * b * y * z))
            self.width = z // 2
            if self.pairs == 1:
                self.width = _largest_divisor(self.width, block_bytes // (voxel_bytes * 2 * b * y * 2))
        self.columns = z // 2 // self.width
        self.count = x // 2 // self.pairs * self.columns

    def volume(self, x: Float[Array, "b x y z c"]) -> Array:
        return x

    def volume_back(self, x: Array) -> Float[Array, "b x y z c"]:
        return x

    def halves(self, coarse: list[Array], readout: Readout) -> Array:
        return jnp.pad(half_scores(coarse, readout), ((0, 0), (1, 1), (0, 0), (1, 1), (0, 0)))

    def mix(self, half: Array, block: Array, matrix: Array, bias: Array) -> Array:
        mixed = jnp.matmul(block, matrix, preferred_element_type=jnp.float32)
        # As a product, which XLA cannot fuse into every use of the scores and so compute again for each.
        upsampled = jnp.matmul(_along_w(half, _upsampling_inside(self.width)), half, precision="highest")
        return upsampled + (mixed + bias.reshape(1, 1, 1, 1, 1, 1, -1))

    def unmix(self, gradient: Array, block: Array, matrix: Array) -> tuple[Array, Array]:
        rows, columns = block.reshape(-1, block.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        return gradient @ matrix.T, jnp.matmul(rows.T, columns, preferred_element_type=jnp.float32)

    def unwiden(self, gradient: Array) -> Array:
        return jnp.matmul(_along_w(gradient, _upsampling_inside(self.width).T), gradient, precision="highest")

    def _shape(self, volume: Array) -> tuple[int, ...]:
        b, _, y, _, c = volume.shape
        return b, 2 * self.pairs, y, 2 * self.width, c

    def _half_start(self, index: Array) -> Start:
        return 0, index // self.columns * self.pairs, 0, index % self.columns * self.width, 0

    def _half_shape(self, halves: Array) -> tuple[int, ...]:
        b, _, y, _, k = halves.shape
        return b, self.pairs + 2, y, self.width + 2, k


class XLast(Blocks):
    """Volumes as [b z y c x], as the convolutions of a TPU leave them, cut along z: x fills the 128 lanes that 16
    channels would leave empty. Sides must be known.
    """

    class_axis = 5  # j i b u y k w

    def __init__(self, shape: tuple[int, ...], classes: int, block_bytes: int):
        b, x, y, z, _ = shape
        self.pairs = _largest_divisor(z // 2, block_bytes // (4 * classes * 2 * b * y * x))
        self.width, self.columns = x // 2, 1
        self.count = z // 2 // self.pairs

    def volume(self, x: Float[Array, "b x y z c"]) -> Array:
        return x.transpose(0, 3, 2, 4, 1)

    def volume_back(self, x: Array) -> Float[Array, "b x y z c"]:
        return x.transpose(0, 4, 2, 1, 3)

    def truth(self, labels: Integer[Array, "b p x y z"]) -> Array:
        # XLA keeps uint8 labels, 16 MiB, in vector memory around the loop over the blocks, and moves them out and in
        # again for every block. Four times as many bytes stay in HBM, of which each block reads its own.
        return super().truth(labels).astype(jnp.int32)

    def halves(self, coarse: list[Array], readout: Readout) -> Array:
        """Computes the scores as every layout does, but with x upsampled to full resolution: short rows would leave
        lanes empty.
        """
        total = None
        for scale in reversed(range(1, len(coarse) + 1)):
            features = coarse[scale - 1]
            halo = int(scale == 1)  # the planes of zeros at half resolution, made with the rest: a copy costs 350 MiB
            upsampling = np.eye(features.shape[1], dtype=np.float32)
            for _ in range(scale):
                upsampling = np.matmul(conv.upsampling_matrix(len(upsampling)), upsampling)
            long = jnp.einsum("bxyzc,wx->bzycw", features, upsampling.astype(features.dtype))
            matrix = readout.matrices[scale].astype(long.dtype)
            bias = jnp.outer(readout.biases[scale], jnp.asarray(upsampling.sum(axis=1)))  # k w: less at the border
            long = jnp.pad(long, ((0, 0), (halo, halo), (0, 0), (0, 0), (0, 0)))
            within = np.pad(np.ones(features.shape[3], np.float32), halo).reshape(1, -1, 1, 1, 1)
            mixed = jnp.einsum("bzycw,ck->bzykw", long, matrix) + (within * bias[None, None, None]).astype(long.dtype)
            if total is not None:
                # Along y first, while there are fewer planes; along z as a product, without interleaved copies.
                along_z = np.pad(conv.upsampling_matrix(total.shape[1]), ((halo, halo), (0, 0)))
                wide = conv.upsample_axis(total, 2)
                mixed = mixed + jnp.einsum("bzykw,uz->buykw", wide, along_z.astype(wide.dtype))
            total = mixed
        assert total is not None
        return total

    def mix(self, half: Array, block: Array, matrix: Array, bias: Array) -> Array:
        mixed = jnp.einsum("...cw,ck->...kw", block, matrix, preferred_element_type=jnp.float32)
        return half + (mixed + bias.reshape(1, 1, 1, 1, 1, -1, 1))

    def unmix(self, gradient: Array, block: Array, matrix: Array) -> tuple[Array, Array]:
        by_matrix = jnp.einsum("jibuykw,jibuycw->ck", gradient, block, preferred_element_type=jnp.float32)
        return jnp.einsum("...kw,ck->...cw", gradient, matrix), by_matrix

    # Two planes of a block are also of the next one. Their gradient goes from block to block, and the total is only
    # written, each plane once.

    def half_begin(self, halves: Array) -> Any:
        return jnp.zeros_like(halves), jnp.zeros_like(halves[:, :2])

    def add_half_gradient(self, index: Array, total: Any, gradient: Array) -> Any:
        written, shared = total
        half = self._half_gradient(gradient)
        half = half + jnp.pad(shared.astype(half.dtype), ((0, 0), (0, self.pairs), (0, 0), (0, 0), (0, 0)))
        done, shared = half[:, : self.pairs].astype(written.dtype), half[:, self.pairs :].astype(written.dtype)
        return jax.lax.dynamic_update_slice(written, done, self._half_start(index)), shared

    def half_total(self, total: Any) -> Array:
        written, shared = total
        return written.at[:, -2:].set(shared)

    def unwiden(self, gradient: Array) -> Array:
        return gradient  # `halves` is at full resolution along x

    def _shape(self, volume: Array) -> tuple[int, ...]:
        b, _, *others = volume.shape
        return b, 2 * self.pairs, *others

    def _half_start(self, index: Array) -> Start:
        return 0, index * self.pairs, 0, 0, 0

    def _half_shape(self, halves: Array) -> tuple[int, ...]:
        b, _, *others = halves.shape
        return b, self.pairs + 2, *others


def _parts(x: Array, axis: int) -> Array:
    """Returns, along a new first axis, the even and the odd slices of `conv.upsample_axis` of x without its first and
    last slice.

    Both at once as weighted sums: a concatenation is slower on CPU than the product with zero that this costs.
    """
    n = x.shape[axis] - 2
    before, here, after = (jax.lax.slice_in_dim(x, i, i + n, axis=axis)[None] for i in range(3))
    weights = np.array([[0.25, 0.0], [0.0, 0.25]], np.float32).reshape(2, 2, *(1,) * x.ndim)
    return np.float32(0.75) * here + weights[0] * before + weights[1] * after


def _parts_back(x: Array, axis: int) -> Array:
    """Applies the transpose of `_parts`."""
    even, odd = x[0], x[1]
    quarter, rest = np.float32(0.25), np.float32(0.75)
    return (
        _padded(quarter * even, axis, (0, 2))
        + _padded(rest * (even + odd), axis, (1, 1))
        + _padded(quarter * odd, axis, (2, 0))
    )


def _padded(x: Array, axis: int, sides: tuple[int, int] = (1, 1)) -> Array:
    return jnp.pad(x, [sides if a == axis else (0, 0) for a in range(x.ndim)])


def _cropped(x: Array, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, 1, x.shape[axis] - 1, axis=axis)


def _along_w(x: Array, matrix: np.ndarray) -> Array:
    return jnp.broadcast_to(matrix, (*x.shape[:5], *matrix.shape))


def _upsampling_inside(n: int) -> Float[np.ndarray, "2n n+2"]:
    """Returns the matrix that upsamples n voxels between two others."""
    return conv.upsampling_matrix(n + 2)[2:-2]


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, most))
