"""Checkpoints of two real processes, which save together, and restore the same one whatever each of them sees."""

from pathlib import Path

import numpy as np
import pytest

from neuronet_jax.runs.checkpoint import Checkpoints
from tests.processes import run_two

ROOT = Path(__file__).parents[3]

TWO = """
import os, sys, time
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, run = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=300)
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from experiments.flags import load
from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs.checkpoint import Checkpoints
devices = NamedSharding(Mesh(jax.devices(), "d"), PartitionSpec("d"))
make = lambda step: {"w": jax.make_array_from_callback((8,), devices, lambda i: np.arange(8.0)[i] * step)}
checkpoints = Checkpoints(run, keep=4)
for step in (1, 2, 3, 4):
    checkpoints.save(step, make(step), {"next_index": 10 * step}, load("all_targets:demo"), score=1 / step)
    checkpoints.check()
checkpoints.wait()

def show(name):
    try:
        found = checkpoints.restore(make(0))
        mine = [shard.data.tolist() for shard in found.state["w"].addressable_shards]
        print(f"{name}:", checkpoints.steps(), found.step, found.data_position, mine, flush=True)
    except NeuronetError as error:
        print(f"{name}: {error}", flush=True)

def damage(step):
    os.truncate(f"{run}/checkpoints/{step}/position/position.json", 1)

def later(call, flag, harm):  # the first process calls and is done, then harm comes, then the second process calls
    flag = Path(run, flag)
    def wrapped(*given):
        if rank == 0:
            try: return call(*given)
            finally: flag.touch()
        while not flag.exists(): time.sleep(0.01)
        harm()
        return call(*given)
    return wrapped

show("sound")
multihost_utils.sync_global_devices("both have read it")
if rank == 0:
    damage(4)
multihost_utils.sync_global_devices("it is damaged")
show("damaged for both")

fault = checkpoints._inspection.fault
judge = later(fault, "judged", lambda: damage(3))
checkpoints._inspection.fault = lambda step: judge(step) if step == 3 else fault(step)
show("damaged after the first judged it")

checkpoints._inspection.fault, position = fault, checkpoints._position
checkpoints._position = later(position, "read", lambda: damage(2))
show("damaged after both judged it")

runtime.MEET_S = 3.0
if rank == 0:
    show("alone")
    Path(run, "waited").touch()
while not Path(run, "waited").exists():
    time.sleep(0.01)
checkpoints.close()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, str], Path]:
    """Returns what each of the two processes said of each of their restores, and the folder of their run."""
    run = tmp_path_factory.mktemp("two") / "run"
    outputs, statuses = run_two(TWO, str(run), environment={"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert statuses == [0, 0], outputs
    first, second = map(_by_name, outputs)
    return first, second, run


def _by_name(text: str) -> dict[str, str]:
    lines = (line.partition(": ") for line in text.splitlines())
    return {name: said for name, _, said in lines}


def test_both_save_and_restore_their_part(said):
    assert said[0]["sound"] == "[1, 2, 3, 4] 4 {'next_index': 40} [[0.0, 4.0], [8.0, 12.0]]"
    assert said[1]["sound"] == "[1, 2, 3, 4] 4 {'next_index': 40} [[16.0, 20.0], [24.0, 28.0]]"


def test_E03_both_fall_back(said):
    assert said[0]["damaged for both"] == "[1, 2, 3] 3 {'next_index': 30} [[0.0, 3.0], [6.0, 9.0]]"
    assert said[1]["damaged for both"] == "[1, 2, 3] 3 {'next_index': 30} [[12.0, 15.0], [18.0, 21.0]]"


def test_E03_damage_that_only_the_second_process_sees_sets_the_checkpoint_aside_for_both(said):
    place = "damaged after the first judged it"
    assert said[0][place] == "[1, 2] 2 {'next_index': 20} [[0.0, 2.0], [4.0, 6.0]]"
    assert said[1][place] == "[1, 2] 2 {'next_index': 20} [[8.0, 10.0], [12.0, 14.0]]"


def test_E03_damage_between_judging_and_reading_ends_both(said):
    place, fault = "damaged after both judged it", "position/position.json does not have its checksum"
    assert said[1][place] == fault
    assert said[0][place] == f"process 1 could not read the checkpoint: {fault}"


def test_D06_a_process_that_never_comes_to_restore_is_named(said):
    assert said[0]["alone"].startswith(
        "process 0 of 2 has waited 3 s for process 1 while looking for a sound checkpoint: see the log of that process"
    )


def test_one_process_reads_the_checkpoint_of_two(said):
    with Checkpoints(said[2], read_only=True) as one:
        restored = one.restore({"w": np.zeros(8, np.float32)}, step=1)
    np.testing.assert_array_equal(restored.state["w"], np.arange(8.0))
    assert restored.data_position == {"next_index": 10}
