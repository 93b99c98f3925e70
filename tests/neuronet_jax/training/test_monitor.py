"""Metrics on disk, in TensorBoard and on the terminal, and the behaviour when they cannot be written."""

import io
import json
import logging
import shutil
import struct
import subprocess
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results.pictures import label_picture, save_comparison, save_strip
from neuronet_jax.runs import directory
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.training import monitor
from neuronet_jax.training.monitor import Monitor


def _events(run: Path) -> list[Event]:
    """Returns the events of every TensorBoard file of a run (TFRecord: length u64, crc u32, bytes, crc u32)."""
    events = []
    for file in sorted((run / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def _steps(run: Path) -> list[int]:
    return [line["step"] for line in RunDirectory(run).metrics()]


def test_scalars_reach_both_files(tmp_path):
    with Monitor(tmp_path, total_steps=10) as watch:
        watch.scalars(3, {"loss": jnp.float32(0.5), "dice": 0.25})
        (line,) = RunDirectory(tmp_path).metrics()  # flushed at once
    assert (line["step"], line["loss"], line["dice"]) == (3, 0.5, 0.25)
    written = {
        value.tag: (event.step, value.simple_value) for event in _events(tmp_path) for value in event.summary.value
    }
    assert written == {"loss": (3, 0.5), "dice": (3, 0.25)}


def test_non_finite_values_become_null(tmp_path):
    with Monitor(tmp_path, total_steps=10) as watch:
        watch.scalars(1, {"loss": float("nan"), "dice": np.float32("inf")})
    (line,) = RunDirectory(tmp_path).metrics()
    assert line["loss"] is None
    assert line["dice"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_pictures_are_png(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Monitor(tmp_path, total_steps=10) as watch:
        watch.pictures(2, {"validation/malp_em": picture})
    (value,) = [value for event in _events(tmp_path) for value in event.summary.value]
    assert value.tag == "validation/malp_em"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string))), picture)


def test_resume_drops_steps_that_will_run_again(tmp_path):
    with Monitor(tmp_path, total_steps=10) as watch:
        for step in (1, 2, 3, 4):
            watch.scalars(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the crash
    assert _steps(tmp_path) == [1, 2, 3, 4]
    with Monitor(tmp_path, total_steps=10, resume_step=2) as watch:
        watch.scalars(3, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in RunDirectory(tmp_path).metrics()] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    starts = [event.step for event in _events(tmp_path) if event.HasField("session_log")]
    assert starts == [3]  # TensorBoard hides later steps of the first run


def test_other_processes_write_nothing(tmp_path, capfd):
    with Monitor(tmp_path, total_steps=10, process_index=1) as watch:
        watch.scalars(1, {"loss": 1.0})
        watch.pictures(1, {"a": np.zeros((2, 2, 3), np.uint8)})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_plain_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    seconds = iter([0.0, 2.0, 4.0])  # one at the start, one per report
    monkeypatch.setattr(monitor.time, "monotonic", lambda: next(seconds))
    with Monitor(tmp_path, total_steps=100) as watch:
        watch.scalars(10, {"loss": 0.51234, "learning_rate": 1e-3})
        watch.scalars(20, {"loss": 0.4, "dice": 0.5})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 10/100  loss 0.512  5.0 steps/s  0:00:18 left"  # 90 steps at 5 per second
    assert second == "step 20/100  loss 0.400  dice 0.500  5.0 steps/s  0:00:16 left"


def test_progress_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(monitor, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=120))
    with Monitor(tmp_path, total_steps=100, resume_step=20) as watch:
        watch.scalars(30, {"loss": 0.25})
    assert "30/100" in screen.getvalue()
    assert "loss 0.250" in screen.getvalue()


def _full_disk(*_):
    raise OSError(28, "No space left on device")


def test_D12_failing_tensorboard_warns_once_and_metrics_go_on(tmp_path, caplog, monkeypatch):
    with Monitor(tmp_path, total_steps=100) as watch, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(monitor.EventsWriter, "write_event", _full_disk)
        for step in range(1, 40):  # far more than any queue would hold
            watch.scalars(step, {"loss": 1.0})
            watch.pictures(step, {"a": np.zeros((2, 2, 3), np.uint8)})
    assert _steps(tmp_path) == list(range(1, 40))
    assert [record.message for record in caplog.records] == [
        "TensorBoard cannot be written; training continues without it: [Errno 28] No space left on device"
    ]


def test_D12_sinks_that_cannot_even_be_made(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING), Monitor(tmp_path, total_steps=9) as watch:
        watch.scalars(1, {"loss": 1.0})
    assert _steps(tmp_path) == [1]
    assert len(caplog.records) == 1
    caplog.clear()
    run = tmp_path / "tensorboard" / "run"  # neither sink can be made here
    with caplog.at_level(logging.WARNING), Monitor(run, total_steps=9) as watch:
        watch.scalars(1, {"loss": 1.0})
        watch.scalars(2, {"loss": 1.0})
    assert len(caplog.records) == 2


