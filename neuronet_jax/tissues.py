"""The tissues of whole-head label maps: what images are drawn from (`training/generate.py`).

A *painted* volume holds brightness and tissues at once: a voxel ≥ 0 is a scanned brightness, in which white matter is
1; a voxel −k is tissue k of `TISSUES`, whose brightness is drawn anew at every step. A label map becomes tissues only;
a stripped brain keeps its voxels, and the head around it is tissues.

Ids up to 85 are FreeSurfer's; 136 to 164 and 502 to 530 are those that the training maps of SynthSeg add (Billot et
al., Medical Image Analysis 86, 2023). Brightness within the brain was measured on six T1w scans of young adults, in
units of the median of white matter; outside the brain it follows from what T1 weighting does to fat, muscle, bone and
water.
"""

from dataclasses import dataclass

import numpy as np

from neuronet_jax.errors import NeuronetError


@dataclass(frozen=True)
class Tissue:
    """One tissue, and its brightness in T1-weighted images, in which white matter is 1."""

    name: str
    ids: tuple[int, ...]  # in whole-head label maps
    brightness: float
    spread: float  # standard deviation of the brightness between heads
    texture: float  # standard deviation within a head
    in_brain: bool = True


TISSUES = (
    Tissue("air", (0,), 0.02, 0.01, 0.0, in_brain=False),
    Tissue("cerebral white matter", (2, 41), 1.0, 0.03, 0.03),
    Tissue("cerebral cortex", (3, 42), 0.64, 0.04, 0.05),
    Tissue("ventricles", (4, 5, 14, 15, 43, 44), 0.29, 0.05, 0.03),
    Tissue("choroid plexus", (31, 63, 136, 137, 163, 164), 0.45, 0.1, 0.08),
    Tissue("cerebellar white matter", (7, 46), 0.96, 0.03, 0.04),
    Tissue("cerebellar cortex", (8, 47), 0.64, 0.04, 0.06),
    Tissue("thalamus", (10, 49), 0.83, 0.04, 0.05),
    Tissue("caudate", (11, 50), 0.70, 0.04, 0.04),
    Tissue("putamen", (12, 51), 0.79, 0.04, 0.04),
    Tissue("pallidum", (13, 52), 0.95, 0.04, 0.04),
    Tissue("brain stem", (16,), 0.87, 0.04, 0.05),
    Tissue("hippocampus", (17, 53), 0.65, 0.04, 0.05),
    Tissue("amygdala", (18, 54), 0.63, 0.04, 0.04),
    Tissue("accumbens", (26, 58), 0.67, 0.04, 0.04),
    Tissue("ventral diencephalon", (28, 60), 0.89, 0.04, 0.05),
    Tissue("lesion", (25, 57, 77, 78, 79), 0.75, 0.12, 0.08),
    Tissue("vessel in the brain", (30, 62), 0.65, 0.2, 0.1),
    Tissue("optic chiasm", (72, 85), 0.8, 0.08, 0.06),
    Tissue("CSF around the brain", (24,), 0.27, 0.06, 0.05, in_brain=False),
    Tissue("fluid", (502, 530), 0.35, 0.15, 0.1, in_brain=False),
    Tissue("eye", (506,), 0.25, 0.08, 0.04, in_brain=False),
    Tissue("soft tissue", (507,), 0.65, 0.15, 0.25, in_brain=False),
    Tissue("optic nerve", (508,), 0.75, 0.12, 0.08, in_brain=False),
    Tissue("mucosa", (509,), 0.55, 0.15, 0.12, in_brain=False),
    Tissue("skin", (511, 258), 0.9, 0.25, 0.15, in_brain=False),
    Tissue("spinal cord", (512,), 0.85, 0.06, 0.05, in_brain=False),
    Tissue("vein and dura", (514,), 0.6, 0.25, 0.15, in_brain=False),
    Tissue("compact bone", (515, 165), 0.12, 0.05, 0.06, in_brain=False),
    Tissue("marrow", (516,), 0.9, 0.25, 0.15, in_brain=False),
)  # fmt: skip
NUMBER = {tissue.name: k for k, tissue in enumerate(TISSUES, start=1)}
AIR = NUMBER["air"]


def to_tissues(ids: np.ndarray) -> np.ndarray:
    """Returns the tissue numbers, uint8 of the same shape, of a whole-head label map of integers.

    Raises NeuronetError, listing the values, for ids that no tissue has.
    """
    table = np.zeros(max(max(tissue.ids) for tissue in TISSUES) + 1, np.uint8)
    for k, tissue in enumerate(TISSUES, start=1):
        table[list(tissue.ids)] = k
    present = np.unique(ids)
    if unknown := [int(i) for i in present if not 0 <= i < len(table) or table[i] == 0]:
        raise NeuronetError(
            f"ids {unknown[:20]} of the label map are of no known tissue; neuronet_jax/tissues.py has their table"
        )
    return table[ids]


def in_brain(tissues: np.ndarray) -> np.ndarray:
    """Tells which voxels of a map of tissue numbers belong to the brain, without the CSF around it."""
    return np.array([False, *(tissue.in_brain for tissue in TISSUES)])[tissues]
