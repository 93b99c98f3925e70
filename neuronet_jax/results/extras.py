"""Results that only some programs need, on request: FreeSurfer's stats and .mgz files, labels with 1 mm voxels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.freesurfer.mghformat import MGHImage
from scipy import ndimage

from neuronet_jax import __version__
from neuronet_jax.errors import UsageError
from neuronet_jax.evaluation import volumetry
from neuronet_jax.files import Files
from neuronet_jax.images import nifti, space
from neuronet_jax.labels import PROTOCOLS, Protocol
from neuronet_jax.results.bids import GENERATOR, Target
from neuronet_jax.results.tables import write_text

KINDS = ("stats", "mgz", "1mm")
_STATS = "Index SegId NVoxels Volume_mm3 StructName normMean normStdDev normMin normMax normRange"


def check_kinds(kinds: Sequence[str]) -> None:
    """Raises UsageError for a kind that is not among KINDS."""
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"--also takes {', '.join(KINDS)}, not {unknown[0]!r}")


def files_of(target: Target, protocols: Sequence[str], kinds: Sequence[str]) -> list[Path]:
    """Returns the files that `write_extras` writes."""
    return [target.extra(name, kind) for kind in kinds for name in protocols]


def write_extras(
    target: Target,
    volume: space.Volume,
    maps: Mapping[str, np.ndarray],
    mm3: Mapping[str, np.ndarray],
    kinds: Sequence[str],
    overwrite: bool,
) -> None:
    """Writes the requested kinds for each map of the tools' ids, each file under its final name only when complete.

    `mm3` has, per protocol, the volume of every id.
    """
    for name, ids in maps.items():
        if "stats" in kinds:
            write_text(target.extra(name, "stats"), _stats(PROTOCOLS[name], ids, volume, mm3))
        if "mgz" in kinds:
            image: Any = MGHImage(cast(Any, ids.astype(np.uint8)), volume.affine)
            path = target.extra(name, "mgz")
            content = igzip.compress(image.to_bytes(), compresslevel=3, mtime=0)
            Files(str(path.parent.absolute())).write(path.name, content)
        if "1mm" in kinds:
            fine = _at_1mm(volume.holding(ids))
            path = target.extra(name, "1mm")
            nifti.write_labels(path, fine.data, fine, overwrite)
            described = f'{{"Manual": false, "Resolution": "1 mm, nearest voxel", "Protocol": "{name}"}}\n'
            write_text(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), described)


def _at_1mm(labels: space.Volume) -> space.Volume:
    """Returns labels in RAS+ order with 1 mm voxels, each that of the nearest voxel, with a header of their own."""
    fine = space.conform(labels, 1.0, is_label=True)
    image = nib.Nifti1Image(fine.data.astype(np.uint8), fine.affine)
    image.set_qform(fine.affine, code=1)
    return space.Volume(fine.data, fine.affine, image.header)


def _stats(protocol: Protocol, ids: np.ndarray, volume: space.Volume, mm3: Mapping[str, np.ndarray]) -> str:
    """Returns a table like FreeSurfer's aseg.stats, of the structures that are present; intensities are the scan's."""
    measures = [
        ("BrainSegNotVent, BrainSegVolNotVent, Brain Segmentation Volume Without Ventricles", volumetry.brain_mm3(mm3)),
        ("EstimatedTotalIntraCranialVol, eTIV, Estimated Total Intracranial Volume", volumetry.intracranial_mm3(mm3)),
    ]
    lines = [
        "# Title Segmentation Statistics",
        f"# generating_program {GENERATOR} {__version__}",
        f"# protocol {protocol.name}",
        *(f"# Measure {name}, {value:.6f}, mm^3" for name, value in measures if not np.isnan(value)),
        f"# VoxelVolume_mm3 {space.voxel_mm3(volume.affine):.6g}",
        f"# NTableCols {len(_STATS.split())}",
        f"# ColHeaders  {_STATS}",
    ]
    present = [s for s in protocol.structures[1:] if mm3[protocol.name][s.id] > 0]
    numbers = [s.id for s in present]
    image = volume.data
    counts = np.bincount(ids.ravel(), minlength=256)
    shares = np.maximum(counts, 1)  # absent ids are not shown
    means = np.bincount(ids.ravel(), image.ravel(), 256) / shares
    squares = np.bincount(ids.ravel(), ((image - means[ids]) ** 2).ravel(), 256) / shares
    least, most = (f(image, ids, numbers) for f in (ndimage.minimum, ndimage.maximum))
    for row, (s, mean, spread, low, high) in enumerate(
        zip(present, means[numbers], np.sqrt(squares[numbers]), least, most, strict=True), start=1
    ):
        lines.append(
            f"{row:3d} {s.id:3d} {counts[s.id]:8d} {mm3[protocol.name][s.id]:9.1f}  {s.name:<30} "
            f"{mean:10.4f} {spread:10.4f} {low:10.4f} {high:10.4f} {high - low:10.4f}"
        )
    return "\n".join(lines) + "\n"
