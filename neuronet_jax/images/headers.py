"""Checks the headers of brain images, NIfTI and MGH, before anything of the size they state is allocated.

`read_header` returns a header that has passed all checks, or raises RejectError with the code of the rule it breaks.
"""

import itertools
import logging
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from neuronet_jax.errors import RejectError
from neuronet_jax.images.space import spacing_mm

_SILENT = logging.getLogger("neuronet_jax.nifti.silent")  # nibabel logs its repairs; only its errors matter here
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False
_NIFTI = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by sizeof_hdr
_MGH_HEADER_BYTES = 284
CONVERT = "convert it with dcm2niix (DICOM) or mri_convert, and give a .nii, .nii.gz or .mgz file"


@dataclass(frozen=True)
class Limits:
    """Limits on an input. The defaults fit adult human heads at any clinical resolution."""

    voxels: int = 512**3  # a 0.5 mm whole head; more is a damaged or hostile header
    bytes: int = 2**30  # 512³ voxels of 8 bytes
    trailing_bytes: int = 2**20  # some writers pad the end of the file; more is a gzip bomb
    spacing_mm: tuple[float, float] = (0.2, 10.0)  # below: microscopy or wrong units; above: a localiser
    fov_mm: tuple[float, float] = (80.0, 600.0)  # per axis; a brain is about 140 × 180 × 130 mm
    nan_fraction: float = 1e-3  # a few NaN voxels are noise; more means that a tool failed
    transform: Literal["sform", "qform", "reject"] = "sform"  # which one to use if the two differ
    assume_ras: bool = False  # accept a file without an orientation; left and right are then a guess


DEFAULT_LIMITS = Limits()


class Header(NamedTuple):
    """A header that has passed all checks."""

    header: Any  # nibabel's
    shape: tuple[int, ...]  # along x, y, z
    dtype: np.dtype
    offset: int  # bytes between header and voxels
    affine: np.ndarray
    slope: float
    intercept: float
    warnings: tuple[str, ...]


def read_header(stream: IO[bytes], is_mgh: bool, limits: Limits) -> Header:
    """Reads a header of NIfTI or MGH and checks it. Raises RejectError, as `nifti.read_image` says."""
    header, shape, dtype, offset = _read_mgh(stream) if is_mgh else _read_nifti(stream)
    warnings: list[str] = []
    voxels = 1
    for side in shape:
        if side < 1:
            raise RejectError("E_HEADER", f"the dimensions {shape} must be positive")
        voxels *= side
    if voxels > limits.voxels or voxels * dtype.itemsize > limits.bytes:
        raise RejectError("E_HEADER_SIZE", f"{shape} voxels of {dtype} exceed the limit of {limits.voxels} voxels")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
        warnings = ["W_NDIM"]
    if len(shape) != 3:
        raise RejectError("E_NDIM", f"one three-dimensional image is needed, got the shape {shape}")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise RejectError("E_DTYPE", f"voxels must be plain integers or floats, got {dtype}")
    affine, notes = _affine(header, shape, limits)
    slope, intercept = _scaling(header)
    header.set_data_shape(shape)
    return Header(header, shape, dtype, offset, affine, slope, intercept, (*warnings, *notes))


