"""One training step: a pure function of state and batch, and the state it moves.

The loop that calls it is `experiments/train.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from neuronet_jax.config import Config, OptimizerConfig
from neuronet_jax.models.network import Network, build
from neuronet_jax.training import augment, losses
from neuronet_jax.training.mesh import batch_sharding, replicated

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training carries from step to step, as pytrees of arrays."""

    step: jax.Array  # updates tried so far, int32
    skipped: jax.Array  # updates refused in a row because loss or gradient was not finite, int32
    params: Any
    moments: Any  # moving moments of the normalisations
    optimizer: Any
    average: Any  # moving averages of (params, moments) that evaluation uses; None without


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Adam with what the config adds: warm-up and cosine decay, decoupled weight decay, clipping by the global norm."""
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        warmup = min(config.warmup_steps, steps // 2)
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, warmup + 1))
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(optax.scale_by_adam(eps=config.epsilon))
    if config.weight_decay:  # kernels only: shrinking a norm's gain or a bias regularises nothing
        parts.append(
            optax.add_decayed_weights(config.weight_decay, mask=lambda params: jax.tree.map(_is_kernel, params))
        )
    chain = optax.chain(*parts, optax.scale_by_learning_rate(rate))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of the integer count
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def _is_kernel(leaf: jax.Array) -> bool:
    return leaf.ndim >= 2


def init_state(config: Config, mesh: Mesh) -> tuple[nnx.GraphDef[Network], TrainState]:
    """The network's structure and a fresh state on the mesh."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    graphdef, params, moments = _split(build(config.model, config.protocols, config.seed))

    def init(params: Any, moments: Any) -> TrainState:
        average = jax.tree.map(jnp.copy, (params, moments)) if config.optimizer.ema_decay else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, jnp.copy(zero), params, moments, optimizer.init(params), average)

    # As host arrays, which every process has alike: jit then places them on the global mesh.
    weights = jax.tree.map(np.asarray, (params, moments))
    return graphdef, jax.jit(init, out_shardings=replicated(mesh))(*weights)


def make_train_step(
    config: Config, graphdef: nnx.GraphDef[Network], mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled update. The state is donated: use the one that comes back."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    key = jax.random.key(config.seed)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = augment.augment(batch, jax.random.fold_in(key, state.step), config.augment, config.protocols)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
            network = nnx.merge(graphdef, params, state.moments, copy=True)
            loss, parts = network_loss(network, batch, config, train=True)
            return loss, (_split(network)[2], parts)

        (loss, (moments, parts)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient)
        moved = TrainState(
            step=state.step,
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            moments=moments,
            optimizer=optimizer_state,
            average=_average(state, (params, moments), config.optimizer.ema_decay),
        )
        # A loss or gradient that is not finite changes nothing but the count; the loop gives up after several in a row.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = dataclasses.replace(state, skipped=state.skipped + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), moved, kept)
        new = dataclasses.replace(new, step=state.step + 1)
        metrics = {"loss": loss, "gradient_norm": norm, "skipped": new.skipped}
        for name, values in parts.items():
            metrics |= {f"{name}/{protocol}": values[p] for p, protocol in enumerate(config.protocols)}
        return new, metrics

    whole = replicated(mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=(whole, batch_sharding(mesh)), out_shardings=whole)


def network_loss(network: Network, batch: Batch, config: Config, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a batch and its parts per protocol, in float32."""
    image, labels, present = batch["image"], batch["labels"], batch["present"]
    voxels = image[0].size
    if config.loss.dice > 0:
        sums = network.loss_sums(image, labels, train)
        return losses.combine(sums, present, voxels, network.classes, config.loss)
    of_sample, of_protocol = losses.entropy_weights(present, voxels)  # known beforehand, which saves a pass
    weights = config.loss.cross_entropy * of_protocol[None] * of_sample
    loss, sums = network.weighted_entropy(image, labels, weights, train)
    return loss, {"cross_entropy": (of_sample * sums).sum(axis=0)}


def evaluation_network(graphdef: nnx.GraphDef[Network], state: TrainState) -> Network:
    """The network with the averaged weights, or the current ones where none are kept."""
    params, moments = (state.params, state.moments) if state.average is None else state.average
    return nnx.merge(graphdef, params, moments, copy=True)


def _split(network: Network) -> tuple[nnx.GraphDef[Network], Any, Any]:
    graphdef, params, moments = nnx.split(network, nnx.Param, nnx.BatchStat, graph=False)
    return graphdef, params, moments


def _average(state: TrainState, values: Any, decay: float) -> Any:
    """Exponential moving average whose memory grows with the run, so that the random start is soon forgotten."""
    if state.average is None:
        return None
    n = state.step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda old, new: decay_now * old + (1.0 - decay_now) * new, state.average, values)
