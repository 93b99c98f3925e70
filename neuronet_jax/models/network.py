"""The network: one shared encoder, one decoder per protocol, in two families behind `ModelConfig.family`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from neuronet_jax.config import ModelConfig
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models import head, neuronet, reference
from neuronet_jax.models.head_tallies import Tally
from neuronet_jax.models.readout import Readout, scores, spans

FAMILIES: dict[str, Any] = {"reference": reference, "neuronet": neuronet}


class Network(nnx.Module):
    """Reads whitened crops or volumes [b x y z 1] whose sides are multiples of `stride`."""

    def __init__(self, config: ModelConfig, protocols: tuple[str, ...], rng: np.random.Generator):
        family = FAMILIES[config.family]
        self.protocols = protocols
        self.classes = tuple(PROTOCOLS[name].num_classes for name in protocols)
        self.stride = config.stride
        if config.compute_dtype == "auto":
            raise ValueError('a network needs a dtype, got "auto": decide it by config.on(platform)')
        self.compute_dtype = jnp.dtype(config.compute_dtype)
        self.encoder = family.Encoder(config.filters, rng)
        self.decoders = family.Decoders(config.filters, dict(zip(protocols, self.classes, strict=True)), rng)

    def features(self, image: Float[Array, "b x y z 1"], train: bool = False) -> tuple[list[Array], Readout]:
        """Computes the features per scale, finest first, and the readout of all protocols.

        In training the moving moments move.
        """
        if any(side % self.stride for side in image.shape[1:4]):
            raise NeuronetError(
                f"sides must be multiples of {self.stride}, got {image.shape[1:4]}: pad or crop the image"
            )
        features = self.encoder(image.astype(self.compute_dtype), train)
        return features, self.decoders(features, train)

    def scan(
        self, tally: Tally, image: Float[Array, "b x y z 1"], labels: Integer[Array, "b p x y z"], train: bool
    ) -> Any:
        """Sums a tally over the voxels of each sample; never all scores at full resolution (see `head.py`)."""
        return head.scan(tally, *self.features(image, train), labels, self.classes)

    def scan_weighted(
        self,
        tally: Tally,
        weights: Any,
        image: Float[Array, "b x y z 1"],
        labels: Integer[Array, "b p x y z"],
        train: bool,
    ) -> tuple[Float[Array, ""], Any]:
        """Returns Σ weights · sums and, without gradient, the sums: in one pass over the voxels (see `head.py`)."""
        return head.scan_weighted(tally, weights, *self.features(image, train), labels, self.classes)

    def labels(self, image: Float[Array, "b x y z 1"]) -> Integer[Array, "b p x y z"]:
        """Returns every voxel's most likely class per protocol, uint8; never all scores at full resolution."""
        return head.labels(*self.features(image), self.classes)

    def logits(self, image: Float[Array, "b x y z 1"], train: bool = False) -> dict[str, Float[Array, "b x y z k"]]:
        """Computes the class scores of each protocol, in float32, all at full resolution: for small inputs."""
        every = scores(*self.features(image, train)).astype(jnp.float32)
        return {name: every[..., a:b] for name, (a, b) in zip(self.protocols, spans(self.classes), strict=True)}


def build(config: ModelConfig, protocols: tuple[str, ...], seed: int) -> Network:
    """Initialises a network; the seed fixes every weight. A dtype "auto" must have been decided (`ModelConfig.on`)."""
    return Network(config, protocols, np.random.default_rng(seed))
