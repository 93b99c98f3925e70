"""Overlap of a predicted label map with its reference, scored as in the NeuroNet paper (Rajchl et al., MIDL 2018)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from neuronet_jax.errors import NeuronetError


@dataclass(frozen=True)
class DiceTable:
    """Dice and voxel counts of every class of one protocol in one subject; entry 0 is the background."""

    dice: np.ndarray  # float64 [k], NaN if a class is empty in both maps
    reference_voxels: np.ndarray  # int64 [k]
    predicted_voxels: np.ndarray  # int64 [k]


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (NaN for one subject) and minimum over the subjects that have a score."""

    mean: float
    sd: float
    minimum: float
    subjects: int

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.sd:.4f} [{self.minimum:.3f}]"


def dice_per_class(reference: np.ndarray, predicted: np.ndarray, num_classes: int) -> DiceTable:
    """Returns Dice 2|A∩B| / (|A| + |B|) of every class, from one count of (reference, predicted) pairs.

    `reference` and `predicted` hold class indices below `num_classes`, in arrays of one shape. A class that is empty in
    both maps is not applicable (NaN). One that is empty in a single map scores 0 and counts. Raises NeuronetError on
    unequal shapes and on labels outside the table. Source: Dice, Ecology 1945.
    """
    if reference.shape != predicted.shape:
        raise NeuronetError(
            f"Dice compares maps on one grid, got a reference of {reference.shape} and a prediction of "
            f"{predicted.shape}; resample the prediction onto the reference's grid first"
        )
    for name, labels in (("reference", reference), ("prediction", predicted)):
        if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
            raise NeuronetError(
                f"the {name} holds labels {labels.min()}..{labels.max()}, but the protocol has classes "
                f"0..{num_classes - 1}; map the tool's ids to class indices first (Protocol.to_classes)"
            )
    counts = np.zeros(num_classes**2, np.int64)
    for a, b in zip(np.atleast_2d(reference), np.atleast_2d(predicted), strict=True):  # a plane fits the cache
        counts += np.bincount((a.astype(np.int64) * num_classes + b).ravel(), minlength=num_classes**2)
    counts = counts.reshape(num_classes, num_classes)  # [reference predicted]
    reference_voxels, predicted_voxels = counts.sum(axis=1), counts.sum(axis=0)
    total = reference_voxels + predicted_voxels
    dice = np.where(total > 0, 2 * counts.diagonal() / np.maximum(total, 1), np.nan)
    return DiceTable(dice, reference_voxels, predicted_voxels)


def mean_dice(table: DiceTable) -> float:
    """Returns a subject's score as published: the mean over the foreground classes present in at least one of the maps.

    NaN if there is none.
    """
    foreground = table.dice[1:]
    applicable = foreground[~np.isnan(foreground)]
    return float(applicable.mean()) if applicable.size else float("nan")


def summarise(scores: Iterable[float]) -> Summary:
    """Returns mean ± sd [min] over subjects, as in the published table. Leaves out NaN scores (nothing to compare)."""
    values = np.asarray([score for score in scores if not np.isnan(score)], np.float64)
    if not values.size:
        return Summary(float("nan"), float("nan"), float("nan"), 0)
    sd = float(values.std(ddof=1)) if values.size > 1 else float("nan")
    return Summary(float(values.mean()), sd, float(values.min()), values.size)
