"""tpu_pod.sh against a recorded stand-in of gcloud, whose hosts really run their commands."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = REPOSITORY / "experiments/launch/tpu_pod.sh"
GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org")
STAND_IN = Path(__file__).with_name("gcloud_stand_in.py")
ZONE = ("pod", "--zone=europe-west4-b")
SLICE = (*ZONE, "--accelerator=v5litepod-16", "--spot", "--poll-s=0.05")
TRAINING = ("--config=all_targets", "--workdir=gs://bucket/runs/a", "--config.data.store=gs://bucket/stores/u kb's")

WAITING = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


class Pod:
    """The stand-in, what was asked of it, and the script that asks."""

    def __init__(self, folder: Path):
        self.folder = folder
        gcloud = folder / "bin" / "gcloud"
        gcloud.parent.mkdir()
        gcloud.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-ES", str(STAND_IN)])} "$@"\n')
        gcloud.chmod(0o755)
        # A project of its own: what goes to the hosts is a commit.
        self.project = folder / "project"
        shutil.copytree(SCRIPT.parent, self.project / "experiments/launch")
        for command in (("init", "--quiet"), ("add", "."), ("commit", "--quiet", "--message=test")):
            subprocess.run([*GIT, *command], cwd=self.project, check=True)
        path = f"{gcloud.parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, "TPU_STAND_IN": str(folder)}

    def plan(self, *slices: list[str], made: bool = False, **trouble: int) -> None:
        """Plans the events of each slice in turn; see `gcloud_stand_in._play`."""
        (self.folder / "plan.json").write_text("{}")
        self.change(slices=slices, made=made, **trouble)

    def change(self, **changes: Any) -> None:
        """Changes the plan while the script runs."""
        file = self.folder / "plan.json"
        with (self.folder / "plan.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    @contextlib.contextmanager
    def start(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """The script while it runs."""
        command = ["bash", str(self.project / "experiments/launch/tpu_pod.sh"), *arguments]
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """The exit status and both outputs."""
        with self.start(*arguments) as process:
            out, said = process.communicate(timeout=PATIENCE_S)
        return process.returncode, out, said

    def calls(self, verb: str) -> list[list[str]]:
        """Returns the recorded calls of a verb: create, describe, delete, scp or ssh."""
        recorded = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in recorded.read_text().splitlines()] if recorded.exists() else []
        return [call for call in calls if call[3] == verb]

    def trainings(self, host: str = "host0") -> int:
        """Counts the starts of the training on a host of the present slice."""
        file = self.folder / host / "trainings"
        return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path)
    yield pod
    pod.plan([""], made=True)
    pod.run("delete", *ZONE)  # ends what still runs on the hosts


def test_a_run_makes_a_slice_trains_on_all_hosts_and_deletes_it(pod: Pod) -> None:
    pod.plan([*WAITING, "ACTIVE", "ACTIVE", "ACTIVE end 0"])
    status, _, said = pod.run("run", *SLICE, "--create=--network=mine", "--", *TRAINING)
    assert status == 0, said
    (create,) = pod.calls("create")
    assert create[4] == "pod" and set(create[5:]) == {
        "--zone=europe-west4-b",
        "--quiet",
        "--node-id=pod",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
        "--network=mine",
    }
    assert len(pod.calls("scp")) == len(pod.calls("delete")) == 1
    assert "--force" in pod.calls("delete")[0]
    for host in ("host0", "host1"):
        given = (pod.folder / host / "arguments").read_text().splitlines()
        assert given == ["-m", "experiments.train", *TRAINING, "--resume", "--begin"]  # the blank and the quote too
    assert all(call[-1] != "pod" and "--zone=europe-west4-b" in call for call in pod.calls("ssh"))


def test_after_a_preemption_the_slice_is_made_again_and_the_training_resumes(pod: Pod) -> None:
    pod.plan(
        ["ACTIVE", "ACTIVE", "SUSPENDING preempted", "SUSPENDING", "SUSPENDED"],
        [*WAITING, "ACTIVE", "ACTIVE end 0"],
    )
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 0, said
    assert len(pod.calls("create")) == len(pod.calls("delete")) == 2
    assert len(pod.calls("scp")) == 2  # the new hosts are empty
    assert "pod is SUSPENDING" in said


def test_a_training_that_a_shutdown_ended_has_not_ended(pod: Pod) -> None:
    """On SIGTERM it saves and ends with 0; the slice is still ACTIVE for a moment."""
    pod.plan(["ACTIVE", "ACTIVE terminated", "SUSPENDED"], ["ACTIVE", "ACTIVE end 0"])
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 0, said
    assert len(pod.calls("create")) == 2


def test_a_training_that_fails_is_restarted_so_many_times(pod: Pod) -> None:
    pod.plan(["ACTIVE", *["ACTIVE end 6", "ACTIVE"] * 4])
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 6, said
    assert "restart 3 of 3" in said and pod.trainings() == 4
    assert len(pod.calls("create")) == 1  # the slice is healthy
    assert len(pod.calls("delete")) == 1  # and costs money


def test_restarts_are_counted_for_each_slice(pod: Pod) -> None:
    fails = ["ACTIVE", *["ACTIVE end 6", "ACTIVE"] * 2]
    pod.plan([*fails, "SUSPENDED"], [*fails, "ACTIVE end 0"])
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 0, said
    assert said.count("restart 2 of 3") == 2


@pytest.mark.parametrize("code", [2, 4, 5])
def test_a_training_that_cannot_go_on_is_not_restarted(pod: Pod, code: int) -> None:
    pod.plan(["ACTIVE", f"ACTIVE end {code}"])
    status, _, said = pod.run("run", *SLICE, "--keep", "--", *TRAINING)
    assert status == code, said
    assert pod.trainings() == 1 and not pod.calls("delete")


def test_hosts_that_let_nobody_in_at_first(pod: Pod) -> None:
    pod.plan(["ACTIVE", "ACTIVE end 0"], closed=3)
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 0, said
    assert "attempt 2 of 5" in said


def test_hosts_that_answer_no_more_are_replaced(pod: Pod) -> None:
    pod.plan(["ACTIVE"], ["ACTIVE", "ACTIVE end 0"])
    with pod.start("run", *SLICE, "--", *TRAINING) as process:
        _until(lambda: pod.trainings("host1") == 1)
        pod.change(closed=11)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert "taking pod for lost" in said and len(pod.calls("create")) == 2


def test_a_gcloud_without_answers_is_borne_for_a_while(pod: Pod) -> None:
    pod.plan(["ACTIVE", "ACTIVE end 0"], silent=4)
    assert pod.run("run", *SLICE, "--", *TRAINING)[0] == 0
    pod.plan(["ACTIVE"], silent=100)
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 3 and "10 times in a row" in said and "UNAVAILABLE" in said


def test_a_slice_that_cannot_be_had_is_not_asked_for_without_end(pod: Pod) -> None:
    pod.plan(["FAILED"], ["WAITING_FOR_RESOURCES", "FAILED"], ["FAILED"], ["ACTIVE"])
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 1 and "cannot be had" in said
    assert len(pod.calls("create")) == 3


def test_the_training_outlives_the_command_that_watches_it(pod: Pod) -> None:
    pod.plan(["ACTIVE"])
    with pod.start("run", *SLICE, "--", *TRAINING) as process:
        _until(lambda: pod.trainings("host1") == 1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130 and "the training goes on" in said
    assert pod.run("status", *ZONE)[1].splitlines() == ["ACTIVE", "training: running", "training: running"]
    pod.plan(["ACTIVE", "ACTIVE", "ACTIVE end 0"], made=True)
    status, _, said = pod.run("run", *SLICE, "--", *TRAINING)
    assert status == 0, said
    assert "the training is running" in said and len(pod.calls("create")) == len(pod.calls("scp")) == 1


def test_a_running_training_is_not_replaced_when_a_look_at_it_fails(pod: Pod) -> None:
    pod.plan(["ACTIVE"])
    with pod.start("run", *SLICE, "--", *TRAINING) as process:
        _until(lambda: pod.trainings("host1") == 1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    (pod.folder / "host0" / "neuronet-jax" / "mark").touch()
    next((pod.folder / "host0" / "neuronet-jax").glob(".installed-*")).unlink()  # as if by another commit
    pod.plan(["ACTIVE"], made=True, closed=1)
    with pod.start("run", *SLICE, "--", *TRAINING) as process:
        _until(lambda: len([c for c in pod.calls("ssh") if "start" in c[-1]]) == 2)
        mark = (pod.folder / "host0" / "neuronet-jax" / "mark").exists()
        pod.change(slices=[["ACTIVE end 0", "ACTIVE"]])
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert mark and pod.trainings() == 1


def test_stop_saves_and_ends(pod: Pod) -> None:
    pod.plan(["ACTIVE"])
    with pod.start("run", *SLICE, "--", *TRAINING) as process:
        _until(lambda: pod.trainings("host1") == 1)
        assert pod.run("stop", *ZONE)[0] == 0
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert len(pod.calls("delete")) == 1


def test_dry_run_prints_every_command_and_does_none(pod: Pod) -> None:
    pod.plan([])
    status, out, _ = pod.run("run", *SLICE, "--dry-run", "--", *TRAINING)
    assert status == 0 and not (pod.folder / "calls.jsonl").exists()
    commands = [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]
    verbs = [command[4] if command[0] == "gcloud" else command[0] for command in commands]
    once = ["create", "describe", "ssh", "scp", "ssh", "ssh"]
    assert verbs == [
        "git",
        "describe",
        *once,
        *["describe"] * 2,
        "delete",
        "describe",
        *once,
        "describe",
        "ssh",
        "delete",
    ]
    starts = [command[-1] for command in commands if " start " in command[-1]]
    assert len(starts) == 2 and shlex.split(starts[0])[3:] == list(TRAINING)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "the first argument is run"),
        (("run", *SLICE, "--", "--config=tissue", TRAINING[2]), "--workdir=gs://"),
        (("run", *SLICE, "--", *TRAINING[:2]), "--config.data.store=gs://"),
        (("run", *ZONE, "--", *TRAINING), "--accelerator"),
        (("run", *ZONE, "--accelerator=v9-1", "--", *TRAINING), "--runtime"),
        (("run", *SLICE, *TRAINING), "come after --"),
        (("run", "Pod", *SLICE[1:], "--", *TRAINING), "NAME"),
        (("delete", "pod"), "--zone"),
    ],
)
def test_wrong_arguments_start_nothing(pod: Pod, arguments: tuple[str, ...], reason: str) -> None:
    status, _, said = pod.run(*arguments)
    assert status == 2 and reason in said and said.count("\n") == 1
    assert not (pod.folder / "calls.jsonl").exists()


def test_help_names_every_option(pod: Pod) -> None:
    status, out, _ = pod.run("--help")
    options = re.findall(r"^    (--\w[\w-]*)", SCRIPT.read_text(), re.MULTILINE)
    assert status == 0 and len(options) > 5
    assert all(option in out for option in options)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
