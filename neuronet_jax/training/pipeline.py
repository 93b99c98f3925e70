"""Batches of random crops, read by chunk: sources → shuffle → repeat → mix → draw → batch → own rows → read → prefetch.

Subjects and crops follow from the seed and the element's place in the global order alone. Neither an interruption nor
the number of processes, devices or workers changes a voxel of a global batch. Each process draws the whole batch, which
is numbers only, and reads its own rows, all their chunks at the same time. An epoch visits each subject once. Epochs
overlap in batches, so nothing is dropped if the batch size does not divide the number of subjects.
"""

import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.images.intensity import whiten
from neuronet_jax.store.leaks import refuse_leaks
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Subject

HostBatch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Draw:
    """The random choices for one crop; `Reader` applies them."""

    subject: Subject
    at_foreground: bool
    position: tuple[float, float, float]  # in [0, 1): the start of a uniform crop
    point: float  # in [0, 1): selects the foreground voxel at the centre of a foreground crop
    store: int = 0  # which of `Reader.stores` holds the subject


@dataclass(frozen=True)
class Draws(grain.transforms.RandomMap):
    """Draws one crop of the incoming subject, which comes with the number of its store."""

    foreground_fraction: float

    def random_map(self, element: tuple[int, Subject], rng: np.random.Generator) -> Draw:
        at_foreground, point, x, y, z = rng.random(5)
        store, subject = element
        return Draw(subject, bool(at_foreground < self.foreground_fraction), (x, y, z), point, store)


@dataclass(frozen=True)
class Rows(grain.transforms.Map):
    """Keeps the rows of the global batch that this process reads."""

    rows: tuple[int, ...]

    def map(self, element: Sequence[Draw]) -> list[Draw]:
        return [element[row] for row in self.rows]


