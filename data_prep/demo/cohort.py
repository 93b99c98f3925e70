"""The demo cohort: phantoms with all five label maps, as files that look like a real archive.

    python -m data_prep.demo --out=demo

writes `demo/manifest.csv` and one folder per subject, ready for `python -m data_prep.build`. Nothing is downloaded: the
anatomy comes from the MNI152 templates inside the nilearn package. This is a demonstration: Dice on it says nothing
about real brains.
"""

import argparse
import csv
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from rich.console import Console
from rich.progress import track

import neuronet_jax
from data_prep import cluster
from data_prep.assemble import HEAD_MM
from data_prep.build import build
from data_prep.demo.atlas import load_atlas
from data_prep.demo.phantom import Lattice, Phantom, draw_phantom
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import user_cache
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, run

NOTE = "demonstration: synthetic heads, not for research"

# Variation over the scans: voxel axes, spacing relative to the cohort's, and the tilt of the field of view in degrees.
# Most are plain, as in a study with one imaging protocol.
_SCANS = (
    ("RAS", (1.0, 1.0, 1.0), 0),
    ("LAS", (1.0, 1.0, 1.0), 0),
    ("RAS", (1.0, 1.0, 1.0), 0),
    ("LPS", (1.0, 1.0, 1.0), 6),
    ("RAS", (1.0, 1.0, 1.0), 0),
    ("PSR", (1.0, 0.9, 0.9), 0),
)


