"""Moves volumes between the grid of the input and the network's grid, both in RAS+ mm.

To reach the network's grid, axes are flipped and permuted (exactly) and resampled one by one. Nothing is rotated: an
oblique scan stays oblique, and only its affine shows it. If the voxel size already fits, voxels pass unchanged, bit for
bit.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse

from neuronet_jax.errors import NeuronetError

_SPACING_TOLERANCE_MM = 1e-3  # a fifth of a voxel over 200 voxels: less error than interpolating adds
_FWHM = 2 * np.sqrt(2 * np.log(2))  # full width at half maximum of a Gaussian, in sigmas


@dataclasses.dataclass(frozen=True)
class Grid:
    """The shape of a voxel grid and its place: `affine` float64 [4 4] maps voxels to RAS+ mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel size along each axis, float64 [3]."""
        return spacing_mm(self.affine)


@dataclasses.dataclass(frozen=True)
class Volume:
    """Voxels [x y z], float32 of an image or integers of a label map, and their place: `affine` float64 [4 4] maps
    voxels to RAS+ mm.

    A volume read from a file also has its header, which supplies the qform, sform and codes of results on the same
    grid, and the W_… codes of its `warnings`.
    """

    data: np.ndarray
    affine: np.ndarray
    header: Any = None
    warnings: tuple[str, ...] = ()

    @property
    def grid(self) -> Grid:
        x, y, z = self.data.shape
        return Grid((x, y, z), self.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along each axis."""
        x, y, z = (float(side) for side in spacing_mm(self.affine))
        return x, y, z

    def holding(self, data: np.ndarray) -> "Volume":
        """Returns other voxels in the same place."""
        return Volume(data, self.affine)


def spacing_mm(affine: np.ndarray) -> np.ndarray:
    """Returns the voxel size along each axis, float64 [3]."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def voxel_mm3(affine: np.ndarray) -> float:
    """Returns the volume of a voxel, |det(affine)|: right for anisotropic and oblique grids alike."""
    return abs(float(np.linalg.det(affine[:3, :3])))


def conform(volume: Volume, voxel_size_mm: float, is_label: bool) -> Volume:
    """Returns the volume in RAS+ order with voxels of `voxel_size_mm`, C-contiguous.

    Images (float32) are interpolated linearly after a Gaussian that removes detail too fine for a coarser grid. Labels
    take the nearest voxel. Images and labels of one grid land on one grid. `to_grid` is the way back.
    """
    return resample(reorient(volume), voxel_size_mm, is_label)


def orientation(affine: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Returns, for each axis of the body (right, anterior, superior), the closest axis of the array and its sign.

    The assignment has the largest sum of direction cosines. Ties keep the given order, so the function is idempotent.
    """
    cosines = affine[:3, :3] / spacing_mm(affine)  # [body axis, array axis]
    orders = list(itertools.permutations(range(3)))
    scores = np.array([sum(abs(cosines[body, axis]) for body, axis in enumerate(order)) for order in orders])
    i, j, k = orders[int(np.flatnonzero(scores >= scores.max() - 1e-6)[0])]
    x, y, z = (-1 if cosines[body, axis] < 0 else 1 for body, axis in enumerate((i, j, k)))
    return (i, j, k), (x, y, z)


def reorient(volume: Volume) -> Volume:
    """Permutes and flips the axes so that they point closest to right, anterior, superior. Exact, and a view."""
    order, signs = orientation(volume.affine)
    shape = [volume.data.shape[axis] for axis in order]
    to_input = np.zeros((4, 4))  # output voxel → input voxel
    to_input[3, 3] = 1
    for body, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        to_input[axis, body] = sign
        to_input[axis, 3] = shape[body] - 1 if sign < 0 else 0
    flips = tuple(slice(None, None, sign) for sign in signs)
    return Volume(volume.data.transpose(order)[flips], volume.affine @ to_input)


