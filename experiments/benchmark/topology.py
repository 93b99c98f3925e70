"""Compiles a training step for an absent TPU slice and reports memory, traffic and arithmetic per chip.

Compilation is ahead of time, with libtpu (extra `tpu`), for a described topology. One takes a few minutes.
"""

import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files

GIB = 2**30
# Family and devices that share a volume; the rest of the slice is data-parallel, one crop per replica. The published
# network trains as published, ours with the whole configuration: soft Dice, augmentation, averaged weights.
LAYOUTS = (("reference", 1), ("reference", 2), ("neuronet", 1))


def measure(topology: str, side: int, out: Path) -> None:
    """Prints and writes the table for a slice such as `v5e:2x4`, activations in bfloat16.

    Each row is saved as soon as it is compiled. An incomplete table is continued; a complete one is measured again.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu only compiles, and must not look for a TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = described_devices(topology)
    layouts = [layout for layout in LAYOUTS if len(devices) % layout[1] == 0]
    files, name = Files(str(out.absolute())), f"topology-{topology.replace(':', '-')}"
    title = f"# {topology}, one {side}³ crop per replica, bfloat16, five protocols"
    rows = unfinished(files.read(f"{name}.json"), side, layouts)
    print(f"{title}\n\n{table(rows)}", flush=True)
    for family, space in layouts[len(rows) :]:
        row = {"family": family, "data": len(devices) // space, "space": space, "side": side}
        rows.append(row | plan(devices, family, space, side))
        print(table(rows).splitlines()[-1], flush=True)
        files.write(f"{name}.md", f"{title}\n\n{table(rows)}\n".encode())
        files.write(f"{name}.json", json.dumps(rows, indent=2).encode())
    print(f"Written to {out / name}.md and .json")


def unfinished(content: bytes | None, side: int, layouts: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Returns the rows of a table that was cut off, if it is for the same crop; none of a whole or unreadable one."""
    try:
        rows = json.loads(content or b"[]")
        begun = [(row["family"], row["space"], row["side"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        return []
    expected = [(family, space, side) for family, space in layouts]
    return rows if begun == expected[: len(begun)] and len(begun) < len(expected) else []


def described_devices(topology: str) -> Sequence[Any]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # any error of libtpu, or of its absence
        raise NeuronetError(
            f"--topology={topology} cannot be described: {error}\nIt needs libtpu (pip install '.[tpu]', best in an "
            "environment of its own) and a slice that it knows, such as v5e:2x4"
        ) from error


def plan(devices: Sequence[Any], family: str, space: int, side: int) -> dict[str, float]:
    """Returns the needs of the compiled training step per chip: HBM beside arguments, bytes moved, floating-point
    operations.
    """
    step, arguments = described_step(devices, family, space, side)
    begun = time.perf_counter()
    compiled = step.lower(*arguments).compile()
    cost = compiled.cost_analysis()
    return {
        "compile_seconds": time.perf_counter() - begun,
        "temp_gib": compiled.memory_analysis().temp_size_in_bytes / GIB,
        "accessed_gib": cost["bytes accessed"] / GIB,
        "tflop": cost["flops"] / 1e12,
    }


def described_step(devices: Sequence[Any], family: str, space: int, side: int) -> tuple[Any, tuple[Any, Any]]:
    """Returns the training step of a slice, and its arguments as shapes with shardings."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from experiments import flags
    from experiments.benchmark.work import PUBLISHED_TRAINING
    from neuronet_jax.models.network import abstract
    from neuronet_jax.training.mesh import batch_sharding, make_mesh, platform_of, replicated
    from neuronet_jax.training.step import fresh_state, make_train_step

    batch = len(devices) // space
    fields = {"model.family": family, "model.compute_dtype": "bfloat16", "data.crop": side, "batch": batch}
    fields |= {"mesh.space": space} | (PUBLISHED_TRAINING if family == "reference" else {})
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = flags.load("all_targets", overrides)
    mesh = make_mesh(config, devices)
    network = abstract(config.model.on(platform_of(mesh)), config.protocols)
    graphdef, params, moments = nnx.split(network, nnx.Param, nnx.BatchStat, graph=False)

    def placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    described = jax.tree.map(
        lambda s: placed(s, replicated(mesh)), jax.eval_shape(partial(fresh_state, config), params, moments)
    )
    cube = (side,) * 3
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, *cube, 1), jnp.float32),
        "labels": jax.ShapeDtypeStruct((batch, len(config.protocols), *cube), jnp.uint8),
        "present": jax.ShapeDtypeStruct((batch, len(config.protocols)), jnp.bool),
        "slot": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    crops = {name: placed(shape, batch_sharding(mesh)[name]) for name, shape in shapes.items()}
    return make_train_step(config, graphdef, mesh), (described, crops)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table; all figures are per chip."""
    lines = ["| family | data × space | HBM temp GiB | accessed GiB | TFLOP |", "|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['family']} | {r['data']} × {r['space']} "
            f"| {r['temp_gib']:.2f} | {r['accessed_gib']:.1f} | {r['tflop']:.2f} |"
        )
    return "\n".join(lines)
