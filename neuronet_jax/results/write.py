"""Label maps and tables as a BIDS derivative dataset (Brain Imaging Data Structure, "Derivatives: segmentations").

    OUT/dataset_description.json               which program, weights and training data
    OUT/seg-fslfast_dseg.tsv                   look-up table of a protocol: index, name, color, mapping to BIDS' ids
    OUT/seg-fslfast_lut.txt                    the same for viewers: index name R G B A, as FreeSurfer writes it
    OUT/sub-01/anat/sub-01_seg-fslfast_dseg.nii.gz, .json
    OUT/sub-01/anat/sub-01_seg-fslfirst_label-LeftHippocampus_probseg.nii.gz, .json     where posteriors are wanted
    OUT/sub-01/anat/sub-01_volumes.tsv         voxels and mm³ of every structure of every protocol
    OUT/sub-01/anat/sub-01_agreement.tsv       Dice between protocols on all that they share
    OUT/sub-01/anat/sub-01_desc-agreement_dseg.nii.gz, .json    how many protocols agree on the tissue
    OUT/sub-01/anat/sub-01_quality.tsv         entropy and predicted Dice of every structure
    OUT/sub-01/anat/sub-01_report.html         all that with pictures, on one page
    OUT/sub-01/anat/sub-01_provenance.json     what they come from, and that they are complete (see `records`)
    OUT/volumes.tsv                            mm³: a row per head, a column per structure of each protocol
    OUT/report.html                            the heads beside each other
    OUT/summary.tsv                            one row per input; of a shard: summary_shard-3-of-8.tsv

BIDS values are letters and digits only, so a protocol's label is its name without underscores: `seg-malpemtissue`.
"""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from neuronet_jax import __version__
from neuronet_jax.evaluation import agreement, plausibility, quality
from neuronet_jax.images import nifti
from neuronet_jax.results import reports
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS, Protocol
from neuronet_jax.results.pictures import votes_colors
from neuronet_jax.results.inputs import Scan
from neuronet_jax.inference.segmentation import Segmentation

GENERATOR = "NeuroNet-JAX"
# What was done to an input that has the warning.
REPAIRS = {
    "W_NAN": "voxels that were NaN or infinite were set to 0",
    "W_NDIM": "axes of length 1 after the third were dropped",
    "W_XFORM": "sform and qform differ: the sform was used",
    "W_LR_UNSAFE": "there was no orientation: RAS was assumed, so that left and right are a guess",
}
_NO_BIDS = (  # what BIDS has no name for
    *("summary*.tsv", "volumes.tsv", "*_volumes.tsv", "*_agreement.tsv", "*_quality.tsv", "*_provenance.json"),
    *("*_lut.txt", "*report.html"),
)
_DROPPED = ("space", "hemi", "seg", "scale", "res", "den", "label", "desc")  # say what the input is, not whose
_ENTITY = re.compile(r"([a-z]+)-[A-Za-z0-9]+")


@dataclass(frozen=True)
class Target:
    """Where the results of one input go: `OUT/sub-01/ses-1/anat/sub-01_ses-1_…`."""

    source: Path
    out: Path
    stem: str  # sub-01_ses-1

    @property
    def folder(self) -> Path:
        subject, *rest = self.stem.split("_")
        session = [entity for entity in rest if entity.startswith("ses-")]
        return self.out.joinpath(subject, *session, "anat")

    def labels(self, protocol: str) -> Path:
        return self.folder / f"{self.stem}_seg-{bids_label(protocol)}_dseg.nii.gz"

    def posterior(self, wanted: str) -> Path:
        """Of "PROTOCOL:STRUCTURE"."""
        protocol, _, structure = wanted.partition(":")
        label = re.sub("[^A-Za-z0-9]", "", structure)
        return self.folder / f"{self.stem}_seg-{bids_label(protocol)}_label-{label}_probseg.nii.gz"

    @property
    def volumes(self) -> Path:
        return self.table("volumes")

    @property
    def votes(self) -> Path:
        return self.folder / f"{self.stem}_desc-agreement_dseg.nii.gz"

    def table(self, name: str) -> Path:
        return self.folder / f"{self.stem}_{name}.tsv"

    @property
    def report(self) -> Path:
        return self.folder / f"{self.stem}_report.html"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.stem}_provenance.json"

    def results(self, protocols: Sequence[str], posteriors: Sequence[str] = ()) -> list[Path]:
        return [*map(self.labels, protocols), *map(self.posterior, posteriors), self.volumes]


