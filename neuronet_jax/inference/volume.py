"""From a whitened volume on the network's grid to labels, confidence and posteriors on the grid that is asked for.

Every member of the average (networks of an ensemble, the mirrored head, shifted crops) gives its features; the scores
that follow from them are read once on the network's grid, for the confidence and for where the structures lie, and,
where the wanted grid is another one, once more there.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from neuronet_jax.errors import NeuronetError
from neuronet_jax.inference.cost import voxel_budget
from neuronet_jax.inference.onto_grid import Fields, Reading, aligned, average, axes, fields, read
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.inference.tiling import Shape, Tile, receptive_margin, rounded_up, tiles, with_smaller_tiles
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.readout import Readout, spans
from neuronet_jax.runs.model import Model

BUCKET = 32  # sides are padded to multiples of it: heads come in few shapes, so programs are compiled rarely
# Of a further member's finest features, of a whole network's 850 bytes per voxel: 16 channels in float32.
MEMBER_SHARE = 0.08


@dataclass(frozen=True)
class Result:
    """What was read, classes and structures in the order asked for."""

    classes: np.ndarray  # uint8 [p x y z]
    posteriors: np.ndarray  # float32 [s x y z]
    sums: np.ndarray  # float64 [4 k], see Confidence; no columns where none was asked for


def read_volume(
    model: Model,
    image: Float[np.ndarray, "x y z"],
    background: float,
    protocols: Sequence[str],
    reading: Reading,
    options: Options,
    positions: Sequence[np.ndarray] | None = None,
) -> Result:
    """Reads a whitened volume; `background` is what lies beyond it.

    `positions` [u], [v], [w] are the wanted grid's, in voxels of the volume; zeros beyond its field of view. Without
    them it is the volume's own grid. The sums are over the volume's own voxels in any case.
    """
    strides = [member.config.model.stride for member in model.members]
    shifts = _shifts(options.crops, min(strides))
    step = math.lcm(BUCKET, *strides)
    margin = max(receptive_margin(member.config.model) for member in model.members)
    margin = rounded_up(margin + max(shifts), max(strides))
    # Room for the shifts. Centred along x where heads are mirrored, so that a mirrored head (of even width) is the
    # mirrored volume.
    room = (max(shifts) * (2 if options.flip else 1), max(shifts), max(shifts))
    bucket = tuple(rounded_up(side + more, step) for side, more in zip(image.shape, room, strict=True))
    low = ((bucket[0] - image.shape[0]) // 2 if options.flip else 0, 0, 0)
    after = [whole - side - a for whole, side, a in zip(bucket, image.shape, low, strict=True)]
    padding = list(zip(low, after, strict=True))
    padded = np.pad(image.astype(np.float32, copy=False), padding, constant_values=background)
    if positions is not None:
        positions = [np.round(p, 6) + a for p, a in zip(positions, low, strict=True)]  # inverted affines are not exact
    volume = tuple(slice(a, a + side) for a, side in zip(low, image.shape, strict=True))
    count = len(model.members) * options.passes
    budget = int(voxel_budget(model) / (1 + MEMBER_SHARE * (count - 1)))

    def run(tile: Shape) -> Result:
        shape = image.shape if positions is None else tuple(map(len, positions))
        result = Result(
            np.zeros((len(reading.classes), *shape), np.uint8),
            np.zeros((len(reading.posteriors), *shape), np.float32),
            np.zeros((4, reading.columns)),
        )
        for part in tiles(bucket, tile, margin):
            part = part.within(volume)
            if all(side.start < side.stop for side in part.kept):
                scores = average(_members(model, padded, part, protocols, options.flip, shifts))
                _read_tile(scores, part, volume, reading, positions, result)
        return result

    return with_smaller_tiles(run, bucket, budget, step, margin)


def _members(
    model: Model, padded: np.ndarray, part: Tile, protocols: Sequence[str], flip: bool, shifts: Sequence[int]
) -> Iterator[Fields]:
    """The fields of one tile by every member of the average."""
    for member in model.members:
        known = member.config.protocols
        offsets = dict(zip(known, spans(tuple(PROTOCOLS[name].num_classes for name in known)), strict=True))
        for mirrored in (False, True) if flip else (False,):
            columns = np.concatenate([
                offsets[name][0] + (PROTOCOLS[name].partners if mirrored else np.arange(PROTOCOLS[name].num_classes))
                for name in protocols
            ]).astype(np.int32)  # fmt: skip
            for shift in shifts:
                image = np.roll(padded, (-shift if mirrored else shift, shift, shift), (0, 1, 2))[part.inside]
                image = np.ascontiguousarray(image[::-1]) if mirrored else image
                yield aligned(_fields(*member.parts, image, columns), mirrored, shift)


@partial(jax.jit, static_argnums=0)
def _fields(structure: Any, arrays: Any, image: jax.Array, columns: jax.Array) -> Fields:
    features, readout = nnx.merge(structure, arrays).features(image[None, ..., None])
    chosen = Readout([m[:, columns] for m in readout.matrices], [b[columns] for b in readout.biases])
    return fields(features, chosen)


def _read_tile(
    scores: Fields,
    part: Tile,
    volume: tuple[slice, ...],
    reading: Reading,
    positions: Sequence[np.ndarray] | None,
    result: Result,
) -> None:
    """Fills in what the tile is believed on."""
    shape = tuple(side.stop - side.start for side in part.inside)
    # One voxel more than believed, for voxels of another grid that lie between; y and z whole, so that tiles share
    # programs.
    x = np.arange(max(part.kept[0].start - 1, volume[0].start), min(part.kept[0].stop + 1, volume[0].stop))
    own = [x, *(np.arange(side.start, side.stop) for side in part.inside[1:])]
    counted = [(p >= kept.start) & (p < kept.stop) for p, kept in zip(own, part.kept, strict=True)]
    here = reading if positions is None else reading._replace(posteriors=())
    grid = axes([p - a for p, a in zip(own, part.starts, strict=True)], shape, shape[0], counted)
    found = read(scores, grid, here)
    result.sums[...] += np.asarray(found.sums, np.float64).sum(axis=0)
    labels = np.asarray(found.labels)  # u p v w
    if positions is None:
        inside = tuple(slice(k.start - v.start, k.stop - v.start) for k, v in zip(part.kept, volume, strict=True))
        _place(found, [np.flatnonzero(mask) for mask in counted], inside, result)
        return
    wanted = []
    labelled = labels[: len(x), :, : shape[1], : shape[2]].any(axis=1)
    for axis, (p, kept, v) in enumerate(zip(positions, part.kept, volume, strict=True)):
        low = np.floor(np.clip(p, v.start, v.stop - 1))
        mask = (p > v.start - 1) & (p < v.stop) & (low >= kept.start) & (low < kept.stop)
        if not reading.posteriors:  # where all neighbours are background, so is what is interpolated from them
            seen = own[axis][np.any(labelled, axis=tuple({0, 1, 2} - {axis}))]
            mask &= (low >= seen[0] - 1) & (low <= seen[-1]) if len(seen) else False
        wanted.append(np.flatnonzero(mask))
    if all(map(len, wanted)):
        between = [
            np.clip(p[index], v.start, v.stop - 1) - a
            for p, index, v, a in zip(positions, wanted, volume, part.starts, strict=True)
        ]
        found = read(scores, axes(between, shape, len(positions[0])), reading._replace(confidence=False))
        _place(found, [np.arange(len(p)) for p in between], tuple(slice(i[0], i[-1] + 1) for i in wanted), result)


def _place(found: Any, rows: Sequence[np.ndarray], inside: tuple[slice, ...], result: Result) -> None:
    """Puts the planes' rows that mean something where they belong."""
    u, v, w = (slice(r[0], r[-1] + 1) for r in rows)
    result.classes[(slice(None), *inside)] = np.asarray(found.labels)[u, :, v, w].swapaxes(0, 1)
    result.posteriors[(slice(None), *inside)] = np.asarray(found.posteriors)[u, :, v, w].swapaxes(0, 1)


def _shifts(crops: int, stride: int) -> list[int]:
    """How far each crop moves the head along every axis: even, so that half resolution follows, evenly over a stride.

    Raises NeuronetError where the network has not as many different positions.
    """
    most = max(1, stride // 2)
    if not 1 <= crops <= most:
        raise NeuronetError(f"crops must be 1 to {most}, the positions that differ to this network; got {crops}")
    return [2 * round(index * stride / (2 * crops)) for index in range(crops)]
