"""Checkpoints: the saved state comes back, complete or not at all, on any devices, and every damage is found."""

import contextlib
import dataclasses
import errno
import importlib.util
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.flags import load
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs import checksums
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.checkpoint_info import SCHEMA
from neuronet_jax.runs.checksums import MANIFEST
from tests.processes import PATIENCE_S, QUICK_XLA_FLAGS

ROOT = Path(__file__).parents[3]
GOLDEN = Path(__file__).parent / "goldens" / "checkpoint_v1"


@pytest.fixture(scope="module")
def config() -> Config:
    return load("all_targets:demo")


@pytest.fixture
def open_run(tmp_path):
    """Opens the checkpoints of a run, and closes them when the test ends."""
    opened: list[Checkpoints] = []

    def open_(name: str = "run", **options) -> Checkpoints:
        opened.append(Checkpoints(tmp_path / name, **options))
        return opened[-1]

    yield open_
    for checkpoints in opened:
        checkpoints.close()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    params: dict
    moments: dict
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


def _state(seed: int) -> State:
    rng = np.random.default_rng(seed)
    params = {"encoder": {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)}, "bias": jnp.zeros(3)}
    return State(
        params=params,
        moments={"mean": jnp.asarray(rng.normal(size=5), jnp.bfloat16)},
        opt_state=optax.adam(1e-3).init(params),
        step=jnp.int32(seed),
        key=jax.random.key(seed),
    )


def _small(step: int) -> dict:
    return {"params": {"w": np.full(4, step, np.float32)}}


