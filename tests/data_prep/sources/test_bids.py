"""A BIDS dataset, and the real cohort by all three ways."""

import csv
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep import build as build_module
from data_prep.sources.bids import read_dataset
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.reader import Store

SMALL = ["--voxel-size-mm=4", "--grid=48,56,48", "--workers=0"]


def describe(root: Path, kind: str = "raw", tool: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"Name": "test", "BIDSVersion": "1.10.0", "DatasetType": kind}
    if tool:
        content["GeneratedBy"] = [{"Name": tool}]
    (root / "dataset_description.json").write_text(json.dumps(content))
    return root


def place(root: Path, sub: str, ses: str, rest: str, source: Path) -> Path:
    """Copies a file to its place in a dataset."""
    stem, folder = f"sub-{sub}", root / f"sub-{sub}"
    if ses:
        stem, folder = f"{stem}_ses-{ses}", folder / f"ses-{ses}"
    path = folder / "anat" / f"{stem}_{rest}{''.join(source.suffixes)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, path)
    return path


@pytest.fixture
def dataset(make_cohort, tmp_path):
    """Returns a dataset of three participants, one of them with two sessions, with derivatives of two tools."""
    raw = make_cohort(("1", "2", "3", "4"), protocols=("fsl_fast", "malp_em")).parent
    root = describe(tmp_path / "bids")
    fsl = describe(root / "derivatives" / "fsl", "derivative", "FSL")
    malp = describe(root / "derivatives" / "malpem", "derivative", "MALP-EM")
    for number, (sub, ses) in enumerate([("A1", "2"), ("A1", "3"), ("B2", ""), ("C3", "")]):
        place(root, sub, ses, "T1w", raw / str(number) / "T1.nii.gz")
        place(fsl, sub, ses, "seg-fslfast_dseg", raw / str(number) / "fsl_fast.nii.gz")
        place(malp, sub, ses, "seg-malpem_dseg", raw / str(number) / "malp_em.nii.gz")
    return root


def test_sessions_are_visits_and_maps_come_from_the_derivatives(dataset, build, tmp_path, make_cohort):
    assert build_module.main([f"--bids={dataset}", f"--store={tmp_path / 'of_bids'}", *SMALL]) == 0
    _, same = build(make_cohort(("1", "2", "3", "4"), protocols=("fsl_fast", "malp_em")), "of_manifest")
    store = Store.open(tmp_path / "of_bids")
    assert [row.name for row in store.subjects] == ["A1_ses-2", "A1_ses-3", "B2", "C3"]
    assert store.subjects[0].split == store.subjects[1].split
    for slot in range(4):
        np.testing.assert_array_equal(store.read_image(slot), same.read_image(slot))
        np.testing.assert_array_equal(
            store.read_labels(slot, store.info.protocols), same.read_labels(slot, same.info.protocols)
        )


def test_doubtful_files_are_left_out_or_refuse_their_session(dataset, tmp_path, caplog):
    fsl, raw = dataset / "derivatives" / "fsl", tmp_path / "raw"
    ours = describe(dataset / "derivatives" / "neuronet", "derivative", "NeuroNet-JAX")
    for sub, name in (("B2", "fslfirst"), ("B2", "fslfast")):
        place(ours, sub, "", f"seg-{name}_dseg", raw / "0" / "fsl_fast.nii.gz")
    place(fsl, "B2", "", "space-MNI152NLin6Asym_seg-spmtissue_dseg", raw / "0" / "fsl_fast.nii.gz")
    place(dataset, "B2", "", "T2w", raw / "0" / "T1.nii.gz")
    place(dataset, "C3", "", "run-2_T1w", raw / "0" / "T1.nii.gz")
    place(fsl, "A1", "3", "desc-again_seg-fslfast_dseg", raw / "0" / "fsl_fast.nii.gz")
    first, second, b, c = read_dataset(dataset)
    assert "neuronet holds results of this program" in caplog.text
    assert set(b.labels) == {"fsl_fast", "malp_em"} and b.problem is None and first.problem is None
    assert c.problem and c.problem[0] == "E_DUPLICATE" and "2 T1-weighted scans" in c.problem[1]
    assert second.problem and "several maps of fsl_fast" in second.problem[1]


def test_files_beside_the_scans_and_maps_are_neither(dataset, tmp_path):
    """Notes, tables of labels, scans that a pipeline derived, and probabilities of a protocol's classes."""
    fsl, nifti = dataset / "derivatives" / "fsl", tmp_path / "raw" / "0" / "T1.nii.gz"
    note, names = tmp_path / "note.txt", tmp_path / "names.tsv"
    note.touch()
    names.write_text("index\tname\n")
    beside = [
        place(dataset, "B2", "", "T1w", note),
        place(fsl, "B2", "", "desc-preproc_T1w", nifti),
        place(fsl, "B2", "", "seg-fslfast_dseg", names),
        place(fsl, "B2", "", "seg-fslfast_probseg", nifti),
        place(fsl, "B2", "", "seg-aparc_dseg", nifti),
    ]
    (source,) = (source for source in read_dataset(dataset) if source.id == "B2")
    assert source.problem is None and set(source.labels) == {"fsl_fast", "malp_em"}
    assert not {source.t1, *source.labels.values()} & set(beside)


