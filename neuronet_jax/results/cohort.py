"""Many heads: a shard's part of them, several at work at once, and what became of each."""

import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import nibabel as nib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.images import nifti
from neuronet_jax.inference import cost
from neuronet_jax.inference.segment import segment_volume
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.results.bids import Target
from neuronet_jax.results.resume import Records, identify
from neuronet_jax.results.tables import Row
from neuronet_jax.results.write import write_results
from neuronet_jax.runs.calibration import UNKNOWN, Calibration
from neuronet_jax.runs.model import Model

Item = TypeVar("Item")
Result = TypeVar("Result")
_PLAIN: dict[str, Any] = {
    "markup": False,
    "highlight": False,
    "soft_wrap": True,
}  # names of files are not rich's markup


def shard(targets: Sequence[Target], index: int, count: int) -> list[Target]:
    """The `index`th of `count` parts, from 1. Together the parts are everything, no two overlap, sizes differ by one.

    By the sorted names of the results, so every machine of a job array cuts the same heads alike.
    """
    return sorted(targets, key=lambda target: target.stem)[index - 1 :: count]


@dataclass
class Cohort:
    """How each head is segmented: by which model, with which options, of which files, and where this is recorded."""

    model: Model
    protocols: Sequence[str]
    options: Options
    limits: nifti.Limits
    records: Records
    calibration: Calibration = UNKNOWN  # of the run, for predicted Dice
    report: bool = True  # a page for each head
    elapsed_s: float = field(default=0.0, init=False)  # of the last `run`, and how long its network was at work
    network_s: float = field(default=0.0, init=False)

    def segment(self, target: Target) -> Row:
        """Reads one head, segments it and writes its results. Raises RejectError for a file that cannot be used."""
        volume = nifti.read_image(target.source, self.limits)
        source = identify(target.source)
        result = segment_volume(self.model, volume, self.protocols, self.options)
        self.records.begin(target, source)
        row = write_results(target, volume, result, True, self.records.provenance, self.calibration, self.report)
        self.records.complete(target, row)
        return row

    def run(self, targets: Sequence[Target], console: Console) -> Iterator[Row]:
        """What became of each head, in order, as soon as it is known; progress and problems go to the console.

        Whatever is wrong with one head, the others go on. Raises NeuronetError where results cannot be written.
        """
        if expected := self._expected(targets):
            console.print(expected, **_PLAIN)
        columns = (
            TextColumn("segmenting"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        start, network_start_s = time.perf_counter(), runtime.TURNS.taken_s
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=len(targets))
            for number, (target, future) in enumerate(in_order(self.segment, targets, _workers()), 1):
                row = _row(target, future, console)
                self.elapsed_s = time.perf_counter() - start
                self.network_s = runtime.TURNS.taken_s - network_start_s
                progress.advance(bar)
                left_s = self.elapsed_s / number * (len(targets) - number)
                left = f"; about {duration(left_s)} left" if number < len(targets) else ""
                _report(row, console, f"[{number}/{len(targets)}]", left)
                yield row

    def timing(self, heads: int) -> str:
        """How long the last `run` took, and which part of that the network was at work."""
        share = f"the network was at work {self.network_s / self.elapsed_s:.0%} of the time"
        each = f"{heads} heads in {duration(self.elapsed_s)}, " if heads > 1 else "one head: "
        return f"{each}{duration(self.elapsed_s / heads)}{' each' if heads > 1 else ''}; {share}"

    def _expected(self, targets: Sequence[Target]) -> str:
        """How long the first head will take, by its header; nothing where that cannot be read, or hardly counts."""
        passes = len(self.model.members) * self.options.passes
        try:
            header: Any = nib.load(targets[0].source).header  # type: ignore[attr-defined]
            shape, spacing_mm = header.get_data_shape()[:3], header.get_zooms()[:3]
            expected = cost.expected_s(shape, spacing_mm, self.model.voxel_size_mm, passes)
        except Exception:  # reading the head will say what is wrong with it
            return ""
        if expected is None:
            return ""
        least, most = (duration(seconds) for seconds in expected)
        return f"a head like the first takes about {least} to {most}, the first of its shape longer, to compile"


def _row(target: Target, future: "Future[Row]", console: Console) -> Row:
    """What became of a head."""
    error = future.exception()
    if error is None:
        return future.result()
    if not isinstance(error, Exception) or (isinstance(error, NeuronetError) and not isinstance(error, RejectError)):
        raise error  # nothing can be written, or the program is to end
    if not isinstance(error, RejectError):  # none of the known faults: the next head may still go well
        console.print("".join(traceback.format_exception(error)), **_PLAIN)
        error = RejectError("E_INTERNAL", f"{type(error).__name__}: {error}; please report it")
    return Row(target.source.name, target.stem, "rejected", error.code, error.reason)


def _report(row: Row, console: Console, number: str, left: str) -> None:
    """A line for each head; beside a progress bar only for those with something to say."""
    if row.status == "rejected":
        text = f"{row.output} ({row.input}): rejected, {row.code}: {row.reason}"
    else:
        warned = f", with {row.warnings.replace(',', ', ')}" if row.warnings != "n/a" else ""
        text = f"{row.output} ({row.input}): done{warned}"
    if not console.is_terminal:
        console.print(f"{number} {text}{left}", **_PLAIN)
    elif row.status == "rejected" or row.warnings != "n/a":
        console.print(text, style="red" if row.status == "rejected" else "yellow", **_PLAIN)


def _workers() -> int:
    """Heads at work at a time, each holding its volumes in memory; on the device they take turns."""
    if jax.default_backend() == "cpu":
        return 2  # one is read or written while the network has the other; more would share the same cores
    return min(6, runtime.cores())  # what a head needs besides the network takes several times as long


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> "Generator[tuple[Item, Future[Result]], None, None]":
    """Each item with its finished future, in order. `workers` are at work at a time, as many again may be finished."""
    pool = ThreadPoolExecutor(workers)
    begun: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            begun.append((item, pool.submit(function, item)))
            if len(begun) == 2 * workers:
                yield _wait(*begun.popleft())
        while begun:
            yield _wait(*begun.popleft())
    finally:  # also where the caller stops: what has not begun never does
        pool.shutdown(wait=False, cancel_futures=True)


def _wait(item: Item, future: "Future[Result]") -> "tuple[Item, Future[Result]]":
    future.exception()
    return item, future


def duration(seconds: float) -> str:
    """For people: 6.4 s, 42 s, 2 min 3 s, 1 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
