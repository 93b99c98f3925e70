"""Measures what one core delivers: random crops with all labels, from the store and from files as people keep them.

Each way reads the same crops in a process of its own that is bound to one core, and ends with what training gets: a
whitened float32 image and uint8 labels. Warm, everything lies in the system's page cache. Cold, the files are dropped
from it before every crop. The files are the store's own volumes: `.nii.gz` with the types that scanners and tools write
(int16 and uint8), `.npy` with those that training needs (float32 and uint8), read through a memory map.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from neuronet_jax.images.intensity import whiten
from neuronet_jax.store.reader import Store
from neuronet_jax.training.pipeline import Draw, Reader, starts

Read = Callable[[Draw], tuple[np.ndarray, np.ndarray]]
CROPS = {"store": 64, "nii.gz": 8, "npy": 64}  # per pass; the slow way reads fewer
SUBJECTS = 8  # written as files: more than one pass reads twice


@dataclass(frozen=True)
class Way:
    """Crops per second of one way."""

    name: str
    warm_per_s: float
    warm_per_cpu_s: float  # per second of processor time, which other load on the machine changes little
    cold_per_s: float
    cold_per_cpu_s: float
    megabytes: float  # on disk, per subject


def measure(dest: str, folder: Path, side: int) -> list[Way]:
    """Returns the ways, the store first. `folder` takes the files."""
    write_files(dest, folder)
    ways = []
    for name in CROPS:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=_bind) as process:
            ways.append(process.submit(timed, name, dest, folder, side).result())
    return ways


def _bind() -> None:
    """Binds this process, and the threads that it will start, to one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def write_files(dest: str, folder: Path) -> None:
    """Writes the first subjects of a store as `.nii.gz` files and as `.npy` files."""
    store = Store.open(dest)
    for subject in store.split("train")[:SUBJECTS]:
        image, labels = store.read_image(subject.slot), store.read_labels(subject.slot, store.info.protocols)
        np.save(folder / f"{subject.slot}-image.npy", image)
        np.save(folder / f"{subject.slot}-labels.npy", labels)
        nib.save(nib.Nifti1Image(np.round(image).astype(np.int16), np.eye(4)), folder / f"{subject.slot}-image.nii.gz")
        for name, classes in zip(store.info.protocols, labels, strict=True):
            nib.save(nib.Nifti1Image(classes, np.eye(4)), folder / f"{subject.slot}-{name}.nii.gz")


def timed(name: str, dest: str, folder: Path, side: int) -> Way:
    """Returns the crops per second of one way, in this process."""
    store = Store.open(dest)
    draws = drawn(store, CROPS[name])
    read, files = reader(name, store, folder, side)
    for draw in draws:  # warms the cache, and the process
        read(draw)
    warm = [_seconds(read, draw) for draw in draws]
    cold = []
    for draw in draws:
        drop(files)
        cold.append(_seconds(read, draw))
    (warm_s, warm_cpu_s), (cold_s, cold_cpu_s) = (map(float, np.sum(times, axis=0)) for times in (warm, cold))
    subjects = len(store.subjects) if name == "store" else min(SUBJECTS, len(store.split("train")))
    size = sum(file.stat().st_size for file in files) / 1e6 / subjects
    n = len(draws)
    return Way(name, n / warm_s, n / warm_cpu_s, n / cold_s, n / cold_cpu_s, size)


def drawn(store: Store, count: int) -> list[Draw]:
    """Returns crops as training draws them, half of them around a labelled voxel."""
    rng, subjects = np.random.default_rng(0), store.split("train")[:SUBJECTS]
    crops = []
    for number in range(count):
        x, y, z, point = rng.random(4)
        crops.append(Draw(subjects[number % len(subjects)], bool(number % 2), (x, y, z), point))
    return crops


def reader(name: str, store: Store, folder: Path, side: int) -> tuple[Read, list[Path]]:
    """Returns the function that reads a crop one way, and the files that it reads from."""
    through = Reader((store.with_concurrency(1),), store.info.protocols, (side, side, side))
    if name == "store":

        def read_store(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
            batch = through.map([draw])
            return batch["image"][0], batch["labels"][0]

        return read_store, [file for file in Path(store.dest).rglob("*") if file.is_file()]
    volumes = {"nii.gz": partial(_nifti, folder, store.info.protocols), "npy": partial(_mapped, folder)}[name]

    def read(draw: Draw) -> tuple[np.ndarray, np.ndarray]:
        window = tuple(min(side, length) for length in store.info.grid)
        (start,) = starts(store, [draw], window)
        box = tuple(slice(a, a + n) for a, n in zip(start, window, strict=True))
        image, labels = volumes(draw.subject.slot)
        raw, classes = np.asarray(image[box]), np.ascontiguousarray(labels[:, *box])
        return whiten(raw, draw.subject.mean, draw.subject.std), classes

    return read, list(folder.glob(f"*.{name}"))


def _nifti(folder: Path, protocols: tuple[str, ...], slot: int) -> tuple[np.ndarray, np.ndarray]:
    files: list[Any] = [nib.load(folder / f"{slot}-{name}.nii.gz") for name in ("image", *protocols)]
    image, *labels = (np.asanyarray(file.dataobj) for file in files)
    return image, np.stack(labels)


def _mapped(folder: Path, slot: int) -> tuple[np.ndarray, np.ndarray]:
    image, labels = (np.load(folder / f"{slot}-{name}.npy", mmap_mode="r") for name in ("image", "labels"))
    return image, labels


def _seconds(read: Read, draw: Draw) -> tuple[float, float]:
    """Returns the time that a crop takes, and the processor time."""
    wall, processor = time.perf_counter(), time.process_time()
    read(draw)
    return time.perf_counter() - wall, time.process_time() - processor


def drop(files: list[Path]) -> None:
    """Drops files from the system's page cache. Pages that some process has mapped stay."""
    if hasattr(os, "posix_fadvise"):
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)  # pages that are not written yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def table(ways: list[Way]) -> list[str]:
    """Returns the lines of a Markdown table; the last column compares warm processor time with `.nii.gz`."""
    slowest = next(way for way in ways if way.name == "nii.gz").warm_per_cpu_s
    lines = [
        "| one core | warm crops/s | per processor s | cold crops/s | per processor s | MB per subject | ÷ nii.gz |",
        "|" + "---|" * 7,
    ]
    for way in ways:
        rates = (way.warm_per_s, way.warm_per_cpu_s, way.cold_per_s, way.cold_per_cpu_s)
        numbers = " | ".join(f"{rate:.3g}" for rate in rates)
        lines.append(f"| {way.name} | {numbers} | {way.megabytes:.1f} | {way.warm_per_cpu_s / slowest:.0f} |")
    return lines
