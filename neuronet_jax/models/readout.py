"""The readout: the linear map from the features of all scales to the scores of every class of every protocol.

One matrix and bias per scale, for all classes of all protocols side by side (`k` of them, 169 for five protocols):

    scores = up(… up(f₃A₃ + b₃) + f₂A₂ + b₂ …) + f₀A₀ + b₀
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from neuronet_jax.models import conv


class Readout(NamedTuple):
    """The linear map from features to scores of all classes: per scale, finest first, a matrix [c k] and a bias [k]."""

    matrices: list[Array]
    biases: list[Array]

    @classmethod
    def join(cls, decoders: list[list[tuple[Array, Array]]]) -> "Readout":
        """Sets the matrices and biases of several protocols side by side."""
        scales = list(zip(*decoders, strict=True))
        return cls(
            [jnp.concatenate([matrix for matrix, _ in scale], axis=1) for scale in scales],
            [jnp.concatenate([bias for _, bias in scale]) for scale in scales],
        )

    def at(self, scale: int, features: Float[Array, "*n c"]) -> Float[Array, "*n k"]:
        """Returns the contribution of one scale's features to the scores."""
        bias = self.biases[scale].astype(features.dtype).reshape((1,) * (features.ndim - 1) + (-1,))
        return features @ self.matrices[scale].astype(features.dtype) + bias


def scores(features: list[Array], readout: Readout) -> Float[Array, "b x y z k"]:
    """Returns all scores at full resolution, computed directly: for small inputs and as the reference of the fused
    form.
    """
    return conv.upsample(half_scores(features[1:], readout)) + readout.at(0, features[0])


def half_scores(coarse: list[Array], readout: Readout) -> Float[Array, "b x/2 y/2 z/2 k"]:
    """Returns the contribution of all features but the finest, which are not in `coarse`."""
    total = readout.at(len(coarse), coarse[-1])
    for scale in reversed(range(1, len(coarse))):
        total = conv.upsample(total) + readout.at(scale, coarse[scale - 1])
    return total


def spans(classes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Returns the begin and end of each protocol's classes among all `k`."""
    ends = [0, *itertools.accumulate(classes)]
    return list(itertools.pairwise(ends))


def membership(classes: tuple[int, ...]) -> Float[np.ndarray, "k p"]:
    """Returns the class-to-protocol matrix: 1 if the class belongs to the protocol."""
    return np.repeat(np.eye(len(classes), dtype=np.float32), classes, axis=0)