@dataclass(frozen=True)
class Row:
    """One line of summary.tsv."""

    input: str  # file name
    output: str  # stem of the results
    status: str  # "done" or "rejected"
    code: str = "n/a"  # E_… of a rejected input
    reason: str = "n/a"
    warnings: str = "n/a"  # W_…, separated by commas
    agreement: str = "n/a"  # of the two MALP-EM heads: mean Dice over tissues
    predicted_dice: str = "n/a"  # mean over protocols and structures, see `quality`
    calibrated: str = "n/a"  # "yes" or "no": whether the run's validation heads stand behind it


def bids_label(protocol: str) -> str:
    return protocol.replace("_", "")


def plan(scans: Sequence[Scan], out: Path, protocols: Sequence[str], posteriors: Sequence[str] = ()) -> list[Target]:
    """Where every scan's results go. A BIDS name keeps its entities; any other gives sub-<its letters and digits>.

    Raises NeuronetError, before anything is read or written, for two scans of one name, and for results that would
    replace an input.
    """
    names = [_stem(scan.name) for scan in scans]
    stems = [
        # T1.nii.gz in many subjects' folders: the folder tells them apart
        _stem(f"{scan.path.absolute().parent.name}{scan.name}")
        if names.count(name) > 1 and name != _bids(scan.name)
        else name
        for scan, name in zip(scans, names, strict=True)
    ]
    inputs = {scan.path.resolve() for scan in scans}
    targets: dict[str, Target] = {}
    for (path, _), stem in zip(scans, stems, strict=True):
        if stem in targets:
            raise NeuronetError(
                f"{targets[stem].source} and {path} would both be {stem}: run them with two --out folders, or name "
                "them by the column `id` of a list"
            )
        target = targets[stem] = Target(path, out, stem)
        for result in target.results(protocols, posteriors):
            if result.resolve() in inputs:
                raise NeuronetError(f"{result} is an input and would be overwritten: choose another --out folder")
    return list(targets.values())


def _stem(name: str) -> str:
    if bids := _bids(name):
        return bids
    letters = re.sub("[^A-Za-z0-9]", "", _bare(name))
    if not letters:
        raise NeuronetError(
            f"E_ID: results are named by letters and digits (A-Z, a-z, 0-9), {name!r} has none: rename it"
        )
    return f"sub-{letters}"


def _bids(name: str) -> str:
    """The entities of a BIDS file name that tell whose and which scan it is; empty for any other name."""
    *entities, suffix = _bare(name).split("_")
    if not entities or not entities[0].startswith("sub-") or not suffix.isalnum():
        return ""
    keys = [match[1] for entity in entities if (match := _ENTITY.fullmatch(entity))]
    if len(keys) < len(entities):
        return ""
    return "_".join(entity for key, entity in zip(keys, entities, strict=True) if key not in _DROPPED)


def _bare(name: str) -> str:
    return re.sub(r"(\.nii\.gz|\.nii|\.mgz)$", "", name, flags=re.IGNORECASE)


def prepare(out: Path, protocols: Sequence[str], provenance: dict[str, Any], overwrite: bool) -> None:
    """Makes the dataset: its description and the look-up tables.

    `provenance` says what made the results: `Model.provenance` and `Options.changed()`. Raises NeuronetError where
    `out` cannot be written, or holds another dataset or the results of another model.
    """
    made_by = {**provenance, "label_tables_sha256": {name: PROTOCOLS[name].version for name in protocols}}
    description = {
        "Name": f"{GENERATOR} segmentations",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": GENERATOR, "Version": __version__, "Description": json.dumps(made_by)}],
    }
    existing = out / "dataset_description.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(existing.read_text()) if existing.exists() else description
        if [tool.get("Name") for tool in there.get("GeneratedBy", [])] != [GENERATOR]:
            raise NeuronetError(f"{out} holds another dataset, {there.get('Name')!r}: choose another --out folder")
        if there != description and not overwrite:
            raise NeuronetError(
                f"{out} holds results of another model or of other options: give --overwrite, or choose another --out "
                "folder"
            )
        _write(existing, json.dumps(description, indent=2) + "\n")
        _write(out / ".bidsignore", "\n".join(_NO_BIDS) + "\n")
        for name in protocols:
            _write(out / f"seg-{bids_label(name)}_dseg.tsv", label_table(PROTOCOLS[name]))
            _write(out / f"seg-{bids_label(name)}_lut.txt", color_table(PROTOCOLS[name]))
        if (voters := sum(name in agreement.VOTERS for name in protocols)) > 1:
            _write(out / "desc-agreement_dseg.tsv", votes_table(voters))
    except (OSError, ValueError) as error:
        raise NeuronetError(f"cannot write to {out}: {error}; choose another --out folder") from error


