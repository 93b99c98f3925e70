import csv
import gzip
import json
import locale
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuronet_jax import __version__
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation import volumetry
from neuronet_jax.images import nifti
from neuronet_jax.images.headers import Limits
from neuronet_jax.images.space import Volume
from neuronet_jax.inference.segmentation import Options, Segmentation
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.results import bids, tables
from neuronet_jax.results.dataset import Dataset
from neuronet_jax.results.inputs import Scan
from neuronet_jax.results.write import write_results
from neuronet_jax.runs.provenance import Origin, Provenance

NAMES = ("fsl_fast", "malp_em", "malp_em_tissue")
OBLIQUE = np.array([[-1.3, 0.2, 0.1, 40], [0.3, 1.1, -0.4, -60], [0.1, 0.5, 1.9, -50], [0, 0, 0, 1]])


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _volume(path: Path, affine: np.ndarray = OBLIQUE, shape=(70, 80, 60)) -> Volume:
    data = np.random.default_rng(0).integers(1, 900, shape).astype(np.int16)
    image = nib.Nifti1Image(data, affine)
    image.header["descrip"] = b"/home/someone/participant 4711"
    image.set_qform(affine, code=1, strip_shears=True)
    image.set_sform(affine, code=3)
    nib.save(image, path)
    return nifti.read_image(path, Limits(fov_mm=(10, 600)))


def _maps(shape=(70, 80, 60)) -> dict[str, np.ndarray]:
    malp_em = np.zeros(shape, np.uint8)
    malp_em[10:60, 10:70, 10:50] = np.random.default_rng(1).integers(1, 139, (50, 60, 40))
    tissue = MALP_EM_TO_TISSUE[malp_em]
    return {"fsl_fast": np.minimum(tissue, 3), "malp_em": malp_em, "malp_em_tissue": tissue}


def _scans(*paths: Path) -> list[Scan]:
    return [Scan(path, path.name) for path in paths]


def _result(maps: dict[str, np.ndarray]) -> Segmentation:
    return Segmentation(maps, {}, {})


def prepare(out: Path, protocols: tuple[str, ...], provenance: Provenance, overwrite: bool) -> None:
    dataset = Dataset(out, protocols, provenance, overwrite)
    dataset.check()
    dataset.begin()


@pytest.fixture
def target(tmp_path) -> bids.Target:
    return bids.plan(_scans(tmp_path / "sub-01_ses-2_T1w.nii.gz"), tmp_path / "out", NAMES)[0]


@pytest.fixture
def written(tmp_path, target) -> tuple[Volume, dict[str, np.ndarray], tables.Row]:
    volume, maps = _volume(target.source), _maps()
    prepare(target.out, NAMES, Provenance((Origin("demo"),)), False)
    return volume, maps, write_results(target, volume, _result(maps), False, Provenance())


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("sub-01_T1w.nii.gz", "sub-01"),
        ("sub-01_ses-a_acq-mprage_run-2_T1w.nii", "sub-01_ses-a_acq-mprage_run-2"),
        ("sub-01_space-MNI_desc-preproc_T1w.nii.gz", "sub-01"),
        ("fnndsc_memprage.nii.gz", "sub-fnndscmemprage"),
        ("sub-a b_T1w.nii.gz", "sub-subabT1w"),
        ("../x;rm -rf.MGZ", "sub-xrmrf"),
        ("Kopfä.nii.gz", "sub-Kopf"),
    ],
)
def test_names_keep_bids_entities_or_become_alphanumeric(name, stem):
    assert bids._stem(name) == stem


def test_A40_a_name_without_letters_and_digits_is_refused(tmp_path):
    with pytest.raises(NeuronetError, match="E_ID"):
        bids.plan(_scans(tmp_path / "--.nii.gz"), tmp_path, NAMES)


def test_same_names_in_several_folders_are_told_apart(tmp_path):
    targets = bids.plan(_scans(tmp_path / "1000" / "T1.nii.gz", tmp_path / "1001" / "T1.nii.gz"), tmp_path, NAMES)
    assert [target.stem for target in targets] == ["sub-1000T1", "sub-1001T1"]
    with pytest.raises(NeuronetError, match="would both be named sub-01"):
        bids.plan(_scans(tmp_path / "a" / "sub-01_T1w.nii", tmp_path / "b" / "sub-01_T1w.nii"), tmp_path, NAMES)


def test_F02_header_of_a_label_map(target, written):
    volume, maps, _ = written
    for name, ids in maps.items():
        image = nib.Nifti1Image.from_filename(target.labels(name))
        header = image.header
        assert image.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(image.dataobj), ids)
        np.testing.assert_allclose(image.get_sform(), volume.affine, atol=1e-6)
        assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 3)
        assert header["cal_max"] == ids.max()
        raw = gzip.decompress(target.labels(name).read_bytes())
        slope, inter = np.frombuffer(raw[112:120], "<f4")
        assert (slope, inter) == (1, 0)
        assert b"/" not in bytes(header["descrip"]) and b"4711" not in raw
    assert target.folder == target.out / "sub-01" / "ses-2" / "anat"


