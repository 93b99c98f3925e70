import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.flags import load
from neuronet_jax import runtime
from neuronet_jax.inference import cost
from neuronet_jax.inference.tiling import with_smaller_tiles
from neuronet_jax.models.network import build
from neuronet_jax.runs.model import Model

ROOT = Path(__file__).resolve().parents[3]


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "default", "XLA_FLAGS": "", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_F06_without_the_requested_accelerator_the_cpu_serves(platform):
    if any(device.platform != "cpu" for device in jax.devices()):
        pytest.skip("needs a machine without an accelerator")
    code = (
        "from neuronet_jax import runtime; print(runtime.start()); import jax; print(jax.device_get(jax.numpy.ones(1)))"
    )
    result = _python(code, JAX_PLATFORMS=platform)
    assert result.returncode == 0, result.stderr
    assert f"JAX_PLATFORMS={platform}: " in result.stderr and "continuing on the CPU" in result.stderr
    assert re.fullmatch(rf"no GPU or TPU found, running on {runtime.cores()} CPU cores?\n\[1\.\]\n", result.stdout)


LIMITED = """
import resource, sys
from dataclasses import replace
import numpy as np
from experiments.flags import load
from neuronet_jax.runs.model import Model
from neuronet_jax.inference.segment import segment
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.models.network import build

config = load("all_targets:demo")
names = ("fsl_fast", "fsl_first")
config = replace(config, protocols=names, model=replace(config.model, filters=(8, 8), compute_dtype="float32"))
model = Model(build(config.model, names, seed=3), config, 2.0)
head = np.random.default_rng(0).normal(100, 10, (160, 160, 160)).astype(np.float32)
options = Options(clean_up=False)  # which takes memory of its own, not the device's
expected = segment(model, head, options=options)  # this and the next line compile all programs: that takes memory too
segment(replace(model, max_voxels=head.size // 2), head, options=options)
with open("/proc/self/status") as file:
    status = dict(line.split(":") for line in file)
limit = (int(status["VmSize"].split()[0]) << 10) + (int(sys.argv[1]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
labels = segment(model, head, options=options)
print([float(np.mean(labels[name] == expected[name])) for name in names])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_F06_when_memory_really_runs_out_smaller_tiles_are_used():
    """The whole volume needs 240 to 280 MiB, tiles less than 180. Memory is given back at once, so that what ran before
    does not count. A library below XLA may end the process when it is the first without memory; then a different limit
    is tried.
    """
    for limit_mib in (200, 220, 180, 160):
        result = _python(LIMITED, str(limit_mib), MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="1000000")
        if "std::bad_alloc" in result.stderr:
            continue
        assert result.returncode == 0, result.stderr
        assert result.stdout == "[1.0, 1.0]\n"
        assert "the device ran out of memory with tiles of 160 × 160 × 160; continuing with" in result.stderr
        return
    raise AssertionError(f"no limit left room for tiles: {result.stderr}")


def test_F06_other_errors_of_the_device_are_raised():
    def run(tile):
        raise jax.errors.JaxRuntimeError("INTERNAL: the cable is loose")

    with pytest.raises(jax.errors.JaxRuntimeError, match="cable"):
        with_smaller_tiles(run, (64, 64, 64), 64**3, 8, 8)


def test_threads_take_turns_on_the_device_and_their_time_is_counted():
    at_work, most = [], []

    def run(tile):
        at_work.append(tile)
        most.append(len(at_work))
        time.sleep(0.02)
        at_work.pop()

    before_s = runtime.TURNS.taken_s
    threads = [threading.Thread(target=with_smaller_tiles, args=(run, (8,) * 3, 512, 8, 8)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5
    assert 0.1 <= runtime.TURNS.taken_s - before_s < 1


def test_the_expected_time_is_that_of_the_voxels_of_both_grids(monkeypatch):
    monkeypatch.setattr(cost, "cores", lambda: 8)
    own_s = cost.FEATURES_CPU_S + cost.READING_CPU_S
    assert cost.expected_s((100, 100, 100), (2.0, 2.0, 2.0), 2.0) == pytest.approx((own_s / 2, own_s * 1.2))
    finer_s = own_s + 6.4 * cost.INTERPOLATION_CPU_S  # 100³ voxels of 2 mm, and what is interpolated from them
    assert cost.expected_s((200, 200, 160), (1, 1, 1.25), 2.0) == pytest.approx((finer_s / 2, finer_s * 1.2))
    twice_s = finer_s + cost.FEATURES_CPU_S  # scores are read and interpolated of the mean alone
    assert cost.expected_s((200, 200, 160), (1, 1, 1.25), 2.0, 2) == pytest.approx((twice_s / 2, twice_s * 1.2))
    monkeypatch.setattr(cost, "cores", lambda: 1)
    assert cost.expected_s((100, 100, 100), (2.0, 2.0, 2.0), 2.0) == pytest.approx((own_s, own_s * 1.2))


def test_a_volume_is_split_over_the_cores_and_labelled_the_same(monkeypatch):
    config = load("all_targets:demo")
    config = replace(config, model=replace(config.model, filters=(4, 6), compute_dtype="float32"))
    model = Model(build(config.model, config.protocols, seed=3), config, 2.0)
    image = np.random.default_rng(0).normal(size=(1, 8, 24, 8, 1)).astype(np.float32)
    monkeypatch.setattr(runtime, "cores", lambda: 1)  # more devices than cores: somebody tests sharding
    structure, arrays = model.parts
    labels = jax.jit(lambda arrays, image: nnx.merge(structure, arrays).labels(image))
    whole = labels(arrays, image)
    assert isinstance(runtime.over_cores(image, 2, 2), np.ndarray)
    monkeypatch.setattr(runtime, "cores", lambda: 8)
    split = runtime.over_cores(image, 2, 2)
    assert split.sharding.num_devices == 6  # 24 is cut into six by multiples of 2; eight would cut a coarse voxel
    np.testing.assert_array_equal(labels(arrays, split), whole)
