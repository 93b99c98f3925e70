"""The cost of a scan: the memory that limits the size of a tile, and the time that a user should expect."""

import math
from collections.abc import Sequence

from neuronet_jax.runs.model import Model
from neuronet_jax.runtime import cores, memory_bytes, on_cpu

MEMORY_SHARE = 0.6  # of the device's memory that one volume may take
# Peak memory per voxel of a volume padded to a bucket, five protocols in float32: 2.7 GiB beside the process itself
# were measured on two CPU devices for 224 × 256 × 192 voxels.
VOXEL_BYTES = 280
# Processor seconds per million voxels, with five protocols and the channels of the shipped configs, measured on an x86
# server that had other work: for the features, and for reading labels and confidence where no block can be left out, on
# the network's own grid and again on a different grid.
FEATURES_CPU_S, READING_CPU_S, INTERPOLATION_CPU_S = 2.2, 2.8, 2.5
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
    if not on_cpu():
        return None
    millions = math.prod(shape) / 1e6
    own = millions * math.prod(side / voxel_size_mm for side in spacing_mm)
    cpu_s = own * (FEATURES_CPU_S * passes + READING_CPU_S)
    if any(abs(side - voxel_size_mm) > 1e-3 for side in spacing_mm):
        cpu_s += millions * INTERPOLATION_CPU_S
    return cpu_s * (ON_THE_CLOCK[0] if cores() > 1 else 1.0), cpu_s * ON_THE_CLOCK[1]
