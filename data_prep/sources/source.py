"""One visit of a participant: which files it has, and what makes a list of visits a cohort."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_prep.sources import zips
from data_prep.sources.files import Input
from data_prep.sources.zips import Member
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.spreadsheets import Faults
from neuronet_jax.store.schema import SPLITS, is_id


@dataclass(frozen=True)
class Source:
    """One visit's input: the image and the available label maps, by protocol."""

    id: str  # of the participant
    t1: Input
    labels: Mapping[str, Input]  # a map that is a member of an archive may turn out to be absent there
    split: str = ""  # train, validation or test; empty until assigned
    visit: str = ""  # letters and digits; empty where there is one visit only
    problem: tuple[str, str] | None = None  # code and reason, if the visit is refused before its files are read
    row: int = dataclasses.field(default=0, compare=False)  # in the table that lists it; 0 without a table

    @property
    def files(self) -> dict[str, Input]:
        """The input files by the names of a manifest's columns."""
        return {"t1": self.t1, **self.labels}


def locate(source: Source) -> Source:
    """Returns the source without the label maps that its archive lacks.

    Raises RejectError for a visit that was refused already, for a damaged archive (E_ZIP) and for one without the
    image (E_ZIP_MEMBER), and E_IO if it cannot be read.
    """
    if source.problem:
        raise RejectError(*source.problem)
    if not isinstance(source.t1, Member):
        return source
    try:
        there = zips.names(source.t1.archive)
    except OSError as error:
        raise RejectError("E_IO", f"the archive cannot be read: {error.strerror}") from error
    if source.t1.path not in there:
        alike = sorted({name for name in there if PurePosixPath(name).name == source.t1.name})[:3]
        said = f"it has {', '.join(alike)}" if alike and not any(source.id in name for name in alike) else "it has none"
        fix = "UK Biobank judged the scan unusable" if "unusable" in said else "download the archive again"
        raise RejectError("E_ZIP_MEMBER", f"the archive lacks {source.t1.path}, {said}; {fix}")
    maps = {name: file for name, file in source.labels.items() if not isinstance(file, Member) or file.path in there}
    return dataclasses.replace(source, labels=maps)


def check(sources: Sequence[Source], faults: Faults | None = None) -> None:
    """Raises NeuronetError, with all `faults` so far and: E_ID, E_SPLIT, E_DUPLICATE for a visit listed twice, E_LEAK
    for a participant in two splits. Messages name rows, never participants.
    """
    faults = Faults() if faults is None else faults
    if not sources:
        raise NeuronetError("the cohort has no subject")
    participants: dict[str, int] = {}
    visits: dict[tuple[str, str], int] = {}
    spellings: dict[str, int] = {}
    rows = [source.row or position for position, source in enumerate(sources, start=1)]
    for position, source in enumerate(sources):
        row = rows[position]
        if not is_id(source.id):
            faults.add(bad_id(row))
            continue
        if source.visit and not is_id(source.visit):
            faults.add(f"E_ID: the visit in row {row} must consist of ASCII letters and digits only, such as 2")
        if source.split and source.split not in SPLITS:
            faults.add(f"E_SPLIT: row {row} has the split {source.split!r}; it must be {', '.join(SPLITS)}")
        first = participants.setdefault(source.id, position)
        twin = visits.setdefault((source.id, source.visit), position)
        alike = spellings.setdefault(source.id.lower(), position)
        if sources[alike].id != source.id:
            faults.add(
                f"E_ID: the ids in rows {rows[alike]} and {row} differ only in upper and lower case, which some file "
                "systems take for one; rename one of them"
            )
        if sources[first].split != source.split:
            splits = [of.split or "no split" for of in (sources[first], source)]
            faults.add(
                f"E_LEAK: rows {rows[first]} and {row} are one subject in {splits[0]} and {splits[1]}; all visits of a "
                "subject belong to one split"
            )
        elif twin != position:
            faults.add(
                f"E_DUPLICATE: rows {rows[twin]} and {row} are the same subject; keep one, or number the visits in a "
                "column `visit`"
            )
    faults.raise_any()


def bad_id(row: int) -> str:
    return f"E_ID: the id in row {row} must consist of ASCII letters and digits only; rename the subject"
