"""The guard in front of nibabel. Every fault is injected into real bytes and read through the real code path."""

import gzip
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.images import nifti
from neuronet_jax.images.headers import DEFAULT_LIMITS, Limits
from neuronet_jax.images.nifti import read_image, read_labels, write_labels

SHAPE = (40, 48, 40)  # at 4 mm a head's field of view
AFFINE = np.array([[-4.0, 0, 0, 80], [0, 4, 0, -90], [0, 0, 4, -70], [0, 0, 0, 1]])
VOXELS = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)


def image_bytes(
    data: np.ndarray = VOXELS, affine: np.ndarray = AFFINE, big_endian: bool = False, **fields: Any
) -> bytes:
    """Returns a NIfTI file with sform and qform set, then header fields overwritten behind nibabel's back."""
    header: Any = nib.Nifti1Header(endianness=">" if big_endian else "<")
    header.set_data_shape(data.shape)
    header.set_data_dtype(data.dtype)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    voxels = data.astype(header.get_data_dtype()).tobytes(order="F")
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + b"\0" * 4 + voxels


def save(folder: Path, content: bytes, name: str = "T1.nii.gz") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    return path


def code(path: Path, limits: Limits = DEFAULT_LIMITS, read=read_image) -> str:
    with pytest.raises(RejectError) as caught:
        read(path, limits)
    assert str(path.parent) not in str(caught.value)  # reasons end up in shared tables
    return caught.value.code


@pytest.mark.parametrize("name", ["T1.nii.gz", "T1.nii"])
def test_reads_as_nibabel_does(tmp_path, name):
    volume = read_image(save(tmp_path, image_bytes(), name))
    reference = nib.Nifti1Image.from_bytes(image_bytes())
    np.testing.assert_array_equal(volume.data, reference.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.affine, reference.affine)
    assert volume.data.dtype == np.float32
    assert volume.affine.dtype == np.float64
    assert volume.spacing_mm == (4.0, 4.0, 4.0)
    assert volume.warnings == ()


def test_reads_real_scans_as_nibabel_does(real_data):
    for path in sorted((real_data / "whole_head").glob("f*.nii.gz")):
        volume, reference = read_image(path), nib.Nifti1Image.from_filename(path)
        np.testing.assert_array_equal(volume.data, reference.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(volume.affine, reference.affine)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.999])
def test_A01_truncated_gzip(tmp_path, fraction):
    path = save(tmp_path, image_bytes())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    assert code(path) == "E_TRUNCATED"


def test_A01_voxels_end_before_the_header_says(tmp_path):
    """The gzip stream itself is complete: the file was cut before compression."""
    assert code(save(tmp_path, image_bytes()[:-1000])) == "E_TRUNCATED"
    assert code(save(tmp_path, image_bytes()[:-1], "T1.nii")) == "E_TRUNCATED"


@pytest.mark.parametrize("position", [0.3, 0.9])
def test_A02_flipped_byte_in_the_payload(tmp_path, position):
    path = save(tmp_path, image_bytes())
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 0x10
    path.write_bytes(content)
    assert code(path) == "E_CRC"


@pytest.mark.parametrize("from_end", [8, 5, 4])
def test_A02_flipped_byte_in_the_trailer(tmp_path, from_end):
    """CRC (8 to 5) and length (4 to 1): the voxels are right, and only reading to the end shows the fault."""
    path = save(tmp_path, image_bytes())
    content = bytearray(path.read_bytes())
    content[-from_end] ^= 1
    path.write_bytes(content)
    assert code(path) == "E_CRC"


