"""Segments many scans: a shard of them, several at a time, with the outcome of each."""

import contextlib
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.images import intensity, nifti
from neuronet_jax.images.headers import Limits
from neuronet_jax.inference import cost
from neuronet_jax.inference.segment import segment_volume
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.programs import shown
from neuronet_jax.results.bids import Target
from neuronet_jax.results.dataset import Dataset
from neuronet_jax.results.resume import Records, identify
from neuronet_jax.results.tables import Row, file_cell
from neuronet_jax.results.write import write_results
from neuronet_jax.runs.calibration import UNKNOWN, Calibration
from neuronet_jax.runs.model import Model

LOG = logging.getLogger(__name__)  # of `--log-file`
EVERY_S = 60.0  # between two lines about one head
Item = TypeVar("Item")
Output = TypeVar("Output")
_PLAIN: dict[str, Any] = {
    "markup": False,
    "highlight": False,
    "soft_wrap": True,
}  # file names must not be read as rich's markup


def shard(targets: Sequence[Target], index: int, count: int) -> list[Target]:
    """Returns the `index`th of `count` parts, counted from 1. The parts cover everything, are disjoint and differ by
    one.

    The split goes by the sorted names of the results, so that every machine of a job array makes the same one.
    """
    return sorted(targets, key=lambda target: target.stem)[index - 1 :: count]


