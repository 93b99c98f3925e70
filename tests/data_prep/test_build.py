"""From files to a finished store, with every fault injected into files that the real build reads."""

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data_prep import shard, subject, verify
from data_prep.assemble import default_grid
from data_prep.build import build as build_store
from data_prep.build import main
from data_prep.outcome import summary
from neuronet_jax.codes import explain
from neuronet_jax.errors import NeuronetError
from neuronet_jax.images.headers import Limits
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

GRID = (48, 56, 48)


def only_reject(report) -> str:
    (reject,) = report.rejects
    assert reject.id == "1002"
    return reject.code


def only_warnings(store: Store) -> tuple[str, ...]:
    """Returns the warnings of the second subject; the others must have none."""
    assert all(not row.warnings for row in store.subjects if row.id != "1002")
    (row,) = (row for row in store.subjects if row.id == "1002")
    return row.warnings


def test_the_store_holds_the_conformed_subjects(make_cohort, build, brain):
    report, store = build(make_cohort(splits=("train", "validation", "test")))
    assert report.subjects == {"train": 1, "validation": 1, "test": 1}
    assert report.rejects == ()
    assert report.warnings == {}
    assert store.info.protocols == tuple(PROTOCOLS)
    assert store.info.grid == GRID
    origin = (-4, -4, -4)  # (48, 56, 48) around (40, 48, 40)
    inside = (slice(4, 44), slice(4, 52), slice(4, 44))
    for slot, row in enumerate(store.subjects):
        image, labels = store.read_image(slot), store.read_labels(slot, store.info.protocols)
        expected = np.zeros(GRID, np.float32)
        expected[inside] = brain.head(slot)
        np.testing.assert_array_equal(image, expected)
        for index, (name, protocol) in enumerate(PROTOCOLS.items()):
            expected = np.zeros(GRID, np.uint8)
            expected[inside] = protocol.to_classes(brain.ids(name))
            np.testing.assert_array_equal(labels[index], expected)
        assert (row.slot, row.id, row.origin, row.conformed_shape) == (slot, f"100{slot + 1}", origin, brain.shape)
        assert row.present == (True,) * 5
        assert row.mean == pytest.approx(brain.head(slot).mean())  # before padding
        assert row.std == pytest.approx(brain.head(slot).std())
        np.testing.assert_array_equal(row.source_affine, brain.affine)
        np.testing.assert_array_equal(np.array(row.affine)[:3, 3], brain.affine[:3, 3] - 16)
        points = store.read_foreground(slot)
        assert labels[(slice(None), *points.T)].any(axis=0).all()


def test_default_grids_hold_a_head_in_multiples_of_16():
    assert default_grid(1.0) == (192, 224, 192)
    assert default_grid(2.0) == (96, 112, 96)
    assert default_grid(1.5) == (128, 160, 128)


def test_A01_A02_A03_damaged_files_are_rejected_and_leave_no_voxels(make_cohort, build, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "_RETRY_AFTER_S", (1000,))  # they are not waited for
    manifest = make_cohort(("1001", "1002", "1003", "1004"))
    truncated, flipped, html = (manifest.parent / str(slot) / "T1.nii.gz" for slot in (0, 1, 2))
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    content = bytearray(flipped.read_bytes())
    content[-6] ^= 1
    flipped.write_bytes(content)
    html.write_text("<html>")
    report, store = build(manifest, shard_subjects=1)
    assert report.rejected == {"E_TRUNCATED": 1, "E_CRC": 1, "E_FORMAT": 1}
    assert [row.slot for row in store.subjects] == [3]
    for slot in range(3):
        with pytest.raises(StoreError, match="E_SHARD_MISSING"):
            store.read_image(slot)
    rejects = (tmp_path / "store" / "rejects.tsv").read_text().splitlines()
    assert [line.split("\t")[:2] for line in rejects[1:]] == [
        ["1001", "E_TRUNCATED"],
        ["1002", "E_CRC"],
        ["1003", "E_FORMAT"],
    ]


