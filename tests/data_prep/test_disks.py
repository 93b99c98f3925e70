"""Disks that fill up while a store is written, and disks that fail while scans are read: real ENOSPC and EIO."""

import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep import shard
from data_prep.assemble import build_sources
from data_prep.sources.ukb import read_archive
from data_prep.splits import assign_splits
from neuronet_jax.errors import NeuronetError
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

IN_MEMORY = Path("/proc/self/mem")  # a regular file for Linux; its first bytes cannot be read, which is EIO for anybody


def test_A36_a_disk_that_fills_up_anywhere_is_an_error_and_the_next_run_resumes(
    make_cohort, build, small_disk, tmp_path, tree
):
    """From no room at all to room for all: the store is never finished in part, and is continued once there is room."""
    manifest = make_cohort(protocols=("fsl_fast",))
    build(manifest, "whole", shard_subjects=1)
    whole = tree(tmp_path / "whole")
    failed_at = set()
    for left in range(0, 2**22, 3 * 2**15):
        small_disk.leave(left)
        said = ""
        try:
            build(manifest, "small/store", shard_subjects=1)
        except NeuronetError as error:
            said = str(error)
        if not said:
            break
        assert said.startswith("E_IO: ") and "No space left on device" in said
        failed_at.add(said.partition(" in /")[0])
        with pytest.raises(StoreError, match="E_INCOMPLETE"):
            Store.open(small_disk.folder / "store")
        small_disk.free()
        build(manifest, "small/store", shard_subjects=1)
        assert tree(small_disk.folder / "store") == whole, left
        shutil.rmtree(small_disk.folder / "store")
    assert {f"E_IO: cannot write image of the shard at slot {slot}" for slot in range(3)} <= failed_at


def healing(monkeypatch, *heal) -> list[float]:
    """Calls one function of `heal` in each pause between two attempts to read. Returns the lengths of the pauses."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) <= len(heal):
            heal[len(pauses) - 1]()

    monkeypatch.setattr(shard, "time", SimpleNamespace(sleep=sleep))
    return pauses


def test_A39_a_scan_that_cannot_be_read_is_tried_again(make_cohort, build, tmp_path, monkeypatch, tree):
    """Four attempts, with pauses of half a minute in all. A scan that can be read again is taken as any other."""
    manifest = make_cohort(protocols=("fsl_fast",))
    build(manifest, "whole")
    scan, kept = manifest.parent / "1" / "T1.nii.gz", tmp_path / "kept.nii.gz"
    scan.rename(kept)
    scan.symlink_to(IN_MEMORY)
    pauses = healing(monkeypatch)
    report, _ = build(manifest, "failed")
    (reject,) = report.rejects
    assert (reject.id, reject.code) == ("1002", "E_IO") and "Input/output error" in reject.reason
    assert pauses == [1, 5, 25]

    def heal() -> None:
        scan.unlink()
        kept.rename(scan)

    pauses = healing(monkeypatch, lambda: None, heal)
    report, _ = build(manifest, "healed")
    assert report.rejects == () and pauses == [1, 5]
    assert tree(tmp_path / "healed") == tree(tmp_path / "whole")


@pytest.mark.parametrize("name", ["T1.nii.gz", "fsl_fast.nii.gz"])
def test_A39_a_disk_that_fails_in_the_middle_of_a_file(
    make_cohort, build, failing_disk, tmp_path, monkeypatch, tree, name
):
    """The first half can be read. That is no damage of the file, which would be final, and no image of zeros."""
    manifest = make_cohort(protocols=("fsl_fast",))
    file = manifest.parent / "1" / name
    there = failing_disk.folder / file.name
    shutil.move(file, there)
    file.symlink_to(there)
    build(manifest, "whole")
    failing_disk.tear(there, 0.5)
    healing(monkeypatch)
    report, _ = build(manifest, "failed")
    (reject,) = report.rejects
    assert (reject.id, reject.code) == ("1002", "E_IO") and "Input/output error" in reject.reason
    healing(monkeypatch, failing_disk.mend)
    report, _ = build(manifest, "healed")
    assert report.rejects == ()
    assert tree(tmp_path / "healed") == tree(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.3, 1])
def test_A39_a_disk_that_fails_under_an_archive(make_cohort, failing_disk, tmp_path, monkeypatch, tree, share):
    """In the scan, and in the table at the end of the archive."""
    folder = make_cohort(("1001", "1002"), protocols=("fsl_fast",)).parent
    for number, place in enumerate((tmp_path / "archive", failing_disk.folder)):
        place.mkdir(exist_ok=True)
        with zipfile.ZipFile(place / f"100{number}_20252_2_0.zip", "w") as archive:
            archive.write(folder / str(number) / "T1.nii.gz", "T1/T1.nii.gz")
            archive.write(folder / str(number) / "fsl_fast.nii.gz", "T1/T1_fast/T1_brain_seg.nii.gz")
    there = tmp_path / "archive" / "1001_20252_2_0.zip"
    there.symlink_to(failing_disk.folder / there.name)
    sources = assign_splits(read_archive(tmp_path / "archive"))
    options = {"voxel_size_mm": 4.0, "grid": (48, 56, 48), "workers": 0, "max_reject_fraction": 1.0}
    build_sources(sources, str(tmp_path / "whole"), **options)
    failing_disk.tear(failing_disk.folder / there.name, share)
    healing(monkeypatch)
    (reject,) = build_sources(sources, str(tmp_path / "failed"), **options).rejects
    assert reject.code == "E_IO" and "Input/output error" in reject.reason
    healing(monkeypatch, failing_disk.mend)
    assert build_sources(sources, str(tmp_path / "healed"), **options).rejects == ()
    assert tree(tmp_path / "healed") == tree(tmp_path / "whole")
