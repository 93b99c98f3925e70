"""The anatomy of the demo cohort in MNI space: tissue maps, and a model of the MALP-EM structures within them.

Tissues come from the MNI152 2009a templates inside the nilearn package. A structure is a cell of a power diagram (an
additively weighted Voronoi diagram; Aurenhammer, SIAM J. Comput. 16, 1987): the points of its tissue at which |x −
centre|² − weight is smallest among its competitors. Centres are the centroids of `neuronet_jax.labels`, and the weights
are fitted until the cells have the volumes given there. Every structure thus has a plausible place and size, but not
its true outline: enough for a demonstration, not an atlas.
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from neuronet_jax.labels import MALP_EM_CENTROIDS_MM, MALP_EM_VOLUMES_MM3, PROTOCOLS

CSF, GM, WM = 1, 2, 3  # tissue classes, 0 outside the brain; the ids of `fsl_fast` and `spm_tissue`

# Relative half axes along x, y, z of the structures that are far from round.
_STRETCH = {
    "3rdVentricle": (0.4, 1.5, 1.3),
    "BrainStem": (0.8, 0.9, 1.6),
    "Caudate": (0.6, 1.5, 1.2),
    "Hippocampus": (0.8, 1.7, 0.8),
    "LateralVentricle": (0.7, 1.9, 1.0),
    "Putamen": (0.6, 1.5, 1.1),
}

# Groups claim voxels one after the other, each from the remainder: (classes of malp_em, tissues that they claim,
# whether cells end where |x − centre|² = weight instead of sharing the whole remainder). In no group: the cerebral
# exterior (14, 15), which has no centroid in the table, and the vessels (33, 34), as small as a voxel of 2 mm.
_GROUPS = (
    ((1, 2, 18, 21, 22, 23, 24), (CSF,), True),
    ((3, 4, 5, 6, 8, 9, 19, 20, 27, 28, 39, 40), (GM,), True),
    ((7, 25, 26, 29, 30, 31, 32), (GM, WM), True),  # on T1 these are a mixture of tissues
    ((35,), (CSF, GM, WM), True),  # the optic chiasm: a few voxels
    ((10, 11, 36, 37, 38, *range(41, 139)), (GM,), False),
    ((12, 13, 16, 17), (WM,), False),
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Structures that compete for the same voxels: one power diagram per hemisphere."""

    classes: np.ndarray  # int64[s] classes of malp_em
    tissues: tuple[int, ...]
    bounded: bool
    sides: np.ndarray  # int64[s]: −1 left, 1 right, 0 both
    quadric: np.ndarray  # float32[7, s]: (x², y², z², x, y, z, 1) @ quadric = |(x − centre) / stretch|²
    weights: np.ndarray  # float32[s] in mm²

    def claim(self, points_mm: np.ndarray) -> np.ndarray:
        """Returns uint8[n]: the class of malp_em that claims each of the points [n, 3], or 0."""
        labels = np.zeros(len(points_mm), np.uint8)
        for side in (-1, 1):
            here = np.flatnonzero((points_mm[:, 0] >= 0) == (side > 0))
            members = np.flatnonzero(self.sides != -side)
            if not len(here) or not len(members):
                continue
            points = points_mm[here].astype(np.float32)
            basis = np.concatenate([points**2, points, np.ones_like(points[:, :1])], axis=1)  # [n, 7]
            # [n, s]; einsum, not BLAS: the result must not depend on the number of threads
            powers = np.einsum("nq,qs->ns", basis, self.quadric[:, members]) - self.weights[members]
            nearest = powers.argmin(axis=1)
            claimed = self.classes[members[nearest]]
            labels[here] = np.where(powers.min(axis=1) < 0, claimed, 0) if self.bounded else claimed
        return labels


@dataclasses.dataclass(frozen=True)
class Atlas:
    """Template maps, uint8[x y z] with 255 for 1, on a grid of 1 mm whose first voxel lies at `origin_mm` (RAS+)."""

    t1: np.ndarray
    gm: np.ndarray
    wm: np.ndarray
    brain: np.ndarray
    origin_mm: np.ndarray
    groups: tuple[Group, ...]

    def sample(self, name: str, points_mm: np.ndarray) -> np.ndarray:
        """Returns the named map at points [n, 3], float32[n] in 0..1: linear between voxels, 0 outside."""
        coordinates = (points_mm - self.origin_mm.astype(np.float32)).T
        return ndimage.map_coordinates(getattr(self, name), coordinates, np.float32, order=1) / np.float32(255)

    def structures(self, points_mm: np.ndarray, tissue: np.ndarray) -> np.ndarray:
        """Returns the class of malp_em at points [n, 3] in MNI space with tissue[n], uint8[n]; 0 in the CSF around the
        brain.
        """
        labels = np.zeros(len(points_mm), np.uint8)
        for group in self.groups:
            free = np.flatnonzero((labels == 0) & np.isin(tissue, group.tissues))
            labels[free] = group.claim(points_mm[free])
        return labels