def edit(path: Path, content: bytes = b"", **fields: Any) -> None:
    """Overwrites fields of a scan's header behind nibabel's back, and appends `content`."""
    data = gzip.decompress(path.read_bytes())
    header: Any = nib.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(gzip.compress(header.binaryblock + data[348:], 1) + content)


def bomb() -> bytes:
    """Returns 256 MiB of zeros in 1 MB or less, as members of a gzip file."""
    return gzip.compress(bytes(2**24), 9) * 16


ROWS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "A04": ("E_HEADER_SIZE", lambda path: edit(path, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1], datatype=64, bitpix=64)),
    "A05": ("E_TRAILING", lambda path: edit(path, bomb())),
    "A06": ("E_HEADER", lambda path: edit(path, bitpix=7)),
    "A07 frames": ("E_NDIM", lambda path: edit(path, dim=[4, 40, 48, 20, 2, 1, 1, 1])),
    "A07 plane": ("E_NDIM", lambda path: edit(path, dim=[2, 40, 1920, 1, 1, 1, 1, 1])),
    "A07 colours": ("E_DTYPE", lambda path: edit(path, datatype=128, bitpix=24)),
    "A09": ("E_NO_XFORM", lambda path: edit(path, sform_code=0, qform_code=0)),
    "A10": ("E_AFFINE", lambda path: edit(path, srow_x=[np.nan, 0, 0, 80])),
    "A11": ("E_ZOOM", lambda path: edit(path, pixdim=[1, 4.01, 4, 4, 0, 0, 0, 0], qform_code=0)),
    "A12": ("E_UNITS", lambda path: edit(path, xyzt_units=3)),
    "A16": ("E_SCALE", lambda path: edit(path, scl_slope=1, scl_inter=np.inf)),
    "A34 folder": ("E_FORMAT", lambda path: (path.unlink(), path.mkdir())),
    "A34 pair": ("E_FORMAT", lambda path: edit(path, magic=b"ni1")),
}


def test_A04_to_A16_and_A34_a_scan_that_cannot_be_trusted_is_rejected_alone(make_cohort, build, tmp_path):
    """Each fault in one scan of one cohort: every other scan is stored, and nobody waits or runs out of memory."""
    names = tuple(str(1001 + number) for number in range(len(ROWS) + 2))
    manifest = make_cohort(names, protocols=("fsl_fast",))
    for number, (_, damage) in enumerate(ROWS.values(), start=1):
        damage(manifest.parent / str(number) / "T1.nii.gz")
    tracemalloc.start()
    report, store = build(manifest, shard_subjects=4)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [reject.code for reject in report.rejects] == [code for code, _ in ROWS.values()]
    assert [row.id for row in store.subjects] == [names[0], names[-1]]
    assert most < 2**26  # four records and their compressed shard take 40 MB; the bomb and the huge header would more
    assert list(verify.verify(str(tmp_path / "store"))) == []


def test_A08_A09_A14_A16_A17_doubtful_files_are_taken_as_the_options_say(make_cohort, build, brain):
    manifest = make_cohort(tuple(str(1001 + number) for number in range(5)), protocols=("fsl_fast",))
    scans = [manifest.parent / str(number) / "T1.nii.gz" for number in range(5)]
    edit(scans[0], qoffset_x=-73, qform_code=1)
    edit(scans[1], sform_code=0, qform_code=0)
    edit(scans[2], scl_slope=2, scl_inter=5)
    edit(manifest.parent / "3" / "fsl_fast.nii.gz", scl_slope=1.0001, scl_inter=0)  # of 3, 0.0003 too much
    edit(manifest.parent / "4" / "fsl_fast.nii.gz", scl_slope=0.9, scl_inter=0)
    report, store = build(manifest)
    assert [(reject.id, reject.code) for reject in report.rejects] == [
        ("1002", "E_NO_XFORM"),
        ("1005", "E_LABEL_FLOAT"),
    ]
    by_id = {row.id: row for row in store.subjects}
    assert by_id["1001"].warnings == ("W_XFORM",) and by_id["1003"].warnings == by_id["1004"].warnings == ()
    np.testing.assert_array_equal(store.read_image(2)[4:44, 4:52, 4:44], brain.head(2) * np.float32(2) + 5)
    limits = Limits(transform="reject", assume_ras=True)
    report, store = build(manifest, "strict", limits=limits, resample_labels=True)
    assert [(reject.id, reject.code) for reject in report.rejects] == [("1001", "E_XFORM"), ("1005", "E_LABEL_FLOAT")]
    assert "W_LR_UNSAFE" in {row.id: row for row in store.subjects}["1002"].warnings


