"""slurm.sh with stand-ins of srun and scontrol; test_slurm.py runs it under a real Slurm."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S

SCRIPT = Path(__file__).resolve().parents[3] / "experiments/launch/slurm.sh"

# A training that says what it was given, and ends as the variables tell: by itself, or when it gets USR1.
SRUN = """\
#!/bin/bash
[ -z "$ON_USR1" ] || trap "$ON_USR1" USR1
printf '%s\\n' "$@" >given
[ -z "$STATUS" ] || exit "$STATUS"
while :; do sleep 0.02; done
"""


def run(folder: Path, warned: bool = False, **variables: str) -> tuple[int, list[str], bool]:
    """The status of the script, the words after srun, and whether the job went back into the queue."""
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\necho "$@" >requeued\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "ON_USR1": "",
        "STATUS": "",
    }
    with subprocess.Popen(
        ["bash", str(SCRIPT), "--config=tissue", "--workdir=a folder"],
        cwd=folder,
        env=environment | variables,
        start_new_session=True,
    ) as script:
        try:
            for _ in range(500):
                if (folder / "given").exists():
                    break
                time.sleep(0.02)
            if warned:
                script.send_signal(signal.SIGUSR1)
            status = script.wait(PATIENCE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)  # and a training that nobody has stopped
    requeued = folder / "requeued"
    return (
        status,
        (folder / "given").read_text().splitlines(),
        requeued.exists() and requeued.read_text() == "requeue 7\n",
    )


@pytest.mark.parametrize("status", [0, 1, 4])
def test_a_training_that_ends_by_itself_ends_the_job_with_its_status(tmp_path: Path, status: int) -> None:
    ended, given, requeued = run(tmp_path, STATUS=str(status))
    assert (ended, requeued) == (status, False)
    assert given[1:] == [
        "python",
        "-m",
        "experiments.train",
        "--config=tissue",
        "--workdir=a folder",
        "--resume",
        "--begin",
    ]


@pytest.mark.parametrize(
    ("on_usr1", "status", "requeued"),
    [
        ("exit 0", 0, True),  # saved
        ("sleep 0.3; exit 0", 0, True),  # takes its time
        ("", 138, True),  # had not begun to listen: the signal ended it
        ("exit 4", 4, False),  # failed meanwhile
    ],
)
def test_a_warned_job_goes_back_into_the_queue_when_the_training_has_saved(
    tmp_path: Path, on_usr1: str, status: int, requeued: bool
) -> None:
    assert run(tmp_path, warned=True, ON_USR1=on_usr1)[::2] == (status, requeued)
