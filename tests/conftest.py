"""Tests run on eight CPU devices, with JAX's implicit promotions forbidden; folders of real data; small stores."""

import os
import signal
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests write nothing to the user's cache folder
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

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
