"""Slices through one scan for its page: the image once, and each label map as a layer to lay over it.

Slices are cut along the axes of the file that are nearest to the body's. Anterior or superior is up; in axial and
coronal slices the subject's left is on the left. All of them share one brightness window.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from neuronet_jax.images.space import Volume, orientation, reorient

AXIAL, CORONAL, SAGITTAL = 2, 1, 0  # the axis across the slice, in RAS+ order
COUNT = 6  # slices of each plane: one row of a wide page
MARGIN_MM = 6.0  # around the labelled brain: enough to see what was left out
CLOSE_MARGIN_MM = 10.0  # around the deep structures, to see what they border on
_PIXEL_MM, _CLOSE_PIXEL_MM = 1.0, 0.5
_WINDOW = (1.0, 99.5)  # percentiles of the labelled voxels that become black and white
_HEADROOM = 0.1  # of that window, beyond each end: brighter and darker surroundings are still told apart
_LETTERS = {AXIAL: ("L", "R"), CORONAL: ("L", "R"), SAGITTAL: ("P", "A")}
_QUALITY = 80  # of WebP, for the image alone: 5 kB a slice; labels are kept exactly


@dataclass(frozen=True)
class Slice:
    """A plane across `axis`, at voxel `position`, and the box of the other two axes that is shown of it."""

    axis: int
    position: int
    box: tuple[slice, slice, slice]
    pixel_mm: float
    millimetres: float  # along the axis, in the scanner's coordinates

    @property
    def letters(self) -> tuple[str, str]:
        """The sides of the body at the left and the right edge."""
        return _LETTERS[self.axis]

    @property
    def place(self) -> str:
        """The position for people, such as "z 12 mm"."""
        rounded = round(self.millimetres)
        return f"{'xyz'[self.axis]} {f'{rounded:+}' if rounded else 0} mm"


class Row(NamedTuple):
    """Slices that are shown side by side."""

    title: str
    slices: tuple[Slice, ...]


class Window(NamedTuple):
    """The intensities that are shown black and white."""

    low: float
    high: float


class Mosaic:
    """Rows of axial, coronal and sagittal slices through the brain's own box, and close-ups of its deep structures."""

    def __init__(self, volume: Volume, labelled: np.ndarray, deep: np.ndarray | None = None):
        """Places the slices within the box of `labelled` (bool [x y z], file order), or of the image if that is empty.

        `deep` (likewise) are the structures that coronal close-ups run through; there are none if it is empty.
        """
        self._file = volume
        self._image = reorient(volume)
        inside = self._to_ras(labelled)
        self.window = _window(self._image.data, inside)
        self._box = self._around(inside, MARGIN_MM)
        brain = self._around(inside, 0.0)
        self.rows = tuple(
            Row(title, self._slices(axis, brain[axis], self._box, _PIXEL_MM))
            for title, axis in (("Axial", AXIAL), ("Coronal", CORONAL), ("Sagittal", SAGITTAL))
        )
        if deep is not None and deep.any():
            near = self._to_ras(deep)
            box = self._around(near, CLOSE_MARGIN_MM)
            along = self._around(near, 0.0)[CORONAL]
            close = Row("Deep structures, coronal", self._slices(CORONAL, along, box, _CLOSE_PIXEL_MM))
            self.rows = (*self.rows, close)

    def image(self) -> Iterator[bytes]:
        """Yields the image of every slice, row after row, as WebP."""
        for one in self._all():
            yield _webp(self._grey(one), quality=_QUALITY)

    def layers(self, labels: np.ndarray, colors: np.ndarray) -> Iterator[tuple[bytes, bytes]]:
        """Yields the `labels` [x y z] (file order) of every slice in `colors` [label 3], filled and as contours.

        They are WebP, clear at label 0. Contours have twice the pixels, so that their lines are thin.
        """
        turned = self._to_ras(labels)
        for one in self._all():
            found = self._cut(turned, one)
            yield _layer(found, colors), _layer(_contours(found.repeat(2, axis=0).repeat(2, axis=1)), colors)

    def thumbnail(self, labels: np.ndarray, colors: np.ndarray, landmark: np.ndarray | None = None) -> bytes:
        """Returns a small WebP: the axial and the coronal slice through the middle of `landmark` (bool [x y z]), or of
        the brain if that is empty, under the outlines of `labels`. The same anatomy in every scan can be compared at a
        glance.
        """
        turned = self._to_ras(labels)
        inside = turned > 0 if landmark is None or not landmark.any() else self._to_ras(landmark)
        middle = [
            int(np.average(np.arange(len(mass)), weights=mass)) if (mass := _along(inside, axis)).any() else side // 2
            for axis, side in enumerate(inside.shape)
        ]
        panels = []
        for axis in (AXIAL, CORONAL):
            one = self._slice(axis, middle[axis], self._box, _PIXEL_MM)
            grey, found = self._grey(one)[..., None] * np.ones(3), _contours(self._cut(turned, one))
            panels.append(np.where((found > 0)[..., None], colors[found], grey))
        height = max(panel.shape[0] for panel in panels)
        return _webp(np.concatenate([_centred(panel, height) for panel in panels], axis=1), quality=_QUALITY)

    def _all(self) -> Iterator[Slice]:
        for row in self.rows:
            yield from row.slices

    def _to_ras(self, array: np.ndarray) -> np.ndarray:
        return reorient(self._file.holding(array)).data

    def _around(self, mask: np.ndarray, margin_mm: float) -> tuple[slice, slice, slice]:
        """Returns the box of a mask and a margin around it, within the image; all of it if the mask is empty."""
        (box,) = ndimage.find_objects(mask.astype(np.uint8)) or [None]
        if box is None:
            box = tuple(slice(0, side) for side in mask.shape)
        x, y, z = (
            slice(max(0, side.start - (margin := round(margin_mm / size))), min(most, side.stop + margin))
            for side, size, most in zip(box, self._image.spacing_mm, mask.shape, strict=True)
        )
        return x, y, z

    def _slices(self, axis: int, along: slice, box: tuple[slice, slice, slice], pixel_mm: float) -> tuple[Slice, ...]:
        """Returns evenly spread slices across `axis`, within `along`."""
        steps = (np.arange(COUNT) + 0.5) / COUNT
        positions = np.floor(along.start + steps * (along.stop - along.start)).astype(int)
        return tuple(self._slice(axis, position, box, pixel_mm) for position in positions.tolist())

    def _slice(self, axis: int, position: int, box: tuple[slice, slice, slice], pixel_mm: float) -> Slice:
        centre = [(side.start + side.stop - 1) / 2 for side in box]
        centre[axis] = position
        affine = self._image.affine
        return Slice(axis, position, box, pixel_mm, float((affine[:3, :3] @ centre + affine[:3, 3])[axis]))

    def _grey(self, one: Slice) -> np.ndarray:
        """Returns the image of a slice, uint8 [h w], within the common window."""
        low, high = self.window
        share = (self._cut(self._image.data, one) - low) / max(high - low, 1e-6)
        return (np.clip(share, 0, 1) * 255).round().astype(np.uint8)

    def _cut(self, array: np.ndarray, one: Slice) -> np.ndarray:
        """Returns a slice as [h w] with square pixels, each the nearest voxel."""
        wanted = []  # voxels along the two axes of the slice
        for axis in (axis for axis in range(3) if axis != one.axis):
            side_mm, box = self._image.spacing_mm[axis], one.box[axis]
            count = max(1, round((box.stop - box.start) * side_mm / one.pixel_mm))
            nearest = box.start + ((np.arange(count) + 0.5) * one.pixel_mm / side_mm).astype(int)
            wanted.append(np.minimum(nearest, box.stop - 1))
        plane = array[(slice(None),) * one.axis + (one.position,)]
        return np.rot90(plane[np.ix_(*wanted)])


