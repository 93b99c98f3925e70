"""The forms of a convolution agree in value and in both gradients, and padding is TensorFlow's SAME."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from neuronet_jax.models import conv

Form = Callable[[jax.Array, jax.Array, int], jax.Array]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("folded", [conv.folded_conv3d, conv.summed_conv3d])
@pytest.mark.parametrize("sides", [(8, 6, 10), (7, 9, 5)], ids=["even", "odd"])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (4, 1), (4, 2)])
def test_folded_equals_native_in_value_and_gradients(
    folded: Form, sides: tuple[int, ...], size: int, stride: int
) -> None:
    x, kernel = draw(2, *sides, 3), draw(size, size, size, 3, 5, seed=1)
    cotangent = draw(2, *(-(-n // stride) for n in sides), 5, seed=2)

    def value_and_gradients(form):
        y, pull = jax.vjp(lambda x, kernel: form(x, kernel, stride), x, kernel)
        return y, *pull(cotangent)

    for found, native in zip(
        jax.jit(lambda: value_and_gradients(folded))(),
        jax.jit(lambda: value_and_gradients(conv.native_conv3d))(),
        strict=True,
    ):
        np.testing.assert_allclose(found, native, rtol=1e-5, atol=1e-5 * float(jnp.std(native)))
    np.testing.assert_allclose(conv.conv3d(x, kernel, stride), conv.native_conv3d(x, kernel, stride), atol=1e-4)


def test_padding_is_tensorflows_same() -> None:
    assert conv.same_padding(8, 3, 1) == (1, 1)
    assert conv.same_padding(8, 4, 2) == (1, 1)
    assert conv.same_padding(7, 4, 2) == (1, 2)  # the odd one after
    assert conv.same_padding(8, 3, 2) == (0, 1)
    assert conv.same_padding(5, 1, 2) == (0, 0)


def test_max_pool_equals_scipy() -> None:
    x = draw(1, 6, 8, 4, 2)
    blocks = scipy.ndimage.maximum_filter(np.asarray(x), size=(1, 2, 2, 2, 1))  # of each voxel and the one before
    np.testing.assert_array_equal(conv.max_pool(x), blocks[:, 1::2, 1::2, 1::2])


def test_max_pool_of_an_odd_side_keeps_the_border_voxel_alone() -> None:
    x = jnp.arange(5.0).reshape(1, 5, 1, 1, 1)
    np.testing.assert_array_equal(conv.max_pool(x).ravel(), [1, 3, 4])
    np.testing.assert_array_equal(conv.max_pool(-x).ravel(), [0, -2, -4])  # padding never wins


def test_upsampling_weights_are_the_published_ones() -> None:
    line = jnp.asarray([4.0, 8.0]).reshape(1, 2, 1, 1, 1)
    # .75 x[i] + .25 x[i∓1], zero beyond the border; a side of 1 keeps .75 of its value along the other axes
    np.testing.assert_allclose(conv.upsample_axis(line, 1).ravel(), [3.0, 5.0, 7.0, 6.0])


def test_upsampling_is_the_transpose_of_a_strided_convolution() -> None:
    taps = jnp.asarray([0.25, 0.75, 0.75, 0.25])
    kernel = jnp.einsum("i,j,k->ijk", taps, taps, taps)[..., None, None]
    x, fine = draw(1, 3, 4, 5, 1), draw(1, 6, 8, 10, 1, seed=1)
    down = conv.native_conv3d(fine, kernel, stride=2)
    np.testing.assert_allclose(jnp.vdot(conv.upsample(x), fine), jnp.vdot(x, down), rtol=1e-5)
