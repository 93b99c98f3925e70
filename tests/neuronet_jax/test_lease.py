"""One owner at a time, on disk and in a bucket: rows A38 and D16."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuronet_jax import lease as module
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.lease import lease

NAME = "shard.lease"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["disk", "s3", "gcs"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    if request.param == "disk":
        yield Files(str(tmp_path))
    else:
        yield Files(request.getfixturevalue("bucket" if request.param == "s3" else "gcs_bucket") + "/leases")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    monkeypatch.setattr(module, "_PATIENCE_S", 0.5)


def foreign(beat: int = 0) -> bytes:
    holder = {
        "host": "elsewhere",
        "machine": "m",
        "pid": 1,
        "started": "2",
        "token": "0",
        "since": "noon",
        "beat": beat,
    }
    return json.dumps(holder).encode()


def test_A38_a_live_owner_is_named_with_host_and_time(files: Files) -> None:
    with lease(files, NAME):
        owner = json.loads(files.read(NAME) or b"")
        with pytest.raises(NeuronetError) as refused, lease(files, NAME):
            pass
        assert all(str(owner[key]) in str(refused.value) for key in ("host", "pid", "since"))
    assert files.names() == []
    with lease(files, NAME):
        pass


@pytest.mark.parametrize("beats", [True, False])
def test_A38_an_owner_elsewhere_counts_while_it_beats(files: Files, quick: None, beats: bool) -> None:
    files.write(NAME, foreign())
    if not beats:
        with lease(files, NAME) as mine:
            assert json.loads(files.read(NAME) or b"")["pid"] == os.getpid()
            mine.check()
        assert files.names() == []
        return
    timer = threading.Timer(0.1, lambda: files.write(NAME, foreign(1)))
    timer.start()
    with pytest.raises(NeuronetError, match="in use since noon by process 1 on elsewhere"), lease(files, NAME):
        pass
    timer.join()
    assert json.loads(files.read(NAME) or b"")["beat"] == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b'{"host": 3}'])
def test_an_unreadable_lease_is_that_of_an_unknown_owner(files: Files, quick: None, content: bytes) -> None:
    files.write(NAME, content)
    with lease(files, NAME) as mine:
        mine.check()
    assert files.names() == []


def test_of_many_that_see_an_abandoned_lease_one_gets_it(
    files: Files, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All have judged the lease as abandoned before the first one writes."""
    files.write(NAME, foreign())
    together = threading.Barrier(4)
    monkeypatch.setattr(module.Lease, "_is_alive", lambda *_: together.wait() < 0)
    release, got, refused = threading.Event(), [], []

    def take() -> None:
        try:
            with lease(files, NAME):
                got.append(threading.get_ident())
                release.wait(20)
        except NeuronetError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(got) + len(refused) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    release.set()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 3
    assert all("was faster" in text for text in refused)
    assert files.names() == []


def test_an_owner_learns_that_it_was_replaced_and_leaves_the_new_lease_alone(files: Files, quick: None) -> None:
    with lease(files, NAME) as mine:
        mine.check()
        files.write(NAME, foreign())
        deadline = time.monotonic() + 20
        while not mine._lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(NeuronetError, match="was taken over"):
            mine.check()
    assert files.read(NAME) == foreign()


def test_a_process_of_this_machine_that_was_killed_is_replaced_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = (
        "import os, signal, sys\n"
        "from neuronet_jax.files import Files\n"
        "from neuronet_jax.lease import lease\n"
        f"with lease(Files(sys.argv[1]), {NAME!r}):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert killed.returncode == -9 and (tmp_path / NAME).exists()
    began = time.monotonic()
    with lease(Files(str(tmp_path)), NAME):
        assert time.monotonic() - began < module.BEAT_S / 2
    assert any("taking over" in message and "which is gone" in message for message in caplog.messages)


def test_a_process_id_that_was_given_again_is_a_different_owner(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    parent = os.getppid()
    owner = {"host": "here", "machine": module._machine(), "pid": parent, "started": module._started(parent)}
    files.write(NAME, json.dumps(owner).encode())
    with pytest.raises(NeuronetError, match="E_LEASE"), lease(files, NAME):
        pass
    files.write(NAME, json.dumps({**owner, "started": "1"}).encode())
    with lease(files, NAME):
        pass
