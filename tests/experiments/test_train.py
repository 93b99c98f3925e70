"""Training as a user runs it, in separate processes: killed and resumed, stopped and resumed, refused."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import train
from experiments.flags import load
from neuronet_jax.errors import NeuronetError
from neuronet_jax.inference.segment import segment
from neuronet_jax.runs.calibration import load_calibration
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.restore import restore
from neuronet_jax.training.mesh import make_mesh
from neuronet_jax.training.step import TrainState, init_state

SPLITS = ("train", "train", "train", "validation", "train")
STEPS = 12


@pytest.fixture
def store(make_store) -> Path:
    return Path(make_store(SPLITS)[0].dest)


def arguments(store: Path, run: Path) -> list[str]:
    settings = {
        "data.store": store,
        "data.crop": "16,16,16",
        "data.workers": 0,
        "protocols": "fsl_fast,fsl_first",
        "model.filters": "4,6",
        "augment.spatial": 1.0,
        "batch": 2,
        "steps": STEPS,
        "log_every": 1,
        "evaluate_every": 5,
        "checkpoint_every": 2,
    }
    return ["--config=tissue:demo", f"--workdir={run}", *(f"--config.{k}={v}" for k, v in settings.items())]


def start(store: Path, run: Path, *extra: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    alone = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # as a user would, not on eight devices
    # as after a restart: with the programs of the run before
    alone |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(store.parent / "compiled")}
    command = [sys.executable, "-m", "experiments.train", *arguments(store, run), *extra]
    return subprocess.Popen(command, env={**alone, **(environment or {})}, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return errors


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    for _ in range(2400):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError(f"step {step} was never reached")


def last_state(store: Path, run: Path) -> TrainState:
    config = load("tissue:demo", [a for a in arguments(store, run) if a.startswith("--config.")])
    _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.latest() == STEPS
        return checkpoints.restore(state, reset_data=True).state  # whatever the number of processes


@pytest.fixture(scope="module")
def whole(build_store, tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    """The last state of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    store = Path(build_store(str(folder / "store"), SPLITS)[0].dest)
    finish(start(store, folder / "run"))
    return last_state(store, folder / "run")


