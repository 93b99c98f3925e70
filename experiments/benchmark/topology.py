"""Compiles a training step for an absent TPU slice, and predicts from the program how fast it would run.

Compilation is ahead of time, with libtpu (extra `tpu`), for a described topology. One takes a few minutes. `hlo.py`
reads the compiled program, `roofline.py` has the formula. `here.py` applies both to this machine and measures the step
beside them, which shows how far off the formula is.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmark import hlo, roofline
from experiments.benchmark.roofline import MACHINES, POD_CHIPS, Machine
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.files import Files

GIB = 2**30
# Family and devices that share a volume; the rest of the slice is data-parallel, one crop per replica. The published
# network trains as published, ours with the whole configuration: soft Dice, augmentation, averaged weights.
LAYOUTS = (("reference", 1), ("neuronet", 1), ("reference", 2), ("neuronet", 2))


def measure(topology: str, side: int, out: Path) -> None:
    """Prints and writes the table for a slice such as `v5e:2x4`, activations in bfloat16.

    Each row is saved as soon as it is compiled. An incomplete table is continued; a complete one is measured again.
    """
    machine = machine_of(topology)
    os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu only compiles, and must not look for a TPU
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = described_devices(topology)
    layouts = [layout for layout in LAYOUTS if len(devices) % layout[1] == 0]
    files, name = Files(str(out.absolute())), f"topology-{topology.replace(':', '-')}"
    title = f"# {topology}, one {side}³ crop per replica, bfloat16, five protocols"
    rows = unfinished(files.read(f"{name}.json"), side, layouts)
    print(f"{title}\n\n{table(machine, rows)}", flush=True)
    for family, space in layouts[len(rows) :]:
        row = {"family": family, "data": len(devices) // space, "space": space, "side": side}
        rows.append(row | plan(devices, family, space, side))
        print(table(machine, rows).splitlines()[-1], flush=True)
        files.write(f"{name}.md", f"{title}\n\n{table(machine, rows)}\n".encode())
        files.write(f"{name}.json", json.dumps(rows, indent=2).encode())
    print(f"Written to {out / name}.md and .json")


def machine_of(topology: str) -> Machine:
    """Returns the peaks of a slice's chips. Raises UsageError for a chip whose peaks are not known here."""
    kind = topology.partition(":")[0]
    if kind not in MACHINES:
        raise UsageError(
            f"--topology={topology}: peaks are known for {', '.join(MACHINES)}; give a slice such as v5e:2x4, or cpu"
        )
    return MACHINES[kind]


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
    """Returns the devices of a slice that is not there. Raises NeuronetError without libtpu, or if it does not know the
    slice.
    """
    from importlib.util import find_spec

    from jax.experimental import topologies

    if find_spec("libtpu") is None:
        raise NeuronetError(
            f"--topology={topology} needs libtpu, XLA's compiler for TPUs, which is not installed: pip install "
            "'.[tpu]', in an environment of its own (with libtpu installed, every JAX program looks for a TPU)"
        )
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # any error of libtpu
        raise NeuronetError(
            f"--topology={topology} cannot be described: {error}\nGive a slice that libtpu knows, such as v5e:2x4"
        ) from error


def plan(devices: Sequence[Any], family: str, space: int, side: int) -> dict[str, Any]:
    """Returns the needs of the compiled training step per chip: HBM beside arguments, HBM traffic, arithmetic,
    exchange; and XLA's own count of bytes.
    """
    step, arguments = described_step(devices, family, space, side)
    begun = time.perf_counter()
    return needs(step.lower(*arguments).compile()) | {"compile_seconds": time.perf_counter() - begun}


def needs(compiled: Any) -> dict[str, Any]:
    """Returns what a compiled step needs on each device."""
    work = hlo.work(compiled.as_text())
    return {
        "temp_gib": compiled.memory_analysis().temp_size_in_bytes / GIB,
        "accessed_gib": compiled.cost_analysis()["bytes accessed"] / GIB,
        "hbm_gib": work.hbm_bytes / GIB,
        "tflop": work.flops / 1e12,
        "cycles": work.cycles,
        "collectives": [list(c) for c in work.collectives],
    }


def step_config(family: str, space: int, side: int, batch: int, dtype: str) -> Any:
    """Returns the config of a step: the whole one for our network, the published one for the published network."""
    from experiments import flags
    from experiments.benchmark.work import PUBLISHED_TRAINING

    fields = {"model.family": family, "model.compute_dtype": dtype, "data.crop": side, "batch": batch}
    fields |= {"mesh.space": space} | (PUBLISHED_TRAINING if family == "reference" else {})
    return flags.load("all_targets", [f"--config.{name}={value}" for name, value in fields.items()])


def described_step(devices: Sequence[Any], family: str, space: int, side: int) -> tuple[Any, tuple[Any, Any]]:
    """Returns the training step of a slice, and its arguments as shapes with shardings."""
    import jax

    from neuronet_jax.training.mesh import batch_sharding, make_mesh, replicated
    from neuronet_jax.training.step import abstract_step

    config = step_config(family, space, side, len(devices) // space, "bfloat16")
    mesh = make_mesh(config, devices)
    step, state, batch = abstract_step(config, mesh)

    def placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    described = jax.tree.map(lambda shape: placed(shape, replicated(mesh)), state)
    return step, (described, {name: placed(shape, batch_sharding(mesh)[name]) for name, shape in batch.items()})


def collectives_of(row: dict[str, Any]) -> list[hlo.Collective]:
    return [hlo.Collective(*fields) for fields in row["collectives"]]


def predicted(machine: Machine, row: dict[str, Any], chips: int | None = None) -> roofline.Prediction:
    """Returns the roofline of a row's step, among as many chips as it was compiled for or among `chips`."""
    own = row["data"] * row["space"]
    collectives = roofline.scaled(collectives_of(row), own, chips or own, row["space"])
    return roofline.predict(machine, row["tflop"] * 1e12, row["hbm_gib"] * GIB, collectives)


def efficiency(machine: Machine, row: dict[str, Any]) -> float:
    """Returns the share of a lone replica's speed that each keeps among 256 chips, each replica with a crop."""
    alone, among = (predicted(machine, row, chips).step_s for chips in (row["space"], POD_CHIPS))
    return alone / among


def table(machine: Machine, rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table. Figures are per chip, HBM traffic also per crop."""
    lines = [
        "| family | data × space | HBM temp GiB | HBM traffic GiB | per crop | TFLOP | exchanged MiB "
        "| step ms: compute | HBM | exchange | crops/s per chip | efficiency to 256 chips | XLA's estimate ms |",
        "|" + "---|" * 13,
    ]
    for r in rows:
        p, exchanged = predicted(machine, r), sum(c.nbytes * c.times for c in collectives_of(r)) / 2**20
        lines.append(
            f"| {r['family']} | {r['data']} × {r['space']} | {r['temp_gib']:.2f} | {r['hbm_gib']:.1f} "
            f"| {r['hbm_gib'] * r['space']:.1f} | {r['tflop']:.2f} | {exchanged:.1f} | {p.compute_s * 1e3:.1f} "
            f"| {p.memory_s * 1e3:.1f} | {p.exchange_s * 1e3:.2f} | {1 / (r['space'] * p.step_s):.0f} "
            f"| {efficiency(machine, r):.2f} | {r['cycles'] / machine.clock_hz * 1e3:.0f} |"
        )
    return "\n".join(lines)