def label_table(protocol: Protocol) -> str:
    """A dseg.tsv: the values in the label map with name, colour and id among BIDS' common labels."""
    rows = [["index", "name", "color", "mapping"]]
    for s in protocol.structures:
        rows.append(
            [str(s.id), s.name, "#{:02x}{:02x}{:02x}".format(*s.color), "n/a" if s.mapping is None else str(s.mapping)]
        )
    return _tsv(rows)


def color_table(protocol: Protocol) -> str:
    """As FreeSurferColorLUT.txt, which FreeView, FSLeyes and 3D Slicer read. There, A is 0 throughout."""
    rows = [f"{s.id:<4}{s.name:<40}{s.color[0]:>4}{s.color[1]:>4}{s.color[2]:>4}   0\n" for s in protocol.structures]
    return f"# {protocol.name}\n#No. Label Name:                               R   G   B   A\n" + "".join(rows)


def votes_table(voters: int) -> str:
    """The dseg.tsv of the map of votes."""
    colors = votes_colors(voters)
    names = ["NoTissue", *(f"{votes}Of{voters}ProtocolsAgree" for votes in range(1, voters + 1))]
    rows = [[str(i), name, "#{:02x}{:02x}{:02x}".format(*colors[i])] for i, name in enumerate(names)]
    return _tsv([["index", "name", "color"], *rows])


def volume_table(maps: dict[str, np.ndarray], affine: np.ndarray) -> str:
    """Voxels and volume of every structure, background included, so that each protocol sums to the field of view.

    A voxel has |det(affine)| mm³: right for anisotropic and oblique grids alike.
    """
    voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
    rows = [["protocol", "index", "name", "voxels", "volume_mm3"]]
    for name, ids in maps.items():
        counts = np.sum([np.bincount(plane.ravel(), minlength=256) for plane in ids], axis=0)  # planes fit the cache
        for s in PROTOCOLS[name].structures:
            rows.append([name, str(s.id), s.name, str(counts[s.id]), f"{counts[s.id] * voxel_mm3:.10g}"])
    return _tsv(rows)


def write(
    target: Target,
    volume: nifti.Volume,
    result: Segmentation,
    overwrite: bool,
    provenance: dict[str, Any],
    calibration: quality.Calibration = quality.UNKNOWN,
    report: bool = True,
) -> Row:
    """Writes one head's results, each file under its final name only when complete.

    `provenance` as for `prepare`; `calibration` is what the model's run knows of its own errors; `report` asks for the
    page. Raises NeuronetError where writing fails.
    """
    maps = result.maps
    compared = agreement.compare(maps, volume.affine)
    expected = quality.assess(result.confidence, calibration)
    warnings = sorted({*volume.warnings, *plausibility.check(volume, maps, compared), *expected.warnings})
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        for name, ids in maps.items():
            nifti.write_labels(target.labels(name), ids, volume, overwrite)
            what = f"Labels as {PROTOCOLS[name].tool} gives them, predicted by {GENERATOR}"
            _write_sidecar(target.labels(name), what, name, volume, warnings, provenance)
        for wanted, probability in result.posteriors.items():
            nifti.write_posterior(target.posterior(wanted), probability, volume, overwrite)
            name, _, structure = wanted.partition(":")
            what = f"Probability of {structure} as {PROTOCOLS[name].tool} labels it, by {GENERATOR}; not calibrated"
            _write_sidecar(target.posterior(wanted), what, name, volume, warnings, provenance)
        if compared.votes is not None:
            nifti.write_labels(target.votes, compared.votes, volume, overwrite)
            what = "Number of protocols that give the voxel the tissue (CSF, GM, WM or none) that most of them give it"
            content = {"Description": f"{what}; 0 where none of them sees tissue", "Protocols": compared.voters}
            _write_json(target.votes, content, provenance)
        _write(target.volumes, volume_table(maps, volume.affine))
        _write(target.table("agreement"), _tsv(agreement.table(compared)))
        if expected.predicted:
            _write(target.table("quality"), _tsv(quality.table(expected)))
        if report:
            page = reports.Head(target.stem, volume, maps, compared, expected, tuple(warnings), provenance)
            _write(target.report, reports.head_page(page))
    except OSError as error:
        raise NeuronetError(f"cannot write to {target.folder}: {error}; make room, or choose another --out") from error
    return Row(
        target.source.name,
        target.stem,
        "done",
        warnings=",".join(warnings) or "n/a",
        agreement=_number(compared.consistency),
        predicted_dice=_number(expected.score),
        calibrated="n/a" if np.isnan(expected.score) else "yes" if calibration.heads else "no",
    )