def _read_nifti(stream: IO[bytes]) -> tuple[Any, tuple[int, ...], np.dtype, int]:
    """Reads the header. Returns it with the shape, the voxel type and the number of bytes between header and voxels."""
    start = read_exactly(stream, 348)
    size = {int.from_bytes(start[:4], order): order for order in ("big", "little")}
    known = next((s for s in _NIFTI if s in size), None)
    if known is None:
        if start[344:347] in (b"n+1", b"ni1"):
            raise RejectError("E_HEADER", f"sizeof_hdr must be 348 or 540, got {int.from_bytes(start[:4], 'little')}")
        raise RejectError("E_FORMAT", f"the content is not a NIfTI image; {CONVERT}")
    block = start + read_exactly(stream, known - 348)
    magic = block[344:348] if known == 348 else block[4:8]
    if magic[:3] in (b"ni1", b"ni2") or magic == b"\0\0\0\0":
        raise RejectError("E_FORMAT", f"Analyze files and .hdr/.img pairs are not supported; {CONVERT}")
    order = "<" if size[known] == "little" else ">"
    try:
        header = _NIFTI[known](block, endianness=order, check=False)
        dims = [int(d) for d in header["dim"]]
        if not 1 <= dims[0] <= 7:
            raise HeaderDataError(f"dim[0] must be within 1 and 7, got {dims[0]}")
        if not np.all(np.isfinite(header["pixdim"][:4])) or np.any(header["pixdim"][1 : 1 + min(dims[0], 3)] <= 0):
            raise RejectError("E_AFFINE", f"voxel sizes must be positive, got {header['pixdim'][1:4].tolist()}")
        bitpix = int(header["bitpix"])
        header.check_fix(logger=_SILENT, error_level=40)  # 40: nibabel's level for errors that it cannot repair
        dtype = header.get_data_dtype()
    except (HeaderDataError, WrapStructError) as error:
        raise RejectError("E_HEADER", f"the NIfTI header is invalid: {error}") from error
    if bitpix != dtype.itemsize * 8:
        raise RejectError("E_HEADER", f"bitpix is {bitpix}, but the datatype {dtype} has {dtype.itemsize * 8} bits")
    offset = float(header["vox_offset"])
    if not known + 4 <= offset <= 2**24 or offset != int(offset):  # 16 MiB of header extensions is already absurd
        raise RejectError("E_HEADER", f"vox_offset must be within {known + 4} and {2**24}, got {offset}")
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise RejectError("E_UNITS", f"voxel sizes must be in mm, but the header says {unit}; correct xyzt_units")
    return header, tuple(dims[1 : 1 + dims[0]]), dtype, int(offset) - known


def _read_mgh(stream: IO[bytes]) -> tuple[Any, tuple[int, ...], np.dtype, int]:
    """Reads an MGH header as a NIfTI one, so that results can be written back on its grid; returns as
    `_read_nifti`.
    """
    block = read_exactly(stream, _MGH_HEADER_BYTES)
    try:
        mgh: Any = MGHHeader(block[:90] + b"\0" * (MGHHeader.template_dtype.itemsize - 90), check=True)
        dtype = np.dtype(mgh.get_data_dtype()).newbyteorder(">")
    except (HeaderDataError, WrapStructError, KeyError, ValueError) as error:
        raise RejectError("E_HEADER", f"the MGH header is invalid: {error}") from error
    if int(mgh["goodRASFlag"]) != 1:
        raise RejectError("E_NO_XFORM", "the MGH header states no orientation (goodRASFlag)")
    dims = [int(d) for d in mgh["dims"]]
    shape = tuple(dims if dims[3] > 1 else dims[:3])  # MGH always has four dims; a single frame is the ordinary case
    if not np.all(np.isfinite(mgh["delta"])) or np.any(mgh["delta"] <= 0):
        raise RejectError("E_AFFINE", f"voxel sizes must be positive, got {mgh['delta'].tolist()}")
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype.newbyteorder("="))
    header["pixdim"][1:4] = mgh["delta"]
    header.set_sform(mgh.get_affine(), code=1)
    header.set_qform(mgh.get_affine(), code=1)
    header.set_xyzt_units("mm")
    return header, shape, dtype, 0


def _scaling(header: Any) -> tuple[float, float]:
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise RejectError("E_SCALE", f"scl_slope and scl_inter are invalid: {error}") from error
    return (1.0, 0.0) if slope is None else (float(slope), float(inter))


