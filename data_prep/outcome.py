"""The report of a build: counts by split and code, and a bar while it works. Nothing here names a subject."""

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from neuronet_jax.codes import explain
from neuronet_jax.errors import NeuronetError
from neuronet_jax.store.schema import Reject, Subject


class TooManyRejects(NeuronetError):
    """More subjects were rejected than the caller allows. The store stays unfinished; rejects.tsv is written."""

    def __init__(self, reason: str, codes: dict[str, int]):
        super().__init__(reason)
        self.codes = codes  # subjects per E_… code


@dataclass(frozen=True)
class BuildReport:
    """The outcome of a build. `rejects` names subjects, so it must stay out of logs."""

    subjects: dict[str, int]  # per split
    rejects: tuple[Reject, ...]
    warnings: dict[str, int]  # subjects per W_… code
    excluded: int
    seconds: float
    already: bool = False  # whether the store was finished, and sound as far as `repair` asked, so nothing was built
    repaired: int = 0  # damaged subjects that were built again

    @property
    def rejected(self) -> dict[str, int]:
        """Number of subjects per E_… code."""
        return dict(collections.Counter(reject.code for reject in self.rejects))


def report(
    subjects: Sequence[Subject], rejects: Sequence[Reject], excluded: int, seconds: float, **outcome: Any
) -> BuildReport:
    """Returns the report of the rows of a store."""
    splits = collections.Counter(subject.split for subject in subjects)
    warnings = collections.Counter(code for subject in subjects for code in subject.warnings)
    return BuildReport(dict(splits), tuple(rejects), dict(sorted(warnings.items())), excluded, seconds, **outcome)


def summary(report: BuildReport) -> str:
    """Returns the report in a few lines, without ids."""

    def counts(table: dict[str, int]) -> str:
        return ", ".join(f"{name} {n}" for name, n in table.items()) or "none"

    total = sum(report.subjects.values())
    took = "the store is finished already" if report.already else f"in {report.seconds:.1f} s"
    if report.repaired:
        took += f", {report.repaired} of them damaged and built again"
    lines = [
        f"{total} subjects ({counts(report.subjects)}) {took}",
        f"rejected: {counts(report.rejected)}; warnings: {counts(report.warnings)}; excluded: {report.excluded}",
    ]
    return "\n".join([*lines, *explained(report.rejected | report.warnings)])


def explained(codes: Iterable[str]) -> list[str]:
    """Returns a line for each code."""
    return [f"{code}: {explain(code)}" for code in codes]


class _Rate(ProgressColumn):
    def render(self, task: Any) -> str:
        return f"{task.speed:.2f} subjects/s" if task.speed else ""


class Bar:
    """A progress bar with rate and time left; `with` gives the function that advances it."""

    def __init__(self, shown: bool, total: int):
        columns = (TextColumn("building"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown, speed_estimate_period=120)
        self._task = self._bar.add_task("building", total=total)

    def __enter__(self):
        self._bar.start()
        return lambda count: self._bar.advance(self._task, count)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
