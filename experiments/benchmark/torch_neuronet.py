"""The network of the `neuronet` family in PyTorch, for inference: the twin of `neuronet_jax.models.neuronet`.

Modules carry the names of the JAX network's, so that its weights are loaded by name. Tensors are [b c x y z].
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

from experiments.benchmark.torch_reference import ResidualUnit, batch_norm, conv3d, upsample

# JAX's and PyTorch's names of parameters and moments.
NAMES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "mean": "running_mean",
    "variance": "running_var",
}


class UpUnit(nn.Module):
    def __init__(self, coarse: int, fine: int):
        super().__init__()
        self.lateral, self.norm, self.conv = conv3d(coarse, fine, 1), batch_norm(fine), conv3d(fine, fine, 3)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        x = fine + upsample(self.lateral(coarse))
        return x + self.conv(F.relu6(self.norm(x)))


class Encoder(nn.Module):
    def __init__(self, filters: tuple[int, ...]):
        super().__init__()
        scales = list(pairwise(filters))
        self.stem = conv3d(1, filters[0], 3)
        self.down = nn.ModuleList(ResidualUnit(fine, coarse, 2) for fine, coarse in scales)
        self.same = nn.ModuleList(ResidualUnit(coarse, coarse, 1) for _, coarse in scales)
        self.up = nn.ModuleList(UpUnit(coarse, fine) for fine, coarse in scales)
        self.norms = nn.ModuleList(batch_norm(c) for c in filters)

    def forward(self, image: Tensor) -> list[Tensor]:
        features = [self.stem(image)]
        for down, same in zip(self.down, self.same, strict=True):
            features.append(same(down(features[-1])))
        for scale in reversed(range(len(self.up))):
            features[scale] = self.up[scale](features[scale + 1], features[scale])
        return [F.relu6(norm(f)) for norm, f in zip(self.norms, features, strict=True)]


class Decoder(nn.Module):
    def __init__(self, filters: tuple[int, ...], classes: int):
        super().__init__()
        self.kernels = nn.ModuleList(conv3d(c, classes, 1) for c in filters)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: list[Tensor]) -> Tensor:
        z = self.kernels[-1](features[-1])
        for kernel, f in zip(reversed(self.kernels[:-1]), reversed(features[:-1]), strict=True):
            z = upsample(z) + kernel(f)
        return z + self.bias.reshape(1, -1, 1, 1, 1)


class NeuroNet(nn.Module):
    """The encoder and one decoder per protocol."""

    def __init__(self, classes: Mapping[str, int], filters: tuple[int, ...]):
        super().__init__()
        self.encoder = Encoder(filters)
        self.decoders = nn.ModuleDict({name: Decoder(filters, k) for name, k in classes.items()})

    def features(self, image: Tensor) -> list[Tensor]:
        return self.encoder(image)

    def protocols(self) -> list[nn.Module]:
        return list(self.decoders.values())


def load_weights(network: NeuroNet, weights: Mapping[str, np.ndarray]) -> None:
    """Sets every parameter and moment from arrays named as in the JAX network.

    Raises KeyError for a name that this network lacks, and ValueError if one of its own is not given.
    """
    own = dict(network.state_dict(keep_vars=True))
    own = {name: tensor for name, tensor in own.items() if not name.endswith("num_batches_tracked")}
    with torch.no_grad():
        for name, value in weights.items():
            path, _, last = name.replace("decoders.protocols.", "decoders.").rpartition(".")
            plain = path.endswith("kernels")  # a matrix [c k], not a layer
            tensor = own.pop(f"{path}.{last}.weight" if plain else f"{path}.{NAMES.get(last, last)}")
            kernel = torch.tensor(value.reshape(1, 1, 1, *value.shape) if plain else value)
            tensor.copy_(kernel.permute(4, 3, 0, 1, 2) if kernel.ndim == 5 else kernel)
    if own:
        raise ValueError(f"no weights are given for {', '.join(own)}")
