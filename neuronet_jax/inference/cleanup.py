"""Removes labels that lie apart from the brain, such as patches in the neck, the face or the background.

A tissue protocol, or one that parcels the whole brain, keeps the largest connected component of all that it labels. One
that labels separate structures keeps the largest component of each of them, because its structures may lie apart from
each other. What is removed becomes background.

Measured on the reference maps of 15 brains at 1 mm: at most 0.04 % of the labelled voxels are removed (0.0025 % on
average) for FAST, SPM and both MALP-EM maps. FIRST's structures lose 0.005 % on average, 0.6 % at most (the accumbens,
of 0.5 ml). Within MALP-EM's parcellation nothing is removed by structure: whole gyri lie in two pieces there.
"""

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from neuronet_jax.labels import Protocol

# Protocols whose structures do not make up a whole brain.
SEPARATE = ("fsl_first",)


def clean_up(protocol: Protocol, classes: UInt8[np.ndarray, "x y z"]) -> tuple[UInt8[np.ndarray, "x y z"], int]:
    """Returns the classes without what lies apart, and how many voxels were removed. Voxels are connected by faces."""
    if protocol.name not in SEPARATE:
        apart = _apart(classes > 0)
        removed = int(np.count_nonzero(apart))
        return (np.where(apart, np.uint8(0), classes), removed) if removed else (classes, 0)
    cleaned, total = classes, 0
    for index, box in enumerate(ndimage.find_objects(classes), start=1):
        if box is None:
            continue
        apart = _apart(classes[box] == index)
        if removed := int(np.count_nonzero(apart)):
            cleaned = classes.copy() if total == 0 else cleaned
            cleaned[box][apart] = 0
            total += removed
    return cleaned, total


def _apart(mask: np.ndarray) -> np.ndarray:
    """Returns the voxels of a mask [x y z] outside its largest component; of two equal ones, the first is kept."""
    (box,) = ndimage.find_objects(mask.view(np.uint8)) or [None]
    apart = np.zeros_like(mask)
    if box is None:
        return apart
    labelled, count = ndimage.label(mask[box])  # type: ignore[misc] (its stub types it as a number)
    if count > 1:
        sizes = np.bincount(labelled.ravel())
        sizes[0] = 0
        apart[box] = mask[box] & (labelled != sizes.argmax())
    return apart