@pytest.mark.parametrize("codes", ["LAS", "LPS", "PSR"])
def test_A13_orientation_leaves_no_trace(make_cohort, build, brain, codes):
    manifest = make_cohort()
    _, store = build(manifest, "ras")
    ornt = nib.orientations
    turn = ornt.ornt_transform(ornt.axcodes2ornt("RAS"), ornt.axcodes2ornt(codes))
    for path in (manifest.parent / "1").iterdir():
        turned = ornt.apply_orientation(brain.read(path), turn)
        brain.write(path, turned, brain.affine @ ornt.inv_ornt_aff(turn, brain.shape))
    _, other = build(manifest, codes)
    np.testing.assert_allclose(other.read_image(1), store.read_image(1), atol=1e-6)
    np.testing.assert_array_equal(other.read_labels(1, PROTOCOLS), store.read_labels(1, PROTOCOLS))
    np.testing.assert_allclose(other.subjects[1].affine, store.subjects[1].affine)
    assert only_warnings(other) == ()


def test_A15_big_endian_files_give_the_same_store(make_cohort, build, brain):
    manifest = make_cohort()
    _, store = build(manifest, "little")
    for path in (manifest.parent / "1").iterdir():
        swapped = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
        voxels: Any = np.asarray(swapped.dataobj)
        nib.Nifti1Image(voxels, None, swapped.header.as_byteswapped(">")).to_filename(path)
    assert gzip.decompress(path.read_bytes())[:4] == b"\0\0\x01\x5c"
    _, other = build(manifest, "big")
    assert other.subjects == store.subjects  # with the hashes of the voxels


def test_A18_unknown_labels_are_rejected(make_cohort, build, brain):
    manifest = make_cohort()
    for bad in (200, -1, 70000):
        path = manifest.parent / "1" / "malp_em.nii.gz"
        labels = brain.malp_em.astype(np.int32)
        labels[20, 20, 20] = bad
        brain.write(path, labels)
        report, _ = build(manifest, f"store{bad}")
        assert only_reject(report) == "E_LABEL_SET"
        assert str(bad) in report.rejects[0].reason
        assert "malp_em map" in report.rejects[0].reason


def test_A19_a_missing_structure_is_noted(make_cohort, build, brain):
    manifest = make_cohort()
    brain.write(
        manifest.parent / "1" / "fsl_first.nii.gz", np.where(brain.ids("fsl_first") == 26, 0, brain.ids("fsl_first"))
    )
    report, store = build(manifest)
    assert only_warnings(store) == ("W_LABEL_MISSING",)
    assert report.warnings == {"W_LABEL_MISSING": 1}


def test_A20_an_empty_map_is_rejected(make_cohort, build, brain):
    manifest = make_cohort()
    brain.write(manifest.parent / "1" / "spm_tissue.nii.gz", np.zeros(brain.shape, np.uint8))
    assert only_reject(build(manifest)[0]) == "E_LABEL_EMPTY"


