"""One folder of results and many commands: nothing is spoilt by a wrong one, and its tables tell of all of them."""

import csv
import gzip
import os
import re
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuronet_jax.cli import main
from neuronet_jax.results import dataset
from neuronet_jax.results.resume import Records

ROOT = Path(__file__).resolve().parents[3]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _told(out: Path) -> list[list[str]]:
    """Returns the names of the scans that each of the three shared files tells of."""
    page = (out / "report.html").read_text(encoding="utf-8")
    summary = [row["output"] for row in _rows(out / "summary.tsv")]
    volumes = [row["scan"] for row in _rows(out / "volumes.tsv")]
    return [
        summary,
        volumes,
        [name for name in summary if f'<td class="name">{name}' in page or f">{name}</a>" in page],
    ]


def _copies(heads: Path, *names: str) -> None:
    for name in names:
        (heads / name).write_bytes((heads / "a.nii.gz").read_bytes())


# ---- a wrong command leaves no trace --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (["a.nii"], 1, "did you mean {heads}/a.nii.gz?"),
        (["nowhere/a.nii.gz"], 1, "there is no folder {heads}/nowhere)"),
        (["list.csv"], 2, "write @{heads}/list.csv"),
        (["@lost.csv"], 1, "cannot read {heads}/lost.csv"),
        (["c.nii.gz"], 1, "rejected, E_CONSTANT"),
        (["a.nii.gz", "--protocols=fsl_fats"], 2, "not 'fsl_fats'"),
        (["a.nii.gz", "--crops=0"], 2, "crops must be at least 1"),
        (["a.nii.gz", "--fast", "--flip"], 2, "fast leaves out averages"),
        (["a.nii.gz", "--consistent-tissue"], 2, "derives tissues from malp_em"),
        (["a.nii.gz", "--posteriors=fsl_first:LeftHipocampus"], 2, "the nearest name is 'LeftHippocampus'"),
        (["a.nii.gz", "--protocols=fsl_fast", "--posteriors=fsl_first:LeftCaudate"], 2, "not among the protocols"),
    ],
)
def test_F09_a_wrong_command_spoils_no_folder(run, heads, tmp_path, capsys, given, status, message):
    (heads / "list.csv").write_text("t1\na.nii.gz\n")
    (name, *options), out = given, tmp_path / "out"
    place = f"@{heads / name[1:]}" if name.startswith("@") else str(heads / name)
    assert main(["segment", place, run, f"--out={out}", *options]) == status
    assert message.format(heads=heads) in capsys.readouterr().err
    assert not out.exists()
    assert main(["segment", f"@{heads / 'list.csv'}", run, f"--out={out}", "--flip", "--protocols=fsl_first"]) == 0


