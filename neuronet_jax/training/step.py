"""One training step: a pure function of state and batch, and the state it moves.

The loop that calls it is `experiments/train.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from neuronet_jax.config import Config, OptimizerConfig
from neuronet_jax.errors import NeuronetError
from neuronet_jax.models.head import zero_sums
from neuronet_jax.models.head_tallies import Together
from neuronet_jax.models.network import Network, abstract, build
from neuronet_jax.runs.model import Model
from neuronet_jax.training import accumulation, augment, generate, losses
from neuronet_jax.training.mesh import batch_sharding, platform_of, replicated

DeviceBatch = dict[str, jax.Array]  # the arrays of `put_batch`: image, labels, present, slot
Metrics = dict[str, jax.Array]


ADDED = ("skipped_total", "norm_average", "norms")  # fields of the state that version 0.1.0 did not save
# A norm is compared with the average of about so many before it. The first ones of a run fall steeply: no spike is
# called before there are as many.
SPIKE_MEMORY = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state that training carries from step to step, as pytrees of arrays."""

    step: jax.Array  # updates tried so far, int32
    skipped: jax.Array  # updates refused in a row, int32
    skipped_total: jax.Array  # updates refused so far, int32
    norm_average: jax.Array  # moving average of the gradient norm, float32
    norms: jax.Array  # gradient norms in that average, int32
    params: Any
    moments: Any  # moving moments of the normalisations
    optimizer: Any
    average: Any  # moving averages of (params, moments) that evaluation uses; None without


def peak_rate(config: OptimizerConfig, batch: int) -> float:
    """Returns the learning rate of a batch: with `base_batch`, in proportion to the square root of its size.

    A gradient averaged over n crops has 1/√n of the noise, and Adam divides by its size: the rule keeps the noise of
    the path that the weights take (Malladi et al., NeurIPS 2022, arXiv 2205.10287). SGD's rule is linear.
    """
    return config.learning_rate * (math.sqrt(batch / config.base_batch) if config.base_batch else 1.0)