@pytest.mark.parametrize("space", ["T1w", "orig"])
def test_a_map_in_the_space_of_the_scan_is_taken(dataset, space):
    (found,) = (dataset / "derivatives" / "fsl").rglob("sub-B2_*dseg.nii.gz")
    found.rename(found.with_name(found.name.replace("sub-B2_", f"sub-B2_space-{space}_")))
    (source,) = (source for source in read_dataset(dataset) if source.id == "B2")
    assert set(source.labels) == {"fsl_fast", "malp_em"}


def test_participants_that_differ_in_case_alone_are_refused(dataset, tmp_path):
    place(dataset, "b2", "", "T1w", tmp_path / "raw" / "0" / "T1.nii.gz")
    with pytest.raises(NeuronetError, match="E_ID: the ids in rows 3 and 5 differ only in upper and lower case"):
        read_dataset(dataset)


def test_a_dataset_that_does_not_say_what_it_is_counts_as_raw(dataset):
    """That is the rule of BIDS. An id must be of letters and digits, as everywhere."""
    (dataset / "dataset_description.json").write_text('{"Name": "test", "BIDSVersion": "1.0.0"}')
    assert len(read_dataset(dataset)) == 4
    (dataset / "dataset_description.json").write_text("{")
    with pytest.raises(NeuronetError, match=r"dataset_description\.json cannot be read"):
        read_dataset(dataset)


@pytest.mark.parametrize("place", ["", "derivatives/fsl"])
def test_a_description_that_is_no_object_is_refused(dataset, tmp_path, capsys, place):
    """Neither a raw dataset nor one of derivatives: nobody can tell which program made it."""
    described = dataset / place / "dataset_description.json"
    described.write_text('["Name", "test"]')
    assert build_module.main([f"--bids={dataset}", f"--store={tmp_path / 'store'}", *SMALL]) == 1
    assert f'{described} must hold an object {{…}}, not ["Name", "test"]: correct it' in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_mgz_maps_are_taken(dataset, tmp_path):
    for path in (dataset / "derivatives" / "malpem").rglob("*.nii.gz"):
        image = nib.Nifti1Image.from_filename(path)
        voxels: Any = np.asarray(image.dataobj)
        nib.MGHImage(voxels, image.affine).to_filename(path.with_name(path.name.replace(".nii.gz", ".mgz")))
        path.unlink()
    assert build_module.main([f"--bids={dataset}", f"--store={tmp_path / 'store'}", *SMALL]) == 0
    assert all(row.present == (True, True) for row in Store.open(tmp_path / "store").subjects)


def test_what_is_no_dataset_is_named(dataset, tmp_path, monkeypatch):
    with pytest.raises(NeuronetError, match=r"dataset_description\.json cannot be read"):
        read_dataset(tmp_path)
    with pytest.raises(NeuronetError, match="is no raw BIDS dataset"):
        read_dataset(dataset / "derivatives" / "fsl")
    with pytest.raises(NeuronetError, match="has no sub-"):
        read_dataset(describe(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "bids2table", None)
    with pytest.raises(NeuronetError, match=r"pip install 'neuronet-jax\[bids\]'"):
        read_dataset(dataset)


@pytest.mark.parametrize("brains", [2, pytest.param(15, marks=pytest.mark.soak)])
def test_the_real_cohort_is_the_same_by_all_three_ways(real_data, tmp_path, brains):
    """Real brains at 2 mm, as a manifest, a BIDS dataset, and zips of UK Biobank with SPM and MALP-EM aside."""
    folder = real_data / "cohort"
    with (folder / "cohort.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:brains]
    root = describe(tmp_path / "bids")
    tools = describe(root / "derivatives" / "tools", "derivative", "tools")
    (tmp_path / "ukb").mkdir()
    with (tmp_path / "cohort.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "t1", *PROTOCOLS])
        writer.writeheader()
        for row in rows:
            files = {name: folder / row[name] for name in ("t1", *PROTOCOLS)}
            writer.writerow({"id": row["id"], **files})
            place(root, row["id"], "", "T1w", files["t1"])
            for name in PROTOCOLS:
                place(tools, row["id"], "", f"seg-{name.replace('_', '')}_dseg", files[name])
            with zipfile.ZipFile(tmp_path / "ukb" / f"{row['id']}_20252_2_0.zip", "w") as archive:
                archive.write(files["t1"], "T1/T1.nii.gz")
                archive.write(files["fsl_fast"], "T1/T1_fast/T1_brain_seg.nii.gz")
                archive.write(files["fsl_first"], "T1/T1_first/T1_first_all_fast_firstseg.nii.gz")
    aside = {"spm": "T1_brain_seg_spm", "malp-em": "T1_MALPEM", "malp-em-tissue": "T1_MALPEM_tissues"}
    ways = {
        "manifest": [f"--manifest={tmp_path / 'cohort.csv'}"],
        "bids": [f"--bids={root}"],
        "ukb": [f"--ukb={tmp_path / 'ukb'}"],
    }
    ways["ukb"] += [f"--{tool}={folder}/{{eid}}/{name}.nii.gz" for tool, name in aside.items()]
    hashes = {}
    for name, options in ways.items():
        store = tmp_path / f"of_{name}"
        assert build_module.main([*options, f"--store={store}", "--voxel-size-mm=2", "--workers=0"]) == 0
        opened = Store.open(store)
        assert opened.info.protocols == tuple(PROTOCOLS) and all(all(row.present) for row in opened.subjects)
        hashes[name] = [(row.id, row.content_hash) for row in opened.subjects]
        assert len(hashes[name]) == brains
    assert hashes["manifest"] == hashes["bids"] == hashes["ukb"]
