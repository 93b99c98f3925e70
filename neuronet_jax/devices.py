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

# Processor seconds for a million voxels, with five protocols and the numbers of channels that the shipped configs have:
# of the network's own grid for the features and for reading labels and doubt from them, of another grid for the scores
# that are interpolated there. Of four heads on an x86 server, whose share of brain differs, these miss by up to 40 %.
FEATURES_CPU_S, READING_CPU_S, INTERPOLATION_CPU_S = 3.0, 3.0, 1.2
# How long that takes on the clock: much of the network runs on one core however many there are, and others may be busy.
ON_THE_CLOCK = (0.5, 1.2)


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


def sharers(units: int, most: int) -> int:
    """Of `most` devices, the largest number that can share so many units evenly."""
    return max(n for n in range(1, most + 1) if units % n == 0)


def over_cores(image: np.ndarray, axis: int, stride: int) -> Any:
    """The image for a program to run on: on a CPU with one XLA device per core, split over them along `axis`, as a mesh
    splits y (see `mesh.py`), in multiples of `stride`; elsewhere as it is.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu" or not 1 < len(devices) <= cores():  # more are a test of sharding
        return image
    count = sharers(image.shape[axis] // stride, len(devices))
    mesh = jax.make_mesh((count,), ("space",), axis_types=(AxisType.Auto,), devices=devices[:count])
    return jax.device_put(image, NamedSharding(mesh, PartitionSpec(*[None] * axis, "space")))


def expected_s(
    shape: Sequence[int], spacing_mm: Sequence[float], voxel_size_mm: float, passes: int = 1
) -> tuple[float, float] | None:
    """Least and most seconds that a head of so many voxels of that size will probably take, once compiled.

    `passes` is how often the network runs over it, for an average. None on accelerators, where seconds are few.
    """
    if jax.default_backend() != "cpu":
        return None
    millions = math.prod(shape) / 1e6
    own = millions * math.prod(side / voxel_size_mm for side in spacing_mm)
    cpu_s = own * (FEATURES_CPU_S * passes + READING_CPU_S)
    if any(abs(side - voxel_size_mm) > 1e-3 for side in spacing_mm):
        cpu_s += millions * INTERPOLATION_CPU_S
    return cpu_s * (ON_THE_CLOCK[0] if cores() > 1 else 1.0), cpu_s * ON_THE_CLOCK[1]