def test_F09_a_wrong_command_leaves_earlier_results_as_they_are(run, heads, tmp_path):
    out = tmp_path / "out"
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={out}"]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main(["segment", str(heads / "a.nii"), run, f"--out={out}"]) == 1
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={out}", "--flip"]) == 1  # different options
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("place", ["file", "file/deeper"])
def test_F09_an_output_on_a_file_is_one_clear_message(run, heads, tmp_path, capsys, place):
    (tmp_path / "file").write_text("precious")
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={tmp_path / place}"]) == 1
    assert f"{tmp_path / 'file'} is not a folder; choose a different --out folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_a_mistyped_command_or_option_is_answered_with_the_nearest(capsys):
    for given, nearest in (
        (["segmnt", "a.nii.gz"], "did you mean segment?"),
        (["segment", "a.nii.gz", "--otu=x"], "did you mean --out?"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(given)
        assert raised.value.code == 2 and nearest in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["input", "--out=", "--run=", "--log-file="])
def test_F09_an_unset_variable_of_the_shell_is_not_the_current_folder(run, heads, tmp_path, monkeypatch, capsys, empty):
    monkeypatch.chdir(heads)
    before = sorted(heads.iterdir())
    command = ["segment", "a.nii.gz", run, f"--out={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as raised:
        main(["segment", "", *command[2:]] if empty == "input" else [*command, empty])
    assert raised.value.code == 2 and "it is empty; is a variable of the shell not set?" in capsys.readouterr().err
    assert sorted(heads.iterdir()) == before


def test_a_file_in_the_place_of_the_command_is_answered_with_the_command(heads, capsys):
    with pytest.raises(SystemExit) as raised:
        main([str(heads / "a.nii.gz"), "--out=labels"])
    assert raised.value.code == 2
    assert f"a command comes first, such as `neuronet segment {heads / 'a.nii.gz'}`" in capsys.readouterr().err


# ---- the shared files tell of the whole folder ----------------------------------------------------------------------


def test_F15_tables_and_page_tell_of_all_commands(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    _copies(heads, "z.nii.gz")
    assert main(["segment", str(heads / "z.nii.gz"), str(heads / "b.nii.gz"), run, f"--out={out}"]) == 3
    warned = _rows(out / "summary.tsv")[1]["warnings"]
    assert warned != "n/a"
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={out}"]) == 0
    assert "1 of 1 scans segmented" in capsys.readouterr().out  # the status is that of this command
    everything, done = ["sub-a", "sub-b", "sub-z"], ["sub-a", "sub-z"]
    assert _told(out) == [everything, done, everything]
    rows = _rows(out / "summary.tsv")
    assert rows[2]["warnings"] == warned and rows[1]["code"] == "E_TRUNCATED"
    page = (out / "report.html").read_text()
    assert "2 of 3 scans segmented" in page and "E_TRUNCATED" in page
    _copies(heads, "b.nii.gz")  # somebody repairs it
    assert main(["segment", str(heads / "b.nii.gz"), run, f"--out={out}"]) == 0
    assert _told(out) == [everything] * 3


def test_F15_a_command_that_ends_in_the_middle_of_another_ones_tables(run, heads, tmp_path, monkeypatch):
    out, volumes_of = tmp_path / "out", dataset.volumes_of
    _copies(heads, "e.nii.gz")

    def interleaved(*given):
        found = volumes_of(*given)
        monkeypatch.setattr(dataset, "volumes_of", volumes_of)
        assert main(["segment", str(heads / "e.nii.gz"), run, f"--out={out}"]) == 0
        return found  # of before the other command

    monkeypatch.setattr(dataset, "volumes_of", interleaved)
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={out}"]) == 0
    assert _told(out) == [["sub-a", "sub-e"]] * 3


def test_F15_a_scan_whose_command_was_stopped_counts_in_none_of_them(run, heads, tmp_path, monkeypatch):
    """Its tables are there, but nobody can tell whether all of its results are."""

    def stopped(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    _copies(heads, "k.nii.gz")
    with monkeypatch.context() as patch:
        patch.setattr(Records, "complete", stopped)
        assert main(["segment", str(heads / "k.nii.gz"), run, f"--out={out}"]) == 130
    assert (out / "sub-k" / "anat" / "sub-k_volumes.tsv").exists()
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={out}"]) == 0
    assert _told(out) == [["sub-a"]] * 3 and "sub-k" not in (out / "report.html").read_text()
    assert main(["segment", str(heads / "k.nii.gz"), run, f"--out={out}"]) == 0
    assert _told(out) == [["sub-a", "sub-k"]] * 3


def test_F15_a_command_that_another_one_overtakes_with_the_same_scan(run, heads, tmp_path, monkeypatch, capsys):
    out, begin = tmp_path / "out", Records.begin
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={out}"]

    def overtaken(*given):
        monkeypatch.setattr(Records, "begin", begin)
        assert main(command) == 0
        begin(*given)

    monkeypatch.setattr(Records, "begin", overtaken)
    assert main(command) == 0
    assert _told(out) == [["sub-a"]] * 3
    assert main(command) == 0 and "1 of 1 scans segmented" in (said := capsys.readouterr().out) and "earlier" in said


def test_F15_two_commands_at_the_same_time(tiny_run, noisy_heads, tmp_path):
    command = [sys.executable, "-m", "neuronet_jax", "segment"]
    processes = [
        subprocess.Popen(
            [*command, str(noisy_heads / name), f"--run={tiny_run}", f"--out={tmp_path}"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in ("head0.nii.gz", "head2.nii.gz")
    ]  # fmt: skip
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert _told(tmp_path) == [["sub-head0", "sub-head2"]] * 3


# ---- hostile inputs -------------------------------------------------------------------------------------------------


def test_F13_names_that_no_table_or_terminal_should_get_as_they_are(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    names = [b"one\xff.nii.gz", b"two\x1b[31m\n.nii.gz", b"=3+A1.nii.gz", b"<script>.nii", b"\xff.nii.gz"]
    for name in names:
        content = (heads / "a.nii.gz").read_bytes()
        (heads / os.fsdecode(name)).write_bytes(gzip.decompress(content) if name.endswith(b".nii") else content)
    inputs = [str(heads / os.fsdecode(name)) for name in names]
    assert main(["segment", *inputs, run, f"--out={out}"]) == 3  # the last has no letter that could name its results
    rows = {row["input"]: row for row in _rows(out / "summary.tsv")}
    assert {name: row["output"] for name, row in rows.items()} == {
        "'=3+A1.nii.gz": "sub-3A1",
        "<script>.nii": "sub-script",
        "\\xff.nii.gz": "n/a",
        "one\\xff.nii.gz": "sub-one",
        "two\\x1b[31m\\n.nii.gz": "sub-two31m",
    }
    assert rows["\\xff.nii.gz"]["code"] == "E_ID"
    said = capsys.readouterr()
    assert "\x1b[31m" not in said.out + said.err and "\udcff" not in said.out + said.err
    for page in (path.read_text(encoding="utf-8") for path in out.rglob("*report.html")):
        assert "\x1b" not in page and "<script" not in page and re.search(r"\\xff|\\x1b|=3\+A1|&lt;script&gt;", page)
    assert len(_rows(out / "volumes.tsv")) == 4
    assert main(["segment", *inputs, run, f"--out={out}"]) == 3  # and it continues
    assert "4 of 5 scans segmented" in capsys.readouterr().out


def test_F14_an_input_in_the_output_folder_is_never_overwritten(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    anat = out / "sub-a" / "anat"
    anat.mkdir(parents=True)
    votes, table = anat / "sub-a_desc-agreement_dseg.nii.gz", out / "volumes.tsv"
    votes.write_bytes((heads / "a.nii.gz").read_bytes())
    table.write_text(f"t1\n{heads / 'a.nii.gz'}\n")
    for given, path in ((str(votes), votes), (f"@{table}", table)):
        before = path.read_bytes()
        assert main(["segment", given, run, f"--out={out}"]) == 1
        assert f"{path} is an input and would be overwritten" in capsys.readouterr().err
        assert path.read_bytes() == before


def test_F14_pipes_and_sockets_are_refused_without_waiting(run, heads, tmp_path, monkeypatch):
    monkeypatch.chdir(heads)  # the name of a socket is short
    os.mkfifo("pipe.nii.gz")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.nii.gz")
        inputs = ["pipe.nii.gz", "socket.nii.gz", "a.nii.gz"]
        assert main(["segment", *inputs, run, f"--out={tmp_path / 'out'}"]) == 3
    codes = {row["input"]: row["code"] for row in _rows(tmp_path / "out" / "summary.tsv")}
    assert codes == {"a.nii.gz": "n/a", "pipe.nii.gz": "E_FORMAT", "socket.nii.gz": "E_FORMAT"}


def test_F12_the_estimate_reads_no_more_than_the_guard(run, heads, tmp_path, capsys):
    bomb = heads / "bomb.nii"
    header = nib.Nifti1Header()
    header.set_data_shape((64, 64, 64))
    header.set_data_dtype(np.uint8)
    header["magic"], header["vox_offset"] = b"n+1", 2.0**30 + 368
    with bomb.open("wb") as file:  # sparse: it takes no room on the disk
        file.write(header.binaryblock + b"\1\0\0\0" + np.array([2**30, 6], "<i4").tobytes())
        file.truncate(2**30 + 368 + 64**3)
    tracemalloc.start()
    try:
        assert main(["segment", str(bomb), run, f"--out={tmp_path / 'out'}"]) == 1
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()
    assert "E_HEADER: vox_offset must be" in capsys.readouterr().err


# ---- lists ----------------------------------------------------------------------------------------------------------


def test_A40_a_bad_id_in_a_list_names_its_row_and_the_others_go_on(run, heads, tmp_path, capsys):
    (heads / "cohort.csv").write_text("id,t1\n01,a.nii.gz\n0/2,d.nii.gz\n")
    assert main(["segment", f"@{heads / 'cohort.csv'}", run, f"--out={tmp_path / 'out'}"]) == 3
    said = capsys.readouterr()
    assert "E_ID: the id in row 3 of cohort.csv must consist of letters and digits" in said.err
    assert "1 of 2 scans segmented" in said.out
    rows = _rows(tmp_path / "out" / "summary.tsv")
    assert [(row["input"], row["output"], row["code"]) for row in rows] == [
        ("d.nii.gz", "n/a", "E_ID"),
        ("a.nii.gz", "sub-01", "n/a"),
    ]


def test_A28_duplicates_in_a_list_come_with_advice_that_can_be_followed(run, heads, tmp_path, capsys):
    _copies(heads, "e.nii.gz")
    cohort, out = heads / "cohort.csv", tmp_path / "out"
    cohort.write_text("id,t1\n01,a.nii.gz\nsub-01,e.nii.gz\n")
    assert main(["segment", f"@{cohort}", run, f"--out={out}"]) == 1
    assert "row 2 of cohort.csv and row 3 of cohort.csv would both be named sub-01: give each its own id" in (
        " ".join(capsys.readouterr().err.split())
    )
    cohort.write_text("id,t1\n01,a.nii.gz\n02,a.nii.gz\n03,e.nii.gz\n")
    assert main(["segment", f"@{cohort}", run, f"--out={out}"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "row 2 of cohort.csv and row 3 of cohort.csv are one file with two ids: remove one of them" in said
    assert not out.exists()
    cohort.write_text("id,t1\n01,a.nii.gz\n02,e.nii.gz\n")
    assert main(["segment", f"@{cohort}", run, f"--out={out}"]) == 0
