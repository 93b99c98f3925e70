"""Pictures of scans with their label maps, for evaluations, reports and the README."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Num, UInt8
from matplotlib.figure import Figure

from neuronet_jax.errors import NeuronetError
from neuronet_jax.images.space import Volume, reorient
from neuronet_jax.labels import PROTOCOLS, Protocol

_DPI = 100
_PANEL_INCHES = 2.2  # shows a 1 mm scan at about its own resolution
_PIXEL_MM = 1.0  # of the slices in reports: three of them are about as wide as a page
_OPACITY = 0.6  # of labels over the image: the anatomy stays visible


class Slices:
    """Axial, coronal and sagittal slices through the middle of the labelled voxels, as a background for label maps.

    Anterior or superior is up and the subject's left is on the left, whatever the file's orientation. An oblique scan
    is shown along its own axes. Pixels are 1 mm.
    """

    def __init__(self, volume: Volume, labelled: np.ndarray):
        """Cuts slices at the middle of `labelled` (bool [x y z], file order), or of the image if that is empty."""
        self._file = volume
        image = reorient(volume)
        inside = reorient(volume.holding(labelled)).data
        self._sides_mm = image.spacing_mm
        self._middle = [
            int(np.average(np.arange(side), weights=mass)) if (mass := _along(inside, axis)).any() else side // 2
            for axis, side in enumerate(inside.shape)
        ]
        self._grey = [_grey(self._cut(image.data, axis)) for axis in (2, 1, 0)]

    def png(self, labels: np.ndarray | None = None, colors: np.ndarray | None = None, count: int = 3) -> bytes:
        """Returns a PNG of the first `count` slices side by side, under `labels` [x y z] in `colors` [label 3].

        `labels` are in file order.
        """
        panels = []
        for axis, grey in list(zip((2, 1, 0), self._grey, strict=True))[:count]:
            panel = grey * 255
            if labels is not None and colors is not None:
                found = self._cut(reorient(self._file.holding(labels)).data, axis)
                panel = np.where((found > 0)[..., None], (1 - _OPACITY) * panel + _OPACITY * colors[found], panel)
            panels.append(panel)
        height = max(panel.shape[0] for panel in panels)
        return png(np.concatenate([_centred(panel, height) for panel in panels], axis=1))

    def _cut(self, array: np.ndarray, axis: int) -> np.ndarray:
        """Returns the slice across `axis` as [h w] with square pixels, each the nearest voxel."""
        rest = [other for other in range(3) if other != axis]
        view = np.take(array, self._middle[axis], axis)
        for number, other in enumerate(rest):
            count = max(1, round(view.shape[number] * self._sides_mm[other] / _PIXEL_MM))
            nearest = (np.arange(count) + 0.5) * _PIXEL_MM / self._sides_mm[other]
            view = np.take(view, np.minimum(nearest.astype(int), view.shape[number] - 1), number)
        return np.rot90(view)


def colors_of(protocol: Protocol) -> np.ndarray:
    """Returns the sRGB colour of every id that the tool writes, float64 [id 3]."""
    colors = np.zeros((256, 3))
    colors[protocol.ids] = [structure.color for structure in protocol.structures]
    return colors


def votes_colors(voters: int) -> list[tuple[int, int, int]]:
    """Returns sRGB colours for 0 to `voters` votes, told apart by colour-blind eyes too.

    All votes are blue, all but one amber, fewer red.
    """
    return [(0, 0, 0)] + [
        (69, 117, 180) if votes == voters else (253, 184, 99) if votes == voters - 1 else (215, 48, 39)
        for votes in range(1, voters + 1)
    ]


def png(pixels: np.ndarray) -> bytes:
    """Returns the PNG of sRGB values [h w 3] from 0 to 255."""
    from matplotlib.image import imsave

    stream = io.BytesIO()
    imsave(stream, np.clip(np.round(pixels), 0, 255).astype(np.uint8), format="png")
    return stream.getvalue()


def _along(mask: np.ndarray, axis: int) -> np.ndarray:
    """Counts the voxels of `mask` that are set in each plane across `axis`."""
    return mask.sum(axis=tuple(other for other in range(3) if other != axis))


def _centred(panel: np.ndarray, height: int) -> np.ndarray:
    above = (height - panel.shape[0]) // 2
    return np.pad(panel, ((above, height - panel.shape[0] - above), (2, 2), (0, 0)))


def save_comparison(
    path: Path, image: np.ndarray, reference: np.ndarray, predicted: np.ndarray, protocol: Protocol
) -> None:
    """Saves three orthogonal middle slices of image, reference and prediction as PNG.

    `image` [x y z] holds intensities, the others class indices, all in RAS+ order.
    """
    picture = label_picture(image, reference, predicted, protocol)
    figure = Figure(
        figsize=(3 * _PANEL_INCHES, 3 * _PANEL_INCHES * picture.shape[0] / picture.shape[1] + 0.3), dpi=_DPI
    )
    axes = figure.add_axes((0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    figure.suptitle(f"{protocol.tool} ({protocol.name}): image, reference, prediction", fontsize=9, y=0.995)
    figure.savefig(path)


def save_strip(path: Path, image: np.ndarray, maps: Mapping[str, np.ndarray], titles: Mapping[str, str]) -> None:
    """Saves one scan and its label maps side by side as PNG, axial above coronal.

    `image` [x y z] holds intensities, `maps` class indices per protocol, in RAS+ order. `titles` go below the tools'
    names.
    """
    columns = len(maps) + 1
    labelled = np.argwhere(np.any(list(maps.values()), axis=0))
    middle = np.round(labelled.mean(axis=0)).astype(int) if len(labelled) else np.array(image.shape) // 2
    figure = Figure(figsize=(columns * _PANEL_INCHES, 2 * _PANEL_INCHES + 0.5), dpi=_DPI, facecolor="black")
    grid = figure.subplots(2, columns, gridspec_kw={"wspace": 0, "hspace": 0}, squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1 - 0.5 / figure.get_figheight())
    for column, name in enumerate([None, *maps]):
        for row, axis in enumerate((2, 1)):
            view = np.take(image, middle[axis], axis).T
            pixels = _grey(view)
            if name is not None:
                classes = np.take(maps[name], middle[axis], axis).T
                colors = np.array([s.color for s in PROTOCOLS[name].structures]) / 255  # [k 3]
                pixels = np.where((classes > 0)[..., None], 0.3 * pixels + 0.7 * colors[classes], pixels)
            grid[row, column].imshow(pixels, origin="lower", interpolation="nearest")
            grid[row, column].set_axis_off()
        title = "T1" if name is None else f"{PROTOCOLS[name].tool} ({name})\n{titles.get(name, '')}"
        grid[0, column].set_title(title, color="white", fontsize=8)
    figure.savefig(path)


def save_curves(path: Path | IO[bytes], metrics: Mapping[str, list[tuple[int, float]]]) -> None:
    """Saves curves over training steps as PNG, one panel per metric."""
    figure = Figure(figsize=(4 * len(metrics), 2.6), dpi=_DPI, layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "")
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def label_picture(
    image: Num[np.ndarray, "x y z"],
    labels: UInt8[np.ndarray, "x y z"],
    reference: UInt8[np.ndarray, "x y z"],
    protocol: Protocol,
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the middle axial, coronal and sagittal slices: image, `labels` over it, `reference` over it, side by
    side.

    Arrays are in RAS+ order and hold intensities and class indices of `protocol`. Anterior or superior is up, and the
    subject's left is on the left. Raises NeuronetError if the shapes differ.
    """
    if not image.shape == labels.shape == reference.shape:
        raise NeuronetError(
            f"image, labels and reference must share a shape, got {image.shape}, {labels.shape}, {reference.shape}"
        )
    low, high = np.percentile(image, (1, 99))
    grey = np.clip((image - low) / max(high - low, 1e-6), 0, 1)[..., None] * np.full(3, 255.0)  # [x y z 3]
    colors = np.array([structure.color for structure in protocol.structures], np.float64)  # [k 3]

    def over(classes: np.ndarray) -> np.ndarray:
        return np.where((classes > 0)[..., None], (grey + colors[classes]) / 2, grey)

    panels = np.concatenate([grey, over(labels), over(reference)], axis=-1)  # [x y z 9]: three RGB volumes
    rows = []
    for axis in (2, 1, 0):
        view = np.rot90(np.take(panels, panels.shape[axis] // 2, axis))  # [h w 9], the higher axis upwards
        rows.append(np.concatenate(np.split(view, 3, axis=-1), axis=1))  # [h 3w 3]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in rows]
    return np.concatenate(rows).round().astype(np.uint8)


def _grey(view: np.ndarray) -> np.ndarray:
    """Returns [h w 3] within 0 and 1."""
    low, high = np.percentile(view, (1, 99))
    return np.clip((view - low) / max(high - low, 1e-6), 0, 1)[..., None] * np.ones(3)
