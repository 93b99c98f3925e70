from pathlib import Path

import pytest

from neuronet_jax.errors import NeuronetError
from neuronet_jax.results.inputs import find


@pytest.fixture
def make(tmp_path):
    """Makes empty files below a new folder and returns the folder."""

    def make(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path

    return make


def _found(folder: Path, *inputs: object) -> list[str]:
    return [str(scan.path.relative_to(folder)) for scan in find([str(text) for text in inputs]).scans]


def test_a_raw_bids_dataset_gives_its_T1w_images_only(make):
    folder = make(
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii",
        "sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.json",
        "sub-01/ses-1/anat/._sub-01_ses-1_T1w.nii.gz",  # macOS leaves these on network drives
        "sub-01/fmap/sub-01_T1w.nii.gz",  # not a place for a T1w image in BIDS
        "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        ".git/annex/anat/x_T1w.nii.gz",
    )
    for text in ('{"Name": "a", "DatasetType": "raw"}', '{"Name": "older than DatasetType"}'):
        (folder / "dataset_description.json").write_text(text)
        expected = ["sub-01/ses-1/anat/sub-01_ses-1_T1w.nii", "sub-02/anat/sub-02_T1w.nii.gz"]
        assert _found(folder, folder) == expected
    assert _found(folder, folder / "sub-02") == ["sub-02/anat/sub-02_T1w.nii.gz"]  # a part of a dataset works too


def test_a_derivative_dataset_is_not_taken_for_scans(make):
    folder = make("sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
    (folder / "dataset_description.json").write_text('{"DatasetType": "derivative"}')
    with pytest.raises(NeuronetError, match="'derivative': give the raw dataset"):
        find([str(folder)])
    (folder / "dataset_description.json").write_text("{")
    with pytest.raises(NeuronetError, match="cannot be read"):
        find([str(folder)])
    (folder / "dataset_description.json").write_text('["raw"]')
    with pytest.raises(NeuronetError, match="must hold an object"):
        find([str(folder)])


def test_another_folder_gives_the_images_directly_in_it(make):
    folder = make("b.nii.gz", "a.mgz", "C.NII", "notes.txt", ".hidden.nii", "deeper/masks/mask.nii.gz")
    assert _found(folder, folder) == ["C.NII", "a.mgz", "b.nii.gz"]


def test_a_folder_of_mixed_names_loses_no_image(make):
    folder = make("a_sub-52_T1w.nii.gz", "memprage.nii.gz", "sub-01_T2w.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz")
    assert _found(folder, folder) == ["a_sub-52_T1w.nii.gz", "memprage.nii.gz", "sub-01/anat/sub-01_T1w.nii.gz"]


def test_an_anat_folder_gives_its_T1w_only(make):
    folder = make("anat/sub-01_T1w.nii.gz", "anat/sub-01_T2w.nii.gz", "other/sub-01.nii.gz")
    assert _found(folder, folder / "anat") == ["anat/sub-01_T1w.nii.gz"]
    assert _found(folder, folder / "other") == ["other/sub-01.nii.gz"]


def test_a_folder_without_scans_says_what_to_give(make):
    folder = make("1000/T1.nii.gz", "1000/T1_seg.nii.gz")  # ambiguous: either could be the scan
    with pytest.raises(NeuronetError, match=r"name the files, such as .*/\*/T1\.nii\.gz"):
        find([str(folder)])


def test_each_scan_once_in_the_order_given(make, monkeypatch):
    folder = make("b.nii.gz", "a.nii.gz")
    monkeypatch.chdir(folder)
    assert [str(scan.path) for scan in find(["b.nii.gz", str(folder), "missing.nii"]).scans] == [
        "b.nii.gz",
        str(folder / "a.nii.gz"),
        "missing.nii",  # one bad input among others
    ]


def test_a_list_holds_paths_relative_to_itself(make):
    folder = make("a.nii.gz", "b c.nii.gz")
    (folder / "lists").mkdir()
    (folder / "lists" / "heads.txt").write_text(f"\ufeff../a.nii.gz\n\n# not this\n  {folder}/b c.nii.gz \n")
    scans = find([f"@{folder}/lists/heads.txt"]).scans
    assert [(scan.path.resolve(), scan.name) for scan in scans] == [
        (folder / "a.nii.gz", "a.nii.gz"),
        (folder / "b c.nii.gz", "b c.nii.gz"),
    ]


def test_a_table_names_the_results_by_id(make):
    folder = make("a.nii")
    (folder / "cohort.csv").write_text("id,t1,malp_em\n1000,1000/T1.nii.gz,x\nsub-A7,a.nii,\n,b.nii,\nnone,,\n")
    (folder / "cohort.tsv").write_text("t1\tid\na.nii\t1000\n")
    found = find([f"@{folder}/cohort.csv"])
    assert [(str(scan.path.relative_to(folder)), scan.name, scan.row) for scan in found.scans] == [
        ("1000/T1.nii.gz", "sub-1000_T1w.nii.gz", "row 2 of cohort.csv"),
        ("a.nii", "sub-A7_T1w.nii.gz", "row 3 of cohort.csv"),
        ("b.nii", "b.nii", "row 4 of cohort.csv"),
    ]
    assert found.lists == [folder / "cohort.csv"] and not found.refused
    assert find([f"@{folder}/cohort.tsv"]).scans[0].name == "sub-1000_T1w.nii.gz"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "subject,image\n1,x.nii\n", "'t1' is missing"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", 'id,t1\n1,a.nii\n"2,b.nii\n3,c.nii\n', "row 3 of a.csv has a stray quote"),
        ("a.csv", "id,t1\n1,a.nii\n2,a.nii\n", "row 2 of a.csv and row 3 of a.csv are one file with two ids"),
        ("a.txt", "# nothing\n\n", "names no scans"),
        (
            "a.txt",
            "nowhere/a.nii\nb.nii\nc.nii\nd.nii\n",
            r"(?s)none of the inputs exists.*no folder .*nowhere.*1 more",
        ),
    ],
)
def test_A40_a_list_that_cannot_be_used_is_an_error(make, name, text, message):
    folder = make("a.nii")
    (folder / name).write_text(text)
    with pytest.raises(NeuronetError, match=message):
        find([f"@{folder}/{name}"])


def test_A40_a_bad_id_is_refused_alone_and_names_its_row(make):
    folder = make("a.nii", "b.nii")
    (folder / "a.csv").write_text("id,t1\n../1,a.nii\n2,b.nii\n")
    scans, (refused,), _ = find([f"@{folder}/a.csv"])
    assert [scan.name for scan in scans] == ["sub-2_T1w.nii.gz"]
    assert refused.code == "E_ID" and "the id in row 2 of a.csv" in refused.reason and refused.path == folder / "a.nii"


def test_a_list_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(NeuronetError, match=r"cannot read .*heads\.txt"):
        find([f"@{tmp_path}/heads.txt"])