def test_A21_missing_maps_keep_the_subject_or_reject_it(make_cohort, build):
    """By default the subject is kept: the other maps still train, and `present` excludes the missing one.

    In UK Biobank, FIRST alone fails for some per cent of the scans, often in atrophied brains that matter most.
    """
    manifest = make_cohort()
    manifest.write_text(manifest.read_text().replace("1/fsl_first.nii.gz", ""))
    _, store = build(manifest, "kept")
    assert store.subjects[1].present == (True, False, True, True, True)
    assert only_warnings(store) == ("W_MISSING_MAP",)
    assert not store.read_labels(1, ("fsl_first",)).any()
    assert only_reject(build(manifest, "rejected", missing="reject")[0]) == "E_MISSING_MAP"


def test_A21_no_map_at_all_is_rejected(make_cohort, build):
    manifest = make_cohort()
    lines = manifest.read_text().splitlines()
    lines[2] = "1002,1/T1.nii.gz,,,,,,train"
    manifest.write_text("\n".join(lines))
    assert only_reject(build(manifest)[0]) == "E_MISSING_MAP"


def test_A22_a_different_geometry_is_rejected_or_resampled(make_cohort, build, brain):
    manifest = make_cohort(protocols=("malp_em",))
    path = manifest.parent / "1" / "malp_em.nii.gz"
    moved = brain.affine.copy()
    moved[0, 3] += 1
    brain.write(path, brain.malp_em, moved)
    assert only_reject(build(manifest, "affine")[0]) == "E_GEOMETRY"
    brain.write(path, brain.malp_em[:-1])
    assert only_reject(build(manifest, "shape")[0]) == "E_GEOMETRY"
    padded = brain.affine.copy()
    padded[:3, 3] -= 4 * np.array([2, 2, 2])
    brain.write(path, np.pad(brain.malp_em, 2), padded)
    _, store = build(manifest, "resampled", resample_labels=True)
    assert only_warnings(store) == ("W_RESAMPLED",)
    np.testing.assert_array_equal(store.read_labels(1, ("malp_em",)), store.read_labels(0, ("malp_em",)))


@pytest.mark.parametrize("protocol", ["malp_em", "fsl_first"])
def test_A23_labels_mirrored_against_the_image(make_cohort, build, brain, protocol):
    manifest = make_cohort(protocols=(protocol,))
    brain.write(manifest.parent / "1" / f"{protocol}.nii.gz", brain.ids(protocol)[::-1])
    assert only_warnings(build(manifest)[1]) == ("W_LR_SWAP",)


def test_tissues_that_are_not_the_merge_of_the_structures(make_cohort, build, brain):
    manifest = make_cohort()
    # the swap in the reference implementation's comments
    tissue = np.array([0, 1, 2, 4, 3, 5], np.uint8)[brain.ids("malp_em_tissue")]
    brain.write(manifest.parent / "1" / "malp_em_tissue.nii.gz", tissue)
    assert only_warnings(build(manifest)[1]) == ("W_TISSUE_MISMATCH",)


def test_A24_nan_voxels(make_cohort, build, brain):
    manifest = make_cohort()
    image = brain.head(1).astype(np.float32)
    image[:3, 0, 0] = np.nan
    brain.write(manifest.parent / "1" / "T1.nii.gz", image)
    _, store = build(manifest, "few")
    assert only_warnings(store) == ("W_NAN",)
    assert np.isfinite(store.read_image(1)).all()
    brain.write(manifest.parent / "1" / "T1.nii.gz", np.full(brain.shape, np.nan, np.float32))
    assert only_reject(build(manifest, "all")[0]) == "E_NAN"


@pytest.mark.parametrize("value", [0, 7])
def test_A25_constant_images_are_rejected(make_cohort, build, brain, value):
    manifest = make_cohort()
    brain.write(manifest.parent / "1" / "T1.nii.gz", np.full(brain.shape, value, np.int16))
    assert only_reject(build(manifest)[0]) == "E_CONSTANT"


