"""A batch in parts has the gradient of the whole batch; the learning rate follows the batch."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from neuronet_jax.config import LossConfig, MeshConfig, ModelConfig
from neuronet_jax.errors import NeuronetError
from neuronet_jax.training import accumulation
from neuronet_jax.training.mesh import make_mesh, put_batch
from neuronet_jax.training.step import init_state, make_train_step, network_loss, peak_rate
from tests.neuronet_jax.training.test_step import batch_of, config_of


def small(norm: str, loss: LossConfig, batch: int = 4):
    config = dataclasses.replace(config_of("neuronet", (4, 8, 4), batch), loss=loss, protocols=("fsl_fast",))
    return dataclasses.replace(config, model=ModelConfig("neuronet", (8, 8), "float32", norm))


def whole_gradient(config, mesh):
    graphdef, state = init_state(config, mesh)

    def loss_fn(params, batch):
        network = nnx.merge(graphdef, params, state.moments, copy=True)
        return network_loss(network, batch, config, train=True)

    (loss, shown), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        state.params, put_batch(mesh, batch_of(config))
    )
    return loss, shown, gradient


def gradient_in_parts(config, mesh):
    graphdef, state = init_state(config, mesh)

    def run(params, batch):
        split = accumulation.parts_of(batch, config.accumulate, mesh)
        return accumulation.gradient(graphdef, params, state.moments, split, config)

    return jax.jit(run)(state.params, put_batch(mesh, batch_of(config)))


@pytest.mark.parametrize(
    ("norm", "loss"),
    [
        ("group", LossConfig(1.0, 1.0, 0.0, 0.0)),  # Dice takes the batch as one volume
        ("instance", LossConfig(1.0, 0.0, 0.0, 0.0)),  # linear in the sums: one forward pass
    ],
)
def test_parts_give_the_gradient_of_the_whole_batch(norm: str, loss: LossConfig, monkeypatch) -> None:
    monkeypatch.setattr(jax.nn, "relu6", jax.nn.silu)  # without kinks, rounding stays rounding
    config = small(norm, loss)
    one = make_mesh(config, jax.devices()[:1])
    value, shown, gradient = whole_gradient(config, one)
    in_parts = dataclasses.replace(config, accumulate=2)
    # On four devices too where Dice needs the sums of all: two crops apart, each shared by two devices.
    sharded = make_mesh(dataclasses.replace(in_parts, mesh=MeshConfig(2)), jax.devices()[:4])
    for mesh in (one, sharded) if loss.dice else (one,):
        value_of_parts, shown_of_parts, gradient_of_parts, _ = gradient_in_parts(in_parts, mesh)
        np.testing.assert_allclose(value_of_parts, value, rtol=1e-5)
        assert all(np.allclose(shown_of_parts[name], shown[name], rtol=1e-5) for name in shown)
        for a, b in zip(jax.tree.leaves(gradient_of_parts), jax.tree.leaves(gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_a_step_trains_in_parts() -> None:
    config = small("group", LossConfig(1.0, 0.0, 0.0, 0.0), batch=2)
    mesh = make_mesh(config, jax.devices()[:1])
    value, *_ = whole_gradient(config, mesh)
    config = dataclasses.replace(config, accumulate=2)
    graphdef, state = init_state(config, mesh)
    before = jax.tree.leaves(state.moments)[0].copy()
    state, metrics = make_train_step(config, graphdef, mesh)(state, put_batch(mesh, batch_of(config)))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert int(state.step) == 1 and int(metrics["skipped"]) == 0
    assert not np.array_equal(jax.tree.leaves(state.moments)[0], before)


def test_every_device_keeps_its_crops() -> None:
    config = dataclasses.replace(config_of(batch=8), accumulate=2)
    mesh = make_mesh(config, jax.devices()[:2])
    batch = put_batch(mesh, batch_of(config))
    split = jax.jit(lambda batch: accumulation.parts_of(batch, 2, mesh))(batch)
    assert np.array_equal(split["slot"], [[0, 1, 4, 5], [2, 3, 6, 7]])
    assert {shard.data.shape for shard in split["slot"].addressable_shards} == {(2, 2)}
    assert np.array_equal(split["image"].reshape(8, -1), batch["image"][split["slot"].ravel()].reshape(8, -1))


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(NeuronetError, match=r"config\.accumulate must be a divisor of batch=8, got 3"):
        dataclasses.replace(config_of(batch=8), accumulate=3)
    config = dataclasses.replace(config_of(batch=8), accumulate=2)
    with pytest.raises(NeuronetError, match="data axis times accumulate, 16; got 8: take 16"):
        make_mesh(config, jax.devices()[:8])


def test_the_rate_grows_with_the_root_of_the_batch_if_it_has_a_base() -> None:
    optimizer = config_of().optimizer
    assert peak_rate(optimizer, 64) == optimizer.learning_rate
    scaled = dataclasses.replace(optimizer, base_batch=4)
    assert [peak_rate(scaled, batch) / scaled.learning_rate for batch in (1, 4, 64)] == [0.5, 1.0, 4.0]