def test_A02_no_flipped_byte_passes(tmp_path):
    path = save(tmp_path, image_bytes())
    content = path.read_bytes()
    payload = (
        content.index(b"\0", 10) + 1 if content[3] & 8 else 10
    )  # behind the gzip header, whose time has no checksum
    for position in np.linspace(payload, len(content) - 1, 60).astype(int):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(position) % 8
        path.write_bytes(damaged)
        with pytest.raises(RejectError):
            read_image(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("T1.nii.gz", image_bytes()),
        ("T1.nii", gzip.compress(image_bytes())),
        ("T1.nii.gz", b""),
        ("T1.nii", b""),
        ("T1.nii.gz", b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>"),
        ("T1.nii", b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>" * 20),
        ("T1.nii.gz", gzip.compress(b"<html>" * 200)),
    ],
    ids=["plain as gz", "gz as plain", "empty gz", "empty", "html as gz", "html", "html in gz"],
)
def test_A03_content_is_not_what_the_name_says(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert code(path) == "E_FORMAT"


@pytest.mark.parametrize("name", ["T1.nii.gz", "T1.nii"])
def test_A04_huge_dimensions_are_refused_before_allocation(tmp_path, name):
    dim = [3, 32767, 32767, 32767, 1, 1, 1, 1]
    path = save(tmp_path, image_bytes(dim=dim, datatype=64, bitpix=64)[:1000], name)
    tracemalloc.start()
    assert code(path) == "E_HEADER_SIZE"
    assert tracemalloc.get_traced_memory()[1] < 2**23  # 8 MB: gzip's window and buffers
    tracemalloc.stop()


def test_A04_cap_on_bytes(tmp_path):
    path = save(tmp_path, image_bytes())
    assert code(path, Limits(bytes=VOXELS.nbytes - 1)) == "E_HEADER_SIZE"
    assert code(path, Limits(voxels=VOXELS.size - 1)) == "E_HEADER_SIZE"
    assert read_image(path, Limits(bytes=VOXELS.nbytes, voxels=VOXELS.size)).data.shape == SHAPE


def test_A05_gzip_bomb_is_bounded(tmp_path):
    zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = (zeros.compress(bytes(2**24)) + zeros.flush()) * 64  # 1 GiB in 1 MB, gzip members in a row
    path = tmp_path / "T1.nii.gz"
    path.write_bytes(gzip.compress(image_bytes(), 1) + bomb)
    tracemalloc.start()
    assert code(path) == "E_TRAILING"
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_A05_a_little_padding_is_accepted(tmp_path):
    assert read_image(save(tmp_path, image_bytes() + bytes(1000))).data.shape == SHAPE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sizeof_hdr", 1000),
        ("magic", b"n+9"),
        ("datatype", 3333),
        ("bitpix", 7),
        ("vox_offset", 10),
        ("vox_offset", np.nan),
        ("vox_offset", 1e9),
        ("dim", [3, -5, 48, 40, 1, 1, 1, 1]),
        ("dim", [9, 40, 48, 40, 1, 1, 1, 1]),
    ],
)
def test_A06_invalid_header(tmp_path, field, value):
    assert code(save(tmp_path, image_bytes(**{field: value}))) == "E_HEADER"


def test_A07_dimensions(tmp_path):
    single = read_image(save(tmp_path, image_bytes(VOXELS[..., None])))
    assert single.data.shape == SHAPE
    assert single.warnings == ("W_NDIM",)
    assert code(save(tmp_path, image_bytes(np.stack([VOXELS, VOXELS], axis=-1)))) == "E_NDIM"
    assert code(save(tmp_path, image_bytes(VOXELS[:, :, 0]))) == "E_NDIM"


def test_A07_types(tmp_path):
    rgb = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert code(save(tmp_path, image_bytes(rgb))) == "E_DTYPE"
    assert code(save(tmp_path, image_bytes(VOXELS.astype(np.complex64)))) == "E_DTYPE"


