"""The tab-separated tables that accompany the label maps."""

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from neuronet_jax.files import Files
from neuronet_jax.images.space import voxel_mm3
from neuronet_jax.labels import PROTOCOLS, Protocol
from neuronet_jax.programs import shown
from neuronet_jax.results.pictures import votes_colors


@dataclass(frozen=True)
class Row:
    """One line of summary.tsv."""

    input: str  # file name, from `file_cell`
    output: str  # stem of the results; "n/a" for an input whose results can have no name
    status: str  # "done" or "rejected"
    code: str = "n/a"  # E_… of a rejected input
    reason: str = "n/a"
    warnings: str = "n/a"  # W_…, separated by commas
    agreement: str = "n/a"  # between the two MALP-EM outputs: mean Dice over tissues
    predicted_dice: str = "n/a"  # mean over protocols and structures, see `quality`
    calibrated: str = "n/a"  # "yes" or "no": whether predicted_dice is calibrated on the run's validation subjects
    removed_ml: str = "n/a"  # apart from the brain, in the protocol with most of it; n/a without the clean-up

    brain_ml: str = "n/a"  # grey and white matter, mean over the tools
    intracranial_ml: str = "n/a"  # estimated: CSF, grey and white matter, mean of FAST and SPM

    @property
    def key(self) -> str:
        """The name that tells rows of a folder apart: of the results, or of the file where results can have no name."""
        return self.input if self.output == "n/a" else self.output


@dataclass(frozen=True)
class Volumes:
    """Volumes in mm³ of the structures of several scans."""

    scans: tuple[str, ...]  # stems of their results
    columns: tuple[str, ...]  # protocol.Structure
    values: np.ndarray  # float64 [scan column], NaN if a scan lacks the protocol

    def rows(self) -> list[list[str]]:
        """Returns the lines of volumes.tsv without the header."""
        return [
            [scan, *("n/a" if math.isnan(value) else f"{value:.10g}" for value in values)]
            for scan, values in zip(self.scans, self.values, strict=True)
        ]

    def of(self, protocol: str, ids: Sequence[int]) -> np.ndarray:
        """Returns the total volume of some ids of a protocol, float64 [scan], NaN if a scan lacks the protocol."""
        names = {f"{protocol}.{s.name}" for s in PROTOCOLS[protocol].structures if s.id in ids}
        found = [index for index, column in enumerate(self.columns) if column in names]
        return self.values[:, found].sum(axis=1) if found else np.full(len(self.scans), np.nan)


def label_table(protocol: Protocol) -> str:
    """Returns a dseg.tsv: the values in the label map with name, colour and id among BIDS' common labels."""
    rows = [["index", "name", "color", "mapping"]]
    for s in protocol.structures:
        rows.append(
            [str(s.id), s.name, "#{:02x}{:02x}{:02x}".format(*s.color), "n/a" if s.mapping is None else str(s.mapping)]
        )
    return tsv(rows)


def color_table(protocol: Protocol) -> str:
    """Returns a table like FreeSurferColorLUT.txt, which FreeView, FSLeyes and 3D Slicer read. A is 0 throughout, as
    there.
    """
    rows = [f"{s.id:<4}{s.name:<40}{s.color[0]:>4}{s.color[1]:>4}{s.color[2]:>4}   0\n" for s in protocol.structures]
    return f"# {protocol.name}\n#No. Label Name:                               R   G   B   A\n" + "".join(rows)


def votes_table(voters: int) -> str:
    """Returns the dseg.tsv of the map of votes."""
    colors = votes_colors(voters)
    names = ["NoTissue", *(f"{votes}Of{voters}ProtocolsAgree" for votes in range(1, voters + 1))]
    rows = [[str(i), name, "#{:02x}{:02x}{:02x}".format(*colors[i])] for i, name in enumerate(names)]
    return tsv([["index", "name", "color"], *rows])


