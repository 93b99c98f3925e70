"""Checks, from the labels and the image under them, that the input was a whole adult brain in T1 contrast.

A network answers any input. These checks hold its answer against independent facts of physics and anatomy. They need no
training and no reference, and they only warn. The constants were measured on 15 skull-stripped brains under their
reference labels, and on three whole heads and nine of the brains under a network trained for minutes on synthetic
heads. They were compared with the same heads with inverted contrast or cut in half, with noise, and with spheres.
"""

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from scipy import ndimage

from neuronet_jax.evaluation.agreement import Agreement
from neuronet_jax.images.space import Volume, spacing_mm, voxel_mm3
from neuronet_jax.labels import tissue_classes

BRAIN_MM3 = (6e5, 2.1e6)  # brain and CSF of adults take 1.0 to 1.9 litres; the margins are 40 % below and 10 % above
MOST_APART_ML = 10.0  # removed by the clean-up; of 15 reference maps it removes at most half a millilitre
LEAST_MM3 = 1e5  # tissue volume of the smallest piece of a brain that counts: a tenth of a litre
GREY_SHARE = (0.4, 0.85)  # GM / (GM + WM) over all protocols: brains .53 to .63, inverted .55 to .70; spheres .23, .28
LEAST_CONTRAST = 0.2  # correlation of intensity and depth: T1 .37 to .59, inverted -.20 to .01
LEAST_CONTRAST_CUT = 0.0  # for cut heads, whose cut face counts as surface and lowers the correlation: T1 .05 to .32
DEEPEST_MM = (
    20.0  # about where the ventricles begin: dark and deep, they would mask the contrast of cortex and white matter
)
CLOSED_MM = 6.0  # gaps in the labelled brain, such as sulci and missed voxels, that do not count as surface
BORDER_MM = 4.0  # two voxels of a 2 mm network, which often leaves the outermost voxel empty
LEAST_CUT = 0.3  # of the largest cross-section: a whole brain's outermost 4 mm have .12 (2d/R of a sphere)
LEAST_AGREEMENT = 0.7  # mean Dice between the two MALP-EM outputs, which label one anatomy; 0.95 or more on known scans
_CHECK_MM = 2.0  # resolution of the checks, which concern centimetres


