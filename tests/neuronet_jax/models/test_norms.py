"""Norms: as flax's, in training; moving moments elsewhere; sharded equals unsharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from neuronet_jax.config import ModelConfig
from neuronet_jax.errors import NeuronetError
from neuronet_jax.models.layers import EPSILON, Norm
from neuronet_jax.models.network import build
from tests.neuronet_jax.training.test_step import config_of

CHANNELS = 16


def values() -> jax.Array:
    scale = 1.0 + jnp.arange(CHANNELS) / 4
    return scale[None, None, None, None] * jax.random.normal(jax.random.key(0), (3, 4, 6, 2, CHANNELS)) + 2.0


def drawn(groups: int) -> Norm:
    norm = Norm(CHANNELS, momentum=0.9, groups=groups)
    for key, parameter in enumerate((norm.gamma, norm.beta)):
        parameter.set_value(jax.random.normal(jax.random.key(key), (CHANNELS,)))
    return norm


@pytest.mark.parametrize("groups", [0, 8, CHANNELS])
def test_training_normalises_as_flax_does(groups: int) -> None:
    norm, x = drawn(groups), values()
    rngs = nnx.Rngs(0)
    theirs = {
        0: lambda: nnx.BatchNorm(CHANNELS, epsilon=EPSILON, use_running_average=False, rngs=rngs),
        8: lambda: nnx.GroupNorm(CHANNELS, num_groups=8, epsilon=EPSILON, rngs=rngs),
        CHANNELS: lambda: nnx.InstanceNorm(CHANNELS, epsilon=EPSILON, rngs=rngs),
    }[groups]()
    theirs.scale.set_value(norm.gamma[...])
    theirs.bias.set_value(norm.beta[...])
    with jax.numpy_rank_promotion("allow"):
        expected = theirs(x)
    np.testing.assert_allclose(norm(x, train=True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [8, CHANNELS])
def test_moving_moments_approach_the_mean_of_the_crops_own(groups: int) -> None:
    norm, x = drawn(groups), values()
    norm(x, train=True)
    of_groups = np.asarray(x, np.float64).reshape(3, -1, groups, CHANNELS // groups)
    mean, variance = of_groups.mean((1, 3)).mean(0), of_groups.var((1, 3)).mean(0)
    np.testing.assert_allclose(norm.mean[...], 0.1 * np.repeat(mean, CHANNELS // groups), rtol=1e-5)
    np.testing.assert_allclose(norm.variance[...], 0.9 + 0.1 * np.repeat(variance, CHANNELS // groups), rtol=1e-5)
    # Elsewhere a crop's neighbours, and how a head is cut, change nothing.
    np.testing.assert_allclose(norm(x[:1, :2], train=False), norm(x, train=False)[:1, :2], rtol=1e-6)


@pytest.mark.parametrize("groups", [0, 8])
def test_sharded_equals_unsharded(groups: int) -> None:
    """Batch norm is over the crops of all devices; the moments of one crop are over the devices that share it."""
    mesh = jax.make_mesh((3, 2), ("data", "space"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:6])
    norm, x = drawn(groups), values()
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None, "space")))
    graphdef, state = nnx.split(norm, graph=False)
    run = jax.jit(lambda x: nnx.merge(graphdef, state, copy=True)(x, train=True))
    np.testing.assert_allclose(run(split), run(x), rtol=1e-5, atol=1e-5)


def test_a_network_of_group_norm_does_not_see_the_rest_of_a_batch() -> None:
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 8, 1))
    for norm, sees in (("batch", True), ("group", False), ("instance", False)):
        network = build(ModelConfig("neuronet", (8, 16), "float32", norm), ("fsl_fast",), seed=0)
        graphdef, state = nnx.split(network, graph=False)
        logits = jax.jit(lambda state, x, g=graphdef: nnx.merge(g, state, copy=True).logits(x, train=True))
        together, alone = (logits(state, x)["fsl_fast"][0] for x in (image, image[:1]))
        assert np.allclose(together, alone, atol=1e-4) is not sees


def test_norms_that_do_not_fit_are_refused() -> None:
    import dataclasses

    config = config_of()
    for model, message in (
        (ModelConfig("neuronet", (8, 16), "float32", "layer"), r"model\.norm must be batch or group or instance, got"),
        (ModelConfig("neuronet", (8, 12), "float32", "group"), r"model\.filters must be multiples of 8"),
        (ModelConfig("reference", (8, 16), "float32", "group"), r'model\.norm must be "batch" with model\.family'),
    ):
        with pytest.raises(NeuronetError, match=message):
            dataclasses.replace(config, model=model)
