"""A phantom of the demo cohort: a warped template brain inside a synthetic head, labelled as by five tools.

Everything is drawn from one numpy generator. `draw_phantom` returns the T1-weighted image and the label maps on one
axis-aligned RAS+ grid. The tools' maps differ systematically (thresholds, smoothing, extent), as those of real tools
do.
"""

import dataclasses

import numpy as np
from scipy import interpolate, ndimage

from data_prep.demo.atlas import CSF, GM, WM, Atlas, tissue_of
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS

_KNOT_MM = 8.0  # spacing of the control points of the deformation

# Ellipsoids in MNI space: centre and half axes in mm.
_FACE = (
    ((0, 48, -58), (60, 46, 62)),
    ((0, 18, -84), (58, 66, 50)),
    ((0, 96, -46), (15, 14, 24)),  # nose
    ((0, -32, -110), (58, 62, 84)),  # neck
)
_ORGANS = (  # on both sides; later ones lie within earlier ones
    ("marrow", (0, -46, -95), (20, 20, 40)),  # vertebrae
    ("csf", (0, -44, -95), (10, 9, 60)),  # spinal canal
    ("cord", (0, -44, -95), (6, 5, 60)),
    ("fat", (34, 54, -36), (19, 22, 18)),  # orbit
    ("csf", (34, 60, -36), (12, 12, 12)),  # eye
    ("muscle", (34, 69, -36), (4, 2.5, 4)),  # lens
    ("air", (8, 56, -58), (6, 30, 20)),  # nasal cavity
    ("air", (28, 52, -64), (12, 14, 14)),  # maxillary sinus
    ("air", (5, 20, -42), (6, 8, 6)),  # sphenoid sinus
    ("air", (0, 6, -85), (9, 8, 30)),  # pharynx
)

_BRAIN_STEM = next(s.index for s in PROTOCOLS["malp_em"].structures if s.name == "BrainStem")


@dataclasses.dataclass(frozen=True)
class Phantom:
    """A T1-weighted image and its label maps."""

    image: np.ndarray  # int16[x y z]
    labels: dict[str, np.ndarray]  # protocol: uint8[x y z], the tool's ids


@dataclasses.dataclass(frozen=True)
class Lattice:
    """An axis-aligned RAS+ grid: `shape` voxels of `spacing_mm`, the first centred at `origin_mm`."""

    shape: tuple[int, int, int]
    spacing_mm: np.ndarray
    origin_mm: np.ndarray

    def axis_mm(self, axis: int) -> np.ndarray:
        return self.origin_mm[axis] + self.spacing_mm[axis] * np.arange(self.shape[axis])

    def smooth_noise(self, rng: np.random.Generator, scale_mm: float) -> np.ndarray:
        """Returns noise of about unit variance, float32[x y z], whose features are about `scale_mm` wide."""
        if scale_mm < 8 * self.spacing_mm.min():
            noise = ndimage.gaussian_filter(
                rng.standard_normal(self.shape, np.float32), 0.4 * scale_mm / self.spacing_mm
            )
            return noise / noise.std()
        knots = [_knots(self.axis_mm(axis), scale_mm / 2.5) for axis in range(3)]  # wide noise is drawn on few points
        noise = ndimage.gaussian_filter(rng.standard_normal([len(k) for k in knots]), 1.0)
        return self.spline(noise / noise.std(), knots)

    def spline(self, values: np.ndarray, knots_mm: list[np.ndarray]) -> np.ndarray:
        """Returns the tensor-product cubic spline through `values` at the knots, float32[x y z]."""
        for axis in range(3):  # [i j k] → [x j k] → [x y k] → [x y z]
            basis = interpolate.make_interp_spline(knots_mm[axis], np.eye(len(knots_mm[axis])), k=3)
            weights = basis(self.axis_mm(axis)).astype(np.float32)
            # einsum, not BLAS: the bytes must not depend on the number of threads
            moved = np.einsum("ni,i...->n...", weights, np.moveaxis(values.astype(np.float32), axis, 0))
            values = np.moveaxis(moved, 0, axis)
        return values


