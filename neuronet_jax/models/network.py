"""The network: one shared encoder, one decoder per protocol, in two families behind `ModelConfig.family`."""

import math
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
from neuronet_jax.models.head_tallies import Tally
from neuronet_jax.models.layers import Undrawn
from neuronet_jax.models.readout import Readout, scores, spans

SLAB = 16  # planes of a whole head whose full resolution exists at a time: four more are computed for the halo
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
        self.encoder = family.Encoder(config.filters, config.norm, rng)
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

    # Whole heads: what `features` computes, in parts that never hold a whole head at full resolution.

    def coarse(self, image: Float[Array, "1 x y z 1"]) -> list[Array]:
        """Returns the features of all scales but the finest, for `readable`. Sides are multiples of `stride`.

        The full resolution on the way there, five times as large as the rest, exists for a few planes at a time.
        """
        image, side = image.astype(self.compute_dtype), image.shape[1]
        planes = math.gcd(side, SLAB)
        padded = jnp.pad(image, ((0, 0), (2, 2), (0, 0), (0, 0), (0, 0)))

        def slab(first: Array) -> tuple[Array, Array]:
            """Computes two planes more on either side: the halo of the convolutions of 3³ and 4³."""
            window = jax.lax.dynamic_slice_in_dim(padded, first, planes + 4, axis=1)
            plane = first - 2 + jnp.arange(planes + 4)
            inside = ((plane >= 0) & (plane < side)).reshape(1, -1, 1, 1, 1)
            entered, identity = self.encoder.enter(window, inside)
            return entered[0, 1:-1], identity[0, 1:-1]

        entered, identity = jax.lax.map(slab, jnp.arange(0, side, planes))  # slab x y z c
        volumes = [part.reshape(1, side // 2, *part.shape[2:]) for part in (entered, identity)]
        return self.encoder.coarse(*volumes, False)

    def readable(self, coarse: list[Array]) -> list[Array]:
        """Returns the features that the readout's coarser matrices mix, from those of `coarse` or windows of them."""
        return self.encoder.readable(coarse, False)

    def finest(
        self, image: Float[Array, "1 x y z 1"], coarse: Float[Array, "1 x/2 y/2 z/2 c"], inside: Array
    ) -> Float[Array, "1 u v w c"]:
        """Returns the finest features of a window, less two voxels on each side.

        `coarse` is the same window of the finest of the features that `coarse` returned. `inside` [1 x y z 1] is 1 on
        voxels of the volume; beyond it, image and `coarse` are zero.
        """
        features = self.encoder.finest(image.astype(self.compute_dtype), coarse, inside)
        return features[:, 2:-2, 2:-2, 2:-2]

    def range(
        self, image: Float[Array, "1 x y z 1"], coarse: Float[Array, "1 x/2 y/2 z/2 c"]
    ) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """Returns bounds of the finest features of a window, at less cost than the features."""
        least, most = self.encoder.range(image.astype(self.compute_dtype), coarse)
        return least.astype(jnp.float32), most.astype(jnp.float32)

    def readout(self) -> Readout:
        """Returns the readout of all protocols, outside training."""
        return self.decoders([], False)

    # Crops: losses, labels and scores.

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


def abstract(config: ModelConfig, protocols: tuple[str, ...]) -> Network:
    """Returns the network with shapes in place of arrays. It takes no memory, whatever sizes a config claims."""
    return nnx.eval_shape(lambda: Network(config, protocols, Undrawn()))
