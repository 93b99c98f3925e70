"""Many scans through the real command: in shards, interrupted and continued, on different machines, out of memory."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from neuronet_jax.cli import main
from neuronet_jax.files import Files
from neuronet_jax.images import nifti
from neuronet_jax.results import bids, cohort
from neuronet_jax.runs.restore import restore
from tests.processes import PATIENCE_S, QUICK_XLA_FLAGS

ROOT = Path(__file__).resolve().parents[3]


def _command(run: Path, heads: Path, out: Path, *more: str) -> list[str]:
    return ["segment", str(heads), f"--run={run}", f"--out={out}", *more]


def _process(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "neuronet_jax", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def _summary(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture(scope="module")
def whole(tiny_run, noisy_heads, tmp_path_factory) -> dict[str, bytes]:
    """Returns the results of all scans from an undisturbed command."""
    out = tmp_path_factory.mktemp("whole")
    assert main(_command(tiny_run, noisy_heads, out)) == 0
    tree = _tree(out)
    assert len(_summary(out / "summary.tsv")) == 8
    labels = [nifti.read_labels(path).data for path in out.rglob("*fslfast*.nii.gz")]
    assert len({ids.tobytes() for ids in labels}) == 8 and min(len(np.unique(ids)) for ids in labels) > 1
    return tree


OF_COHORT = ("summary.tsv", "report.html")  # these depend on which other scans are present


def test_F08_killed_at_any_moment_and_run_again_equals_uninterrupted(tiny_run, noisy_heads, whole, tmp_path):
    for results in (1, 12):  # SIGKILL as soon as this many label maps exist
        process = _process(*_command(tiny_run, noisy_heads, tmp_path))
        deadline = time.monotonic() + 120
        while len(list(tmp_path.rglob("*_dseg.nii.gz"))) < results and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "summary.tsv").exists()
        for name, content in _tree(tmp_path).items():
            # records are first "begun", and pages know the cohort only at its end
            if name in whole and not name.endswith(("_provenance.json", "report.html")):
                assert content == whole[name]
    assert main(_command(tiny_run, noisy_heads, tmp_path)) == 0
    assert _tree(tmp_path) == whole


@pytest.mark.soak  # one kill for each file; the test above kills at some moments
def test_F08_killed_at_every_write_and_run_again_equals_uninterrupted(
    tiny_run, noisy_heads, whole, tmp_path, monkeypatch
):
    class Killed(BaseException):
        """Stands for the end of the process: nothing is written from then on."""

    head = tmp_path / "head0.nii.gz"
    shutil.copy2(noisy_heads / head.name, head)
    writes, write, lock = [0], Files.write, threading.Lock()
    complete = 0
    while not complete:
        out = tmp_path / f"killed{writes[0]}"
        lives, writes[0] = writes[0], 0

        def count(files: Files, name: str, data: bytes, lives: int = lives) -> None:
            with lock:
                writes[0] += 1
                if writes[0] > lives:
                    raise Killed
            write(files, name, data)

        monkeypatch.setattr(Files, "write", count)
        try:
            complete = main(_command(tiny_run, head, out)) == 0
        except Killed:
            monkeypatch.setattr(Files, "write", write)
            assert main(_command(tiny_run, head, out)) == 0
        for name, content in _tree(out).items():
            assert name == "volumes.tsv" or name.endswith(OF_COHORT) or content == whole[name]
        writes[0] = lives + 1
    assert lives > 8  # description, tables, begun, 2 label maps with sidecars, volumes, complete, summary


def test_shards_are_disjoint_complete_and_keep_their_summaries(tiny_run, noisy_heads, whole, tmp_path):
    for index in (3, 1, 2):  # in any order, as a scheduler starts them
        assert main(_command(tiny_run, noisy_heads, tmp_path, f"--shard={index}/3")) == 0
    rows = [[row["output"] for row in _summary(tmp_path / f"summary_shard-{i}-of-3.tsv")] for i in (1, 2, 3)]
    assert [len(part) for part in rows] == [3, 3, 2]
    assert sorted(itertools.chain(*rows)) == [f"sub-head{number}" for number in range(8)]
    assert not (tmp_path / "summary.tsv").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("sub-*/**/*.*") if path.suffix != ".html"}
    assert (
        main(_command(tiny_run, noisy_heads, tmp_path)) == 0
    )  # without shards: only the tables of all scans remain to be written
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for index in (1, 2, 3):
        (tmp_path / f"summary_shard-{index}-of-3.tsv").unlink()
    assert _tree(tmp_path) == whole


@pytest.mark.parametrize("count", [1, 2, 5, 8, 11])
def test_shards_split_any_number_of_scans(tmp_path, count):
    targets = [bids.Target(tmp_path / f"{n}.nii", tmp_path, f"sub-{n}") for n in (3, 1, 0, 2, 7, 5, 6, 4)]
    parts = [[target.stem for target in cohort.shard(targets, index, count)] for index in range(1, count + 1)]
    assert sorted(itertools.chain(*parts)) == sorted(target.stem for target in targets)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert parts == [[target.stem for target in cohort.shard(targets[::-1], i, count)] for i in range(1, count + 1)]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_an_invalid_shard_is_refused(text):
    with pytest.raises(SystemExit) as raised:
        main(["segment", "x", "--run=r", "--out=o", f"--shard={text}"])
    assert raised.value.code == 2


def test_F07_one_device_equals_eight(tiny_run, noisy_heads, whole, tmp_path):
    process = _process(*_command(tiny_run, noisy_heads, tmp_path / "one"), XLA_FLAGS=QUICK_XLA_FLAGS)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    tree = _tree(tmp_path / "one")
    assert tree.keys() == whole.keys()
    # a voxel with tied scores may get either class, since sums run in a different order
    for name in tree:
        (tmp_path / "eight.nii.gz").write_bytes(whole[name])
        if name.endswith("dseg.nii.gz"):
            one, eight = (nifti.read_labels(tmp_path / path).data for path in (f"one/{name}", "eight.nii.gz"))
            assert np.mean(one == eight) >= 0.9999
        elif not name.endswith(("volumes.tsv", "agreement.tsv", "quality.tsv", ".html", ".nii.gz")):
            assert tree[name] == whole[name]
    assert "8 of 8 scans segmented" in output and "the network was busy" in output
    assert re.search(r"^W_CUT \(\d scans\): The brain ends at the border of the image", output, re.MULTILINE)
    lines = errors.splitlines()  # stderr is not a terminal here
    assert any(line.startswith("[8/8] sub-head7 (head7.nii.gz): done, with W_CONTRAST, W_CUT") for line in lines)
    assert any(re.fullmatch(r"\[7/8\] .*; about [\d.]+ s left", line) for line in lines)
    assert "running on" in errors and "a scan like the first takes about" in errors


def test_F07_a_batch_of_four_equals_one_by_one(tiny_run):
    labels = jax.jit(restore(tiny_run).network.labels)
    images = np.random.default_rng(0).normal(size=(4, 32, 40, 48, 1)).astype(np.float32)
    one_by_one = np.concatenate([labels(image[None]) for image in images])
    assert np.mean(labels(images) == one_by_one) >= 0.9999  # different programs may sum in a different order
    assert len(np.unique(one_by_one)) > 2


def test_G06_the_results_of_a_command_pass_the_bids_validator(tiny_run, noisy_heads, whole, tmp_path):
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if validator is None:
        pytest.skip("needs bids-validator-deno, as the dev extra brings it")
    (tmp_path / "sub-01_ses-a_T1w.nii.gz").write_bytes((noisy_heads / "head0.nii.gz").read_bytes())
    (tmp_path / "bad.nii.gz").touch()
    out = tmp_path / "derivatives"
    assert main(_command(tiny_run, tmp_path, out, "--posteriors=fsl_fast:GM", "--shard=1/1")) == 3
    assert main(_command(tiny_run, tmp_path, out, "--posteriors=fsl_fast:GM")) == 3
    found = subprocess.run([validator, "--json", str(out)], capture_output=True, text=True, check=False)
    report = json.loads(found.stdout)
    assert report["summary"]["subjects"] == ["01"] and report["summary"]["sessions"] == ["a"]
    assert [issue for issue in report["issues"]["issues"] if issue["severity"] == "error"] == []


def test_an_unforeseen_failure_does_not_stop_the_other_scans(
    tiny_run, noisy_heads, whole, tmp_path, monkeypatch, capsys
):
    segment_volume = cohort.segment_volume

    def fails(model, volume, *rest):
        if volume.data.shape[0] == 64:
            raise ZeroDivisionError("in a head of 64 sagittal slices.")
        return segment_volume(model, volume, *rest)

    monkeypatch.setattr(cohort, "segment_volume", fails)
    assert main(_command(tiny_run, noisy_heads, tmp_path)) == 3
    rows = _summary(tmp_path / "summary.tsv")
    assert [row["status"] for row in rows] == ["rejected", "done"] * 4
    assert (
        rows[0]["code"] == "E_INTERNAL" and "ZeroDivisionError: in a head of 64 sagittal slices;" in rows[0]["reason"]
    )
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(_command(tiny_run, noisy_heads, tmp_path)) == 0
    assert _tree(tmp_path) == whole


def test_a_full_disk_stops_the_command_and_leaves_a_summary(tiny_run, noisy_heads, tmp_path, monkeypatch, capsys):
    write_labels = nifti.write_labels

    def fails(path, *rest):
        if "head3" in path.name:
            raise OSError(28, "No space left on device")
        write_labels(path, *rest)

    monkeypatch.setattr(nifti, "write_labels", fails)
    assert main(_command(tiny_run, noisy_heads, tmp_path)) == 1
    assert "No space left on device; make room" in capsys.readouterr().err
    assert [row["output"] for row in _summary(tmp_path / "summary.tsv")] == [f"sub-head{n}" for n in range(3)]


def test_ctrl_c_ends_with_a_summary(tiny_run, noisy_heads, tmp_path, monkeypatch, capsys):
    def interrupted(row, *rest):
        if row.output == "sub-head2":
            raise KeyboardInterrupt

    monkeypatch.setattr(cohort, "report", interrupted)
    assert main(_command(tiny_run, noisy_heads, tmp_path)) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert {"sub-head0", "sub-head1"} <= {row["output"] for row in _summary(tmp_path / "summary.tsv")}


def test_ctrl_c_ends_the_program_at_once(tiny_run, noisy_heads, tmp_path):
    """The network cannot be interrupted within a scan; the program does not wait for it."""
    slow = (
        "import sys, time; from neuronet_jax.results import cohort; from neuronet_jax.cli import main\n"
        "def segment_volume(*arguments): print('segmenting', file=sys.stderr, flush=True); time.sleep(250)\n"
        "cohort.segment_volume = segment_volume; sys.exit(main())"
    )
    command = [sys.executable, "-c", slow, *_command(tiny_run, noisy_heads, tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        while "segmenting" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped by Ctrl-C; run the same command again to continue" in errors
    assert not list(tmp_path.iterdir())


def test_scans_overlap_in_order_and_a_limited_number_waits():
    both = threading.Barrier(2, timeout=20)
    begun, lock, most = set(), threading.Lock(), [0]

    def work(item: int) -> int:
        with lock:
            begun.add(item)
            most[0] = max(most[0], len(begun) - finished)
        both.wait()  # passes only if two run at the same time
        return item * item

    finished = 0
    for item, future in cohort.in_order(work, iter(range(10)), workers=2):
        assert (item, future.result()) == (finished, finished * finished)
        time.sleep(0.01)
        finished += 1
    assert finished == 10 and most[0] <= 4


def test_items_not_begun_are_dropped_when_the_caller_stops():
    begun = []
    heads = cohort.in_order(begun.append, iter(range(100)), workers=1)
    next(heads)
    heads.close()
    assert len(begun) <= 2


def test_duration():
    seconds = (0.04, 9.94, 9.96, 59.4, 59.6, 3599.4, 3599.6, 90000)
    said = ["0.0 s", "9.9 s", "10 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "25 h 0 min"]
    assert [cohort.duration(s) for s in seconds] == said


def test_A41_a_record_contains_no_folder_names(tiny_run, noisy_heads, tmp_path, whole):
    text = whole["sub-head0/anat/sub-head0_provenance.json"].decode()
    assert str(noisy_heads) not in text and str(tiny_run) not in text
    assert json.loads(text)["input"]["file"] == "head0.nii.gz"
