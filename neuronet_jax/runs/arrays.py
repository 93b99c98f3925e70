"""The state as arrays by path (`params/encoder/…`), as checkpoints hold it."""

from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from neuronet_jax.errors import NeuronetError


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of `tree` by their path, in the tree's order. Raises NeuronetError if one is no array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise NeuronetError("two leaves of the state have the same path: keys must not contain '/'")
    for path, leaf in flat.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise NeuronetError(f"the state's leaves must be arrays, but {path} is {leaf!r:.80}")
    return flat


def describe(arrays: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns the dtype (of a random key with its implementation: `key<fry>`) and shape of each array, as JSON."""
    return {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in arrays.items()}


def differences(saved: dict[str, list], wanted: dict[str, list], part: bool) -> list[str]:
    """Lists every array that is missing, of a different shape or dtype, or, unless `part` is enough, not wanted."""
    missing = [f"{path}: not in the checkpoint" for path in wanted if path not in saved]
    extra = [f"{path}: only in the checkpoint" for path in saved if path not in wanted and not part]
    changed = [
        f"{path}: {saved[path][0]}{saved[path][1]} in the checkpoint, {dtype}{shape} here"
        for path, (dtype, shape) in wanted.items()
        if path in saved and saved[path] != [dtype, shape]
    ]
    return missing + extra + changed


def is_key(leaf: Any) -> bool:
    """Tells whether `leaf` is a random key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf: Any) -> Any:
    """Returns the array to write: of a random key, its words."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def read(folder: epath.Path, wanted: dict[str, Any], key_impls: dict[str, str], part: bool) -> dict[str, jax.Array]:
    """Reads arrays from Orbax's `folder` to the devices of `wanted`; one device where it names none.

    Processes do not wait for each other, as they would in Orbax's `Checkpointer`: one that cannot read can say so.
    """
    shapes = {path: _raw_shape(leaf) for path, leaf in wanted.items()}
    arguments = ocp.args.PyTreeRestore(
        shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes), partial_restore=part
    )
    handler = ocp.PyTreeCheckpointHandler()
    try:
        arrays = handler.restore(folder, args=arguments)
    finally:
        handler.close()
    for path in key_impls.keys() & wanted.keys():
        arrays[path] = jax.random.wrap_key_data(arrays[path], impl=key_impls[path])
    return arrays


def _raw_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns shape, dtype and sharding of `leaf` as requested from Orbax; for a random key, those of its words."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    words = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(words.shape, words.dtype, sharding=sharding)
