"""Pictures of heads with their label maps, for evaluations, reports and the README."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.figure import Figure

from neuronet_jax.labels import PROTOCOLS, Protocol
from neuronet_jax.monitor import label_picture

_DPI = 100
_PANEL_INCHES = 2.2  # a 1 mm head at about its own resolution


def save_comparison(
    path: Path, image: np.ndarray, reference: np.ndarray, predicted: np.ndarray, protocol: Protocol
) -> None:
    """Three orthogonal middle slices of image, reference and prediction as PNG.

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
    """One head and its label maps side by side, axial above coronal, as PNG.

    `image` [x y z] holds intensities, `maps` class indices per protocol, in RAS+ order; `titles` go below the tools.
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
    """Curves over training steps, one panel per metric, as PNG."""
    figure = Figure(figsize=(4 * len(metrics), 2.6), dpi=_DPI, layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else "")
        axes.set(xlabel="step", title=name)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _grey(view: np.ndarray) -> np.ndarray:
    """[h w 3] within 0 and 1."""
    low, high = np.percentile(view, (1, 99))
    return np.clip((view - low) / max(high - low, 1e-6), 0, 1)[..., None] * np.ones(3)
