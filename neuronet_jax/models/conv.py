"""3-D convolution, pooling and upsampling, in the form that runs fastest on each platform.

XLA's 3-D convolution is slow on CPU (7 GFLOP/s where oneDNN reaches 150), and with 16 channels it fills an eighth of a
TPU's lanes. Folding the first spatial axis away solves both: it becomes part of the batch. On a CPU the kernel's taps
along it are stacked in the channels, so that one 2-D convolution of k times the channels does the work. On a TPU, where
the stack would go through HBM, a 2-D convolution for each tap adds to the sum. All forms compute the same sums.

The folded axis is x. A mesh therefore splits y (see `mesh.py`): a split x would have to be gathered first.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Returns the zeros before and after an axis that bring it to ceil(size / stride), as TensorFlow's SAME.

    An odd zero goes after the axis.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv3d(
    x: Float[Array, "b x y z c"], kernel: Float[Array, "i j k c f"], stride: int = 1
) -> Float[Array, "b u v w f"]:
    """Convolves with SAME padding: each axis becomes ceil(n / stride). Lowering picks the form for the platform."""
    if kernel.shape[:3] == (1, 1, 1) and stride == 1:
        return x @ kernel[0, 0, 0]
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: folded_conv3d(x, kernel, stride),
        tpu=lambda x, kernel: summed_conv3d(x, kernel, stride),
        default=lambda x, kernel: native_conv3d(x, kernel, stride),
    )


def native_conv3d(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolves with XLA's own 3-D convolution."""
    padding = [same_padding(n, k, stride) for n, k in zip(x.shape[1:4], kernel.shape[:3], strict=True)]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 3, padding, dimension_numbers=("NXYZC", "XYZIO", "NXYZC")
    )


