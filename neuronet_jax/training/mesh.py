"""The device mesh, and the placement of arrays on it.

`data` splits the batch: the crops of a step are independent, except for the moments of normalisation. `space` splits
the y axis of a volume among devices, for crops too large for one; XLA inserts the exchange of neighbouring planes. It
is y and never x, because the convolutions fold x into the batch (see `models/conv.py`). One device is a mesh of 1 × 1.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError

DATA, SPACE = "data", "space"

_PAINTED = "painted"  # only where further stores are mixed in (`generate.py`)
_BATCH = {
    "image": PartitionSpec(DATA, None, SPACE),  # b x y z 1
    "labels": PartitionSpec(DATA, None, None, SPACE),  # b p x y z
    "present": PartitionSpec(DATA),  # b p
    "slot": PartitionSpec(DATA),  # b
    _PAINTED: PartitionSpec(DATA),  # b
}


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges the devices (by default all of them) as `data` × `space`.

    Raises NeuronetError, before anything is compiled, if batch or crop cannot be split that way.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, space = len(devices), config.mesh.space
    local = min(Counter(device.process_index for device in devices).values())  # on one host
    if local % space:
        legal = [n for n in range(1, local + 1) if local % n == 0]
        raise NeuronetError(f"mesh.space must divide the {local} devices of one host, got {space}: take one of {legal}")
    data = count // space
    least = data * config.accumulate
    if config.batch % least:
        lower = config.batch // least * least
        near = f"{lower} or {lower + least}" if lower else f"{least}"
        times = f" times accumulate, {least}" if config.accumulate > 1 else f", {least}"
        raise NeuronetError(f"batch must be a multiple of the mesh's data axis{times}; got {config.batch}: take {near}")
    unit = space * config.model.stride
    side = config.data.crop[1]
    if side % unit:
        near = max(unit, round(side / unit) * unit)
        raise NeuronetError(
            f"with mesh.space={space} the crop's y side must be a multiple of {unit}, got {side}: take {near}"
        )
    # Auto: XLA places intermediate arrays from the shardings of the inputs (make_mesh defaults to Explicit axes).
    return jax.make_mesh((data, space), (DATA, SPACE), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def platform_of(mesh: Mesh) -> str:
    """Returns the platform of the mesh's devices as JAX names it: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of parameters, moments and optimiser state: every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, painted: bool = False) -> dict[str, NamedSharding]:
    """Returns the sharding of each array of a batch, with `painted` or without."""
    return {name: NamedSharding(mesh, spec) for name, spec in _BATCH.items() if painted or name != _PAINTED}


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process's share of a batch on its devices, as global arrays. What a step does not use stays behind."""
    shardings = batch_sharding(mesh, _PAINTED in batch)
    return {
        name: jax.make_array_from_process_local_data(shardings[name], array)
        for name, array in batch.items()
        if name in shardings
    }


def batch_rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
    """Returns the rows of a global batch that this process holds, in ascending order.

    They follow from where the mesh puts this process's devices, which need not be the order of the processes.
    """
    spread = NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map((batch,))
    held = [index[0] for index in spread.values() if index is not None]
    return tuple(sorted({row for rows in held for row in range(*rows.indices(batch))}))
