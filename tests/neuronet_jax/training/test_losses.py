"""Each term of the loss, by hand and against optax. An absent protocol neither counts nor pushes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neuronet_jax.config import LossConfig
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.models import head
from neuronet_jax.models.head_tallies import Groups, Together
from neuronet_jax.models.readout import Readout, scores, spans
from neuronet_jax.training import losses
from neuronet_jax.training.losses import Crops

TISSUES = ("malp_em", "malp_em_tissue")
ENTROPY, DICE = LossConfig(1.0, 0.0, 0.0, 0.0), LossConfig(0.0, 1.0, 0.0, 0.0)
BALANCED, CONSISTENT = LossConfig(1.0, 0.0, 0.5, 0.0), LossConfig(1.0, 0.0, 0.0, 2.0)
ALL = LossConfig(1.0, 0.5, 0.5, 2.0)


def evaluate(
    config: LossConfig, names: tuple[str, ...], scores: jax.Array, labels: Any, present: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss and its metrics of b voxels in one row each: scores [b x k], labels [b x p], present [b p]."""
    terms = losses.terms(config, names)
    groups = Groups(tuple(PROTOCOLS[name].num_classes for name in names), class_axis=6)
    axes = (0, 1, 3, 4)  # j i b u y w k
    sums = Together(tuple(term.tally for term in terms)).sums(
        groups, jnp.expand_dims(scores, axes), jnp.expand_dims(jnp.asarray(labels, jnp.uint8), axes)
    )
    return losses.total(terms, sums, Crops(jnp.asarray(present), scores.shape[1], names))


def draw(names: tuple[str, ...], b: int, x: int) -> tuple[jax.Array, np.ndarray]:
    random = np.random.default_rng(0)
    classes = [PROTOCOLS[name].num_classes for name in names]
    labels = np.stack([random.integers(0, k, (b, x)) for k in classes], axis=-1)
    return jnp.asarray(random.standard_normal((b, x, sum(classes))), jnp.float32), labels


def test_cross_entropy_equals_optax() -> None:
    scores, labels = draw(("fsl_fast",), 2, 5)
    loss, metrics = evaluate(ENTROPY, ("fsl_fast",), scores, labels, [[True], [True]])
    expected = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.asarray(labels[..., 0], jnp.int32)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["cross_entropy/fsl_fast"], expected, rtol=1e-6)


def test_soft_dice_by_hand() -> None:
    sure = 50.0 * jax.nn.one_hot(jnp.asarray([[1, 1, 0, 0]]), 4)  # predicts class 1 twice, background twice
    labels = np.asarray([[1, 0, 0, 0]])[..., None]
    loss, metrics = evaluate(DICE, ("fsl_fast",), sure, labels, [[True]])
    # class 1: (2·1 + 1) / (2 + 1 + 1); classes 2 and 3 do not occur; background does not count
    np.testing.assert_allclose(metrics["dice/fsl_fast"], 0.75, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.25, rtol=1e-5)