def draw_phantom(rng: np.random.Generator, atlas: Atlas, lattice: Lattice) -> Phantom:
    """Draws a head and its label maps. Before noise, white matter is 1 and air is 0."""
    points = _warp(rng, lattice)  # [x y z 3] in MNI space
    flat = points.reshape(-1, 3)
    near = np.flatnonzero(_in_box(flat, (-80, -115, -80), (80, 82, 92)))
    soft_brain = np.zeros(len(flat), np.float32)
    soft_brain[near] = atlas.sample("brain", flat[near])
    brain = (soft_brain > 0.5).reshape(lattice.shape)
    inside = np.flatnonzero(brain)
    gm, wm = _fractions(rng, atlas, flat[inside])
    structures = atlas.structures(flat[inside], tissue_of(gm, wm))
    malp_em = np.zeros(lattice.shape, np.uint8)
    malp_em.ravel()[inside] = structures
    to_white = np.where(structures == _BRAIN_STEM, 0.7 * gm, 0)  # grey in the template, but tools label it white
    gm, wm, t1 = gm - to_white, wm + to_white, atlas.sample("t1", flat[inside])

    csf, grey, white = rng.normal((0.28, 0.66, 1.0), (0.02, 0.03, 0.02))
    clean, gap = _surroundings(rng, lattice, points, _distance_mm(~brain, lattice), csf)
    detail = t1 - (
        0.35 * (1 - gm - wm) + 0.64 * gm + 0.84 * wm
    )  # the template's detail within tissues: the deep nuclei
    clean[brain] = csf * (1 - gm - wm) + grey * gm + white * wm + 1.2 * np.clip(detail, -0.12, 0.12)
    clean = ndimage.gaussian_filter(clean, 0.45)  # in voxels: the blur of a scan's own resolution
    labels = {
        "fsl_fast": _fast(rng, lattice, clean, gap, brain, gm, wm),
        "fsl_first": _first(lattice, malp_em),
        "spm_tissue": _spm(lattice, brain, gap, gm, wm, malp_em),
        "malp_em": malp_em,
        "malp_em_tissue": MALP_EM_TO_TISSUE[malp_em],
    }
    return Phantom(_scan(rng, lattice, clean), labels)


def _knots(axis_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    count = max(4, int(np.ceil((axis_mm[-1] - axis_mm[0]) / spacing_mm)) + 1)  # a cubic spline needs four
    return np.linspace(axis_mm[0], axis_mm[-1], count)


def _in_box(points: np.ndarray, low: tuple, high: tuple) -> np.ndarray:
    return np.logical_and.reduce([(points[:, i] > low[i]) & (points[:, i] < high[i]) for i in range(3)])


def _warp(rng: np.random.Generator, lattice: Lattice) -> np.ndarray:
    """Returns the point of MNI space at every voxel, float32[x y z 3]; smooth and without folds."""
    knots = [_knots(lattice.axis_mm(axis), _KNOT_MM) for axis in range(3)]
    grid = np.stack(np.meshgrid(*knots, indexing="ij"), axis=-1)  # [i j k 3]

    angles = rng.normal(0, np.radians(3), 3)
    scale = np.diag(1.04 + rng.normal(0, 0.025, 3))  # above 1: most brains are smaller than the template's
    linear = scale @ _rotation(angles)
    shift_mm = rng.normal(0, 2, 3)

    # Coarse differences of shape, and fine ones that vary the folds: (standard deviation, width) in mm.
    displacement = np.zeros(grid.shape)
    for amplitude_mm, width_mm in ((4.0, 30.0), (1.3, 9.0)):
        noise = ndimage.gaussian_filter(rng.standard_normal(grid.shape), (*[width_mm / _KNOT_MM] * 3, 0))
        displacement += amplitude_mm * noise / noise.std()
    swelling = rng.uniform(-0.25, 0.15)  # ventricles: negative is larger, since points are pulled towards the middle
    for side in (-1, 1):
        offset = grid - np.array([14.0 * side, -12.0, 15.0])  # the middle of a lateral ventricle
        displacement += swelling * offset * np.exp(-(offset**2).sum(axis=-1, keepdims=True) / (2 * 18.0**2))

    def target(strength: float) -> np.ndarray:
        return np.einsum("ab,...b->...a", linear, grid) + shift_mm + strength * displacement

    strength = 1.0
    while _smallest_jacobian(target(strength), knots) < 0.3:  # 1 means no change of volume, 0 a fold
        strength *= 0.9
    mapped = target(strength)
    return np.stack([lattice.spline(mapped[..., axis], knots) for axis in range(3)], axis=-1)


def _rotation(angles: np.ndarray) -> np.ndarray:
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[i, j], [i, j]], turn[i, j], turn[j, i] = np.cos(angle), -np.sin(angle), np.sin(angle)
        rotation = turn @ rotation
    return rotation


