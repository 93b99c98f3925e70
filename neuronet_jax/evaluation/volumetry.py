"""The brain as a whole, from the label maps of several tools: its mask, its volume, and that of the skull's inside."""

import math
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from neuronet_jax.images.space import voxel_mm3
from neuronet_jax.labels import REGIONS, TISSUES

# The tools that label whole brains, each by one map: MALP-EM's second map labels the same anatomy again.
_TOOLS = (("fsl_fast",), ("spm_tissue",), ("malp_em", "malp_em_tissue"))
_OF_ALL_CSF = ("fsl_fast", "spm_tissue")  # they label the CSF of the sulci too


def voxel_counts(maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns, per protocol, the number of voxels of every id, int64 [256]. `maps` has the tools' ids."""
    return {
        name: np.sum([np.bincount(plane.ravel(), minlength=256) for plane in ids], axis=0) for name, ids in maps.items()
    }  # plane by plane: planes fit the cache


def volumes_mm3(counts: Mapping[str, np.ndarray], affine: np.ndarray) -> dict[str, np.ndarray]:
    """Returns, per protocol, the volume of every id, float64 [256], in mm³. `counts` is from `voxel_counts`."""
    return {name: found * voxel_mm3(affine) for name, found in counts.items()}


def brain_mm3(mm3: Mapping[str, np.ndarray]) -> float:
    """Returns the volume of grey and white matter, the mean over the tools; NaN if none labels both.

    `mm3` is from `volumes_mm3`.
    """
    return _mean([_tissue_mm3(mm3, name, ("GM", "WM")) for name in _brains(mm3)])


def intracranial_mm3(mm3: Mapping[str, np.ndarray]) -> float:
    """Returns an estimate of the intracranial volume: CSF, grey and white matter, the mean of FAST and SPM.

    It is NaN without either of them. FAST and SPM label the CSF within the brain's mask, so the estimate leaves out
    what lies between that mask and the skull.
    """
    return _mean([_tissue_mm3(mm3, name, TISSUES) for name in _OF_ALL_CSF if name in mm3])


def brain_mask(maps: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Returns the voxels that at least half of the tools label, without holes: uint8 [x y z], 1 in the brain.

    `maps` has the tools' ids. Returns None if no tool labels whole brains.
    """
    names = _brains(maps)
    if not names:
        return None
    votes = np.sum([maps[name] > 0 for name in names], axis=0, dtype=np.uint8)
    return np.asarray(ndimage.binary_fill_holes(2 * votes >= len(names))).astype(np.uint8)


def _brains(found: Mapping[str, object]) -> list[str]:
    """Returns one protocol of each tool that labels whole brains."""
    return [name for tool in _TOOLS for name in [n for n in tool if n in found][:1]]


def _tissue_mm3(mm3: Mapping[str, np.ndarray], protocol: str, tissues: tuple[str, ...]) -> float:
    ids = {region.name: list(region.ids[protocol]) for region in REGIONS[: len(TISSUES)]}
    return float(sum(mm3[protocol][ids[tissue]].sum() for tissue in tissues))


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan
