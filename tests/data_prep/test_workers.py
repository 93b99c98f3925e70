"""Workers: processes of this machine that nobody else can reach, and those of a real Dask scheduler."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tensorstore as ts
from dask import config as dask_config

from data_prep import build as build_module
from data_prep import cluster, shard, verify
from data_prep.shard import ShardRows
from neuronet_jax import files as files_module
from neuronet_jax import lease as lease_module
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.lease import lease
from neuronet_jax.store import arrays

SMALL = ["--voxel-size-mm=4", "--grid=48,56,48", "--shard-subjects=1"]
NAMES = tuple(f"{number}" for number in range(1001, 1009))


def holders(store: Path) -> dict[str, int]:
    """Returns the process that holds each shard."""
    found = {}
    for path in store.glob("unfinished-0*.lease"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            found[path.name] = json.loads(path.read_bytes())["pid"]
    return found


def kill_a_holder(store: Path, killed: list[int]) -> None:
    """Kills the first process that is seen to hold a shard."""
    while not killed and not (store / "COMPLETE").exists():
        for pid in holders(store).values():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return
        time.sleep(0.001)


def listening() -> set[str]:
    """Returns the addresses at which a process of this user listens, by TCP."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {fields[1] for fields in lines if fields[3] == "0A" and int(fields[7]) == os.getuid()}


def test_A46_a_build_with_workers_listens_nowhere(make_cohort, tmp_path):
    store, before, during = tmp_path / "store", listening(), set()
    command = [f"--manifest={make_cohort(NAMES, protocols=('fsl_fast',))}", f"--store={store}", *SMALL, "--workers=2"]
    process = subprocess.Popen([sys.executable, "-m", "data_prep.build", *command], stderr=subprocess.DEVNULL)
    held = set()
    while process.poll() is None:
        held |= set(holders(store).values())
        during |= listening()
        time.sleep(0.005)
    assert process.returncode == 0 and held and process.pid not in held
    assert during - before == set()


def test_A37_workers_end_with_a_killed_build_and_the_next_one_continues_at_once(make_cohort, build, tmp_path, tree):
    manifest, store = make_cohort(NAMES, protocols=("fsl_fast",)), tmp_path / "killed"
    command = [f"--manifest={manifest}", f"--store={store}", *SMALL, "--workers=2"]
    process = subprocess.Popen([sys.executable, "-m", "data_prep.build", *command], stderr=subprocess.DEVNULL)
    while process.poll() is None and not holders(store):
        time.sleep(0.001)
    workers = set(holders(store).values())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(lease_module._started(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(lease_module._started(pid) for pid in workers)
    began = time.monotonic()
    build(manifest, "killed", shard_subjects=1)
    assert time.monotonic() - began < 10  # it waits for no lease
    verify.remove_locks(str(store))
    build(manifest, "whole", shard_subjects=1)
    assert tree(store) == tree(tmp_path / "whole")


def _die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_kills_its_workers_ends_the_build():
    with pytest.raises(NeuronetError, match="E_WORKER: worker processes were killed 4 times in a row"):
        list(cluster.run(_die, {"a": (1,)}, workers=1))


@pytest.fixture
def scheduler(tmp_path):
    """The address of a real scheduler with two real workers, each of which has a process that starts it again."""
    address = tmp_path / "scheduler.json"
    processes = []

    def start(program: str, *options: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", f"distributed.cli.dask_{program}", "--no-dashboard", *options]
        with (tmp_path / f"{program}.log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    start("scheduler", "--host=127.0.0.1", "--port=0", f"--scheduler-file={address}")
    local = f"--local-directory={tmp_path}"
    start("worker", "--host=127.0.0.1", "--nworkers=2", "--nthreads=1", local, f"--scheduler-file={address}")
    deadline = time.monotonic() + 60
    while not address.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield json.loads(address.read_text())["address"]
    for process in processes:  # with what they started
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_A38_a_scheduler_whose_worker_is_killed_loses_no_subject(make_cohort, build, tmp_path, tree, scheduler):
    manifest, killed, store = make_cohort(NAMES, protocols=("fsl_fast",)), [], tmp_path / "there"
    killer = threading.Thread(target=kill_a_holder, args=(store, killed))
    killer.start()
    command = [f"--manifest={manifest}", f"--store={store}", *SMALL, f"--scheduler={scheduler}"]
    result = subprocess.run([sys.executable, "-m", "data_prep.build", *command], capture_output=True, check=False)
    killer.join()
    assert result.returncode == 0, result.stderr.decode()
    assert killed
    verify.remove_locks(str(store))
    build(manifest, "here", shard_subjects=1)
    assert tree(store) == tree(tmp_path / "here")


def test_a_scheduler_that_is_not_there_is_named(make_cohort, tmp_path, capsys):
    command = [f"--manifest={make_cohort(protocols=('fsl_fast',))}", f"--store={tmp_path / 'store'}", *SMALL]
    with dask_config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert build_module.main([*command, "--scheduler=tcp://127.0.0.1:9"]) == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_A38_a_worker_that_was_frozen_does_not_finish_the_shard_of_its_successor(tmp_path, monkeypatch):
    """Its lease was taken over meanwhile, which it learns before its work becomes final, not at its next beat."""
    files = Files(str(tmp_path))
    with lease(files, "unfinished-00000000.lease") as owned:
        owned.confirm()
        files.write("unfinished-00000000.lease", b'{"host": "elsewhere"}')
        owned.check()
        with pytest.raises(NeuronetError, match="was taken over"):
            owned.confirm()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"subjects": "", "rejects": [], "inputs": ""}', b"\xff"])
def test_an_empty_or_damaged_record_of_a_shard_counts_as_none(make_cohort, build, tmp_path, killed_at, tree, content):
    manifest = make_cohort(protocols=("fsl_fast",))
    with killed_at(9):
        build(manifest, "damaged", shard_subjects=1)
    record = tmp_path / "damaged" / ShardRows.name(0)
    assert record.exists()
    record.write_bytes(content)
    build(manifest, "damaged", shard_subjects=1)
    build(manifest, "whole", shard_subjects=1)
    assert tree(tmp_path / "damaged") == tree(tmp_path / "whole")


def test_a_store_that_is_damaged_as_a_whole_is_named(make_cohort, build, tmp_path, killed_at, monkeypatch):
    manifest = make_cohort(protocols=("fsl_fast",))
    with killed_at(9):
        build(manifest, shard_subjects=1)
    (tmp_path / "store" / "unfinished.json").write_bytes(b"")
    with pytest.raises(NeuronetError, match=r"E_MISMATCH: .*not readable"):
        build(manifest, shard_subjects=1)


def test_B11_a_server_that_goes_away_in_the_middle_of_a_build_is_named(
    make_cohort, gcs_server, gcs_bucket, capsys, monkeypatch
):
    """Within the bounds of every request, here a second; the message names the place, and the next run continues."""
    patience = {
        name: {"max_retries": 3, "initial_delay": "100ms", "max_delay": "200ms"} for name in files_module.RETRIES
    }
    monkeypatch.setattr(arrays, "RETRIES", patience)
    monkeypatch.setattr(files_module, "_context", lambda: ts.Context(patience))
    prepared = []

    def prepare(source, slot, settings, original=shard.prepare):
        prepared.append(slot)
        if prepared == [0, 1]:
            gcs_server.stop()
        return original(source, slot, settings)

    monkeypatch.setattr(shard, "prepare", prepare)
    command = [
        f"--manifest={make_cohort(protocols=('fsl_fast',))}",
        f"--store={gcs_bucket}/store",
        *SMALL,
        "--workers=0",
    ]
    began = time.monotonic()
    assert build_module.main(command) == 1
    assert time.monotonic() - began < 30
    assert f"E_IO: cannot replace 'unfinished-00000001.lease' in {gcs_bucket}/store" in capsys.readouterr().err
    gcs_server.start()
    assert build_module.main(command) == 0
    assert prepared == [0, 1, 1, 2]


@pytest.mark.soak
def test_a_worker_needs_less_than_1_gib_at_1_mm(make_cohort, tmp_path):
    """Three shards of eight subjects, by one worker. The peak is that of the largest process of the command."""
    manifest = make_cohort(tuple(str(1001 + number) for number in range(24)))
    options = [f"--store={tmp_path / 'store'}", "--shard-subjects=8", "--workers=1"]
    command = [sys.executable, "-m", "data_prep.build", f"--manifest={manifest}", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss < 2**20  # KiB