def test_A08_sform_and_qform_differ(tmp_path):
    header = nib.Nifti1Header()
    moved = AFFINE.copy()
    moved[0, 3] += 5
    header.set_qform(moved, code=1)
    path = save(tmp_path, image_bytes(qoffset_x=header["qoffset_x"]))
    by_default = read_image(path)
    np.testing.assert_array_equal(by_default.affine, AFFINE)
    assert by_default.warnings == ("W_XFORM",)
    by_qform = read_image(path, Limits(transform="qform"))
    np.testing.assert_array_equal(by_qform.affine, moved)
    assert by_qform.warnings == ("W_XFORM",)
    assert code(path, Limits(transform="reject")) == "E_XFORM"


def test_A09_no_orientation(tmp_path):
    path = save(tmp_path, image_bytes(sform_code=0, qform_code=0))
    assert code(path) == "E_NO_XFORM"
    assumed = read_image(path, Limits(assume_ras=True))
    assert assumed.warnings == ("W_LR_UNSAFE",)
    np.testing.assert_array_equal(assumed.affine[:3, :3], np.diag([4.0, 4, 4]))


@pytest.mark.parametrize(
    "fields",
    [
        {"srow_x": [np.nan, 0, 0, 80]},
        {"srow_y": [0, np.inf, 0, 0]},
        {"srow_x": [0, 4, 0, 80]},  # two equal rows: singular
        {"pixdim": [-1, 0, 4, 4, 0, 0, 0, 0]},
        {"pixdim": [-1, -4, 4, 4, 0, 0, 0, 0]},
        {"srow_x": [4, 0, 0, -80]},  # sform right-handed, qform left-handed
        {"quatern_b": 3.0},
    ],
    ids=["nan", "inf", "singular", "zero zoom", "negative zoom", "handedness", "quaternion"],
)
def test_A10_impossible_affines(tmp_path, fields):
    """A flipped determinant is judged as sform against qform: LAS and RAS are legal alone, a contradiction is not."""
    assert code(save(tmp_path, image_bytes(**fields))) == "E_AFFINE"


def test_A11_zooms_disagree_with_the_affine(tmp_path):
    assert code(save(tmp_path, image_bytes(pixdim=[-1, 4.01, 4, 4, 0, 0, 0, 0], qform_code=0))) == "E_ZOOM"
    assert read_image(save(tmp_path, image_bytes(pixdim=[-1, 4.0005, 4, 4, 0, 0, 0, 0], qform_code=0))).data.any()


def test_A12_units_and_sizes(tmp_path):
    for unit in (1, 3):  # metre, micron
        assert code(save(tmp_path, image_bytes(xyzt_units=unit))) == "E_UNITS"
    for size_mm in (0.1, 20):
        assert code(save(tmp_path, image_bytes(affine=np.diag([size_mm] * 3 + [1])))) == "E_UNITS"
    assert code(save(tmp_path, image_bytes(affine=np.diag([1.0, 4, 4, 1])))) == "E_UNITS"  # 40 mm of field of view
    assert read_image(save(tmp_path, image_bytes(affine=np.diag([1.0, 4, 4, 1]))), Limits(fov_mm=(30, 600))).data.any()


@pytest.mark.parametrize(("degrees", "oblique"), [(5, False), (44, True)])
def test_A14_oblique_is_noted(tmp_path, degrees, oblique):
    angle = np.deg2rad(degrees)
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    volume = read_image(save(tmp_path, image_bytes(affine=turned @ AFFINE)))
    assert ("W_OBLIQUE" in volume.warnings) == oblique


def test_A14_shear_is_noted(tmp_path):
    sheared = AFFINE.copy()
    sheared[:3, 1] = np.array([0.2, np.sqrt(1 - 0.04), 0]) * 4
    assert "W_OBLIQUE" in read_image(save(tmp_path, image_bytes(affine=sheared, qform_code=0))).warnings


