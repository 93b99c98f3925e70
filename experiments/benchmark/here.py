"""Applies the roofline of `roofline.py` to this machine's CPU, and measures the step beside it.

The peaks are probed first, on all cores at the same time: float32 products of 2048² matrices, and a sum of two arrays
that no cache holds. All of a CPU's memory counts as HBM. Its caches hold much of what a step moves, and most of XLA's
operations are far from the peak of a product: the two errors have opposite signs.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import roofline
from experiments.benchmark.roofline import Machine
from experiments.benchmark.topology import GIB, collectives_of, needs, step_config
from experiments.benchmark.work import training_batch
from neuronet_jax.files import Files

STEPS = 5  # timed, after one that is not
PROBES = 5  # of which the best counts: a peak is what the machine can do
SIDE, LENGTH = 2048, 2**25  # of the probes' matrices; floats of their arrays, 128 MiB each


def measure(side: int, out: Path) -> None:
    """Prints and writes the table for this machine: one crop per core, activations in float32."""
    import jax

    from neuronet_jax import runtime

    runtime.one_per_core()
    devices = jax.devices("cpu")
    machine = probe(devices)
    title = (
        f"# This machine, {len(devices)} cores, one {side}³ crop per core, float32, five protocols\n\n"
        f"Probed peaks per core: {machine.flops_per_s / 1e9:.0f} GFLOP/s, {machine.hbm_bytes_per_s / 1e9:.1f} GB/s."
    )
    print(title, flush=True)
    rows: list[dict[str, Any]] = []
    files = Files(str(out.absolute()))
    for family in ("reference", "neuronet"):
        rows.append({"family": family, "data": len(devices), "side": side} | timed(devices, family, side))
        text = f"{title}\n\n{table(machine, rows)}\n"
        files.write("topology-cpu.md", text.encode())
        files.write("topology-cpu.json", json.dumps(rows, indent=2).encode())
        print(table(machine, rows) if len(rows) == 1 else table(machine, rows).splitlines()[-1], flush=True)
    print(f"Written to {out / 'topology-cpu'}.md and .json")


def probe(devices: Any) -> Machine:
    """Returns the peaks of one core while all of them work."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(devices),), ("core",), axis_types=(AxisType.Auto,), devices=devices)
    split = NamedSharding(mesh, PartitionSpec("core"))
    matrices = jax.device_put(np.ones((len(devices), SIDE, SIDE), np.float32), split)
    arrays = jax.device_put(np.ones((len(devices), LENGTH), np.float32), split)
    multiply = jax.jit(lambda a, b: jnp.einsum("dij,djk->dik", a, b), out_shardings=split)
    product = _best(lambda: multiply(matrices, matrices))
    # Read twice and written once. The result takes the place of an argument, whose pages exist already.
    add = jax.jit(lambda a, b: a + b, donate_argnums=0)
    state = [jnp.copy(arrays)]

    def move() -> Any:
        state[0] = add(state[0], arrays)
        return state[0]

    triad = _best(move)
    moved = 3 * 4 * LENGTH
    return Machine(2 * SIDE**3 / product, moved / triad, moved / triad, 0.0, axes=1, host_chips=1, host_vcpus=1)


def _best(work: Callable[[], Any]) -> float:
    return min(_seconds(work, PROBES))


def _seconds(work: Callable[[], Any], times: int) -> list[float]:
    """Returns the time of each run of `work`, after one that is not counted."""
    import jax

    seconds = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - begun)
    return seconds[1:]


def timed(devices: Any, family: str, side: int) -> dict[str, Any]:
    """Returns the needs of a training step on this machine, and the seconds that it takes."""
    from neuronet_jax.training.mesh import make_mesh, put_batch
    from neuronet_jax.training.step import init_state, make_train_step

    batch = len(devices)
    config = step_config(family, 1, side, batch, "float32")
    mesh = make_mesh(config, devices)
    graphdef, state = init_state(config, mesh)
    on_mesh = put_batch(mesh, training_batch(batch, config.data.crop))
    step = make_train_step(config, graphdef, mesh).lower(state, on_mesh).compile()

    def train() -> Any:
        nonlocal state
        state, metrics = step(state, on_mesh)
        return state, metrics

    return needs(step) | {"measured_s": _seconds(train, STEPS)}


def table(machine: Machine, rows: list[dict[str, Any]]) -> str:
    """Returns a Markdown table; figures are per core."""
    lines = [
        "| family | temp GiB | traffic GiB per crop | TFLOP | roofline s: compute | memory | exchange | step "
        "| measured s, median | range | measured ÷ roofline |",
        "|" + "---|" * 11,
    ]
    for r in rows:
        p = roofline.predict(machine, r["tflop"] * 1e12, r["hbm_gib"] * GIB, collectives_of(r))
        took = statistics.median(r["measured_s"])
        lines.append(
            f"| {r['family']} | {r['temp_gib']:.2f} | {r['hbm_gib']:.1f} | {r['tflop']:.2f} | {p.compute_s:.2f} "
            f"| {p.memory_s:.2f} | {p.exchange_s:.3f} | {p.step_s:.2f} | {took:.2f} "
            f"| {min(r['measured_s']):.2f} to {max(r['measured_s']):.2f} | {took / p.step_s:.1f} |"
        )
    return "\n".join(lines)