def make_optimizer(config: OptimizerConfig, steps: int, batch: int) -> optax.GradientTransformation:
    """Returns Adam with the config's additions: warm-up, cosine decay, decoupled weight decay, clipping by the norm."""
    peak = peak_rate(config, batch)
    rate: Any = peak
    if config.schedule == "cosine":
        warmup = min(config.warmup_steps, steps // 2)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
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


def init_state(config: Config, mesh: Mesh, start: Model | None = None) -> tuple[nnx.GraphDef[Network], TrainState]:
    """Returns the network's structure and a fresh state on the mesh, whose platform decides the dtype "auto".

    The weights are drawn from the seed, or those of `start`. Raises NeuronetError if its network is a different one.
    """
    graphdef, params, moments = _split(build(config.model.on(platform_of(mesh)), config.protocols, config.seed))
    if start is not None:
        _check_same_network(start.config, config)
        _, params, moments = _split(start.network)

    # As host arrays, which every process has alike: jit then places them on the global mesh.
    weights = jax.tree.map(np.asarray, (params, moments))
    fresh = jax.jit(lambda *weights: fresh_state(config, *weights), out_shardings=replicated(mesh))
    return graphdef, fresh(*weights)


def fresh_state(config: Config, params: Any, moments: Any) -> TrainState:
    """Returns the state before the first step."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_total", "norms")}
    return TrainState(
        **counts,
        norm_average=jnp.zeros((), jnp.float32),
        params=params,
        moments=moments,
        optimizer=make_optimizer(config.optimizer, config.steps, config.batch).init(params),
        average=jax.tree.map(jnp.copy, (params, moments)) if config.optimizer.ema_decay else None,
    )


def make_train_step(
    config: Config, graphdef: nnx.GraphDef[Network], mesh: Mesh
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
    """Compiles the update. The state is donated: use the one that comes back."""
    optimizer = make_optimizer(config.optimizer, config.steps, config.batch)
    key = jax.random.key(config.seed)

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        drawn = jax.random.fold_in(key, state.step)
        if config.data.stores:
            batch = generate.generate(batch, jax.random.fold_in(drawn, 1), config.augment.any_contrast)
        batch = augment.augment(batch, drawn, config.augment, config.protocols)

        compute = _gradient
        if config.accumulate > 1:
            compute, batch = accumulation.gradient, accumulation.parts_of(batch, config.accumulate, mesh)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the head how many devices share a block
            loss, parts, gradient, moments = compute(graphdef, state.params, state.moments, batch, config)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient)
        moved = dataclasses.replace(
            state,
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            moments=moments,
            optimizer=optimizer_state,
            average=_average(state, (params, moments), config.optimizer.ema_decay),
        )
        # An update that is not finite, or a spike, changes nothing but counts; `skips.py` ends a run with too many.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        highest = _highest_norm(state, config.optimizer.spike_factor)
        kept = dataclasses.replace(state, skipped=state.skipped + 1, skipped_total=state.skipped_total + 1)
        new = jax.tree.map(lambda a, b: jnp.where(finite & (norm <= highest), a, b), moved, kept)
        new = dataclasses.replace(new, step=state.step + 1, **_averaged_norm(state, norm, highest, finite))
        counts = {name: getattr(new, name) for name in ("skipped", "skipped_total", "norm_average")}
        return new, {"loss": loss, "gradient_norm": norm, **counts, **parts}

    whole = replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(whole, batch_sharding(mesh, painted=bool(config.data.stores))),
        out_shardings=whole,
    )


def _gradient(
    graphdef: nnx.GraphDef[Network], params: Any, moments: Any, batch: DeviceBatch, config: Config
) -> tuple[jax.Array, Metrics, Any, Any]:
    """Returns what `accumulation.gradient` does, of a batch in one piece."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
        network = nnx.merge(graphdef, params, moments, copy=True)
        loss, parts = network_loss(network, batch, config, train=True)
        return loss, (_split(network)[2], parts)

    (loss, (moved, parts)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return loss, parts, gradient, moved


def abstract_step(
    config: Config, mesh: Mesh
) -> tuple[Callable[..., tuple[TrainState, Metrics]], TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the training step, and its arguments as shapes: to be compiled or counted, with nothing allocated."""
    graphdef, params, moments = _split(abstract(config.model.on(platform_of(mesh)), config.protocols))
    state = jax.eval_shape(lambda *weights: fresh_state(config, *weights), params, moments)
    crop, batch, protocols = config.data.crop, config.batch, len(config.protocols)
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, *crop, 1), jnp.float32),
        "labels": jax.ShapeDtypeStruct((batch, protocols, *crop), jnp.uint8),
        "present": jax.ShapeDtypeStruct((batch, protocols), jnp.bool),
        "slot": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    if config.data.stores:
        shapes["painted"] = jax.ShapeDtypeStruct((batch,), jnp.bool)
    return make_train_step(config, graphdef, mesh), state, shapes


def network_loss(network: Network, batch: DeviceBatch, config: Config, train: bool) -> tuple[jax.Array, Metrics]:
    """Computes the loss of a batch in float32, and its parts by name, such as `dice/malp_em`."""
    image, labels = batch["image"], batch["labels"]
    crops = losses.Crops(batch["present"], image[0].size, network.protocols)
    terms = losses.terms(config.loss, network.protocols)
    tally = Together(tuple(term.tally for term in terms))
    if not all(term.is_linear for term in terms):
        return losses.total(terms, network.scan(tally, image, labels, train), crops)
    # The weight of each sum is its gradient, known beforehand: that saves a pass over the voxels.
    zeros = zero_sums(tally, len(image), network.classes)
    weights = jax.grad(lambda sums: losses.total(terms, sums, crops)[0])(zeros)
    loss, sums = network.scan_weighted(tally, weights, image, labels, train)
    return loss, losses.total(terms, sums, crops)[1]


def evaluation_network(graphdef: nnx.GraphDef[Network], state: TrainState) -> Network:
    """Returns the network with the averaged weights, or with the current ones where none are kept."""
    params, moments = (state.params, state.moments) if state.average is None else state.average
    return nnx.merge(graphdef, params, moments, copy=True)


def _check_same_network(start: Config, config: Config) -> None:
    ours, theirs = ({"protocols": c.protocols, **dataclasses.asdict(c.model)} for c in (config, start))
    names = [name for name in ours if name != "compute_dtype" and ours[name] != theirs[name]]
    if names:
        different = "; ".join(f"{name} is {ours[name]!r} here, {theirs[name]!r} there" for name in names)
        raise NeuronetError(
            f"the weights to begin with are of a different network: {different}. Set the same in --config"
        )


def _split(network: Network) -> tuple[nnx.GraphDef[Network], Any, Any]:
    graphdef, params, moments = nnx.split(network, nnx.Param, nnx.BatchStat, graph=False)
    return graphdef, params, moments


def _highest_norm(state: TrainState, factor: float) -> jax.Array:
    """Returns the largest gradient norm that is no spike: `factor` times the average, once there is one."""
    if not factor:
        return jnp.full((), jnp.inf, jnp.float32)
    return jnp.where(state.norms >= SPIKE_MEMORY, factor * state.norm_average, jnp.inf)


def _averaged_norm(state: TrainState, norm: jax.Array, highest: jax.Array, finite: jax.Array) -> dict[str, jax.Array]:
    """Moves the average of the gradient norm: a mean at first, then exponential.

    A spike counts as the highest norm that is none. Each one thus raises the average, by 9 % with a factor of 10, and
    a lasting rise to twice the highest norm is accepted after eight steps.
    """
    weight = 1.0 / jnp.minimum(state.norms + 1, SPIKE_MEMORY).astype(jnp.float32)
    moved = state.norm_average + weight * (jnp.minimum(norm, highest) - state.norm_average)
    return {
        "norm_average": jnp.where(finite, moved, state.norm_average),
        "norms": jnp.where(finite, state.norms + 1, state.norms),
    }


def _average(state: TrainState, values: Any, decay: float) -> Any:
    """Moves the exponential average. Its memory grows with the run, so that the random start is soon forgotten."""
    if state.average is None:
        return None
    n = state.step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda old, new: decay_now * old + (1.0 - decay_now) * new, state.average, values)
