"""Starts several processes that make one run, for tests of what they do together."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# XLA's older code for fused loops takes two thirds of the time to compile. `make test` asks for what is quick, and
# `make soak` does not. Versions after 0.10 have no older code.
QUICK_XLA_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false"
    if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") and version("jaxlib").startswith("0.10.")
    else ""
)
_RANDOM = random.SystemRandom()  # different in every process
PATIENCE_S = 600  # with a process that ought to end: a slow machine is no failure, a hang is


def free_port() -> int:
    """Returns a port as `free_ports` does."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Returns different ports of this machine on which nothing listens, and which no connection takes before the caller
    does: systems give connections ports from 32768 on (Linux) or 49152 on.
    """
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(ports) < count:
            probe, port = stack.enter_context(socket.socket()), _RANDOM.randrange(16_384, 32_768)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                ports.append(port)
    return ports


def run_two(program: str, *arguments: str, environment: Mapping[str, str]) -> tuple[list[str], list[int]]:
    """Runs the program twice at once, with its number, a port to meet at, and the arguments.

    Returns what each of the two printed, errors included, and their exit statuses.
    """
    port = str(free_port())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), port, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return outputs, [process.returncode for process in both]
