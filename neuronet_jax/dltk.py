"""Weights of the published TensorFlow implementation, by its variable names.

`variable_paths` maps each parameter and moment of our `reference` network to the name of the same variable there.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from neuronet_jax.errors import NeuronetError
from neuronet_jax.models import Network


def variable_paths(network: Network) -> dict[tuple[str | int, ...], str]:
    """Path in our network → variable name there, for all parameters and moments of a `reference` network."""
    paths: dict[tuple[str | int, ...], str] = {("encoder", "stem", "kernel"): "conv3d/kernel"}
    for index in range(len(network.encoder.units)):
        scale, unit = divmod(index, 2)
        theirs = f"encoder/unit_{scale + 1}_{unit}"
        for sub in (0, 1):
            ours = ("encoder", "units", index)
            paths[*ours, f"conv{sub}", "kernel"] = f"{theirs}/sub_unit{sub}/conv3d/kernel"
            paths |= _norm((*ours, f"norm{sub}"), f"{theirs}/sub_unit{sub}/batch_normalization")
    for tail, protocol in enumerate(network.protocols):
        ours, theirs = ("decoders", "protocols", protocol), f"tail_{tail}"
        coarsest = len(network.decoders.protocols[protocol].projections) - 1
        for scale in range(coarsest):
            paths[*ours, "projections", scale] = f"{theirs}/upscore_{scale}/conv3d/kernel"
            paths |= _norm((*ours, "norms", scale), f"{theirs}/upscore_{scale}/batch_normalization")
        paths[*ours, "projections", coarsest] = f"{theirs}/upscore_{coarsest - 1}/filter_conversion/kernel"
        paths[*ours, "last"] = f"{theirs}/last/conv3d/kernel"
    return paths


def load_variables(network: Network, variables: Mapping[str, np.ndarray]) -> None:
    """Sets every parameter and moment of a `reference` network from the published variables.

    Raises NeuronetError where a variable is missing, left over, or of another shape.
    """
    paths = variable_paths(network)
    if left_over := sorted(set(variables) - set(paths.values())):
        raise NeuronetError(f"the network has no place for {len(left_over)} variables, {left_over[0]!r} among them")
    state = nnx.state(network, graph=False)
    flat = dict(nnx.to_flat_state(state))
    if unmapped := set(flat) - set(paths):
        raise NeuronetError(
            f"no published variable is known for {sorted(map(str, unmapped))[0]}: is the family `reference`?"
        )
    for path, name in paths.items():
        if name not in variables:
            raise NeuronetError(f"the published variables lack {name!r}: they are not those of {network.protocols}")
        ours, theirs = flat[path], np.asarray(variables[name], np.float32)
        if theirs.shape[:3] == (1, 1, 1) and theirs.ndim == 5:
            theirs = theirs[0, 0, 0]  # 1³ convolutions are matrices here
        if ours.shape != theirs.shape:
            raise NeuronetError(f"{name} has shape {theirs.shape}, the network takes {ours.shape}")
        flat[path] = ours.replace(jnp.asarray(theirs))
    nnx.update(network, nnx.from_flat_state(list(flat.items())))


def _norm(ours: tuple[str | int, ...], theirs: str) -> dict[tuple[str | int, ...], str]:
    names = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
    return {(*ours, here): f"{theirs}/{there}" for here, there in names.items()}
