"""Label maps and tables as a BIDS derivative dataset (Brain Imaging Data Structure, "Derivatives: segmentations").

    OUT/dataset_description.json               which program, weights and training data
    OUT/seg-fslfast_dseg.tsv                   look-up table of a protocol: index, name, color, mapping to BIDS' ids
    OUT/sub-01/anat/sub-01_seg-fslfast_dseg.nii.gz, .json
    OUT/sub-01/anat/sub-01_volumes.tsv         voxels and mm³ of every structure of every protocol
    OUT/summary.tsv                            one row per input of the last batch

BIDS values are letters and digits only, so a protocol's label is its name without underscores: `seg-malpemtissue`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from neuronet_jax import __version__, nifti
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS, Protocol
from neuronet_jax.metrics import dice_per_class, mean_dice

GENERATOR = "NeuroNet-JAX"
BRAIN_MM3 = (6e5, 2.4e6)  # brain and CSF of adults is 1.0 to 1.9 litres; half and a quarter more is left as margin
LEAST_AGREEMENT = 0.7  # mean Dice of the two MALP-EM heads, which read one anatomy; 0.95 and more on heads they know
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

    @property
    def volumes(self) -> Path:
        return self.folder / f"{self.stem}_volumes.tsv"


@dataclass(frozen=True)
class Row:
    """One line of summary.tsv."""

    input: str  # file name
    output: str  # stem of the results
    status: str  # "done" or "rejected"
    code: str = "n/a"  # E_… of a rejected input
    reason: str = "n/a"
    warnings: str = "n/a"  # W_…, separated by commas
    agreement: str = "n/a"  # of the two MALP-EM heads, see `quality`


def bids_label(protocol: str) -> str:
    return protocol.replace("_", "")


def plan(sources: Sequence[Path], out: Path, protocols: Sequence[str], overwrite: bool) -> list[Target]:
    """Where every input's results go. A BIDS name keeps its entities; any other gives sub-<its letters and digits>.

    Raises NeuronetError, before anything is read or written, for two inputs of one name, for results that exist
    (without `overwrite`), and for results that are an input.
    """
    names = [_stem(path.name) for path in sources]
    stems = [
        # T1.nii.gz in many subjects' folders: the folder tells them apart
        _stem(f"{path.absolute().parent.name}{path.name}")
        if names.count(name) > 1 and name != _bids(path.name)
        else name
        for path, name in zip(sources, names, strict=True)
    ]
    inputs = {path.resolve() for path in sources}
    targets: dict[str, Target] = {}
    for path, stem in zip(sources, stems, strict=True):
        if stem in targets:
            raise NeuronetError(
                f"{targets[stem].source} and {path} would both be {stem}: run them with two --out folders"
            )
        target = targets[stem] = Target(path, out, stem)
        for result in (*map(target.labels, protocols), target.volumes):
            if result.resolve() in inputs:
                raise NeuronetError(f"{result} is an input and would be overwritten: choose another --out folder")
            if result.exists() and not overwrite:
                raise NeuronetError(f"{result} exists: give --overwrite, or choose another --out folder")
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

    Raises NeuronetError where `out` cannot be written, or holds another dataset or the results of another model.
    """
    description = {
        "Name": f"{GENERATOR} segmentations",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": GENERATOR, "Version": __version__, "Description": json.dumps(provenance)}],
    }
    existing = out / "dataset_description.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(existing.read_text()) if existing.exists() else description
        if [tool.get("Name") for tool in there.get("GeneratedBy", [])] != [GENERATOR]:
            raise NeuronetError(f"{out} holds another dataset, {there.get('Name')!r}: choose another --out folder")
        if there != description and not overwrite:
            raise NeuronetError(
                f"{out} holds results of another model: give --overwrite, or choose another --out folder"
            )
        _write(existing, json.dumps(description, indent=2) + "\n")
        _write(out / ".bidsignore", "summary.tsv\n*_volumes.tsv\n")
        for name in protocols:
            _write(out / f"seg-{bids_label(name)}_dseg.tsv", label_table(PROTOCOLS[name]))
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


def quality(maps: dict[str, np.ndarray], affine: np.ndarray) -> tuple[float, tuple[str, ...]]:
    """How far the label maps contradict each other, and warnings about what no head should give.

    The score is the mean Dice of `malp_em_tissue` and the same tissues merged from `malp_em` (NaN without both).
    W_AGREEMENT: it is low; W_BRAIN_VOLUME: the labelled volume is no brain's.
    """
    warnings, score = [], float("nan")
    if {"malp_em", "malp_em_tissue"} <= maps.keys():
        merged = MALP_EM_TO_TISSUE[maps["malp_em"]]
        score = mean_dice(dice_per_class(merged, maps["malp_em_tissue"], PROTOCOLS["malp_em_tissue"].num_classes))
        if not score >= LEAST_AGREEMENT:
            warnings.append("W_AGREEMENT")
    voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
    brains = [np.count_nonzero(ids) * voxel_mm3 for name, ids in maps.items() if name != "fsl_first"]
    if any(not BRAIN_MM3[0] <= brain <= BRAIN_MM3[1] for brain in brains):
        warnings.append("W_BRAIN_VOLUME")
    return score, tuple(warnings)


def write(target: Target, volume: nifti.Volume, maps: dict[str, np.ndarray], overwrite: bool, note: str = "") -> Row:
    """Writes one head's label maps, sidecars and volumes, each under its final name only when complete.

    `note` is what the sidecars say about the model, such as that it is a demonstration.
    Raises NeuronetError where writing fails.
    """
    score, notes = quality(maps, volume.affine)
    warnings = sorted({*volume.warnings, *notes})
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        for name, ids in maps.items():
            path = target.labels(name)
            sidecar = {
                "Description": f"Labels as {PROTOCOLS[name].tool} gives them, predicted by {GENERATOR}",
                "Manual": False,
                "Protocol": name,
                "Warnings": warnings,
                **({"Note": note} if note else {}),
            }
            nifti.write_labels(path, ids, volume, overwrite)
            _write(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), json.dumps(sidecar, indent=2) + "\n")
        _write(target.volumes, volume_table(maps, volume.affine))
    except OSError as error:
        raise NeuronetError(f"cannot write to {target.folder}: {error}; make room, or choose another --out") from error
    agreement = "n/a" if np.isnan(score) else f"{score:.4f}"
    return Row(target.source.name, target.stem, "done", warnings=",".join(warnings) or "n/a", agreement=agreement)


def write_summary(out: Path, rows: Sequence[Row]) -> None:
    """summary.tsv: what became of every input, in the order given."""
    header = [field.name for field in fields(Row)]
    _write(out / "summary.tsv", _tsv([header, *([" ".join(v.split()) for v in asdict(row).values()] for row in rows)]))


def _tsv(rows: Sequence[Sequence[str]]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    Files(str(path.parent.absolute())).write(path.name, text.encode())
