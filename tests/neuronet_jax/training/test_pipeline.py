"""The order and content of batches: exact under workers, processes and interruption (rows C1 to C10)."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from experiments.flags import load
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import PAINTED, Record, StoreError
from neuronet_jax.store.writer import StoreWriter
from neuronet_jax.training.pipeline import (
    Draw,
    HostBatch,
    Reader,
    TrainingIterator,
    starts,
    training_iterator,
    validation_subjects,
)

MakeStore = Callable[..., tuple[Store, dict[int, Record]]]
SPLITS = ("train", "train", "", "train", "validation", "train", "train", "train", "train")  # seven to train on
PROTOCOLS = ("malp_em", "fsl_fast")  # not in the order of the store


def settings(batch: int = 2, seed: int = 3, **data: Any) -> Config:
    config = load("all_targets:demo")
    fields = {"workers": 0, "prefetch": 2, "read_threads": 2, "crop": (16, 16, 16), "foreground_fraction": 0.5} | data
    return dataclasses.replace(
        config, protocols=PROTOCOLS, batch=batch, seed=seed, data=dataclasses.replace(config.data, **fields)
    )


@pytest.fixture
def start() -> Iterator[Callable[..., TrainingIterator]]:
    """Returns `training_iterator`, closed after the test."""
    started: list[TrainingIterator] = []

    def begin(*args: Any) -> TrainingIterator:
        started.append(training_iterator(*args))
        return started[-1]

    yield begin
    for iterator in started:
        iterator.close()


def take(iterator: TrainingIterator, count: int) -> list[HostBatch]:
    return [{name: np.array(value) for name, value in next(iterator).items()} for _ in range(count)]


def assert_same(ours: list[HostBatch], theirs: list[HostBatch]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def slots(batches: list[HostBatch]) -> list[int]:
    return [int(slot) for batch in batches for slot in batch["slot"]]


# --- contents of a batch ---


def test_a_batch_is_whitened_slices_of_the_written_records(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS, grid=(36, 40, 32))
    draws = [
        Draw(records[1].subject, False, (0.0, 0.5, 0.9999), 0.0),  # 36 − 16 + 1 = 21 positions along x
        Draw(records[5].subject, True, (0.0, 0.0, 0.0), 0.25),
    ]
    batch = Reader((store,), PROTOCOLS, (16, 24, 32)).map(draws)
    x, y, _ = records[5].foreground[512]
    corners = [(0, 8, 0), (np.clip(x - 8, 0, 20), np.clip(y - 12, 0, 16), 0)]
    for row, (draw, corner) in enumerate(zip(draws, corners, strict=True)):
        box = tuple(slice(c, c + n) for c, n in zip(corner, (16, 24, 32), strict=True))
        record = records[draw.subject.slot]
        expected = (record.image[box] - draw.subject.mean) / draw.subject.std
        np.testing.assert_allclose(batch["image"][row, ..., 0], expected, atol=1e-5)
        np.testing.assert_array_equal(batch["labels"][row], record.labels[(slice(None), *box)][[2, 0]])
    assert batch["image"].dtype == np.float32
    assert batch["labels"].dtype == np.uint8
    assert batch["present"].tolist() == [[True, True], [False, True]]  # slot 5 lacks malp_em
    assert batch["slot"].tolist() == [1, 5]
    assert batch["start"].dtype == np.int32 and batch["start"].tolist() == np.array(corners).tolist()


def test_a_grid_smaller_than_the_crop_sits_in_background(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS, grid=(36, 40, 32))
    subject = records[0].subject
    batch = Reader((store,), PROTOCOLS, (40, 40, 40)).map([Draw(subject, True, (0.7, 0.7, 0.7), 0.5)])
    image, labels = batch["image"][0, ..., 0], batch["labels"][0]
    inside = (slice(2, 38), slice(0, 40), slice(4, 36))
    np.testing.assert_allclose(image[inside], (records[0].image - subject.mean) / subject.std, atol=1e-5)
    np.testing.assert_array_equal(labels[(slice(None), *inside)], records[0].labels[[2, 0]])
    outside = np.ones((40, 40, 40), bool)
    outside[inside] = False
    np.testing.assert_allclose(image[outside], -subject.mean / subject.std, rtol=1e-6)
    assert not labels[:, outside].any()


def test_foreground_crops_hold_labels_and_uniform_crops_reach_every_corner(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(("train",) * 2, grid=(48, 48, 48))
    config = settings(foreground_fraction=1.0, crop=(8, 8, 8))
    everywhere = dataclasses.replace(config, protocols=store.info.protocols)
    assert all(batch["labels"].reshape(2, -1).any(axis=1).all() for batch in take(start(store, everywhere), 20))
    edges = [Draw(store.subjects[0], False, (u, u, u), 0.0) for u in (0.0, np.nextafter(1, 0))]
    assert starts(store, edges, (8, 8, 8)) == [(0, 0, 0), (40, 40, 40)]


def test_every_epoch_visits_every_subject_once_in_a_new_order(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)
    seen = slots(take(start(store, settings()), 14))  # four epochs of seven, batches of two straddle them
    epochs = [seen[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == [0, 1, 3, 5, 6, 7, 8] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_crops_of_a_subject_differ_between_epochs(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(("train",) * 2)
    first, second = take(start(store, settings(foreground_fraction=0.0)), 2)
    image = dict(zip(first["slot"].tolist(), first["image"], strict=True))
    assert not any(np.array_equal(image[int(s)], crop) for s, crop in zip(second["slot"], second["image"], strict=True))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_the_rows_of_one_global_batch(make_store: MakeStore, start: Any, processes: int) -> None:
    store, _ = make_store(SPLITS)
    config = settings(batch=4)
    whole = take(start(store, config), 5)
    rows = [range(index, 4, processes) for index in range(processes)]  # not contiguous: a mesh may interleave hosts
    for own in rows:
        expected = [{name: value[list(own)] for name, value in batch.items()} for batch in whole]
        assert_same(take(start(store, config, own), 5), expected)


# --- the fault table ---


def test_B01_a_missing_shard_ends_training_by_name(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)
    (Path(store.dest) / "labels/c/0/0/0/0/0").unlink()
    with pytest.raises(StoreError, match=r"E_SHARD_MISSING: labels of the subject in slot [01]"):
        take(start(store, settings()), 7)


def test_B02_a_damaged_shard_ends_training_by_name(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)
    shard = Path(store.dest) / "image/c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"E_CRC: image of the subject in slot [01]"):
        take(start(store, settings()), 7)


def test_B09_training_sees_only_committed_subjects(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)
    assert set(slots(take(start(store, settings()), 21))) == {0, 1, 3, 5, 6, 7, 8}  # neither the hole nor validation


def test_C01_killed_worker_is_an_error_not_a_hang(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)
    iterator = start(store, settings(workers=2))
    next(iterator)
    victim = multiprocessing.active_children()[0].pid
    assert victim
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="exit code -9"):
        take(iterator, 50)
    assert time.monotonic() - began < 60


STUCK = """
import time, sys
from neuronet_jax.training.signals import Watchdog
from neuronet_jax.training.pipeline import training_iterator
from neuronet_jax.store.reader import Store
from neuronet_jax.config import Config

