"""Counts the operations of a training step from its program, so that budgets of compute depend on no machine.

A product of matrices and a convolution count two for each multiplication, every other primitive one for each number
that it returns, as XLA's own cost analysis does. Unlike there, the body of a loop counts as often as it runs.
"""

import math
from typing import Any

import jax

from neuronet_jax.config import Config
from neuronet_jax.training.mesh import make_mesh
from neuronet_jax.training.step import abstract_step


def operations(config: Config) -> float:
    """Returns the operations of one step, forward, backward and update, with its augmentation."""
    mesh = make_mesh(config, jax.devices()[: config.mesh.space])
    step, *described = abstract_step(config, mesh)
    return counted(jax.make_jaxpr(step)(*described).jaxpr)


def counted(jaxpr: Any) -> float:
    """Returns the operations of a jaxpr. A loop of unknown length counts once, a conditional as its dearest branch."""
    total = 0.0
    for equation in jaxpr.eqns:
        kind, parameters = equation.primitive.name, equation.params
        produced = sum(math.prod(out.aval.shape) for out in equation.outvars if hasattr(out.aval, "shape"))
        if kind == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            total += 2.0 * produced * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif kind == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * produced * math.prod(kernel) / outputs
        elif kind == "cond":
            total += max(counted(branch.jaxpr) for branch in parameters["branches"])
        elif inner := [jaxpr for value in parameters.values() for jaxpr in _jaxprs(value)]:
            total += parameters.get("length", 1) * sum(counted(jaxpr) for jaxpr in inner)
        else:
            total += produced
    return total


def _jaxprs(value: Any) -> list[Any]:
    """Returns the jaxprs in a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [jaxpr for item in value for jaxpr in _jaxprs(item)]
    if hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
        return [value.jaxpr]
    return [value] if hasattr(value, "eqns") else []