@dataclass
class Cohort:
    """The model, options and records with which each scan is segmented, and the dataset that gets the results."""

    model: Model
    dataset: Dataset
    options: Options
    limits: Limits
    records: Records
    calibration: Calibration = UNKNOWN  # of the run, for predicted Dice
    report: bool = True  # write a page for each scan
    command: str = ""  # the options of the command, for the pages
    elapsed_s: float = field(default=0.0, init=False)  # duration of the last `run`
    network_s: float = field(default=0.0, init=False)  # the part of it in which the network was busy

    def segment(self, target: Target) -> Row:
        """Reads one scan, segments it and writes its results. Raises RejectError for a file that cannot be used."""
        volume = nifti.read_image(target.source, self.limits)
        intensity.refuse_label_map(volume.data)
        source = identify(target.source)
        result = segment_volume(self.model, volume, self.dataset.protocols, self.options)
        self.dataset.begin()
        self.records.begin(target, source)
        row = write_results(
            target,
            volume,
            result,
            True,
            self.records.provenance,
            self.calibration,
            self.report,
            self.command,
            self.records.also,
        )
        self.records.complete(target, row)
        return row

    def run(self, targets: Sequence[Target], console: Console) -> Iterator[Row]:
        """Yields the outcome of each scan, in order, as soon as it is known. Progress and problems go to the console.

        A fault of one scan does not stop the others. Raises NeuronetError if results cannot be written.
        """
        if expected := self._expected(targets):
            say(expected, console)
        columns = (
            TextColumn("segmenting"),
            BarColumn(),
            MofNCompleteColumn(),
            _WithinHead(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        start, network_start_s = time.perf_counter(), runtime.TURNS.taken_s
        silent = console.quiet or not console.is_terminal
        with (
            _within_heads(console, not console.is_terminal),
            Progress(*columns, console=console, disable=silent) as progress,
        ):
            bar = progress.add_task("", total=len(targets))
            for number, (target, future) in enumerate(in_order(self.segment, targets, _workers()), 1):
                row = _row(target, future, console)
                self.elapsed_s = time.perf_counter() - start
                self.network_s = runtime.TURNS.taken_s - network_start_s
                progress.advance(bar)
                left_s = self.elapsed_s / number * (len(targets) - number)
                left = f"; about {duration(left_s)} left" if number < len(targets) else ""
                report(row, console, f"[{number}/{len(targets)}] ", left)
                yield row

    def timing(self, scans: int) -> str:
        """Describes how long the last `run` took, and in which share of that time the network was busy."""
        share = f"the network was busy {self.network_s / self.elapsed_s:.0%} of the time"
        each = f"{scans} scans in {duration(self.elapsed_s)}, " if scans > 1 else "one scan: "
        return f"{each}{duration(self.elapsed_s / scans)}{' each' if scans > 1 else ''}; {share}"

    def _expected(self, targets: Sequence[Target]) -> str:
        """Estimates how long the first scan will take, from its header. Returns "" if that is unknown or negligible."""
        passes = len(self.model.members) * self.options.passes
        try:
            shape, spacing_mm = nifti.read_grid(targets[0].source, self.limits)
            expected = cost.expected_s(shape, spacing_mm.tolist(), self.model.voxel_size_mm, passes)
        except Exception:  # reading the scan will report the fault
            return ""
        if expected is None:
            return ""
        least, most = (duration(seconds) for seconds in expected)
        return f"a scan like the first takes about {least} to {most}, plus compilation once per shape"


def _row(target: Target, future: "Future[Row]", console: Console) -> Row:
    """Returns the outcome of a scan."""
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, Exception) or (isinstance(error, NeuronetError) and not isinstance(error, RejectError)):
        raise error  # nothing can be written, or the program must end
    if not isinstance(error, RejectError):  # an unforeseen fault: the next scan may still succeed
        console.print(shown("".join(traceback.format_exception(error))), **_PLAIN)
        error = RejectError("E_INTERNAL", f"{type(error).__name__}: {str(error).rstrip('.')}; please report it")
    return Row(file_cell(target.source.name), target.stem, "rejected", error.code, shown(error.reason))


def report(row: Row, console: Console, number: str = "", left: str = "") -> None:
    """Prints a line for each scan, or only for scans with problems if there is a progress bar.

    A quiet console prints rejections only.
    """
    if row.status == "rejected":
        text = f"{row.output} ({row.input}): rejected, {row.code}: {row.reason}"
    else:
        warned = f", with {row.warnings.replace(',', ', ')}" if row.warnings != "n/a" else ""
        text = f"{row.output} ({row.input}): done{warned}"
    LOG.info("%s%s", number, text)
    if row.status == "rejected" and console.quiet:
        Console(file=console.file, stderr=console.stderr).print(text, **_PLAIN)
    elif not console.is_terminal:
        console.print(f"{number}{text}{left}", **_PLAIN)
    elif row.status == "rejected" or row.warnings != "n/a":
        console.print(text, style="red" if row.status == "rejected" else "yellow", **_PLAIN)


def say(text: str, console: Console) -> None:
    """Prints a line, unless the console is quiet, and logs it."""
    LOG.info(text)
    console.print(text, **_PLAIN)


class _WithinHead(ProgressColumn):
    """The share that is done of the head that is at the network."""

    def render(self, task: Task) -> Text:
        return Text("" if task.finished else f"this one {runtime.TURNS.share:3.0%}")


@contextlib.contextmanager
def _within_heads(console: Console, is_wanted: bool) -> Iterator[None]:
    """Says within the block, from time to time, how much of a long head is done."""
    done = threading.Event()

    def watch() -> None:
        before = 0.0
        while not done.wait(EVERY_S):
            if (share := runtime.TURNS.share) not in (before, 0.0, 1.0):
                say(f"{share:.0%} of this head is done", console)
            before = share

    thread = threading.Thread(target=watch, daemon=True)
    if is_wanted:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if is_wanted:
            thread.join()


def _workers() -> int:
    """Returns how many scans are processed at a time. Each holds its volumes in memory; the device serves one."""
    if runtime.on_cpu():
        return 2  # one is read or written while the network segments the other; more would compete for the cores
    return min(6, runtime.cores())  # reading and writing take several times as long as the network


def in_order(
    function: Callable[[Item], Output], items: Iterable[Item], workers: int
) -> "Generator[tuple[Item, Future[Output]], None, None]":
    """Yields each item with its finished future, in order. Up to `workers` run at a time; as many more may wait
    finished.
    """
    pool = ThreadPoolExecutor(workers)
    begun: deque[tuple[Item, Future[Output]]] = deque()
    try:
        for item in items:
            begun.append((item, pool.submit(function, item)))
            if len(begun) == 2 * workers:
                yield _wait(*begun.popleft())
        while begun:
            yield _wait(*begun.popleft())
    finally:  # if the caller stops, items that have not begun are dropped
        pool.shutdown(wait=False, cancel_futures=True)


def _wait(item: Item, future: "Future[Output]") -> "tuple[Item, Future[Output]]":
    future.exception()
    return item, future


def duration(seconds: float) -> str:
    """Formats a duration for people: 6.4 s, 42 s, 2 min 3 s, 1 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