@dataclass(frozen=True)
class Reader(grain.transforms.Map):
    """Reads the crops of one batch."""

    stores: tuple[Store, ...]  # the first is `config.data.store`
    protocols: tuple[str, ...]
    crop: tuple[int, int, int]

    def map(self, element: Sequence[Draw]) -> HostBatch:
        """Returns `image` f32 [b x y z 1] whitened, `labels` u8 [b p x y z], `present` bool [b p], `slot` i32 [b],
        `start` i32 [b 3] and, where stores are mixed, `painted` bool [b]: images that are not scans.
        """
        try:
            return self._read(element)
        except Exception as error:  # the main process learns only this from a worker
            error.add_note(f"while reading the batch of the slots {[draw.subject.slot for draw in element]}")
            raise

    def _read(self, element: Sequence[Draw]) -> HostBatch:
        if len(self.stores) == 1:
            return self._read_from(self.stores[0], element)
        batch: HostBatch = {"painted": np.array([self.stores[draw.store].info.painted for draw in element])}
        for number, store in enumerate(self.stores):
            rows = [row for row, draw in enumerate(element) if draw.store == number]
            part = self._read_from(store, [element[row] for row in rows]) if rows else {}
            for name, array in part.items():
                batch.setdefault(name, np.zeros((len(element), *array.shape[1:]), array.dtype))[rows] = array
        return batch

    def _read_from(self, store: Store, element: Sequence[Draw]) -> HostBatch:
        """Reads crops of one store, all in flight together."""
        info = store.info
        window = tuple(min(side, length) for side, length in zip(self.crop, info.grid, strict=True))
        # A grid smaller than the crop is centred in it, surrounded by background (raw 0, label 0).
        pad = tuple((side - length) // 2 for side, length in zip(self.crop, window, strict=True))
        inside = tuple(slice(before, before + length) for before, length in zip(pad, window, strict=True))
        new = np.zeros if any(pad) else np.empty
        image = new((len(element), *self.crop), np.float32)
        labels = new((len(element), len(self.protocols), *self.crop), np.uint8)
        first, slots = starts(store, element, window), [draw.subject.slot for draw in element]
        held = [p for p, name in enumerate(self.protocols) if name in info.protocols]
        names = [self.protocols[p] for p in held]
        if len(held) == len(self.protocols):
            store.read_crops_into(image[:, *inside], labels[:, :, *inside], slots, first, names)
        else:
            labels[:] = 0
            of_names = np.empty((len(element), len(held), *window), np.uint8)
            store.read_crops_into(image[:, *inside], of_names, slots, first, names)
            labels[:, held, *inside] = of_names
        if not info.painted:
            for row, draw in enumerate(element):
                whiten(image[row], draw.subject.mean, draw.subject.std, out=image[row])
        present = np.zeros((len(element), len(self.protocols)), bool)
        present[:, held] = np.array([d.subject.present for d in element])[:, [info.protocols.index(n) for n in names]]
        return {
            "image": image[..., np.newaxis],  # [b x y z] → [b x y z 1]
            "labels": labels,
            "present": present,
            "slot": np.array(slots, np.int32),
            "start": np.array(first, np.int32),  # first voxel of each crop
        }


def starts(store: Store, draws: Sequence[Draw], window: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Returns the first voxel of each crop: uniform over all that fit, or around a foreground voxel, moved into the
    grid.
    """
    room = np.array(store.info.grid) - window
    points = iter(store.read_foregrounds([d.subject.slot for d in draws if d.at_foreground]))
    first = []
    for draw in draws:
        if draw.at_foreground:
            foreground = next(points)  # [n 3]
            centre = foreground[int(draw.point * len(foreground))]
            start = np.clip(centre - np.array(window) // 2, 0, room)
        else:
            start = (np.array(draw.position) * (room + 1)).astype(int)
        first.append(tuple(int(s) for s in start))
    return first


def _prepare_worker(worker_index: int, worker_count: int) -> None:
    """Keeps JAX, which Grain imports, off the accelerator, and ends the worker when its parent ends for any reason."""
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _end_with_parent() -> None:
    """Ends this worker with its parent. A killed parent cannot stop its workers, which would sleep forever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


class TrainingIterator(grain.DatasetIterator[HostBatch]):
    """Endless batches with an exact position: `set_state(get_state())` continues with the very next batch.

    The state is the number of global batches given out, with the batch size, seed and split that it counts in. It is
    the same in every process, so a run may continue with a different number of processes, devices and workers. It is
    JSON and fits Grain's Orbax checkpoint handler.
    """

    def __init__(self, batches: grain.MapDataset[HostBatch], config: Config, counts: dict[str, Any]):
        super().__init__()
        self._batches, self._config, self._counts = batches, config, counts
        self._position = 0
        self._running: Any = None  # Grain's iterator from `position` on, made on first use
        self._waited = self._since = 0.0

    def __next__(self) -> HostBatch:
        self._assert_not_closed()
        began = time.perf_counter()
        self._since = self._since or began
        self.start_prefetch()
        batch = next(self._running)
        self._position += 1
        self._waited += time.perf_counter() - began
        return batch

    def start_prefetch(self) -> None:
        """Starts reading ahead."""
        if self._running is None:
            self._running = iter(self._dataset())
            self._running.start_prefetch()

    def _dataset(self) -> grain.IterDataset[HostBatch]:
        data = self._config.data
        ahead = self._batches.slice(slice(self._position, None))
        if data.workers == 0:
            return ahead.to_iter_dataset(
                grain.ReadOptions(num_threads=data.prefetch, prefetch_buffer_size=data.prefetch)
            )
        if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which a notebook never parses
            flags.FLAGS.mark_as_parsed()
        in_worker = ahead.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        per_worker = -(-data.prefetch // data.workers)
        return in_worker.mp_prefetch(grain.MultiprocessingOptions(data.workers, per_worker), _prepare_worker)

    def wait_fraction(self) -> float:
        """Returns the share of time since the last call spent waiting for batches; 0 before the first batch."""
        now = time.perf_counter()
        share = self._waited / (now - self._since) if self._since else 0.0
        self._waited, self._since = 0.0, now
        return share

    def get_state(self) -> dict[str, Any]:
        return {"position": self._position, **self._counts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a saved position. Raises NeuronetError, naming both values, if it counts something different."""
        if not isinstance(state, dict) or type(state.get("position")) is not int or state["position"] < 0:
            raise NeuronetError(
                f"a data position is a number of batches, with what it counts in, got {state!r:.80}; restart the data "
                "with --reset-data"
            )
        processes = state.get("processes", 1)
        if processes != 1:  # releases before 0.2 gave each process an order of its own
            raise NeuronetError(
                f"the data position is that of {processes} processes in an older release, whose order no longer "
                "exists; restart the data with --reset-data"
            )
        state = {name: value for name, value in state.items() if name != "processes"}
        if set(state) != {"position", *self._counts}:
            raise NeuronetError(f"a data position has {['position', *self._counts]}, got {sorted(state)}")
        for name, value in self._counts.items():
            if state[name] != value:
                raise NeuronetError(
                    f"the data position was saved with {name} {state[name]!r}, this run has {value!r}; "
                    f"continue with the saved {name} or restart the data"
                )
        self._stop()
        self._position = int(state["position"])

    def close(self) -> None:
        """Ends the workers."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def _check_shared_memory(config: Config, rows: int) -> None:
    """Raises NeuronetError if shared memory is too small. Workers pass batches through it; if it fills up, they are
    killed.
    """
    place = Path("/dev/shm")
    if not place.is_dir():
        return
    data = config.data
    batch_bytes = rows * math.prod(data.crop) * (4 + len(config.protocols))  # float32 and uint8
    in_flight = data.workers * (2 * -(-data.prefetch // data.workers) + 2)  # queued twice, being made, being used
    free = shutil.disk_usage(place).free
    if batch_bytes * in_flight > free:
        raise NeuronetError(
            f"{data.workers} workers need {batch_bytes * in_flight / 1e9:.1f} GB in {place}, but only "
            f"{free / 1e9:.1f} GB are free; lower config.data.prefetch, batch or crop, set config.data.workers to 0, "
            "or give more (docker run --shm-size)"
        )


def training_iterator(store: Store, config: Config, rows: Sequence[int] | None = None) -> TrainingIterator:
    """Makes the endless batches of this process: `rows` of each global batch (default: all `config.batch` of them).

    Batches are dicts of numpy arrays: `image` f32 [b x y z 1] whitened, `labels` u8 [b p x y z] in the order of
    config.protocols, `present` bool [b p], `slot` i32 [b], `start` i32 [b 3]: the first voxel of each crop.
    `mesh.batch_rows` gives the rows of a process. Raises NeuronetError if the split cannot fill one batch or the store
    lacks a protocol. A dead worker is a RuntimeError on `next`.
    """
    rows = tuple(range(config.batch)) if rows is None else tuple(rows)
    stores = (store, *(Store.open(dest) for dest in config.data.stores))
    refuse_leaks(stores)
    members = [_members(number, each, config) for number, each in enumerate(stores)]
    if len(members[0]) < config.batch:
        raise NeuronetError(
            f"{store.dest} has {len(members[0])} training subjects, fewer than config.batch {config.batch}; "
            "lower the batch or build a larger store"
        )
    if missing := [name for name in config.protocols if name not in store.info.protocols]:
        raise NeuronetError(f"{store.dest} holds the protocols {', '.join(store.info.protocols)}, not {missing[0]!r}")
    reader = Reader(
        tuple(each.with_concurrency(config.data.read_threads) for each in stores), config.protocols, config.data.crop
    )
    batches = (
        _mixed(members, config)
        .random_map(Draws(config.data.foreground_fraction))
        .batch(config.batch, drop_remainder=True, batch_fn=list)  # endless: there is none to drop
        .map(Rows(rows))
        .map(reader)
    )
    if config.data.workers:
        _check_shared_memory(config, len(rows))
    counts: dict[str, Any] = {"batch": config.batch, "seed": config.seed, "split": store.info.split_hash}
    if config.data.stores:  # what they hold, wherever they lie
        counts |= {"stores": [each.info.subjects_hash for each in stores[1:]], "weights": _weights(config)}
    return TrainingIterator(batches, config, counts)


def _members(number: int, store: Store, config: Config) -> list[tuple[int, Subject]]:
    """Returns the training subjects of a store. Raises NeuronetError if it has none, or does not fit the first one."""
    if number and not set(config.protocols) & set(store.info.protocols):
        raise NeuronetError(f"{store.dest} holds none of the protocols {', '.join(config.protocols)}")
    members = [(number, subject) for subject in store.split("train")]
    if not members:
        raise NeuronetError(f"{store.dest} has no subjects in the split 'train'; build one with such")
    return members


def _weights(config: Config) -> list[float]:
    """Returns the share of the crops that come from each store."""
    weights = config.data.weights or (1.0,) * (1 + len(config.data.stores))
    return [weight / sum(weights) for weight in weights]


def _mixed(members: Sequence[Sequence[tuple[int, Subject]]], config: Config) -> grain.MapDataset[tuple[int, Subject]]:
    """Returns the endless order of subjects: of every store shuffled anew in each epoch, mixed by weight."""
    # The sequence [seed, 0] is that of earlier single-process runs, which therefore continue exactly.
    seeds = [int(np.random.SeedSequence([config.seed, n]).generate_state(1)[0]) for n in range(len(members))]
    orders = [
        grain.MapDataset.source(subjects).seed(seed).shuffle().repeat()
        for subjects, seed in zip(members, seeds, strict=True)
    ]
    if len(orders) == 1:
        return orders[0]
    drawn = [(order, weight) for order, weight in zip(orders, _weights(config), strict=True) if weight]
    return grain.MapDataset.mix([order for order, _ in drawn], [weight for _, weight in drawn]).seed(seeds[0])


def validation_subjects(
    store: Store, split: str, process_index: int = 0, process_count: int = 1
) -> list[Subject | None]:
    """Returns this process's share of a split: over all processes, every subject exactly once.

    All lists have the same length, so that processes can step together. Short ones end with None, which does not count.
    Raises NeuronetError for an empty split.
    """
    subjects = store.split(split)
    if not subjects:
        raise NeuronetError(
            f"{store.dest} has no subjects in the split {split!r}; choose a different split or build one"
        )
    share: list[Subject | None] = list(subjects[process_index::process_count])
    return share + [None] * (-(-len(subjects) // process_count) - len(share))
