"""`neuronet bids`: which scans of a dataset it takes, and that its rules for names are those of the BIDS validator."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import pytest

from neuronet_jax.cli import main
from neuronet_jax.results import raw_bids

DESCRIPTION = {"Name": "test", "BIDSVersion": "1.10.0"}


def _describe(folder: Path, **changed: object) -> None:
    content = {name: value for name, value in {**DESCRIPTION, **changed}.items() if value is not None}
    (folder / "dataset_description.json").write_text(json.dumps(content))


def _place(folder: Path, name: str, scan: Path) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".nii":
        nib.save(nib.Nifti1Image.from_filename(scan), path)
    else:
        shutil.copy(scan, path)
    return path


@pytest.fixture
def bids(heads, tmp_path) -> Path:
    """Returns a dataset of four participants: with sessions, without, without a T1w image, and with a phase image."""
    folder = tmp_path / "bids"
    for name in (
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_acq-a+b_run-01_T1w.nii",
        "sub-01/ses-2/anat/sub-01_ses-2_T2w.nii.gz",
        "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz",
        "sub-03/anat/sub-03_T1w.nii.gz",
        "sub-03/anat/sub-03_part-phase_T1w.nii.gz",
        "sub-04/anat/sub-04_T2w.nii.gz",
        "derivatives/other/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
    ):
        _place(folder, name, heads / "a.nii.gz")
    _describe(folder)
    return folder


@pytest.fixture
def segmented(run, bids, tmp_path):
    """Returns a function that runs the command and returns its status and the names of the results."""

    def command(*options: str, out: str = "out", folder: Path = bids) -> tuple[int, list[str]]:
        given = ["bids", str(folder), str(tmp_path / out), "participant", run, "--no-report", "--protocols=fsl_fast"]
        status = main([*given, *options])
        suffix = "_seg-fslfast_dseg.nii.gz"
        return status, sorted(path.name.removesuffix(suffix) for path in (tmp_path / out).rglob(f"*{suffix}"))

    return command


def test_it_takes_the_T1w_images_of_the_raw_dataset_alone(segmented, capsys):
    everyone = ["sub-01_ses-1", "sub-01_ses-2_acq-ab_run-01", "sub-02_ses-1", "sub-03"]
    assert segmented() == (0, everyone)
    assert "without a T1w image, and left out: sub-04\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "names", "left_out"),
    [
        ("--participant-label 03", ["sub-03"], ""),
        ("--participant_label sub-03 02", ["sub-02_ses-1", "sub-03"], ""),
        ("--participant-label 03 --participant-label 02", ["sub-02_ses-1", "sub-03"], ""),
        ("--session-label ses-2", ["sub-01_ses-2_acq-ab_run-01"], "sub-02 ses-2, sub-03 ses-2, sub-04 ses-2"),
        ("--participant-label 01 02 --session-label 2", ["sub-01_ses-2_acq-ab_run-01"], "sub-02 ses-2"),
        ("--participant-label 01 --session-label 1 2", ["sub-01_ses-1", "sub-01_ses-2_acq-ab_run-01"], ""),
    ],
)
def test_it_takes_the_chosen_and_names_whom_it_leaves_out(segmented, capsys, options, names, left_out):
    assert segmented(*options.split()) == (0, names)
    said = re.findall("without a T1w image, and left out: (.*)", capsys.readouterr().err)
    assert said == ([left_out] if left_out else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--participant-label 3", "has no sub-3; did you mean sub-03?"),
        ("--participant-label x", "has no sub-x; there are sub-01, sub-02, sub-03, sub-04"),
        ("--participant-label 01 04", "sub-04: no T1w image (anat/*_T1w.nii.gz)"),
        ("--session-label 7", "has no ses-7; there are ses-1, ses-2"),
        ("--participant-label 02 --session-label 2", "T1w.nii.gz) of the chosen participants and sessions"),
    ],
)
def test_a_label_that_no_image_has_is_an_error(segmented, capsys, options, message):
    assert segmented(*options.split()) == (1, [])
    assert message in capsys.readouterr().err


def test_other_levels_and_a_missing_dataset_are_refused(segmented, bids, tmp_path, run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bids", str(bids), str(tmp_path / "out"), "group", run])
    assert segmented(folder=tmp_path / "bidz") == (1, [])
    assert f"there is no folder {tmp_path / 'bidz'}" in capsys.readouterr().err
    before = (bids / "dataset_description.json").read_bytes()
    assert segmented(out="bids")[0] == 1  # the dataset itself as the output
    assert "holds a different dataset, 'test'" in capsys.readouterr().err
    assert (bids / "dataset_description.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"Name": None}, "must have Name, as text"),
        ({"BIDSVersion": 1.1}, "must have BIDSVersion, as text"),
        ({"DatasetType": "derivative"}, "is a BIDS dataset of type 'derivative': give the raw dataset"),
        (None, "dataset_description.json cannot be read"),
        ("missing", "has no dataset_description.json, as every BIDS dataset"),
    ],
)
def test_the_description_is_checked_unless_skipped(segmented, bids, capsys, changed, message):
    if changed == "missing":
        (bids / "dataset_description.json").unlink()
    elif changed is None:
        (bids / "dataset_description.json").write_text("{")
    else:
        _describe(bids, **changed)
    only = ("--participant-label", "03")
    assert segmented(*only) == (1, [])
    error = capsys.readouterr().err
    assert message in error and "or add --skip-bids-validation" in error
    assert segmented(*only, "--skip-bids-validation") == (0, ["sub-03"])


def test_a_part_of_a_dataset_is_told_from_the_whole(segmented, bids, capsys):
    assert segmented(folder=bids / "sub-01")[0] == 1
    assert f"is a part of the BIDS dataset {bids}: give that folder" in capsys.readouterr().err


BAD = (
    "sub-01/anat/sub-02_T1w.nii.gz",
    "sub-01/anat/sub-01_ses-1_T1w.nii.gz",
    "sub-02/ses-1/anat/sub-02_T1w.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-2_T1w.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_run-1_acq-x_T1w.nii.gz",
    "sub-03/anat/sub-03_acq-a_acq-b_T1w.nii.gz",
    "sub-03/anat/sub-03_foo-1_T1w.nii.gz",
    "sub-03/anat/sub-03_desc-x_T1w.nii.gz",
    "sub-03/anat/sub-03_run-x_T1w.nii.gz",
    "sub-03/anat/sub-03_acq-a-b_T1w.nii.gz",
    "sub-03/anat/sub-03__T1w.nii.gz",
)
GOOD = ("sub-03/anat/sub-03_task-r_acq-1_ce-g_rec-x_run-2_part-mag_chunk-3_T1w.nii.gz",)


def test_names_are_refused_as_by_the_bids_validator(segmented, bids, heads, capsys):
    shutil.rmtree(bids / "sub-03")  # a phase image needs a sidecar
    for name in (*BAD, *GOOD):
        _place(bids, name, heads / "a.nii.gz")
    assert segmented() == (1, [])
    error = capsys.readouterr().err
    named = {str(Path(found).relative_to(bids)) for found in re.findall("^  (.*?): ", error, re.MULTILINE)}
    assert named == set(BAD) and "rename the files, or add --skip-bids-validation" in error
    assert segmented("--participant-label", "01", "--session-label", "2") == (0, ["sub-01_ses-2_acq-ab_run-01"])
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if validator is None:
        pytest.skip("needs bids-validator-deno, as the dev extra brings it")
    found = subprocess.run([validator, "--json", str(bids)], capture_output=True, text=True, check=False)
    issues = [issue for issue in json.loads(found.stdout)["issues"]["issues"] if issue["severity"] == "error"]
    assert {issue["location"].lstrip("/") for issue in issues if "T1w" in issue["location"]} == set(BAD)


def test_at_most_twenty_faults_and_labels_are_named(tmp_path):
    many = [raw_bids.Image(Path(f"sub-{n:02}/anat/sub-x_T1w.nii"), f"{n:02}", "") for n in range(30)]
    with pytest.raises(raw_bids.NeuronetError) as raised:
        raw_bids.check_names(many, "stop")
    assert "sub-19/" in str(raised.value) and "sub-20/" not in str(raised.value) and "and 10 more" in str(raised.value)


def test_a_file_that_was_not_fetched_is_rejected_with_the_remedy(segmented, bids, tmp_path, capsys):
    path = bids / "sub-03/anat/sub-03_T1w.nii.gz"
    path.unlink()
    path.symlink_to(tmp_path / "annex" / "object")
    assert segmented("--participant-label", "02", "03") == (3, ["sub-02_ses-1"])
    assert "sub-03 (sub-03_T1w.nii.gz): rejected, E_IO" in (error := capsys.readouterr().err)
    assert "`datalad get` fetches" in error
