"""Pictures of scans with their label maps for evaluations and the README, and the colours of labels.

The slices of report pages are in `mosaic`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Num, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS, Protocol

_DPI = 100
_LETTERS = ("L", "R"), ("L", "R"), ("P", "A")  # at the edges of axial, coronal and sagittal slices in RAS+ order
_PANEL_INCHES = 2.2  # shows a 1 mm scan at about its own resolution


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
    x, y, z = image.shape
    for letters, top, width in zip(_LETTERS, (0, y, y + z), (x, x, y), strict=True):
        for panel in range(3):
            _write_letters(axes, letters, panel * width + 1, (panel + 1) * width - 1, top + 1)
    figure.suptitle(f"{protocol.tool} ({protocol.name}): image, reference, prediction", fontsize=9, y=0.995)
    figure.savefig(path)


def save_strip(
    path: Path | IO[bytes], image: np.ndarray, maps: Mapping[str, np.ndarray], titles: Mapping[str, str]
) -> None:
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
            _write_letters(grid[row, column], _LETTERS[row], 0, view.shape[1] - 1, view.shape[0] - 1)
        title = "T1" if name is None else f"{PROTOCOLS[name].tool} ({name})\n{titles.get(name, '')}"
        grid[0, column].set_title(title, color="white", fontsize=8)
    figure.savefig(path)


def _write_letters(axes: Axes, letters: tuple[str, str], left: float, right: float, top: float) -> None:
    """Writes the sides of the body into the upper corners of a slice."""
    for letter, x, side in zip(letters, (left, right), ("left", "right"), strict=True):
        axes.text(x, top, letter, color="#ffe08a", fontsize=7, weight="bold", ha=side, va="top")


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
