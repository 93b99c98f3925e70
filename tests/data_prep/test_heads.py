"""Painted heads from label maps, and brains put into them."""

import dataclasses
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep import heads
from data_prep.heads import around, build_heads, taught
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.reader import Store
from neuronet_jax.store.writer import StoreWriter
from neuronet_jax.tissues import AIR, NUMBER, in_brain, to_tissues

GRID = (48, 64, 48)  # of 4 mm
SKIN, BONE, CSF = 511, 515, 24


def ball(radius: float, shape: tuple[int, ...] = GRID, centre: tuple[float, ...] | None = None) -> np.ndarray:
    """Tells which voxels lie within `radius` voxels of the centre."""
    middle = np.array(centre or [(side - 1) / 2 for side in shape]).reshape(3, 1, 1, 1)
    return ((np.indices(shape) - middle) ** 2).sum(axis=0) <= radius**2


def head_map(brain_radius: float = 12, centre: tuple[float, ...] | None = None) -> np.ndarray:
    """Returns the ids of a round head: white matter, cortex, CSF, bone, skin; the right thalamus is a small ball."""
    ids = np.zeros(GRID, np.int16)
    for id_, margin in ((SKIN, 7), (BONE, 4), (CSF, 2), (3, 0), (2, -3)):
        ids[ball(brain_radius + margin, centre=centre)] = id_
    ids[ball(2, centre=tuple(c + 4 for c in centre or (23.5, 31.5, 23.5)))] = 49
    return ids


@pytest.fixture
def maps(tmp_path: Path) -> list[Path]:
    paths = []
    for number, radius in enumerate((12, 13, 11)):
        path = tmp_path / f"map{number}.nii.gz"
        nib.save(nib.Nifti1Image(head_map(radius)[::-1], np.diag([-4.0, 4, 4, 1])), path)  # stored left-right reversed
        paths.append(path)
    return paths


def test_a_store_of_maps_holds_their_tissues_and_teaches_first_and_the_merged_tissues(
    maps: list[Path], tmp_path: Path
) -> None:
    assert build_heads(maps, str(tmp_path / "store"), validation=1, voxel_size_mm=4.0) == 3
    store = Store.open(str(tmp_path / "store"))
    assert store.info.painted and store.info.protocols == ("fsl_first", "malp_em_tissue")
    assert [subject.split for subject in store.subjects] == ["train", "train", "validation"]
    ids = head_map(12)
    np.testing.assert_array_equal(store.read_image(0), -to_tissues(ids).astype(np.float32))
    first, tissue = store.read_labels(0, store.info.protocols)
    thalamus = next(s for s in PROTOCOLS["fsl_first"].structures if s.name == "RightThalamusProper")
    np.testing.assert_array_equal(first == thalamus.index, ids == 49)
    assert not first[ids != 49].any()
    for id_, merged in ((2, 4), (3, 3), (49, 2), (CSF, 0), (BONE, 0), (SKIN, 0), (0, 0)):
        assert set(np.unique(tissue[ids == id_])) == {merged}


def test_what_a_map_teaches_is_what_malp_em_merges() -> None:
    """Each of FIRST's structures belongs to the same tissue in both tables."""
    malp_em = {s.name: s.tissue for s in PROTOCOLS["malp_em"].structures}
    first = PROTOCOLS["fsl_first"]
    ids = first.ids[1:].reshape(-1, 1, 1)
    classes = taught(to_tissues(ids), ids)
    np.testing.assert_array_equal(classes["fsl_first"].ravel(), np.arange(1, first.num_classes))
    assert classes["malp_em_tissue"].ravel().tolist() == [malp_em[s.name] for s in first.structures[1:]]


