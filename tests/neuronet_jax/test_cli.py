import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from flax import nnx

from experiments.flags import load
from neuronet_jax import inference
from neuronet_jax.cli import main
from neuronet_jax.inference import Model


class Threshold(nnx.Module):
    """A network whose labels are known: 1 where a voxel lies above the mean, for two protocols."""

    def labels(self, image: jax.Array) -> jax.Array:
        bright = (image[..., 0] > 0).astype(jnp.uint8)
        return jnp.stack([bright, bright], axis=1)


@pytest.fixture
def run(monkeypatch, tmp_path) -> str:
    config = replace(load("tissue:demo"), protocols=("fsl_fast", "fsl_first"))
    model = Model(Threshold(), config, 2.0, {"config": "test"})
    monkeypatch.setattr(inference, "restore", lambda run: model)
    return f"--run={tmp_path}"


@pytest.fixture
def heads(tmp_path) -> Path:
    """Three heads of 2 mm: a is good, b is truncated, c is constant; and d without orientation."""
    rng = np.random.default_rng(0)
    for name in "abc":
        data = np.zeros((60, 70, 64), np.int16)
        data[10:50, 10:60, 10:54] = 7 if name == "c" else rng.integers(500, 900, (40, 50, 44))
        data = np.full_like(data, 5) if name == "c" else data
        nib.save(nib.Nifti1Image(data, np.diag([-2.0, 2, 2, 1])), tmp_path / f"{name}.nii.gz")
    whole = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    lost = nib.Nifti1Image(data * 0 + rng.integers(0, 900, data.shape, np.int16), np.diag([2.0, 2, 2, 1]))
    lost.set_sform(None, code=0)
    lost.set_qform(None, code=0)
    nib.save(lost, tmp_path / "d.nii.gz")
    return tmp_path


def _summary(out: Path) -> list[dict[str, str]]:
    with (out / "summary.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_F03_a_batch_goes_on_past_bad_files(run, heads, tmp_path, capsys):
    out = tmp_path / "out"
    inputs = [str(heads / f"{name}.nii.gz") for name in ("b", "a", "c", "missing")]
    assert main(["segment", *inputs, run, f"--out={out}"]) == 3
    rows = _summary(out)
    assert [(row["input"], row["status"], row["code"]) for row in rows] == [
        ("b.nii.gz", "rejected", "E_TRUNCATED"),
        ("a.nii.gz", "done", "n/a"),
        ("c.nii.gz", "rejected", "E_CONSTANT"),
        ("missing.nii.gz", "rejected", "E_IO"),
    ]
    assert "1 of 4 heads segmented" in capsys.readouterr().out
    written = sorted(path.name for path in (out / "sub-a" / "anat").iterdir())
    assert written == [
        "sub-a_seg-fslfast_dseg.json",
        "sub-a_seg-fslfast_dseg.nii.gz",
        "sub-a_seg-fslfirst_dseg.json",
        "sub-a_seg-fslfirst_dseg.nii.gz",
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


def test_F09_results_are_kept_unless_told(run, heads, tmp_path, capsys):
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main(command) == 0
    assert main(command) == 1
    assert "give --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_choice_of_protocols(run, heads, tmp_path, capsys):
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main([*command, "--protocols=fsl_first"]) == 0
    assert len(list((tmp_path / "out").rglob("*_dseg.nii.gz"))) == 1
    assert main([*command, "--protocols=malp_em"]) == 1
    assert "this run predicts fsl_fast, fsl_first, not 'malp_em'" in capsys.readouterr().err


def test_A09_a_file_without_orientation_needs_a_word(run, heads, tmp_path):
    command = ["segment", str(heads / "d.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main(command) == 3
    assert _summary(tmp_path / "out")[0]["code"] == "E_NO_XFORM"
    assert main([*command, "--assume_ras"]) == 0
    assert "W_LR_UNSAFE" in _summary(tmp_path / "out")[0]["warnings"]


def test_no_run_is_one_message(tmp_path, capsys):
    assert main(["segment", "a.nii.gz", f"--run={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1
    assert "--run takes the --workdir of a training run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["segment", "x", "--out=y"], ["segment", "--run=x", "--out=y"], ["cut"], []])
def test_wrong_arguments_exit_2(arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2


def test_help_answers_at_once_with_examples():
    code = (
        "import sys; from neuronet_jax.cli import main\n"
        "try: main(['segment', '--help'])\n"
        "finally: assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5  # 0.1 s on an idle machine; importing jax alone takes longer on a busy one
    assert "neuronet segment T1.nii.gz --run=runs/all_targets --out=labels" in result.stdout