@functools.lru_cache(maxsize=2)
def load_atlas(voxel_size_mm: float) -> Atlas:
    """Loads the atlas, smoothed for sampling at `voxel_size_mm`. The first call takes seconds; the result is cached."""
    from nilearn import datasets  # imported here: it takes seconds, and the workers do not need it

    image = datasets.load_mni152_template(resolution=1)
    maps = {
        "t1": image,
        "gm": datasets.load_mni152_gm_template(resolution=1),
        "wm": datasets.load_mni152_wm_template(resolution=1),
    }
    arrays = {name: np.asarray(map_.dataobj, np.float32) for name, map_ in maps.items()}
    arrays["brain"] = ndimage.binary_closing(np.pad(arrays["t1"] > 0, 4), iterations=3)[4:-4, 4:-4, 4:-4].astype(
        np.float32
    )
    sigma_voxels = 0.3 * voxel_size_mm  # against aliasing: the template's voxels are 1 mm
    coded = {
        name: np.round(255 * ndimage.gaussian_filter(array, sigma_voxels)).clip(0, 255).astype(np.uint8)
        for name, array in arrays.items()
    }
    atlas = Atlas(**coded, origin_mm=image.affine[:3, 3], groups=())

    # A coarse sample of the brain is enough to fit the weights, except those of the small structures.
    coarse, fine = (_points_of_brain(atlas, step_voxels) for step_voxels in (3, 2))
    groups: list[Group] = []
    for classes, tissues, bounded in _GROUPS:
        points, step_mm = (fine, 2) if bounded else (coarse, 3)
        tissue = tissue_of(atlas.sample("gm", points), atlas.sample("wm", points))
        taken = dataclasses.replace(atlas, groups=tuple(groups)).structures(points, tissue) > 0
        open_points = points[np.isin(tissue, tissues) & ~taken]
        groups.append(_fit(_make_group(classes, tissues, bounded), open_points, step_mm**3))
    return dataclasses.replace(atlas, groups=tuple(groups))


def tissue_of(gm: np.ndarray, wm: np.ndarray) -> np.ndarray:
    """Returns uint8: the most probable tissue, where the remainder of a brain voxel is CSF."""
    return (np.stack([1 - gm - wm, gm, wm]).argmax(axis=0) + 1).astype(np.uint8)


def _points_of_brain(atlas: Atlas, step_voxels: int) -> np.ndarray:
    inside = np.argwhere(atlas.brain[::step_voxels, ::step_voxels, ::step_voxels] > 127)
    return inside * np.float64(step_voxels) + atlas.origin_mm


def _make_group(classes: Iterable[int], tissues: tuple[int, ...], bounded: bool) -> Group:
    indices = np.array(list(classes))
    structures = [PROTOCOLS["malp_em"].structures[i] for i in indices]
    names = [structure.name.removeprefix("Left").removeprefix("Right") for structure in structures]
    stretch = np.array([_STRETCH.get(name, (1.0, 1.0, 1.0)) for name in names])
    stretch /= np.cbrt(stretch.prod(axis=1, keepdims=True))  # keeps the volume of a ball of the same weight
    centers, scale = MALP_EM_CENTROIDS_MM[indices], stretch**-2
    quadric = np.concatenate([scale, -2 * scale * centers, (scale * centers**2).sum(axis=1, keepdims=True)], axis=1).T
    sides = np.array([{"left": -1, "right": 1}.get(structure.side, 0) for structure in structures])
    weights = _squared_radius(MALP_EM_VOLUMES_MM3[indices])
    return Group(indices, tissues, bounded, sides, quadric.astype(np.float32), weights.astype(np.float32))


def _squared_radius(volume_mm3: np.ndarray) -> np.ndarray:
    """Returns the squared radius of the ball of that volume, in mm²."""
    return (volume_mm3 * 3 / (4 * np.pi)) ** (2 / 3)


def _fit(group: Group, points_mm: np.ndarray, point_mm3: float) -> Group:
    """Fits the group's weights so that its cells among the points have the volumes of the table.

    An unbounded group shares out all points. Its targets are the table's volumes, scaled to fill each hemisphere.
    """
    if group.bounded:  # far points cannot be claimed
        low, high = MALP_EM_CENTROIDS_MM[group.classes].min(0) - 40, MALP_EM_CENTROIDS_MM[group.classes].max(0) + 40
        points_mm = points_mm[((points_mm > low) & (points_mm < high)).all(axis=1)]
    targets = MALP_EM_VOLUMES_MM3[group.classes].copy()
    for side in () if group.bounded else (-1, 1):
        room = ((points_mm[:, 0] >= 0) == (side > 0)).sum() * point_mm3 - targets[group.sides == 0].sum() / 2
        targets[group.sides == side] *= room / targets[group.sides == side].sum()
    for iteration in range(60):
        volumes = np.bincount(group.claim(points_mm), minlength=256)[group.classes] * point_mm3
        if (np.abs(volumes - targets) <= 0.04 * targets + 2 * point_mm3).all():
            break
        # The exact step for a single ball; halved later, so that neighbours do not oscillate.
        step = (_squared_radius(targets) - _squared_radius(volumes)) * (1.0 if iteration < 30 else 0.5)
        group = dataclasses.replace(group, weights=group.weights + step.astype(np.float32))
    return group