def summed_conv3d(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Computes the same sums as one 2-D convolution for each tap along x, with x folded into the batch."""
    padding = [same_padding(n, k, stride) for n, k in zip(x.shape[1:4], kernel.shape[:3], strict=True)]
    parts = [
        _in_planes(part, tap, stride, padding[1:])
        for part, tap in zip(_shifted(x, len(kernel), stride, padding[0]), kernel, strict=True)
    ]
    return sum(parts[1:], parts[0])


def folded_conv3d(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Computes the same sums as one 2-D convolution, with x folded into the batch and its taps into the channels.

    A strided convolution whose kernel is a multiple of the stride becomes an unstrided one over blocks of stride³
    voxels. Its gradients are then ordinary convolutions too, where the transposed strided convolution would multiply
    mostly zeros.
    """
    padding = [same_padding(n, k, stride) for n, k in zip(x.shape[1:4], kernel.shape[:3], strict=True)]
    if stride > 1 and all(size % stride == 0 for size in kernel.shape[:3]):
        x = _blocks_to_channels(jnp.pad(x, ((0, 0), *padding, (0, 0))), stride, first=1)
        kernel = _blocks_to_channels(kernel, stride, first=0)
        return _sum_of_taps(*_taps_in_channels(x, kernel))
    taps, c = kernel.shape[0], x.shape[-1]
    stacked = jnp.concatenate(_shifted(x, taps, stride, padding[0]), axis=-1)  # b u y z (taps c)
    flat_kernel = jnp.moveaxis(kernel, 0, 2).reshape(*kernel.shape[1:3], taps * c, -1)  # j k (taps c) f
    return _in_planes(stacked, flat_kernel, stride, padding[1:])


def _shifted(x: Array, taps: int, stride: int, padding: tuple[int, int]) -> list[Float[Array, "b u y z c"]]:
    """Returns the planes along x that each tap of a kernel meets."""
    padded = jnp.pad(x, ((0, 0), padding, (0, 0), (0, 0), (0, 0)))
    length = padded.shape[1] - taps + 1
    return [jax.lax.slice_in_dim(padded, t, t + length, stride, axis=1) for t in range(taps)]


def _in_planes(
    x: Float[Array, "b u y z c"], kernel: Float[Array, "j k c f"], stride: int, padding: list[tuple[int, int]]
) -> Float[Array, "b u v w f"]:
    """Convolves every plane."""
    planes = x.reshape(-1, *x.shape[2:])  # (b u) y z c
    y = jax.lax.conv_general_dilated(planes, kernel, (stride,) * 2, padding, dimension_numbers=("NYZC", "YZIO", "NYZC"))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _taps_in_channels(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Stacks the taps along y in the channels of x.

    Where a mesh splits y, devices then exchange the few channels of x at the seams instead of the products of all taps,
    which took twice the memory.
    """
    i, taps, k, c, f = kernel.shape
    shifted = [jax.lax.slice_in_dim(x, t, t + x.shape[2] - taps + 1, axis=2) for t in range(taps)]
    return jnp.concatenate(shifted, axis=-1), jnp.moveaxis(kernel, 1, 2).reshape(i, 1, k, taps * c, f)


@jax.custom_vjp
def _sum_of_taps(x: Float[Array, "b x y z c"], kernel: Float[Array, "i j k c f"]) -> Float[Array, "b u v w f"]:
    """Convolves without padding: one product with the taps of the kernel side by side, then the sum of its shifts.

    This suits few taps of many channels. A matrix product runs near the CPU's peak, where XLA's convolution of 2² taps
    of 256 channels reached a fifth of it. The gradients are products of the same size.
    """
    columns = x @ _taps_side_by_side(kernel)
    f = kernel.shape[-1]
    parts = [
        jax.lax.slice(columns, (0, *first, t * f), (x.shape[0], *end, (t + 1) * f))
        for t, (first, end) in enumerate(_windows(x, kernel))
    ]
    return sum(parts[1:], parts[0])


def _sum_of_taps_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _sum_of_taps(x, kernel), (x, kernel)


def _sum_of_taps_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    shifted = [
        jnp.pad(gradient, ((0, 0), *((a, n - b) for a, b, n in zip(first, end, x.shape[1:4], strict=True)), (0, 0)))
        for first, end in _windows(x, kernel)
    ]
    columns = jnp.concatenate(shifted, axis=-1)  # b x y z (taps f)
    by_kernel = jnp.einsum("bxyzc,bxyzf->cf", x, columns, preferred_element_type=jnp.float32).astype(kernel.dtype)
    c, f = kernel.shape[3:]
    by_kernel = jnp.moveaxis(by_kernel.reshape(c, *kernel.shape[:3], f), 0, 3)
    return columns @ _taps_side_by_side(kernel).T, by_kernel


_sum_of_taps.defvjp(_sum_of_taps_forward, _sum_of_taps_backward)


def _taps_side_by_side(kernel: Float[Array, "i j k c f"]) -> Float[Array, "c taps*f"]:
    return jnp.moveaxis(kernel, 3, 0).reshape(kernel.shape[3], -1)


def _windows(x: Array, kernel: Array) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns the first voxel and the end of the window that each tap covers."""
    sides = [n - taps + 1 for n, taps in zip(x.shape[1:4], kernel.shape[:3], strict=True)]
    firsts = itertools.product(*map(range, kernel.shape[:3]))
    return [(first, tuple(a + n for a, n in zip(first, sides, strict=True))) for first in firsts]


def _blocks_to_channels(x: Array, side: int, first: int) -> Array:
    """Moves blocks of side³ voxels into the channels: [… x y z c …] becomes [… x/s y/s z/s (s s s c) …].

    The three axes start at `first` and must be multiples of `side`; the channels follow them.
    """
    i, j, k, c = x.shape[first : first + 4]
    split = x.reshape(*x.shape[:first], i // side, side, j // side, side, k // side, side, c, *x.shape[first + 4 :])
    order = [first + axis for axis in (0, 2, 4, 1, 3, 5)]
    sorted_ = split.transpose(*range(first), *order, *range(first + 6, split.ndim))
    return sorted_.reshape(*x.shape[:first], i // side, j // side, k // side, side**3 * c, *x.shape[first + 4 :])


def max_pool(x: Float[Array, "b x y z c"]) -> Float[Array, "b u v w c"]:
    """Returns the maxima of 2×2×2 blocks; an odd voxel at the border forms a block alone.

    The maxima are taken in pairs, axis by axis, because the gradient of `reduce_window` is a scatter, which is slow on
    every platform.
    """
    for axis in (1, 2, 3):
        if x.shape[axis] % 2:
            x = jnp.pad(x, [(0, int(a == axis)) for a in range(x.ndim)], mode="edge")
        even, odd = _pairs(x, axis)
        x = jnp.maximum(even, odd)
    return x


def _pairs(x: Array, axis: int) -> tuple[Array, Array]:
    """Returns the even and the odd slices along an axis of even size."""
    paired = x.reshape(*x.shape[:axis], x.shape[axis] // 2, 2, *x.shape[axis + 1 :])
    return jax.lax.index_in_dim(paired, 0, axis + 1, False), jax.lax.index_in_dim(paired, 1, axis + 1, False)


def upsample_parts(x: Array, axis: int) -> tuple[Array, Array]:
    """Returns the even and the odd slices of the ×2 linear upsampling along one axis, with zeros beyond the border.

    out[2i] = .75 x[i] + .25 x[i−1], out[2i+1] = .75 x[i] + .25 x[i+1] (the published fixed transposed convolution).
    """
    n = x.shape[axis]
    padded = jnp.pad(x, [(int(a == axis),) * 2 for a in range(x.ndim)])
    before = jax.lax.slice_in_dim(padded, 0, n, axis=axis)
    after = jax.lax.slice_in_dim(padded, 2, n + 2, axis=axis)
    near = jnp.asarray(0.75, x.dtype) * x
    quarter = jnp.asarray(0.25, x.dtype)
    return near + quarter * before, near + quarter * after


def upsample_axis(x: Array, axis: int) -> Array:
    """Upsamples ×2 along one axis, linearly."""
    stacked = jnp.stack(upsample_parts(x, axis), axis=axis + 1)
    return stacked.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])


def upsampling_matrix(n: int) -> Float[np.ndarray, "2n n"]:
    """Returns `upsample_axis` of n voxels as a matrix."""
    matrix = np.zeros((n, 2, n + 2), np.float32)
    rows = np.arange(n)
    matrix[rows, :, rows + 1] = 0.75
    matrix[rows, 0, rows] = matrix[rows, 1, rows + 2] = 0.25
    return matrix[:, :, 1:-1].reshape(2 * n, n)


def upsample(x: Float[Array, "b x y z c"]) -> Float[Array, "b 2x 2y 2z c"]:
    """Upsamples ×2 with fixed trilinear weights."""
    for axis in (3, 2, 1):
        x = upsample_axis(x, axis)
    return x
