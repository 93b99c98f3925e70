"""Training as a user runs it, in separate processes: killed and resumed, stopped and resumed, refused."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import train
from experiments.flags import load
from neuronet_jax.errors import NeuronetError
from neuronet_jax.inference.segment import segment
from neuronet_jax.runs.calibration import load_calibration
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.restore import restore
from neuronet_jax.store.reader import Store
from neuronet_jax.training.mesh import make_mesh
from neuronet_jax.training.pipeline import training_iterator
from neuronet_jax.training.step import TrainState, init_state
from tests.processes import PATIENCE_S, QUICK_XLA_FLAGS, free_port

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


def start(
    store: Path, run: Path, *extra: str, environment: dict[str, str] | None = None, fault: str = ""
) -> subprocess.Popen[str]:
    """Starts the command; `fault` is a program that runs before it, in its process."""
    alone = {**os.environ, "XLA_FLAGS": QUICK_XLA_FLAGS}  # as a user would, not on eight devices
    program = ["-c", f"{fault}\nimport sys; from experiments import train; sys.exit(train.main())"]
    command = [sys.executable, *(program if fault else ["-m", "experiments.train"]), *arguments(store, run), *extra]
    return subprocess.Popen(command, env={**alone, **(environment or {})}, stderr=subprocess.PIPE, text=True)


def start_two(store: Path, run: Path, *extra: str, fault: str = "") -> list[subprocess.Popen[str]]:
    """Starts the command in two processes, which train one run."""
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    indices = [{**cluster, "JAX_PROCESS_ID": str(index)} for index in range(2)]
    return [start(store, run, *extra, environment=settings, fault=fault) for settings in indices]


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    return errors


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    metrics = run / "metrics.jsonl"
    for _ in range(6000):
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


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])])
def test_D05_killed_and_resumed_equals_never_killed(store: Path, tmp_path: Path, whole: TrainState, kills: int) -> None:
    """Each kill comes at a random moment after the run has got further than before."""
    broken, resume, moment = tmp_path / "broken", (), random.Random()
    for number in range(kills):
        killed = start(store, broken, *resume)
        wait_for_step(broken, 1 + number * (STEPS - 1) // kills, killed)
        time.sleep(moment.uniform(0, 0.3))
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        resume = ("--resume", "--begin")  # the first may come before the first checkpoint
    finish(start(store, broken, *resume))
    jax.tree.map(
        np.testing.assert_array_equal, last_state(store, broken), whole
    )  # every bit of parameters, moments, optimiser, averages
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


SIGTERM_IN = """
import os, signal, threading
from experiments import train
from neuronet_jax.runs.checkpoint import Checkpoints
def interrupted(call, at):  # SIGTERM comes while the call goes on, of the number `at`
    count = 0
    def wrapped(*arguments, **options):
        nonlocal count
        count += 1
        if count == at:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return call(*arguments, **options)
    return wrapped
