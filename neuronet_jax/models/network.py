"""The network: one shared encoder, one decoder per protocol, in two families behind `ModelConfig.family`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Integer

from neuronet_jax.config import ModelConfig
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models import head, neuronet, reference
from neuronet_jax.models.readout import Readout, scores, spans

FAMILIES: dict[str, Any] = {"reference": reference, "neuronet": neuronet}


class Network(nnx.Module):
    """Reads whitened crops or volumes [b x y z 1] whose sides are multiples of `stride`."""

    def __init__(self, config: ModelConfig, protocols: tuple[str, ...], rng: np.random.Generator):
        family = FAMILIES[config.family]
        self.protocols = protocols
        self.classes = tuple(PROTOCOLS[name].num_classes for name in protocols)
        self.stride = config.stride
        self.compute_dtype = compute_dtype(config)
        self.encoder = family.Encoder(config.filters, rng)
        self.decoders = family.Decoders(config.filters, dict(zip(protocols, self.classes, strict=True)), rng)

    def features(self, image: Float[Array, "b x y z 1"], train: bool = False) -> tuple[list[Array], Readout]:
        """Features per scale, finest first, and the readout of all protocols. In training the moving moments move."""
        if any(side % self.stride for side in image.shape[1:4]):
            raise NeuronetError(
                f"sides must be multiples of {self.stride}, got {image.shape[1:4]}: pad or crop the image"
            )
        features = self.encoder(image.astype(self.compute_dtype), train)
        return features, self.decoders(features, train)

    def loss_sums(
        self, image: Float[Array, "b x y z 1"], labels: Integer[Array, "b p x y z"], train: bool
    ) -> head.Sums:
        """The sums over space that `losses.py` combines; never all scores at full resolution."""
        return head.loss_sums(*self.features(image, train), labels, self.classes)

    def weighted_entropy(
        self,
        image: Float[Array, "b x y z 1"],
        labels: Integer[Array, "b p x y z"],
        weights: Float[Array, "b p"],
        train: bool,
    ) -> tuple[Float[Array, ""], Float[Array, "b p"]]:
        """The weighted sum of cross-entropies, and each of them without gradient (see `head.py`)."""
        return head.weighted_entropy(*self.features(image, train), labels, self.classes, weights)

    def labels(self, image: Float[Array, "b x y z 1"]) -> Integer[Array, "b p x y z"]:
        """The most likely class of every voxel for each protocol, uint8; never all scores at full resolution."""
        return head.labels(*self.features(image), self.classes)

    def logits(self, image: Float[Array, "b x y z 1"], train: bool = False) -> dict[str, Float[Array, "b x y z k"]]:
        """Class scores of each protocol, in float32. All at full resolution: for small inputs."""
        every = scores(*self.features(image, train)).astype(jnp.float32)
        return {name: every[..., a:b] for name, (a, b) in zip(self.protocols, spans(self.classes), strict=True)}


def build(config: ModelConfig, protocols: tuple[str, ...], seed: int) -> Network:
    """A freshly initialised network; the seed fixes every weight."""
    return Network(config, protocols, np.random.default_rng(seed))


def compute_dtype(config: ModelConfig) -> Any:
    """The dtype of activations; "auto" is bfloat16 where the hardware multiplies it natively (GPU, TPU), float32 on
    CPU.
    """
    if config.compute_dtype != "auto":
        return jnp.dtype(config.compute_dtype)
    return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
