"""The benchmark's bookkeeping. Every benchmark run, and the soak test, check that contenders compute the same."""

import dataclasses
import importlib.util
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
from experiments.benchmark import contender, here, race, topology, work
from experiments.benchmark.contender import Job
from experiments.benchmark.input import _split_voxels
from neuronet_jax import dltk
from neuronet_jax.errors import NeuronetError, UsageError
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


COSTS = {"temp_gib": 1.049, "accessed_gib": 18.96, "hbm_gib": 4.5, "tflop": 0.197, "cycles": 3e7, "collectives": []}


def test_topology_table_is_per_chip_and_per_crop():
    exchange = [["all-reduce", 2**20, 8, 2], ["collective-permute", 2**20, 2, 1]]
    row = {"family": "reference", "data": 4, "space": 2, **COSTS, "collectives": exchange}
    machine = topology.machine_of("v5e:2x4")
    printed = topology.table(machine, [row]).splitlines()[2]
    # 197 GFLOP at 197 TFLOP/s; 4.5 GiB at 819 GB/s; 2 · 2 · 7/8 MiB and 1 MiB at 50 GB/s; two chips share a crop
    assert printed.startswith("| reference | 4 × 2 | 1.05 | 4.5 | 9.0 | 0.20 | 3.0 | 1.0 | 5.9 | 0.09 | 83 | ")
    assert printed.endswith(" | 20 |")  # 30 million cycles at 1.5 GHz
    # A lone replica of two chips reduces 1 MiB between them, twice; 256 chips wait for 2 · 2 · 15 hops of 1 µs, twice.
    local, alone, among = 5.900 + 0.021, 2 * 0.021, 2 * 0.060  # ms
    assert topology.efficiency(machine, row) == pytest.approx((local + alone) / (local + among), rel=1e-3)


def test_a_slice_of_unknown_peaks_is_refused():
    with pytest.raises(UsageError, match="peaks are known for v5e, v5p"):
        topology.machine_of("v9:2x4")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_its_compiler_a_slice_is_refused_with_the_remedy():
    with pytest.raises(NeuronetError, match=r"needs libtpu, XLA's compiler for TPUs, .*pip install '.\[tpu\]'"):
        topology.described_devices("v5e:2x4")


def test_a_probed_machine_works_as_fast_as_its_probes(monkeypatch):
    for name, value in {"SIDE": 64, "LENGTH": 2**12, "PROBES": 1}.items():
        monkeypatch.setattr(here, name, value)
    monkeypatch.setattr(here, "_best", lambda work: (work(), 0.5)[1])
    machine = here.probe(jax.devices()[:2])
    assert (machine.flops_per_s, machine.hbm_bytes_per_s) == (2 * 64**3 / 0.5, 3 * 4 * 2**12 / 0.5)
    row = {"family": "reference", "side": 8, "data": 2, "measured_s": [3.0, 1.0, 2.0]} | COSTS
    row |= {"tflop": machine.flops_per_s / 1e12, "hbm_gib": machine.hbm_bytes_per_s / 2 / 2**30}
    cells = here.table(machine, [row]).splitlines()[-1].split(" | ")
    assert cells[4:] == ["1.00", "0.50", "0.000", "1.00", "2.00", "1.00 to 3.00", "2.0 |"]


@pytest.mark.soak
def test_the_same_prediction_for_this_machine_stands_beside_its_measurement(tmp_path, monkeypatch, capsys):
    for name, value in {"SIDE": 64, "LENGTH": 2**12, "PROBES": 1, "STEPS": 1}.items():
        monkeypatch.setattr(here, name, value)
    monkeypatch.setattr(here, "step_config", lambda *what: small(topology.step_config(*what)))
    here.measure(8, tmp_path)
    rows = json.loads((tmp_path / "topology-cpu.json").read_text())
    assert [row["family"] for row in rows] == ["reference", "neuronet"]
    assert all(row["hbm_gib"] > 0 and row["tflop"] > 0 and row["measured_s"][0] > 0 for row in rows)
    assert any(kind == "all-reduce" for kind, *_ in rows[0]["collectives"])
    assert (tmp_path / "topology-cpu.md").read_text().splitlines()[-1] in capsys.readouterr().out


def small(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, filters=(2, 4)))


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
    lines = topology.table(topology.machine_of("v5e"), rows).splitlines()
    assert all(line in printed and line in page.read_text() for line in lines)

    compiled.clear()
    topology.measure("v5e:2x4", 16, tmp_path)
    assert compiled == list(topology.LAYOUTS[2:])
    assert len(json.loads(content.read_text())) == 4 and page.read_text().count("\n| ") == 5


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