def axis_codes(affine: np.ndarray) -> str:
    """Returns the directions of a file's axes, such as LAS, as nibabel names them."""
    order, signs = orientation(affine)
    letters = [""] * 3
    for body, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        letters[axis] = ("LR", "PA", "IS")[body][sign > 0]
    return "".join(letters)


def _window(image: np.ndarray, inside: np.ndarray) -> Window:
    values = image[inside] if inside.any() else image.ravel()
    low, high = np.percentile(values[:: max(1, len(values) // 200_000)], _WINDOW)  # so many give the percentiles
    room = _HEADROOM * (high - low)
    return Window(float(low - room), float(high + room))


def _along(mask: np.ndarray, axis: int) -> np.ndarray:
    """Counts the voxels of `mask` that are set in each plane across `axis`."""
    return mask.sum(axis=tuple(other for other in range(3) if other != axis))


def _contours(labels: np.ndarray) -> np.ndarray:
    """Returns `labels` [h w] where they border on a smaller label, 0 elsewhere: lines of one pixel, drawn once.

    The edge of the picture is no border: what it cuts goes on beyond it.
    """
    padded = np.pad(labels, 1, mode="edge")
    lowest = np.minimum.reduce([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]])
    return np.where(lowest < labels, labels, 0)


def _centred(panel: np.ndarray, height: int) -> np.ndarray:
    above = (height - panel.shape[0]) // 2
    return np.pad(panel, ((above, height - panel.shape[0] - above), (2, 2), (0, 0)))


def _layer(labels: np.ndarray, colors: np.ndarray) -> bytes:
    """Returns labels [h w] in their colours as WebP, clear at label 0."""
    layer = np.zeros((*labels.shape, 4), np.uint8)
    layer[..., :3] = colors[labels] * (labels > 0)[..., None]
    layer[..., 3] = 255 * (labels > 0)
    return _webp(layer, lossless=True, quality=0)  # no loss at any quality, which is effort here


def _webp(pixels: np.ndarray, **options: int) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, format="WEBP", method=2, **options)
    return stream.getvalue()
