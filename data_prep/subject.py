"""Turns one subject's files into a record of the store: read, check, conform, place on the common grid."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_prep.sources.source import Source
from neuronet_jax.errors import RejectError
from neuronet_jax.images import intensity, nifti, space
from neuronet_jax.images.headers import DEFAULT_LIMITS, Limits
from neuronet_jax.labels import MALP_EM_TO_TISSUE, MALP_EM_VOLUMES_MM3, PROTOCOLS, Protocol
from neuronet_jax.store.schema import Record, Subject, sample_foreground

_GEOMETRY_TOLERANCE_MM = 0.1  # tools rewrite affines in float32; 0.1 mm moves no label


@dataclass(frozen=True)
class Settings:
    """The preparation settings of a store, the same for all its subjects."""

    protocols: tuple[str, ...]
    grid: tuple[int, int, int]
    voxel_size_mm: float
    missing: Literal["keep", "reject"] = "keep"
    resample_labels: bool = False  # accept label maps on a different grid than the image's
    limits: Limits = DEFAULT_LIMITS


def prepare(source: Source, slot: int, settings: Settings) -> Record:
    """Returns the record of one subject.

    Raises RejectError if its files cannot be trusted (codes of `nifti` and `labels`, and E_MISSING_MAP, E_GEOMETRY,
    E_LABEL_IMAGE, E_LABEL_EMPTY, E_CONSTANT).
    """
    absent = [name for name in settings.protocols if name not in source.labels]
    if len(absent) == len(settings.protocols):
        raise RejectError("E_MISSING_MAP", "all label maps are missing")
    if absent and settings.missing == "reject":
        raise RejectError("E_MISSING_MAP", f"no {', '.join(absent)} map (--missing=keep trains on the others)")
    warnings = ["W_MISSING_MAP"] if absent else []

    volume = nifti.read_image(source.t1, settings.limits)
    warnings += volume.warnings
    conformed = space.conform(volume, settings.voxel_size_mm, is_label=False)
    image, notes = intensity.clip_spikes(conformed.data)
    warnings += notes
    statistics = intensity.statistics(image)  # before padding, as in inference
    intensity.refuse_label_map(volume.data)

    maps = {}
    for name in settings.protocols:
        if name in source.labels:
            classes, notes = _read_classes(source, PROTOCOLS[name], volume, settings)
            maps[name] = space.conform(volume.holding(classes), settings.voxel_size_mm, is_label=True).data
            warnings += notes
    warnings += _check_maps(maps, conformed.affine)

    labelled = np.zeros(image.shape, bool)
    for classes in maps.values():
        labelled |= classes > 0
    origin = space.crop_origin(image.shape, settings.grid, *bounding_box(labelled))
    if np.count_nonzero(space.place(labelled, settings.grid, origin)) < np.count_nonzero(labelled):
        warnings.append("W_CROPPED_LABEL")
    labels = np.zeros((len(settings.protocols), *settings.grid), np.uint8)  # [p x y z]
    for index, name in enumerate(settings.protocols):
        if name in maps:
            labels[index] = space.place(maps[name], settings.grid, origin)
    stored = space.place(image, settings.grid, origin)
    present = tuple(name in maps for name in settings.protocols)
    foreground = sample_foreground(labels, present, seed=int(hashlib.sha256(source.id.encode()).hexdigest()[:8], 16))
    subject = Subject(
        slot=slot,
        id=source.id,
        split=source.split,
        present=present,
        mean=statistics.mean,
        std=statistics.std,
        source_shape=volume.data.shape,
        source_affine=_tuples(volume.affine),
        affine=_tuples(space.shifted(conformed.affine, origin)),
        conformed_shape=image.shape,
        origin=origin,
        warnings=tuple(sorted(set(warnings))),
        content_hash=content_hash(stored, labels, foreground),
        visit=source.visit,
    )
    return Record(stored, labels, foreground, subject)


def content_hash(image: np.ndarray, labels: np.ndarray, foreground: np.ndarray) -> str:
    """Returns two concatenated sha256: of the stored image, which identifies duplicates, and of everything else."""
    image_hash, rest = hashlib.sha256(np.ascontiguousarray(image).data), hashlib.sha256()
    for array in (labels, foreground):
        rest.update(np.ascontiguousarray(array).data)  # of the memory itself: a copy takes as long as its hash
    return image_hash.hexdigest() + rest.hexdigest()


def _read_classes(
    source: Source, protocol: Protocol, image: space.Volume, settings: Settings
) -> tuple[np.ndarray, Sequence[str]]:
    """Returns the label map as class indices on the image's grid, and its warnings."""
    try:
        volume = nifti.read_labels(source.labels[protocol.name], settings.limits)
        warnings = list(volume.warnings)
        classes = protocol.to_classes(volume.data)
        gap_mm = _gap_mm(volume, image)
        if gap_mm > _GEOMETRY_TOLERANCE_MM:
            if not settings.resample_labels:
                raise RejectError(
                    "E_GEOMETRY",
                    f"its grid {volume.data.shape} differs from the image's {image.data.shape} (by {gap_mm:.3g} mm); "
                    "--resample-labels takes the nearest voxels",
                )
            classes = space.to_grid(volume.holding(classes), image.grid)
            warnings.append("W_RESAMPLED")
        if not classes.any():
            raise RejectError("E_LABEL_EMPTY", "the map is all background; did the tool fail?")
    except RejectError as error:
        raise RejectError(error.code, f"{protocol.name} map: {error.reason}") from error
    return classes, warnings


