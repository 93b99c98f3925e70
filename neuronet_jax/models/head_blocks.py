"""Volumes of scores in blocks: how they are cut and laid out, and sums over a protocol's classes in such a layout.

Within a block the voxels stay sorted by parity, as upsampling makes them: interleaving the few channels of features
and labels the same way is cheaper than interleaving all classes. In what order the axes lie is each platform's choice
(`Form`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float, Integer

from neuronet_jax.models import conv
from neuronet_jax.models.readout import Readout, half_scores, membership, spans


class Form(NamedTuple):
    """How a platform wants the blocks.

    Without `lanes` a volume lies as [b x y z c], and blocks are cut along x and z. With `lanes` it lies as [b z y c x],
    as the convolutions of a TPU leave it: x fills the 128 lanes that 16 channels would leave empty; blocks are cut
    along z. y is never cut, since a mesh may have split it (see `mesh.py`).
    """

    lanes: bool
    products: bool  # sums over a protocol's classes as products with a 0/1 matrix, since 4 classes fill no vector
    block_bytes: int  # scores held at a time, in float32


FORMS = {
    "cpu": Form(lanes=False, products=True, block_bytes=2 * 2**20),  # two cores' second-level caches
    "tpu": Form(lanes=True, products=False, block_bytes=16 * 2**20),  # a fraction of the 128 MiB of vector memory
    "default": Form(lanes=False, products=False, block_bytes=128 * 2**20),  # fills a GPU
}


def on_platform(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(form, *arguments)` with the form of the platform that the program is lowered for."""
    if any(export.is_symbolic_dim(side) for array in jax.tree.leaves(arguments) for side in array.shape):
        return function(FORMS["default"], *arguments)  # lanes are matrices of known sides
    return jax.lax.platform_dependent(*arguments, **{name: partial(function, form) for name, form in FORMS.items()})


