"""Running the programs: devices, threads, logs, BIDS Apps, completion, containers."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from neuronet_jax import runtime
from neuronet_jax.cli import main
from neuronet_jax.config import meanings
from neuronet_jax.results import cohort

ROOT = Path(__file__).resolve().parents[2]


def test_quiet_prints_problems_only_and_the_log_has_everything(run, heads, tmp_path, capsys):
    log = tmp_path / "log.txt"
    command = ["segment", str(heads / "a.nii.gz"), str(heads / "b.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main([*command, "--quiet", f"--log-file={log}", "--no-report"]) == 3
    printed = capsys.readouterr()
    assert printed.out == "" and "sub-b (b.nii.gz): rejected, E_TRUNCATED" in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    text = log.read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[1/2\] sub-a \(a.nii.gz\): done", text, re.MULTILINE)
    assert "rejected, E_TRUNCATED" in text and "1 of 2 scans segmented" in text
    assert main([*command, f"--log-file={tmp_path / 'missing' / 'log.txt'}"]) == 1
    assert "cannot write --log-file" in capsys.readouterr().err
    for handler in logging.getLogger(cohort.__name__).handlers[:]:
        cohort.LOG.removeHandler(handler)
        handler.close()


def test_threads_and_device_hold_for_the_process():
    code = (
        "from neuronet_jax import runtime; runtime.use({device!r}, 1)\n"
        "import jax.numpy as jnp; jnp.ones(9).sum().block_until_ready(); print(runtime.cores(), jnp.ones(1).device)"
    )
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": ""}

    def use(device: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code.format(device=device)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    found = use("cpu")
    assert found.stdout.split()[0] == "1" and "CPU" in found.stdout.upper(), found.stderr
    refused = use("tpu")
    assert refused.returncode == 1 and "--device=tpu: there is none" in refused.stderr


def test_a_number_of_threads_that_no_machine_has_is_refused(run, heads, tmp_path, capsys):
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main([*command, "--threads=100000"]) == 2
    assert "this process may use" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_long_head_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(cohort, "EVERY_S", 0.02)
    with cohort._within_heads(Console(stderr=True), is_wanted=True), runtime.TURNS.take():
        for share in (0.25, 0.5):
            runtime.TURNS.share = share
            time.sleep(0.2)
    text = capsys.readouterr().err
    assert text.count("25% of this head is done") == text.count("50% of this head is done") == 1


def test_the_share_of_a_head_rises_to_one(tiny_run, noisy_heads, tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(
        runtime.Turns, "share", property(lambda _: 0.0, lambda _, share: shares.append(share)), raising=False
    )
    out = tmp_path / "out"
    assert main(["segment", str(noisy_heads / "head0.nii.gz"), f"--run={tiny_run}", f"--out={out}", "--no-report"]) == 0
    assert len(shares) > 2 and shares == sorted(shares) and shares[-1] == 1.0


@pytest.fixture
def bids(heads, tmp_path) -> Path:
    folder = tmp_path / "bids"
    for name in ("sub-01/ses-1/anat/sub-01_ses-1", "sub-01/ses-2/anat/sub-01_ses-2", "sub-02/ses-1/anat/sub-02_ses-1"):
        path = folder / f"{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        shutil.copy(heads / "a.nii.gz", path)
    (folder / "dataset_description.json").write_text(json.dumps({"Name": "test", "BIDSVersion": "1.10.0"}))
    return folder


def test_a_bids_app_segments_whom_it_is_told_to(run, bids, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["bids", str(bids), str(out), "participant", run, "--no-report", "--protocols=fsl_fast"]
    assert main([*command, "--participant-label", "sub-01", "--session-label", "2"]) == 0
    assert [path.name for path in out.rglob("*fslfast_dseg.nii.gz")] == ["sub-01_ses-2_seg-fslfast_dseg.nii.gz"]
    assert main([*command, "--participant-label", "03"]) == 1
    assert "has no T1w image of sub-03" in capsys.readouterr().err
    (bids / "dataset_description.json").unlink()
    assert main([*command, "--participant-label", "02"]) == 1
    assert "or add --skip-bids-validation" in capsys.readouterr().err
    assert main([*command, "--participant-label", "02", "--skip-bids-validation"]) == 0
    assert len(list(out.rglob("*fslfast_dseg.nii.gz"))) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["bids", str(bids), str(out), "group", run])


def test_a_shell_completes_commands_and_options():
    script = subprocess.run(
        [sys.executable, "-m", "neuronet_jax", "completion", "bash"], capture_output=True, text=True, cwd=ROOT
    )
    ask = 'COMP_WORDS=({words} "{start}"); COMP_CWORD={at}; {function}; echo "${{COMPREPLY[@]}}"'
    function = re.search(r"complete .*-F (\S+) neuronet", script.stdout)
    assert script.returncode == 0 and function

    def complete(words: str, start: str) -> list[str]:
        typed = ask.format(words=words, start=start, at=len(words.split()), function=function[1] if function else "")
        found = subprocess.run(["bash", "-c", f"{script.stdout}\n{typed}"], capture_output=True, text=True)
        return found.stdout.split()

    assert complete("neuronet", "seg") == ["segment"]
    assert {"--posteriors", "--participant-label"} <= set(complete("neuronet bids", "--p"))


def test_help_of_training_lists_every_setting_with_its_meaning():
    fields = set(meanings())
    assert all(meanings().values()), [name for name, meaning in meanings().items() if not meaning]
    code = "import sys; from experiments.train import main; main(['--help'])"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout
    assert all(f"--config.{name}=" in text for name in fields - {"name"}) and len(fields) > 40
    assert "--config.optimizer.spike_factor=10.0\n      updates whose gradient norm exceeds" in text
    assert {"data.store", "loss.class_balance"} <= fields


def test_the_containers_install_what_is_here():
    docker, apptainer = (ROOT / "Dockerfile").read_text(), (ROOT / "neuronet.def").read_text()
    bases = re.findall(r"^FROM (\S+)$", docker, re.MULTILINE) + re.findall(r"^From: (\S+)$", apptainer, re.MULTILINE)
    assert len(bases) == 2 and len(set(bases)) == 1
    steps = [
        re.findall("python -m pip install .*", text.replace("${EXTRA}", "{{ EXTRA }}")) for text in (docker, apptainer)
    ]
    assert steps[0] == steps[1] and "--constraint /opt/neuronet/constraints.txt" in steps[0][0]
    assert 'ENTRYPOINT ["neuronet"]' in docker and 'exec neuronet "$@"' in apptainer
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "runs", "stores"} <= set(ignored)
