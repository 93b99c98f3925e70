"""Subjects that several splits share, within a store and between the stores that one training mixes."""

import logging
from collections.abc import Sequence

from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

log = logging.getLogger(__name__)


def refuse_leaks(stores: Sequence[Store]) -> None:
    """Raises StoreError E_LEAK if an image that one store trains on is in validation or test of any of them.

    Equal ids in different stores may be different people, so they are only reported. (Within a store, `Store.open`
    refuses both.)
    """
    held_out = {}  # image: store and slot of a subject that no training may see
    names: dict[str, str] = {}
    for store in stores:
        for subject in store.subjects:
            if subject.split != "train":
                names.setdefault(subject.id, store.dest)
                if subject.image_hash:
                    held_out.setdefault(subject.image_hash, (store.dest, subject))
    alike = 0
    for store in stores:
        for subject in store.split("train"):
            alike += names.get(subject.id, store.dest) != store.dest
            if subject.image_hash in held_out:
                dest, other = held_out[subject.image_hash]
                raise StoreError(
                    "E_LEAK",
                    f"the image of slot {subject.slot} of {store.dest} is in training, and in {other.split} as slot "
                    f"{other.slot} of {dest}; give both one split, or leave one of them out",
                )
    if alike:
        log.warning(
            "%d training subjects have the id of a subject that another store keeps for validation or test: make sure "
            "that they are different people",
            alike,
        )
