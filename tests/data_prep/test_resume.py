"""Interrupted builds: killed, out of disk, run twice at once. The next run ends with the same store."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data_prep import shard, subject, verify
from data_prep.outcome import TooManyRejects
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.lease import lease
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

GRID = (48, 56, 48)


def test_A36_a_full_disk_is_an_error_and_the_next_run_resumes(make_cohort, build, tmp_path, tree):
    """A limit on the file size stands for the full disk: the write itself fails, in the middle."""
    manifest = make_cohort(protocols=("fsl_fast",))
    build(manifest, "whole", shard_subjects=1)
    options = ["--voxel_size_mm=4", "--grid=48,56,48", "--workers=0", "--shard_subjects=1"]
    code = (
        "import resource, signal, sys; from data_prep.build import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, f"--manifest={manifest}", f"--store={tmp_path / 'full'}", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "E_IO: cannot write image of the shard at slot 0" in " ".join(result.stderr.split())
    assert not (tmp_path / "full" / "COMPLETE").exists()
    assert not list((tmp_path / "full" / "image" / "c").rglob("0/0/0/0"))
    build(manifest, "full", shard_subjects=1)
    assert tree(tmp_path / "full") == tree(tmp_path / "whole")


def test_A37_killed_anywhere_and_run_again_equals_uninterrupted(make_cohort, build, tmp_path, tree, killed_at):
    manifest = make_cohort(protocols=("fsl_fast",))
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(b"")
    (manifest.parent / "2" / "T1.nii.gz").write_bytes((manifest.parent / "0" / "T1.nii.gz").read_bytes())
    build(manifest, "whole", shard_subjects=2)
    whole = tree(tmp_path / "whole")
    for operation in range(100):
        with killed_at(operation) as reached:
            build(manifest, f"killed{operation}", shard_subjects=2)
        if not reached:
            break
        if not (
            tmp_path / f"killed{operation}" / "COMPLETE"
        ).exists():  # else it was killed while tidying up, and is already complete
            with pytest.raises(StoreError, match="E_INCOMPLETE"):
                Store.open(tmp_path / f"killed{operation}")
        build(manifest, f"killed{operation}", shard_subjects=2)
        assert tree(tmp_path / f"killed{operation}") == whole
    assert operation > 15


def test_A37_finished_shards_are_not_built_again(make_cohort, build, tmp_path, monkeypatch):
    manifest = make_cohort(protocols=("fsl_fast",))
    prepared = []
    original = subject.prepare

    def counting(source, slot, settings):
        if len(prepared) == 2:
            raise KeyboardInterrupt
        prepared.append(slot)
        return original(source, slot, settings)

    monkeypatch.setattr(shard, "prepare", counting)
    with pytest.raises(KeyboardInterrupt):
        build(manifest, shard_subjects=1)
    prepared.clear()
    build(manifest, shard_subjects=1)
    assert prepared == [2]
    prepared.clear()
    build(manifest, shard_subjects=1)  # finished: nothing to do
    assert prepared == []


def test_A37_sigkill_of_a_real_build(make_cohort, build, tmp_path, tree):
    manifest = make_cohort(tuple(f"{n}" for n in range(1001, 1009)), protocols=("fsl_fast",))
    build(manifest, "whole", shard_subjects=1)
    options = ["--voxel_size_mm=4", "--grid=48,56,48", "--workers=0", "--shard_subjects=1"]
    command = [
        sys.executable,
        "-m",
        "data_prep.build",
        f"--manifest={manifest}",
        f"--store={tmp_path / 'killed'}",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "image" / "c" / "1").exists():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    build(manifest, "killed", shard_subjects=1)
    verify.remove_locks(str(tmp_path / "killed"))  # of the write that the kill interrupted
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_A38_a_lost_worker_loses_no_subject(make_cohort, build, tmp_path, tree):
    """One of several real processes is killed while it holds a shard.

    Dask gives that shard to a different worker, which finds the lease of a dead process. The store equals that of a
    single process.
    """
    manifest = make_cohort(tuple(f"{number}" for number in range(1001, 1011)), protocols=("fsl_fast", "malp_em"))
    build(manifest, "here", shard_subjects=1)
    killed = []

    def kill_one():
        while not killed and not (tmp_path / "there" / "COMPLETE").exists():
            for path in (tmp_path / "there").glob("unfinished-0*.lease"):
                with contextlib.suppress(FileNotFoundError, ValueError):
                    pid = json.loads(path.read_bytes())["pid"]
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_one)
    killer.start()
    build(manifest, "there", workers=2, shard_subjects=1)
    killer.join()
    assert killed
    assert killed[0] != os.getpid()
    verify.remove_locks(str(tmp_path / "there"))  # of the write that the kill interrupted
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


def test_A38_a_second_writer_of_a_shard_is_refused(make_cohort, build, tmp_path):
    manifest = make_cohort(protocols=("fsl_fast",))
    files = Files(str(tmp_path / "store"))
    with lease(files, "unfinished-00000001.lease"), pytest.raises(NeuronetError, match=r"E_LEASE.*wait for it"):
        build(manifest, shard_subjects=1)
    with lease(files, "unfinished-build.lease"), pytest.raises(NeuronetError, match="E_LEASE"):
        build(manifest, shard_subjects=1)
    build(manifest, shard_subjects=1)


def test_the_next_run_takes_repaired_files(make_cohort, build, tmp_path):
    manifest = make_cohort()
    good = (manifest.parent / "1" / "T1.nii.gz").read_bytes()
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(good[:500])
    with pytest.raises(TooManyRejects, match=r"1 of 3 subjects were rejected \(E_TRUNCATED 1\)"):
        build(manifest, max_reject_fraction=0.3)
    assert "1002\tE_TRUNCATED" in (tmp_path / "store" / "rejects.tsv").read_text()
    with pytest.raises(StoreError, match="E_INCOMPLETE"):
        Store.open(tmp_path / "store")
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(good)
    report, store = build(manifest, max_reject_fraction=0.3)
    assert report.rejects == ()
    assert len(store.subjects) == 3