def volume_table(
    counts: Mapping[str, np.ndarray], affine: np.ndarray, ranges_mm3: Mapping[str, np.ndarray] = {}
) -> str:
    """Returns the voxels and volume of every structure, background included, so each protocol sums to the field of
    view.

    `counts` has, per protocol, the number of voxels of every id, int64 [256]. A voxel has |det(affine)| mm³, which
    holds for anisotropic and oblique grids alike. `ranges_mm3` is from `intervals_of`.
    """
    per_voxel_mm3 = voxel_mm3(affine)
    rows = [["protocol", "index", "name", "voxels", "volume_mm3", "low_mm3", "high_mm3"]]
    for name, found in counts.items():
        ends = ranges_mm3.get(name, np.full((2, PROTOCOLS[name].num_classes), np.nan))
        for s in PROTOCOLS[name].structures:
            volume = f"{found[s.id] * per_voxel_mm3:.10g}"
            low, high = ("n/a" if math.isnan(end) else f"{end:.1f}" for end in ends[:, s.index])
            rows.append([name, str(s.id), s.name, str(found[s.id]), volume, low, high])
    return tsv(rows)


def volumes_of(out: Path, finished: Collection[str]) -> Volumes:
    """Collects the volumes of the scans below `out` that are finished, by the names of their results, in mm³."""
    scans: dict[str, dict[str, float]] = {}
    for path in sorted({*out.glob("sub-*/anat/*_volumes.tsv"), *out.glob("sub-*/ses-*/anat/*_volumes.tsv")}):
        name = path.name.removesuffix("_volumes.tsv")
        if name not in finished:  # a command that is at work, or was killed, has written its table
            continue
        scans[name] = {
            f"{row['protocol']}.{row['name']}": float(row["volume_mm3"])
            for row in read_tsv(path)
            if row["index"] != "0"
        }
    columns = dict.fromkeys(column for volumes in scans.values() for column in volumes)
    values = [[volumes.get(column, np.nan) for column in columns] for volumes in scans.values()]
    return Volumes(tuple(scans), tuple(columns), np.array(values, np.float64).reshape(len(scans), len(columns)))


def summary_table(rows: Sequence[Row]) -> str:
    """Returns the outcome of every input, in the order given."""
    header = [field.name for field in fields(Row)]
    return tsv([header, *([" ".join(shown(v).split()) for v in asdict(row).values()] for row in rows)])


def rows_of(summary: str) -> list[Row]:
    """Reads the text of `summary_table`, also of a release with fewer columns. Leaves out lines that make no row."""
    table = csv.DictReader(summary.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [row for line in table if (row := row_of(line)) is not None]


def row_of(content: Any) -> Row | None:
    """Returns the row with these fields, as summary.tsv or the record of a scan has them, or None if it is damaged."""
    names = [field.name for field in fields(Row)]
    if not isinstance(content, dict) or not all(isinstance(content.get(name), str) for name in names[:3]):
        return None
    return Row(**{name: content[name] for name in names if isinstance(content.get(name), str)})


def refused_row(path: Path, code: str, reason: str) -> Row:
    """Returns the row of an input whose results can have no name."""
    return Row(file_cell(path.name), "n/a", "rejected", code, shown(reason))


def file_cell(name: str) -> str:
    """Returns a file name as a cell of a table: printable, and never computed as a formula by a spreadsheet."""
    text = shown(name).replace("\n", "\\n")
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def cell(value: float, digits: int = 4) -> str:
    """Returns a figure of summary.tsv, n/a for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def of_cell(text: str) -> float:
    """Reads what `cell` wrote. Pages round these figures, so that every page and the table say the same."""
    return math.nan if text == "n/a" else float(text)


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Reads a table as one dict per row."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def tsv(rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows as tab-separated text."""
    return "".join("\t".join(row) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under its final name only when complete."""
    Files(str(path.parent.absolute())).write(path.name, text.encode())
