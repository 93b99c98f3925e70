"""Store, run, release and results with nothing on a local disk but the labels: gs:// and s3://, on real servers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

import neuronet_jax
from experiments import evaluate, report
from neuronet_jax import cli
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.restore import restore
from tests.processes import PATIENCE_S, QUICK_XLA_FLAGS

SETTINGS = {
    "data.crop": "16,16,16",
    "data.workers": 0,
    "protocols": "fsl_fast,fsl_first",
    "model.filters": "4,6",
    "batch": 1,
    "log_every": 1,
    "evaluate_every": 100,
    "checkpoint_every": 2,
}


def training(store: str, run: str, steps: int, *extra: str) -> "subprocess.Popen[str]":
    settings = {**SETTINGS, "data.store": store, "steps": steps}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "experiments.train", "--config=tissue:demo", f"--workdir={run}", *flags, *extra]
    alone = {**os.environ, "XLA_FLAGS": QUICK_XLA_FLAGS}
    return subprocess.Popen(command, env=alone, stderr=subprocess.PIPE, text=True)


def finished(process: "subprocess.Popen[str]") -> str:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return errors


def wait_for_step(process: "subprocess.Popen[str]", step: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(f"step {step} was never reached; status {process.wait()}")


def scan(path: Path) -> Path:
    voxels = np.random.default_rng(0).normal(100, 20, (64, 72, 64)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


@pytest.mark.filterwarnings("default")  # what a tiny network deserves
def test_E16_everything_at_gs(build_store: Any, gcs_bucket: str, tmp_path: Path) -> None:
    store, run, release = f"{gcs_bucket}/stores/a", f"{gcs_bucket}/runs/a", f"{gcs_bucket}/releases/a"
    build_store(store, ("train", "train", "validation", "test"))
    first = training(store, run, 4)
    wait_for_step(first, 1)
    second = training(store, run, 4, "--resume")
    _, refusal = second.communicate(timeout=PATIENCE_S)
    finished(first)
    assert second.returncode == 1 and "E_LEASE" in refusal and "is in use since" in refusal
    assert "from step 4 to 6" in finished(training(store, run, 6, "--resume"))
    assert [line["step"] for line in RunDirectory(run).metrics() if "loss" in line] == [1, 2, 3, 4, 5, 6]
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.latest() == 6
    model = restore(run)

    evaluation = tmp_path / "evaluation"
    assert evaluate.main([f"--run={run}", "--split=test", f"--out={evaluation}"]) == 0
    assert report.main([f"--run={run}", f"--eval={evaluation}", f"--out={tmp_path / 'report.html'}"]) == 0
    head = scan(tmp_path / "T1.nii.gz")
    assert cli.main(["segment", str(head), f"--run={run}", f"--out={tmp_path / 'labels'}"]) == 0
    neuronet_jax.release(model, release)
    labels, again = (neuronet_jax.segment(restore(place), str(head)) for place in (run, release))
    for name, found in labels.items():
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(again[name].dataobj))


@pytest.mark.soak
def test_E16_a_server_that_comes_back_is_waited_for(build_store: Any, gcs_server: Any, tmp_path: Path) -> None:
    bucket = gcs_server.make_bucket()
    store = str(tmp_path / "store")
    build_store(store, ("train", "train", "validation"))
    process = training(store, f"{bucket}/run", 12, "--config.checkpoint_every=6")
    try:
        wait_for_step(process, 2)
        gcs_server.stop()
        time.sleep(3)
        gcs_server.start()
        finished(process)
    finally:
        process.kill()
    assert restore(f"{bucket}/run").origin.step == 12


def test_E16_a_server_that_is_gone_is_named_within_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")  # the port of "discard": nobody listens
    began = time.monotonic()
    with pytest.raises(NeuronetError, match=r"E_IO: cannot read 'config.json' in gs://nobody/run"):
        Files("gs://nobody/run").read("config.json")
    assert time.monotonic() - began < 60


def test_E16_a_release_at_s3_segments_as_the_run_does(tiny_run: Path, bucket: str, tmp_path: Path) -> None:
    head = scan(tmp_path / "T1.nii.gz")
    assert cli.main(["export", f"--run={tiny_run}", f"--out={bucket}/release"]) == 0
    listed = json.loads(Files(f"{bucket}/release").read("release.json") or b"")
    assert listed["programs"]
    labels, again = (neuronet_jax.segment(restore(str(place)), str(head)) for place in (tiny_run, f"{bucket}/release"))
    for name, found in labels.items():
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(again[name].dataobj))
