"""The fused readout equals the plain form: sums, every gradient, labels; in every layout and for blocks of any size.

The plain form computes all scores and lets JAX differentiate.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neuronet_jax.models import head
from neuronet_jax.models.head_tallies import CrossEntropy, Overlap, PerVoxel, SoftDice, Tally, Together, VoxelFunction
from neuronet_jax.models.readout import Readout, scores, spans

NAMES, CLASSES = ("first", "second", "third"), (4, 16, 7)
BOTH = Together((CrossEntropy(), SoftDice()))
Evaluated = tuple[Any, Any]  # a value, and the gradients by features and readout


def draw(shape: tuple[int, int, int], b: int = 2, seed: int = 0) -> tuple[list[jax.Array], Readout, jax.Array]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    channels, k = (3, 5, 6), sum(CLASSES)
    features = [normal(b, *(n // 2**s for n in shape), c) for s, c in enumerate(channels)]
    readout = Readout([normal(c, k) for c in channels], [normal(k) for _ in channels])
    labels = np.stack([random.integers(0, c, (b, *shape)) for c in CLASSES], axis=1)
    return features, readout, jnp.asarray(labels, jnp.uint8)


def voxel_entropy(scores: dict[str, jax.Array], labels: dict[str, jax.Array]) -> jax.Array:
    return jnp.stack([-jnp.sum(of_truth(jax.nn.log_softmax(z), labels[name])) for name, z in scores.items()])


def voxel_overlap(scores: dict[str, jax.Array], labels: dict[str, jax.Array]) -> Overlap:
    q = {name: jax.nn.softmax(z) for name, z in scores.items()}
    truth = [of_truth(jnp.ones(len(z)), labels[name]) for name, z in scores.items()]
    overlap = [of_truth(z, labels[name]) for name, z in q.items()]
    return Overlap(*map(jnp.concatenate, (overlap, list(q.values()), truth)))


def of_truth(values: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(len(values)) == label, values, 0.0)


def voxel_both(scores: dict[str, jax.Array], labels: dict[str, jax.Array]) -> tuple[jax.Array, Overlap]:
    return voxel_entropy(scores, labels), voxel_overlap(scores, labels)


def plain_sums(function: VoxelFunction, features: list[jax.Array], readout: Readout, labels: jax.Array) -> Any:
    def voxel(scores: jax.Array, labels: jax.Array) -> Any:
        parts = {name: scores[a:b] for name, (a, b) in zip(NAMES, spans(CLASSES), strict=True)}
        return function(parts, {name: labels[p].astype(jnp.int32) for p, name in enumerate(NAMES)})

    for _ in range(4):
        voxel = jax.vmap(voxel)
    found = voxel(scores(features, readout), jnp.moveaxis(labels, 1, -1))  # b x y z …
    return jax.tree.map(lambda x: x.sum(axis=(1, 2, 3)), found)


def inner(a: Any, b: Any) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def squares(sums: Any) -> jax.Array:
    """Some function of the sums that is not linear: its gradient by each sum is a different one."""
    return inner(sums, sums)


def evaluate(sums: Callable[..., Any], *arguments: Any) -> Evaluated:
    def of(features: list[jax.Array], readout: Readout, labels: jax.Array) -> tuple[jax.Array, Any]:
        found = sums(features, readout, labels)
        return squares(found), found

    (_, found), gradients = jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(*arguments)
    return found, gradients


def assert_equal(actual: Evaluated, expected: Evaluated) -> None:
    for a, e in zip(jax.tree.leaves(actual[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6 * float(jnp.abs(e).max()))
    for a, e in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * float(jnp.abs(e).max()))


@pytest.fixture(params=list(head.PLATFORMS))
def use_platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Runs every platform's layout here, with blocks of some bytes."""

    def use(block_bytes: int) -> None:
        monkeypatch.setitem(head.PLATFORMS, "cpu", head.PLATFORMS[request.param]._replace(block_bytes=block_bytes))

    return use


@pytest.fixture(scope="module")
def expected() -> Evaluated:
    return evaluate(lambda *given: plain_sums(voxel_both, *given), *draw((12, 4, 8)))


@pytest.mark.parametrize(
    ("block_bytes", "tally"),
    [(1, BOTH), (40_000, BOTH), (40_000, PerVoxel(voxel_both, NAMES))],
    ids=["closed forms, smallest blocks", "closed forms", "any function"],
)
def test_sums_and_gradients_equal_the_plain_form(
    use_platform: Callable[[int], None], block_bytes: int, tally: Tally, expected: Evaluated
) -> None:
    use_platform(block_bytes)
    assert_equal(evaluate(lambda f, r, y: head.scan(tally, f, r, y, CLASSES), *draw((12, 4, 8))), expected)