def test_D05_killed_and_resumed_equals_never_killed(store: Path, tmp_path: Path, whole: TrainState) -> None:
    broken = tmp_path / "broken"
    killed = start(store, broken)
    wait_for_step(broken, random.Random().randint(3, STEPS - 2), killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finish(start(store, broken, "--resume"))
    jax.tree.map(
        np.testing.assert_array_equal, last_state(store, broken), whole
    )  # every bit of parameters, moments, optimiser, averages
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def test_D03_sigterm_saves_and_the_run_can_continue(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(store, run)
    wait_for_step(run, 1, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process).splitlines()
    assert any(line.startswith("stopped as asked") and line.endswith("continue with --resume") for line in said)
    assert any(line.startswith("training tissue:demo from step 0") for line in said)
    assert sum(line.startswith("time: ") for line in said) == 1
    with Checkpoints(run, read_only=True) as checkpoints:
        stopped = checkpoints.latest()
    assert stopped is not None and 1 <= stopped < STEPS
    finish(start(store, run, "--resume"))
    model = restore(run)
    labels = segment(model, np.random.default_rng(0).normal(100, 20, (20, 24, 17)).astype(np.float32))
    assert set(labels) == {"fsl_fast", "fsl_first"} and labels["fsl_first"].shape == (20, 24, 17)
    text = "".join(path.read_text(errors="ignore") for path in run.rglob("*") if path.is_file())
    calibration = load_calibration(str(run), model.origin.step)  # for the checkpoint that is restored
    assert calibration is not None and calibration.heads == 1 and calibration.threshold is None
    assert "subject0" not in text  # A41: no identifier of a participant in a run's folder


def test_D01_a_run_that_cannot_learn_ends_with_4_and_names_its_batches(store: Path, tmp_path: Path) -> None:
    """Its learning rate is far too high: every update would be infinite. The weights that are kept are finite."""
    run = tmp_path / "run"
    process = start(
        store,
        run,
        "--config.optimizer.learning_rate=3e38",
        "--config.optimizer.schedule=constant",
        "--config.profile_steps=2,3",
    )
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 4, errors
    assert "error: 11 updates in a row were skipped up to step 11" in errors and "skipped.jsonl names the" in errors
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
    for line in lines:
        assert set(line) == {"step", "loss", "gradient_norm", "slots", "starts"} and line["gradient_norm"] > 0
        assert len(line["slots"]) == len(line["starts"]) == 2 and set(line["slots"]) <= {0, 1, 2, 4}
        assert np.all(np.array(line["starts"]) <= np.array([20, 24, 16])) and np.min(line["starts"]) >= 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_total"] for line in metrics if "loss" in line] == list(range(1, 12))
    assert restore(run).origin.step in (5, 10)  # the best one, whose weights are finite numbers
    seconds = {name.partition("/")[2]: value for name, value in metrics[-1].items() if name.startswith("seconds/")}
    assert set(seconds) == {"step", "input", "compile", "evaluate", "save", "restore", "other"}
    assert seconds["compile"] > 0 and seconds["evaluate"] > 0 and seconds["save"] > 0 and seconds["restore"] == 0
    assert 0 < metrics[-1]["goodput"] < 1 and metrics[-1]["peak_memory_bytes"] > 1e8
    assert list((run / "profile").rglob("*.xplane.pb"))


def test_D16_a_second_start_is_refused_and_harms_nothing(store: Path, tmp_path: Path, whole: TrainState) -> None:
    """With and without --resume, while the first one trains and saves; it then ends as if it had been alone."""
    run = tmp_path / "run"
    first = start(store, run)
    wait_for_step(run, 1, first)
    seconds = [start(store, run, *extra) for extra in ((), ("--resume",))]
    for second in seconds:
        _, errors = second.communicate(timeout=240)
        if first.poll() is None:  # else it came too late to meet anybody
            assert second.returncode == 1 and "E_LEASE" in errors
            assert f"by process {first.pid} on {socket.gethostname()}" in errors
    finish(first)
    jax.tree.map(np.testing.assert_array_equal, last_state(store, run), whole)
    assert not (run / "run.lease").exists()


def test_two_processes_train_one_run_and_one_process_continues_it(
    store: Path, tmp_path: Path, whole: TrainState
) -> None:
    """C04, C07: the batches do not depend on the processes, so two and then one end where one alone does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    run = tmp_path / "run"
    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [start(store, run, environment={**cluster, "JAX_PROCESS_ID": str(index)}) for index in range(2)]
    wait_for_step(run, 4, processes[0])
    processes[1].send_signal(signal.SIGTERM)  # one is told, both save the same step
    for process in processes:
        finish(process)
    with Checkpoints(run, read_only=True) as checkpoints:
        stopped = checkpoints.latest()
    assert stopped is not None and 4 <= stopped < STEPS
    finish(start(store, run, "--resume"))
    continued = last_state(store, run)
    assert int(continued.step) == STEPS and int(continued.skipped) == 0
    for ours, theirs in zip(jax.tree.leaves(continued.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)  # sums over devices round in a different order
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))  # written once, not twice


def test_a_missing_store_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop() -> Path:
        raise NeuronetError("that is enough")

    monkeypatch.setattr(train, "ensure_demo_store", stop)
    assert train.main(["--config=tissue", f"--workdir={tmp_path}"]) == 1
    (said,) = (message for message in caplog.messages if "NO STORE" in message)
    assert "DEMO COHORT of synthetic heads with the settings of tissue:demo" in said


def test_a_run_that_cannot_train_fails_with_one_line(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*arguments(store, tmp_path / "a"), "--config.batch=64"]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and error.count("\n") == 1 and "lower the batch" in error
    assert not (tmp_path / "a").exists()  # the folder is free for the corrected command
    assert train.main(["--config=all_targets:demo", "--resume"]) == 2
    assert "--workdir" in capsys.readouterr().err