def test_F07_the_same_scan_gives_the_same_bytes(tmp_path, target, written):
    volume, maps, row = written
    again = bids.plan(_scans(target.source), tmp_path / "again", NAMES)[0]
    prepare(again.out, NAMES, Provenance((Origin("demo"),)), False)
    assert write_results(again, volume, _result(maps), False, Provenance()) == row
    files = sorted(path.relative_to(target.out) for path in target.out.rglob("*") if path.is_file())
    assert (
        len(files) == 1 + 1 + 2 * 3 + 1 + 2 * 5 + 4
    )  # .bidsignore, description, look-up tables, maps, tables, page and thumbnail
    for file in files:
        assert (target.out / file).read_bytes() == (again.out / file).read_bytes()


def test_F08_gzip_is_deterministic_and_a_failed_write_leaves_no_file(target, written, monkeypatch):
    volume, maps, _ = written
    path = target.labels("malp_em")
    assert path.read_bytes()[4:8] == b"\0\0\0\0"  # mtime 0
    before = path.read_bytes()

    def fails(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nifti.Files, "write", fails)
    fresh = bids.Target(target.source, target.out, "sub-02")
    for place in (fresh, target):
        with pytest.raises(NeuronetError, match="No space left"):
            write_results(place, volume, _result(maps), True, Provenance())
    assert path.read_bytes() == before
    assert list(fresh.folder.glob("*.nii.gz*")) == []


