"""The benchmark's bookkeeping. Every benchmark run, and the soak test, check that contenders compute the same."""

import dataclasses
import json
import math
import sys
import venv
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import flags
from experiments.benchmark import contender, race, topology, work
from experiments.benchmark.contender import Job
from experiments.benchmark.input import _split_voxels
from neuronet_jax import dltk
from neuronet_jax.models.network import build

JOB = Job("jax", "float32", "inference", 16, 1, "")


def result(name, seconds, peak, running, failure=""):
    job = dataclasses.replace(JOB, contender=name)
    return race.Measurement(job, seconds, {"rss": peak, "running": running}, {}, failure)


def test_shared_weights_fill_the_published_network():
    config = flags.load("all_targets", ["--config.model.family=reference"])
    network = nnx.eval_shape(lambda: build(config.model.on("cpu"), config.protocols, 0))
    dltk.load_variables(network, work.random_variables(0))  # raises for any other name or shape
    leaves = jax.tree.leaves(nnx.state(network, nnx.Param, graph=False))
    assert sum(leaf.size for leaf in leaves) == 2_493_171
    again = work.random_variables(0)
    assert all(np.array_equal(again[name], value) for name, value in work.random_variables(0).items())


def test_ratios_are_to_the_first_and_failures_say_why():
    results = [
        result("jax", [1.0, 3.0, 2.0], 2.0, 1.0),
        result("torch-eager", [8.0, 6.0, 7.0], 5.0, 4.0),
        result("torch-compile", [], math.nan, math.nan, "OutOfMemoryError: no room"),
    ]
    rows = race.table(results).splitlines()
    assert rows[2] == "| jax | float32 | 2.000 | 1.000 to 3.000 | 1.00 | 2.00 | 1.00 | 1.00 | 1.00 |"
    assert rows[3] == "| torch-eager | float32 | 7.000 | 6.000 to 8.000 | 3.50 | 5.00 | 2.50 | 4.00 | 4.00 |"
    assert "OutOfMemoryError: no room" in rows[4]
    assert len({row.count("|") for row in rows}) == 1


