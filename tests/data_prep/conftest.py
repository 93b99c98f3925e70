"""A small cohort on disk: heads of 4 mm voxels with structures placed as in MALP-EM, and all five label maps."""

import contextlib
import csv
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep.build import build as build_store
from neuronet_jax.files import Files
from neuronet_jax.labels import MALP_EM_CENTROIDS_MM, MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.store.reader import Store
from neuronet_jax.store.writer import StoreWriter
from tests import disks

SHAPE = (40, 48, 40)
AFFINE = np.array([[4.0, 0, 0, -78], [0, 4, 0, -112], [0, 0, 4, -66], [0, 0, 0, 1]])
GRID = (48, 56, 48)  # of the stores
COLUMNS = ("id", "t1", *PROTOCOLS, "split")


def structures() -> np.ndarray:
    """Returns MALP-EM classes, uint8 [x y z]: the nearest centroid within an ellipsoid."""
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)  # [x y z 3]
    points_mm = voxels @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    known = np.flatnonzero(np.isfinite(MALP_EM_CENTROIDS_MM).all(axis=1))
    known = known[known > 0]
    distances = np.linalg.norm(points_mm[..., None, :] - MALP_EM_CENTROIDS_MM[known], axis=-1)  # [x y z k]
    nearest = known[distances.argmin(axis=-1)]
    for structure in known:  # a structure thinner than a voxel keeps the one at its centroid
        voxel = np.rint((MALP_EM_CENTROIDS_MM[structure] - AFFINE[:3, 3]) / 4).astype(int)
        nearest[tuple(voxel)] = structure
    head = (((points_mm - [0, -18, 8]) / [72, 88, 66]) ** 2).sum(axis=-1) < 1
    return np.where(head, nearest, 0).astype(np.uint8)


MALP_EM = structures()
TISSUE = MALP_EM_TO_TISSUE[MALP_EM]


def ids(protocol: str) -> np.ndarray:
    """Returns the label map of a protocol as its tool writes it."""
    if protocol == "malp_em":
        return MALP_EM
    if protocol == "malp_em_tissue":
        return TISSUE
    if protocol == "fsl_first":
        table = np.zeros(len(PROTOCOLS["malp_em"].structures), np.uint8)
        ours = {structure.name: structure.id for structure in PROTOCOLS["fsl_first"].structures}
        for structure in PROTOCOLS["malp_em"].structures:
            table[structure.index] = ours.get(structure.name, 0)
        return table[MALP_EM]
    return np.array([0, 1, 2, 2, 3, 1], np.uint8)[TISSUE]  # CSF, GM, WM


def head(seed: int) -> np.ndarray:
    """Returns an image, int16 [x y z]: brightness by tissue, noise by seed."""
    noise = np.random.default_rng(seed).normal(0, 15, SHAPE)
    return (np.array([0, 200, 500, 450, 700, 250])[TISSUE] + 40 + noise).clip(0).astype(np.int16)


def write(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    voxels: Any = data
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)
    return path


def read(path: Path) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


@pytest.fixture
def make_cohort(tmp_path: Path) -> Callable[..., Path]:
    """Writes the subjects' files and a manifest, and returns its path."""

    def make(
        names: tuple[str, ...] = ("1001", "1002", "1003"),
        protocols: tuple[str, ...] = tuple(PROTOCOLS),
        splits: tuple[str, ...] = (),
    ) -> Path:
        rows = []
        for number, name in enumerate(names):
            folder = tmp_path / "raw" / str(number)
            if not folder.exists():
                write(folder / "T1.nii.gz", head(number))
                for protocol in protocols:
                    write(folder / f"{protocol}.nii.gz", ids(protocol))
            row = {"id": name, "t1": f"{number}/T1.nii.gz", "split": splits[number] if splits else "train"}
            rows.append(row | {protocol: f"{number}/{protocol}.nii.gz" for protocol in protocols})
        manifest = tmp_path / "raw" / "cohort.csv"
        with manifest.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
        return manifest

    return make


@pytest.fixture(scope="session")
def brain() -> SimpleNamespace:
    """Returns the pieces above, for tests that damage them."""
    return SimpleNamespace(affine=AFFINE, shape=SHAPE, malp_em=MALP_EM, ids=ids, head=head, write=write, read=read)


@pytest.fixture
def build(tmp_path):
    """Builds the manifest at 4 mm in this process and returns the report and the store."""

    def run(manifest: Path, name: str = "store", **options: Any):
        options = {"voxel_size_mm": 4.0, "grid": GRID, "workers": 0, "max_reject_fraction": 1.0, **options}
        report = build_store(manifest, str(tmp_path / name), **options)
        return report, Store.open(tmp_path / name)

    return run


def _tree(store: Path) -> dict[str, bytes]:
    """Reads every file of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.fixture
def tree():
    """Returns a function that reads every file of a store, by name."""
    return _tree


class Killed(BaseException):
    """Stands for SIGKILL. Not an Exception, because nothing may catch it."""


@contextlib.contextmanager
def _killed_at(monkeypatch, operation: int):
    """Simulates the end of the process before the given change of the store; yields whether that change was reached."""
    count, reached = 0, []

    def patched(original):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count > operation:
                reached.append(True)
                raise Killed
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((Files, "write"), (Files, "delete"), (StoreWriter, "write_shard")):
            patch.setattr(owner, name, patched(getattr(owner, name)))
        with contextlib.suppress(Killed):
            yield reached


@pytest.fixture
def killed_at(monkeypatch):
    """Returns the context manager `_killed_at`."""
    return functools.partial(_killed_at, monkeypatch)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[disks.SmallDisk]:
    """Mounts a disk of 4 MB, which a test fills."""
    with disks.small_disk(tmp_path / "small", 2**22) as disk:
        yield disk


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[disks.FailingDisk]:
    """Mounts a disk of 8 MB, whose end a test tears off."""
    with disks.failing_disk(tmp_path / "failing", tmp_path / "failing.img") as disk:
        yield disk