def _smallest_jacobian(mapped: np.ndarray, knots: list[np.ndarray]) -> float:
    gradients = np.stack(list(np.gradient(mapped, *knots, axis=(0, 1, 2))), axis=-1)  # [i j k 3 3]
    return float(np.linalg.det(gradients).min())


def _fractions(rng: np.random.Generator, atlas: Atlas, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns grey and white matter at the points, float32[n] each, with random atrophy; the rest is CSF."""
    gm, wm = atlas.sample("gm", points), atlas.sample("wm", points)
    csf = np.clip(1 - gm - wm, 0, 1)
    # The template is an average of many brains, so its grey matter is thick and blurred: squaring sharpens it.
    csf, gm, wm = (csf * rng.uniform(1.0, 1.6)) ** 2, gm**2, (wm * rng.uniform(1.05, 1.25)) ** 2
    total = np.maximum(csf + gm + wm, 1e-6)
    return gm / total, wm / total


def _ellipsoid(points: np.ndarray, center: tuple, radii: tuple) -> np.ndarray:
    """Returns about the distance in mm from the surface of an ellipsoid, float32, negative inside."""
    scaled = (points - np.array(center, np.float32)) / np.array(radii, np.float32)
    return (np.sqrt((scaled**2).sum(axis=-1)) - 1) * np.float32(min(radii))


def _distance_mm(mask: np.ndarray, lattice: Lattice) -> np.ndarray:
    """Returns the distance from the voxels outside `mask`, float32[x y z], 0 there."""
    return np.asarray(ndimage.distance_transform_edt(mask, sampling=lattice.spacing_mm), np.float32)


def _surroundings(
    rng: np.random.Generator, lattice: Lattice, points: np.ndarray, outside_mm: np.ndarray, csf: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the head without its brain, float32[x y z] on the scale of `draw_phantom`, and a mask of the outer CSF.

    `outside_mm` is the distance from the brain.
    """
    thickness = 1 + 0.12 * np.clip(lattice.smooth_noise(rng, 40), -2, 2)
    csf_mm = 2.0 * thickness
    skull_mm = csf_mm + rng.uniform(5.5, 7.5) * thickness
    face = np.minimum.reduce([_ellipsoid(points, *part) for part in _FACE])
    body = np.minimum(outside_mm - skull_mm - rng.uniform(5, 8) * thickness, face)
    # Smoothing joins the parts with soft creases; odd reflection lets the head end at the border without flaring out.
    padded = np.pad(body, 8, mode="reflect", reflect_type="odd")
    body = ndimage.gaussian_filter(padded, 5.0 / lattice.spacing_mm)[8:-8, 8:-8, 8:-8]
    depth_mm = _distance_mm(body < 0, lattice)

    means, deviations = (0.5, 1.1, 0.55, 0.08, 0.55), (0.04, 0.1, 0.06, 0.01, 0.04)
    muscle, fat, marrow, bone, skin = rng.normal(means, deviations)
    bones, fats = lattice.smooth_noise(rng, 14), lattice.smooth_noise(rng, 9)
    head = muscle + 0.04 * fats
    head[fats > 1.4] = fat
    head[bones > 0.9] = bone
    head[bones > 1.5] = marrow
    mirrored = np.concatenate([np.abs(points[..., :1]), points[..., 1:]], axis=-1)  # one eye stands for two
    values = {"muscle": muscle, "fat": fat, "marrow": marrow, "csf": csf, "cord": 0.85, "air": 0.02}
    for matter, *part in _ORGANS:
        head[_ellipsoid(mirrored, *part) < 0] = values[matter]
    head[depth_mm < 6.0 * thickness] = fat
    head[depth_mm < 2.2] = skin

    shell = (outside_mm - csf_mm) / (skull_mm - csf_mm)  # 0 at the inner table of the skull, 1 at the outer
    diploe = (np.abs(shell - 0.5) < 0.2) & (lattice.smooth_noise(rng, 15) > -0.5)
    eye = _ellipsoid(mirrored, (34, 60, -36), (13, 15, 13)) < 0
    skull = (shell < 1) & (points[..., 2] > -60) & ~eye  # below, the cord leaves it
    head[skull] = np.where(diploe, marrow, bone)[skull]
    head[body >= 0] = 0
    gap = (outside_mm > 0) & (outside_mm < csf_mm)
    head[gap] = csf
    return head, gap


def _scan(rng: np.random.Generator, lattice: Lattice, clean: np.ndarray) -> np.ndarray:
    """Returns the head as scanned, int16, with contrast, bias field, Rician noise and the scanner's own scale."""
    contrast = np.clip(clean, 0, None) ** rng.uniform(0.85, 1.2)
    bias = np.exp(rng.uniform(0.06, 0.16) * lattice.smooth_noise(rng, 90))
    sigma = rng.uniform(0.02, 0.045)
    real = contrast * bias + sigma * rng.standard_normal(clean.shape, np.float32)
    imaginary = sigma * rng.standard_normal(clean.shape, np.float32)
    return np.round(np.hypot(real, imaginary) * rng.uniform(400, 1200)).astype(np.int16)


def _fast(
    rng: np.random.Generator,
    lattice: Lattice,
    clean: np.ndarray,
    gap: np.ndarray,
    brain: np.ndarray,
    gm: np.ndarray,
    wm: np.ndarray,
) -> np.ndarray:
    """Labels as FAST: thresholds of bias-corrected, denoised intensities in BET's mask, with some outer CSF."""
    values = clean[brain]
    levels = [np.median(values[mask]) for mask in (gm + wm < 0.15, gm > 0.85, wm > 0.85)]
    noisy = clean + 0.02 * lattice.smooth_noise(rng, 4)
    mask = brain | (gap & (ndimage.gaussian_filter(brain.astype(np.float32), 1.0) > 0.3))
    low = 0.45 * levels[0] + 0.55 * levels[1]  # FAST counts partial volume at the pia as CSF
    high = 0.52 * levels[1] + 0.48 * levels[2]
    return np.where(mask, 1 + (noisy > low).astype(np.uint8) + (noisy > high), 0).astype(np.uint8)


def _spm(
    lattice: Lattice, brain: np.ndarray, gap: np.ndarray, gm: np.ndarray, wm: np.ndarray, malp_em: np.ndarray
) -> np.ndarray:
    """Labels as SPM: the largest smoothed tissue probability. CSF reaches the skull; priors keep deep nuclei grey."""
    maps = np.zeros((3, *brain.shape), np.float32)  # GM, WM, CSF
    maps[0][brain], maps[1][brain], maps[2][brain] = gm, wm, 1 - gm - wm
    maps[2][gap] = 1
    deep = np.isin(malp_em, [s.index for s in PROTOCOLS["malp_em"].structures if s.mapping == 9])
    maps[0] += 0.2 * deep
    maps[1] -= 0.2 * deep
    maps = np.stack([ndimage.gaussian_filter(m, 1.0 / lattice.spacing_mm) for m in maps])
    odds = np.array([1.0, 0.9, 1.5], np.float32).reshape(
        3, 1, 1, 1
    )  # SPM's cortex is thinner than FAST's, its CSF wider
    winner = np.array([GM, WM, CSF], np.uint8)[(maps * odds).argmax(axis=0)]
    return np.where(maps.sum(axis=0) > 0.45, winner, 0).astype(np.uint8)


def _first(lattice: Lattice, malp_em: np.ndarray) -> np.ndarray:
    """Labels as FIRST: smooth surfaces, each structure systematically larger or smaller than MALP-EM's."""
    protocol, twins = PROTOCOLS["fsl_first"], {s.name: s.index for s in PROTOCOLS["malp_em"].structures}
    classes, best = np.zeros(malp_em.shape, np.uint8), np.zeros(malp_em.shape, np.float32)
    boxes = ndimage.find_objects(malp_em, max_label=138)
    for structure in protocol.structures[1:]:
        box = boxes[twins[structure.name] - 1]
        if box is None:
            continue
        box = tuple(slice(max(0, s.start - 3), s.stop + 3) for s in box)
        soft = ndimage.gaussian_filter(
            (malp_em[box] == twins[structure.name]).astype(np.float32), 1.2 / lattice.spacing_mm
        )
        kind = min(structure.index, structure.partner)  # both sides have the same bias
        margin = soft - (0.42 + 0.03 * (kind % 5))
        wins = (margin > 0) & (margin > best[box])
        classes[box][wins], best[box][wins] = structure.index, margin[wins]
    return protocol.to_ids(classes)