def test_a_contender_runs_in_the_environment_it_names(tmp_path):
    """That environment has only NumPy, lent by this one: the contender reports what is missing."""
    environment = tmp_path / "alone"
    venv.create(environment, symlinks=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    (packages / "numpy").symlink_to(Path(np.__file__).parent)
    job = dataclasses.replace(JOB, contender="tensorflow", python=str(environment / "bin" / "python"))
    assert job.label == "tensorflow@alone"
    with race.Process(job) as process, pytest.raises(race.Failed, match="No module named 'tensorflow'"):
        process.ask(do="numbers", path="")


def test_device_memory_takes_precedence_over_process_memory():
    on_gpu = result("jax", [1.0], 2.0, 1.0)
    on_gpu.memory["device"] = 7.0
    assert (on_gpu.peak, on_gpu.running) == (7.0, 7.0)


def test_contenders_that_differ_are_refused():
    rng = np.random.default_rng(0)
    reference = {"logits_fsl_fast": rng.normal(size=(2, 3)), "losses": np.array([1.0, 0.9])}
    near = {name: value * (1 + 1e-5) for name, value in reference.items()}
    assert race._differences("b", near, "a", reference)["losses"] == pytest.approx(1e-5, rel=1e-3)
    for name in reference:
        with pytest.raises(race.Failed, match="do not compute the same"):
            race._differences("b", {**reference, name: reference[name] + 0.01}, "a", reference)
        with pytest.raises(race.Failed, match="do not compute the same"):
            race._differences("b", {**reference, name: np.full_like(reference[name], np.nan)}, "a", reference)


def test_a_contender_that_fails_is_out_with_its_reason():
    (lost,) = race.race([Job("dipy", "float32", "train", 16, 1, "")], repeats=2)
    assert lost.failure.startswith(("ValueError: dipy segments whole heads", "ModuleNotFoundError: No module"))
    assert math.isnan(lost.median)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak")
def test_settling_restarts_the_count_of_the_peak():
    one = contender.Contender(JOB)
    block = np.ones(2**27)  # 1 GiB
    assert block.sum() > 0
    del block
    one.settle()
    memory = one.memory()
    assert memory["rss"] > memory["running"] + 0.9


@pytest.mark.parametrize("space", [1, 2])
def test_topology_describes_the_whole_step_on_the_slice(space):
    devices = jax.devices()
    step, (state, batch) = topology.described_step(devices, "reference", space, 16)
    assert batch["image"].shape[0] == 8 // space
    assert batch["image"].sharding.shard_shape(batch["image"].shape) == (1, 16, 16 // space, 16, 1)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    lowered = step.lower(state, batch)
    assert lowered.cost_analysis()["flops"] > 1e9


def test_topology_table_is_per_chip():
    row = {"family": "reference", "data": 4, "space": 2, "temp_gib": 1.049, "accessed_gib": 18.96, "tflop": 0.204}
    assert topology.table([row]).splitlines()[2] == "| reference | 4 × 2 | 1.05 | 19.0 | 0.20 |"


COSTS = {"compile_seconds": 1.0, "temp_gib": 1.0, "accessed_gib": 2.0, "tflop": 3.0}


def test_a_topology_table_that_was_cut_off_keeps_its_rows_and_is_continued(tmp_path, monkeypatch, capsys):
    compiled = []

    def plan(devices, family, space, side):
        if len(compiled) == 2:
            raise KeyboardInterrupt
        compiled.append((family, space))
        return COSTS

    monkeypatch.setattr(topology, "described_devices", lambda _: range(8))
    monkeypatch.setattr(topology, "plan", plan)
    with pytest.raises(KeyboardInterrupt):
        topology.measure("v5e:2x4", 16, tmp_path)
    printed = capsys.readouterr().out
    page, content = tmp_path / "topology-v5e-2x4.md", tmp_path / "topology-v5e-2x4.json"
    assert sorted(tmp_path.iterdir()) == [content, page]
    rows = json.loads(content.read_text())
    assert [(row["family"], row["space"]) for row in rows] == compiled == list(topology.LAYOUTS[:2])
    assert all(line in printed and line in page.read_text() for line in topology.table(rows).splitlines())

    compiled.clear()
    topology.measure("v5e:2x4", 16, tmp_path)
    assert compiled == list(topology.LAYOUTS[2:])
    assert len(json.loads(content.read_text())) == 3 and page.read_text().count("\n| ") == 4


def test_only_an_unfinished_topology_table_of_the_same_crop_is_continued():
    rows = [{"family": family, "space": space, "side": 16} for family, space in topology.LAYOUTS]
    begun = json.dumps(rows[:2]).encode()
    assert topology.unfinished(begun, 16, topology.LAYOUTS) == rows[:2]
    assert topology.unfinished(begun, 32, topology.LAYOUTS) == []
    assert topology.unfinished(begun, 16, topology.LAYOUTS[1:]) == []
    for content in (None, b"[", b"[1]", b'[{"family": "neuronet"}]', json.dumps(rows).encode()):
        assert topology.unfinished(content, 16, topology.LAYOUTS) == []


def test_enlarged_heads_hold_every_voxel_eight_times():
    array = np.arange(24).reshape(2, 3, 4)
    large = _split_voxels(array)
    assert large.shape == (4, 6, 8)
    for corner in np.ndindex(2, 2, 2):
        np.testing.assert_array_equal(large[tuple(slice(c, None, 2) for c in corner)], array)


@pytest.mark.soak
def test_contenders_compute_the_same():
    pytest.importorskip("torch", reason="the contender needs the extra `benchmark`")
    jobs = [dataclasses.replace(JOB, contender=name) for name in ("jax", "jax-plain", "torch-eager")]
    differences = race.agreement(jobs)
    assert set(differences) == {"jax-plain", "torch-eager"}
    assert max(d["logits"] for d in differences.values()) < 1e-4