@pytest.mark.parametrize("radius", [9, 12, 15])
def test_the_head_is_stretched_to_the_brain_that_is_put_into_it(radius: int) -> None:
    """A round brain of any size and place ends up in skull and skin of the same shape, at distances in proportion."""
    brain = np.where(ball(radius, centre=(20, 30, 24)), np.float32(0.8), np.float32(0))
    brain[ball(3, centre=(20, 30, 24))] = 0  # a ventricle that stripping left empty
    painted = around(brain, to_tissues(head_map(12)))
    scanned = brain > 0
    np.testing.assert_array_equal(painted[scanned], brain[scanned])
    outside = np.rint(np.maximum(-painted, 0)).astype(int)
    assert outside[~scanned].all() and not in_brain(outside).any()  # a tissue each, none of the map's own brain
    distance = np.sqrt(((np.indices(GRID) - np.reshape((20, 30, 24), (3, 1, 1, 1))) ** 2).sum(axis=0))
    bone = distance[(outside == NUMBER["compact bone"])]
    assert abs(bone.min() - radius * 14 / 12) < 1.6 and abs(bone.max() - radius * 16 / 12) < 1.6  # of CSF, of bone
    assert (outside[distance > radius * 19 / 12 + 1.6] == AIR).all()
    assert (outside[(distance > radius) & (distance < radius + 0.5) & ~scanned] == NUMBER["CSF around the brain"]).all()


def test_brains_keep_their_voxels_and_labels_and_take_a_head_in_turn(
    maps: list[Path], tmp_path: Path, build_store: Any
) -> None:
    source, _ = build_store(str(tmp_path / "of"), ("train", "validation"), grid=GRID)
    fast = np.where(ball(8), 3, np.where(ball(11), 2, 0)).astype(np.uint8)
    image = np.where(ball(11), np.where(ball(8), 900, 600), 0).astype(np.float32)
    writer = StoreWriter.create(
        str(tmp_path / "brains"),
        protocols=("fsl_fast",),
        grid=GRID,
        voxel_size_mm=4.0,
        slots=2,
        shard_subjects=1,
        provenance={},
        chunk=16,
    )
    subjects = []
    for slot, subject in enumerate(source.subjects):
        row = dataclasses.replace(subject, present=(True,))
        points = np.argwhere(fast)[:1].repeat(2048, axis=0).astype(np.int16)
        writer.write_shard(slot, [heads.Record(image, fast[None], points, row)])
        subjects.append(row)
    writer.finalize(subjects, [])

    brains = Store.open(str(tmp_path / "brains"))
    count = build_heads(
        maps, str(tmp_path / "store"), brains=brains, heads_per_brain=3, validation=1, voxel_size_mm=4.0
    )
    store = Store.open(str(tmp_path / "store"))
    # Not the maps, which teach nothing of FAST's. Two heads are there to train in, and one to validate.
    assert count == 3
    assert {subject.id: subject.split for subject in store.subjects} == {
        "brain001head01": "train",
        "brain001head02": "train",
        "brain002head01": "validation",
    }
    a, b, kept = (store.read_image(slot) for slot in range(3))
    np.testing.assert_array_equal(kept, around(image / 900, to_tissues(head_map(11))))  # the last map
    np.testing.assert_allclose(a[fast > 0], image[fast > 0] / 900, rtol=1e-6)
    np.testing.assert_array_equal(store.read_labels(0, ("fsl_fast",))[0], fast)
    np.testing.assert_array_equal(a[fast > 0], b[fast > 0])
    assert (a != b).any()  # heads of two people


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: np.where(ids == SKIN, 999, ids), r"ids \[999\]"),
        (lambda ids: np.where(np.isin(ids, (2, 3, 49)), 0, ids), "holds no brain"),
    ],
)
def test_a_map_that_is_no_head_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "map.nii.gz"
    nib.save(nib.Nifti1Image(change(head_map()).astype(np.int16), np.diag([4.0, 4, 4, 1])), path)
    with pytest.raises(NeuronetError, match=message):
        build_heads([path], str(tmp_path / "store"), validation=0, voxel_size_mm=4.0)


def test_the_command_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert heads.main([f"--maps={tmp_path}", f"--store={tmp_path / 'store'}"]) == 1
    assert "needs a map to train on or more, got 0" in capsys.readouterr().err