def resample(volume: Volume, voxel_size_mm: float, is_label: bool) -> Volume:
    """Resamples to cubic voxels of `voxel_size_mm`, axis by axis; C-contiguous. See `conform`."""
    data, affine = volume.data, np.array(volume.affine, np.float64)
    memory = np.argsort([-abs(stride) for stride in data.strides], kind="stable")  # axes, slowest first
    for axis in (2, 1, 0):  # a fixed order, so that the file's orientation does not change the last bit
        spacing = float(spacing_mm(affine)[axis])
        if abs(spacing - voxel_size_mm) <= _SPACING_TOLERANCE_MM:
            continue
        first, step, count = _samples(data.shape[axis], voxel_size_mm / spacing)
        positions = first + step * np.arange(count)
        if is_label:
            data = np.take(data, _nearest(positions), axis=axis)
        else:
            weights = _interpolation(data.shape[axis], positions, step)
            as_stored = np.ascontiguousarray(data.transpose(memory), np.float32)
            data = _along(weights, as_stored, list(memory).index(axis)).transpose(np.argsort(memory))
        affine[:3, 3] += affine[:3, axis] * first
        affine[:3, axis] *= step
    return Volume(np.ascontiguousarray(data), affine)


def _along(weights: scipy.sparse.csr_array, volume: np.ndarray, axis: int) -> np.ndarray:
    """Applies `weights` [new old] along `axis` of a C-contiguous volume, plane by plane to stay within the cache."""
    if axis == 0:
        return (weights @ volume.reshape(len(volume), -1)).reshape(-1, *volume.shape[1:])
    planes = [weights @ plane if axis == 1 else (weights @ plane.T).T for plane in volume]
    return np.stack(planes)


def to_grid(volume: Volume, target: Grid) -> np.ndarray:
    """Returns the labels [x y z] on the grid `target`: the nearest voxel, and 0 from one voxel outside on.

    Exact if only flips, permutations, padding and cropping lie between the two grids.
    """
    labels = volume.data
    walk = walked(volume.affine, target)
    if walk is None:
        return _to_rotated_grid(labels, np.linalg.inv(volume.affine) @ target.affine, target.shape)
    order, along = walk
    gathered, inside = [], []
    for positions, side in zip(along, labels.shape, strict=True):
        inside.append((positions > -1) & (positions < side))
        gathered.append(np.clip(_nearest(positions), 0, side - 1))
    result = labels[np.ix_(*gathered)]
    for axis, mask in enumerate(inside):
        result[(slice(None),) * axis + (~mask,)] = 0
    return np.ascontiguousarray(result.transpose(np.argsort(order)))


def walked(affine: np.ndarray, target: Grid) -> tuple[tuple[int, ...], list[np.ndarray]] | None:
    """Returns, for each axis of a grid at `affine`, the parallel axis of `target` and the positions of its voxels.

    Positions are float64 [n], in voxels of the grid. Returns None if the axes are not parallel.
    """
    to_source = np.linalg.inv(affine) @ target.affine  # target voxel → voxel of the grid
    order, _ = orientation(to_source)
    along = np.zeros((3, 3), bool)
    along[range(3), order] = True
    drift = np.abs(to_source[:3, :3][~along]).max() * max(target.shape)  # voxels by which rows of the grids diverge
    if drift > 1e-2:
        return None
    return order, [
        to_source[source, 3] + to_source[source, axis] * np.arange(target.shape[axis])
        for source, axis in enumerate(order)
    ]


