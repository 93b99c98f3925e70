"""The demo cohort: reproducible, legal, and shaped like heads."""

import csv
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage
from threadpoolctl import threadpool_limits

from data_prep.demo import cohort as demo
from data_prep.demo.atlas import load_atlas
from data_prep.demo.phantom import Lattice, _smallest_jacobian, draw_phantom
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import MALP_EM_TO_TISSUE, MALP_EM_VOLUMES_MM3, PROTOCOLS

SPACING_MM = 4.0  # coarse, for speed; the laws below hold at any spacing


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    return demo.make_demo_cohort(folder, train=4, validation=1, test=1, voxel_size_mm=SPACING_MM, workers=0)


@pytest.fixture(scope="module")
def rows(cohort: Path) -> list[dict[str, str]]:
    with cohort.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns voxels in RAS+ order, and their affine."""
    image = nib.as_closest_canonical(nib.Nifti1Image.from_filename(path))
    return np.asarray(image.dataobj), image.affine


def test_the_manifest_is_what_build_reads(cohort, rows):
    assert cohort.read_text().startswith("id,t1,fsl_fast,fsl_first,spm_tissue,malp_em,malp_em_tissue,split\n")
    assert [row["split"] for row in rows] == ["train"] * 4 + ["validation", "test"]
    assert all(row["id"].isalnum() for row in rows)
    for row in rows:
        for name, protocol in PROTOCOLS.items():
            assert Path(row[name]).name == protocol.filename
            assert (cohort.parent / row[name]).exists()


def test_the_same_seed_gives_the_same_bytes(cohort, tmp_path):
    folder = cohort.parent / "demo002"
    with threadpool_limits(1):  # workers get one thread each, but this process has all
        demo.write_subject(tmp_path / "same", 1, 0, SPACING_MM)
    demo.write_subject(tmp_path / "seed", 1, 1, SPACING_MM)
    demo.write_subject(tmp_path / "number", 2, 0, SPACING_MM)
    for path in folder.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes(), path.name
        for other in ("seed", "number"):
            assert (tmp_path / other / path.name).read_bytes() != path.read_bytes(), (other, path.name)


def test_every_label_is_legal_and_the_tissue_map_is_the_merge(cohort, rows):
    for row in rows:
        classes = {
            name: protocol.to_classes(load(cohort.parent / row[name])[0]) for name, protocol in PROTOCOLS.items()
        }
        for name in ("fsl_fast", "fsl_first", "spm_tissue", "malp_em_tissue"):
            assert len(np.unique(classes[name])) == PROTOCOLS[name].num_classes, name
        assert len(np.unique(classes["malp_em"])) >= 130
        np.testing.assert_array_equal(MALP_EM_TO_TISSUE[classes["malp_em"]], classes["malp_em_tissue"])


def test_images_and_maps_share_a_grid_and_state_their_origin(cohort, rows):
    orientations = set()
    for row in rows:
        images = [nib.Nifti1Image.from_filename(cohort.parent / row[name]) for name in ("t1", *PROTOCOLS)]
        orientations.add("".join(nib.orientations.aff2axcodes(images[0].affine)))
        for image in images:
            assert image.shape == images[0].shape
            np.testing.assert_array_equal(image.affine, images[0].affine)
            qform, sform = np.array(image.header.get_qform()), np.array(image.header.get_sform())
            np.testing.assert_allclose(qform, sform, atol=1e-3)
            assert b"demonstration" in image.header["descrip"].item()
    assert orientations == {"RAS", "LAS", "LPS", "PSR"}
    assert "demonstration" in (cohort.parent / "README.txt").read_text()


@pytest.mark.parametrize("name", ["malp_em", "fsl_first"])
def test_left_is_left_whatever_the_orientation(cohort, rows, name):
    protocol = PROTOCOLS[name]
    for row in rows:
        labels, affine = load(cohort.parent / row[name])
        classes = protocol.to_classes(labels)
        for structure in protocol.structures:
            here, there = (np.argwhere(classes == index) for index in (structure.index, structure.partner))
            if structure.side == "left" and len(here) and len(there):
                left_mm, right_mm = (apply_affine(affine, voxels.mean(axis=0))[0] for voxels in (here, there))
                assert left_mm < right_mm, structure.name


def test_large_structures_have_plausible_volumes(cohort, rows):
    volumes = []
    for row in rows:
        labels, affine = load(cohort.parent / row["malp_em"])
        volumes.append(np.bincount(labels.ravel(), minlength=139) * abs(np.linalg.det(affine[:3, :3])))
    large = MALP_EM_VOLUMES_MM3 > 4000
    ratio = np.mean(volumes, axis=0)[large] / MALP_EM_VOLUMES_MM3[large]
    assert ratio.min() > 0.5
    assert ratio.max() < 1.6


def test_the_input_is_a_head_not_a_brain(cohort, rows):
    for row in rows:
        image, affine = load(cohort.parent / row["t1"])
        brain = load(cohort.parent / row["fsl_fast"])[0] > 0
        voxel_ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        head = image > 0.25 * np.median(image[brain])
        assert 900 < brain.sum() * voxel_ml < 2200
        assert (head & ~brain).sum() > 0.5 * brain.sum()  # scalp, face, neck
        # outwards from the upper half of the brain come dark skull, bright scalp, then air
        spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
        outside_mm = np.asarray(ndimage.distance_transform_edt(~brain, sampling=spacing_mm))
        outside_mm[:, :, : int(np.argwhere(brain)[:, 2].mean())] = 0
        shells = [np.median(image[(outside_mm > mm) & (outside_mm <= mm + 2)]) for mm in range(2, 30, 2)]
        skull, scalp, air = min(shells[:3]), max(shells[3:7]), max(shells[10:])  # up to 8 mm, to 16 mm, beyond 22 mm
        assert skull < 0.6 * scalp
        assert air < 0.15 * scalp


def test_tissue_brightens_from_csf_to_grey_to_white(cohort, rows):
    for row in rows:
        image, tissue = load(cohort.parent / row["t1"])[0], load(cohort.parent / row["spm_tissue"])[0]
        csf, grey, white = (np.median(image[tissue == class_]) for class_ in (1, 2, 3))
        assert csf < 0.85 * grey
        assert grey < 0.9 * white


def test_the_tools_disagree_systematically(cohort, rows):
    for row in rows:
        fast, spm = (load(cohort.parent / row[name])[0] for name in ("fsl_fast", "spm_tissue"))
        dice = [2 * ((fast == c) & (spm == c)).sum() / ((fast == c).sum() + (spm == c).sum()) for c in (1, 2, 3)]
        assert 0.4 < min(dice) < 0.9
        assert max(dice) < 0.99


def test_bad_requests_are_refused(tmp_path):
    with pytest.raises(NeuronetError, match="at least one subject"):
        demo.make_demo_cohort(tmp_path, train=0, validation=0, test=0)
    with pytest.raises(NeuronetError, match=r"voxels of .* mm, got 8"):
        demo.make_demo_cohort(tmp_path, voxel_size_mm=8)
    assert list(tmp_path.iterdir()) == []


def test_a_fold_is_detected():
    knots = [np.arange(5.0) for _ in range(3)]
    grid = np.stack(np.meshgrid(*knots, indexing="ij"), axis=-1)
    assert _smallest_jacobian(2 * grid, knots) == pytest.approx(8)
    folded = grid.copy()
    folded[2, 2, 2, 0] = 4.5  # beyond its neighbour at 3
    assert _smallest_jacobian(folded, knots) < 0


def test_a_phantom_takes_seconds():
    atlas = load_atlas(SPACING_MM)
    lattice = Lattice((48, 56, 48), np.full(3, SPACING_MM), np.array([-94.0, -125.0, -95.0]))
    start = time.process_time()
    draw_phantom(np.random.default_rng(0), atlas, lattice)
    assert time.process_time() - start < 5  # on one core; about 0.5 here, and 3 at 2 mm


def test_the_store_is_built_once_and_never_partially(tmp_path, monkeypatch):
    calls = []

    def cohort_of_nothing(folder: Path, **options: object) -> Path:
        folder.mkdir(parents=True)
        return folder / "manifest.csv"

    def broken_build(manifest: Path, store: str, **options: object) -> None:
        Path(store).mkdir()
        calls.append(options["note"])
        if len(calls) == 1:
            raise OSError("disk full")
        (Path(store) / "COMPLETE").touch()

    monkeypatch.setattr(demo, "make_demo_cohort", cohort_of_nothing)
    monkeypatch.setattr(demo, "build", broken_build)
    with pytest.raises(OSError, match="disk full"):
        demo.ensure_demo_store(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store = demo.ensure_demo_store(tmp_path)
    assert demo.ensure_demo_store(tmp_path) == store
    assert calls == [demo.NOTE, demo.NOTE]
    assert [path.name for path in tmp_path.iterdir()] == [store.parent.name]
    (store / "COMPLETE").unlink()
    assert demo.ensure_demo_store(tmp_path) == store
    assert len(calls) == 3
    assert demo.demo_manifest(store).parent.is_dir()
