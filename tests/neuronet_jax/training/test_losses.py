"""The loss, by hand and against optax; what is absent must neither count nor push."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from neuronet_jax.config import LossConfig
from neuronet_jax.models import head
from neuronet_jax.training import losses

CLASSES = (3,)


def sums_of(scores: jax.Array, labels: jax.Array) -> head.Sums:
    """Of b voxels in one row each: scores [b x k], labels [b x]."""
    return head.voxel_sums(scores[:, :, None, None, :], labels[:, :, None, None, None], CLASSES)


def combine(sums: head.Sums, present: list[bool], weights: LossConfig, voxels: int) -> tuple[jax.Array, dict]:
    return losses.combine(sums, jnp.asarray(present)[:, None], voxels, CLASSES, weights)


def test_cross_entropy_equals_optax() -> None:
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32)
    labels = jnp.asarray([[0, 1, 2, 1, 0], [2, 2, 1, 0, 0]], jnp.uint8)
    loss, _ = combine(sums_of(scores, labels), [True, True], LossConfig(1.0, 0.0), voxels=5)
    expected = optax.softmax_cross_entropy_with_integer_labels(scores, labels.astype(jnp.int32)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_soft_dice_by_hand() -> None:
    sure = 50.0 * jax.nn.one_hot(jnp.asarray([[1, 1, 0, 0]]), 3)  # predicts class 1 twice, background twice
    labels = jnp.asarray([[1, 0, 0, 0]], jnp.uint8)
    loss, parts = combine(sums_of(sure, labels), [True], LossConfig(0.0, 1.0), voxels=4)
    # class 1: (2·1 + 1) / (2 + 1 + 1); class 2 does not occur; background does not count
    np.testing.assert_allclose(parts["dice"], [0.75], rtol=1e-5)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-5)


def test_D14_an_absent_protocol_has_no_gradient_and_no_nan() -> None:
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3)), jnp.float32)
    labels = jnp.zeros((2, 4), jnp.uint8)

    def loss(scores: jax.Array, present: list[bool]) -> jax.Array:
        return combine(sums_of(scores, labels[: len(scores)]), present, LossConfig(1.0, 1.0), voxels=4)[0]

    nothing = jax.grad(loss)(scores, [False, False])
    np.testing.assert_array_equal(nothing, 0.0)
    first = jax.grad(loss)(scores, [True, False])
    assert jnp.abs(first[0]).max() > 0
    np.testing.assert_array_equal(first[1], 0.0)
    np.testing.assert_allclose(loss(scores, [True, False]), loss(scores[:1], [True]), rtol=1e-6)