def test_F08_a_killed_writer_leaves_whole_files_only(tmp_path):
    code = (
        "import numpy as np, nibabel as nib, sys; from neuronet_jax.images import nifti, space\n"
        "volume = space.Volume(np.zeros((160, 160, 160), np.float32), np.eye(4), nib.Nifti1Header())\n"
        "labels = np.random.default_rng(0).integers(0, 139, (160, 160, 160), np.uint8)\n"
        "for n in range(1000): nifti.write_labels(f'{sys.argv[1]}/{n}.nii.gz', labels, volume); print(n, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"0\n"
        time.sleep(0.05)  # somewhere within the next files
        writer.kill()
        writer.wait()
    files = list(tmp_path.glob("*.nii.gz"))
    assert len({gzip.decompress(file.read_bytes()) for file in files}) == 1


def test_F09_an_input_is_never_overwritten(target, written):
    label_map = target.labels("malp_em")
    link = label_map.parent / "sub-01_ses-2_T1w.nii.gz"
    link.symlink_to(label_map)
    with pytest.raises(NeuronetError, match="is an input and would be overwritten"):
        bids.plan(_scans(link), target.out, NAMES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_F09_a_read_only_folder_is_refused_before_the_network_runs(tmp_path):
    (tmp_path / "out").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(NeuronetError, match="cannot write"):
        prepare(tmp_path / "out", NAMES, Provenance(), False)


def test_F09_an_output_that_is_not_a_folder_is_refused_before_the_network_runs(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(NeuronetError, match="cannot write"):
        prepare(tmp_path / "out", NAMES, Provenance(), False)


def test_F09_results_of_different_datasets_or_models_are_not_mixed(tmp_path):
    prepare(tmp_path, NAMES, Provenance((Origin(step=1),)), False)
    prepare(tmp_path, NAMES, Provenance((Origin(step=1),)), False)
    with pytest.raises(NeuronetError, match="a different model"):
        prepare(tmp_path, NAMES, Provenance((Origin(step=2),)), False)
    prepare(tmp_path, NAMES, Provenance((Origin(step=2),)), True)
    (tmp_path / "dataset_description.json").write_text('{"Name": "my raw data", "BIDSVersion": "1.8.0"}')
    with pytest.raises(NeuronetError, match="a different dataset, 'my raw data'"):
        prepare(tmp_path, NAMES, Provenance(), True)


def test_F10_volumes_are_counts_times_the_determinant(target, written):
    volume, maps, _ = written
    voxel_mm3 = abs(np.linalg.det(OBLIQUE[:3, :3]))
    assert not np.isclose(voxel_mm3, np.prod(volume.spacing_mm))  # sheared: the product of the spacings would be wrong
    rows = _table(target.volumes)
    for name, ids in maps.items():
        mine = [row for row in rows if row["protocol"] == name]
        assert [int(row["index"]) for row in mine] == PROTOCOLS[name].ids.tolist()
        assert sum(int(row["voxels"]) for row in mine) == ids.size
        assert sum(float(row["volume_mm3"]) for row in mine) == pytest.approx(ids.size * voxel_mm3, rel=1e-6)
        assert float(mine[1]["volume_mm3"]) == pytest.approx(np.count_nonzero(ids == 1) * voxel_mm3, rel=1e-6)


def test_F10_tables_do_not_depend_on_the_locale():
    counts = volumetry.voxel_counts({"fsl_fast": np.ones((3, 3, 3), np.uint8)})
    expected = tables.volume_table(counts, np.diag([1.5, 1, 1, 1]))
    assert "\t27\t40.5\tn/a\tn/a\n" in expected
    saved = locale.setlocale(locale.LC_ALL)
    try:
        for name in ("de_DE.UTF-8", "C"):
            try:
                locale.setlocale(locale.LC_ALL, name)
            except locale.Error:
                continue
            assert tables.volume_table(counts, np.diag([1.5, 1, 1, 1])) == expected
    finally:
        locale.setlocale(locale.LC_ALL, saved)


def test_G06_look_up_tables_and_description(target, written):
    rows = _table(target.out / "seg-fslfast_dseg.tsv")
    assert list(rows[0]) == ["index", "name", "color", "mapping"]
    assert [(row["index"], row["name"], row["mapping"]) for row in rows[1:]] == [
        ("1", "CSF", "3"),  # BIDS' common ids count grey matter first
        ("2", "GM", "1"),
        ("3", "WM", "2"),
    ]
    assert all(len(row["color"]) == 7 and int(row["color"][1:], 16) >= 0 for row in rows)
    first = tables.label_table(PROTOCOLS["fsl_first"])
    assert "\n58\t" in first  # FIRST's own ids
    description = json.loads((target.out / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "NeuroNet-JAX"


def test_colours_for_viewers_are_those_of_the_label_tables(target, written):
    lines = (target.out / "seg-malpem_lut.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    assert len(rows) == 139 and rows[0] == ["0", "Background", "0", "0", "0", "0"]
    for (index, name, *color), s in zip(rows, PROTOCOLS["malp_em"].structures, strict=True):
        assert (int(index), name, tuple(map(int, color))) == (s.id, s.name, (*s.color, 0))


def test_posteriors_are_float32_on_the_grid_of_the_input(tmp_path, target):
    wanted = ("malp_em:LeftHippocampus", "malp_em:CerebellarVermalLobulesI-V")
    volume, maps = _volume(target.source), _maps()
    values = np.random.default_rng(0).random(volume.data.shape, np.float32)
    prepare(target.out, NAMES, Provenance(), False)
    write_results(target, volume, Segmentation(maps, {}, dict.fromkeys(wanted, values)), False, Provenance())
    names = sorted(path.name for path in target.folder.glob("*_probseg.*"))
    stem = "sub-01_ses-2_seg-malpem_label"
    assert names == [
        f"{stem}-{label}_probseg{suffix}"
        for label in ("CerebellarVermalLobulesIV", "LeftHippocampus")
        for suffix in (".json", ".nii.gz")
    ]
    image = nib.Nifti1Image.from_filename(target.posterior(wanted[0]))
    assert image.get_data_dtype() == np.float32 and image.header["cal_max"] == 1
    np.testing.assert_array_equal(np.asarray(image.dataobj), values)
    np.testing.assert_allclose(image.get_sform(), volume.affine, atol=1e-6)
    assert target.posterior(wanted[0]).read_bytes()[4:8] == b"\0\0\0\0"  # mtime 0
    link = target.folder / "sub-01_ses-2_T1w.nii.gz"
    link.symlink_to(target.posterior(wanted[1]))
    with pytest.raises(NeuronetError, match="is an input and would be overwritten"):
        bids.plan(_scans(link), target.out, (), wanted)


def test_sidecars_state_the_origin_of_the_map(tmp_path, target):
    volume = replace(_volume(target.source), warnings=("W_NAN", "W_OBLIQUE"))
    members = tuple(Origin("tissue", weights_sha256=digest, note="synthetic") for digest in ("aa", "bb"))
    provenance = Provenance(members, options=Options(flip=True).changed())
    prepare(target.out, NAMES, provenance, False)
    write_results(target, volume, _result(_maps()), False, provenance)
    sidecar = json.loads(target.labels("malp_em").with_name("sub-01_ses-2_seg-malpem_dseg.json").read_text())
    assert sidecar["WeightsSHA256"] == ["aa", "bb"] and sidecar["Note"] == "synthetic"
    assert sidecar["Version"] == __version__ and sidecar["LabelTableSHA256"] == PROTOCOLS["malp_em"].version
    assert sidecar["Repairs"] == ["Some voxels were NaN or infinite and were set to 0."]
    description = json.loads((target.out / "dataset_description.json").read_text())["GeneratedBy"][0]["Description"]
    assert json.loads(description)["flip"] is True
    assert json.loads(description)["label_tables_sha256"]["fsl_fast"] == PROTOCOLS["fsl_fast"].version
    with pytest.raises(NeuronetError, match="a different model"):  # results of different options are not mixed either
        prepare(target.out, NAMES, Provenance(members), False)


def test_G06_the_tree_passes_the_bids_validator(target, written):
    validator = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if validator is None:
        pytest.skip("needs bids-validator-deno, as the dev extra brings it")
    tables.write_text(target.out / "summary.tsv", tables.summary_table([written[2]]))
    found = subprocess.run([validator, "--json", str(target.out)], capture_output=True, text=True, check=False)
    issues = json.loads(found.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
