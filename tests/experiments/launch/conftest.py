"""A Slurm of two nodes on this machine, for as long as the tests that need it run."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import free_ports

REPOSITORY = Path(__file__).resolve().parents[3]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
SYSTEM_PATH = "/usr/sbin:/sbin"  # where distributions put daemons, and users' PATH may lack
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve on every Linux, without a line in /etc/hosts

_SETTINGS = """\
ClusterName=neuronet
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for as long as a credential lives, 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A controller, two node daemons and their munge, all of the present user and below one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], SYSTEM_PATH])
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) and k != "XLA_FLAGS"}
        self.environment = own | {
            "PATH": path,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(REPOSITORY),
            # as on a user's machine: the programs of the run before
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        }

    def start(self) -> None:
        """Starts the daemons and returns when both nodes take jobs. Raises AssertionError after a minute."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        controller_port, *node_ports = free_ports(1 + len(NODES))
        nodes = []
        for name, port in zip(NODES, node_ports, strict=True):
            (self.folder / name).mkdir()
            nodes.append(
                f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs=2 RealMemory=4000 Gres=gpu:2"
            )
        settings = _SETTINGS.format(
            host=host,
            controller_port=controller_port,
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(settings)
        # Two files stand for the two GPUs of a node: Slurm hands out their numbers and does not open them.
        for number in range(2):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")),
            f"--socket={self.folder}/munge.socket",
        )
        _until(lambda: (self.folder / "munge.socket").exists(), "munged opens its socket", self.log, 30)
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        _until(self._idle, "both nodes take jobs", self.log, 60)

    def stop(self) -> None:
        """Ends the jobs, then the daemons, then whatever of them is still there."""
        with contextlib.suppress(subprocess.SubprocessError, AssertionError):
            self.run("scancel", "--full", "--user", getpass.getuser())
            _until(lambda: not self.run("squeue", "--noheader"), "all jobs end", self.log, 30)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for daemon in self._daemons:
            daemon.wait(10)

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Runs a command in the repository, as a user of the cluster would, and returns its output."""
        done = subprocess.run(
            command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Submits a job, which may wait in the queue, and returns its id."""
        return self.run("sbatch", "--parsable", *arguments).split(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """Returns the controller's description of a job, by its own names."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, timeout_s: float, *outputs: Path) -> str:
        """Returns the state in which all tasks of a job end: COMPLETED, FAILED, …"""

        def ended() -> bool:
            return not self.run("squeue", "--noheader", "--jobs", number)

        def said() -> str:
            return "\n".join(output.read_text() for output in outputs if output.exists()) + self.log()

        _until(ended, f"job {number} ends", said, timeout_s)
        lines = self.run("scontrol", "--oneliner", "show", "job", number).splitlines()
        states = {word.split("=")[1] for line in lines for word in line.split() if word.startswith("JobState=")}
        return ",".join(sorted(states))

    def log(self) -> str:
        """Returns the ends of all logs of the daemons."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs)

    def _daemon(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as out:
            program = shutil.which(name, path=self.environment["PATH"])
            assert program is not None
            daemon = subprocess.Popen([program, *arguments], env=self.environment, stdout=out, stderr=out)
        self._daemons.append(daemon)

    def _idle(self) -> bool:
        dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
        assert not dead, f"{dead}\n{self.log()}"
        with contextlib.suppress(AssertionError):
            states = self.run("sinfo", "--noheader", "--Node", "--format=%T").split()
            return states == ["idle"] * len(NODES)
        return False

    def _processes(self) -> list[int]:
        """Processes that carry this cluster's configuration in their environment: daemons, steps, what they started."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A running cluster of two nodes; skips where Slurm is not installed."""
    path = os.pathsep.join([os.environ["PATH"], SYSTEM_PATH])
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # the path of a socket has 107 characters at most
    cluster = Slurm(folder)
    previous = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 1))  # so that the daemons end too
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(folder, ignore_errors=True)


def _until(true, what: str, said, timeout_s: float) -> None:
    """Waits for a condition. Raises AssertionError with what the logs say when it takes too long."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}\n{said()}"
        time.sleep(0.5)
