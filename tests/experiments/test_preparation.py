"""The benchmark of data preparation: what it makes of a cohort, and how its tables follow from what it measures."""

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep.sources.source import Source
from experiments.benchmark import preparation
from experiments.benchmark.preparation import Build, archive, repeat, shares, stage_times, table
from neuronet_jax.errors import NeuronetError


def test_a_repeated_scan_is_a_new_one_and_keeps_its_background(tmp_path: Path) -> None:
    voxels: Any = np.random.default_rng(0).integers(0, 3, (8, 9, 10)).astype(np.int16) * 300
    nib.Nifti1Image(voxels, np.eye(4)).to_filename(tmp_path / "T1.nii.gz")
    manifest = repeat([Source("1", tmp_path / "T1.nii.gz", {"malp_em": tmp_path / "map.nii.gz"})], 3, tmp_path)
    rows = list(csv.DictReader(manifest.read_text().splitlines()))
    assert len({row["id"] for row in rows}) == 3 and {row["malp_em"] for row in rows} == {str(tmp_path / "map.nii.gz")}
    scans = [np.asarray(nib.Nifti1Image.from_filename(row["t1"]).dataobj) for row in rows]
    for scan in scans:
        assert ((scan == 0) == (voxels == 0)).all() and 0 < np.abs(scan - voxels).max() <= 1
    assert (scans[0] != scans[1]).any() and (scans[1] != scans[2]).any()


def test_the_stages_are_the_profile_s_functions_and_the_rest() -> None:
    keys = [key for keys in preparation.STAGES.values() for key in keys]
    stats = {(f"/x/{file}", 1, name): (1, 1, 0.0, 1.0, {}) for file, name in keys}
    stats["/x/shard.py", 1, "build_shard"] = (1, 1, 0.0, len(keys) + 3.0, {})
    found = stage_times(stats, 2)
    assert found["everything else"] == 1.5 and found["compress and write"] == 0.5
    assert sum(found.values()) == (len(keys) + 3) / 2
    assert shares({"a": 0.03, "b": 0.01})[2:] == ["| a | 30 | 75 % |", "| b | 10 | 25 % |"]
    del stats["/x/nifti.py", 1, "_read"]
    with pytest.raises(NeuronetError, match=r"lacks .*_read"):  # a renamed function must not vanish into the rest
        stage_times(stats, 2)


def test_time_and_cost_of_an_archive_follow_from_processor_seconds() -> None:
    """50,000 × 0.72 s are 10 hours of one core."""
    assert table([Build(2, 60, 120.0, 43.2, 300.4)])[2:] == ["| 2 | 60 | 30.0 | 0.72 | 300 |"]
    assert archive(0.72, 3.6e6)[2:] == ["| 32 | 0.31 | 0.50 | 0.16 |", "| 512 | 0.02 | 0.50 | 2.56 |"]


@pytest.mark.soak
def test_the_command_measures_real_builds(real_data: Path, tmp_path: Path) -> None:
    preparation.measure(str(real_data / "cohort" / "cohort.csv"), 4, 3.0, (1,), tmp_path / "out")
    text = (tmp_path / "out" / "preparation.md").read_text()
    assert "| 1 | 4 |" in text and "compress and write" in text and "| 512 |" in text