class Blocks:
    """Volumes cut into blocks of `pairs` of planes along u (x, or z with lanes) and `width` half-resolution voxels
    along w (z, or all of x).

    A block lies as [j i b u y w k], j and i being the parities of y and u; with lanes as [j i b u y k w].
    """

    def __init__(self, form: Form, shape: tuple[int, ...], classes: int):
        self.lanes = form.lanes
        b, x, y, z, _ = shape
        u, w = (z, x) if form.lanes else (x, z)
        if any(map(export.is_symbolic_dim, shape)):  # an exported program for any sides: multiples of 32
            self.pairs, self.width = 1, 16
        else:
            voxel = 4 * classes  # bytes
            self.pairs = _largest_divisor(u // 2, form.block_bytes // (voxel * 2 * b * y * w))
            self.width = w // 2
            if not form.lanes and self.pairs == 1:
                self.width = _largest_divisor(self.width, form.block_bytes // (voxel * 2 * b * y * 2))
        self.columns = w // 2 // self.width
        self.count = u // 2 // self.pairs * self.columns
        self.class_axis = 5 if form.lanes else 6

    def volume(self, x: Float[Array, "b x y z c"]) -> Array:
        """In the order of the form."""
        return x.transpose(0, 3, 2, 4, 1) if self.lanes else x

    def volume_back(self, x: Array) -> Float[Array, "b x y z c"]:
        return x.transpose(0, 4, 2, 1, 3) if self.lanes else x

    def halves(self, coarse: list[Array], readout: Readout) -> Array:
        """The scores at half resolution, in the order of the form, with a plane of zeros on both sides of the axes that
        are cut; with lanes, x upsampled to full resolution. `coarse`: the features but the finest.
        """
        if not self.lanes:
            half = half_scores(coarse, readout)
            return jnp.pad(half, ((0, 0), (1, 1), (0, 0), (1, 1), (0, 0)))
        total = None
        for scale in reversed(range(1, len(coarse) + 1)):
            features = coarse[scale - 1]
            # x first and all the way: short rows would leave lanes empty
            upsampling = np.eye(features.shape[1], dtype=np.float32)
            for _ in range(scale):
                upsampling = conv.upsampling_matrix(len(upsampling)) @ upsampling
            long = jnp.einsum("bxyzc,wx->bzycw", features, upsampling.astype(features.dtype))
            matrix = readout.matrices[scale].astype(long.dtype)
            bias = jnp.outer(readout.biases[scale], upsampling.sum(axis=1))  # k w: less at the border
            mixed = jnp.einsum("bzycw,ck->bzykw", long, matrix) + bias.astype(long.dtype)[None, None, None]
            total = mixed if total is None else mixed + conv.upsample_axis(conv.upsample_axis(total, 1), 2)
        assert total is not None
        return jnp.pad(total, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))

    def scores(self, index: Array, volume: Array, halves: Array, matrix: Array, bias: Array) -> Array:
        """All scores of a block, in float32."""
        half = jax.lax.dynamic_slice(halves, self._half_start(index), self._half_shape(halves)).astype(jnp.float32)
        half = _parts(half, 1)  # i b u y h k
        half = _parts(_padded(half, 3), 3)  # j i b u y h k
        fine = self.cut(index, volume)
        matrix, bias = matrix.astype(fine.dtype), bias.astype(jnp.float32)
        if self.lanes:
            mixed = jnp.einsum("...cw,ck->...kw", fine, matrix, preferred_element_type=jnp.float32)
            return half + (mixed + bias.reshape(1, 1, 1, 1, 1, -1, 1))
        mixed = jnp.matmul(fine, matrix, preferred_element_type=jnp.float32)
        # As a product, which XLA cannot fuse into every use of the scores and so compute again for each.
        upsampled = jnp.matmul(self._along_w(half, _upsampling_inside(self.width)), half, precision="highest")
        return upsampled + (mixed + bias.reshape(1, 1, 1, 1, 1, 1, -1))

    def unmix(self, gradient: Array, fine: Array, matrix: Array) -> tuple[Array, Array, Array]:
        """By the block's features, the matrix and the bias."""
        if self.lanes:
            by_fine = jnp.einsum("...kw,ck->...cw", gradient, matrix.astype(gradient.dtype))
            by_matrix = jnp.einsum("jibuykw,jibuycw->ck", gradient, fine, preferred_element_type=jnp.float32)
        else:
            by_fine = gradient @ matrix.astype(gradient.dtype).T
            rows, columns = fine.reshape(-1, fine.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            by_matrix = jnp.matmul(rows.T, columns, preferred_element_type=jnp.float32)
        others = tuple(axis for axis in range(7) if axis != self.class_axis)
        return by_fine, by_matrix, jnp.sum(gradient.astype(jnp.float32), axis=others)

    def add_halves(self, index: Array, total: Array, gradient: Array) -> Array:
        """Adds what a block's scores say to the gradient by `halves`."""
        if not self.lanes:
            gradient = jnp.matmul(
                self._along_w(gradient, _upsampling_inside(self.width).T), gradient, precision="highest"
            )
        half = _parts_back(_cropped(_parts_back(gradient, 3), 3), 1).astype(total.dtype)  # b u y h k
        start = self._half_start(index)
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, start, half.shape) + half, start)

    def cut(self, index: Array, volume: Array) -> Array:
        """The block of a volume of few channels."""
        shape = list(volume.shape)
        shape[1] = 2 * self.pairs
        if not self.lanes:
            shape[3] = 2 * self.width
        block = jax.lax.dynamic_slice(volume, self._start(index), shape)
        b, u, y, *last = block.shape
        split = block.reshape(b, u // 2, 2, y // 2, 2, *last)  # b u i y j …
        return split.transpose(4, 2, 0, 1, 3, 5, 6)

    def put(self, index: Array, volume: Array, block: Array) -> Array:
        """Undoes `cut`."""
        j, i, b, u, y, *last = block.shape
        joined = block.transpose(2, 3, 1, 4, 0, 5, 6).reshape(b, u * i, y * j, *last)
        return jax.lax.dynamic_update_slice(volume, joined, self._start(index))

    def per_sample(self, block: Array) -> Float[Array, "b n"]:
        """Summed over space; `n` are classes or protocols."""
        return jnp.sum(block, axis=tuple(axis for axis in range(7) if axis not in (2, self.class_axis)))

    def per_class(self, values: Float[Array, "b n"]) -> Array:
        """Values per sample, to be set against blocks."""
        b, n = values.shape
        return values.reshape(1, 1, b, 1, 1, *((n, 1) if self.lanes else (1, n)))

    def _along_w(self, x: Array, matrix: np.ndarray) -> Array:
        return jnp.broadcast_to(matrix, (*x.shape[:5], *matrix.shape))

    def _start(self, index: Array) -> tuple[Any, ...]:
        return tuple(2 * start for start in self._half_start(index))

    def _half_start(self, index: Array) -> tuple[Any, ...]:
        along_u = index // self.columns * self.pairs
        return (0, along_u, 0, 0, 0) if self.lanes else (0, along_u, 0, index % self.columns * self.width, 0)

    def _half_shape(self, halves: Array) -> tuple[int, ...]:
        b, _, y, w, k = halves.shape
        return (b, self.pairs + 2, y, w, k) if self.lanes else (b, self.pairs + 2, y, self.width + 2, k)


class Protocols:
    """Sums and maxima over the classes of each protocol, in blocks whose classes (`k`) or protocols (`p`) lie along one
    axis."""

    def __init__(self, form: Form, classes: tuple[int, ...]):
        self.form, self.classes = form, classes
        self.axis = -2 if form.lanes else -1
        self.of_class = membership(classes)
        index = np.concatenate([np.arange(count) for count in classes]).astype(np.float32)  # within its protocol
        self.index = index.reshape(1, 1, 1, 1, 1, *((-1, 1) if form.lanes else (1, -1)))

    def softmax(self, scores: Float[Array, "*k"]) -> tuple[Float[Array, "*p"], Float[Array, "*k"], Float[Array, "*p"]]:
        """The highest score of each protocol, exp(score − highest), and the sum of that."""
        top = self._each(scores, jnp.max)
        exponential = jnp.exp(scores - self.spread(top))
        return top, exponential, self.sums(exponential)

    def entropy(
        self, scores: Float[Array, "*k"], truth: Bool[Array, "*k"], top: Float[Array, "*p"], norm: Float[Array, "*p"]
    ) -> Float[Array, "*p"]:
        """Cross-entropy of the true classes; `top` and `norm` are those of `softmax`."""
        return jnp.log(norm) + top - self.sums(jnp.where(truth, scores, 0.0))

    def truth(self, labels: Integer[Array, "*p"]) -> Array:
        """Whether a class is the labelled one, bool [*k]."""
        return self.spread(labels.astype(jnp.float32)) == self.index

    def highest(self, scores: Float[Array, "*k"]) -> Integer[Array, "*p"]:
        """The index of the highest score within each protocol, uint8, the lower one on a tie, 0 where scores are NaN.

        A comparison and a minimum, which vectorise where an argmax does not.
        """
        is_top = scores == self.spread(self._each(scores, jnp.max))
        first = self._each(jnp.where(is_top, self.index, np.float32(256)), jnp.min)
        return jnp.where(first < 256, first, 0).astype(jnp.uint8)

    def sums(self, x: Float[Array, "*k"]) -> Float[Array, "*p"]:
        if self.form.products:
            return jnp.matmul(x, self.of_class, precision="highest")
        return self._each(x, jnp.sum)

    def spread(self, x: Float[Array, "*p"]) -> Float[Array, "*k"]:
        """A protocol's value for each of its classes."""
        if self.form.products:
            return jnp.matmul(x, self.of_class.T, precision="highest")
        parts = [
            jnp.broadcast_to(jax.lax.slice_in_dim(x, p, p + 1, axis=x.ndim + self.axis), self._shape(x, count))
            for p, count in enumerate(self.classes)
        ]
        return jnp.concatenate(parts, axis=self.axis)

    def _each(self, x: Array, reduce: Callable[..., Array]) -> Array:
        axis = x.ndim + self.axis
        parts = [jax.lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in spans(self.classes)]
        return jnp.concatenate([reduce(part, axis=axis, keepdims=True) for part in parts], axis=axis)

    def _shape(self, x: Array, count: int) -> tuple[int, ...]:
        shape = list(x.shape)
        shape[self.axis] = count
        return tuple(shape)


def _parts(x: Array, axis: int) -> Array:
    """The even and the odd slices, along a new first axis, of what `conv.upsample_axis` makes of x less its first
    and last slice.

    Both at once as weighted sums: a concatenation is slower on CPU than the product with zero that this costs.
    """
    n = x.shape[axis] - 2
    before, here, after = (jax.lax.slice_in_dim(x, i, i + n, axis=axis)[None] for i in range(3))
    weights = np.array([[0.25, 0.0], [0.0, 0.25]], np.float32).reshape(2, 2, *(1,) * x.ndim)
    return np.float32(0.75) * here + weights[0] * before + weights[1] * after


def _parts_back(x: Array, axis: int) -> Array:
    """The transpose of `_parts`."""
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


def _upsampling_inside(n: int) -> Float[np.ndarray, "2n n+2"]:
    """The matrix of upsampling n voxels between two others."""
    return conv.upsampling_matrix(n + 2)[2:-2]


def _largest_divisor(n: int, most: int) -> int:
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(1, most))
