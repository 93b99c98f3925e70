"""Tiles for volumes too large for the device. Their labels equal those of the whole volume."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import jax

from neuronet_jax.config import ModelConfig
from neuronet_jax.errors import CodedWarning
from neuronet_jax.runtime import TURNS

# XLA's messages: at once; if a program was dispatched before its inputs; and if the CPU's kernel library had no memory
# for its own temporaries, which it reports as an unspecified error.
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "YNNPACK operation failed")
Output = TypeVar("Output")
Shape = tuple[int, ...]


class Tile(NamedTuple):
    """A box of voxels, and the part of it without the halo that is kept; both in voxels of the whole volume."""

    inside: tuple[slice, ...]
    kept: tuple[slice, ...]

    @property
    def starts(self) -> Shape:
        return tuple(side.start for side in self.inside)

    def within(self, box: tuple[slice, ...]) -> "Tile":
        """Returns the tile with its kept part limited to a box."""
        pairs = zip(self.kept, box, strict=True)
        return Tile(self.inside, tuple(slice(max(k.start, b.start), min(k.stop, b.stop)) for k, b in pairs))


def tiles(shape: Shape, tile: Shape, margin: int) -> Iterator[Tile]:
    """Yields tiles of one shape that cover the volume."""
    for boxes in itertools.product(*(windows(n, t, margin) for n, t in zip(shape, tile, strict=True))):
        starts, kept = zip(*boxes, strict=True)
        yield Tile(tuple(slice(a, a + t) for a, t in zip(starts, tile, strict=True)), kept)


def windows(side: int, tile: int, margin: int) -> Iterator[tuple[int, slice]]:
    """Yields the start of each tile along an axis, and the part of the axis that it labels: each voxel once.

    A tile's labels differ from the whole volume's only within `margin` of its faces that cut through the volume.
    """
    if tile >= side:
        yield 0, slice(0, side)
        return
    done = 0
    for start in [*range(0, side - tile, tile - 2 * margin), side - tile]:
        end = start + tile - margin if start < side - tile else side
        yield start, slice(done, end)
        done = end


def tile_shape(bucket: Shape, budget: int, step: int, margin: int) -> Shape:
    """Returns the bucket, its longest sides halved until it fits the budget of voxels or only halos would be left."""
    least = rounded_up(2 * margin + step, step)
    tile = list(bucket)
    while math.prod(tile) > budget and max(tile) > least:
        axis = tile.index(max(tile))
        tile[axis] = max(least, -(-tile[axis] // 2 // step) * step)
    return tuple(tile)


def with_smaller_tiles(run: Callable[[Shape], Output], bucket: Shape, budget: int, step: int, margin: int) -> Output:
    """Returns `run(tile)` with tiles that should fit the device, halved whenever its memory runs out."""
    tile = tile_shape(bucket, budget, step, margin)
    while True:
        try:
            with TURNS.take():
                return run(tile)
        except jax.errors.JaxRuntimeError as error:
            smaller = tile_shape(tile, math.prod(tile) // 2, step, margin)
            if not any(sign in str(error) for sign in _OUT_OF_MEMORY) or smaller == tile:
                raise
            before, after = (" × ".join(map(str, sides)) for sides in (tile, smaller))
            reason = f"the device ran out of memory with tiles of {before}; continuing with {after}"
            warnings.warn(CodedWarning("W_MEMORY", reason), stacklevel=2)
            tile = smaller


def rounded_up(count: int, step: int) -> int:
    """Rounds up to the next multiple of the step."""
    return -(-count // step) * step


def receptive_margin(model: ModelConfig) -> int:
    """Returns the distance in voxels beyond which the image cannot change a label, for both families.

    It is a multiple of the coarsest stride. Each scale s down adds 4·2ˢ (a strided kernel of 4 and three of 3). The
    upward path adds at most 3·2ˢ⁻¹ (one kernel of 3, one linear interpolation), the first convolution 1, and
    interpolation between a voxel and the next 1.
    """
    scales = range(1, len(model.filters))
    reach = 2 + sum(4 * 2**s for s in scales) + sum(3 * 2 ** (s - 1) for s in scales)
    return rounded_up(reach, model.stride)
