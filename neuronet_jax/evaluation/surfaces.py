"""Distances between the surface of a predicted structure and that of its reference, in mm.

The surfaces are those of DeepMind's `surface-distance` (Nikolov et al., "Clinically applicable segmentation of head and
neck anatomy for radiotherapy", JMIR 2021): elements between eight voxels, each with its area.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer
from scipy import ndimage

from neuronet_jax.errors import NeuronetError

PERCENTILE = 95  # of the Hausdorff distance: single voxels decide the farthest 5 % of a surface


@dataclass(frozen=True)
class SurfaceTable:
    """Both measures of every class of one protocol in one subject. Entry 0, the background, is not measured (NaN)."""

    hd95_mm: np.ndarray  # float64 [k]
    nsd: np.ndarray  # float64 [k], 0 to 1


@dataclass(frozen=True)
class SurfaceSummary:
    """Both measures of one protocol over subjects. The median includes infinite distances, and `missed` counts them."""

    hd95_mm: float  # median over structures and subjects
    nsd: float  # per subject the mean over structures, then the mean over subjects
    missed: int  # structures present in only one of the two maps
    subjects: int


def summarise_surfaces(tables: Sequence[SurfaceTable]) -> SurfaceSummary:
    """Summarises the structures that are present in at least one of the maps; NaN if there is none."""
    distances = np.concatenate([table.hd95_mm for table in tables])
    distances = distances[~np.isnan(distances)]
    scores = [float(np.nanmean(table.nsd)) for table in tables if not np.isnan(table.nsd).all()]
    return SurfaceSummary(
        # "higher": the mean of a finite and an infinite middle value would not be a measured distance
        float(np.percentile(distances, 50, method="higher")) if distances.size else float("nan"),
        float(np.mean(scores)) if scores else float("nan"),
        int(np.isinf(distances).sum()),
        len(scores),
    )


def surfaces_per_class(
    reference: Integer[np.ndarray, "x y z"],
    predicted: Integer[np.ndarray, "x y z"],
    num_classes: int,
    spacing_mm: Float[np.ndarray, "3"],
    tolerance_mm: float,
) -> SurfaceTable:
    """Returns the robust Hausdorff distance and normalised surface Dice of every foreground class.

    `hd95_mm` is the larger of the two directed 95th percentiles over surface area. `nsd` is the share of both surfaces
    that lies within `tolerance_mm` of the other. A class that is empty in both maps is not applicable (NaN). One that
    is empty in a single map counts: its surface Dice is 0 and its distance infinite. The distance is not the diagonal
    of the image, because no point of one surface has a nearest point on the other, and the diagonal would change with
    the padding of the grid. Medians and percentiles over subjects stay exact, and an infinite mean warns that misses
    must be counted. Raises NeuronetError on unequal shapes.
    """
    if reference.shape != predicted.shape:
        raise NeuronetError(
            f"surfaces are compared on one grid, got a reference of {reference.shape} and a prediction of "
            f"{predicted.shape}; resample the prediction onto the reference's grid first"
        )
    hd95_mm, nsd = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    boxes = [ndimage.find_objects(labels, max_label=num_classes - 1) for labels in (reference, predicted)]
    for index, (one, other) in enumerate(zip(*boxes, strict=True), start=1):
        if one is None and other is None:
            continue
        if one is None or other is None:
            hd95_mm[index], nsd[index] = np.inf, 0.0
            continue
        box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
        hd95_mm[index], nsd[index] = _measure(
            reference[box] == index, predicted[box] == index, spacing_mm, tolerance_mm
        )
    return SurfaceTable(hd95_mm, nsd)


def _measure(
    reference: np.ndarray, predicted: np.ndarray, spacing_mm: np.ndarray, tolerance_mm: float
) -> tuple[float, float]:
    """Returns both measures of two non-empty masks [x y z]."""
    import surface_distance

    with warnings.catch_warnings():  # the library uses scipy.ndimage names that scipy has moved
        warnings.simplefilter("ignore", DeprecationWarning)
        distances = surface_distance.compute_surface_distances(reference, predicted, spacing_mm)
    hd95_mm = surface_distance.compute_robust_hausdorff(distances, PERCENTILE)
    return float(hd95_mm), float(surface_distance.compute_surface_dice_at_tolerance(distances, tolerance_mm))