def test_A15_big_endian_is_the_same(tmp_path):
    little = read_image(save(tmp_path, image_bytes()))
    big = read_image(save(tmp_path, image_bytes(big_endian=True), "big.nii.gz"))
    assert (tmp_path / "big.nii.gz").read_bytes() != (tmp_path / "T1.nii.gz").read_bytes()
    np.testing.assert_array_equal(little.data, big.data)
    assert big.data.dtype.isnative
    np.testing.assert_array_equal(little.affine, big.affine)
    labels = read_labels(tmp_path / "big.nii.gz")
    np.testing.assert_array_equal(labels.data, VOXELS)
    assert labels.data.dtype.isnative


def test_A16_scaling(tmp_path):
    for slope in (0, np.nan):
        unscaled = read_image(save(tmp_path, image_bytes(scl_slope=slope, scl_inter=7)))
        np.testing.assert_array_equal(unscaled.data, VOXELS)
    scaled = read_image(save(tmp_path, image_bytes(scl_slope=0.5, scl_inter=-100)))
    np.testing.assert_array_equal(scaled.data, VOXELS * 0.5 - 100)
    assert code(save(tmp_path, image_bytes(scl_slope=1, scl_inter=np.inf))) == "E_SCALE"


def test_A17_labels_are_rounded_only_by_a_hair(tmp_path):
    """0.0039 × 769 = 2.9991: what a viewer that stores labels scaled leaves of 3."""
    ids = np.zeros(SHAPE, np.int16)
    ids[10:20] = 769
    volume = read_labels(save(tmp_path, image_bytes(ids, scl_slope=0.0039, scl_inter=0)))
    assert volume.data.dtype.kind == "i"
    np.testing.assert_array_equal(volume.data, np.where(ids > 0, 3, 0))
    ids[10:20] = 768  # 2.9952
    assert code(save(tmp_path, image_bytes(ids, scl_slope=0.0039, scl_inter=0)), read=read_labels) == "E_LABEL_FLOAT"


def test_A17_float_label_maps(tmp_path):
    ids = (VOXELS % 4).astype(np.float32)
    np.testing.assert_array_equal(read_labels(save(tmp_path, image_bytes(ids))).data, VOXELS % 4)
    assert code(save(tmp_path, image_bytes(ids + np.float32(0.5))), read=read_labels) == "E_LABEL_FLOAT"
    ids[0, 0, 0] = 1e20
    assert code(save(tmp_path, image_bytes(ids)), read=read_labels) == "E_LABEL_SET"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_A24_nan_voxels(tmp_path, bad):
    data = VOXELS.astype(np.float32)
    data.ravel()[:50] = bad  # 0.07 %
    volume = read_image(save(tmp_path, image_bytes(data)))
    assert volume.warnings == ("W_NAN",)
    assert not volume.data.ravel()[:50].any()
    np.testing.assert_array_equal(volume.data.ravel()[50:], VOXELS.ravel()[50:])
    data.ravel()[:100] = bad  # 0.13 %
    assert code(save(tmp_path, image_bytes(data))) == "E_NAN"
    assert code(save(tmp_path, image_bytes(np.full(SHAPE, bad, np.float32)))) == "E_NAN"


def test_A24_beyond_float32_counts_as_infinite(tmp_path):
    data = VOXELS.astype(np.float64)
    data[0, 0, 0] = 1e300
    volume = read_image(save(tmp_path, image_bytes(data)))
    assert volume.warnings == ("W_NAN",)
    assert np.isfinite(volume.data).all()


def test_A34_mgz_is_read(tmp_path):
    path = tmp_path / "T1.mgz"
    voxels: Any = VOXELS
    nib.MGHImage(voxels, AFFINE).to_filename(path)
    volume = read_image(path)
    np.testing.assert_array_equal(volume.data, VOXELS)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    write_labels(tmp_path / "labels.nii.gz", VOXELS % 4, volume)  # and can be written back on its grid
    np.testing.assert_allclose(read_labels(tmp_path / "labels.nii.gz").affine, AFFINE, atol=1e-5)
    path.write_bytes(path.read_bytes()[:-2000])
    assert code(path) == "E_TRUNCATED"


