import argparse
import csv
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import neuronet_jax
from neuronet_jax.cli import _parser, main
from neuronet_jax.codes import explain
from neuronet_jax.errors import RejectError
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.results import cohort
from neuronet_jax.runs import directory
from neuronet_jax.runs import restore as restoring

ROOT = Path(__file__).resolve().parents[2]


def _summary(out: Path) -> list[dict[str, str]]:
    with (out / "summary.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_F03_a_cohort_continues_past_bad_files(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    inputs = [str(heads / f"{name}.nii.gz") for name in ("b", "a", "c", "missing")]
    assert main(["segment", *inputs, run, f"--out={out}", "--no-clean-up"]) == 3
    rows = _summary(out)
    assert [(row["input"], row["status"], row["code"]) for row in rows] == [
        ("a.nii.gz", "done", "n/a"),  # sorted by name
        ("b.nii.gz", "rejected", "E_TRUNCATED"),
        ("c.nii.gz", "rejected", "E_CONSTANT"),
        ("missing.nii.gz", "rejected", "E_IO"),
    ]
    printed = capsys.readouterr().out
    assert "1 of 4 scans segmented" in printed
    assert all(explain(code) in printed for code in ("E_TRUNCATED", "E_CONSTANT", "E_IO"))
    written = sorted(path.name for path in (out / "sub-a" / "anat").iterdir())
    assert written == [
        "sub-a_agreement.tsv",
        "sub-a_desc-brain_mask.json",
        "sub-a_desc-brain_mask.nii.gz",
        "sub-a_provenance.json",
        "sub-a_quality.tsv",
        "sub-a_report.html",
        "sub-a_seg-fslfast_dseg.json",
        "sub-a_seg-fslfast_dseg.nii.gz",
        "sub-a_seg-fslfirst_dseg.json",
        "sub-a_seg-fslfirst_dseg.nii.gz",
        "sub-a_thumbnail.webp",
        "sub-a_volumes.tsv",
    ]
    assert sorted(path.name for path in out.glob("sub-*")) == ["sub-a"]
    labels = nib.Nifti1Image.from_filename(out / "sub-a" / "anat" / "sub-a_seg-fslfirst_dseg.nii.gz")
    source = nib.Nifti1Image.from_filename(heads / "a.nii.gz")
    data = source.get_fdata()
    np.testing.assert_array_equal(
        np.asarray(labels.dataobj), np.where(data > data.mean(), 10, 0)
    )  # FIRST's left thalamus
    np.testing.assert_array_equal(labels.affine, source.affine)
    assert list(out.rglob("*tmp*")) == []


def test_F04_a_label_map_is_no_scan(run, heads, tmp_path, capsys):
    data = np.asarray(nib.Nifti1Image.from_filename(heads / "a.nii.gz").dataobj)
    labels = (np.kron(np.arange(8).reshape(2, 2, 2), np.ones((30, 35, 32))) * (data > 0)).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, np.diag([-2.0, 2, 2, 1])), heads / "labels.nii.gz")
    assert main(["segment", str(heads / "labels.nii.gz"), run, f"--out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr()
    assert "rejected, E_LABEL_IMAGE: the image is a label map" in said.err and "Give the scan itself" in said.out
    assert "the network was busy" not in said.out  # it had nothing to do


def _state(out: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("sub-*/**/*.*")}


def test_F09_the_same_command_again_touches_nothing(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["segment", str(heads / "a.nii.gz"), str(heads / "b.nii.gz"), run, f"--out={out}"]
    assert main(command) == 3
    before, summary = _state(out), _summary(out)
    for again in (command, [*command, "--overwrite"]):  # results that would not change are kept
        assert main(again) == 3  # b is tried again: it may have been repaired
        assert _state(out) == before and _summary(out) == summary
        assert f"1 of 2 scans segmented in {out}, 1 of them earlier" in capsys.readouterr().out


def test_F09_results_of_a_different_input_are_replaced_only_on_request(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={out}"]
    assert main(command) == 0
    before = _state(out)
    (heads / "a.nii.gz").write_bytes((heads / "d.nii.gz").read_bytes())
    command.append("--assume_ras")
    assert main(command) == 1
    assert "sub-a: its results come from a different input file\nadd --overwrite" in capsys.readouterr().err
    assert _state(out) == before
    assert main([*command, "--overwrite"]) == 0
    assert _state(out) != before and main(command) == 0


def test_pages_and_the_table_of_the_cohort(run, heads, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copy(heads / "a.nii.gz", heads / "e.nii.gz")
    assert main(["segment", *(str(heads / f"{n}.nii.gz") for n in "abe"), run, f"--out={out}"]) == 3
    with (out / "volumes.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["scan"] for row in rows] == ["sub-a", "sub-e"] and len(rows[0]) == 1 + 3 + 15
    assert rows[0]["fsl_fast.CSF"] == rows[1]["fsl_fast.CSF"] != "0"
    page = (out / "report.html").read_text()
    assert "2 of 3 scans segmented" in page and "E_TRUNCATED" in page
    assert "uncalibrated" in page and 'href="sub-a/anat/sub-a_report.html"' in page
    head = (out / "sub-a" / "anat" / "sub-a_report.html").read_text()
    assert "../../report.html#sub-a" in head and "uncalibrated" in head
    assert f"neuronet segment a.nii.gz {run.replace(str(tmp_path), tmp_path.name)}" in head  # without folders
    assert str(tmp_path) not in head + page
    (done, _, _) = _summary(out)
    assert float(done["predicted_dice"]) <= 1 and done["calibrated"] == "no"
    bare = tmp_path / "bare"
    monkeypatch.setattr(directory, "shipped", lambda: tmp_path)  # the network of the tests, without its calibration
    assert main(["segment", str(heads / "a.nii.gz"), f"--out={bare}"]) == 0
    assert "<code>neuronet segment a.nii.gz</code>" in (bare / "sub-a" / "anat" / "sub-a_report.html").read_text()
    plain = tmp_path / "plain"
    assert main(["segment", str(heads / "a.nii.gz"), run, f"--out={plain}", "--no_report"]) == 0
    assert not list(plain.rglob("*.html")) and (plain / "volumes.tsv").exists()


def test_a_choice_of_protocols(run, heads, tmp_path, capsys):
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main([*command, "--protocols=fsl_first"]) == 0
    assert len(list((tmp_path / "out").rglob("*_dseg.nii.gz"))) == 1
    assert main([*command, "--protocols=malp_em"]) == 2
    assert "this model predicts fsl_fast, fsl_first, not 'malp_em'" in capsys.readouterr().err


def test_options_reach_the_network(run, heads, tmp_path, monkeypatch):
    asked = []
    model = restoring.restore("")
    model = replace(model, config=replace(model.config, protocols=("fsl_fast", "fsl_first", "malp_em")))
    monkeypatch.setattr(restoring, "restore", lambda *runs: asked.append(runs) or model)

    def segment_volume(model, volume, protocols, options):
        asked.append((protocols, options))
        raise RejectError("E_TEST", "nothing more is needed")

    monkeypatch.setattr(cohort, "segment_volume", segment_volume)
    out = f"--out={tmp_path / 'out'}"
    options = ["--run=second", "--flip", "--crops=3", "--posteriors=fsl_fast:GM,fsl_first:LeftCaudate"]
    assert main(["segment", str(heads / "a.nii.gz"), run, out, *options, "--consistent_tissue"]) == 1
    assert main(["segment", str(heads / "a.nii.gz"), run, f"{out}-fast", "--fast", "--protocols=fsl_fast"]) == 1
    assert asked == [
        (run.removeprefix("--run="), "second"),
        (
            ("fsl_fast", "fsl_first", "malp_em", "malp_em_tissue"),
            Options(True, 3, False, ("fsl_fast:GM", "fsl_first:LeftCaudate"), True),
        ),
        (run.removeprefix("--run="),),
        (("fsl_fast",), Options(fast=True)),
    ]


def test_A09_a_file_without_orientation_needs_an_option(run, heads, tmp_path, capsys):
    command = ["segment", str(heads / "d.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "sub-d (d.nii.gz): rejected, E_NO_XFORM" in said.err and "nothing was written" in said.out
    assert main([*command, "--assume_ras"]) == 0
    assert "W_LR_UNSAFE" in _summary(tmp_path / "out")[0]["warnings"]


def test_no_run_is_one_message(heads, tmp_path, capsys):
    assert main(["segment", str(heads / "a.nii.gz"), f"--run={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert "--run takes the --workdir of a training run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["segment", "x", "--run=y"], ["segment", "--run=x", "--out=y"], ["cut"], []])
def test_wrong_arguments_exit_2(arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2


def _commands() -> dict[str, argparse.ArgumentParser]:
    """Returns every help page by the arguments that show it."""
    parser = _parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {"": parser, **commands.choices}


@pytest.mark.parametrize("name", _commands())
def test_help_answers_at_once(name):
    code = "import sys; from neuronet_jax.cli import main; main(sys.argv[1:])"
    started = [time.perf_counter()]
    for _ in range(3):  # the best of three: the machine may have other work
        result = subprocess.run([sys.executable, "-c", code, *name.split(), "--help"], capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout.startswith(f"usage: neuronet {name}".rstrip())
        started.append(time.perf_counter())
    assert min(b - a for a, b in itertools.pairwise(started)) < 1


def test_asking_for_help_imports_nothing_heavy():
    code = (
        "import sys; before = set(sys.modules)\n"
        "from neuronet_jax.cli import main\n"
        "try: main(['segment', '--help'])\n"
        "except SystemExit: print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT
    )  # -S: no packages
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.splitlines()[-1].split())
    assert imported - {"neuronet_jax"} <= sys.stdlib_module_names


@pytest.mark.parametrize("name", _commands())
def test_examples_of_the_help_are_commands(name, capsys):
    parser = _commands()[name]
    text = parser.epilog or ""
    assert "examples:" in text
    lines = re.findall(r"^ +(?:.*')?(neuronet [^'\n]*)", text, re.MULTILINE)
    assert len(lines) >= (4 if name == "segment" else 1)
    for line in lines:
        line = line.replace("$SLURM_ARRAY_TASK_ID", "8").partition("   ")[0].partition(" > ")[0]
        if "COMMAND" in line:
            continue
        args = _parser().parse_args(shlex.split(line)[1:])  # exits with 2 if one is wrong
        assert args.command.__name__.lstrip("_") == shlex.split(line)[1].replace("-", "_")
        if name == "segment":
            Options(posteriors=args.posteriors)  # names that exist


def test_version(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"neuronet {neuronet_jax.__version__}\n"
