"""Scores a model on a store's subjects, on whole volumes and the store's grid, for training and evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from neuronet_jax.evaluation import intervals
from neuronet_jax.evaluation.metrics import DiceTable, dice_per_class
from neuronet_jax.evaluation.quality import Sample, calibrate, expected_dice
from neuronet_jax.evaluation.surfaces import SurfaceTable, surfaces_per_class
from neuronet_jax.images.intensity import whiten
from neuronet_jax.images.space import Volume, place, shifted, voxel_mm3
from neuronet_jax.inference.segment import predict, segment_volume
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.calibration import Calibration
from neuronet_jax.runs.model import Model
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Subject
from neuronet_jax.training import generate


def predict_subject(model: Model, store: Store, subject: Subject) -> dict[str, np.ndarray]:
    """Returns class indices of every protocol of the model, uint8 [x y z]."""
    image = whiten(store.read_image(subject.slot), subject.mean, subject.std)
    background = -subject.mean / subject.std
    return dict(zip(model.config.protocols, predict(model, image, background), strict=True))


def score(prediction: Mapping[str, np.ndarray], store: Store, subject: Subject) -> dict[str, DiceTable]:
    """Returns the Dice table of every predicted protocol for which the subject has a reference."""
    return {
        name: dice_per_class(reference, prediction[name], PROTOCOLS[name].num_classes)
        for name, reference in _references(prediction, store, subject)
    }


def score_surfaces(
    prediction: Mapping[str, np.ndarray], store: Store, subject: Subject, tolerance_mm: float
) -> dict[str, SurfaceTable]:
    """Returns the surface distances of the same protocols as `score`. The store's grid has cubic voxels."""
    spacing_mm = np.full(3, store.info.voxel_size_mm)
    return {
        name: surfaces_per_class(reference, prediction[name], PROTOCOLS[name].num_classes, spacing_mm, tolerance_mm)
        for name, reference in _references(prediction, store, subject)
    }


def validation_of(stores: Sequence[Store], most: int | None = None) -> list[tuple[Store, Subject]]:
    """Returns the validation subjects of stores that share a voxel size, at most `most` of each."""
    return [(store, subject) for store in stores for subject in store.split("validation")[:most]]


def calibrate_on(
    model: Model, subjects: Sequence[tuple[Store, Subject]], progress: Callable[[], None] = lambda: None
) -> Calibration:
    """Returns the calibration of the model's predicted Dice and volumes. `progress` is called after each subject.

    Painted heads are drawn, one T1-like image each. They have their say on predicted Dice, so that whole heads set the
    threshold for whole heads. Volumes are calibrated on scans alone: painted heads hold the same brains again.
    """
    samples, volumes = [], []
    for store, subject in subjects:
        if any(subject.present):
            sample, measured = _sample(model, store, subject)
            samples.append(sample)
            if not store.info.painted:
                volumes.append(measured)
        progress()
    return replace(calibrate(samples, model.origin.step), volumes=intervals.fit(volumes))


def _sample(model: Model, store: Store, subject: Subject) -> tuple[Sample, intervals.Measured]:
    """Returns expected and true Dice of one subject, and its volumes, from the same code path as a user's image.

    True Dice is NaN for protocols without a reference; there are no volumes of these.
    """
    outside = [-start for start in subject.origin]  # from the store's grid back to the conformed volume

    def conformed(stored: np.ndarray) -> np.ndarray:
        return place(stored, subject.conformed_shape, outside)

    affine = shifted(np.array(subject.affine), outside)
    image = store.read_image(subject.slot)
    if store.info.painted:
        image = generate.whole(image, seed=subject.slot)
    volume = Volume(conformed(image), affine)
    result = segment_volume(model, volume)
    found = {
        name: (expected := expected_dice(values), np.full_like(expected, np.nan))
        for name, values in result.confidence.items()
    }
    volumes = {}
    per_voxel_mm3 = voxel_mm3(affine)
    for name, reference in _references(result.confidence, store, subject):
        classes = PROTOCOLS[name].to_classes(result.maps[name])
        true = dice_per_class(conformed(reference), classes, PROTOCOLS[name].num_classes)
        found[name] = (found[name][0], true.dice)
        volumes[name] = (true.predicted_voxels * per_voxel_mm3, true.reference_voxels * per_voxel_mm3)
    return found, volumes


def _references(prediction: Mapping[str, Any], store: Store, subject: Subject) -> Iterator[tuple[str, np.ndarray]]:
    present = dict(zip(store.info.protocols, subject.present, strict=True))
    names = [name for name in prediction if present.get(name)]
    yield from zip(names, store.read_labels(subject.slot, names) if names else (), strict=True)
