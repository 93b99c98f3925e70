"""The gradient of a batch that is computed in parts, for batches that do not fit into memory.

Every term of the loss is a function of sums over the voxels of each crop. The gradient of the whole batch follows from
that of the sums of each part, weighted by the loss's gradient by the sums of the whole batch. So the result is that of
the whole batch to rounding, for losses such as Dice too, which takes the batch as one volume. Weights that depend
on the sums cost one more forward pass.

Batch norm takes its moments from a part, and its moving moments move once for each part: it sees smaller batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neuronet_jax.config import Config
from neuronet_jax.models.head import zero_sums
from neuronet_jax.models.head_tallies import Together
from neuronet_jax.models.network import Network
from neuronet_jax.training import losses
from neuronet_jax.training.mesh import DATA, batch_sharding


def parts_of(batch: dict[str, jax.Array], parts: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Splits arrays [b …] into [parts b/parts …]. A device keeps its crops, and has as many of them in each part."""
    data = mesh.shape[DATA]

    def split(array: jax.Array, spec: PartitionSpec) -> jax.Array:
        each = array.shape[0] // (data * parts)
        apart = array.reshape(data, parts, each, *array.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(
            apart.reshape(parts, data * each, *array.shape[1:]), NamedSharding(mesh, PartitionSpec(None, *spec))
        )

    return {name: split(batch[name], sharding.spec) for name, sharding in batch_sharding(mesh).items()}


def gradient(
    graphdef: nnx.GraphDef[Network], params: Any, moments: Any, parts: dict[str, jax.Array], config: Config
) -> tuple[jax.Array, losses.Metrics, Any, Any]:
    """Returns the loss, its parts by name, the gradient by the parameters, and the moved moments.

    `parts` are the arrays of `parts_of`.
    """
    image, labels = parts["image"], parts["labels"]
    count, each = image.shape[:2]

    def network_of(params: Any, moments: Any) -> Network:
        return nnx.merge(graphdef, params, moments, copy=True)

    protocols, classes = config.protocols, network_of(params, moments).classes
    crops = losses.Crops(parts["present"].reshape(count * each, -1), image[0, 0].size, protocols)
    terms = losses.terms(config.loss, protocols)
    tally = Together(tuple(term.tally for term in terms))
    if all(term.is_linear for term in terms):  # any sums give the weights
        sums = zero_sums(tally, count * each, classes)
    else:
        forward = network_of(params, moments)
        sums = _joined(jax.lax.map(lambda part: _sums(forward, tally, *part), (image, labels)))
    weights = _apart(jax.grad(lambda sums: losses.total(terms, sums, crops)[0])(sums), count)

    def add_part(carry: Any, part: Any) -> tuple[Any, Any]:
        moments, total = carry
        weights, image, labels = part

        def weighted(params: Any) -> tuple[jax.Array, Any]:
            network = network_of(params, moments)
            value, sums = network.scan_weighted(tally, weights, image, labels, train=True)
            return value, (sums, nnx.state(network, nnx.BatchStat, graph=False))

        (_, (sums, moved)), of_part = jax.value_and_grad(weighted, has_aux=True)(params)
        return (moved, jax.tree.map(jnp.add, total, of_part)), sums

    zeros = jax.tree.map(jnp.zeros_like, params)
    (moments, total), sums = jax.lax.scan(add_part, (moments, zeros), (weights, image, labels))
    loss, shown = losses.total(terms, _joined(sums), crops)
    return loss, shown, total, moments


def _sums(network: Network, tally: Any, image: jax.Array, labels: jax.Array) -> Any:
    return nnx.merge(*nnx.split(network, graph=False), copy=True).scan(tally, image, labels, train=True)


def _joined(sums: Any) -> Any:
    """Joins sums [parts b/parts …] to [b …]."""
    return jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), sums)


def _apart(sums: Any, count: int) -> Any:
    """Undoes `_joined`."""
    return jax.tree.map(lambda s: s.reshape(count, -1, *s.shape[1:]), sums)