make = train.make_train_step
"""
AT = {
    "compilation": "train.make_train_step = lambda *a: interrupted(make(*a), 1)",
    "a step": "train.make_train_step = lambda *a: interrupted(make(*a), 2)",
    "validation": "train.validate = interrupted(train.validate, 1)",
    "save": "Checkpoints.save = interrupted(Checkpoints.save, 2)",
}


def test_D03_sigterm_in_compilation_step_validation_and_save(store: Path, tmp_path: Path, whole: TrainState) -> None:
    """Each stops the run with status 0 after that step or the next. It goes on, and ends as if it was never hit."""
    run, reached = tmp_path / "run", [0]
    for place, fault in AT.items():
        errors = finish(start(store, run, *["--resume"] * (place != "compilation"), fault=SIGTERM_IN + fault))
        assert "SIGTERM: saving after this step" in errors and "stopped as asked" in errors, place
        with Checkpoints(run, read_only=True) as checkpoints:
            reached.append(checkpoints.latest() or 0)
        assert reached[-2] < reached[-1] < STEPS
    assert reached[1] == 1 and reached[3] in (5, 6)
    said = errors.splitlines()
    assert any(line.startswith("stopped as asked") and line.endswith("continue with --resume") for line in said)
    assert any(line.startswith(f"training tissue:demo from step {reached[-2]} to") for line in said)
    assert sum(line.startswith("time: ") for line in said) == 1
    finish(start(store, run, "--resume"))
    jax.tree.map(np.testing.assert_array_equal, last_state(store, run), whole)
    model = restore(run)
    labels = segment(model, np.random.default_rng(0).normal(100, 20, (20, 24, 17)).astype(np.float32))
    assert set(labels) == {"fsl_fast", "fsl_first"} and labels["fsl_first"].shape == (20, 24, 17)
    text = "".join(path.read_text(errors="ignore") for path in run.rglob("*") if path.is_file())
    calibration = load_calibration(str(run), model.origin.step)  # for the checkpoint that is restored
    assert calibration is not None and calibration.heads == 1 and calibration.threshold is None
    assert "subject0" not in text  # A41: no identifier of a participant in a run's folder


NO_MEMORY = """
import resource
import jax
from experiments import train
make = train.make_train_step
def starved(*arguments):
    step, calls = make(*arguments), []
    def wrapped(state, batch):
        calls.append(1)
        if len(calls) == 2:  # compiling takes memory too
            jax.block_until_ready((state, batch))  # what the first step holds is not there to be used again
            used = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")]
            limit = (int(used[0]) << 10) + (SPARE_MIB << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return step(state, batch)
    return wrapped
train.make_train_step = starved
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_D08_out_of_memory_ends_with_5_and_names_batch_and_crop(store: Path, tmp_path: Path) -> None:
    """Memory really runs out, by one large piece: a step of this crop asks for 517 MB at once, and less is left.

    On one device: of two, one could still get its memory and would wait for the other, until XLA ends the process. What
    is left is for everything small. Where some of that is the first without memory, C++ ends the process before XLA can
    say anything; then a different limit is tried. Freed memory is given back at once, so that the first step does not
    leave enough.
    """
    settings = {"JAX_NUM_CPU_DEVICES": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    for spare_mib in (384, 256, 128):
        fault = NO_MEMORY.replace("SPARE_MIB", str(spare_mib))
        process = start(store, tmp_path / str(spare_mib), "--config.data.crop=96", environment=settings, fault=fault)
        _, errors = process.communicate(timeout=PATIENCE_S)
        if "std::bad_alloc" not in errors:
            break
    assert process.returncode == 5, errors
    assert "error: out of device memory with batch 2 and crop (96, 96, 96); lower --config.batch or" in errors


SHORT = """
from experiments import train
class Watchdog(train.Watchdog):  # patient until the first step, which compiles; it ticks every 2 s
    def __init__(self, timeout_s): super().__init__(40.0)
    def progress(self):
        super().progress()
        self._timeout_s = 2.0
train.Watchdog = Watchdog
"""


def test_D07_a_frozen_process_ends_the_other_with_6(store: Path, tmp_path: Path) -> None:
    run, most = tmp_path / "run", 100000
    long = (f"--config.steps={most}", f"--config.evaluate_every={most}", f"--config.checkpoint_every={most}")
    processes = start_two(store, run, *long, fault=SHORT)
    try:
        wait_for_step(run, 3, processes[0])
        processes[1].send_signal(signal.SIGSTOP)
        _, errors = processes[0].communicate(timeout=PATIENCE_S)
        assert processes[0].returncode == 6, errors
        assert "[process 0 of 2] no progress for 4 s: ending the process with status 6" in errors
        assert "train.py" in errors  # where it waits
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.fixture
def in_process(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, on one device, with a run of four steps in `tmp_path / "run"`."""
    monkeypatch.setattr(train, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    short = ("--config.steps=4", "--config.checkpoint_every=1", "--config.evaluate_every=100")
    return lambda *extra: train.main([*arguments(store, tmp_path / "run"), *short, *extra])


@pytest.mark.filterwarnings("default::neuronet_jax.errors.CodedWarning")  # of the calibration, which restores the run
def test_E15_a_training_goes_on_whatever_happens_to_its_older_checkpoints(
    in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog
) -> None:
    """E03 and D13 follow, by the same command on the run that is left."""
    folder, save = tmp_path / "run" / "checkpoints", Checkpoints.save

    def damaging(self: Checkpoints, step: int, *arguments, **options) -> None:
        self.wait()
        if step > 1:
            (folder / str(step - 1) / "run" / "metadata").write_text("[]")
        save(self, step, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", damaging)
        assert in_process() == 0
    for step in (1, 2, 3):
        assert sum(f"CHECKPOINT {step} IS DAMAGED" in message for message in caplog.messages) == 1

    (folder / "4" / "state" / "_METADATA").write_text("{}")
    for options, said in (
        ((), "holds a run already: continue it with --resume"),
        (("--resume", "--config.seed=7"), "was trained with a different config: seed was 0, is 7"),
        (("--resume", "--strict"), "cannot restore any checkpoint of"),
    ):
        capsys.readouterr()
        assert in_process(*options) == 1
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "3", "4"]  # untouched by all three


def test_C09_slow_storage_is_seen_in_the_metrics(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Store.read_crops_into

    def slow(*arguments):
        time.sleep(1.0)  # a read of a batch
        return read(*arguments)

    monkeypatch.setattr(Store, "read_crops_into", slow)
    assert in_process("--config.data.prefetch=1", "--config.steps=6") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    # The step of so small a network takes 0.05 s; around a save or a validation, batches have time to arrive.
    assert max(line["wait_fraction"] for line in logged) > 0.5
    waited = logged[-1]["seconds/input"] - logged[0]["seconds/input"]
    assert waited > 1.0 and waited > logged[-1]["seconds/step"]
    assert logged[-1]["goodput"] < 0.5


def test_E04_E06_a_disk_that_is_full_at_the_last_save_ends_with_1(
    in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, save = tmp_path / "run" / "checkpoints", Checkpoints.save

    def filling(self: Checkpoints, step: int, *arguments, **options) -> None:
        self.wait()
        if step == 4:
            with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(4096))
        save(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", filling)
    with disk(folder, "size=4m"):
        assert in_process() == 1
        assert "checkpoint 4 could not be saved" in capsys.readouterr().err
        (folder / "filler").unlink()
        with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
            assert checkpoints.sound() == [2, 3]  # the latest two


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """Mounts a small file system of its own at `folder`. Skips the test where that is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs, which takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_D01_a_run_that_cannot_learn_ends_with_4_and_names_its_batches(store: Path, tmp_path: Path) -> None:
    """Its learning rate is far too high: every update would be infinite. The weights that are kept are finite.

    Two processes, with one crop of each batch, record all of it.
    """
    run = tmp_path / "run"
    settings = (
        "--config.optimizer.learning_rate=3e38",
        "--config.optimizer.schedule=constant",
        "--config.profile_steps=2,3",
    )
    for process in start_two(store, run, *settings):
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 4, errors
        assert "error: 11 updates in a row were skipped up to step 11" in errors and "skipped.jsonl names the" in errors
    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
    config = load("tissue:demo", [a for a in arguments(store, run) if a.startswith("--config.")])
    with contextlib.closing(training_iterator(Store.open(str(store)), config)) as batches:
        for line, batch in zip(lines, batches, strict=False):
            assert set(line) == {"step", "loss", "gradient_norm", "slots", "starts"} and line["gradient_norm"] > 0
            crops = zip(batch["slot"].tolist(), batch["start"].tolist(), strict=True)
            assert sorted(zip(line["slots"], line["starts"], strict=True)) == sorted(crops)
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
        _, errors = second.communicate(timeout=PATIENCE_S)
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
    run = tmp_path / "run"
    processes = start_two(store, run)
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
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config=tissue"]) == 1
    (said,) = (message for message in caplog.messages if "NO STORE" in message)
    assert "DEMO COHORT of synthetic heads with the settings of tissue:demo" in said and "--strict refuses" in said


def test_B02_a_damaged_store_ends_the_training_with_the_remedy(
    in_process, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in (path for path in (store / "image" / "c").rglob("*") if path.is_file()):
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 1
        shard.write_bytes(content)
    assert in_process() == 1
    error = capsys.readouterr().err
    assert "E_CRC: image of the subject in slot" in error and "with --repair, builds that shard again" in error


@pytest.mark.parametrize("option", ["--strict", "--workdir=run"])
def test_the_command_of_a_study_without_its_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(train, "ensure_demo_store", lambda: pytest.fail("the demo cohort must not be used"))
    monkeypatch.chdir(tmp_path)
    assert train.main(["--config=tissue", option]) == 2
    assert "--config=tissue names no store: add --config.data.store=" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_folder_without_a_run_is_refused(
    in_process, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process("--resume") == 1
    assert f"{tmp_path / 'run'} holds no run to continue; correct --workdir, or add --begin" in capsys.readouterr().err
    assert in_process("--begin") == 2  # without --resume it means nothing


def test_a_run_begins_with_the_weights_of_an_earlier_one(
    in_process, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, later = tmp_path / "run", tmp_path / "later"
    assert in_process() == 0
    still = ("--config.steps=1", "--config.optimizer.learning_rate=0", "--config.optimizer.ema_decay=0")
    assert in_process(f"--init={earlier}", f"--workdir={later}", *still) == 0
    before, after = restore(earlier), restore(later)
    for ours, theirs in zip(*(jax.tree.leaves(nnx.state(m.network, nnx.Param)) for m in (after, before)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    described = json.loads((later / "training_data.json").read_text())
    assert described["begun_with"]["weights_sha256"] == before.origin.weights_sha256
    assert in_process(f"--init={earlier}", f"--workdir={later}", "--resume", "--config.steps=2") == 1  # another rate
    capsys.readouterr()
    assert in_process(f"--init={earlier}", f"--workdir={tmp_path / 'wider'}", "--config.model.filters=4,8") == 1
    assert "of a different network: filters is (4, 8) here, (4, 6) there" in capsys.readouterr().err


def test_a_run_that_cannot_train_fails_with_one_line(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*arguments(store, tmp_path / "a"), "--config.batch=64"]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and error.count("\n") == 1 and "lower the batch" in error
    assert not (tmp_path / "a").exists()  # the folder is free for the corrected command
    assert train.main(["--config=all_targets:demo", "--resume"]) == 2
    assert "--workdir" in capsys.readouterr().err
