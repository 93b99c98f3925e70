"""The ways to read crops give the same crops, and the cores that a host needs follow from a plan."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.benchmark import input as pipeline
from experiments.benchmark import one_core, topology
from experiments.benchmark.one_core import Way


def test_every_way_reads_the_same_crops(make_store: Callable[..., Any], tmp_path: Path) -> None:
    store, _ = make_store(("train",) * 2, grid=(20, 24, 16))
    folder = tmp_path / "files"
    folder.mkdir()
    one_core.write_files(store.dest, folder)
    draws = one_core.drawn(store, 4)
    assert len({draw.subject.slot for draw in draws}) == 2 and {draw.at_foreground for draw in draws} == {False, True}
    reads = {name: one_core.reader(name, store, folder, 8) for name in one_core.CROPS}
    for draw in draws:
        image, labels = reads["store"][0](draw)
        for name, tolerance in (("npy", 1e-6), ("nii.gz", 0.51)):  # int16 rounds the raw values
            their_image, their_labels = reads[name][0](draw)
            np.testing.assert_allclose(
                their_image * draw.subject.std, image[..., 0] * draw.subject.std, atol=tolerance * 1.01, rtol=1e-5
            )
            np.testing.assert_array_equal(their_labels, labels)
    assert {name: len(files) for name, (_, files) in reads.items() if name != "store"} == {
        "npy": 2 * 2,
        "nii.gz": 2 * (1 + len(store.info.protocols)),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops a file from its cache on request")
def test_dropped_files_are_read_from_the_disk_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(2**22))

    def read_from_disk() -> int:
        before = int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])
        file.read_bytes()
        return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0]) - before

    kind = subprocess.run(["stat", "--file-system", "--format=%T", tmp_path], capture_output=True, text=True).stdout
    if kind.strip() not in ("ext2/ext3", "xfs", "btrfs"):
        pytest.skip(f"{kind.strip()} need not be on a disk of this machine")
    assert read_from_disk() == 0  # just written
    one_core.drop([file])
    assert read_from_disk() >= 2**22


def test_the_cores_of_a_host_follow_from_its_plans(tmp_path: Path) -> None:
    ways = [Way("store", 20, 25, 18, 24, 5), Way("nii.gz", 1, 5, 1, 5, 4)]
    assert one_core.table(ways)[2] == "| store | 20 | 25 | 18 | 24 | 5.0 | 5 |"
    assert "there are none in" in pipeline.appetite(ways, tmp_path)[0]
    row = {"family": "reference", "data": 8, "space": 1, "tflop": 1.97, "hbm_gib": 1.0, "collectives": []}  # 10 ms
    (tmp_path / "topology-v5e-2x4.json").write_text(json.dumps([row, row | {"space": 2}]))
    assert topology.predicted(topology.machine_of("v5e"), row).step_s == pytest.approx(0.01)
    # Eight chips eat 800 crops/s; twice as many from cores of 25 each
    assert pipeline.appetite(ways, tmp_path)[2:] == ["| v5e-2x4 reference | 8 | 800 | 64 | 112 |"]
