"""The inference engine: from a whitened volume on the network's grid to labels, confidence and posteriors on any grid.

There are three steps. Every member of the average (networks of an ensemble, the mirrored head, shifted crops) computes
its coarse features of the whole volume. From these follow the blocks in which no voxel can be different from
background. The scores of the other blocks are read: on the requested grid for the labels, on the volume's own grid for
the confidence.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from neuronet_jax.errors import NeuronetError
from neuronet_jax.inference.blocks import BLOCK, CHUNK, Kind, Member, fields, lead, over_blocks, padded
from neuronet_jax.inference.cost import voxel_budget
from neuronet_jax.inference.onto_grid import DOUBT_NATS, Axes, Found, Reading, read, rows
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.inference.tiling import Shape, Tile, receptive_margin, rounded_up, tiles, with_smaller_tiles
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.readout import Readout, spans
from neuronet_jax.runs.model import Model
from neuronet_jax.runtime import TURNS, mesh_over_cores

BUCKET = BLOCK  # sides are padded to multiples of it: heads come in few shapes, so programs are compiled rarely
# Memory per extra member of an average, as a fraction of VOXEL_BYTES: its image and its coarse features.
MEMBER_SHARE = 0.2
# Scores by which a bound must hold: rounding in bfloat16, which has 8 bits, of scores of some ten.
SLACK = 0.25


@dataclass(frozen=True)
class Result:
    """Labels, posteriors and sums, classes and structures in the requested order."""

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
    """Labels a whitened volume; `background` is the value beyond it.

    `positions` [u], [v], [w] are those of the requested grid, in voxels of the volume; labels are zero beyond the field
    of view. Without them, the grid is the volume's own. The sums are always over the volume's own voxels.
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
    whole = np.pad(image.astype(np.float32, copy=False), padding, constant_values=background)
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
        mesh = mesh_over_cores(tile[1] // max(strides))
        every = [part.within(volume) for part in tiles(bucket, tile, margin)]
        for number, part in enumerate(every):
            if all(side.start < side.stop for side in part.kept):
                kinds, members = zip(*_members(mesh, model, whole, part, protocols, options.flip, shifts), strict=True)
                share = number / len(every), (number + 1) / len(every)
                _read_tile(mesh, kinds, members, part, volume, reading, positions, result, share)
                TURNS.share = share[1]
        return result

    return with_smaller_tiles(run, bucket, budget, step, margin)


def _members(
    mesh: Mesh,
    model: Model,
    whole: np.ndarray,
    part: Tile,
    protocols: Sequence[str],
    flip: bool,
    shifts: Sequence[int],
) -> Iterator[tuple[Kind, Member]]:
    """Yields every member of the average in one tile."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    for member in model.members:
        known = member.config.protocols
        offsets = dict(zip(known, spans(tuple(PROTOCOLS[name].num_classes for name in known)), strict=True))
        structure, arrays = member.parts[0], jax.device_put(member.parts[1], everywhere)
        for mirrored in (False, True) if flip else (False,):
            columns = np.concatenate([
                offsets[name][0] + (PROTOCOLS[name].partners if mirrored else np.arange(PROTOCOLS[name].num_classes))
                for name in protocols
            ]).astype(np.int32)  # fmt: skip
            for shift in shifts:
                image = whole[part.inside]
                if shift:
                    image = np.roll(whole, (-shift if mirrored else shift, shift, shift), (0, 1, 2))[part.inside]
                image = np.ascontiguousarray(image[::-1] if mirrored else image)
                split = jax.device_put(image, NamedSharding(mesh, PartitionSpec(None, *mesh.axis_names)))
                volume, coarse, readout = _coarse(mesh, structure, arrays, split, columns)
                yield Kind(structure, mirrored), Member(arrays, volume, coarse, readout, np.full(3, shift, np.int32))


@partial(jax.jit, static_argnums=(0, 1))
def _coarse(
    mesh: Mesh, structure: Any, arrays: Any, image: Float[Array, "x y z"], columns: Int[Array, "k"]
) -> tuple[Array, list[Array], Readout]:
    """Returns a member's image, coarse features and readout, on every device."""
    network = nnx.merge(structure, arrays)
    readout = network.readout()
    chosen = Readout([m[:, columns] for m in readout.matrices], [b[columns] for b in readout.biases])
    parts = (*padded(image, network.coarse(image[None, ..., None])), chosen)
    return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, PartitionSpec()))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _leads(
    mesh: Mesh, kinds: Any, classes: tuple[int, ...], members: Any, blocks: Int[Array, "n 3"], counts: Int[Array, "d"]
) -> Float[Array, "n p"]:
    return over_blocks(mesh, lambda shared, block: lead(kinds, shared, classes, block * BLOCK), members, blocks, counts)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    mesh: Mesh, kinds: Any, reading: Reading, members: Any, grid: Axes, blocks: Int[Array, "n 3"], counts: Array
) -> Found:
    def one(shared: Any, block: Array) -> Found:
        members, grid = shared
        return read(fields(kinds, members, block * BLOCK), grid.of(block), reading)

    return over_blocks(mesh, one, (members, grid), blocks, counts)