def test_A26_one_spike_does_not_ruin_the_whitening(make_cohort, build, brain):
    manifest = make_cohort()
    _, store = build(manifest, "clean")
    image = brain.head(1).astype(np.int32)
    image[20, 20, 20] = 1_000_000
    brain.write(manifest.parent / "1" / "T1.nii.gz", image)
    _, other = build(manifest, "spike")
    assert only_warnings(other) == ("W_INTENSITY",)
    assert other.subjects[1].std == pytest.approx(store.subjects[1].std, rel=0.01)


def test_A27_a_small_grid_is_cropped_on_the_labels(make_cohort, build, brain):
    """The labelled box is off centre: the crop follows it, is recorded, and loses no label."""
    manifest = make_cohort(protocols=("fsl_first",))
    labelled = brain.ids("fsl_first") > 0
    low, high = (
        np.array([f(np.flatnonzero(labelled.any(axis=tuple({0, 1, 2} - {a})))) for a in range(3)])
        for f in (np.min, np.max)
    )
    size = tuple(int(side) for side in 4 * ((high - low + 1) // 4 + 1))
    _, store = build(manifest, "crop", grid=size)
    row = store.subjects[0]
    assert row.warnings == ()
    assert row.conformed_shape == brain.shape
    assert np.count_nonzero(store.read_labels(0, ("fsl_first",))) == np.count_nonzero(labelled)
    box = tuple(slice(o, o + s) for o, s in zip(row.origin, size, strict=True))
    np.testing.assert_array_equal(store.read_image(0), brain.head(0)[box])
    np.testing.assert_allclose(np.array(row.affine)[:3, 3], brain.affine[:3, 3] + 4 * np.array(row.origin))
    _, store = build(manifest, "loss", grid=(8, 8, 8))
    assert store.subjects[0].warnings == ("W_CROPPED_LABEL",)


def test_A28_the_same_image_under_two_ids(make_cohort, build, tmp_path):
    """The first slot keeps it. With different compression or different labels it is still the same image."""
    manifest = make_cohort(("1001", "1002", "1003"))
    first, second = (manifest.parent / str(slot) / "T1.nii.gz" for slot in (0, 1))
    second.write_bytes(gzip.compress(gzip.decompress(first.read_bytes()), 9))
    report, store = build(manifest, shard_subjects=3)
    assert only_reject(report) == "E_DUPLICATE"
    assert [row.id for row in store.subjects] == ["1001", "1003"]
    with pytest.raises(StoreError, match="E_SHARD_MISSING"):
        store.read_image(1)
    assert list(verify.verify(str(tmp_path / "store"))) == []


def test_A30_the_split_is_part_of_the_store(make_cohort, build):
    manifest = make_cohort(splits=("train", "train", "test"))
    _, store = build(manifest, "one")
    manifest = make_cohort(splits=("train", "test", "test"))
    _, other = build(manifest, "two")
    assert store.info.split_hash != other.info.split_hash
    with pytest.raises(NeuronetError, match=r"E_EXISTS.*different input"):
        build(manifest, "one")


def test_A31_withdrawn_participants_are_left_out_without_a_trace(make_cohort, build, tmp_path, tree):
    """This is no error: an archive keeps withdrawn files until somebody deletes them, and every rebuild must honour the
    list.

    The list's hash is in the store, so that training can refuse an outdated one.
    """
    exclude = tmp_path / "withdrawn.csv"
    exclude.write_text("1002\n9999\n")
    manifest = make_cohort()
    report, store = build(manifest, exclude=exclude)
    assert report.excluded == 1
    assert [row.id for row in store.subjects] == ["1001", "1003"]
    assert not any(b"1002" in content for content in tree(tmp_path / "store").values())
    with pytest.raises(NeuronetError, match="E_EXISTS"):
        build(manifest)  # the same store without the list


def test_A39_a_missing_file_is_not_waited_for(make_cohort, build, monkeypatch):
    monkeypatch.setattr(shard, "_RETRY_AFTER_S", (1000,))
    manifest = make_cohort()
    (manifest.parent / "1" / "fsl_fast.nii.gz").unlink()
    assert only_reject(build(manifest)[0]) == "E_IO"


def test_an_unforeseen_error_stops_one_subject_only(make_cohort, build, monkeypatch):
    def broken(path, limits, original=subject.nifti.read_image):
        if "/1/" in str(path):
            raise ZeroDivisionError(str(path))
        return original(path, limits)

    monkeypatch.setattr(subject.nifti, "read_image", broken)
    report, _ = build(make_cohort())
    assert only_reject(report) == "E_INTERNAL"
    assert report.rejects[0].reason.startswith("ZeroDivisionError at test_build.py:")


def test_a_label_map_in_the_column_of_the_image_is_rejected(make_cohort, tmp_path, brain, capsys):
    manifest = make_cohort(protocols=("fsl_fast", "malp_em"))
    for number, protocol in enumerate(("fsl_fast", "malp_em")):
        brain.write(manifest.parent / str(number) / "T1.nii.gz", brain.ids(protocol))
    command = [f"--manifest={manifest}", f"--store={tmp_path / 'store'}", "--voxel-size-mm=4", "--grid=48,56,48"]
    assert main([*command, "--workers=0"]) == 3
    assert f"E_LABEL_IMAGE: {explain('E_LABEL_IMAGE')}" in capsys.readouterr().err
    rejected = (tmp_path / "store" / "rejects.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[0] for line in rejected if "\tE_LABEL_IMAGE\t" in line] == ["1001", "1002"]


def test_what_a_manifest_lacks_and_a_withdrawal_list_has_too_much_is_said(make_cohort, tmp_path, caplog, capsys):
    manifest = make_cohort(protocols=("fsl_fast",))
    (tmp_path / "withdrawn.csv").write_text("eid\n1002\n9999\n")
    command = [f"--manifest={manifest}", f"--store={tmp_path / 'store'}", f"--exclude={tmp_path / 'withdrawn.csv'}"]
    assert main([*command, "--voxel-size-mm=4", "--grid=48,56,48", "--workers=0"]) == 0
    assert "no map of fsl_first, spm_tissue, malp_em, malp_em_tissue: the store will lack these" in caplog.text
    assert "1 of 2 ids to exclude are not in the manifest; lines of the list: 3" in caplog.text
    assert "9999" not in caplog.text + capsys.readouterr().out


def test_ids_and_columns_of_a_list_of_segment_are_taken(make_cohort, tmp_path, caplog):
    """`sub-` before an id and columns without a use, one of which holds what nobody may read in a log."""
    manifest = make_cohort(("sub-1001", "1002", "sub-1003"), protocols=("fsl_fast",))
    header, *rows = manifest.read_text().splitlines()
    manifest.write_text("\n".join([f"{header},age", *(f"{row},aged{n}" for n, row in enumerate(rows))]) + "\n")
    command = [f"--manifest={manifest}", f"--store={tmp_path / 'store'}", "--voxel-size-mm=4", "--grid=48,56,48"]
    assert main([*command, "--workers=0"]) == 0
    assert [row.id for row in Store.open(tmp_path / "store").subjects] == ["1001", "1002", "1003"]
    assert "columns of the manifest that are not used: 'age'" in caplog.text and "aged0" not in caplog.text


def test_A40_bad_ids_stop_the_command(make_cohort, tmp_path, capsys):
    manifest = make_cohort(("1001", "../../1002"))
    assert main([f"--manifest={manifest}", f"--store={tmp_path / 'store'}"]) == 1
    assert "E_ID: the id in row 3" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "store").exists()


def test_A41_no_id_and_no_path_outside_the_tables(make_cohort, tmp_path, capfd, tree):
    """Ids belong in subjects.tsv and rejects.tsv only, paths nowhere. Workers are real processes with real logs."""
    names = ("7771001", "7771002", "7771003")
    manifest = make_cohort(names, protocols=("fsl_fast",))
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(b"damaged")
    (manifest.parent / "2" / "fsl_fast.nii.gz").unlink()
    arguments = [f"--manifest={manifest}", f"--store={tmp_path / 'store'}", "--voxel_size_mm=4", "--grid=48,56,48"]
    assert main([*arguments, "--workers=1"]) == 3
    assert main([*arguments, "--workers=0", "--max-reject-fraction=1"]) == 0
    assert verify.main([f"--store={tmp_path / 'store'}"]) == 0
    printed = capfd.readouterr()
    shown = printed.out.replace(f"{tmp_path / 'store'} is sound", "") + printed.err
    texts = [shown, *(content.decode() for name, content in tree(tmp_path / "store").items() if name.endswith("json"))]
    texts.append((tmp_path / "store" / "rejects.tsv").read_text().replace("7771002\t", "").replace("7771003\t", ""))
    for text in texts:
        assert "777100" not in text
        assert str(tmp_path) not in text
        assert "T1.nii" not in text


def test_a_split_that_leaves_everybody_out_is_an_error(make_cohort, build, tmp_path):
    manifest = make_cohort(("1001", "1002"), protocols=("fsl_fast",))
    manifest.write_text(manifest.read_text().replace(",train", ","))
    (tmp_path / "splits.csv").write_text("id,split\n1001,none\n1002,none\n")
    with pytest.raises(NeuronetError, match="the cohort has no subject"):
        build(manifest, splits=tmp_path / "splits.csv")
    assert not (tmp_path / "store").exists()


def test_exit_statuses(make_cohort, tmp_path, capsys):
    manifest = make_cohort()
    arguments = [f"--manifest={manifest}", f"--store={tmp_path / 'store'}", "--voxel_size_mm=4", "--workers=0"]
    assert main(arguments) == 0
    assert "3 subjects (train 3)" in capsys.readouterr().out
    assert main([*arguments, "--missing=reject"]) == 1  # a finished store with different settings
    assert "E_EXISTS" in capsys.readouterr().err
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(b"")
    arguments[1] = f"--store={tmp_path / 'other'}"
    assert main(arguments) == 3
    assert f"E_FORMAT: {explain('E_FORMAT')}" in capsys.readouterr().err
    assert main([*arguments, "--max-reject-fraction=0.34"]) == 0
    assert f"E_FORMAT: {explain('E_FORMAT')}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--grid=1,2"])


