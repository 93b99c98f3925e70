"""Measures the input pipeline: what one core delivers, from this store and from files, and whether a training step ever
waits for it.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark import one_core
from experiments.benchmark.roofline import MACHINES

SUBJECTS = 8  # in the made store: enough to shuffle, few enough to stay in the disk cache
BATCHES = 32  # read without training, per number of workers
STEPS = 8  # trained, after two that compile and fill the pipeline
HEADROOM = 2  # a host should deliver so many times what its chips eat


def measure(store: str, side: int, batch: int, dtype: str, out: Path) -> None:
    """Prints and writes crops per second of one core and of the pipeline, and the share of a step spent waiting."""
    with contextlib.ExitStack() as stack:
        dest = store or stack.enter_context(_demo_at_1_mm())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways = one_core.measure(dest, folder, side)
        lines = [f"# Input pipeline, {side}³ crops\n", *one_core.table(ways), "", *appetite(ways, out), ""]
        print("\n".join(lines), flush=True)
        alone = {f"workers={workers}": read_alone(dest, side, batch, workers) for workers in (0, 1)}
        training = read_while_training(dest, side, batch, dtype)
    more = [f"| pipeline alone, batch {batch} | crops/s | MB/s |", "|---|---|---|"]
    more += [f"| {name} | {r['crops_per_s']:.1f} | {r['mb_per_s']:.0f} |" for name, r in alone.items()]
    more += [
        "",
        f"With one worker under a training step of {training['step_s']:.2f} s: "
        f"{100 * training['wait_fraction']:.2f} % of the time is spent waiting for data.",
    ]
    print("\n".join(more))
    out.mkdir(parents=True, exist_ok=True)
    (out / "input.md").write_text("\n".join([*lines, *more]) + "\n")
    rows = [dataclasses.asdict(way) for way in ways]
    (out / "input.json").write_text(json.dumps({"one_core": rows, "alone": alone, "training": training}, indent=2))
    print(f"Written to {out / 'input.md'} and {out / 'input.json'}")


def appetite(ways: list[one_core.Way], out: Path) -> list[str]:
    """Returns how many cores a host's chips need, by every plan of `--topology` in the same folder."""
    per_core = ways[0].warm_per_cpu_s
    lines = []
    for plan in sorted(out.glob("topology-v*.json")):
        slice_name = plan.stem.removeprefix("topology-")
        machine = MACHINES[slice_name.partition("-")[0]]
        from experiments.benchmark.topology import predicted

        for row in json.loads(plan.read_text()):
            if row["space"] > 1:
                continue
            eaten = machine.host_chips / predicted(machine, row).step_s
            cores = HEADROOM * eaten / per_core
            lines.append(
                f"| {slice_name} {row['family']} | {machine.host_chips} | {eaten:.0f} | {cores:.0f} "
                f"| {machine.host_vcpus // 2} |"
            )
    if not lines:
        return [f"How many cores a host's chips need follows from the plans of --topology; there are none in {out}."]
    title = (
        f"| plan | chips of a host | crops/s they eat at most | cores that deliver {HEADROOM} × that | cores it has |"
    )
    return [title, "|---|---|---|---|---|", *lines]


def _config(dest: str, side: int, batch: int, workers: int, dtype: str = "float32") -> Any:
    from experiments import flags

    fields = {"data.crop": side, "data.workers": workers, "batch": batch, "model.compute_dtype": dtype}
    return flags.load("all_targets", [f"--config.{k}={v}" for k, v in (fields | {"data.store": dest}).items()])


def read_alone(dest: str, side: int, batch: int, workers: int) -> dict[str, float]:
    """Returns crops and decoded megabytes per second, from a warm store."""
    from neuronet_jax.store.reader import Store
    from neuronet_jax.training.pipeline import training_iterator

    data = training_iterator(Store.open(dest), _config(dest, side, batch, workers))
    for _ in range(4):
        arrays = next(data)
    begun = time.perf_counter()
    for _ in range(BATCHES):
        arrays = next(data)
    seconds = time.perf_counter() - begun
    data.close()
    size = sum(array.nbytes for array in arrays.values())
    return {"crops_per_s": BATCHES * batch / seconds, "mb_per_s": BATCHES * size / seconds / 1e6}


def read_while_training(dest: str, side: int, batch: int, dtype: str) -> dict[str, float]:
    """Returns seconds per training step of our network, and the fraction spent waiting for one loader process."""
    import jax

    from neuronet_jax.store.reader import Store
    from neuronet_jax.training.mesh import make_mesh, put_batch
    from neuronet_jax.training.pipeline import training_iterator
    from neuronet_jax.training.step import init_state, make_train_step

    config = _config(dest, side, batch, workers=1, dtype=dtype)
    mesh = make_mesh(config, jax.devices()[:1])
    graphdef, state = init_state(config, mesh)
    step = make_train_step(config, graphdef, mesh)
    data = training_iterator(Store.open(dest), config)
    times = []
    for number in range(STEPS + 2):
        if number == 2:
            data.wait_fraction()
        begun = time.perf_counter()
        state, metrics = step(state, put_batch(mesh, next(data)))
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begun)
    waited = data.wait_fraction()
    data.close()
    return {"step_s": statistics.median(times[2:]), "wait_fraction": waited}


@contextlib.contextmanager
def _demo_at_1_mm() -> Iterator[str]:
    """Makes a store with subjects of realistic size: the demo cohort with every voxel split into eight."""
    from data_prep.demo.cohort import ensure_demo_store
    from neuronet_jax.store.reader import Store
    from neuronet_jax.store.schema import Record, sample_foreground
    from neuronet_jax.store.writer import StoreWriter

    source = Store.open(str(ensure_demo_store()))
    info, rng = source.info, np.random.default_rng(0)
    grid = tuple(2 * side for side in info.grid)
    with tempfile.TemporaryDirectory() as folder:
        dest = f"{folder}/store"
        writer = StoreWriter.create(
            dest,
            protocols=info.protocols,
            grid=grid,
            voxel_size_mm=info.voxel_size_mm / 2,
            slots=SUBJECTS,
            shard_subjects=1,
            provenance={"note": "demonstration: enlarged for the benchmark of the input pipeline"},
        )
        subjects = []
        for slot, origin in zip(range(SUBJECTS), itertools.cycle(source.split("train")), strict=False):
            image = _split_voxels(source.read_image(origin.slot))
            image += rng.normal(0, 0.02 * origin.std, image.shape).astype(np.float32)  # scans do not repeat voxels
            labels = np.stack([_split_voxels(m) for m in source.read_labels(origin.slot, info.protocols)])
            subject = dataclasses.replace(
                origin, slot=slot, id=f"demo{slot}", split="train", conformed_shape=grid, origin=(0, 0, 0)
            )
            foreground = sample_foreground(labels, origin.present, seed=slot)
            writer.write_shard(slot, [Record(image, labels, foreground, subject)])
            subjects.append(subject)
        writer.finalize(subjects, [])
        yield dest


def _split_voxels(array: np.ndarray) -> np.ndarray:
    for axis in range(3):
        array = np.repeat(array, 2, axis)
    return array