class Stuck(Store):
    def read_crops_into(self, *args):
        time.sleep(1000)

if __name__ == "__main__":
    iterator = training_iterator(Stuck.open(sys.argv[1]), Config.from_json(sys.argv[2]))
    with Watchdog(timeout_s=1) as watchdog:
        next(iterator)
"""


def test_C02_sleeping_worker_is_ended_by_the_watchdog(make_store: MakeStore, tmp_path: Path) -> None:
    store, _ = make_store(SPLITS)
    (tmp_path / "stuck.py").write_text(STUCK)
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, str(tmp_path / "stuck.py"), store.dest, settings(workers=1).to_json()],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert process.returncode == 6
    assert "no progress" in process.stderr
    assert "pipeline.py" in process.stderr  # the stack shows that the run waited for data
    assert time.monotonic() - began < 60


def test_C03_error_in_a_worker_keeps_traceback_and_subject(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)

    class Broken(Store):
        def read_crops_into(self, *args: Any) -> Any:
            raise ZeroDivisionError("the original message")

    broken = Broken(store.dest, store.info, store.subjects, None)
    with pytest.raises(ZeroDivisionError, match="the original message") as caught:
        next(start(broken, settings(batch=3, workers=1)))
    text = "".join(traceback.format_exception(caught.value))
    assert "in read_crops_into" in text
    assert "while reading the batch of the slots [" in text


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 2), (2, 1)])
def test_C04_resume_equals_uninterrupted_whatever_the_workers(
    make_store: MakeStore, start: Any, before: int, after: int
) -> None:
    store, _ = make_store(SPLITS)
    whole = take(start(store, settings()), 11)
    first = start(store, settings(workers=before))
    assert_same(take(first, 5), whole[:5])  # in the middle of the second epoch
    state = json.loads(json.dumps(first.get_state()))
    second = start(store, settings(workers=after))
    second.set_state(state)
    assert second.get_state() == state
    assert_same(take(second, 6), whole[5:])
    first.set_state(start(store, settings()).get_state())  # and back to the beginning, workers running
    assert_same(take(first, 2), whole[:2])


def test_C04_resume_through_grains_checkpoint_handler(make_store: MakeStore, start: Any, tmp_path: Path) -> None:
    from etils import epath

    store, _ = make_store(SPLITS)
    iterator = start(store, settings())
    take(iterator, 3)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(epath.Path(tmp_path), args=grain.checkpoint.CheckpointSave(iterator))
    again = handler.restore(epath.Path(tmp_path), args=grain.checkpoint.CheckpointRestore(start(store, settings())))
    assert_same(take(again, 2), take(iterator, 2))


def test_C04_a_position_of_different_data_is_refused_naming_both_values(
    make_store: MakeStore, start: Any, tmp_path: Path
) -> None:
    store, _ = make_store(SPLITS)
    other, _ = make_store(("train",) * 4, dest=str(tmp_path / "other"))
    state = start(store, settings()).get_state()
    for iterator, said in (
        (start(store, settings(batch=4)), "batch 2, this run has 4"),
        (start(store, settings(seed=4)), "seed 3, this run has 4"),
        (start(other, settings()), "split '.*, this run has '"),
    ):
        with pytest.raises(NeuronetError, match=said):
            iterator.set_state(state)
    with pytest.raises(NeuronetError, match="next_index"):
        start(store, settings()).set_state({"next_index": 3})


def test_C04_the_position_does_not_depend_on_the_processes(make_store: MakeStore, start: Any) -> None:
    """Saved by two processes, continued by one and by four: the very next global batch."""
    store, _ = make_store(SPLITS)
    config = settings(batch=4)
    whole = take(start(store, config), 9)
    first, second = start(store, config, (0, 1)), start(store, config, (2, 3))
    take(first, 5), take(second, 5)
    assert first.get_state() == second.get_state()
    for count in (1, 4):
        for index in range(count):
            own = list(range(index * 4 // count, (index + 1) * 4 // count))
            again = start(store, config, own)
            again.set_state(first.get_state())
            assert_same(take(again, 4), [{name: value[own] for name, value in batch.items()} for batch in whole[5:]])


def test_C04_positions_of_an_older_release(make_store: MakeStore, start: Any) -> None:
    """One process drew the order of today; the order of several no longer exists."""
    store, _ = make_store(SPLITS)
    whole = take(start(store, settings()), 5)
    state = start(store, settings()).get_state()
    again = start(store, settings())
    again.set_state({**state, "position": 3, "processes": 1})
    assert_same(take(again, 2), whole[3:])
    with pytest.raises(NeuronetError, match=r"of 2 processes in an older release.*--reset-data"):
        again.set_state({**state, "position": 3, "processes": 2})


@pytest.mark.parametrize("position", [None, [1], 7, {}, {"position": -1}, {"position": "1"}, {"position": True}])
def test_E12_a_position_of_the_wrong_type_is_refused(make_store: MakeStore, start: Any, position: Any) -> None:
    data = start(make_store(SPLITS)[0], settings())
    state = {**data.get_state(), **position} if isinstance(position, dict) and position else position
    with pytest.raises(NeuronetError, match="a data position is a number of batches"):
        data.set_state(state)


def test_C05_processes_share_the_subjects_without_loss(make_store: MakeStore, start: Any) -> None:
    """Seven subjects in global batches of two: epochs run on, so no subject is dropped, and both processes together see
    each subject as often as the others.
    """
    store, _ = make_store(SPLITS)
    seen = Counter(slot for row in (0, 1) for slot in slots(take(start(store, settings(batch=2), (row,)), 14)))
    assert seen == dict.fromkeys((0, 1, 3, 5, 6, 7, 8), 4)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 9])
def test_C05_evaluation_visits_every_subject_exactly_once(make_store: MakeStore, count: int) -> None:
    store, _ = make_store(("test",) * 8)
    shares = [validation_subjects(store, "test", index, count) for index in range(count)]
    assert len({len(share) for share in shares}) == 1  # equally long, so that all processes step together
    assert sorted(s.slot for share in shares for s in share if s is not None) == list(range(8))


def test_C06_too_few_subjects_are_an_error_at_start(make_store: MakeStore) -> None:
    store, _ = make_store(SPLITS)
    with pytest.raises(NeuronetError, match=r"7 training subjects, fewer than config.batch 8"):
        training_iterator(store, settings(batch=8))
    with pytest.raises(NeuronetError, match="no subjects in the split 'test'"):
        validation_subjects(store, "test")
    with pytest.raises(NeuronetError, match="not 'spm_tissue'"):
        training_iterator(store, dataclasses.replace(settings(), protocols=("spm_tissue",)))
    with pytest.raises(NeuronetError, match=r"GB in /dev/shm.*config.data.prefetch"):
        training_iterator(store, settings(workers=2, crop=(8192, 8192, 8192)))


@pytest.mark.parametrize("workers", [1, 4])
def test_C07_workers_change_neither_order_nor_bytes(make_store: MakeStore, start: Any, workers: int) -> None:
    store, _ = make_store(SPLITS)
    assert_same(take(start(store, settings()), 8), take(start(store, settings(workers=workers)), 8))


def test_C07_the_seed_decides(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)
    runs = [take(start(store, settings(seed=seed)), 8) for seed in (3, 3, 4)]
    assert_same(runs[0], runs[1])
    assert slots(runs[0]) != slots(runs[2])


def test_C09_slow_storage_shows_as_waiting(make_store: MakeStore, start: Any) -> None:
    store, _ = make_store(SPLITS)

    class Slow(Store):
        def read_crops_into(self, *args: Any) -> Any:
            time.sleep(0.05)
            return super().read_crops_into(*args)

    iterator = start(Slow(store.dest, store.info, store.subjects, None), settings(prefetch=1))
    assert iterator.wait_fraction() == 0  # nothing was requested yet
    take(iterator, 10)
    assert iterator.wait_fraction() > 0.8  # the consumer does nothing else
    for _ in range(5):
        take(iterator, 1)
        time.sleep(0.15)  # longer than reading: the next batch is ready
    assert iterator.wait_fraction() < 0.5


def test_C10_workers_stay_off_the_accelerator(
    make_store: MakeStore, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = make_store(SPLITS)
    monkeypatch.delenv("JAX_PLATFORMS")  # as on a GPU host

    class Probe(Store):
        def read_crops_into(self, *args: Any) -> Any:
            import jax
            from jax._src import xla_bridge

            raise ValueError(
                f"environment {os.environ['JAX_PLATFORMS']}, "
                f"initialised {xla_bridge.backends_are_initialized()}, devices {jax.devices()[0].platform}"
            )

    with pytest.raises(ValueError, match="environment cpu, initialised False, devices cpu"):
        next(start(Probe(store.dest, store.info, store.subjects, None), settings(workers=1)))


# --- several stores ---


@pytest.fixture
def mixed(make_store: MakeStore, tmp_path: Path) -> tuple[Store, Config]:
    """A store of scans and, in the settings, one of painted volumes that lacks the first protocol."""
    scans, _ = make_store(("train",) * 3)
    _, records = make_store(("train",) * 4, str(tmp_path / "of_records"))
    writer = StoreWriter.create(
        str(tmp_path / "painted"),
        protocols=("fsl_fast",),
        grid=(36, 40, 32),
        voxel_size_mm=2.0,
        slots=4,
        shard_subjects=2,
        provenance={"image": PAINTED},
        chunk=16,
    )
    rows = [
        dataclasses.replace(r, labels=r.labels[:1], subject=dataclasses.replace(r.subject, present=(True,)))
        for r in records.values()
    ]
    for first in (0, 2):
        writer.write_shard(first, rows[first : first + 2])
    writer.finalize([row.subject for row in rows], [])
    return scans, settings(stores=(str(tmp_path / "painted"),), weights=(1.0, 3.0))


def test_stores_are_mixed_by_weight_and_painted_volumes_are_not_whitened(
    mixed: tuple[Store, Config], start: Any
) -> None:
    store, config = mixed
    batches = take(start(store, config), 16)
    painted = np.concatenate([batch["painted"] for batch in batches])
    assert painted.sum() == 24  # three of four
    for batch in batches:
        assert batch["present"][:, 1].all()
        for row in range(2):
            source = Store.open(config.data.stores[0]) if batch["painted"][row] else store
            slot, begin = int(batch["slot"][row]), batch["start"][row]
            raw, classes = source.read_crop(slot, begin, (16, 16, 16), ("fsl_fast",))
            subject = source.subjects[slot]
            expected = raw if batch["painted"][row] else (raw - subject.mean) / subject.std
            np.testing.assert_allclose(batch["image"][row, ..., 0], expected, atol=1e-5)
            np.testing.assert_array_equal(batch["labels"][row, 1], classes[0])
            if batch["painted"][row]:
                assert not batch["present"][row, 0] and not batch["labels"][row, 0].any()


def test_each_store_is_visited_whole_and_a_position_goes_on_only_with_the_same_stores(
    mixed: tuple[Store, Config], start: Any
) -> None:
    store, config = mixed
    iterator = start(store, config)
    seen = take(iterator, 8)
    of_painted = [int(b["slot"][row]) for b in seen for row in range(2) if b["painted"][row]]
    assert all(sorted(of_painted[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 12, 4))
    state, ahead = iterator.get_state(), take(iterator, 3)
    resumed = start(store, config)
    resumed.set_state(state)
    assert_same(take(resumed, 3), ahead)
    for other in ({"stores": (), "weights": ()}, {"weights": (1.0, 1.0)}):
        changed = start(store, dataclasses.replace(config, data=dataclasses.replace(config.data, **other)))
        with pytest.raises(NeuronetError, match="position"):
            changed.set_state(state)
