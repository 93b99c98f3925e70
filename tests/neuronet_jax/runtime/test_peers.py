"""Processes join by the address of a coordinator, under Slurm, and on a Cloud TPU slice; elsewhere they stay alone."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jax
import pytest

from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError
from tests.processes import PATIENCE_S, free_port

HOSTS = {"worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1", "tpu-env": ""}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collects the arguments with which JAX was asked to join. The environment names no peers."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TPU_", "GCE_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES")):
            monkeypatch.delenv(name)
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: calls.append({"given": given, **named}))
    return calls


@contextmanager
def metadata(attributes: dict[str, str], status: int = 404) -> Iterator[str]:
    """Serves metadata as on Cloud TPU VMs and returns the address; other attributes get `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = attributes.get(self.path.removeprefix("/computeMetadata/v1/instance/attributes/"))
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else status)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_nobody_is_joined_without_peers(joined, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.join_cluster()
    monkeypatch.setenv(
        "SLURM_NTASKS", "2"
    )  # a shell in an allocation, or a batch script: srun has not started the process
    runtime.join_cluster()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    runtime.join_cluster()
    assert joined == []


@pytest.mark.parametrize(("tasks", "devices"), [("2", []), ("8", None)])
def test_a_task_alone_on_its_node_takes_all_gpus(
    joined, monkeypatch: pytest.MonkeyPatch, tasks: str, devices: list[int] | None
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    runtime.join_cluster()
    assert joined == [{"given": (), "local_device_ids": devices}]


def test_hosts_of_a_tpu_slice_join(joined, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    with metadata(HOSTS) as address:
        monkeypatch.setenv("GCE_METADATA_IP", address)
        runtime.join_cluster()
        assert joined == [{"given": ()}]
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # JAX sets it where there are no chips
        runtime.join_cluster()
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    for attributes in ({}, {"worker-network-endpoints": "unknown:unknown:127.0.0.1"}):
        with metadata(attributes) as address:
            monkeypatch.setenv("GCE_METADATA_IP", address)
            runtime.join_cluster()
    assert len(joined) == 1
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")  # as GKE does
    runtime.join_cluster()
    assert len(joined) == 2


@pytest.mark.parametrize("status", [0, 500])
def test_a_tpu_host_that_cannot_learn_its_peers_does_not_train_alone(
    joined, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    with ExitStack() as stack:
        monkeypatch.setenv("GCE_METADATA_IP", stack.enter_context(metadata({}, status)) if status else _closed_port())
        with pytest.raises(NeuronetError, match="TPU_WORKER_HOSTNAMES=localhost"):
            runtime.join_cluster()
    assert joined == []


def test_two_processes_find_each_other_by_the_metadata_of_a_tpu_slice() -> None:
    program = """\
import os
import jax
del os.environ["TPU_SKIP_MDS_QUERY"]  # set because this machine has no chips
from neuronet_jax import runtime
runtime.join_cluster()
print(jax.process_index(), jax.process_count())
"""
    port = str(free_port())
    common = {"JAX_FORCE_TPU_INIT": "1", "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": port}
    environment = {k: v for k, v in os.environ.items() if k != "TPU_SKIP_MDS_QUERY"} | common
    with ExitStack() as stack:
        processes = []
        for index in range(2):
            address = stack.enter_context(metadata({**HOSTS, "agent-worker-number": str(index)}))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    env={**environment, "GCE_METADATA_IP": address},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        answers = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [said.split() for said, _ in answers] == [["0", "2"], ["1", "2"]], answers


def test_D06_a_process_that_never_joins_is_named() -> None:
    program = "from neuronet_jax import runtime; runtime.JOIN_S = 2.0; runtime.join_cluster()"
    wanted = {
        ("0", "2"): "process 0 of 2 has waited 2 s for process 1 at",
        ("1", "2"): "process 1 of 2 has waited 2 s for process 0 at",
        ("0", "3"): "process 0 of 3 has waited 2 s for one or more of the processes 1, 2 at",
    }
    alone = []
    for index, count in wanted:
        cluster = {"JAX_COORDINATOR_ADDRESS": _closed_port(), "JAX_PROCESS_ID": index, "JAX_NUM_PROCESSES": count}
        command = [sys.executable, "-c", program]
        alone.append(subprocess.Popen(command, env={**os.environ, **cluster}, stderr=subprocess.PIPE, text=True))
    for process, said in zip(alone, wanted.values(), strict=True):
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 6, errors
        assert f"error: {said} 127.0.0.1:" in errors


def _closed_port() -> str:
    return f"127.0.0.1:{free_port()}"
