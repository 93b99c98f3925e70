"""The published network in PyTorch, as its users would write it, as a baseline of the benchmark.

Its arithmetic is that of the reference implementation (tested against its golden numbers), with fused Adam, and with
upsampling by interpolation instead of a transposed convolution per channel (the same sums, in a tenth of the time on
CPU). Tensors are [b c x y z]; kernels [f c i j k]; labels [b p x y z] as everywhere else.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

EPSILON = 1e-3  # of every normalisation (published)
MOMENTUM = 0.01  # PyTorch's weight of the new value; published as .99 for the old one


def conv3d(channels: int, filters: int, size: int, stride: int = 1) -> nn.Conv3d:
    """Convolves as SAME for even sides: 3³ at stride 1 and 4³ at stride 2 both take one zero on each side."""
    return nn.Conv3d(channels, filters, size, stride, padding=0 if size == 1 else 1, bias=False)


def batch_norm(channels: int) -> nn.BatchNorm3d:
    return nn.BatchNorm3d(channels, eps=EPSILON, momentum=MOMENTUM)


class ResidualUnit(nn.Module):
    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.stride = stride
        self.grow = ((filters - channels) // 2, (filters - channels) - (filters - channels) // 2)
        self.norm0, self.conv0 = (
            batch_norm(channels),
            conv3d(channels, filters, 3 if stride == 1 else 2 * stride, stride),
        )
        self.norm1, self.conv1 = batch_norm(filters), conv3d(filters, filters, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv0(F.relu6(self.norm0(x)))
        y = self.conv1(F.relu6(self.norm1(y)))
        if self.stride > 1:
            x = F.max_pool3d(x, self.stride)
        if any(self.grow):
            x = F.pad(x, (0, 0, 0, 0, 0, 0, *self.grow))
        return x + y


def upsample(x: Tensor) -> Tensor:
    """Upsamples ×2, trilinear, zeros beyond the border: out[2i] = .75 x[i] + .25 x[i−1], out[2i+1] = .75 x[i] + .25
    x[i+1].
    """
    wide = F.interpolate(F.pad(x, (1, 1, 1, 1, 1, 1)), scale_factor=2, mode="trilinear", align_corners=False)
    return wide[:, :, 2:-2, 2:-2, 2:-2]


class Decoder(nn.Module):
    def __init__(self, filters: tuple[int, ...], classes: int):
        super().__init__()
        self.coarsest = conv3d(filters[-1], classes, 1)
        self.projections = nn.ModuleList(conv3d(c, classes, 1) for c in filters[:-1])
        self.norms = nn.ModuleList(batch_norm(classes) for _ in filters[:-1])
        self.last = conv3d(classes, classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        z = self.coarsest(features[-1])
        for scale in reversed(range(len(self.projections))):
            z = upsample(z) + self.norms[scale](self.projections[scale](features[scale]))
        return self.last(z)


class NeuroNet(nn.Module):
    """The encoder and one decoder per protocol. `classes` include the background, in the order of the published
    outputs.
    """

    def __init__(self, classes: tuple[int, ...], filters: tuple[int, ...] = (16, 32, 64, 128)):
        super().__init__()
        self.stem = conv3d(1, filters[0], 3)
        self.units = nn.ModuleList(
            unit
            for channels, wider in pairwise(filters)
            for unit in (ResidualUnit(channels, wider, 2), ResidualUnit(wider, wider, 1))
        )
        self.decoders = nn.ModuleList(Decoder(filters, k) for k in classes)

    def features(self, image: Tensor) -> list[Tensor]:
        features = [self.stem(image)]
        for down, same in zip(self.units[0::2], self.units[1::2], strict=True):
            features.append(same(down(features[-1])))
        return features

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps an image [b 1 x y z] to logits of each protocol [b k x y z]."""
        features = self.features(image)
        return [decoder(features) for decoder in self.decoders]

    def protocols(self) -> list[nn.Module]:
        """Returns one decoder per protocol, from the features to its logits."""
        return list(self.decoders)

    def labels(self, image: Tensor) -> Tensor:
        """Maps an image [b 1 x y z] to uint8 [b p x y z]. Only the logits of one protocol exist at a time."""
        features = self.features(image)
        return torch.stack([decoder(features).argmax(1).to(torch.uint8) for decoder in self.decoders], 1)


def loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Returns the mean voxel cross-entropy of each protocol, averaged over protocols; labels are int64 [b p x y z]."""
    return torch.stack([F.cross_entropy(z.float(), labels[:, p]) for p, z in enumerate(logits)]).mean()


def optimizer(network: NeuroNet) -> torch.optim.Optimizer:
    """Returns Adam as published, in its fused form."""
    return torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5, fused=True)


def named_variables(network: NeuroNet) -> Iterator[tuple[str, Tensor]]:
    """Yields the published name of every parameter and moment, and the tensor here."""
    yield "conv3d/kernel", network.stem.weight
    for index, unit in enumerate(network.units):
        scale, position = divmod(index, 2)
        yield from _named_unit(f"encoder/unit_{scale + 1}_{position}", unit)
    for tail, decoder in enumerate(network.decoders):
        yield from _named_decoder(f"tail_{tail}", decoder)


def _named_unit(prefix: str, unit: Any) -> Iterator[tuple[str, Tensor]]:
    for sub, (norm, conv) in enumerate(((unit.norm0, unit.conv0), (unit.norm1, unit.conv1))):
        yield from _named_norm(f"{prefix}/sub_unit{sub}/batch_normalization", norm)
        yield f"{prefix}/sub_unit{sub}/conv3d/kernel", conv.weight


def _named_decoder(prefix: str, decoder: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}/upscore_{len(decoder.projections) - 1}/filter_conversion/kernel", decoder.coarsest.weight
    for scale, (projection, norm) in enumerate(zip(decoder.projections, decoder.norms, strict=True)):
        yield f"{prefix}/upscore_{scale}/conv3d/kernel", projection.weight
        yield from _named_norm(f"{prefix}/upscore_{scale}/batch_normalization", norm)
    yield f"{prefix}/last/conv3d/kernel", decoder.last.weight


def _named_norm(prefix: str, norm: Any) -> Iterator[tuple[str, Tensor]]:
    yield f"{prefix}/gamma", norm.weight
    yield f"{prefix}/beta", norm.bias
    yield f"{prefix}/moving_mean", norm.running_mean
    yield f"{prefix}/moving_variance", norm.running_var


def load_variables(network: NeuroNet, variables: Mapping[str, np.ndarray]) -> None:
    """Sets every parameter and moment; kernels come as [i j k c f]. Raises KeyError for a missing variable."""
    with torch.no_grad():
        for name, tensor in named_variables(network):
            value = torch.from_numpy(np.asarray(variables[name], np.float32))
            tensor.copy_(value.permute(4, 3, 0, 1, 2) if value.ndim == 5 else value)


def variables(network: NeuroNet) -> dict[str, np.ndarray]:
    """Returns the variables in the form that `load_variables` takes."""
    with torch.no_grad():
        return {
            name: (t.permute(2, 3, 4, 1, 0) if t.ndim == 5 else t).cpu().numpy().copy()
            for name, t in named_variables(network)
        }