def _affine(header: Any, shape: tuple[int, ...], limits: Limits) -> tuple[np.ndarray, list[str]]:
    """Returns the affine to use and its warnings.

    A sform and a qform of different handedness contradict each other about left and right. No policy can choose between
    them, so this raises E_AFFINE.
    """
    notes: list[str] = []
    zooms = np.array(header["pixdim"][1:4], np.float64)
    candidates: dict[str, np.ndarray] = {}
    if int(header["sform_code"]) > 0:
        candidates["sform"] = np.array(header.get_sform(), np.float64)
    if int(header["qform_code"]) > 0:
        try:
            candidates["qform"] = np.array(header.get_qform(), np.float64)
        except (HeaderDataError, ValueError) as error:  # a quaternion longer than 1
            raise RejectError("E_AFFINE", f"the qform is invalid: {error}") from error
    for name, affine in candidates.items():
        if not np.all(np.isfinite(affine)):
            raise RejectError("E_AFFINE", f"the {name} holds NaN or Inf")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-6 * zooms.prod():  # a valid one equals the voxel volume
            raise RejectError("E_AFFINE", f"the {name} is singular")
    if len(candidates) == 2:
        corners = np.array([[*corner, 1.0] for corner in itertools.product(*((0, side - 1) for side in shape))])
        sform, qform = candidates["sform"], candidates["qform"]
        if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
            raise RejectError("E_AFFINE", "sform and qform disagree about left and right; correct the header")
        gap_mm = float(np.max(np.abs(corners @ (sform - qform).T)))
        if gap_mm > 0.1:  # 0.1 mm moves no label, and quaternion rounding stays far below
            if limits.transform == "reject":
                raise RejectError("E_XFORM", f"sform and qform differ by {gap_mm:.3g} mm")
            notes.append("W_XFORM")
    if not candidates:
        if not limits.assume_ras:
            raise RejectError(
                "E_NO_XFORM",
                "sform_code and qform_code are 0: left and right are unknown (--assume-ras accepts the file)",
            )
        affine = np.diag([*zooms, 1.0])
        affine[:3, 3] = -zooms * (np.array(shape) - 1) / 2  # centred
        notes.append("W_LR_UNSAFE")
    else:
        affine = candidates.get(limits.transform) if limits.transform in candidates else next(iter(candidates.values()))
    assert affine is not None
    sides_mm = spacing_mm(affine)
    if np.any(np.abs(sides_mm - zooms) > 1e-3):
        raise RejectError(
            "E_ZOOM", f"pixdim says {zooms.tolist()} mm, but the affine {sides_mm.tolist()} mm; correct the header"
        )
    low, high = limits.spacing_mm
    if np.any(sides_mm < low) or np.any(sides_mm > high):
        raise RejectError(
            "E_UNITS", f"voxels of {sides_mm.tolist()} mm are outside {low} to {high} mm; are the units mm?"
        )
    fov_mm, (low, high) = sides_mm * shape, limits.fov_mm
    if np.any(fov_mm < low) or np.any(fov_mm > high):
        raise RejectError(
            "E_UNITS",
            f"a field of view of {fov_mm.round(1).tolist()} mm does not fit a head ({low} to {high} mm per axis)",
        )
    if _is_oblique(affine[:3, :3] / sides_mm):
        notes.append("W_OBLIQUE")
    return affine, notes


def _is_oblique(directions: np.ndarray) -> bool:
    """Tells whether the axes are sheared, or more than 15 degrees off the body's axes (heads in scanners are less)."""
    tilted = np.max(np.abs(directions), axis=0).min() < np.cos(np.deg2rad(15))
    sheared = np.max(np.abs(directions.T @ directions - np.eye(3))) > 1e-3
    return bool(tilted or sheared)


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """Returns the next `count` bytes. Raises RejectError with E_TRUNCATED if there are fewer."""
    block = bytearray(count)
    fill(stream, memoryview(block))
    return bytes(block)


def fill(stream: Any, view: memoryview) -> None:
    """Reads the next bytes into all of `view`. Raises RejectError with E_TRUNCATED if there are fewer."""
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])
        if not count:
            raise RejectError(
                "E_TRUNCATED", f"the file ends {len(view) - filled} bytes early; copy or download it again"
            )
        filled += count
