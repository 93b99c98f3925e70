"""Messages of the programs on stderr, from processes of their own, so that no test intercepts them."""

import shutil
import subprocess
import sys
from pathlib import Path

from neuronet_jax.runs.calibration import Calibration, Line, save_calibration

ROOT = Path(__file__).resolve().parents[3]


def _said(*command: str) -> list[str]:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr.splitlines()


def test_warnings_and_log_messages_are_plain_lines():
    code = (
        "import logging, warnings\n"
        "logging.basicConfig()\n"  # importing absl does this too, with level and logger in front
        "from neuronet_jax import runtime; runtime.plain()\n"
        "warnings.warn('W_SOMETHING: a reason\\n  in two lines'); logging.getLogger('any').warning('take care')"
    )
    assert _said("-c", code) == ["warning: W_SOMETHING: a reason in two lines", "take care"]


def test_a_stale_calibration_is_one_line_with_its_code(tiny_run, noisy_heads, tmp_path):
    line = Line(1.0, (0.0,) * 4, None)
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    save_calibration(str(run), Calibration(5, 3, {"fsl_fast": line}, None))
    scan = str(noisy_heads / "head0.nii.gz")
    lines = _said("-m", "neuronet_jax", "segment", scan, f"--run={run}", f"--out={tmp_path / 'out'}")
    why = "the run's quality.json belongs to step 5, its weights to step 1"
    (warned,) = (text for text in lines if "arning" in text)
    assert warned.startswith(f"warning: W_UNCALIBRATED: {why}: ") and warned.endswith(f"--run={run} --calibrate`")
    for page in ("report.html", "sub-head0/anat/sub-head0_report.html"):
        assert why.replace("'", "&#39;") in (tmp_path / "out" / page).read_text()
