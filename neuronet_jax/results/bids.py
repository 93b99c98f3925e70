"""Label maps and tables as a BIDS derivative dataset (Brain Imaging Data Structure, "Derivatives: segmentations").

    OUT/dataset_description.json               program, weights and training data
    OUT/seg-fslfast_dseg.tsv                   look-up table of a protocol: index, name, color, mapping to BIDS' ids
    OUT/seg-fslfast_lut.txt                    the same for viewers: index name R G B A, in FreeSurfer's format
    OUT/sub-01/anat/sub-01_seg-fslfast_dseg.nii.gz, .json
    OUT/sub-01/anat/sub-01_seg-fslfirst_label-LeftHippocampus_probseg.nii.gz, .json     posteriors, on request
    OUT/sub-01/anat/sub-01_volumes.tsv         voxels and mm³ of every structure of every protocol
    OUT/sub-01/anat/sub-01_agreement.tsv       Dice between protocols, for every region that they share
    OUT/sub-01/anat/sub-01_desc-agreement_dseg.nii.gz, .json    number of protocols that agree on the tissue
    OUT/sub-01/anat/sub-01_desc-brain_mask.nii.gz, .json        voxels that at least half of the tools label
    OUT/sub-01/anat/sub-01_seg-malpem.stats, …_dseg.mgz, …_res-1mm_dseg.nii.gz    on request, see `extras`
    OUT/sub-01/anat/sub-01_quality.tsv         entropy and predicted Dice of every structure
    OUT/sub-01/anat/sub-01_report.html         all of the above with pictures, on one page
    OUT/sub-01/anat/sub-01_thumbnail.webp      two slices, for the page of all scans
    OUT/sub-01/anat/sub-01_provenance.json     origin of the results, and whether they are complete (see `resume`)
    OUT/volumes.tsv                            mm³: a row per scan, a column per structure of each protocol
    OUT/report.html                            all scans on one page
    OUT/summary.tsv                            one row per input; for a shard: summary_shard-3-of-8.tsv

BIDS values are letters and digits only, so a protocol's label is its name without underscores: `seg-malpemtissue`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neuronet_jax.errors import NeuronetError
from neuronet_jax.results.inputs import Scan, bare

GENERATOR = "NeuroNet-JAX"
_DROPPED = ("space", "hemi", "seg", "scale", "res", "den", "label", "desc")  # these describe the image, not the subject
_SHARED = r"summary.*\.tsv|volumes\.tsv|report\.html|.*_dseg\.tsv|.*_lut\.txt|dataset_description\.json"  # files in OUT
_ENTITY = re.compile(r"([a-z]+)-[A-Za-z0-9]+")


@dataclass(frozen=True)
class Target:
    """The result files of one input: `OUT/sub-01/ses-1/anat/sub-01_ses-1_…`."""

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
        """Returns the file of the posterior "PROTOCOL:STRUCTURE"."""
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
    def mask(self) -> Path:
        return self.folder / f"{self.stem}_desc-brain_mask.nii.gz"

    def extra(self, protocol: str, kind: str) -> Path:
        """Returns the file of a protocol's labels in a kind of `extras.KINDS`."""
        names = {"stats": ".stats", "mgz": "_dseg.mgz", "1mm": "_res-1mm_dseg.nii.gz"}
        return self.folder / f"{self.stem}_seg-{bids_label(protocol)}{names[kind]}"

    @property
    def report(self) -> Path:
        return self.folder / f"{self.stem}_report.html"

    @property
    def thumbnail(self) -> Path:
        return self.folder / f"{self.stem}_thumbnail.webp"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.stem}_provenance.json"

    def results(self, protocols: Sequence[str], posteriors: Sequence[str] = ()) -> list[Path]:
        """Returns the files without which the results are not complete."""
        return [*map(self.labels, protocols), *map(self.posterior, posteriors), self.volumes]

    def written(self, protocols: Sequence[str], posteriors: Sequence[str] = ()) -> list[Path]:
        """Returns every file that a command may write for this input, without the sidecars."""
        tables = [self.table(name) for name in ("agreement", "quality")]
        return [
            *self.results(protocols, posteriors),
            self.votes,
            self.mask,
            *tables,
            self.report,
            self.thumbnail,
            self.record,
        ]


def bids_label(protocol: str) -> str:
    return protocol.replace("_", "")


def plan(
    scans: Sequence[Scan],
    out: Path,
    protocols: Sequence[str],
    posteriors: Sequence[str] = (),
    lists: Sequence[Path] = (),
) -> list[Target]:
    """Returns where each scan's results go. A BIDS name keeps its entities; any other becomes sub-<its letters and
    digits>.

    Raises NeuronetError, before anything is read or written, if two scans have one name, or if a result would replace
    an input or one of the `lists` that name them.
    """
    names = [_stem(scan.name) for scan in scans]
    counts = Counter(names)
    stems = [
        # many subjects' folders may each hold a T1.nii.gz: the folder's name tells them apart
        _stem(f"{scan.path.absolute().parent.name}{scan.name}")
        if counts[name] > 1 and name != _bids(scan.name)
        else name
        for scan, name in zip(scans, names, strict=True)
    ]
    inputs = {path.resolve() for path in (*(scan.path for scan in scans), *lists)}
    folders = {path.parent for path in inputs}
    for path in inputs:
        if path.parent == out.resolve() and re.fullmatch(_SHARED, path.name):
            raise NeuronetError(f"{path} is an input and would be overwritten: choose a different --out folder")
    first: dict[str, Scan] = {}
    targets = []
    for scan, stem in zip(scans, stems, strict=True):
        if (earlier := first.setdefault(stem, scan)) is not scan:
            raise NeuronetError(_twice(earlier, scan, stem))
        target = Target(scan.path, out, stem)
        targets.append(target)
        if (folder := target.folder.resolve()) in folders:
            for result in target.written(protocols, posteriors):
                if folder / result.name in inputs:
                    raise NeuronetError(
                        f"{result} is an input and would be overwritten: choose a different --out folder"
                    )
    return targets


def _twice(one: Scan, other: Scan, stem: str) -> str:
    """Says that the results of two scans would have one name, and what to do about it."""
    if one.row and other.row:
        return (
            f"{one.row} and {other.row} would both be named {stem}: give each its own id in the column `id` "
            "(sub-01 and 01 are one id), or remove one of them"
        )
    return (
        f"{one.path} and {other.path} would both be named {stem}: segment one of them into a different --out folder, "
        "or give @LIST.csv with the columns `id` and `t1`, and an id of its own to each"
    )


def _stem(name: str) -> str:
    if bids := _bids(name):
        return bids
    letters = re.sub("[^A-Za-z0-9]", "", bare(name))
    if not letters:
        raise NeuronetError(
            f"E_ID: names of results use letters and digits (A-Z, a-z, 0-9), and {name!r} has none: rename it"
        )
    return f"sub-{letters}"


def _bids(name: str) -> str:
    """Returns the entities of a BIDS file name that identify subject and scan, or an empty string for other names."""
    *entities, suffix = bare(name).replace("+", "").split("_")  # BIDS allows + in labels, but not in every program
    if not entities or not entities[0].startswith("sub-") or not suffix.isalnum():
        return ""
    keys = [match[1] for entity in entities if (match := _ENTITY.fullmatch(entity))]
    if len(keys) < len(entities):
        return ""
    return "_".join(entity for key, entity in zip(keys, entities, strict=True) if key not in _DROPPED)
