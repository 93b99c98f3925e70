"""Every fault of a file that the guard knows, given to one real command among good files."""

import csv
import gzip
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuronet_jax.cli import main
from tests.neuronet_jax.images.test_nifti import VOXELS, image_bytes

RGB = np.zeros(VOXELS.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
HUGE = {"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1], "datatype": 64, "bitpix": 64}
SINGLE = VOXELS.astype(np.float32)


def _flipped(content: bytes, position: int) -> bytes:
    damaged = bytearray(content)
    damaged[position] ^= 0x10
    return bytes(damaged)


def _some(value: float, share: float) -> np.ndarray:
    damaged = SINGLE.copy()
    damaged.ravel()[: int(share * damaged.size)] = value
    return damaged


def _bomb() -> bytes:
    zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
    return gzip.compress(image_bytes(), 1) + (zeros.compress(bytes(2**24)) + zeros.flush()) * 64


def _zipped(data: np.ndarray = VOXELS, **fields: Any) -> bytes:
    return gzip.compress(image_bytes(data, **fields), 1)


FAULTS = {
    "A01 truncated": (_zipped()[:90_000], "E_TRUNCATED"),
    "A01 short": (gzip.compress(image_bytes()[:-1000], 1), "E_TRUNCATED"),
    "A02 payload": (_flipped(_zipped(), 60_000), "E_CRC"),
    "A02 trailer": (_flipped(_zipped(), -8), "E_CRC"),
    "A03 plain": (image_bytes(), "E_FORMAT"),
    "A03 empty": (b"", "E_FORMAT"),
    "A03 html": (b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>", "E_FORMAT"),
    "A04 huge": (gzip.compress(image_bytes(**HUGE)[:1000]), "E_HEADER_SIZE"),
    "A05 bomb": (_bomb(), "E_TRAILING"),
    "A06 header": (_zipped(sizeof_hdr=1000), "E_HEADER"),
    "A06 magic": (_zipped(magic=b"n+9"), "E_HEADER"),
    "A06 offset": (_zipped(vox_offset=10), "E_HEADER"),
    "A07 frames": (_zipped(np.stack([VOXELS, VOXELS], axis=-1)), "E_NDIM"),
    "A07 flat": (_zipped(VOXELS[:, :, 0]), "E_NDIM"),
    "A07 rgb": (_zipped(RGB), "E_DTYPE"),
    "A07 complex": (_zipped(VOXELS.astype(np.complex64)), "E_DTYPE"),
    "A09 no orientation": (_zipped(sform_code=0, qform_code=0), "E_NO_XFORM"),
    "A10 affine": (_zipped(srow_x=[np.nan, 0, 0, 80]), "E_AFFINE"),
    "A11 zoom": (_zipped(pixdim=[-1, 4.01, 4, 4, 0, 0, 0, 0], qform_code=0), "E_ZOOM"),
    "A12 metres": (_zipped(xyzt_units=1), "E_UNITS"),
    "A16 scale": (_zipped(scl_slope=1.0, scl_inter=np.inf), "E_SCALE"),
    "A24 nan": (_zipped(_some(np.nan, 0.01)), "E_NAN"),
    "A25 constant": (_zipped(np.full_like(VOXELS, 7)), "E_CONSTANT"),
    "A25 zeros": (_zipped(np.zeros_like(VOXELS)), "E_CONSTANT"),
    "A34 dicom": (b"\0" * 128 + b"DICM", "E_FORMAT"),
}
NOTED = {
    "A07 one frame": (_zipped(VOXELS[..., None]), "W_NDIM"),
    "A15 big endian": (_zipped(big_endian=True), ""),
    "A24 few nan": (_zipped(_some(np.nan, 0.0005)), "W_NAN"),
    "A26 spike": (_zipped(_some(1e6, 0.00002)), "W_INTENSITY"),
}


def _name(case: str) -> str:
    return case.replace(" ", "") + (".dcm" if "dicom" in case else ".nii.gz")


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Returns every case as a file, bad ones first."""
    paths = [tmp_path / _name(case) for case in (*FAULTS, *NOTED)]
    for path, (content, _) in zip(paths, (*FAULTS.values(), *NOTED.values()), strict=True):
        path.write_bytes(content)
    return paths


def test_F03_every_fault_has_its_code_and_stops_no_other_scan(run, files, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["segment", *map(str, files), run, f"--out={out}", "--no-report", "--protocols=fsl_fast"]
    assert main(command) == 3
    with (out / "summary.tsv").open(newline="", encoding="utf-8") as file:
        rows = {row["input"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert {name: row["code"] for name, row in rows.items() if row["status"] == "rejected"} == {
        _name(case): expected for case, (_, expected) in FAULTS.items()
    }
    for case, (_, warning) in NOTED.items():
        assert rows[_name(case)]["status"] == "done" and warning in rows[_name(case)]["warnings"]
    assert len(list(out.rglob("*_dseg.nii.gz"))) == len(NOTED) and not list(out.rglob("*tmp*"))
    assert all(str(tmp_path) not in row["reason"] for row in rows.values())
    printed = capsys.readouterr().out
    assert f"{len(NOTED)} of {len(files)} scans segmented" in printed
    assert all(f"\n{expected} (" in printed for _, expected in FAULTS.values())  # each with its meaning and remedy


def test_F09_a_folder_that_may_not_be_written_is_refused_first(run, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert main(["segment", str(files[-1]), run, f"--out={tmp_path / 'out'}"]) == 1
    assert f"you may not write to {tmp_path}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_F14_a_device_is_no_scan(run, files, tmp_path, capsys):
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    assert main(["segment", str(tmp_path / "zero.nii"), run, f"--out={tmp_path / 'out'}"]) == 1
    assert "rejected, E_FORMAT" in capsys.readouterr().err
