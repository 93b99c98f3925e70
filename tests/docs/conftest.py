"""A folder in which the commands of the pages find what they name: tiny scans, label maps, a store and trained runs."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS

SHAPE = (24, 28, 24)
SPLITS = ("train", "train", "train", "validation", "test")
WITHDRAWN = "1001"


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """The files that a reader brings: a cohort with its manifest, a scan, a BIDS dataset, a list of withdrawn ids."""
    folder = tmp_path_factory.mktemp("files")
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "t1", *PROTOCOLS, "split"])
        for number, split in enumerate(SPLITS):
            identity = str(1001 + number)
            (folder / identity).mkdir()
            _write(folder / identity / "T1.nii.gz", _head(number))
            for name, protocol in PROTOCOLS.items():
                _write(folder / identity / protocol.filename, _labels(name))
            maps = [f"{identity}/{protocol.filename}" for protocol in PROTOCOLS.values()]
            writer.writerow([identity, f"{identity}/T1.nii.gz", *maps, split])
    shutil.copy(folder / "1005" / "T1.nii.gz", folder)
    anatomy = folder / "bids" / "sub-01" / "anat"
    anatomy.mkdir(parents=True)
    shutil.copy(folder / "T1.nii.gz", anatomy / "sub-01_T1w.nii.gz")
    description = {"Name": "test", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (folder / "bids" / "dataset_description.json").write_text(json.dumps(description))
    (folder / "withdrawn.csv").write_text(f"{WITHDRAWN}\n")
    (folder / "my_config.py").write_text("from experiments.configs.all_targets import get_config\n")
    return folder


def _write(path: Path, data: np.ndarray) -> None:
    image = nib.Nifti1Image(data, np.diag([4.0, 4.0, 4.0, 1.0]))
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def _structures() -> np.ndarray:
    """uint8 [x y z]: classes of malp_em in an ellipsoid, in slabs along z so that all tissues occur."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij"))
    slabs = np.broadcast_to(np.arange(SHAPE[2]) * 6 % 138 + 1, SHAPE)
    return np.where((grid**2).sum(axis=0) < 0.8, slabs, 0).astype(np.uint8)


def _labels(name: str) -> np.ndarray:
    """The label map of a protocol, in the tool's ids."""
    structures = _structures()
    if name == "malp_em":
        return structures
    if name == "malp_em_tissue":
        return MALP_EM_TO_TISSUE[structures]
    count = PROTOCOLS[name].num_classes
    return PROTOCOLS[name].to_ids(np.where(structures > 0, structures % (count - 1) + 1, 0).astype(np.uint8))


def _head(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 20, SHAPE)
    return (200.0 * (_structures() > 0) + 2.0 * _structures() + noise).clip(0).astype(np.int16)