def _dealt(mesh: Mesh, blocks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Deals blocks [n 3] to the devices, CHUNK at most to each at a time. Yields all hands, how many blocks count in
    each, and where the i-th block lies in the hands.
    """
    devices = mesh.devices.size
    for first in range(0, len(blocks), devices * CHUNK):
        some = blocks[first : first + devices * CHUNK]
        hands = np.zeros((devices, CHUNK, 3), np.int32)
        index = np.arange(len(some))
        hands[index % devices, index // devices] = some
        counts = np.bincount(index % devices, minlength=devices).astype(np.int32)
        yield hands.reshape(-1, 3), counts, index % devices * CHUNK + index // devices


def _read_tile(
    mesh: Mesh,
    kinds: tuple[Kind, ...],
    members: tuple[Member, ...],
    part: Tile,
    volume: tuple[slice, ...],
    reading: Reading,
    positions: Sequence[np.ndarray] | None,
    result: Result,
    share: tuple[float, float],
) -> None:
    """Fills in the part of the result that the tile is valid for: the work from one share of the whole to another."""
    own = [np.arange(v.start, v.stop, dtype=float) for v in volume]
    own_rows = [_rows_of(p, part, axis) for axis, p in enumerate(own)]
    wanted, wanted_rows = own, own_rows
    if positions is not None:  # the outermost voxel continues up to one voxel beyond the volume
        wanted = [np.clip(p, v.start, v.stop - 1) for p, v in zip(positions, volume, strict=True)]
        seen = [(p > v.start - 1) & (p < v.stop) for p, v in zip(positions, volume, strict=True)]
        wanted_rows = [
            _rows_of(np.where(mask, p, -1), part, axis) for axis, (p, mask) in enumerate(zip(wanted, seen, strict=True))
        ]
    sides = [range((side.stop - side.start) // BLOCK) for side in part.inside]
    every = np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)
    here = _with_rows(every, own_rows if reading.confidence else wanted_rows)
    here |= _with_rows(every, wanted_rows)
    blocks = every[here]
    if not reading.posteriors:  # those are wanted everywhere
        margin = SLACK + (DOUBT_NATS if reading.confidence else 0)
        blocks = blocks[_highest_leads(mesh, kinds, members, reading, blocks) > -margin]
    if positions is None:
        _read_blocks(mesh, kinds, members, part, own, own_rows, reading, blocks, result, share)
        return
    middle = (share[0] + share[1]) / 2 if reading.confidence else share[0]
    if reading.confidence:
        sums_only = reading._replace(posteriors=())
        early = share[0], middle
        _read_blocks(mesh, kinds, members, part, own, own_rows, sums_only, blocks, result, early, labels=False)
    labels_only = reading._replace(confidence=False)
    _read_blocks(mesh, kinds, members, part, wanted, wanted_rows, labels_only, blocks, result, (middle, share[1]))


def _rows_of(positions: np.ndarray, part: Tile, axis: int) -> list[np.ndarray]:
    """Returns the rows in each block of the tile whose position, in voxels of the volume, the tile is valid for."""
    kept, start, stop = part.kept[axis], part.inside[axis].start, part.inside[axis].stop
    believed = (positions >= kept.start) & (positions < kept.stop)
    block = np.floor((positions - start) / BLOCK).astype(int)
    return [np.flatnonzero(believed & (block == b)) for b in range((stop - start) // BLOCK)]


def _with_rows(blocks: np.ndarray, rows_of: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Returns True for blocks that have rows along all axes."""
    filled = [np.array([len(index) > 0 for index in along]) for along in rows_of]
    return np.logical_and.reduce([filled[axis][blocks[:, axis]] for axis in range(3)])


def _highest_leads(mesh: Mesh, kinds: Any, members: Any, reading: Reading, blocks: np.ndarray) -> np.ndarray:
    """Returns the largest bound of `lead` over the protocols, for each block."""
    found = np.zeros(len(blocks), np.float32)
    done = 0
    for hands, counts, places in _dealt(mesh, blocks):
        leads = np.asarray(_leads(mesh, kinds, reading.classes, members, hands, counts))
        found[done : done + len(places)] = leads[places].max(axis=1)
        done += len(places)
    return found


def _read_blocks(
    mesh: Mesh,
    kinds: Any,
    members: Any,
    part: Tile,
    positions: Sequence[np.ndarray],
    rows_of: Sequence[Sequence[np.ndarray]],
    reading: Reading,
    blocks: np.ndarray,
    result: Result,
    share: tuple[float, float],
    labels: bool = True,
) -> None:
    """Reads blocks and adds their outputs to the result: the work from one share of the whole to another."""
    blocks = blocks[_with_rows(blocks, rows_of)]
    if not len(blocks):
        return
    axes = [rows(p - side.start, along) for p, side, along in zip(positions, part.inside, rows_of, strict=True)]
    grid = Axes(axes[0], axes[1], axes[2], np.asarray(max(map(len, rows_of[0])), np.int32))
    done = 0
    for hands, counts, places in _dealt(mesh, blocks):
        found = jax.device_get(_read(mesh, kinds, reading, members, grid, hands, counts))
        for block, place in zip(blocks[done : done + len(places)], places, strict=True):
            if reading.confidence:
                result.sums[...] += found.sums[place]
            if labels:
                along = [rows_of[axis][b] for axis, b in enumerate(block)]
                into = (slice(None), *(slice(index[0], index[-1] + 1) for index in along))
                u, v, w = (slice(len(index)) for index in along)
                result.classes[into] = found.labels[place][u, :, v, w].swapaxes(0, 1)
                result.posteriors[into] = found.posteriors[place][u, :, v, w].swapaxes(0, 1)
        done += len(places)
        TURNS.share = share[0] + (share[1] - share[0]) * done / len(blocks)


def _shifts(crops: int, stride: int) -> list[int]:
    """Returns how far each crop moves the volume along every axis: even, so that half resolution follows.

    Raises NeuronetError if the network does not have as many different positions.
    """
    most = max(1, stride // 2)
    if not 1 <= crops <= most:
        raise NeuronetError(f"crops must be 1 to {most}, the positions that differ to this network; got {crops}")
    return [2 * round(index * stride / (2 * crops)) for index in range(crops)]
