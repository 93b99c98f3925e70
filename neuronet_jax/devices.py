"""What the network runs on, and how long a head will take there."""

import contextlib
import math
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from neuronet_jax.errors import CodedWarning

# Processor seconds of the network for a million voxels of its own grid, with five protocols and the numbers of channels
# that the shipped configs have: 4 to 6 on current x86 servers.
CPU_S_PER_MILLION = 5.0


class Turns:
    """Lets threads that have a head each take turns on the device, which has memory for one, and counts their time."""

    def __init__(self):
        self._lock = threading.Lock()
        self.taken_s = 0.0

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """The caller's turn, for the time of the block."""
        with self._lock:
            start = time.perf_counter()
            try:
                yield
            finally:
                self.taken_s += time.perf_counter() - start


TURNS = Turns()  # of this process: it has one device for inference


def start() -> str:
    """Starts JAX and says on what. Where JAX_PLATFORMS asks for what is not there, the CPU serves, with a warning."""
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX, where no plugin of that name is installed
        wanted = os.environ.get("JAX_PLATFORMS")
        reason = str(error).splitlines()[0] if str(error) else "not installed"
        warnings.warn(
            CodedWarning("W_DEVICE", f"JAX_PLATFORMS={wanted}: {reason}; going on with the CPU"), stacklevel=2
        )
        jax.config.update("jax_platforms", "cpu")
        device = jax.devices()[0]
    if device.platform == "cpu":
        return f"no GPU or TPU found, running on {cores()} CPU cores"
    return f"running on {device.device_kind}"


def cores() -> int:
    """Those that this process may use, which a Slurm job or a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_per_core(most: int | None = None) -> None:
    """Makes one XLA device of each CPU core, of `most` at most, unless the environment says how many.

    Much of a program runs on one thread per device: two devices on two cores label a volume split between them in two
    thirds of the time. To be called before JAX's first computation.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES") or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    jax.config.update("jax_num_cpu_devices", min(cores(), most or cores()))


def over_cores(image: np.ndarray, axis: int, stride: int) -> Any:
    """The image for a program to run on: on a CPU with one XLA device per core, split over them along `axis`, as a mesh
    splits y (see `mesh.py`), in multiples of `stride`; elsewhere as it is.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu" or not 1 < len(devices) <= cores():  # more are a test of sharding
        return image
    count = max(n for n in range(1, len(devices) + 1) if image.shape[axis] % (n * stride) == 0)
    mesh = jax.make_mesh((count,), ("space",), axis_types=(AxisType.Auto,), devices=devices[:count])
    return jax.device_put(image, NamedSharding(mesh, PartitionSpec(*[None] * axis, "space")))


def expected_s(shape: Sequence[int], spacing_mm: Sequence[float], voxel_size_mm: float) -> float | None:
    """Seconds of the network for a head of so many voxels of that size; None on accelerators, where they are few."""
    if jax.default_backend() != "cpu":
        return None
    voxels = math.prod(np.multiply(shape, spacing_mm) / voxel_size_mm)
    return voxels / 1e6 * CPU_S_PER_MILLION / cores()