@pytest.mark.parametrize(
    ("power", "expected"),
    # class 0 has three voxels of cross-entropy ln 2, class 1 has one of 2 ln 2
    [(0.5, (3**0.5 + 2) / (3**0.5 + 1)), (1.0, (1 + 2) / 2), (1e-6, (3 * 1 + 2) / 4)],
)
def test_class_balance_by_hand(power: float, expected: float) -> None:
    probability = jnp.asarray([[[0.5, 0.25, 0.25, 0.0]] * 4])
    labels = np.asarray([[0, 0, 0, 1]])[..., None]
    config = LossConfig(1.0, 0.0, power, 0.0)
    loss, metrics = evaluate(config, ("fsl_fast",), jnp.log(probability + 1e-30), labels, [[True]])
    np.testing.assert_allclose(loss, expected * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(metrics["balanced_cross_entropy/fsl_fast"], loss, rtol=1e-6)


@jax.jit
@partial(jax.value_and_grad, has_aux=True)
def consistent_loss(row: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return evaluate(CONSISTENT, TISSUES, row, np.zeros((1, 1, 2)), [[True, True]])


@pytest.mark.parametrize(
    ("implied", "predicted", "expected"),
    [
        ({3: 1.0}, {3: 1.0}, 0.0),
        ({3: 1.0}, {4: 1.0}, np.log(2)),  # nothing in common: the largest there is
        # the middle is (3/4, 1/4): ½ (1 ln 4/3) + ½ (½ ln 2/3 + ½ ln 2) = ¾ ln 4/3
        ({3: 1.0}, {3: 0.5, 4: 0.5}, 0.75 * np.log(4 / 3)),
        ({3: 0.5, 4: 0.5}, {3: 1.0}, 0.75 * np.log(4 / 3)),
    ],
)
def test_consistency_by_hand(implied: dict[int, float], predicted: dict[int, float], expected: float) -> None:
    structures, tissues = np.zeros(139), np.zeros(6)
    for tissue, share in implied.items():
        members = np.flatnonzero(tissue == MALP_EM_TO_TISSUE)
        structures[members[:2]] = share / 2  # two structures of one tissue count together
    for tissue, share in predicted.items():
        tissues[tissue] = share
    with np.errstate(divide="ignore"):
        probability = np.log(np.concatenate([structures, tissues]))
    row = jnp.asarray(np.maximum(probability, -1e3), jnp.float32)[None, None]
    (loss, metrics), gradient = consistent_loss(row)
    entropy = (metrics["cross_entropy/malp_em"] + metrics["cross_entropy/malp_em_tissue"]) / 2
    np.testing.assert_allclose(metrics["consistency"], expected, atol=1e-6)
    np.testing.assert_allclose(loss - entropy, 2.0 * expected, atol=2e-4)  # of a cross-entropy near 1,000
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("config", [LossConfig(1.0, 1.0, 0.0, 0.0), ALL], ids=["as shipped", "all terms"])
def test_D14_an_absent_protocol_has_no_gradient_and_no_nan(config: LossConfig) -> None:
    scores, labels = draw(TISSUES, 2, 4)

    @jax.jit
    @jax.value_and_grad
    def loss(scores: jax.Array, present: jax.Array) -> jax.Array:
        return evaluate(config, TISSUES, scores, labels[: len(scores)], present)[0]

    neither, both, structures = [False, False], [True, True], [True, False]
    _, nothing = loss(scores, jnp.asarray([neither, neither]))
    np.testing.assert_array_equal(nothing, 0.0)
    value, first = loss(scores, jnp.asarray([both, neither]))
    assert jnp.abs(first[0]).max() > 0
    np.testing.assert_array_equal(first[1], 0.0)
    np.testing.assert_allclose(value, loss(scores[:1], jnp.asarray([both]))[0], rtol=1e-6)
    _, half = loss(scores, jnp.asarray([structures, neither]))  # no consistency with tissues that nobody labelled
    assert jnp.abs(half[0, :, :139]).max() > 0
    np.testing.assert_array_equal(half[0, :, 139:], 0.0)


@pytest.mark.parametrize("config", [BALANCED, CONSISTENT, ALL], ids=["balanced", "consistent", "all"])
def test_a_volume_in_blocks_has_the_loss_and_gradients_of_all_scores(
    config: LossConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.PLATFORMS, "cpu", head.PLATFORMS["cpu"]._replace(block_bytes=40_000))
    random = np.random.default_rng(0)
    classes, b, shape = tuple(PROTOCOLS[name].num_classes for name in TISSUES), 2, (8, 4, 4)
    k, channels = sum(classes), (3, 5)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    features = [normal(b, *(n // 2**s for n in shape), c) for s, c in enumerate(channels)]
    readout = Readout([normal(c, k) for c in channels], [normal(k) for _ in channels])
    labels = jnp.asarray(np.stack([random.integers(0, c, (b, *shape)) for c in classes], axis=1), jnp.uint8)
    present = [[True, True], [True, False]]
    terms = losses.terms(config, TISSUES)

    def in_blocks(features: list[jax.Array], readout: Readout) -> jax.Array:
        sums = head.scan(Together(tuple(term.tally for term in terms)), features, readout, labels, classes)
        return losses.total(terms, sums, Crops(jnp.asarray(present), labels[0, 0].size, TISSUES))[0]

    def plain(features: list[jax.Array], readout: Readout) -> jax.Array:
        """From all logits, by optax and by the formulas as one would write them."""
        every = scores(features, readout)
        logits = [every[..., start:stop] for start, stop in spans(classes)]
        truth = jnp.moveaxis(labels, 1, -1).astype(jnp.int32)
        total, has = jnp.float32(0), (slice(None), slice(0, 1))  # the samples that have each protocol
        for p, z in enumerate(logits):
            entropy = optax.softmax_cross_entropy_with_integer_labels(z, truth[..., p])[has[p]]
            one_hot = jax.nn.one_hot(truth[..., p], classes[p])[has[p]]
            counts = one_hot.sum(axis=(0, 1, 2, 3))
            weight = (counts[truth[..., p]] ** -config.class_balance)[has[p]]
            total += 0.5 * config.cross_entropy * (weight * entropy).sum() / weight.sum()
            if config.dice:
                q = jax.nn.softmax(z)[has[p]]
                overlap, predicted = ((part).sum(axis=(0, 1, 2, 3)) for part in (q * one_hot, q))
                dice = (2 * overlap + 1) / (predicted + counts + 1)
                occurs = (counts > 0).at[0].set(False).astype(jnp.float32)
                total += 0.5 * config.dice * (1 - (occurs * dice).sum() / occurs.sum())
        q = jax.nn.softmax(logits[0])
        implied = jnp.stack([q[..., tissue == MALP_EM_TO_TISSUE].sum(axis=-1) for tissue in range(6)], axis=-1)
        predicted = jax.nn.softmax(logits[1])
        middle = (implied + predicted) / 2
        divergence = [(part * jnp.log(part / middle)).sum(axis=-1) / 2 for part in (implied, predicted)]
        return total + config.consistency * jnp.mean((divergence[0] + divergence[1])[:1])

    expected, actual = (jax.jit(jax.value_and_grad(loss, (0, 1)))(features, readout) for loss in (plain, in_blocks))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    for a, e in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5 * float(jnp.abs(e).max()))
