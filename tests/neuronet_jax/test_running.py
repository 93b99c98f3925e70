"""Running the programs: devices, threads, logs, BIDS Apps, completion, containers."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neuronet_jax import runtime
from neuronet_jax.cli import completion, main
from neuronet_jax.config import meanings
from neuronet_jax.results import cohort

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log(tmp_path) -> Iterator[Path]:
    """Returns the file that commands of this process append to, which the program would close at its end."""
    yield tmp_path / "log.txt"
    for handler in cohort.LOG.handlers[:]:
        cohort.LOG.removeHandler(handler)
        handler.close()


def test_quiet_prints_problems_only_and_the_log_has_everything(run, heads, log, tmp_path, capsys):
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


def test_threads_and_device_hold_for_the_command(tiny_run, noisy_heads, tmp_path):
    """Started without settings of JAX, as users do: with a device that is not there, and with one core of the CPU."""
    environment = {name: text for name, text in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    log, out = tmp_path / "log.txt", tmp_path / "out"

    def segment(*options: str) -> subprocess.CompletedProcess[str]:
        common = [f"--run={tiny_run}", f"--out={out}", "--no-report", "--protocols=fsl_fast", *options]
        command = [sys.executable, "-m", "neuronet_jax", "segment", str(noisy_heads / "head0.nii.gz"), *common]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    refused = segment("--device=tpu")
    assert refused.returncode == 2 and not out.exists(), refused.stderr
    assert re.search(
        r"^neuronet: error: --device=tpu: there is none \(.+\); leave --device out", refused.stderr, re.MULTILINE
    )
    assert "Traceback" not in refused.stderr
    done = segment("--device=cpu", "--threads=1", f"--log-file={log}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "running on 1 CPU core" and " running on 1 CPU core\n" in log.read_text()
    assert list(out.rglob("*_dseg.nii.gz"))


def test_a_number_of_threads_that_no_machine_has_is_refused(run, heads, tmp_path, capsys):
    command = ["segment", str(heads / "a.nii.gz"), run, f"--out={tmp_path / 'out'}"]
    assert main([*command, "--threads=100000"]) == 2
    assert "this process may use" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_long_head_tells_how_far_it_is(run, heads, log, tmp_path, monkeypatch, capsys):
    """The log has the same lines, and --quiet prints none."""
    monkeypatch.setattr(cohort, "EVERY_S", 0.01)
    segment_volume = cohort.segment_volume

    def slow(*given: Any) -> Any:
        with runtime.TURNS.take():
            for share in (0.13, 0.57):  # unlike those of the network itself
                runtime.TURNS.share = share
                time.sleep(0.1)
        return segment_volume(*given)

    monkeypatch.setattr(cohort, "segment_volume", slow)
    command = ["segment", str(heads / "a.nii.gz"), run, "--no-report"]
    assert main([*command, f"--out={tmp_path / 'out'}", f"--log-file={log}"]) == 0
    for text in (capsys.readouterr().err, log.read_text()):
        assert text.count("13% of this head is done") == text.count("57% of this head is done") == 1
    assert main([*command, f"--out={tmp_path / 'quiet'}", "--quiet"]) == 0
    assert "of this head" not in capsys.readouterr().err


def test_the_share_of_a_head_rises_to_one(tiny_run, noisy_heads, tmp_path, monkeypatch):
    shares = []
    monkeypatch.setattr(
        runtime.Turns, "share", property(lambda _: 0.0, lambda _, share: shares.append(share)), raising=False
    )
    out = tmp_path / "out"
    assert main(["segment", str(noisy_heads / "head0.nii.gz"), f"--run={tiny_run}", f"--out={out}", "--no-report"]) == 0
    assert len(shares) > 2 and shares == sorted(shares) and shares[-1] == 1.0


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, Path]:
    """Returns what `neuronet completion` prints for each shell that is here, as a file in a folder with a scan."""
    folder, found = tmp_path_factory.mktemp("completion"), {}
    (folder / "scan of mine.nii.gz").touch()
    (folder / "labels").mkdir()
    for shell in filter(shutil.which, completion.SHELLS):
        command = [sys.executable, "-m", "neuronet_jax", "completion", shell]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        found[shell] = folder / f"neuronet.{shell}"
        found[shell].write_text(result.stdout)
    return found


def _in_bash(script: Path, typed: str) -> list[str]:
    """Returns what bash offers after `typed`, whose last word is not finished."""
    *words, start = typed.split(" ")
    function = re.search(r"complete .*-F (\S+) neuronet", script.read_text())
    assert function
    ask = f'COMP_WORDS=({" ".join(words)} "{start}"); COMP_CWORD={len(words)}; {function[1]}'
    command = f"source {script.name}; {ask}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=script.parent)
    return found.stdout.splitlines()


def _in_fish(script: Path, typed: str) -> list[str]:
    command = f"source {script.name}; complete -C '{typed}'"
    environment = {**os.environ, "HOME": str(script.parent)}
    found = subprocess.run(["fish", "-c", command], capture_output=True, text=True, cwd=script.parent, env=environment)
    assert found.returncode == 0, found.stderr
    return [line.partition("\t")[0].rstrip("/") for line in found.stdout.splitlines()]


@pytest.mark.parametrize(("shell", "complete"), [("bash", _in_bash), ("fish", _in_fish)])
def test_a_shell_completes_commands_options_values_and_files(scripts, shell, complete):
    if shutil.which(shell) is None:
        pytest.skip(f"needs the shell {shell}, which is not on this machine")
    script = scripts[shell]
    assert complete(script, "neuronet seg") == ["segment"]
    assert {"--posteriors", "--participant-label"} <= set(complete(script, "neuronet bids --p"))
    assert "--participant-label" not in complete(script, "neuronet segment --p")
    assert sorted(complete(script, "neuronet segment --device ")) == ["cpu", "gpu", "tpu"]
    assert set(completion.SHELLS) <= set(complete(script, "neuronet completion "))
    # a shell that has the script completes no files by itself
    assert complete(script, "neuronet segment sc") == ["scan of mine.nii.gz"]
    assert complete(script, "neuronet segment a.nii.gz --out ") == ["labels"]  # folders only
    assert complete(script, "neuronet view lab") == ["labels"]
    assert complete(script, "neuronet view labels sc") == ["scan of mine.nii.gz"]
    assert complete(script, "neuronet bids lab") == ["labels"]


def test_zsh_takes_the_script_and_completes_with_it(scripts):
    if shutil.which("zsh") is None:
        pytest.skip("needs the shell zsh, which is not on this machine")
    code = 'autoload -U compinit; compinit -u -D; eval "$(cat neuronet.zsh)"; print $_comps[neuronet]'
    found = subprocess.run(["zsh", "-fc", code], capture_output=True, text=True, cwd=scripts["zsh"].parent)
    assert found.stdout == "_shtab_neuronet\n" and found.stderr == ""


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