def _equal(a, b) -> None:
    def plain(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(plain(x), plain(y))


def _abstract(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _folders(checkpoints: Checkpoints) -> set[str]:
    return {path.name for path in Path(checkpoints._folder).iterdir()}


def _save(checkpoints: Checkpoints, config: Config, *steps: int, **scores: float) -> None:
    """Saves small checkpoints of `steps`; `s2=.5` is the score of step 2."""
    for step in steps:
        checkpoints.save(step, _small(step), {"next_index": step}, config, score=scores.get(f"s{step}"))
    checkpoints.wait()


def _seal(folder: Path) -> None:
    """Writes the manifest again, as if the checkpoint had been saved with its present content."""
    checksums.write_manifest(epath.Path(folder))


# -- the saved state comes back


def test_state_position_and_config_come_back(open_run, config):
    saved, position = _state(3), {"next_index": 7, "nested": [1, None, "two"]}
    writer = open_run()
    writer.save(3, saved, position, config)
    writer.wait()
    restored = open_run(read_only=True).restore(_abstract(saved))
    _equal(restored.state, saved)
    assert (restored.data_position, restored.step) == (position, 3)
    assert open_run(read_only=True).config(3) == config


def test_a_random_key_continues_with_the_same_numbers(open_run, config):
    checkpoints = open_run()
    checkpoints.save(1, {"key": jax.random.key(5)}, None, config)
    key = checkpoints.restore({"key": jax.eval_shape(lambda: jax.random.key(0))}).state["key"]
    np.testing.assert_array_equal(jax.random.normal(key, (4,)), jax.random.normal(jax.random.key(5), (4,)))


def test_part_of_the_state_for_inference(open_run, config):
    saved = _state(1)
    checkpoints = open_run()
    checkpoints.save(1, saved, None, config)
    part, step = checkpoints.restore_params({"params": _abstract(saved.params), "moments": _abstract(saved.moments)})
    _equal(part, {"params": saved.params, "moments": saved.moments})
    assert step == 1
    with pytest.raises(NeuronetError, match="params/other: not in the checkpoint"):
        checkpoints.restore_params({"params": {"other": saved.step}})


def test_saving_is_not_disturbed_by_donation(open_run, config):
    """The next steps overwrite the donated buffers while the background thread writes."""
    checkpoints = open_run()
    devices = NamedSharding(Mesh(jax.devices(), "d"), PartitionSpec("d"))
    state = {"w": jax.device_put(jnp.ones(2**20), devices)}
    step = jax.jit(lambda state: {"w": state["w"] + 1}, donate_argnums=0)
    state = step(state)
    checkpoints.save(1, state, None, config)
    for _ in range(50):
        state = step(state)
    jax.block_until_ready(state)
    np.testing.assert_array_equal(checkpoints.restore(state).state["w"], np.full(2**20, 2.0))


def test_latest_kept_and_best_kept(open_run, config):
    checkpoints = open_run(keep=2)
    _save(checkpoints, config, 1, 2, 3, 4, 5, s1=0.3, s2=0.8, s4=0.8, s5=float("nan"))
    assert checkpoints.steps() == [4, 5]
    assert (checkpoints.latest(), checkpoints.best()) == (5, 4)  # of equal scores, the later
    _save(checkpoints, config, 6, 7, s6=0.7)
    assert checkpoints.steps() == [4, 6, 7]
    _save(checkpoints, config, 8, 9, s8=0.9)
    assert checkpoints.steps() == [8, 9]
    assert (open_run(read_only=True).latest(), open_run(read_only=True).best()) == (9, 8)


def test_leaving_the_context_waits_for_the_save(tmp_path, config):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _small(1), None, config)
    assert checkpoints.steps() == [1]


def test_reader_cannot_save_and_is_quiet(open_run, config, caplog):
    _save(open_run(), config, 1)
    caplog.clear()
    reader = open_run(read_only=True)
    reader.restore(_small(0))
    with pytest.raises(NeuronetError, match="read_only"):
        reader.save(2, _small(2), None, config)
    assert caplog.records == []  # Orbax would name the folder


def test_no_checkpoint_yet(open_run):
    checkpoints = open_run()
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    with pytest.raises(NeuronetError, match="there is none"):
        checkpoints.restore(_small(0))


def test_leaves_other_than_arrays_are_refused(open_run, config):
    with pytest.raises(NeuronetError, match=r"params/rate is 0\.5"):
        open_run().save(1, {"params": {"rate": 0.5}}, None, config)


# -- kills, damage, failures

KILLED = """
import os, signal, sys
import numpy as np
from experiments.flags import load
from neuronet_jax.runs.checkpoint import Checkpoints

run, where, armed, events = sys.argv[1], sys.argv[2], False, 0

def count(event, args):  # every file operation of Python passes here
    global events
    if armed and event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir"):
        paths = [os.fsdecode(a) for a in args[:1] if isinstance(a, (str, bytes, os.PathLike))]
        if any(path.startswith(run) for path in paths):
            events += 1
            if where == str(events) or where == f"{event} {os.path.basename(paths[0])}":
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
config = load("all_targets:demo")
checkpoints = Checkpoints(run, keep=1)
for step in (1, 2, 3):
    armed = step == 3
    checkpoints.save(step, {"params": {"w": np.full(4, step, np.float32)}}, {"next_index": step}, config)
    checkpoints.wait()
checkpoints.close()
"""


def _run_killed(run: Path, where: str) -> subprocess.Popen:
    environment = {**os.environ, "XLA_FLAGS": QUICK_XLA_FLAGS}
    return subprocess.Popen([sys.executable, "-c", KILLED, str(run), where], cwd=ROOT, env=environment)


def _check_after_kill(checkpoints: Checkpoints, config: Config, steps: tuple[int, ...]) -> None:
    restored = checkpoints.restore(_abstract(_small(0)))
    assert restored.step in steps
    _equal(restored.state, _small(restored.step))
    assert restored.data_position == {"next_index": restored.step}
    _save(checkpoints, config, restored.step + 1)  # the run continues, over the remains
    assert _folders(checkpoints) == {str(restored.step + 1)}


def test_E01_SIGKILL_during_save_leaves_the_previous_or_the_new_step(tmp_path, open_run, config):
    kills = {
        "os.mkdir 3.orbax-checkpoint-tmp": 2,
        "open position.json": 2,
        f"open {MANIFEST}": 2,
        "os.rename 3.orbax-checkpoint-tmp": 2,  # the commit itself
        "os.rename 2": 3,  # removal of the old one
        "os.rmdir 2.deleting": 3,
    }
    runs = [(tmp_path / str(i), where, step) for i, (where, step) in enumerate(kills.items())]
    processes = [_run_killed(run, where) for run, where, _ in runs]
    assert [process.wait(PATIENCE_S) for process in processes] == [-signal.SIGKILL] * len(runs)
    for run, _, step in runs:
        _check_after_kill(open_run(run.name, keep=1), config, (step,))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_E01_SIGKILL_at_every_file_operation(tmp_path, open_run, config):
    for operation in range(1, 1000):
        run = f"run{operation}"
        if _run_killed(tmp_path / run, str(operation)).wait(PATIENCE_S) == 0:
            break  # the save has fewer operations
        _check_after_kill(open_run(run, keep=1), config, (2, 3))
    assert operation > 40


def test_E02_step_without_manifest_or_empty_is_ignored_and_reported(open_run, config, caplog):
    first = open_run()
    _save(first, config, 1, 2, 3)
    folder = Path(first._folder)
    (folder / "3" / MANIFEST).unlink()
    (folder / "4").mkdir()
    (folder / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        reader = open_run(read_only=True)
    assert sorted(record.message for record in caplog.records if record.name == "neuronet_jax.runs.checkpoint") == [
        "checkpoint 3 was never finished and is ignored",
        "checkpoint 4 was never finished and is ignored",
    ]
    assert reader.restore(_small(0)).step == 2
    assert _folders(reader) == {"1", "2", "3", "4", "notes"}  # a reader changes nothing
    writer = open_run()
    assert writer.latest() == 2
    _save(writer, config, 3, 4)  # their names are free again
    assert writer.steps() == [2, 3, 4]


def _damage_truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _damage_flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def _damage_delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [_damage_truncate, _damage_flip, _damage_delete])
def test_E03_damage_to_any_file_is_found(tmp_path, open_run, config, damage, caplog):
    writer = open_run("original")
    _save(writer, config, 1, 2)
    names = [*checksums.covered(writer._folder / "2"), MANIFEST]
    assert len(names) > 8
    for number, name in enumerate(names):
        shutil.copytree(tmp_path / "original", tmp_path / f"copy{number}")
        damage(tmp_path / f"copy{number}" / "checkpoints" / "2" / name)
        assert checksums.damage(epath.Path(tmp_path / f"copy{number}" / "checkpoints" / "2")), name
    last = f"copy{number}"
    restored = open_run(last, read_only=True).restore(_small(0))
    assert restored.step == 1
    _equal(restored.state, jax.tree.map(jnp.asarray, _small(1)))


def test_E03_fall_back_is_loud_and_strict_is_an_error(open_run, config, caplog):
    writer = open_run()
    _save(writer, config, 1, 2, 3)
    folder = Path(writer._folder)
    _damage_flip(folder / "3" / "state" / "_METADATA")
    reader = open_run(read_only=True)
    with pytest.raises(NeuronetError, match=r"_METADATA does not have its checksum; sound ones: \[1, 2\]"):
        reader.restore(_small(0), strict=True)
    with pytest.raises(NeuronetError, match="cannot restore checkpoint 3"):
        reader.restore(_small(0), step=3)
    with caplog.at_level(logging.WARNING):
        assert writer.restore(_small(0)).step == 2
    assert "CHECKPOINT 3 IS DAMAGED: state/_METADATA does not have its checksum" in caplog.text
    _save(writer, config, 3)  # the run reaches the step again
    assert writer.restore(_small(0)).step == 3
    assert _folders(writer) == {"1", "2", "3", "3.damaged"}


@pytest.fixture
def small_files():
    """Limits files to 64 kB: writing more fails with EFBIG, as it would with ENOSPC or EDQUOT."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, previous[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("call", ["check", "save", "wait", "close"])
def test_E04_failed_background_save_is_raised_by_the_next_call(tmp_path, config, small_files, call):
    checkpoints = Checkpoints(tmp_path)
    _save(checkpoints, config, 1)
    noise = {"params": {"w": np.random.default_rng(0).integers(0, 255, 2**18, dtype=np.uint8)}}
    small_files()
    checkpoints.save(2, noise, None, config)
    manager = checkpoints._manager
    assert manager is not None
    while manager.is_saving_in_progress():
        time.sleep(0.01)
    calls = {
        "check": checkpoints.check,
        "save": lambda: checkpoints.save(3, _small(3), None, config),
        "wait": checkpoints.wait,
        "close": checkpoints.close,
    }
    with pytest.raises(NeuronetError, match="checkpoint 2 could not be saved"):
        calls[call]()
    assert checkpoints.steps() == [1]
    if call != "close":
        checkpoints.close()


def test_E04_check_is_silent_while_all_is_well(open_run, config):
    checkpoints = open_run()
    checkpoints.check()
    checkpoints.save(1, _small(1), None, config)
    for _ in range(100):
        checkpoints.check()
        time.sleep(0.002)
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("step", [2, 3])
def test_E05_save_that_would_be_skipped_is_an_error(open_run, config, step):
    """Raises at once, instead of logging and counting: a loop that saves backwards must not continue training."""
    checkpoints = open_run()
    _save(checkpoints, config, 3)
    with pytest.raises(NeuronetError, match=rf"checkpoint {step} was not saved: there is a later one, 3"):
        checkpoints.save(step, _small(step), None, config)
    assert checkpoints.steps() == [3]


def test_E05_orbax_skipping_is_an_error(open_run, config, monkeypatch):
    checkpoints = open_run()
    monkeypatch.setattr(checkpoints._manager, "save", lambda *args, **options: False)
    with pytest.raises(NeuronetError, match="Orbax skipped it"):
        checkpoints.save(1, _small(1), None, config)


def test_E06_failure_in_close_is_raised(tmp_path, config, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    manager = checkpoints._manager
    assert manager is not None
    monkeypatch.setattr(manager, "wait_until_finished", lambda: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    monkeypatch.setattr(manager, "close", lambda: None)
    with pytest.raises(NeuronetError, match="I/O error"):
        checkpoints.close()
    monkeypatch.undo()
    manager.close()


def test_E06_a_failure_in_close_does_not_hide_why_the_run_ends(tmp_path, config, monkeypatch, caplog):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with contextlib.suppress(KeyError), Checkpoints(tmp_path / "a") as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "close", fail)
        raise KeyError("the reason")
    assert "could not be closed: [Errno 28] No space left on device" in caplog.text
    with pytest.raises(NeuronetError, match="could not be closed"), Checkpoints(tmp_path / "b") as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "close", fail)


# -- other models, other devices, other releases


def test_E07_every_difference_is_listed(open_run, config):
    checkpoints = open_run()
    saved = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4, jnp.bfloat16), "c": jnp.zeros(1), "same": jnp.zeros(2)}
    checkpoints.save(1, saved, None, config)
    wanted = {"a": jnp.zeros((3, 2)), "b": jnp.zeros(4), "d": {"e": jnp.zeros(1)}, "same": jnp.zeros(2)}
    with pytest.raises(NeuronetError) as raised:
        checkpoints.restore(wanted)
    assert str(raised.value).splitlines() == [
        "checkpoint 1 does not fit this model:",
        "  d/e: not in the checkpoint",
        "  c: only in the checkpoint",
        "  a: float32[2, 3] in the checkpoint, float32[3, 2] here",
        "  b: bfloat16[4] in the checkpoint, float32[4] here",
    ]


def _on(devices: int, state: dict) -> dict:
    mesh = Mesh(jax.devices()[:devices], "d")
    specs = {"w": PartitionSpec("d"), "rows": PartitionSpec(None, "d"), "step": PartitionSpec()}
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in state.items()}


def test_E08_eight_devices_then_one_then_four(open_run, config):
    values = {"w": jnp.arange(16.0), "rows": jnp.arange(24.0).reshape(3, 8), "step": jnp.int32(5)}
    checkpoints = open_run()
    for step, devices in enumerate((8, 1, 4), start=1):
        target = _on(devices, values)
        if step > 1:
            restored = checkpoints.restore(target).state
            _equal(restored, values)
            assert all(leaf.sharding == target[name].sharding for name, leaf in restored.items())
            target = restored
        checkpoints.save(step, target, None, config)
    assert len(_on(4, values)["w"].sharding.device_set) == 4


def test_E09_missing_data_position(open_run, config):
    checkpoints = open_run()
    _save(checkpoints, config, 1)
    folder = Path(checkpoints._folder) / "1"
    shutil.rmtree(folder / "position")
    _seal(folder)
    with pytest.raises(NeuronetError, match=r"holds no data position; give --reset-data"):
        checkpoints.restore(_small(0))
    restored = checkpoints.restore(_small(0), reset_data=True)
    assert (restored.data_position, restored.step) == (None, 1)


def test_E09_a_different_kind_of_random_key(open_run, config):
    checkpoints = open_run()
    checkpoints.save(1, {"key": jax.random.key(0)}, None, config)
    with pytest.raises(NeuronetError, match=r"key: key<fry>\[\] in the checkpoint, key<rbg>\[\] here"):
        checkpoints.restore({"key": jax.random.key(0, impl="rbg")})


def test_C04_positions_of_an_older_release(open_run, config):
    """One file per process, each with the number of processes inside, which the data iterator judges."""
    checkpoints = open_run()
    _save(checkpoints, config, 1)
    folder = Path(checkpoints._folder) / "1"
    (folder / "position" / "position.json").rename(folder / "position" / "process_0_of_2.json")
    _seal(folder)
    assert checkpoints.restore(_small(0)).data_position == {"next_index": 1}


def test_E10_reader_of_the_latest_survives_the_next_save(open_run, config, monkeypatch):
    writer = open_run(keep=2)
    _save(writer, config, 1, 2)
    reader = open_run(read_only=True)
    sound = reader._sound

    def slow(step, strict):
        chosen = sound(step, strict)
        _save(writer, config, 3)  # the writer continues and removes the oldest
        return chosen

    monkeypatch.setattr(reader, "_sound", slow)
    restored = reader.restore(_small(0))
    assert restored.step == 2
    _equal(restored.state, jax.tree.map(jnp.asarray, _small(2)))
    assert writer.steps() == [2, 3]


def test_E10_nothing_is_removed_when_the_new_save_fails(tmp_path, config, small_files):
    checkpoints = Checkpoints(tmp_path, keep=1)
    _save(checkpoints, config, 1)
    small_files()
    checkpoints.save(2, {"w": np.random.default_rng(0).integers(0, 255, 2**18, dtype=np.uint8)}, None, config)
    with pytest.raises(NeuronetError, match="could not be saved"):
        checkpoints.close()
    assert checkpoints.steps() == [1]


def test_E10_interrupted_removal_is_finished_later(open_run, config):
    checkpoints = open_run(keep=1)
    _save(checkpoints, config, 1)
    shutil.copytree(Path(checkpoints._folder) / "1", Path(checkpoints._folder) / "0.deleting")
    assert open_run(read_only=True).steps() == [1]
    assert _folders(open_run(keep=1)) == {"1"}


def test_E11_checkpoint_of_schema_1_can_be_read(tmp_path, open_run):
    """The golden checkpoint was written by the release that made schema 1; the end of this file shows how."""
    shutil.copytree(GOLDEN, tmp_path / "run")
    checkpoints = open_run(read_only=True)
    restored = checkpoints.restore(_abstract(_state(0)))
    _equal(restored.state, _state(1))
    assert restored.data_position == {"next_index": 1}
    assert checkpoints.best() == 1
    assert checkpoints.config(1).protocols == ("fsl_fast", "fsl_first", "spm_tissue", "malp_em", "malp_em_tissue")


def test_E11_checkpoint_of_a_newer_schema_is_refused(open_run, config):
    checkpoints = open_run()
    _save(checkpoints, config, 1, 2)
    run = Path(checkpoints._folder) / "2" / "run" / "metadata"
    run.write_text(json.dumps({**json.loads(run.read_text()), "schema": SCHEMA + 1}))
    _seal(run.parents[1])
    with pytest.raises(
        NeuronetError, match=rf"checkpoint 2 has schema {SCHEMA + 1}, this release reads up to {SCHEMA}"
    ):
        checkpoints.restore(_small(0))


def test_E13_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", "/proc/run"):
        with pytest.raises(NeuronetError, match=r"cannot write checkpoints.*--workdir"):
            Checkpoints(place)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
    with pytest.raises(NeuronetError, match="No space left on device"):
        Checkpoints(tmp_path / "run")


def test_E13_no_run_to_read(tmp_path):
    with pytest.raises(NeuronetError, match="no checkpoints in"):
        Checkpoints(tmp_path / "missing", read_only=True)
    assert not (tmp_path / "missing").exists()


def test_E13_relative_path_is_kept_when_the_process_moves(tmp_path, config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _save(checkpoints, config, 1)
    checkpoints.close()
    assert (tmp_path / "run" / "checkpoints" / "1" / MANIFEST).is_file()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_E14_nothing_outside_the_run_directory_is_needed(tmp_path, open_run, config):
    """The run directory is the only tier: a replaced node loses nothing, whatever its local disks held."""
    writer = Checkpoints(tmp_path / "there")
    _save(writer, config, 1)
    writer.close()
    shutil.move(tmp_path / "there", tmp_path / "here")
    restored = open_run("here").restore(_small(0))
    assert (restored.step, restored.data_position) == (1, {"next_index": 1})


def test_G04_no_secret_of_the_environment_is_stored(tmp_path, open_run, config, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hunter2")
    _save(open_run(), config, 1)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not any(b"hunter2" in path.read_bytes() for path in files)


# -- buckets


def test_checkpoints_in_a_bucket_need_what_reads_it(monkeypatch):
    with pytest.raises(NeuronetError, match="are kept on a file system or at gs://, got s3://bucket/run"):
        Checkpoints("s3://bucket/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NeuronetError, match=r"need gcsfs: pip install 'neuronet-jax\[gcs\]'"):
        Checkpoints("gs://bucket/run")


if __name__ == "__main__":  # PYTHONPATH=. python tests/neuronet_jax/runs/test_checkpoint.py, once per schema
    golden = Checkpoints(GOLDEN)
    golden.save(1, _state(1), {"next_index": 1}, load("all_targets:demo"), score=0.5)
    golden.close()
