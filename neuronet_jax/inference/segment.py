"""From an image to label maps on its own grid: `restore` a trained model, then `segment` scans with it.

An image is conformed (RAS+, the model's voxel size), whitened, padded to a shape bucket and run through the network.
Class scores are interpolated onto the input's grid, and become tool ids in the input's order of axes. If only flips and
permutations lie between the grids, nothing is interpolated. Interpolated scores are more accurate than labels of the
nearest voxel, most of all for small structures (figures in `docs/performance.md`). Volumes too large for memory go
through the network in tiles, with the same labels as the whole volume.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import nibabel as nib
import numpy as np
from jaxtyping import Float, UInt8
from nibabel.spatialimages import SpatialImage

from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.images import intensity, nifti, space
from neuronet_jax.inference.cleanup import clean_up
from neuronet_jax.inference.onto_grid import Reading
from neuronet_jax.inference.segmentation import Confidence, Options, Segmentation, posterior
from neuronet_jax.inference.volume import Result, read_volume
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.models.readout import spans
from neuronet_jax.runs.model import Model, ensemble
from neuronet_jax.runs.restore import restore

__all__ = ["Model", "ensemble", "predict", "restore", "segment", "segment_volume"]

DEFAULT = Options()
# A voxel of the head is brighter than this share of the brightest percentile; air and ghosting stay below.
HEAD_BRIGHTNESS = 0.1
HEAD_SHARE = 0.01  # least share of bright voxels in a plane through the head
HEAD_MARGIN_MM = 10.0  # margin around the head in fast mode, so that its border is not the volume's
WHOLE_VOXELS = 1e-3  # offset of two grids, in voxels, below which nothing is interpolated


@overload
def segment(
    model: Model, image: np.ndarray, protocols: Sequence[str] | None = None, options: Options = DEFAULT
) -> dict[str, np.ndarray]: ...
@overload
def segment(
    model: Model, image: str | Path | SpatialImage, protocols: Sequence[str] | None = None, options: Options = DEFAULT
) -> dict[str, nib.Nifti1Image]: ...
def segment(
    model: Model, image: Any, protocols: Sequence[str] | None = None, options: Options = DEFAULT
) -> dict[str, Any]:
    """Returns the label map of each protocol (default: all of the model's), in the tool's own ids.

    `image` holds raw intensities. It is an array [x y z] in RAS+ order at the model's voxel size, or the path of a
    .nii, .nii.gz or .mgz file or a nibabel image, both in any orientation and voxel size. An array gives uint8 arrays
    of its shape. A file or a nibabel image gives NIfTI images on its grid, with its qform, sform and codes. Raises
    RejectError with a code if the image is unusable, and NeuronetError for protocols that the model lacks.
    """
    if not isinstance(model, Model):
        raise NeuronetError("the model comes first, as in segment(neuronet_jax.restore(), image)")
    if image is None or (
        isinstance(image, (list, tuple)) and any(isinstance(one, (str, os.PathLike)) for one in image)
    ):
        raise NeuronetError("segment takes one image at a time: a path, a nibabel image, or an array [x y z]")
    if isinstance(image, (str, os.PathLike, SpatialImage)):
        volume = nifti.check_image(image) if isinstance(image, SpatialImage) else _read(Path(image))
        maps = _segment(model, volume, protocols, options, confidence=False).maps
        return {name: nifti.labels_image(labels, volume) for name, labels in maps.items()}
    array = np.asarray(image)
    if array.ndim != 3:
        raise RejectError("E_NDIM", f"one three-dimensional image [x y z] is needed, got the shape {array.shape}")
    if array.dtype.kind not in "iuf":
        raise RejectError("E_DTYPE", f"voxels must be plain integers or floats, got {array.dtype}")
    volume = space.Volume(array, np.diag([model.voxel_size_mm] * 3 + [1.0]))
    return _segment(model, volume, protocols, options, confidence=False).maps


def _read(path: Path) -> space.Volume:
    """Reads an image. An error names the file, unlike those for the tables and pages of a cohort, which others see."""
    try:
        return nifti.read_image(path)
    except RejectError as error:
        raise RejectError(error.code, f"{path}: {error.reason}") from error


def check_request(model: Model, protocols: Sequence[str], options: Options) -> None:
    """Raises NeuronetError if the model cannot give these protocols with these options, before any image is read."""
    _plan(model, protocols, options, confidence=False)


def segment_volume(
    model: Model, volume: space.Volume, protocols: Sequence[str] | None = None, options: Options = DEFAULT
) -> Segmentation:
    """Segments a checked volume. Returns labels, confidence and posteriors, with the maps on the volume's own grid."""
    return _segment(model, volume, protocols, options, confidence=not options.fast)


def _segment(
    model: Model, volume: space.Volume, protocols: Sequence[str] | None, options: Options, confidence: bool
) -> Segmentation:
    plan = _plan(model, protocols, options, confidence)
    conformed = space.conform(volume, model.voxel_size_mm, is_label=False)
    order, positions = space.walked(conformed.affine, volume.grid) or ((0, 1, 2), [])
    whole = all(np.abs(p - np.rint(p)).max() < WHOLE_VOXELS for p in positions)  # nothing to interpolate
    whitened, background, warnings = _whiten(conformed.data)
    if options.fast:
        box = _head_box(conformed.data, model.voxel_size_mm)
        classes = np.zeros((len(plan.read), *whitened.shape), np.uint8)
        found = predict(model, np.ascontiguousarray(whitened[box]), background)
        classes[(slice(None), *box)] = found[[model.config.protocols.index(name) for name in plan.read]]
        result = Result(classes, np.zeros((0, *whitened.shape), np.float32), np.zeros((4, 0)))
        whole = True
    else:
        away = None if whole else positions
        result = read_volume(model, whitened, background, plan.read, plan.reading, options, away)

    def home(found: np.ndarray) -> np.ndarray:
        """Moves labels or probabilities to the given volume's grid, with its order of axes."""
        if whole:
            return space.to_grid(conformed.holding(found), volume.grid)
        return np.ascontiguousarray(found.transpose(np.argsort(order)))

    classes = {name: home(found) for name, found in zip(plan.read, result.classes, strict=True)}
    removed: dict[str, int] = {}
    if options.clean_up:
        classes, removed = clean_up(classes, volume.spacing_mm)
    if plan.reading.tissue_of is not None:
        classes["malp_em_tissue"] = MALP_EM_TO_TISSUE[classes["malp_em"]]
        removed["malp_em_tissue"] = removed.get("malp_em", 0)
    return Segmentation(
        {name: PROTOCOLS[name].to_ids(classes[name]) for name in plan.protocols},
        _confidence(plan, result.sums) if confidence else {},
        {name: home(found) for name, found in zip(options.posteriors, result.posteriors, strict=True)},
        {name: removed[name] for name in plan.protocols} if options.clean_up else {},
        warnings,
    )


@dataclass(frozen=True)
class _Plan:
    """The scores to compute for the requested outputs."""

    protocols: tuple[str, ...]  # requested
    read: tuple[str, ...]  # those whose scores are computed
    reading: Reading

    @property
    def softmaxes(self) -> tuple[str, ...]:
        """The protocols in the order of the sums and of `Reading.posteriors`."""
        return self.read if self.reading.tissue_of is None else (*self.read, "malp_em_tissue")


def _plan(model: Model, protocols: Sequence[str] | None, options: Options, confidence: bool) -> _Plan:
    known = model.config.protocols
    if isinstance(protocols, Options):
        raise NeuronetError("the third argument of segment is protocols: give the options by name, options=Options(…)")
    if isinstance(protocols, str):
        raise NeuronetError(f"protocols takes a sequence of names, such as [{protocols!r}], got one string")
    if not isinstance(options, Options):
        raise NeuronetError(f"options takes Options(…), got {options!r:.80}")
    if options.fast and model.others:
        raise NeuronetError("fast runs one network once, got an ensemble: give one run, or leave fast out")
    if options.consistent_tissue:
        if "malp_em" not in known:
            raise NeuronetError(
                f"consistent_tissue derives tissues from malp_em; this model predicts {', '.join(known)}"
            )
        known = tuple(dict.fromkeys((*known, "malp_em_tissue")))
    wanted = known if protocols is None else tuple(dict.fromkeys(protocols))
    if unknown := [name for name in wanted if name not in known]:
        raise NeuronetError(f"this model predicts {', '.join(known)}, not {unknown[0]!r}; choose among those")
    derived = options.consistent_tissue and "malp_em_tissue" in wanted
    read = tuple(name for name in wanted if not (derived and name == "malp_em_tissue"))
    if derived and "malp_em" not in read:
        read = (*read, "malp_em")
    plan = _Plan(wanted, read, Reading(
        tuple(PROTOCOLS[name].num_classes for name in read),
        read.index("malp_em") if derived else None,
        confidence=confidence,
    ))  # fmt: skip
    posteriors = []
    for text in options.posteriors:
        protocol, structure = posterior(text)
        if protocol.name not in wanted:
            raise NeuronetError(f"{text} needs {protocol.name}, which is not among the protocols {', '.join(wanted)}")
        posteriors.append((plan.softmaxes.index(protocol.name), structure.index))
    return replace(plan, reading=plan.reading._replace(posteriors=tuple(posteriors)))


def _confidence(plan: _Plan, sums: np.ndarray) -> dict[str, Confidence]:
    ends = spans(tuple(PROTOCOLS[name].num_classes for name in plan.softmaxes))
    parts = {name: Confidence(*sums[:, a:b]) for name, (a, b) in zip(plan.softmaxes, ends, strict=True)}
    return {name: parts[name] for name in plan.protocols}


def predict(model: Model, image: Float[np.ndarray, "x y z"], background: float = 0.0) -> UInt8[np.ndarray, "p x y z"]:
    """Returns the class indices of every protocol for a whitened image of any shape, on its own grid.

    `background` is the value beyond the image. An ensemble gives the labels of its mean scores.
    """
    names = model.config.protocols
    reading = Reading(tuple(PROTOCOLS[name].num_classes for name in names))
    return read_volume(model, image, background, names, reading, DEFAULT).classes


def _head_box(image: np.ndarray, voxel_size_mm: float) -> tuple[slice, ...]:
    """Returns the box of the bright voxels, with a margin. Its outer planes are brighter than noise."""
    sparse = image[::3, ::3, ::3]
    low, high = (float(p) for p in np.percentile(sparse, (1, 99)))
    bright = image > low + HEAD_BRIGHTNESS * (high - low)
    box = []
    for axis, side in enumerate(image.shape):
        share = bright.mean(axis=tuple({0, 1, 2} - {axis}))
        planes = np.flatnonzero(share > HEAD_SHARE)
        margin = math.ceil(HEAD_MARGIN_MM / voxel_size_mm)
        first, last = (planes[0], planes[-1]) if len(planes) else (0, side - 1)
        box.append(slice(max(0, int(first) - margin), min(side, int(last) + 1 + margin)))
    return tuple(box)


def _whiten(image: np.ndarray) -> tuple[np.ndarray, float, tuple[str, ...]]:
    """Returns the image prepared as for a store, the value of its background (raw 0), which padding continues, and
    W_INTENSITY where that holds.
    """
    with np.errstate(over="ignore"):  # beyond float32 becomes Inf, which the statistics refuse
        image = image.astype(np.float32, copy=False)
    clipped, warnings = intensity.clip_spikes(image)
    statistics = intensity.statistics(clipped)
    whitened = intensity.whiten(clipped, statistics.mean, statistics.std)
    return whitened, -statistics.mean / statistics.std, warnings
