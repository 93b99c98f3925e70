"""Scores of a model on a store's subjects, on whole volumes and the store's grid: in training and in
`experiments.evaluate`.
"""

from collections.abc import Mapping

import numpy as np

from neuronet_jax.inference import Model, predict
from neuronet_jax.intensity import whiten
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.metrics import DiceTable, dice_per_class
from neuronet_jax.store import Store, Subject


def predict_subject(model: Model, store: Store, subject: Subject) -> dict[str, np.ndarray]:
    """Class indices uint8 [x y z] of every protocol of the model."""
    image = whiten(store.read_image(subject.slot), subject.mean, subject.std)
    background = -subject.mean / subject.std
    return dict(zip(model.config.protocols, predict(model, image, background), strict=True))


def score(prediction: Mapping[str, np.ndarray], store: Store, subject: Subject) -> dict[str, DiceTable]:
    """The Dice table of every predicted protocol that the subject has a reference for."""
    present = dict(zip(store.info.protocols, subject.present, strict=True))
    names = [name for name in prediction if present.get(name)]
    references = store.read_labels(subject.slot, names) if names else ()
    return {
        name: dice_per_class(reference, prediction[name], PROTOCOLS[name].num_classes)
        for name, reference in zip(names, references, strict=True)
    }