def make_demo_cohort(
    folder: Path,
    *,
    train: int = 12,
    validation: int = 2,
    test: int = 2,
    seed: int = 0,
    voxel_size_mm: float = 2.0,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """Writes the cohort into `folder` and returns its manifest. The same seed gives the same bytes.

    `workers` processes draw the phantoms, a few seconds each. The default is one per core, at most 4; 0 means this
    process.
    """
    folder = Path(folder)
    splits = ["train"] * train + ["validation"] * validation + ["test"] * test
    if not splits or min(train, validation, test) < 0:
        raise NeuronetError(f"a cohort needs at least one subject, got {train=}, {validation=}, {test=}")
    if not 0.5 <= voxel_size_mm <= 4:  # finer than any template, or so coarse that small structures vanish
        raise NeuronetError(f"the demo cohort is drawn with voxels of 0.5 to 4 mm, got {voxel_size_mm}")
    ids = [f"demo{number:03d}" for number in range(1, len(splits) + 1)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        about = f"NeuroNet-JAX {neuronet_jax.__version__}, {NOTE}. {__doc__}"
        (folder / "README.txt").write_text(about, encoding="utf-8")
    except OSError as error:
        raise NeuronetError(f"cannot write to {folder}: {error}; choose a different folder") from error

    tasks = {f"draw-{id_}": (folder / id_, number, seed, voxel_size_mm) for number, id_ in enumerate(ids)}
    count = min(4, os.cpu_count() or 1) if workers is None else workers
    drawn = cluster.run(write_subject, tasks, count)
    for _ in track(drawn, "drawing phantoms", len(ids), console=Console(stderr=True), disable=not progress):
        pass

    manifest = folder / "manifest.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["id", "t1", *PROTOCOLS, "split"])
        for id_, split in zip(ids, splits, strict=True):
            names = ("T1.nii.gz", *(protocol.filename for protocol in PROTOCOLS.values()))
            rows.writerow([id_, *(f"{id_}/{name}" for name in names), split])
    return manifest


def write_subject(folder: Path, number: int, seed: int, voxel_size_mm: float) -> None:
    """Draws subject `number` of the cohort and writes its six images, which depend on the arguments only."""
    rng = np.random.default_rng((seed, number))
    axes, factors, tilt_degrees = _SCANS[number % len(_SCANS)]
    spacing_mm = voxel_size_mm * np.array(factors)
    lattice = _field_of_view(rng, spacing_mm)
    phantom = draw_phantom(rng, load_atlas(voxel_size_mm), lattice)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = lattice.origin_mm
    tilt = np.eye(4)
    tilt[1:3, 1:3] = _turn(np.radians(tilt_degrees))  # about the left-right axis, as radiographers tilt it
    write_phantom(folder, phantom, tilt @ affine, axes)


def write_phantom(folder: Path, phantom: Phantom, affine: np.ndarray, axes: str) -> None:
    """Writes the image and the label maps, given in RAS+ order, with their voxels in the order `axes`."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = {PROTOCOLS[name].filename: labels for name, labels in phantom.labels.items()}
    for name, array in {"T1.nii.gz": phantom.image, **maps}.items():
        image = nib.Nifti1Image(array, affine)
        image.header["descrip"] = NOTE.encode()
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(affine, code="scanner")
        image.set_qform(affine, code="scanner")
        order: Any = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))
        nib.save(image.as_reoriented(order), folder / name)


def _field_of_view(rng: np.random.Generator, spacing_mm: np.ndarray) -> Lattice:
    """Returns a field of view that holds the head, placed by hand as by a radiographer."""
    shape = np.round(np.array(HEAD_MM) / spacing_mm).astype(int)
    center_mm = np.array([0.0, -15.0, -1.0]) + rng.uniform(-1.5, 1.5, 3)  # of the head, in the template's coordinates
    return Lattice(tuple(shape.tolist()), spacing_mm, center_mm - spacing_mm * (shape - 1) / 2)


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def ensure_demo_store(cache_dir: Path | None = None) -> Path:
    """Returns the finished store of the demo cohort, built on first use and kept in the user's cache folder.

    Its images and manifest stay beside it (`demo_manifest`). A different version of the code makes a different store.
    """
    cache = Path(cache_dir) if cache_dir else user_cache()
    final = cache / f"demo-{neuronet_jax.__version__}-{_code_hash()}"
    if (final / "store" / "COMPLETE").exists():
        return final / "store"
    Console(stderr=True).print(f"Making the demo cohort ({NOTE}) in {final}: about a minute, once.", soft_wrap=True)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=cache) as temporary:  # complete, or not at all
        work = Path(temporary) / "demo"
        manifest = make_demo_cohort(work / "cohort", progress=True)
        workers = min(4, os.cpu_count() or 1)
        build(manifest, str(work / "store"), voxel_size_mm=2.0, workers=workers, progress=True, note=NOTE)
        if final.exists() and not (final / "store" / "COMPLETE").exists():
            shutil.rmtree(final)  # someone has emptied it
        try:
            work.rename(final)
        except OSError:  # a different process was faster, with the same store
            if not (final / "store" / "COMPLETE").exists():
                raise
    return final / "store"


def demo_manifest(store: Path) -> Path:
    """Returns the manifest from which `ensure_demo_store` built this store."""
    return Path(store).parent / "cohort" / "manifest.csv"


def _code_hash() -> str:
    """Returns a hash of the code and tables that determine the store's content."""
    library, preparation = Path(neuronet_jax.__file__).parent, Path(__file__).parents[1]
    paths = [preparation / f"{name}.py" for name in ("build", "subject", "demo/atlas", "demo/cohort", "demo/phantom")]
    paths += [library / name for name in ("labels.py", "data/malp_em.tsv")]
    paths += sorted(path for folder in ("images", "store") for path in (library / folder).glob("*.py"))
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m data_prep.demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cohort")
    for split, count in (("train", 12), ("validation", 2), ("test", 2)):
        parser.add_argument(f"--{split}", type=int, default=count, help="number of subjects (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--voxel-size-mm", type=float, default=2.0, help="default: %(default)s")
    return run(parser, _demo, arguments)


def _demo(args: argparse.Namespace) -> int:
    options = vars(args)
    manifest = make_demo_cohort(options.pop("out"), progress=True, **options)
    print(f"{manifest} ({NOTE})")
    return DONE
