"""Segments an image file with PyTorch, on its own grid, as a careful user would write it.

The steps are those of `neuronet_jax.segment`: conform, whiten, the network in overlapping tiles, scores interpolated
onto the grid of the file, the most likely class, the tool's ids. The library's own NumPy code conforms and whitens.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor  # pyright: ignore[reportMissingImports]

from neuronet_jax.images import intensity, space
from neuronet_jax.labels import PROTOCOLS

MULTIPLE = 8  # voxels of the network's coarsest scale: sides of the volume and starts of tiles are multiples of it
MARGIN = 16  # voxels at least that tiles share on either side: the quarter of 128 of MONAI's sliding window


def segment(
    network: Any, path: Path, voxel_size_mm: float, side: int, to_device: Callable[[np.ndarray], Tensor]
) -> Any:
    """Returns a uint8 NIfTI image of tool ids per protocol.

    The network takes tiles of side³ voxels, or with side 0 the whole image, through `features` and `protocols`;
    `to_device` makes its input of an array [1 x y z 1].
    """
    file: Any = nib.load(path)
    scan = space.Volume(np.asarray(file.dataobj, np.float32), file.affine)
    conformed = space.conform(scan, voxel_size_mm, is_label=False)
    clipped, _ = intensity.clip_spikes(conformed.data)
    statistics = intensity.statistics(clipped)
    image = intensity.whiten(clipped, statistics.mean, statistics.std)
    whole = [max(side, -(-n // MULTIPLE) * MULTIPLE) for n in image.shape]
    tile = [side or n for n in whole]
    padding = [(0, w - n) for w, n in zip(whole, image.shape, strict=True)]
    image_padded = np.pad(image, padding, constant_values=-statistics.mean / statistics.std)
    walk = space.walked(conformed.affine, scan.grid)
    assert walk is not None
    order, positions = walk
    if all(np.abs(p - np.rint(p)).max() < 1e-3 for p in positions):
        positions = [np.rint(p) for p in positions]  # nothing to interpolate
    positions = [np.round(p, 6) for p in positions]  # inverted affines are not exact
    classes = np.zeros((len(PROTOCOLS), *map(len, positions)), np.uint8)
    for starts, kept in _tiles(whole, tile):
        box = tuple(slice(a, a + n) for a, n in zip(starts, tile, strict=True))
        # the outermost voxel continues up to one voxel beyond the image
        clamped = [np.clip(p, 0, n - 1) for p, n in zip(positions, image.shape, strict=True)]
        wanted = [
            np.flatnonzero((p > -1) & (p < n) & (c >= k.start) & (c < k.stop))
            for p, n, c, k in zip(positions, image.shape, clamped, kept, strict=True)
        ]
        if not all(map(len, wanted)):
            continue
        inside = [c[i] - a for c, i, a in zip(clamped, wanted, starts, strict=True)]
        found = _labels(network, to_device(image_padded[box][None, ..., None]), inside)
        classes[(slice(None), *(slice(i[0], i[-1] + 1) for i in wanted))] = found
    maps = {}
    for (name, protocol), found in zip(PROTOCOLS.items(), classes, strict=True):
        ids = protocol.to_ids(np.ascontiguousarray(found.transpose(np.argsort(order))))
        maps[name] = nib.Nifti1Image(ids, file.affine)
    return maps


def _tiles(shape: Sequence[int], tile: Sequence[int]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Returns the starts of the tiles, and the voxels of the volume that each of them labels."""
    axes = []
    for n, side in zip(shape, tile, strict=True):
        count = max(1, -(-(n - 2 * MARGIN) // (side - 2 * MARGIN)))
        starts = [round(start / MULTIPLE) * MULTIPLE for start in np.linspace(0, n - side, count)]
        ends = [(a + side + b) // 2 for a, b in itertools.pairwise(starts)]  # the middle of the overlap
        axes.append(list(zip(starts, map(slice, [0, *ends], [*ends, n]), strict=True)))
    for corner in itertools.product(*axes):
        yield tuple(start for start, _ in corner), tuple(kept for _, kept in corner)


def _labels(network: Any, image: Tensor, positions: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the most likely classes at positions [u], [v], [w] (in voxels of a tile), uint8 [p u v w].

    Only the scores of one protocol exist at a time.
    """
    on_voxels = all(np.array_equal(p, np.rint(p)) and np.all(np.abs(np.diff(p)) == 1) for p in positions)
    features = network.features(image)
    labels = []
    for decoder in network.protocols():
        scores = decoder(features)  # 1 k x y z
        if on_voxels:
            x, y, z = (slice(int(p.min()), int(p.max()) + 1) for p in positions)
            scores = scores[:, :, x, y, z]
        else:
            scores = F.grid_sample(scores.float(), _grid(positions, image), mode="bilinear", align_corners=True)
        labels.append(scores.argmax(1)[0].to(torch.uint8))
    found = torch.stack(labels).cpu().numpy()
    backwards = tuple(slice(None, None, -1 if on_voxels and p[0] > p[-1] else 1) for p in positions)
    return found[(slice(None), *backwards)]


def _grid(positions: Sequence[np.ndarray], image: Tensor) -> Tensor:
    """Returns coordinates for `grid_sample`: [1 u v w 3], from −1 to 1, the last axis of the image first."""
    scaled = [2 * p / (n - 1) - 1 for p, n in zip(positions, image.shape[2:], strict=True)]
    x, y, z = torch.meshgrid(*(torch.from_numpy(s.astype(np.float32)) for s in scaled), indexing="ij")
    return torch.stack([z, y, x], -1)[None].to(image.device)
