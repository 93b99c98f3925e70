"""Reports of a training run: metrics.jsonl, TensorBoard, a progress bar (plain lines without a terminal), and sinks.

None of them can stop the training: a sink that fails is reported once, and the run continues without it. Only numbers
and pictures are written, under fixed names: no subject, no path.
"""

import collections
import datetime
import functools
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from neuronet_jax.runs.directory import METRICS, TENSORBOARD, RunDirectory
from neuronet_jax.training.sinks import Sink, open_sink

SHOWN = ("loss", "dice")  # metrics shown beside the progress bar
UPLOAD_S = 60.0  # interval between copies to a bucket

log = logging.getLogger(__name__)


class Monitor:
    """Writer of a run's metrics below `run_dir` (a folder, gs:// or s3://), active in process 0 only.

    In the other processes every method does nothing. A bucket gets a copy every minute and at the end. Lines of an
    earlier run after `resume_step` (0: a fresh run) are dropped, because those steps are run again.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        total_steps: int,
        resume_step: int = 0,
        process_index: int = 0,
        sinks: Sequence[str] = (),
    ):
        self._active = process_index == 0
        self._total_steps = total_steps
        self._failed: set[str] = set()
        self._shown: dict[str, float] = {}
        self._ticks = collections.deque([(resume_step, time.monotonic())], maxlen=10)  # a rate over ten reports
        self._events: EventsWriter | None = None
        self._progress: Progress | None = None
        self._sinks: dict[str, Sink] = {}
        if not self._active:
            return
        self._run = RunDirectory(run_dir)
        self._bucket = self._run.files if "://" in self._run.path else None
        self._folder = Path(tempfile.mkdtemp(prefix="neuronet-") if self._bucket else self._run.path)
        self._uploaded = time.monotonic() if self._bucket else 0.0
        self._try(METRICS, lambda: self._keep_until(resume_step))
        self._try("TensorBoard", lambda: self._open_events(self._folder / TENSORBOARD, resume_step))
        for name in sinks:
            self._try(name, functools.partial(self._open_sink, name))
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=console)
            self._progress.add_task("", total=total_steps, completed=resume_step)
            self._progress.start()
        self._console = console

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers (or arrays of one element) by name. A non-finite value becomes null in metrics.jsonl."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **{k: _finite(v) for k, v in numbers.items()}})
        self._try(METRICS, lambda: self._append(line))
        self._write_events(step, [summary.scalar(name, value) for name, value in numbers.items()])
        for name, sink in self._sinks.items():
            self._try(name, functools.partial(sink.log, step, {k: v for k, v in numbers.items() if math.isfinite(v)}))
        self._shown |= {name: numbers[name] for name in SHOWN if name in numbers}
        self._ticks.append((step, time.monotonic()))
        self._upload(after_s=UPLOAD_S)
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, description=self._status())
        else:
            self._console.print(f"step {step}/{self._total_steps}  {self._status()}", highlight=False)

    def pictures(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        """Writes RGB pictures by name to TensorBoard."""
        if self._active:
            self._try("TensorBoard", lambda: self._write_pictures(step, images))

    def close(self) -> None:
        """Ends the progress bar and closes the files."""
        if self._progress:
            self._progress.stop()
        if self._events:
            self._try("TensorBoard", self._events.close)
        for name, sink in self._sinks.items():
            self._try(name, sink.close)
        if self._active and self._bucket:
            self._upload(after_s=0)
            shutil.rmtree(self._folder)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open_sink(self, name: str) -> None:
        self._sinks[name] = open_sink(name, str(self._folder))

    def _status(self) -> str:
        """Returns a line such as `loss 0.512  dice 0.431  2.3 steps/s  1:02:03 left`."""
        parts = [f"{name} {value:.3f}" for name, value in self._shown.items()]
        (first, then), (last, now) = self._ticks[0], self._ticks[-1]
        if last > first and now > then:
            rate = (last - first) / (now - then)
            left = datetime.timedelta(seconds=round((self._total_steps - last) / rate))
            parts += [f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step", f"{left} left"]
        return "  ".join(parts)

    def _keep_until(self, step: int) -> None:
        """Starts metrics.jsonl with the earlier run's lines up to `step`, without broken ones."""
        lines = self._run.metrics()
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f"{METRICS}.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
        temporary.replace(self._folder / METRICS)

    def _append(self, line: str) -> None:
        with (self._folder / METRICS).open("a") as stream:
            stream.write(line + "\n")

    def _upload(self, after_s: float) -> None:
        """Copies the files to the bucket if the last copy is `after_s` old. Objects are only ever written whole."""
        if self._bucket and time.monotonic() - self._uploaded >= after_s:
            self._uploaded = time.monotonic()
            for path in (path for path in self._folder.rglob("*") if path.is_file()):
                name, data = path.relative_to(self._folder).as_posix(), path.read_bytes()
                self._try(self._bucket.dest, functools.partial(self._bucket.write, name, data))

    def _open_events(self, folder: Path, resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Synchronous: tensorboardX's own queue blocks the training forever once a full disk has killed its thread.
        self._events = EventsWriter(str(folder / "events"))
        if resume_step:  # tells TensorBoard to hide later steps that it has read
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=start))

    def _write_events(self, step: int, summaries: list[Summary]) -> None:
        def write(events: EventsWriter) -> None:
            for entry in summaries:
                events.write_event(Event(step=step, wall_time=time.time(), summary=entry))
            events.flush()

        if events := self._events:
            self._try("TensorBoard", lambda: write(events))

    def _write_pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._write_events(step, [summary.image(name, image, dataformats="HWC") for name, image in images.items()])

    def _try(self, sink: str, write: Callable[[], object]) -> None:
        if sink in self._failed and sink in self._sinks:  # a service that failed would cost every report its time limit
            return
        try:
            write()
        except Exception as error:
            if sink not in self._failed:
                self._failed.add(sink)
                log.warning("%s cannot be written; training continues without it: %s", sink, error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
