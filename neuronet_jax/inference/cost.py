"""The cost of a scan: the memory that limits the size of a tile, and the time that a user should expect."""

import math
from collections.abc import Sequence

import jax

from neuronet_jax.runs.model import Model
from neuronet_jax.runtime import cores, memory_bytes

MEMORY_SHARE = 0.6  # of the device's memory that one volume may take
# Peak memory per voxel, five protocols in float32: 7.6 GiB were measured on CPU for a head of 192 × 224 × 224, with its
# confidence and its interpolation.
VOXEL_BYTES = 850
# Processor seconds per million voxels, with five protocols and the channels of the shipped configs: on the network's
# own grid for the features, and for labels and confidence from them; on a different grid for interpolated scores. For
# four heads on an x86 server, with different shares of brain, these are wrong by up to 40 %.
FEATURES_CPU_S, READING_CPU_S, INTERPOLATION_CPU_S = 3.0, 3.0, 1.2
# Wall-clock time per processor second: much of the network runs on one core, and other cores may be busy.
ON_THE_CLOCK = (0.5, 1.2)


def voxel_budget(model: Model) -> int:
    """Returns the number of voxels that one tile may have on this device."""
    return model.max_voxels or int(MEMORY_SHARE * memory_bytes() / VOXEL_BYTES)


def expected_s(
    shape: Sequence[int], spacing_mm: Sequence[float], voxel_size_mm: float, passes: int = 1
) -> tuple[float, float] | None:
    """Returns the least and most seconds that a scan of this shape and spacing will probably take, once compiled.

    `passes` is the number of runs of the network that are averaged. Returns None on accelerators, which take few
    seconds.
    """
    if jax.default_backend() != "cpu":
        return None
    millions = math.prod(shape) / 1e6
    own = millions * math.prod(side / voxel_size_mm for side in spacing_mm)
    cpu_s = own * (FEATURES_CPU_S * passes + READING_CPU_S)
    if any(abs(side - voxel_size_mm) > 1e-3 for side in spacing_mm):
        cpu_s += millions * INTERPOLATION_CPU_S
    return cpu_s * (ON_THE_CLOCK[0] if cores() > 1 else 1.0), cpu_s * ON_THE_CLOCK[1]
