"""Copies a store with errors planted into one protocol's training maps: do several references wash out each other's?

    python -m experiments.plant --store=stores/cohort --protocol=fsl_fast --kind=shifted --rate=0.5 --out=stores/planted
    python -m experiments.compare --out=planted --variants=all_targets,fsl_fast --config.data.store=stores/planted

Validation and test maps stay clean, so the comparison scores against what is right. Images, splits and the other
protocols stay as they are.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage

from data_prep.subject import content_hash
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, number, run
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Record, sample_foreground
from neuronet_jax.store.writer import StoreWriter

SHIFT_MM = 6.0  # a registration that has slipped by half a gyrus

Kind = Callable[[np.ndarray, str, float, np.random.Generator], np.ndarray]


def shifted(classes: np.ndarray, protocol: str, voxel_size_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Moves the whole map by 6 mm along an axis, as a slipped registration does. What leaves the grid is lost."""
    axis, step = int(rng.integers(3)), int(rng.choice((-1, 1))) * max(1, round(SHIFT_MM / voxel_size_mm))
    moved = np.roll(classes, step, axis)
    index = [slice(None)] * 3
    index[axis] = slice(0, step) if step > 0 else slice(step, None)
    moved[tuple(index)] = 0
    return moved


def thin(classes: np.ndarray, protocol: str, voxel_size_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Removes the outermost voxels of the labelled volume, as a tight brain mask does."""
    return np.where(ndimage.binary_erosion(classes > 0), classes, 0).astype(np.uint8)


def missing(classes: np.ndarray, protocol: str, voxel_size_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Removes a third of the structures, as a tool that fails on them does."""
    count = PROTOCOLS[protocol].num_classes - 1
    gone = 1 + rng.choice(count, max(1, count // 3), replace=False)
    return np.where(np.isin(classes, gone), 0, classes).astype(np.uint8)


def mirrored(classes: np.ndarray, protocol: str, voxel_size_mm: float, rng: np.random.Generator) -> np.ndarray:
    """Swaps left and right labels, as a wrong orientation does. A protocol without sides stays as it is."""
    return PROTOCOLS[protocol].partners[classes].astype(np.uint8)


KINDS: dict[str, Kind] = {"shifted": shifted, "thin": thin, "missing": missing, "mirrored": mirrored}


def plant(store: Store, protocol: str, kind: str, rate: float, seed: int, dest: str) -> int:
    """Writes the copy at `dest`, and returns how many training maps have an error.

    Raises NeuronetError if the store lacks the protocol, or if the error would change nothing.
    """
    protocols = store.info.protocols
    if protocol not in protocols:
        raise NeuronetError(f"the store has no {protocol}; it has {', '.join(protocols)}")
    place = protocols.index(protocol)
    candidates = [subject.slot for subject in store.split("train") if subject.present[place]]
    chosen = np.random.default_rng(seed).choice(candidates, round(rate * len(candidates)), replace=False).tolist()

    def wrong(slot: int, right: np.ndarray) -> np.ndarray:
        """Returns the map with the error of its slot, however often and in whatever order it is called."""
        return KINDS[kind](right, protocol, store.info.voxel_size_mm, np.random.default_rng([seed, slot]))

    right = ((slot, store.read_labels(slot, [protocol])[0]) for slot in sorted(chosen))
    if chosen and not any((wrong(slot, classes) != classes).any() for slot, classes in right):
        raise NeuronetError(f"--kind={kind} changes nothing in {protocol}: choose a different one")
    writer = StoreWriter.create(
        dest,
        protocols=protocols,
        grid=store.info.grid,
        voxel_size_mm=store.info.voxel_size_mm,
        slots=store.info.slots,
        shard_subjects=1,
        provenance={
            **store.info.provenance,
            "planted": {"protocol": protocol, "kind": kind, "rate": rate, "seed": seed},
        },
    )
    subjects, changed = [], 0
    for subject in store.subjects:
        image, labels = store.read_image(subject.slot), np.stack([*store.read_labels(subject.slot, protocols)])
        foreground = store.read_foreground(subject.slot)
        if subject.slot in chosen:
            before = labels[place].copy()
            labels[place] = wrong(subject.slot, before)
            changed += bool((labels[place] != before).any())
            foreground = sample_foreground(labels, subject.present, seed=subject.slot)
        copied = replace(subject, content_hash=content_hash(image, labels, foreground))
        writer.write_shard(subject.slot, [Record(image, labels, foreground, copied)])
        subjects.append(copied)
    writer.finalize(subjects, [])
    return changed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.plant", description=__doc__)
    parser.add_argument("--store", required=True, metavar="DEST", help="store to copy")
    parser.add_argument("--protocol", required=True, choices=tuple(PROTOCOLS), help="whose maps get errors")
    parser.add_argument("--kind", required=True, choices=tuple(KINDS), help="of error")
    parser.add_argument("--rate", type=number(float, 0, 1), default=0.5, help="share of training maps (default: 0.5)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="chooses the maps (default: 0)")
    parser.add_argument("--out", required=True, metavar="DEST", help="where the copy is written")
    return run(parser, _plant, arguments)


def _plant(options: argparse.Namespace) -> int:
    store = Store.open(options.store)
    changed = plant(store, options.protocol, options.kind, options.rate, options.seed, options.out)
    print(
        f"{changed} of {len(store.split('train'))} training maps of {options.protocol} have an error, in {options.out}"
    )
    return DONE


if __name__ == "__main__":
    sys.exit(main())