def _number(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:.4f}"


def write_cohort(
    out: Path,
    rows: Sequence[Row],
    provenance: dict[str, Any],
    calibration: quality.Calibration = quality.UNKNOWN,
    report: bool = True,
) -> None:
    """OUT/volumes.tsv over all heads below `out`; with `report`, report.html, and each head of `rows` put among them.

    Arguments are as those of `write`. Raises NeuronetError where writing fails.
    """
    table = volumes_of(out)
    _write(out / "volumes.tsv", _tsv([["head", *table.columns], *table.rows()]))
    if not report:
        return
    thumbnails, agreements = {}, {}
    for target in (Target(Path(row.input), out, row.output) for row in rows if row.status == "done"):
        if target.table("agreement").exists():
            agreements[target.stem] = _read(target.table("agreement"))
        if target.report.exists():
            text = target.report.read_text(encoding="utf-8")
            thumbnails[target.stem] = reports.thumbnail(text)
            if (placed := reports.place_among(text, target.stem, table)) != text:
                _write(target.report, placed)
    _write(out / "report.html", reports.cohort_page(rows, table, agreements, thumbnails, calibration, provenance))


def volumes_of(out: Path) -> reports.Volumes:
    """mm³ of every structure of every head below `out`, from the heads' own tables, by head."""
    heads: dict[str, dict[str, float]] = {}
    for path in sorted({*out.glob("sub-*/anat/*_volumes.tsv"), *out.glob("sub-*/ses-*/anat/*_volumes.tsv")}):
        heads[path.name.removesuffix("_volumes.tsv")] = {
            f"{row['protocol']}.{row['name']}": float(row["volume_mm3"]) for row in _read(path) if row["index"] != "0"
        }
    columns = dict.fromkeys(column for volumes in heads.values() for column in volumes)
    values = [[volumes.get(column, np.nan) for column in columns] for volumes in heads.values()]
    return reports.Volumes(tuple(heads), tuple(columns), np.array(values, np.float64).reshape(len(heads), len(columns)))


def _write_sidecar(
    path: Path, what: str, protocol: str, volume: nifti.Volume, warnings: Sequence[str], provenance: dict[str, Any]
) -> None:
    members = provenance.get("ensemble", [provenance])
    content = {
        "Description": what,
        "Manual": False,
        "Protocol": protocol,
        "LabelTableSHA256": PROTOCOLS[protocol].version,
        "WeightsSHA256": [member.get("weights_sha256", "n/a") for member in members],
        "Config": [member.get("config", "n/a") for member in members],
        "Version": __version__,
        "Warnings": list(warnings),
        "Repairs": [text for code, text in REPAIRS.items() if code in volume.warnings],
    }
    _write_json(path, content, provenance)


def _write_json(path: Path, content: dict[str, Any], provenance: dict[str, Any]) -> None:
    """The sidecar of an image, with what is said about the model, such as that it is a demonstration."""
    if note := provenance.get("note"):
        content["Note"] = note
    _write(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), json.dumps(content, indent=2) + "\n")


def write_summary(path: Path, rows: Sequence[Row]) -> None:
    """What became of every input, in the order given."""
    header = [field.name for field in fields(Row)]
    _write(path, _tsv([header, *([" ".join(v.split()) for v in asdict(row).values()] for row in rows)]))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _tsv(rows: Sequence[Sequence[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    Files(str(path.parent.absolute())).write(path.name, text.encode())
