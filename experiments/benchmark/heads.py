"""Whole heads to segment, the weights for them, and the comparison of the contenders' labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Head(NamedTuple):
    """A whole head to segment."""

    voxel_size_mm: float  # at which the network works
    spacing_mm: tuple[float, float, float]  # of the file
    shape: tuple[int, int, int]  # of the file


# Jobs of whole heads: on the network's own grid, and on grids onto which scores are interpolated. To the network they
# have 192 × 224 × 192 or 128 × 160 × 128 voxels, which nobody has to pad: what lies beyond a head's border changes
# labels near it.
HEADS = {
    "head": Head(1.0, (1.0, 1.0, 1.0), (192, 224, 192)),
    "head-resampled": Head(1.0, (1.25, 0.9, 0.9), (154, 249, 214)),
    "head-finer": Head(1.5, (1.0, 1.0, 1.0), (192, 240, 192)),  # as a network of 1.5 mm sees a scan of 1 mm
}
# Least share of all voxels of all protocols with the same label: sums in a different order may decide a tie
# differently, and tiles that share too little see a border where the head has none.
AGREEMENT, AGREEMENT_IN_TILES = 0.9999, 0.998


def template_head(path: Path, spacing_mm: Sequence[float], shape: Sequence[int]) -> None:
    """Writes the MNI152 template of 1 mm, skull-stripped, which comes with nilearn, on a grid with the same centre."""
    import nibabel as nib
    from nibabel.processing import resample_from_to
    from nilearn.datasets import load_mni152_template

    template: Any = load_mni152_template(resolution=1)
    affine = np.diag([*spacing_mm, 1.0])
    centre_mm = template.affine[:3] @ [*((np.array(template.shape) - 1) / 2), 1]
    affine[:3, 3] = centre_mm - (np.array(shape) - 1) / 2 * spacing_mm
    head: Any = resample_from_to(template, (tuple(shape), affine), order=1)
    scaled = np.asarray(head.dataobj, np.float32) * 1000  # as scanners write: integers
    nib.save(nib.Nifti1Image(np.round(scaled).astype(np.int16), affine), path)


def save_weights(run: str, path: Path) -> None:
    """Writes a trained run's weights by name. Raises NeuronetError for any but the published sizes."""
    from flax import nnx

    from experiments.benchmark.work import FILTERS
    from neuronet_jax.errors import NeuronetError
    from neuronet_jax.labels import PROTOCOLS
    from neuronet_jax.runs.restore import restore

    model = restore(run)
    settings = model.config.model
    if settings.family != "neuronet" or settings.filters != FILTERS or model.config.protocols != tuple(PROTOCOLS):
        raise NeuronetError(f"--run takes a run of the neuronet family with filters {FILTERS} and all protocols")
    variables = nnx.to_flat_state(nnx.state(model.network, nnx.Any(nnx.Param, nnx.BatchStat), graph=False))
    np.savez(path, allow_pickle=False, **{".".join(map(str, name)): np.asarray(v[...]) for name, v in variables})


def with_weights(network: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """Returns the network with the weights from `save_weights`."""
    import jax.numpy as jnp
    from flax import nnx

    structure, state = nnx.split(network, graph=False)
    variables = nnx.to_flat_state(state)
    filled = [(name, v.replace(jnp.asarray(weights[".".join(map(str, name))]))) for name, v in variables]
    return nnx.merge(structure, nnx.from_flat_state(filled))


def agreement(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """Returns the share of voxels, over all protocols, with the same label from two contenders."""
    return float(np.mean([np.mean(labels == second[name]) for name, labels in first.items()]))
