"""Painted heads for training: whole-head label maps, and stripped brains with such heads around them.

    python -m data_prep.heads --maps=label_maps --store=stores/heads
    python -m data_prep.heads --maps=label_maps --brains=stores/cohort --store=stores/heads --voxel-size-mm=2
    python -m experiments.train --config=all_targets --config.data.store=stores/cohort --config.data.stores=stores/heads

A cohort of stripped brains teaches nothing about skull, face and neck, and a whole-head label map has no scan. The
store made here holds painted volumes (`neuronet_jax.tissues`), whose brightness every training step draws anew. Maps
have the ids of FreeSurfer, and those of the training maps of SynthSeg for what lies outside the brain. They teach
`fsl_first`, whose ids they share, and `malp_em_tissue`, into which MALP-EM merges the same structures. A brain teaches
what its store holds.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy import ndimage

from data_prep.assemble import default_grid
from data_prep.subject import bounding_box, content_hash
from neuronet_jax.errors import NeuronetError
from neuronet_jax.images import nifti, space
from neuronet_jax.labels import PROTOCOLS, TISSUES, tissue_classes
from neuronet_jax.programs import DONE, Parser, number, run
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import PAINTED, Record, Subject, sample_foreground
from neuronet_jax.store.writer import StoreWriter
from neuronet_jax.tissues import AIR, NUMBER, in_brain, to_tissues

TAUGHT = ("fsl_first", "malp_em_tissue")  # by label maps
_CSF = NUMBER["CSF around the brain"]
_WHITE = TISSUES.index("WM") + 1  # in `tissue_classes`
_INNER = (slice(4, -4),) * 3
_ANGLES = 32, 64  # polar and azimuthal bins of a brain's outline

# Tissues of malp_em_tissue by tissue of the label map: what MALP-EM merges, by the structures' names there.
_VENTRICLES, _DEEP, _CORTEX, _WM, _OTHER = 1, 2, 3, 4, 5
_MERGED = {
    "ventricles": _VENTRICLES,
    "choroid plexus": _VENTRICLES,
    "cerebral white matter": _WM,
    "lesion": _WM,
    "cerebellar white matter": _WM,
    "cerebral cortex": _CORTEX,
    "vessel in the brain": _OTHER,
    **dict.fromkeys(("thalamus", "caudate", "putamen", "pallidum", "hippocampus", "amygdala", "accumbens"), _DEEP),
    **dict.fromkeys(("ventral diencephalon", "brain stem", "cerebellar cortex", "optic chiasm"), _DEEP),
}


def build_heads(
    maps: Sequence[Path],
    dest: str,
    *,
    brains: Store | None = None,
    heads_per_brain: int = 4,
    validation: int = 2,
    voxel_size_mm: float = 1.0,
    progress: bool = False,
) -> int:
    """Writes the store of painted volumes at `dest` and returns their number.

    The last `validation` maps go to that split, and lend their heads to the brains of that split alone. Raises
    NeuronetError for a map with unknown ids or without a brain, too few maps, and brains with voxels of another size.
    """
    training = len(maps) - validation
    if training < 1 or validation < 0 or heads_per_brain < 0:
        raise NeuronetError(f"needs a map to train on or more, got {len(maps)} maps, {validation} of them to validate")
    grid = default_grid(voxel_size_mm)
    if brains and (brains.info.grid != grid or abs(brains.info.voxel_size_mm - voxel_size_mm) > 1e-3):
        raise NeuronetError(
            f"the brains lie on a grid of {brains.info.grid} voxels of {brains.info.voxel_size_mm:g} mm, the heads on "
            f"{grid} of {voxel_size_mm:g} mm; build the brains' store with that --voxel-size-mm and no --grid"
        )
    protocols = brains.info.protocols if brains else TAUGHT
    teaching = len(maps) if set(protocols) & set(TAUGHT) else 0  # the others only lend their heads
    pairs = _pairs(brains, heads_per_brain, {"train": range(training), "validation": range(training, len(maps))})
    slots = teaching + len(pairs)
    writer = StoreWriter.create(
        dest,
        protocols=protocols,
        grid=grid,
        voxel_size_mm=voxel_size_mm,
        slots=slots,
        shard_subjects=1,
        provenance={
            "image": PAINTED,
            "maps": [hashlib.sha256(path.read_bytes()).hexdigest() for path in maps],
            "brains": brains.info.subjects_hash if brains else "",
            "heads_per_brain": heads_per_brain,
        },
    )
    bar = track(range(slots), "painting heads", console=Console(stderr=True), disable=not progress)
    subjects = []
    for slot, (id_, split, image, labels) in zip(
        bar, _volumes(maps, training, protocols, brains, pairs, voxel_size_mm, grid), strict=True
    ):
        record = _record(slot, id_, split, image, labels, protocols, voxel_size_mm)
        writer.write_shard(slot, [record])
        subjects.append(record.subject)
    writer.finalize(subjects, [])
    return slots


Labels = dict[str, np.ndarray]  # protocol: classes, uint8 [x y z]


class _Pair(NamedTuple):
    """A brain and the map that lends it a head."""

    id: str
    brain: Subject
    map: int


def _pairs(brains: Store | None, heads_per_brain: int, maps_of: Mapping[str, range]) -> list[_Pair]:
    """Returns the pairs of each split. A brain gets a head once; the next brain begins with the next head."""
    pairs, seen = [], 0
    for split, maps in maps_of.items():
        for index, brain in enumerate(brains.split(split) if brains else []):
            seen += 1
            for turn in range(min(heads_per_brain, len(maps))):
                lender = maps[(index + turn) % len(maps)]
                pairs.append(_Pair(f"brain{seen:03d}head{turn + 1:02d}", brain, lender))
    return pairs


def _volumes(
    maps: Sequence[Path],
    training: int,
    protocols: Sequence[str],
    brains: Store | None,
    pairs: Sequence[_Pair],
    voxel_size_mm: float,
    grid: tuple[int, int, int],
) -> Iterator[tuple[str, str, np.ndarray, Labels]]:
    """Yields id, split, painted volume and labels: of every map, then of every pair."""
    heads = []
    for index, path in enumerate(maps):
        tissues, ids = read_map(path, voxel_size_mm, grid)
        heads.append(tissues)
        labels = {name: classes for name, classes in taught(tissues, ids).items() if name in protocols}
        if not labels:
            continue
        yield (
            f"map{index + 1:03d}",
            "train" if index < training else "validation",
            -tissues.astype(np.float32),
            labels,
        )
    for pair in pairs:
        assert brains is not None
        slot = pair.brain.slot
        names = [name for name, present in zip(protocols, pair.brain.present, strict=True) if present]
        labels = dict(zip(names, brains.read_labels(slot, names), strict=True))
        yield pair.id, pair.brain.split, around(brightness(brains.read_image(slot), labels), heads[pair.map]), labels


def read_map(path: Path, voxel_size_mm: float, grid: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tissue numbers, uint8 [x y z], and ids, int16, of a label map on the grid, around its brain."""
    volume = space.conform(nifti.read_labels(path), voxel_size_mm, is_label=True)
    ids = volume.data.astype(np.int16)
    brain = in_brain(to_tissues(ids))
    if not brain.any():
        raise NeuronetError(f"{path.name} holds no brain, by the ids in neuronet_jax/tissues.py")
    ids = space.place(ids, grid, space.crop_origin(ids.shape, grid, *bounding_box(brain)))
    return to_tissues(ids), ids


def taught(tissues: np.ndarray, ids: np.ndarray) -> Labels:
    """Returns the classes that a label map teaches: of FIRST's structures, and of MALP-EM's tissues."""
    first = PROTOCOLS["fsl_first"]
    merged = np.zeros(256, np.uint8)
    merged[[NUMBER[name] for name in _MERGED]] = list(_MERGED.values())
    return {"fsl_first": first.to_classes(np.where(np.isin(ids, first.ids), ids, 0)), "malp_em_tissue": merged[tissues]}


def brightness(image: np.ndarray, labels: Labels) -> np.ndarray:
    """Returns a stripped brain as brightness, float32 ≥ 0: white matter is 1. Raises NeuronetError without any."""
    for name in ("fsl_fast", "spm_tissue", "malp_em_tissue", "malp_em"):  # whose classes are their ids
        if name in labels and (white := tissue_classes(name)[labels[name]] == _WHITE).any():
            return np.maximum(image, 0) / np.float32(np.median(image[white]))
    raise NeuronetError("a brain needs white matter in fsl_fast, spm_tissue, malp_em or malp_em_tissue")


def around(brain: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Returns `brain` (brightness [x y z], 0 outside) in the head of a map of tissues, as a painted volume.

    In every direction from the middle of the brain, the head is stretched so that the surfaces of the two brains meet.
    What is left between brain and head is fluid.
    """
    scanned = brain > 0
    mine, its = _outline(_closed(scanned)), _outline(_closed(in_brain(head)))
    offset = np.indices(brain.shape, np.float32) - mine[0].astype(np.float32).reshape(3, 1, 1, 1)  # 3 x y z
    polar, azimuth = _directions(offset)
    stretch = its[1] / mine[1]  # [polar azimuth]
    ratio = ndimage.map_coordinates(stretch, [polar, azimuth], order=1, mode="nearest")
    source = np.rint(its[0].reshape(3, 1, 1, 1) + offset * ratio).astype(int)
    inside = np.all((source >= 0) & (source < np.reshape(head.shape, (3, 1, 1, 1))), axis=0)
    nearest = [np.clip(axis, 0, side - 1) for axis, side in zip(source, head.shape, strict=True)]
    tissues = np.where(inside, head[tuple(nearest)], AIR)
    tissues[in_brain(tissues) | ndimage.binary_dilation(scanned)] = _CSF
    return np.where(scanned, brain, -tissues.astype(np.float32)).astype(np.float32)


def _closed(mask: np.ndarray) -> np.ndarray:
    """Closes the sulci, so that the outline is that of the whole brain."""
    return np.asarray(ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(mask, 4), iterations=3)[_INNER]), bool)


def _outline(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the centre of a mask in voxels, and its radius in voxels by direction, smooth [polar azimuth]."""
    border = np.argwhere(mask & ~np.asarray(ndimage.binary_erosion(mask), bool))
    centre = np.argwhere(mask).mean(axis=0)
    offset = (border - centre).T
    polar, azimuth = (np.rint(angle).astype(int) for angle in _directions(offset))
    radius = np.zeros(_ANGLES)
    np.maximum.at(radius, (polar, azimuth % _ANGLES[1]), np.linalg.norm(offset, axis=0))
    empty = radius == 0
    nearest = ndimage.distance_transform_edt(empty, return_distances=False, return_indices=True)
    radius = np.pad(radius[tuple(nearest)], ((0, 0), (8, 8)), mode="wrap")  # type: ignore
    return centre, ndimage.gaussian_filter(radius, 1.5, mode="nearest")[:, 8:-8]


def _directions(offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the direction of offsets [3 …] in bins of `_outline`: polar angle from the top, azimuth."""
    x, y, z = offset
    polar = np.arccos(z / np.maximum(np.sqrt(x**2 + y**2 + z**2), 1e-6)) / np.pi * (_ANGLES[0] - 1)
    return polar, (np.arctan2(y, x) / (2 * np.pi) + 0.5) * (_ANGLES[1] - 1)


def _record(
    slot: int, id_: str, split: str, image: np.ndarray, labels: Labels, protocols: Sequence[str], voxel_size_mm: float
) -> Record:
    affine = np.diag([voxel_size_mm, voxel_size_mm, voxel_size_mm, 1.0])
    stacked = np.stack([labels.get(name, np.zeros(image.shape, np.uint8)) for name in protocols])
    present = tuple(name in labels for name in protocols)
    foreground = sample_foreground(stacked, present, seed=slot)
    rows = tuple(tuple(float(v) for v in row) for row in affine)
    subject = Subject(
        slot=slot,
        id=id_,
        split=split,
        present=present,
        mean=0.0,  # painted volumes are whitened when they are drawn
        std=1.0,
        source_shape=image.shape,
        source_affine=rows,
        affine=rows,
        conformed_shape=image.shape,
        origin=(0, 0, 0),
        content_hash=content_hash(image, stacked, foreground),
    )
    return Record(image, stacked, foreground, subject)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m data_prep.heads", description=__doc__)
    parser.add_argument(
        "--maps", type=Path, required=True, help="folder of whole-head label maps (.nii, .nii.gz, .mgz)"
    )
    parser.add_argument("--store", required=True, help="where the store is written: a folder, gs:// or s3://")
    parser.add_argument("--brains", help="a finished store of stripped brains, to put into the maps' heads")
    parser.add_argument("--heads-per-brain", type=number(int, 0), default=4, help="default: %(default)s")
    parser.add_argument(
        "--validation", type=number(int, 0), default=2, help="maps kept for validation (default: %(default)s)"
    )
    parser.add_argument("--voxel-size-mm", type=number(float, 0.2, 10), default=1.0, help="default: %(default)s")
    return run(parser, _heads, arguments)


def _heads(options: argparse.Namespace) -> int:
    if not options.maps.is_dir():
        raise NeuronetError(f"--maps: there is no folder {options.maps}; give the one that holds the label maps")
    maps = sorted(path for path in options.maps.iterdir() if path.name.endswith((".nii", ".nii.gz", ".mgz")))
    count = build_heads(
        maps,
        options.store,
        brains=Store.open(options.brains) if options.brains else None,
        heads_per_brain=options.heads_per_brain,
        validation=options.validation,
        voxel_size_mm=options.voxel_size_mm,
        progress=True,
    )
    print(f"{count} painted heads in {options.store}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