def _gap_mm(a: space.Volume, b: space.Volume) -> float:
    """Returns the largest distance between corresponding corners of two grids, infinite if the shapes differ."""
    if a.data.shape != b.data.shape:
        return float("inf")
    corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, side - 1) for side in a.data.shape))])
    return float(np.linalg.norm(corners @ (a.affine - b.affine).T, axis=1).max())


def _check_maps(maps: dict[str, np.ndarray], affine: np.ndarray) -> list[str]:
    """Returns warnings about the content of conformed class maps (RAS+)."""
    warnings = []
    for name, classes in maps.items():
        protocol = PROTOCOLS[name]
        # [x k]: voxels of each class in each sagittal plane
        counts = np.array([np.bincount(plane.ravel(), minlength=protocol.num_classes) for plane in classes])
        expected = MALP_EM_VOLUMES_MM3 > 0 if name == "malp_em" else np.ones(protocol.num_classes, bool)
        if np.any(expected[1:] & (counts.sum(axis=0)[1:] == 0)):
            warnings.append("W_LABEL_MISSING")
        if _is_mirrored(protocol, counts):
            warnings.append("W_LR_SWAP")
    structures, tissues = maps.get("malp_em"), maps.get("malp_em_tissue")
    if structures is not None and tissues is not None and np.any(MALP_EM_TO_TISSUE[structures] != tissues):
        warnings.append("W_TISSUE_MISMATCH")  # the tissue map is a fixed merge of the structure map
    return warnings


def _is_mirrored(protocol: Protocol, counts: np.ndarray) -> bool:
    """Tells whether most left structures lie to the right of their partners. In `counts` [x k], x points right."""
    totals = counts.sum(axis=0)
    centroids = (np.arange(len(counts)) @ counts) / np.maximum(totals, 1)  # [k]
    left = [s for s in protocol.structures if s.side == "left" and totals[s.index] and totals[s.partner]]
    swapped = sum(centroids[s.index] > centroids[s.partner] for s in left)
    return 2 * swapped > len(left)


def bounding_box(mask: np.ndarray) -> tuple[list[int], list[int]]:
    """Returns the first voxel, and one past the last, along each axis of a non-empty mask."""
    low, high = [], []
    for axis in range(3):
        along = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low.append(int(along[0]))
        high.append(int(along[-1]) + 1)
    return low, high


def _tuples(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(v) for v in row) for row in affine)
