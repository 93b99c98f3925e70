"""Signals and stalls, in real processes."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from neuronet_jax.programs import STALLED
from neuronet_jax.training.signals import StopRequest, Watchdog
from tests.processes import PATIENCE_S, free_port

ROOT = Path(__file__).parents[3]

LOOP = """
import time
from neuronet_jax.training.signals import StopRequest
with StopRequest() as stop:
    for step in range(1, 1000):
        print("step", step, flush=True)
        {work}
        if stop.requested(step):
            print("saved", step, flush=True)
            break
"""


@contextlib.contextmanager
def _running(*command: str, **options) -> Iterator[subprocess.Popen]:
    """Starts a process of this program that ends with its test, however the test ends."""
    with subprocess.Popen(
        [sys.executable, "-c", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _until(stream: IO[str] | None, line: str) -> None:
    assert stream is not None
    for said in stream:
        if said.strip().startswith(line):
            return
    pytest.fail(f"the process ended without printing {line!r}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_D03_D04_signal_finishes_the_step_saves_and_exits_0(number):
    previous = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopRequest() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2)
        assert stop.requested(3)
    assert {n: signal.getsignal(n) for n in previous} == previous


def test_D04_second_interrupt_is_immediate():
    step = "[time.sleep(.01) for _ in range(6000)]"  # takes forever
    with _running(LOOP.format(work=step)) as process:
        _until(process.stdout, "step 1")
        process.send_signal(signal.SIGINT)
        _until(process.stderr, "SIGINT: saving after this step")  # two signals at once would be one
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGINT
    assert "saved" not in out


def test_D03_exit_code_of_a_real_process_is_0():
    with _running(LOOP.format(work="time.sleep(.05)")) as process:
        _until(process.stdout, "step 2")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert out.splitlines()[-1].startswith("saved")


TWO = """
import os, sys, time
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=300)
from neuronet_jax.training.signals import StopRequest
with StopRequest() as stop:
    for step in range(1, 400):
        if step == 3:
            print("running", flush=True)
        time.sleep(.02)
        if stop.requested(step):
            print("saved", step, flush=True)
            break
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_D03_signal_to_one_process_stops_all_at_the_same_step(number):
    environment = {**os.environ, "XLA_FLAGS": ""}
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(_running(TWO, str(rank), port, env=environment)) for rank in (0, 1)]
        for process in both:
            _until(process.stdout, "running")
        both[1].send_signal(number)
        said = [process.communicate(timeout=PATIENCE_S)[0].splitlines()[-1] for process in both]
    assert said[0] == said[1]
    assert said[0].startswith("saved")
    assert [process.returncode for process in both] == [0, 0]


STALL = """
import time
from neuronet_jax.training.signals import Watchdog
with Watchdog(timeout_s={timeout_s}) as watch:
    for step in range(20):
        time.sleep(.02)
        watch.progress()
    print("moving", flush=True)
    {work}
    print("done", flush=True)
"""


def test_C02_D07_a_stall_gives_a_warning_with_stacks_then_ends_the_process():
    with _running(STALL.format(timeout_s=0.5, work="time.sleep(60)")) as process:
        _until(process.stdout, "moving")
        begin = time.monotonic()
        out, error = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == STALLED
    assert 0.8 < time.monotonic() - begin < 10  # twice the timeout, and slack for a busy machine
    assert "no progress for 0.5 s; the run ends" in error
    assert error.count('File "<string>"') == 2  # the position of the main thread, at T and at 2 T
    assert "done" not in out


def test_D07_suspended_process_has_not_stalled():
    """A laptop's lid or a debugger suspends the process: its own ticks stop too, and it continues."""
    with _running(STALL.format(timeout_s=0.8, work="time.sleep(.2)")) as process:
        _until(process.stdout, "moving")
        process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "done" in out


def test_watchdog_of_a_moving_run_is_silent(caplog):
    with Watchdog(timeout_s=0.2) as watch:
        for _ in range(30):
            time.sleep(0.02)
            watch.progress()
    assert caplog.records == []