def _to_rotated_grid(labels: np.ndarray, to_source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Does the work of `to_grid` for rotated grids, which need a look-up per voxel, plane by plane of the target."""
    result = np.zeros(shape, labels.dtype)
    voxels = np.indices((1, *shape[1:])).reshape(3, -1)  # [3, y z] of one plane
    for x in range(shape[0]):
        voxels[0] = x
        positions = to_source[:3, :3] @ voxels + to_source[:3, 3:]
        inside = np.all((positions > -1) & (positions < np.reshape(labels.shape, (3, 1))), axis=0)
        nearest = np.clip(_nearest(positions[:, inside]), 0, np.reshape(labels.shape, (3, 1)) - 1)
        result[x].reshape(-1)[inside] = labels[tuple(nearest)]
    return result


def place(array: np.ndarray, shape: Sequence[int], origin: Sequence[int]) -> np.ndarray:
    """Returns the box of `shape` that starts at voxel `origin` of `array` (negative: outside), with zeros outside
    `array`.
    """
    result = np.zeros(tuple(shape), array.dtype)
    source, target = [], []
    for side, size, start in zip(array.shape, shape, origin, strict=True):
        low, high = max(start, 0), max(min(start + size, side), max(start, 0))
        source.append(slice(low, high))
        target.append(slice(low - start, high - start))
    result[tuple(target)] = array[tuple(source)]
    return result


def crop_origin(
    shape: Sequence[int], size: Sequence[int], low: Sequence[int], high: Sequence[int]
) -> tuple[int, int, int]:
    """Returns the first voxel of a box of `size` in a volume of `shape`.

    Where the box is larger than the volume, the padding is centred. Where it is smaller, the box is centred on the
    voxels `low` to `high` (excluded) as far as the volume allows.
    """
    origin = []
    for side, box, first, last in zip(shape, size, low, high, strict=True):
        if box >= side:
            origin.append(-((box - side) // 2))
        else:
            origin.append(min(max((first + last - box) // 2, 0), side - box))
    x, y, z = origin
    return x, y, z


def shifted(affine: np.ndarray, origin: Sequence[int]) -> np.ndarray:
    """Returns the affine of a box that starts at voxel `origin`."""
    result = np.array(affine, np.float64)
    result[:3, 3] += result[:3, :3] @ np.asarray(origin, np.float64)
    return result


def _samples(side: int, step: float) -> tuple[int, float, int]:
    """Returns the first sample, the step and the count along an axis of `side` voxels: centred, within the voxel
    centres.

    The first sample is a voxel centre. Halving the resolution therefore picks voxels instead of splitting ties between
    them, and image and labels are not shifted against each other.
    """
    if side < 1 or step <= 0:
        raise NeuronetError(f"an axis needs voxels and a positive step, got {side} voxels and a step of {step}")
    count = int(np.floor((side - 1) / step + 1e-6)) + 1
    first = int(np.rint((side - 1 - (count - 1) * step) / 2))
    if first + (count - 1) * step > side - 1 + 1e-6:
        first -= 1
    return first, step, count


def _nearest(positions: np.ndarray) -> np.ndarray:
    """Rounds to the nearest voxel. Ties go down, whatever the rounding error of the positions."""
    return np.floor(positions + 0.5 - 1e-6).astype(np.intp)


def _interpolation(side: int, positions: np.ndarray, step: float) -> scipy.sparse.csr_array:
    """Returns weights, float32 [sample, voxel], of linear interpolation at `positions`, anti-aliased if `step` exceeds
    1.

    The anti-aliasing Gaussian widens a voxel's response to that of the new voxel (Cardoso et al., "Scale factor point
    spread function matching", MICCAI 2015): FWHM² = step² − 1. Beyond the border the outermost voxel continues.
    """
    low = np.floor(positions).astype(np.intp)
    fraction = positions - low
    sigma = np.sqrt(max(step**2 - 1, 0)) / _FWHM
    radius = int(np.ceil(4 * sigma))  # 4 sigmas hold all but 6e-5
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma > 0 else np.ones(1)
    kernel /= kernel.sum()
    rows, columns, values = [], [], []
    for neighbour, weight in ((low, 1 - fraction), (low + 1, fraction)):
        rows.append(np.repeat(np.arange(len(positions)), len(offsets)))
        columns.append(np.clip(neighbour[:, None] + offsets, 0, side - 1).ravel())
        values.append((weight[:, None] * kernel).ravel())
    entries = (np.concatenate(values).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    matrix = scipy.sparse.coo_array(entries, shape=(len(positions), side)).tocsr()
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix
