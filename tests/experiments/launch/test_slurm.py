"""The way of a cohort through a Slurm cluster: built by Dask's workers, trained on two nodes, segmented by an array."""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.store.reader import Store

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(560)]

HEADS = 6
SHAPE = (40, 48, 40)  # voxels of 4 mm
AFFINE = np.diag([4.0, 4, 4, 1])
AFFINE[:3, 3] = (-78, -112, -66)

# The two processes share two cores; a step takes about a tenth of a second.
CONFIG = """\
from experiments.configs.common import config

def get_config(variant=""):
    settings = config(("fsl_fast",), "demo").unlock()
    settings.update({{
        "data": {{"store": "{store}", "crop": (16, 16, 16)}},
        "model": {{"filters": (4, 6)}},
        "steps": {steps}, "log_every": 1, "checkpoint_every": 100_000, "evaluate_every": 100_000,
    }})
    return settings.lock()
"""
ENDLESS = 90_000

# As in docs/clusters.md, with this cluster's sizes.
DASK = """\
import sys, time
from dask_jobqueue import SLURMCluster

with SLURMCluster(cores=1, processes=1, memory="1GB", walltime="00:05:00", interface="lo", local_directory=sys.argv[1],
                  log_directory=sys.argv[1], scheduler_options={"dashboard_address": ":0"}) as cluster:
    cluster.scale(jobs=2)
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()  # until the build has ended
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A folder of heads with FAST's tissues, and a manifest of them."""
    folder = tmp_path_factory.mktemp("raw")
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij"))
    tissue = np.digitize(1 - np.sum(grid**2, axis=0), (0.2, 0.45, 0.7)).astype(np.uint8)  # background, CSF, GM, WM
    with (folder / "cohort.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "t1", "fsl_fast", "split"))
        for number in range(HEADS):
            noise = np.random.default_rng(number).normal(0, 15, SHAPE)
            image = (np.array([40, 250, 500, 750])[tissue] + noise).clip(0).astype(np.int16)
            for name, voxels in ((f"head{number}.nii.gz", image), (f"fast{number}.nii.gz", tissue)):
                _write(folder / name, voxels)
            split = "validation" if number == HEADS - 1 else "train"
            rows.writerow((number, f"head{number}.nii.gz", f"fast{number}.nii.gz", split))
    return folder


def _write(path: Path, voxels: Any) -> None:
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


# What a process of a job sees: how many processes there are, and which GPUs JAX would take.
JOIN = """\
import jax
from neuronet_jax import runtime
runtime.join_cluster()
print(jax.process_count(), jax.config._read("jax_cuda_visible_devices"))
"""


def test_tasks_of_a_step_join_and_take_all_gpus_of_their_nodes(slurm, tmp_path: Path):
    size = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2")
    assert slurm.run("srun", *size, "python", "-c", JOIN, timeout_s=120).splitlines() == ["2 all"] * 2
    (tmp_path / "join.py").write_text(JOIN)
    job = slurm.submit(*size, f"--output={tmp_path}/log", f"--wrap=python {tmp_path}/join.py")  # without srun: alone
    assert slurm.wait(job, 60, tmp_path / "log") == "COMPLETED"
    assert (tmp_path / "log").read_text().split() == ["1", "all"]


@pytest.fixture(scope="module")
def store(slurm, raw: Path, tmp_path_factory) -> tuple[Path, str, str]:
    """A store that workers in Slurm jobs wrote, what the build said, and the names of those jobs."""
    folder = tmp_path_factory.mktemp("store")
    with (
        (folder / "dask.log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", DASK, str(folder / "dask")],
            env=slurm.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as cluster,
    ):
        assert cluster.stdin is not None and cluster.stdout is not None
        try:
            address = cluster.stdout.readline().strip()
            assert address.startswith("tcp://"), (folder / "dask.log").read_text()
            places = (f"--manifest={raw}/cohort.csv", f"--store={folder}/cohort", f"--scheduler={address}")
            sizes = ("--voxel-size-mm=4", "--grid=48,56,48", "--shard-subjects=1")
            said = slurm.run("python", "-m", "data_prep.build", *places, *sizes, timeout_s=120)
            return folder / "cohort", said, slurm.run("squeue", "--noheader", "--format=%j %T")
        finally:
            cluster.stdin.close()  # it cancels its jobs
            try:
                cluster.wait(30)
            except subprocess.TimeoutExpired:
                cluster.kill()


def test_a_cohort_is_built_by_dask_workers_in_slurm_jobs(store):
    folder, said, jobs = store
    assert said.startswith(f"{HEADS} subjects (train {HEADS - 1}, validation 1)")
    assert jobs.splitlines() == ["dask-worker RUNNING"] * 2
    assert len(Store.open(str(folder)).subjects) == HEADS


@pytest.fixture(scope="module")
def trained(slurm, store, tmp_path_factory) -> tuple[Path, str, int]:
    """A run of two nodes that was warned, requeued and resumed; its log; the step after which it stopped."""
    folder = tmp_path_factory.mktemp("trained")
    config, run, log = folder / "tiny.py", folder / "run", folder / "job.log"
    config.write_text(CONFIG.format(store=store[0], steps=ENDLESS))
    # Three minutes, and the warning one minute before; Slurm may send it half a minute early.
    time_and_place = ("--nodes=2", "--cpus-per-task=1", "--time=3", "--signal=B:USR1@60", f"--output={log}")
    job = slurm.submit(*time_and_place, "experiments/launch/slurm.sh", f"--config={config}", f"--workdir={run}")

    end = time.monotonic() + 240
    stopped = None
    while stopped is None or slurm.job(job)["Restarts"] == "0":
        text = log.read_text() if log.exists() else ""
        assert time.monotonic() < end and slurm.job(job)["JobState"] != "FAILED", text + slurm.log()
        time.sleep(0.5)
        saved = [int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
        stopped = max(saved, default=None)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=15")  # one warning is enough
    # A run may be made longer or shorter when it goes on; without this the test would never end.
    config.write_text(CONFIG.format(store=store[0], steps=stopped + 20))
    assert slurm.wait(job, 240, log) == "COMPLETED", log.read_text()
    return run, log.read_text(), stopped


def test_training_saves_when_warned_is_requeued_and_resumes(trained):
    run, log, stopped = trained
    assert log.count("USR1: saving after this step") == 2  # srun hands the signal to both processes
    assert re.findall(r"stopped as asked after step (\d+)", log) == [str(stopped)] * 2
    starts = re.findall(r"training tiny from step (\d+) to (\d+) on 2 devices", log)
    assert sorted(starts) == sorted([("0", str(ENDLESS)), (str(stopped), str(stopped + 20))] * 2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, stopped + 21))  # none lost, none twice
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.latest() == stopped + 20


def test_an_array_segments_a_cohort_and_one_command_makes_its_tables(slurm, raw: Path, trained, tmp_path: Path):
    heads, out = tmp_path / "heads", tmp_path / "labels"
    heads.mkdir()
    for number in range(4):
        (heads / f"head{number}.nii.gz").symlink_to(raw / f"head{number}.nii.gz")
    command = f"neuronet segment {heads} --run={trained[0]} --out={out}"
    job = slurm.submit("--array=1-2", f"--output={tmp_path}/%a.log", f"--wrap={command} --shard=$SLURM_ARRAY_TASK_ID/2")
    assert slurm.wait(job, 180, tmp_path / "1.log", tmp_path / "2.log") == "COMPLETED", (tmp_path / "1.log").read_text()
    parts = [_rows(out / f"summary_shard-{part}-of-2.tsv") for part in (1, 2)]
    assert [len(part) for part in parts] == [2, 2]
    assert not (out / "volumes.tsv").exists()  # a shard does not know the others
    said = slurm.run(*command.split(), timeout_s=120)
    assert re.search(r"^4 of 4 scans .*, 4 of them earlier$", said, re.MULTILINE), said
    assert sorted(map(tuple, parts[0] + parts[1])) == sorted(map(tuple, _rows(out / "summary.tsv")))
    assert len(_rows(out / "volumes.tsv")) == 4


def _rows(path: Path) -> list[list[str]]:
    with path.open() as file:
        return list(csv.reader(file, delimiter="\t"))[1:]
