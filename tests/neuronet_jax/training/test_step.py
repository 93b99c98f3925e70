"""Sharded equals unsharded, a step that must not count does not, and the optimiser is what the config says."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.flags import load
from neuronet_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
)
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models import head
from neuronet_jax.models.head_blocks import Blocks, ClassesLast
from neuronet_jax.models.network import build
from neuronet_jax.training import step
from neuronet_jax.training.mesh import make_mesh, put_batch
from neuronet_jax.training.step import evaluation_network, init_state, make_optimizer, make_train_step, network_loss

NAMES = ("fsl_fast", "fsl_first")


def config_of(
    family: str = "reference", crop: tuple[int, int, int] = (8, 16, 12), batch: int = 8, space: int = 1
) -> Config:
    return Config(
        name="test",
        protocols=NAMES,
        data=DataConfig("", crop, 0.5, 0, 1, 1, (), ()),
        augment=AugmentConfig(False, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        model=ModelConfig(family, (4, 6, 8), "float32", "batch"),
        loss=LossConfig(1.0, 0.0 if family == "reference" else 1.0, 0.0, 0.0),  # as published, and as ours
        optimizer=OptimizerConfig(1e-3, "constant", 0, 1e-5, 0.0, 0.0, 0.9, 10.0, 0),
        mesh=MeshConfig(space),
        batch=batch,
        accumulate=1,
        steps=10,
        seed=0,
        log_every=1,
        evaluate_every=1,
        evaluate_subjects=0,
        checkpoint_every=1,
        keep_checkpoints=1,
        profile_steps="",
        sinks=(),
    )


def batch_of(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    random, b, crop = np.random.default_rng(seed), config.batch, config.data.crop
    labels = [random.integers(0, PROTOCOLS[name].num_classes, (b, *crop)) for name in config.protocols]
    return {
        "image": random.standard_normal((b, *crop, 1)).astype(np.float32),
        "labels": np.stack(labels, axis=1).astype(np.uint8),
        "present": np.arange(b * len(labels)).reshape(b, -1) % 5 != 1,
        "slot": np.arange(b, dtype=np.int32),
    }


def loss_and_gradient(config: Config, devices: int) -> tuple[jax.Array, list[np.ndarray], list[np.ndarray]]:
    mesh = make_mesh(config, jax.devices()[:devices])
    graphdef, state = init_state(config, mesh)

    def loss_fn(params, batch):
        network = nnx.merge(graphdef, params, state.moments, copy=True)
        loss, _ = network_loss(network, batch, config, train=True)
        return loss, nnx.state(network, nnx.BatchStat, graph=False)

    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, moments), gradient = run(state.params, put_batch(mesh, batch_of(config)))
    return loss, [np.asarray(g) for g in jax.tree.leaves(gradient)], [np.asarray(m) for m in jax.tree.leaves(moments)]


@pytest.mark.parametrize("family", ["reference", "neuronet"])
# y sides of 16 and 24: two planes, and three, of the coarsest scale on each of two devices
@pytest.mark.parametrize(
    ("space", "y"),
    [pytest.param(1, 16, marks=pytest.mark.soak), pytest.param(2, 16, marks=pytest.mark.soak), (2, 24)],
)
def test_D10_eight_devices_equal_one(family: str, space: int, y: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # relu6 has kinks: one voxel of thousands that rounding moves across one changes a gradient by 1e-4. A smooth
    # function in its place leaves only what sharding could break.
    monkeypatch.setattr(jax.nn, "relu6", jax.nn.silu)
    config = config_of(family, (12, y, 20))
    loss, gradient, moments = loss_and_gradient(config, devices=1)
    sharded = dataclasses.replace(config, mesh=MeshConfig(space))
    sharded_loss, sharded_gradient, sharded_moments = loss_and_gradient(sharded, devices=8)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    for one, many in zip(gradient + moments, sharded_gradient + sharded_moments, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_D10_eight_devices_equal_one_with_every_term_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.nn, "relu6", jax.nn.silu)  # as above
    protocols, terms = ("malp_em", "fsl_fast", "malp_em_tissue"), LossConfig(1.0, 1.0, 0.5, 1.0)
    config = dataclasses.replace(config_of("neuronet", batch=4), protocols=protocols, loss=terms)
    loss, gradient, _ = loss_and_gradient(config, devices=1)
    sharded_loss, sharded_gradient, _ = loss_and_gradient(dataclasses.replace(config, mesh=MeshConfig(2)), devices=8)
    np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
    for one, many in zip(gradient, sharded_gradient, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize("devices", [1, 8])
def test_the_head_has_blocks_of_the_same_size_on_every_device(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[int] = set()

    def layout(shape: tuple[int, ...], classes: int, block_bytes: int) -> Blocks:
        asked.add(block_bytes)  # of all devices, as the step is written for all
        return ClassesLast(shape, classes, block_bytes)

    monkeypatch.setitem(head.PLATFORMS, "cpu", head.PLATFORMS["cpu"]._replace(layout=layout, block_bytes=1000))
    config = config_of(batch=8)
    train_step, state, batch = step.abstract_step(config, make_mesh(config, jax.devices()[:devices]))
    train_step.trace(state, batch)
    assert asked == {1000 * devices}


def test_a_shrunken_config_with_every_term_of_the_loss_runs_a_step() -> None:
    settings = {"data.crop": 8, "model.filters": "2,4", "batch": 1, "loss.class_balance": 0.5, "loss.consistency": 1.0}
    config = load("all_targets:demo", [f"--config.{name}={value}" for name, value in settings.items()])
    mesh = make_mesh(config, jax.devices()[:1])
    graphdef, state = init_state(config, mesh)
    batch = batch_of(config) | {"present": np.asarray([[True, True, False, True, True]])}
    _, metrics = make_train_step(config, graphdef, mesh)(state, put_batch(mesh, batch))
    assert np.isfinite([float(value) for value in metrics.values()]).all() and int(metrics["skipped"]) == 0
    assert {"balanced_cross_entropy/malp_em", "dice/malp_em", "consistency"} <= set(metrics)
    assert float(metrics["gradient_norm"]) > 0


def test_D10_labels_of_a_split_volume_equal_those_of_one_device() -> None:
    config = config_of("neuronet", batch=4, space=2)
    mesh = make_mesh(config, jax.devices())
    graphdef, state = init_state(config, mesh)
    predict = jax.jit(lambda state, image: evaluation_network(graphdef, state).labels(image))
    image = batch_of(config)["image"]
    split = predict(state, put_batch(mesh, {"image": image})["image"])
    np.testing.assert_array_equal(split, predict(jax.device_get(state), image))


def test_D09_what_cannot_be_split_is_refused_with_what_can() -> None:
    with pytest.raises(NeuronetError, match=r"take one of \[1, 2, 4, 8\]"):
        make_mesh(config_of(space=3))
    with pytest.raises(NeuronetError, match="take 4 or 8"):
        make_mesh(config_of(batch=6, space=2))
    with pytest.raises(NeuronetError, match="multiple of 16, got 24: take 32"):
        make_mesh(config_of(crop=(8, 24, 8), batch=8, space=4))


def test_space_must_divide_the_devices_of_each_host_in_the_mesh() -> None:
    hosts = [SimpleNamespace(process_index=index // 4, platform="tpu") for index in range(8)]
    with pytest.raises(NeuronetError, match=r"divide the 4 devices of one host, got 8: take one of \[1, 2, 4\]"):
        make_mesh(config_of(space=8), hosts)


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_the_platform_decides_the_dtype_auto(platform: str, dtype: str) -> None:
    config = config_of().model
    assert config.on(platform) == config  # decided already
    assert dataclasses.replace(config, compute_dtype="auto").on(platform).compute_dtype == dtype


def test_the_mesh_says_which_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(batch=1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="auto"))
    with pytest.raises(ValueError, match="decide it"):
        build(config.model, NAMES, seed=0)
    mesh = make_mesh(config, jax.devices()[:1])
    assert evaluation_network(*init_state(config, mesh)).compute_dtype == jnp.float32
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(step, "platform_of", lambda mesh: "tpu")  # a mesh of TPU devices in a process that has none
    assert evaluation_network(*init_state(config, mesh)).compute_dtype == jnp.bfloat16


def test_D01_a_batch_that_is_not_finite_changes_nothing_but_the_count() -> None:
    config = config_of(batch=1)
    mesh = make_mesh(config, jax.devices()[:1])
    graphdef, state = init_state(config, mesh)
    step = make_train_step(config, graphdef, mesh)
    state, metrics = step(state, put_batch(mesh, batch_of(config)))
    before = jax.device_get(state)
    bad = batch_of(config)
    bad["image"][0, 0, 0, 0, 0] = np.nan
    for skipped in (1, 2):
        state, metrics = step(state, put_batch(mesh, bad))
        assert int(metrics["skipped"]) == skipped
    for name in ("params", "moments", "optimizer", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    assert int(state.step) == 3
    state, metrics = step(state, put_batch(mesh, batch_of(config)))
    assert int(metrics["skipped"]) == 0 and np.isfinite(metrics["loss"])


def test_D01_an_update_too_large_for_its_numbers_is_skipped() -> None:
    """Loss and gradient are finite, the new weights would not be: such weights are never kept, and never saved."""
    config = config_of(batch=1)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=3e38))
    mesh = make_mesh(config, jax.devices()[:1])
    graphdef, state = init_state(config, mesh)
    before = jax.device_get(state)
    state, metrics = make_train_step(config, graphdef, mesh)(state, put_batch(mesh, batch_of(config)))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])
    assert int(state.skipped) == int(state.skipped_total) == 1
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)


def spiked(config: Config, devices: int = 1) -> tuple[Any, list[dict[str, float]]]:
    """Returns the state and the metrics after three sound batches, a bright one and a sound one."""
    mesh = make_mesh(config, jax.devices()[:devices])
    graphdef, state = init_state(config, mesh)
    train_step, seen = make_train_step(config, graphdef, mesh), []
    for number in range(5):
        batch = batch_of(config, seed=number)
        if number == 3:
            batch["image"] *= np.float32(1e8)
        state, metrics = train_step(state, put_batch(mesh, batch))
        seen.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), seen


def test_D02_a_spike_is_skipped_and_counted_alike_on_one_and_on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SPIKE_MEMORY", 3)
    config = config_of(batch=2)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, spike_factor=1.5))
    (one, seen), (two, split) = spiked(config), spiked(config, devices=2)
    norms = [metrics["gradient_norm"] for metrics in seen]
    assert all(np.isfinite(norms)) and norms[3] > 1.5 * np.mean(norms[:3]), norms
    assert [metrics["skipped"] for metrics in seen] == [metrics["skipped"] for metrics in split] == [0, 0, 0, 1, 0]
    assert [metrics["skipped_total"] for metrics in seen] == [0, 0, 0, 1, 1]
    mean = np.mean(norms[:3])
    np.testing.assert_allclose(
        [m["norm_average"] for m in seen[2:4]], [mean, mean + (1.5 * mean - mean) / 3], rtol=1e-5
    )
    assert int(one.step) == int(one.norms) == int(two.norms) == 5
    np.testing.assert_allclose(one.norm_average, two.norm_average, rtol=1e-4)


def test_D02_no_spike_is_called_without_a_factor_or_before_there_is_an_average() -> None:
    config = config_of(batch=1)
    _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
    state = dataclasses.replace(state, norm_average=jnp.float32(2.0), norms=jnp.int32(step.SPIKE_MEMORY - 1))
    assert np.isinf(step._highest_norm(state, 10.0))
    state = dataclasses.replace(state, norms=jnp.int32(step.SPIKE_MEMORY))
    assert np.isinf(step._highest_norm(state, 0.0)) and step._highest_norm(state, 10.0) == 20.0


def test_D02_a_lasting_rise_is_accepted_after_some_steps() -> None:
    """Each spike raises the average by (factor − 1) / memory, so none is refused for ever."""
    config = config_of(batch=1)
    mesh = make_mesh(config, jax.devices()[:1])
    _, state = init_state(config, mesh)
    state = dataclasses.replace(state, norms=jnp.int32(step.SPIKE_MEMORY), norm_average=jnp.float32(1.0))
    refused = 0
    while (highest := step._highest_norm(state, 10.0)) < 20.0 and refused < 20:
        refused += 1
        moved = step._averaged_norm(state, jnp.float32(20.0), highest, jnp.bool(True))
        state = dataclasses.replace(state, **moved)
    assert refused == 9  # 1.09 to the power of nine is above two


def test_the_loss_falls_on_one_batch() -> None:
    config = dataclasses.replace(config_of("neuronet", batch=2), steps=30)
    mesh = make_mesh(config, jax.devices()[:1])
    graphdef, state = init_state(config, mesh)
    step, batch = make_train_step(config, graphdef, mesh), put_batch(mesh, batch_of(config))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert min(losses[-3:]) < 0.95 * losses[0]


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    settings = OptimizerConfig(1e-2, "cosine", 5, 1e-5, 0.1, 1.0, 0.0, 0.0, 0)
    optimizer = make_optimizer(settings, steps=20, batch=1)
    params = jnp.ones(2)
    state, sizes = optimizer.init(params), []
    for _ in range(21):
        moved, state = optimizer.update(jnp.ones(2), state, params)
        sizes.append(float(jnp.abs(jnp.asarray(moved)).max()))
    assert sizes[0] == 0.0 and np.argmax(sizes) == 5 and sizes[20] < 1e-6


def test_weight_decay_shrinks_kernels_alone() -> None:
    optimizer = make_optimizer(OptimizerConfig(1e-2, "constant", 0, 1e-5, 0.1, 1.0, 0.0, 0.0, 0), steps=20, batch=1)
    params: Any = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
    moved: Any
    moved, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(moved["kernel"], -1e-2 * 0.1 * 3.0, rtol=1e-6)  # rate × decay × weight
    assert not moved["bias"].any()


def test_D02_a_gradient_above_the_norm_counts_as_one_of_that_norm() -> None:
    """Over all arrays together: a huge one must not fill Adam's moments, from which it fades only after 1,000 steps."""
    optimizer = make_optimizer(OptimizerConfig(1e-2, "constant", 0, 1e-5, 0.0, 1.0, 0.0, 0.0, 0), steps=20, batch=1)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    huge = {"kernel": jnp.full((2, 2), 4e6), "bias": jnp.full(2, -3e6)}
    unit = jax.tree.map(lambda leaf: leaf / jnp.sqrt(4 * 4e6**2 + 2 * 3e6**2), huge)
    states = [optimizer.update(gradient, optimizer.init(params), params)[1] for gradient in (huge, unit)]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), *states)
    small = jax.tree.map(lambda leaf: leaf / 2, unit)  # stays as it is
    moments = optimizer.update(small, optimizer.init(params), params)[1]
    np.testing.assert_allclose(optax.tree.get(moments, "mu")["bias"], 0.1 * small["bias"], rtol=1e-6)