@pytest.mark.parametrize("block_bytes", [1, 40_000, 2**30], ids=["least", "some", "whole"])
def test_labels_are_those_of_all_scores(use_platform: Callable[[int], None], block_bytes: int) -> None:
    use_platform(block_bytes)
    features, readout, _ = draw((12, 4, 8))
    every, classes = scores(features, readout), head.labels(features, readout, CLASSES)
    for p, (a, b) in enumerate(spans(CLASSES)):
        np.testing.assert_array_equal(classes[:, p], jnp.argmax(every[..., a:b], axis=-1))


@pytest.mark.parametrize(
    ("tally", "function"), [(CrossEntropy(), voxel_entropy), (PerVoxel(voxel_overlap, NAMES), voxel_overlap)]
)
def test_one_pass_with_known_weights_equals_the_plain_form(
    use_platform: Callable[[int], None], tally: Tally, function: VoxelFunction
) -> None:
    use_platform(40_000)
    features, readout, labels = draw((12, 4, 8))
    random = np.random.default_rng(1)
    like = head.sums_like(tally, len(labels), CLASSES)
    weights = jax.tree.map(lambda s: jnp.asarray(random.standard_normal(s.shape), jnp.float32), like)

    def plain(features: list[jax.Array], readout: Readout) -> tuple[jax.Array, Any]:
        sums = plain_sums(function, features, readout, labels)
        return 3.0 * inner(weights, sums), sums

    def one_pass(features: list[jax.Array], readout: Readout) -> tuple[jax.Array, Any]:
        loss, sums = head.scan_weighted(tally, weights, features, readout, labels, CLASSES)
        return 3.0 * loss, sums

    expected, actual = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(features, readout) for loss in (plain, one_pass)
    )
    assert_equal((actual[0][1], actual[1]), (expected[0][1], expected[1]))
    without_gradient = jax.jit(one_pass)(features, readout)
    for loss, sums in (without_gradient, actual[0]):
        np.testing.assert_allclose(loss, expected[0][0], rtol=1e-5)
        assert_equal((sums, None), (expected[0][1], None))


@pytest.mark.parametrize("tally", [BOTH, PerVoxel(voxel_both, NAMES)], ids=["closed form", "any function"])
def test_no_tensor_of_all_classes_at_full_resolution_exists(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.PLATFORMS, "cpu", head.PLATFORMS["cpu"]._replace(block_bytes=1))
    features, readout, labels = draw((32, 32, 32), b=1)
    whole = 4 * labels[0, 0].size * sum(CLASSES)
    loss = jax.grad(lambda f, r, y: squares(head.scan(tally, f, r, y, CLASSES)), (0, 1))
    for function in (loss, lambda f, r, y: head.labels(f, r, CLASSES)):
        compiled = jax.jit(function).lower(features, readout, labels).compile()
        largest = max(
            np.prod([int(n) for n in dims.split(",")])
            for dims in _shapes(compiled.as_text() or "")
            if dims.endswith(f",{sum(CLASSES)}")
        )
        # scores at half resolution, upsampled along x, are a quarter of the whole
        assert 4 * largest <= whole / 4


def _shapes(program: str) -> list[str]:
    return [word.split("]")[0] for word in program.split("f32[")[1:] if word.split("]")[0]]


def mean_loss(features: list[jax.Array], readout: Readout, labels: jax.Array) -> jax.Array:
    entropy, overlap = head.scan(BOTH, features, readout, labels, CLASSES)
    return jnp.mean(entropy) / labels[0, 0].size - jnp.mean(overlap.intersection / (overlap.predicted + 1.0))


def test_D15_extreme_scores_give_a_finite_loss() -> None:
    features, readout, labels = draw((4, 4, 4))
    for dtype in (jnp.float32, jnp.bfloat16):
        run = jax.jit(jax.value_and_grad(mean_loss, 1))
        for scale in (1e4, 1e-30):
            cast = [(f * jnp.float32(scale)).astype(dtype) for f in features]
            loss, gradient = run(cast, readout, labels)
            assert jnp.isfinite(loss)
            assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_bfloat16_stays_near_float32() -> None:
    features, readout, labels = draw((8, 8, 8))
    run = jax.jit(mean_loss)
    low = run([f.astype(jnp.bfloat16) for f in features], readout, labels)
    # bfloat16 keeps 8 bits: scores of size 5 err by about 0.02, their mean cross-entropy by much less
    np.testing.assert_allclose(low, run(features, readout, labels), rtol=5e-3)