def test_summary_names_codes_not_subjects(make_cohort, build):
    manifest = make_cohort()
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(b"")
    text = summary(build(manifest)[0])
    assert "rejected: E_FORMAT 1" in text
    assert "1002" not in text


def test_real_cohort(real_data, tmp_path):
    """Three real brains at 2 mm: no rejects, and no warnings except for structures too small for 2 mm."""
    lines = (real_data / "cohort" / "cohort.csv").read_text().splitlines()[:4]
    folder = real_data / "cohort"
    rows = [",".join(str(folder / cell) if "/" in cell else cell for cell in line.split(",")) for line in lines]
    (tmp_path / "cohort.csv").write_text("\n".join(rows))
    report = build_store(tmp_path / "cohort.csv", str(tmp_path / "store"), voxel_size_mm=2.0, workers=0)
    assert report.rejects == ()
    assert set(report.warnings) <= {"W_LABEL_MISSING"}
    store = Store.open(tmp_path / "store")
    for row in store.subjects:
        image, labels = store.read_image(row.slot), store.read_labels(row.slot, ("malp_em", "fsl_fast"))
        assert image[labels[1] == 3].mean() > 1.2 * image[labels[1] == 2].mean()  # white matter is bright on T1
        assert np.mean(image[labels[0] > 0] > 0) > 0.98  # the labels lie on the brain