@pytest.mark.parametrize("name", ["T1.nrrd", "T1.hdr", "T1.img", "T1.dcm", "T1.gz", "T1"])
def test_A34_other_formats_say_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(image_bytes())
    with pytest.raises(RejectError, match=r"E_FORMAT.*dcm2niix"):
        read_image(tmp_path / name)


def test_A34_dicom_folder_and_header_pair(tmp_path):
    with pytest.raises(RejectError, match=r"E_FORMAT.*dcm2niix"):
        read_image(tmp_path)
    with pytest.raises(RejectError, match=r"E_FORMAT.*dcm2niix"):
        read_image(save(tmp_path, image_bytes(magic=b"ni1")))


def test_missing_file_is_an_io_reject(tmp_path):
    assert code(tmp_path / "nowhere.nii.gz") == "E_IO"


def test_nifti2_is_read(tmp_path):
    nib.Nifti2Image(VOXELS, AFFINE).to_filename(tmp_path / "T1.nii.gz")
    volume = read_image(tmp_path / "T1.nii.gz")
    np.testing.assert_array_equal(volume.data, VOXELS)
    np.testing.assert_array_equal(volume.affine, AFFINE)


@pytest.mark.parametrize(("highest", "dtype"), [(200, np.uint8), (300, np.uint16)])
def test_written_labels_keep_the_grid_and_nothing_personal(tmp_path, highest, dtype):
    like = read_image(
        save(tmp_path, image_bytes(descrip=b"Jane Doe", aux_file=b"/data/jane", qoffset_x=85, sform_code=4))
    )
    labels = VOXELS % (highest + 1)
    write_labels(tmp_path / "labels.nii.gz", labels, like)
    written: Any = nib.Nifti1Image.from_filename(tmp_path / "labels.nii.gz")
    header = written.header
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    assert header.get_data_dtype() == dtype
    assert (float(written.dataobj.slope), float(written.dataobj.inter)) == (1.0, 0.0)
    assert float(header["cal_max"]) == highest
    for field in nifti._TRANSFORM_FIELDS:  # sform, qform and their codes, each as it was though they differ
        np.testing.assert_array_equal(header[field], like.header[field])
    content = gzip.decompress((tmp_path / "labels.nii.gz").read_bytes())
    assert b"Jane" not in content
    assert b"/data" not in content
    assert len(content) == 352 + labels.size * np.dtype(dtype).itemsize


def test_written_labels_are_deterministic_and_complete(tmp_path):
    like = read_image(save(tmp_path, image_bytes(big_endian=True)))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, VOXELS % 4, like)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[4:8] == b"\0\0\0\0"  # gzip's time stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["T1.nii.gz", "a.nii.gz", "b.nii.gz"]
    np.testing.assert_array_equal(read_labels(tmp_path / "a.nii.gz").data, VOXELS % 4)


def test_results_say_mm_where_the_image_says_no_unit(tmp_path):
    like = read_image(save(tmp_path, image_bytes(xyzt_units=0)))
    write_labels(tmp_path / "labels.nii.gz", VOXELS % 4, like)
    assert nib.Nifti1Image.from_filename(tmp_path / "labels.nii.gz").header.get_xyzt_units()[0] == "mm"


def test_write_labels_refuses(tmp_path):
    like = read_image(save(tmp_path, image_bytes()))
    with pytest.raises(NeuronetError, match="do not fit"):
        write_labels(tmp_path / "a.nii.gz", VOXELS[:-1], like)
    with pytest.raises(NeuronetError, match="65535"):
        write_labels(tmp_path / "a.nii.gz", VOXELS.astype(np.int32) - 1, like)
    with pytest.raises(NeuronetError, match="exists"):
        write_labels(tmp_path / "T1.nii.gz", VOXELS, like)
    with pytest.raises(NeuronetError, match=r"\.nii\.gz"):
        write_labels(tmp_path / "a.nii", VOXELS, like)