@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")  # tensorboardX leaves its file open
@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_D12_a_real_disk_that_is_full_or_read_only(tmp_path, caplog, options):
    place = tmp_path / "tensorboard"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs, which takes root")
    try:
        with caplog.at_level(logging.WARNING), Monitor(tmp_path, total_steps=100) as watch:
            for step in range(1, 40):
                watch.scalars(step, {"loss": 1.0})
                watch.pictures(step, {"a": np.random.default_rng(step).integers(0, 255, (32, 32, 3), np.uint8)})
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert _steps(tmp_path) == list(range(1, 40))
    (said,) = caplog.messages
    assert said.startswith("TensorBoard cannot be written; training continues without it: [Errno ")


class _Bucket:
    """A bucket in memory, with the interface that `Files` uses."""

    objects: typing.ClassVar[dict[str, bytes]] = {}

    def __init__(self, dest: str):
        self.dest = dest

    def read(self, name: str, most_bytes: int | None = None) -> bytes | None:
        return self.objects.get(f"{self.dest}/{name}")

    def write(self, name: str, data: bytes) -> None:
        self.objects[f"{self.dest}/{name}"] = data


def test_run_in_a_bucket(monkeypatch):
    monkeypatch.setattr(directory, "Files", _Bucket)
    monkeypatch.setattr(monitor, "UPLOAD_S", 0.0)
    with Monitor("gs://bucket/run", total_steps=9) as watch:
        watch.scalars(1, {"loss": 1.0})
        assert [line["step"] for line in RunDirectory("gs://bucket/run").metrics()] == [1]
        watch.scalars(2, {"loss": 1.0})
        folder = watch._folder
    assert not folder.exists()
    monkeypatch.setattr(monitor, "UPLOAD_S", 60.0)
    with Monitor("gs://bucket/run", total_steps=9, resume_step=1) as watch:
        watch.scalars(2, {"loss": 3.0})
        assert [line["loss"] for line in RunDirectory("gs://bucket/run").metrics()] == [1.0, 1.0]  # not yet a minute
    assert [(line["step"], line["loss"]) for line in RunDirectory("gs://bucket/run").metrics()] == [(1, 1.0), (2, 3.0)]
    names = [name.removeprefix("gs://bucket/run/") for name in _Bucket.objects]
    assert names[0] == "metrics.jsonl"
    assert all(name.startswith("tensorboard/events.out.tfevents.") for name in names[1:])
    assert len(names) >= 2


def test_D12_bucket_that_cannot_be_written(monkeypatch, caplog):
    monkeypatch.setattr(directory, "Files", _Bucket)
    monkeypatch.setattr(monitor, "UPLOAD_S", 0.0)
    monkeypatch.setattr(_Bucket, "write", _full_disk)
    with caplog.at_level(logging.WARNING), Monitor("gs://bucket/full", total_steps=9) as watch:
        watch.scalars(1, {"loss": 1.0})
        watch.scalars(2, {"loss": 1.0})
    assert len(caplog.records) == 1
    assert "gs://bucket/full cannot be written" in caplog.text


def test_label_picture_shows_the_right_voxels():
    protocol = PROTOCOLS["fsl_fast"]
    image = np.zeros((4, 6, 8), np.float32)
    labels, reference = np.zeros((2, 4, 6, 8), np.uint8)
    labels[0, 5, 4] = 1  # left, anterior, in the middle axial slice
    reference[3, 0, 4] = 2  # right, posterior
    picture = label_picture(image, labels, reference, protocol)
    assert picture.shape == (6 + 8 + 8, 3 * 6, 3)  # axial y×x, coronal z×x, sagittal z×y, each three wide
    axial = picture[:6, : 3 * 4].reshape(6, 3, 4, 3)  # [row panel column rgb]
    lit = [tuple(int(i) for i in index) for index in np.argwhere(axial.any(-1))]
    assert lit == [(0, 1, 0), (5, 2, 3)]  # anterior is up, left is left; labels in panel 1, reference in panel 2
    expected = np.array(protocol.structures[1].color) / 2
    assert np.abs(axial[0, 1, 0] - expected).max() <= 0.5


def test_saved_pictures_name_the_sides(tmp_path):
    cube, protocol = np.zeros((40, 40, 40)), PROTOCOLS["fsl_fast"]
    classes = cube.astype(np.uint8)
    save_strip(tmp_path / "strip.png", cube, {"fsl_fast": classes}, {})
    save_comparison(tmp_path / "comparison.png", cube, classes, classes, protocol)
    for name, columns, rows in (("strip", 2, 2), ("comparison", 3, 3)):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        letters = np.argwhere(np.abs(pixels - (255, 224, 138)).max(axis=-1) < 60)
        high, wide = pixels.shape[:2]
        places = {(y * rows // high, x * 2 * columns // wide) for y, x in letters.tolist()}
        assert places == {(row, half) for row in range(rows) for half in range(2 * columns)}


def test_label_picture_refuses_unequal_shapes():
    cube = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(NeuronetError, match="share a shape"):
        label_picture(cube, cube, cube[1:], PROTOCOLS["fsl_fast"])
