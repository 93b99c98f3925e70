"""The fused head equals the plain form: sums, every gradient, labels; for any slab and with protocols missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neuronet_jax.config import LossConfig
from neuronet_jax.models import head
from neuronet_jax.models import head_blocks as blocks
from neuronet_jax.models.readout import Readout, scores, spans
from neuronet_jax.training import losses

CLASSES = (4, 16, 7)
WEIGHTS = LossConfig(1.0, 1.0)


def draw(shape: tuple[int, int, int], b: int = 2, seed: int = 0) -> tuple[list[jax.Array], Readout, jax.Array]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    channels, k = (3, 5, 6), sum(CLASSES)
    features = [normal(b, *(n // 2**s for n in shape), c) for s, c in enumerate(channels)]
    readout = Readout([normal(c, k) for c in channels], [normal(k) for _ in channels])
    labels = np.stack([random.integers(0, c, (b, *shape)) for c in CLASSES], axis=1)
    return features, readout, jnp.asarray(labels, jnp.uint8)


def plain_loss(features: list[jax.Array], readout: Readout, labels: jax.Array, present: jax.Array) -> jax.Array:
    sums = head.voxel_sums(scores(features, readout), jnp.moveaxis(labels, 1, -1), CLASSES)
    return losses.combine(sums, present, labels[0, 0].size, CLASSES, WEIGHTS)[0]


def fused_loss(features: list[jax.Array], readout: Readout, labels: jax.Array, present: jax.Array) -> jax.Array:
    sums = head.loss_sums(features, readout, labels, CLASSES)
    return losses.combine(sums, present, labels[0, 0].size, CLASSES, WEIGHTS)[0]


@pytest.mark.parametrize("block_bytes", [1, 40_000, 2**30], ids=["least", "some", "whole"])
@pytest.mark.parametrize("platform", blocks.FORMS)
def test_fused_equals_plain(platform: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # every platform's form computes the same wherever it runs
    monkeypatch.setitem(blocks.FORMS, "cpu", blocks.FORMS[platform]._replace(block_bytes=block_bytes))
    features, readout, labels = draw((12, 4, 8))
    present = jnp.asarray([[True, True, False], [True, False, False]])

    def evaluate(loss):
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(features, readout, labels, present)

    (expected, expected_gradients), (actual, actual_gradients) = evaluate(plain_loss), evaluate(fused_loss)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for a, e in zip(jax.tree.leaves(actual_gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4 * float(jnp.abs(e).max()))
    every = scores(features, readout)
    classes = head.labels(features, readout, CLASSES)
    for p, (a, b) in enumerate(spans(CLASSES)):
        np.testing.assert_array_equal(classes[:, p], jnp.argmax(every[..., a:b], axis=-1))


@pytest.mark.parametrize("platform", blocks.FORMS)
def test_entropy_in_one_pass_equals_plain(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.FORMS, "cpu", blocks.FORMS[platform]._replace(block_bytes=40_000))
    features, every, labels = draw((12, 4, 8))
    weights = jnp.asarray([[0.5, 0.0, 2.0], [1.0, 0.3, 0.1]])

    def plain(features: list[jax.Array], readout: Readout) -> tuple[jax.Array, jax.Array]:
        sums = head.voxel_sums(scores(features, readout), jnp.moveaxis(labels, 1, -1), CLASSES).cross_entropy
        return 3.0 * jnp.sum(weights * sums), sums

    def one_pass(features: list[jax.Array], readout: Readout) -> tuple[jax.Array, jax.Array]:
        loss, sums = head.weighted_entropy(features, readout, labels, CLASSES, weights)
        return 3.0 * loss, sums

    expected, actual = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(features, every) for loss in (plain, one_pass)
    )
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5 * float(jnp.abs(e).max()))
    without_gradient = jax.jit(one_pass)(features, every)
    np.testing.assert_allclose(without_gradient[0], expected[0][0], rtol=1e-6)
    np.testing.assert_allclose(without_gradient[1], expected[0][1], rtol=1e-5)


def test_no_tensor_of_all_classes_at_full_resolution_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.FORMS, "cpu", blocks.FORMS["cpu"]._replace(block_bytes=1))
    features, readout, labels = draw((32, 32, 32), b=1)
    whole = 4 * labels[0, 0].size * sum(CLASSES)
    for function in (jax.grad(fused_loss, (0, 1)), lambda f, r, y, _: head.labels(f, r, CLASSES)):
        compiled = jax.jit(function).lower(features, readout, labels, jnp.ones((1, 3), bool)).compile()
        largest = max(
            np.prod([int(n) for n in dims.split(",")])
            for dims in _shapes(compiled.as_text() or "")
            if dims.endswith(f",{sum(CLASSES)}")
        )
        # scores at half resolution, upsampled along x, are a quarter of the whole
        assert 4 * largest <= whole / 4


def _shapes(program: str) -> list[str]:
    return [word.split("]")[0] for word in program.split("f32[")[1:] if word.split("]")[0]]


def test_D15_extreme_scores_give_a_finite_loss() -> None:
    features, readout, labels = draw((4, 4, 4))
    for dtype in (jnp.float32, jnp.bfloat16):
        run = jax.jit(jax.value_and_grad(fused_loss, 1))
        for scale in (1e4, 1e-30):
            cast = [(f * jnp.float32(scale)).astype(dtype) for f in features]
            loss, gradient = run(cast, readout, labels, jnp.ones((2, 3), bool))
            assert jnp.isfinite(loss)
            assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_bfloat16_stays_near_float32() -> None:
    features, readout, labels = draw((8, 8, 8))
    present = jnp.ones((2, 3), bool)
    run = jax.jit(fused_loss)
    low = run([f.astype(jnp.bfloat16) for f in features], readout, labels, present)
    # bfloat16 keeps 8 bits: scores of size 5 err by about 0.02, their mean cross-entropy by much less
    np.testing.assert_allclose(low, run(features, readout, labels, present), rtol=5e-3)