def check(
    volume: Volume,
    maps: Mapping[str, np.ndarray],
    agreement: Agreement,
    removed: Mapping[str, int] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Returns sorted warnings about an answer that no whole T1-weighted head should give.

    W_CUT: the labelled brain ends at the border of the image, or of its non-zero part, and is not too large.

    W_NO_BRAIN: the brain is not cut, and there is hardly any tissue, or the share of grey matter fits no brain.

    W_CONTRAST: there is a brain, but not in T1 contrast: intensity does not rise from CSF over GM to WM, or not from
    the surface inwards. The first test uses the labels. The second uses their outline only, because a network that goes
    by intensity passes the first by calling bright CSF white matter.

    W_BRAIN_VOLUME: the labelled volume is too small or too large for an adult brain. If it is too large, labels that
    reach the border are neck or face, so W_CUT would be wrong.

    W_AGREEMENT: the two MALP-EM outputs contradict each other.

    W_PIECES: the clean-up removed much of a map; `removed` has the voxels by protocol.
    """
    per_voxel_mm3 = voxel_mm3(volume.affine)
    brains = [np.count_nonzero(ids) * per_voxel_mm3 for name, ids in maps.items() if name != "fsl_first"]
    found = set()
    if agreement.consistency < LEAST_AGREEMENT:
        found.add("W_AGREEMENT")
    if any(not BRAIN_MM3[0] <= brain <= BRAIN_MM3[1] for brain in brains):
        found.add("W_BRAIN_VOLUME")
    if any(voxels * per_voxel_mm3 / 1000 > MOST_APART_ML for voxels in removed.values()):
        found.add("W_PIECES")
    steps = [max(1, round(_CHECK_MM / side)) for side in spacing_mm(volume.affine)]
    coarse = tuple(slice(step // 2, None, step) for step in steps)
    image, sides_mm = volume.data[coarse], spacing_mm(volume.affine) * steps
    tissues = {name: _tissues(name, maps[name][coarse]) for name in agreement.voters}  # per protocol uint8 [x y z]
    if not tissues:  # FIRST alone has too few structures for these checks
        return tuple(sorted(found))
    brain = np.any([classes > 0 for classes in tissues.values()], axis=0)
    cut = cut_share(image, brain, sides_mm) > LEAST_CUT
    if cut and not any(volume_mm3 > BRAIN_MM3[1] for volume_mm3 in brains):
        found.add("W_CUT")
    if not cut and not _is_brain(list(tissues.values()), float(np.prod(sides_mm))):
        found.add("W_NO_BRAIN")
    elif not all(_rises(image, classes) for classes in tissues.values()) or (
        inward_contrast(image, brain, sides_mm) < (LEAST_CONTRAST_CUT if cut else LEAST_CONTRAST)
    ):
        found.add("W_CONTRAST")
    return tuple(sorted(found))


def inward_contrast(image: np.ndarray, brain: np.ndarray, sides_mm: np.ndarray) -> float:
    """Returns the correlation of intensity with the depth below the brain's surface, in its outer two centimetres.

    It is positive in T1 contrast: CSF and cortex lie outside and are dark, white matter lies inside and is bright. In
    T2 contrast all of that is reversed.
    """
    margin = 1 + int(np.ceil(CLOSED_MM / sides_mm.min()))
    ball = np.array(np.meshgrid(*(np.arange(-margin, margin + 1) * side for side in sides_mm), indexing="ij"))
    mask = ndimage.binary_closing(np.pad(brain, margin), (ball**2).sum(axis=0) <= (CLOSED_MM / 2) ** 2)
    mask = np.asarray(ndimage.binary_fill_holes(mask))
    depth_mm = np.asarray(ndimage.distance_transform_edt(mask, sampling=sides_mm))
    depth_mm = depth_mm[margin:-margin, margin:-margin, margin:-margin]
    shell = (depth_mm > 0) & (depth_mm <= DEEPEST_MM)
    if shell.sum() < 2 or np.ptp(image[shell]) == 0:
        return 0.0
    return float(np.corrcoef(image[shell], depth_mm[shell])[0, 1])


def cut_share(image: np.ndarray, brain: np.ndarray, sides_mm: np.ndarray) -> float:
    """Returns the brain's largest cross-section near a face of the image, as a share of its largest along the same
    axis.

    Faces are those of the box of all non-zero voxels, because a cut image may have been padded since.
    """
    (box,) = ndimage.find_objects((image != 0).astype(np.uint8)) or [None]
    if box is None or not brain.any():
        return 0.0
    shares = []
    for axis, side_mm in enumerate(sides_mm):
        areas = brain.sum(axis=tuple(other for other in range(3) if other != axis))
        depth = max(1, round(BORDER_MM / side_mm))
        first, last = box[axis].start, box[axis].stop
        shares += [areas[face].max() / areas.max() for face in (slice(first, first + depth), slice(last - depth, last))]
    return float(max(shares))


def _tissues(protocol: str, ids: np.ndarray) -> np.ndarray:
    """Returns 0 none, 1 CSF, 2 GM, 3 WM for every voxel."""
    return tissue_classes(protocol)[ids]


def _is_brain(tissues: Sequence[np.ndarray], voxel_mm3: float) -> bool:
    """Tells whether there is tissue in the proportions of a brain, from mean volumes over the protocols (single ones
    err more).
    """
    _, _, grey, white = np.mean([np.bincount(c.ravel(), minlength=4) for c in tissues], axis=0) * voxel_mm3
    return grey + white >= LEAST_MM3 and GREY_SHARE[0] <= grey / (grey + white) <= GREY_SHARE[1]


def _rises(image: np.ndarray, classes: np.ndarray) -> bool:
    """Tells whether mean intensity rises over CSF < GM < WM, as far as these are present."""
    means = [image[classes == index].mean(dtype=np.float64) for index in (1, 2, 3) if (classes == index).any()]
    return all(low < high for low, high in itertools.pairwise(means))
