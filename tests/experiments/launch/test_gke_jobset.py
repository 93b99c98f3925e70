"""The manifest for GKE: what its pods run is what `tpu_pod.sh` runs on the hosts of a slice."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.processes import PATIENCE_S

yaml = pytest.importorskip("yaml")

LAUNCH = Path(__file__).resolve().parents[3] / "experiments/launch"

STAND_IN = """#!/bin/bash
trap 'echo saved >>"$FOLDER/said"; exit 0' TERM
printf '%s\\n' "$@" >"$FOLDER/arguments"
for _ in $(seq "$TENTHS"); do sleep 0.1; done
exit "$STATUS"
"""


@pytest.fixture
def job() -> dict[str, Any]:
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture
def start(job: dict[str, Any], tmp_path: Path):
    """Starts the command of the container, with a stand-in of Python."""
    (container,) = job["template"]["spec"]["containers"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STAND_IN)
    (tmp_path / "bin/python").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"

    def start(status: int = 0, tenths: int = 0) -> subprocess.Popen[bytes]:
        stand_in = {"FOLDER": str(tmp_path), "STATUS": str(status), "TENTHS": str(tenths)}
        return subprocess.Popen(
            [*container["command"], *container["args"]], env={**os.environ, "PATH": path, **stand_in}
        )

    return start


def test_a_pod_runs_what_a_host_of_tpu_pod_runs(job: dict[str, Any], start, tmp_path: Path) -> None:
    assert start().wait(PATIENCE_S) == 0
    training = job["template"]["spec"]["containers"][0]["args"][2:]
    host = tmp_path / "host"
    shutil.copytree(LAUNCH, host / "experiments/launch")
    (host / ".venv/bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin/python", host / ".venv/bin/python")
    subprocess.run(
        ["bash", host / "experiments/launch/tpu_host.sh", "train", *training],
        env={**os.environ, "FOLDER": str(host), "STATUS": "0", "TENTHS": "0"},
        check=True,
    )
    assert (tmp_path / "arguments").read_text() == (host / "arguments").read_text()
    assert (host / "arguments").read_text().split()[:2] == ["-m", "experiments.train"]


@pytest.mark.parametrize("status", [0, 4, 6])
def test_a_pod_ends_with_the_status_of_its_training(start, status: int) -> None:
    assert start(status).wait(PATIENCE_S) == status


def test_a_training_that_is_evicted_saves_and_is_restarted(start, tmp_path: Path) -> None:
    pod = start(tenths=300)
    while not (tmp_path / "arguments").exists():
        time.sleep(0.01)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(PATIENCE_S) == 143  # 0 would be a run that has ended
    assert (tmp_path / "said").read_text() == "saved\n"


def test_statuses_that_tpu_pod_gives_up_on_are_not_tried_again(job: dict[str, Any]) -> None:
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 4, 5]
    assert "[[ $status == [245] ]]" in (LAUNCH / "tpu_pod.sh").read_text()
    assert job["backoffLimit"] == 0 and job["parallelism"] == job["completions"]
