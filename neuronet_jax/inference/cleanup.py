"""Removes labels that lie apart from the brain, such as patches in the neck, the face or the background.

First, everything goes that hangs on the brain by a bridge, as labels in a neck do. The brain's core, which is what is
left of it without its outermost 5 mm, falls into pieces there, and what lies around the largest piece is kept. The
brain is where at least half of the protocols that label whole brains say so, with its sulci closed, at about 2 mm.

Then a tissue protocol, or one that parcels the whole brain, keeps the largest connected component of all that it
labels. One that labels separate structures keeps the largest component of each of them, because its structures may lie
apart from each other. What is removed becomes background.

Measured on the reference maps of 15 brains at 1 mm, of 5 of them with bridges: at most 0.04 % of the labelled voxels
are removed for FAST, SPM and both MALP-EM maps, 0.6 % at most of a structure of FIRST (the accumbens, of 0.5 ml).
Within MALP-EM's parcellation nothing is removed by structure: whole gyri lie in two pieces there. Of two whole heads
whose necks the network had labelled, 295 and 140 ml of FAST's map hung on the brain by bridges.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from scipy import ndimage

# Protocols whose structures do not make up a whole brain.
SEPARATE = ("fsl_first",)
SULCUS_MM = 3.0  # half the width of a sulcus that is closed first: MALP-EM labels no CSF there
BRIDGE_MM = 5.0  # half the width of what may join a neck to the brain; a brain stem is wider
MARGIN_MM = 8.0  # beyond the outermost 5 mm, for gyri that are thinner than a bridge and have no core
_GRID_MM = 2.0  # fine enough for 5 mm

Classes = UInt8[np.ndarray, "x y z"]


def clean_up(classes: Mapping[str, Classes], spacing_mm: Sequence[float]) -> tuple[dict[str, Classes], dict[str, int]]:
    """Returns the classes of every protocol without what lies apart, and how many voxels were removed.

    Voxels are connected by faces. A map from which nothing is removed is the one that was given.
    """
    wholes = [found > 0 for name, found in classes.items() if name not in SEPARATE]
    away = _away_from_brain(wholes, spacing_mm) if wholes else None
    cleaned, removed = {}, {}
    for name, found in classes.items():
        kept = found if away is None else _without(found, away & (found > 0))
        kept = _largest_of_each(kept) if name in SEPARATE else _without(kept, _apart(kept > 0))
        cleaned[name] = kept
        removed[name] = 0 if kept is found else int(np.count_nonzero(kept != found))
    return cleaned, removed


def _away_from_brain(masks: Sequence[Bool[np.ndarray, "x y z"]], spacing_mm: Sequence[float]) -> np.ndarray | None:
    """Returns what is not around the brain, bool [x y z]; None if nothing is thick enough for a brain."""
    steps = [max(1, round(_GRID_MM / side)) for side in spacing_mm]
    sampling = [step * side for step, side in zip(steps, spacing_mm, strict=True)]
    coarse = [mask[tuple(slice(None, None, step) for step in steps)] for mask in masks]
    # A border around it: without voxels outside, there is nothing to measure distances from.
    brain = np.pad(2 * np.sum(coarse, axis=0) >= len(coarse), 1 + math.ceil(SULCUS_MM / min(sampling)))
    closed = _distance(~brain, sampling) <= SULCUS_MM
    core = _distance(closed, sampling) > SULCUS_MM + BRIDGE_MM
    pieces, count = _components(core)
    if not count:
        return None
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    away = _distance(pieces != sizes.argmax(), sampling) > BRIDGE_MM + MARGIN_MM
    border = (away.shape[0] - coarse[0].shape[0]) // 2
    return away[np.ix_(*(border + np.arange(side) // step for side, step in zip(masks[0].shape, steps, strict=True)))]


def _components(mask: np.ndarray) -> tuple[Int[np.ndarray, "x y z"], int]:
    """Numbers the connected components from 1 on, and counts them."""
    labelled: Any = ndimage.label(mask)  # the types of this overload differ between releases of SciPy's stubs
    return labelled


def _distance(mask: np.ndarray, sampling: Sequence[float]) -> np.ndarray:
    """Returns the distance in mm from each voxel of the mask to the nearest one outside."""
    return np.asarray(ndimage.distance_transform_edt(mask, sampling=sampling))


def _without(classes: np.ndarray, away: np.ndarray) -> np.ndarray:
    return np.where(away, np.uint8(0), classes) if away.any() else classes


def _largest_of_each(classes: np.ndarray) -> np.ndarray:
    cleaned = classes
    for index, box in enumerate(ndimage.find_objects(classes), start=1):
        if box is not None and (apart := _apart(classes[box] == index)).any():
            cleaned = classes.copy() if cleaned is classes else cleaned
            cleaned[box][apart] = 0
    return cleaned


def _apart(mask: np.ndarray) -> np.ndarray:
    """Returns the voxels of a mask [x y z] outside its largest component; of two equal ones, the first is kept."""
    (box,) = ndimage.find_objects(mask.view(np.uint8)) or [None]
    apart = np.zeros_like(mask)
    if box is None:
        return apart
    labelled, count = _components(mask[box])
    if count > 1:
        sizes = np.bincount(labelled.ravel())
        sizes[0] = 0
        apart[box] = mask[box] & (labelled != sizes.argmax())
    return apart
