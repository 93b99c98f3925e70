"""The published network against the golden numbers of its own implementation, in both modes, through the fused head."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neuronet_jax import dltk
from neuronet_jax.config import ModelConfig
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.head_tallies import CrossEntropy
from neuronet_jax.models.network import Network, build
from neuronet_jax.models.readout import scores, spans

REFERENCE = ModelConfig("reference", (16, 32, 64, 128), "float32", "batch")
ALL = tuple(PROTOCOLS)


def count(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def evaluation(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "neuronet_all_eval.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def training(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "neuronet_all_train.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def published(evaluation: dict[str, np.ndarray]) -> Network:
    network = build(REFERENCE, ALL, seed=0)
    dltk.load_variables(network, {k.removeprefix("var/"): v for k, v in evaluation.items() if k.startswith("var/")})
    return network


def test_the_published_network_has_its_parameters() -> None:
    network = build(REFERENCE, ALL, seed=0)
    assert count(nnx.state(network.encoder, nnx.Param)) == 2_431_952
    heads = [count(nnx.state(network.decoders.protocols[name], nnx.Param)) for name in ALL]
    assert heads == [1_000, 4_192, 1_000, 53_515, 1_512]
    assert count(nnx.state(network, nnx.Param)) == 2_493_171


def test_inference_equals_the_published(published: Network, evaluation: dict[str, np.ndarray]) -> None:
    image = jnp.asarray(evaluation["x"])
    features, readout = jax.jit(lambda network, x: network.features(x))(published, image)
    every = jax.jit(scores)(features, readout)
    expected = evaluation["out/encoder_out"]
    np.testing.assert_allclose(features[-1], expected, rtol=0, atol=1e-4 * expected.std())
    for name, (a, b) in zip(ALL, spans(published.classes), strict=True):
        expected = evaluation[f"out/logits_{name}"]
        np.testing.assert_allclose(every[..., a:b], expected, rtol=0, atol=1e-4 * expected.std(), err_msg=name)
    labels = jax.jit(lambda network, x: network.labels(x))(published, image)
    for p, name in enumerate(ALL):
        np.testing.assert_array_equal(labels[:, p], evaluation[f"out/logits_{name}"].argmax(-1), err_msg=name)


def test_a_training_step_equals_the_published(
    published: Network, evaluation: dict[str, np.ndarray], training: dict[str, np.ndarray]
) -> None:
    graphdef, params, moments = nnx.split(published, nnx.Param, nnx.BatchStat, graph=False)
    image = jnp.asarray(evaluation["x"])
    labels = jnp.stack([jnp.asarray(training[f"y/{name}"]).reshape(image.shape[:4]) for name in ALL], axis=1)

    def loss_fn(params):
        network = nnx.merge(graphdef, params, moments, copy=True)
        weights = jnp.full((1, len(ALL)), 1 / (len(ALL) * image[0].size))
        loss, _ = network.scan_weighted(CrossEntropy(), weights, image, labels.astype(jnp.uint8), train=True)
        return loss, nnx.state(network, nnx.BatchStat, graph=False)

    (loss, moved), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    np.testing.assert_allclose(loss, training["loss"], rtol=1e-5)
    paths: dict[Any, str] = {**dltk.variable_paths(published)}
    for path, value in nnx.to_flat_state(gradient):
        norm = jnp.linalg.norm(value[...].ravel())
        np.testing.assert_allclose(norm, training[f"grad_norm/{paths[path]}"], rtol=1e-3, err_msg=paths[path])
    for path, value in nnx.to_flat_state(moved):
        expected = training[f"after/{paths[path]}"]
        np.testing.assert_allclose(value[...], expected, atol=1e-4 * np.abs(expected).max(), err_msg=paths[path])


def test_the_importer_refuses_variables_that_do_not_fit(evaluation: dict[str, np.ndarray]) -> None:
    variables = {k.removeprefix("var/"): v for k, v in evaluation.items() if k.startswith("var/")}
    network = build(REFERENCE, ALL, seed=0)
    missing = dict(variables)
    del missing["tail_3/last/conv3d/kernel"]
    with pytest.raises(NeuronetError, match="tail_3/last/conv3d/kernel"):
        dltk.load_variables(network, missing)
    with pytest.raises(NeuronetError, match="no place for 1 variables"):
        dltk.load_variables(network, {**variables, "tail_9/last/conv3d/kernel": np.zeros(1)})
    with pytest.raises(NeuronetError, match="has shape"):
        dltk.load_variables(network, {**variables, "conv3d/kernel": np.zeros((3, 3, 3, 1, 8), np.float32)})


@pytest.mark.parametrize("family", ["reference", "neuronet"])
def test_labels_are_the_argmax_of_the_logits(family: str) -> None:
    names = ("malp_em", "fsl_fast")
    network = build(ModelConfig(family, (4, 6, 8), "float32", "batch"), names, seed=1)
    image = jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 8, 12, 1)), jnp.float32)
    labels, scored = jax.jit(lambda network, x: (network.labels(x), network.logits(x)))(network, image)
    assert labels.shape == (2, 2, 16, 8, 12) and labels.dtype == jnp.uint8
    for p, name in enumerate(names):
        np.testing.assert_array_equal(labels[:, p], jnp.argmax(scored[name], axis=-1))
    with pytest.raises(NeuronetError, match="multiples of 4"):
        network.labels(image[:, :7])


def test_kernels_start_as_published() -> None:
    kernel = build(REFERENCE, ALL, seed=0).encoder.units[1].conv0.kernel[...]  # 3³ taps of 32 channels
    limit = np.sqrt(3 / (27 * 32))  # variance scaling, fan-in, uniform
    assert np.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.01)


def test_a_seed_fixes_every_weight() -> None:
    config = ModelConfig("neuronet", (4, 6), "float32", "batch")
    one, same, other = (jax.tree.leaves(build(config, ("fsl_fast",), seed)) for seed in (3, 3, 4))
    assert all(jnp.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert any(not jnp.array_equal(a, b) for a, b in zip(one, other, strict=True))
