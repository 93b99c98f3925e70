"""The tools: how each is called in a folder with the scan, and where it leaves its label maps.

A folder holds the scan as `T1.nii.gz`, and as `T1.nii` for SPM. Commands name files relative to it, so that a container
needs that one folder. A tool's leading words, such as `apptainer exec fsl.sif`, are the user's.

The options are those of the tools' own documentation: FAST and FIRST as in FSL's user guides, MALP-EM as in its README,
and SPM's unified segmentation with its default settings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from data_prep.tools.process import ToolError
from neuronet_jax.images import nifti
from neuronet_jax.images.space import Volume

SCAN = "T1.nii.gz"
_JOB = "job.m"
# In this order, SPM's maps and the rest of 1 are background, CSF, grey and white matter: the ids of spm_tissue.
_SPM = ("c3T1.nii", "c1T1.nii", "c2T1.nii")
_SEGMENTATION = """\
matlabbatch{1}.spm.spatial.preproc.channel.vols = {fullfile(pwd, 'T1.nii,1')};
for k = 1:6
    matlabbatch{1}.spm.spatial.preproc.tissue(k).tpm = {fullfile(spm('dir'), 'tpm', sprintf('TPM.nii,%d', k))};
    matlabbatch{1}.spm.spatial.preproc.tissue(k).native = [k <= 3, 0];
    matlabbatch{1}.spm.spatial.preproc.tissue(k).warped = [0, 0];
end
"""


@dataclass(frozen=True)
class Tool:
    """One tool. `commands` takes its leading words and whether scans are skull-stripped."""

    protocols: tuple[str, ...]  # whose maps it makes
    words: tuple[str, ...]  # the default leading words
    commands: Callable[[Sequence[str], bool], list[list[str]]]
    maps: Callable[[Path], dict[str, Volume]]  # by protocol, from the folder; raises ToolError and RejectError
    hours: float  # time limit: several times what the tool takes
    prepare: Callable[[Path], None] = lambda folder: None


def _file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ToolError(f"it left {len(found)} files {pattern}, and one is needed")
    return found[0]


def _labels(**patterns: str) -> Callable[[Path], dict[str, Volume]]:
    return lambda folder: {name: nifti.read_labels(_file(folder, pattern)) for name, pattern in patterns.items()}


def _fast(words: Sequence[str], stripped: bool) -> list[list[str]]:
    bet = [] if stripped else [[*words, "bet", SCAN, "brain.nii.gz", "-R"]]
    brain = SCAN if stripped else "brain.nii.gz"
    return [*bet, [*words, "fast", "-t", "1", "-n", "3", "-o", "fast", brain]]


def _first(words: Sequence[str], stripped: bool) -> list[list[str]]:
    return [[*words, "run_first_all", *(["-b"] if stripped else []), "-i", SCAN, "-o", "first"]]


def _prepare_spm(folder: Path) -> None:
    nib.save(nib.load(folder / SCAN), folder / "T1.nii")  # type: ignore[arg-type] # SPM reads no compressed files
    (folder / _JOB).write_text(_SEGMENTATION)


def from_spm(csf: np.ndarray, grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Returns SPM's tissue map, uint8 [x y z]: the most probable of background (the rest of 1), CSF, grey and white
    matter. Of equals, the first is taken.
    """
    return np.argmax([1 - csf - grey - white, csf, grey, white], axis=0).astype(np.uint8)


def _spm_map(folder: Path) -> dict[str, Volume]:
    csf, grey, white = (nifti.read_image(_file(folder, name)) for name in _SPM)
    return {"spm_tissue": replace(csf, data=from_spm(csf.data, grey.data, white.data))}


TOOLS = {
    "fsl_fast": Tool(("fsl_fast",), (), _fast, _labels(fsl_fast="fast_seg.nii.gz"), 2),
    "fsl_first": Tool(("fsl_first",), (), _first, _labels(fsl_first="first_all_fast_firstseg.nii.gz"), 4),
    "spm": Tool(("spm_tissue",), ("spm12",), lambda words, _: [[*words, "batch", _JOB]], _spm_map, 4, _prepare_spm),
    "malp_em": Tool(
        ("malp_em", "malp_em_tissue"),
        ("malpem-proot",),
        lambda words, _: [[*words, "-i", SCAN, "-o", "malpem"]],
        _labels(malp_em="malpem/*_MALPEM.nii.gz", malp_em_tissue="malpem/*_MALPEM_tissues.nii.gz"),
        48,  # ten hours on one core, by its README
    ),
}
