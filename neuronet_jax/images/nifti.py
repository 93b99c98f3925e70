"""Reads and writes brain images: a strict guard in front of nibabel.

A file is read in one pass. The header is checked before anything is allocated. The voxels are inflated into one buffer
of the size that the header states. The rest of the stream is then drained, up to a limit, so that the gzip CRC is
always checked. A file that cannot be trusted raises `RejectError`; a file that is accepted with a doubt has a code in
`Volume.warnings`.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import logging
import math
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, TypeVar

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import HeaderDataError, SpatialImage
from nibabel.wrapstruct import WrapStructError

from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.files import Files
from neuronet_jax.images.space import Volume, spacing_mm

_SILENT = logging.getLogger("neuronet_jax.nifti.silent")  # nibabel logs its repairs; only its errors matter here
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False
_NIFTI = {348: nib.Nifti1Header, 540: nib.Nifti2Header}  # by sizeof_hdr
_MGH_HEADER_BYTES = 284
_DEFLATE_ERROR: type[Exception] = getattr(isal_zlib, "error")  # noqa: B009 (its stub types it as an instance)
_Part = TypeVar("_Part")
_CONVERT = "convert it with dcm2niix (DICOM) or mri_convert, and give a .nii, .nii.gz or .mgz file"


@dataclasses.dataclass(frozen=True)
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


class Readable(Protocol):
    """A file that is not a path of its own, such as a member of an archive."""

    @property
    def name(self) -> str:
        """The file name, whose suffix tells the format."""
        ...

    def open(self) -> contextlib.AbstractContextManager[Any]:
        """Opens the bytes, which can be read and rewound. Raises OSError or RejectError."""
        ...


def read_image(path: str | Path | Readable, limits: Limits = DEFAULT_LIMITS) -> Volume:
    """Reads an image as float32 [x y z], with scaling applied and stray NaN and Inf voxels set to 0 (W_NAN).

    Raises RejectError with E_FORMAT, E_TRUNCATED, E_CRC, E_TRAILING, E_HEADER, E_HEADER_SIZE, E_NDIM, E_DTYPE, E_SCALE,
    E_UNITS, E_NO_XFORM, E_XFORM, E_AFFINE, E_ZOOM or E_NAN, and with E_IO if the file cannot be read at all.
    """
    return _image(_read(path, limits, _volume), limits)


def check_image(image: SpatialImage, limits: Limits = Limits()) -> Volume:
    """Checks a nibabel image as `read_image` checks a file: its bytes as a NIfTI file pass the same guard."""
    if math.prod(image.shape) > limits.voxels:
        raise RejectError("E_HEADER_SIZE", f"{image.shape} voxels exceed the limit of {limits.voxels}")
    try:
        content = nib.Nifti1Image.from_image(image).to_bytes()
    except HeaderDataError as error:
        raise RejectError("E_DTYPE", f"the image cannot be stored as NIfTI: {error}") from error
    except (OSError, EOFError) as error:  # nibabel reads the voxels from the file only now
        raise RejectError("E_IO", f"the voxels of the image cannot be read: {error}") from error
    return _image(_parse(io.BytesIO(content), "image.nii", limits, _volume), limits)


def read_grid(path: str | Path, limits: Limits = DEFAULT_LIMITS) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns the voxels along x, y, z and the spacing in mm from the header alone, which is checked as by
    `read_image`.
    """
    header = _read(path, limits, _header)
    return header.shape, spacing_mm(header.affine)


def _image(volume: Volume, limits: Limits) -> Volume:
    with np.errstate(over="ignore"):  # values beyond float32 become Inf, which is counted below
        data, warnings = _finite(volume.data.astype(np.float32, copy=False), limits)
    return dataclasses.replace(volume, data=data, warnings=volume.warnings + warnings)


def read_labels(path: str | Path | Readable, limits: Limits = DEFAULT_LIMITS) -> Volume:
    """Reads a label map as integers [x y z]. Floats within 1e-3 of an integer are rounded; stray NaN voxels are
    background.

    Raises RejectError as `read_image` does, and E_LABEL_FLOAT if voxels are not integers.
    """
    volume = _read(path, limits, _volume)
    data, warnings = volume.data, ()
    if data.dtype.kind == "f":
        data, warnings = _finite(data, limits)
        rounded = np.rint(data)
        deviation = float(np.max(np.abs(data - rounded), initial=0.0))
        if deviation >= 1e-3:  # scale factors stored as float32 err by less; interpolation errs by more
            raise RejectError(
                "E_LABEL_FLOAT",
                f"labels must be integers, but a voxel is {deviation:.3g} off; was the map interpolated linearly?",
            )
        if np.max(np.abs(rounded), initial=0.0) >= 2**31:
            raise RejectError("E_LABEL_SET", f"a label of {np.max(np.abs(rounded)):.6g} is in no label table")
        data = rounded.astype(np.int32)
    return dataclasses.replace(volume, data=data, warnings=volume.warnings + warnings)


def write_labels(path: str | Path, labels: np.ndarray, like: Volume, overwrite: bool = False) -> None:
    """Writes the ids `labels` [x y z] as .nii.gz on the grid of `like`, under the final name only when complete.

    The file has the smallest unsigned type, no scaling, and the qform, sform and codes of `like`. Nothing else of that
    header is copied, because descriptions and extensions may name the participant. The same labels give the same bytes.
    Raises NeuronetError if the shapes differ, if a label is negative or above 65535, or if the file exists and
    `overwrite` is not set.
    """
    _write(Path(path), labels, _labels_header(labels, like), overwrite)


def write_posterior(path: str | Path, probability: np.ndarray, like: Volume, overwrite: bool = False) -> None:
    """Writes probabilities [x y z] from 0 to 1 as float32, otherwise as `write_labels` does."""
    header = _result_header(probability, like, np.float32, b"NeuroNet-JAX posterior")
    header["cal_max"] = 1
    _write(Path(path), probability, header, overwrite)


def _write(path: Path, volume: np.ndarray, header: nib.Nifti1Header, overwrite: bool) -> None:
    if not path.name.endswith(".nii.gz"):
        raise NeuronetError(f"results are written as .nii.gz, got the name {path.name!r}")
    if path.exists() and not overwrite:
        raise NeuronetError(f"{path} exists; allow overwriting, or choose a different output folder")
    voxels = volume.astype(header.get_data_dtype()).tobytes(order="F")
    content = igzip.compress(header.binaryblock + b"\0" * 4 + voxels, compresslevel=3, mtime=0)
    Files(str(path.parent.absolute())).write(path.name, content)


def labels_image(labels: np.ndarray, like: Volume) -> nib.Nifti1Image:
    """Returns a NIfTI image in memory, with the header that `write_labels` writes, on the grid of `like`."""
    header = _labels_header(labels, like)
    return nib.Nifti1Image(labels.astype(header.get_data_dtype()), header.get_best_affine(), header)


def _labels_header(labels: np.ndarray, like: Volume) -> nib.Nifti1Header:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > 65535:
        raise NeuronetError(f"labels must be within 0 and 65535, got {low} to {high}")
    header = _result_header(labels, like, np.uint8 if high <= 255 else np.uint16, b"NeuroNet-JAX labels")
    header["cal_max"] = high
    return header


def _result_header(volume: np.ndarray, like: Volume, dtype: type, description: bytes) -> nib.Nifti1Header:
    """Returns the header of a result on the grid of `like`."""
    if volume.shape != like.data.shape:
        raise NeuronetError(f"voxels of shape {volume.shape} do not fit the image's grid {like.data.shape}")
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(volume.shape)
    header.set_data_dtype(dtype)
    for field in ("pixdim", *_TRANSFORM_FIELDS):
        header[field] = like.header[field]
    header.set_xyzt_units("mm")  # the image was read as mm even if its header states no unit
    header["pixdim"][4:] = 0  # a squeezed time axis has no step
    header.set_slope_inter(1, 0)
    header["descrip"] = description
    header["vox_offset"] = 352  # header, and four bytes that mean no extension
    return header


_TRANSFORM_FIELDS = (
    ["qform_code", "sform_code"]
    + [f"quatern_{axis}" for axis in "bcd"]
    + [f"qoffset_{axis}" for axis in "xyz"]
    + [f"srow_{axis}" for axis in "xyz"]
)


# ---- reading, in the order of the checks ----------------------------------------------------------------------------


def _read(path: str | Path | Readable, limits: Limits, part: Callable[..., _Part]) -> _Part:
    """Returns a `part` of the file, `_header` or `_volume`."""
    path = Path(path) if isinstance(path, str) else path
    try:
        with open_regular(path) if isinstance(path, Path) else path.open() as file:
            return _parse(file, path.name, limits, part)
    except OSError as error:
        lost = isinstance(path, Path) and path.is_symlink() and not path.exists()
        hint = (
            "; it is a link to a file that is not here (`datalad get` fetches one of a DataLad dataset)" if lost else ""
        )
        raise RejectError("E_IO", f"the file cannot be read: {error.strerror}{hint}") from error


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes]]:
    """Opens a regular file. Raises RejectError for anything else, and OSError."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise RejectError("E_FORMAT", f"this is a folder, not an image; {_CONVERT}")
    if not stat.S_ISREG(mode):  # opening a pipe waits until somebody writes to it
        raise RejectError("E_FORMAT", "this is a pipe, a socket or a device; save the image as a file first")
    with path.open("rb") as file:
        yield file


def _parse(file: IO[bytes], name: str, limits: Limits, part: Callable[..., _Part]) -> _Part:
    suffix = next((s for s in (".nii.gz", ".nii", ".mgz") if name.lower().endswith(s)), None)
    if suffix is None:
        raise RejectError("E_FORMAT", f"unknown file type {Path(name).suffix!r}; {_CONVERT}")
    magic = file.read(2)
    file.seek(0)
    if not magic or (magic == b"\x1f\x8b") != (suffix != ".nii"):
        found = "gzip data" if magic == b"\x1f\x8b" else "data that are not gzip" if magic else "no data"
        raise RejectError("E_FORMAT", f"this {suffix} file holds {found}; rename it or export it again")
    if suffix == ".nii":
        return part(file, _read_nifti_header, limits)
    stream: Any = igzip.IGzipFile(fileobj=file, mode="rb")
    try:
        try:
            return part(stream, _read_mgh_header if suffix == ".mgz" else _read_nifti_header, limits)
        except RejectError as error:
            if error.code != "E_TRAILING":  # the header may be wrong because the stream is damaged; the CRC tells
                _drain(stream, limits.bytes)
            raise
    except EOFError as error:
        raise RejectError("E_TRUNCATED", "the gzip stream ends early; copy or download the file again") from error
    except (gzip.BadGzipFile, _DEFLATE_ERROR) as error:
        raise RejectError("E_CRC", f"the gzip stream is damaged ({error}); copy or download the file again") from error


class _Header(NamedTuple):
    """A header that has passed all checks."""

    header: Any  # nibabel's
    shape: tuple[int, ...]  # along x, y, z
    dtype: np.dtype
    offset: int  # bytes between header and voxels
    affine: np.ndarray
    slope: float
    intercept: float
    warnings: tuple[str, ...]


def _header(stream: IO[bytes], read_header: Any, limits: Limits) -> _Header:
    header, shape, dtype, offset = read_header(stream)
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
    return _Header(header, shape, dtype, offset, affine, slope, intercept, (*warnings, *notes))


def _volume(stream: IO[bytes], read_header: Any, limits: Limits) -> Volume:
    header, shape, dtype, offset, affine, slope, intercept, warnings = _header(stream, read_header, limits)
    _skip(stream, offset)
    buffer = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    _fill(stream, buffer.data)
    if _drain(stream, limits.trailing_bytes) > limits.trailing_bytes:
        raise RejectError(
            "E_TRAILING", f"more than {limits.trailing_bytes} bytes follow the voxels; the file is damaged or hostile"
        )
    data = buffer.view(dtype).reshape(shape, order="F")
    data = data.astype(dtype.newbyteorder("="), copy=False)
    if (slope, intercept) != (1.0, 0.0):
        data = data * np.float64(slope) + np.float64(intercept)
    return Volume(data, affine, header, warnings)


def _read_nifti_header(stream: IO[bytes]) -> tuple[Any, tuple[int, ...], np.dtype, int]:
    """Reads the header. Returns it with the shape, the voxel type and the number of bytes between header and voxels."""
    start = _read_exactly(stream, 348)
    size = {int.from_bytes(start[:4], order): order for order in ("big", "little")}
    known = next((s for s in _NIFTI if s in size), None)
    if known is None:
        if start[344:347] in (b"n+1", b"ni1"):
            raise RejectError("E_HEADER", f"sizeof_hdr must be 348 or 540, got {int.from_bytes(start[:4], 'little')}")
        raise RejectError("E_FORMAT", f"the content is not a NIfTI image; {_CONVERT}")
    block = start + _read_exactly(stream, known - 348)
    magic = block[344:348] if known == 348 else block[4:8]
    if magic[:3] in (b"ni1", b"ni2") or magic == b"\0\0\0\0":
        raise RejectError("E_FORMAT", f"Analyze files and .hdr/.img pairs are not supported; {_CONVERT}")
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


def _read_mgh_header(stream: IO[bytes]) -> tuple[Any, tuple[int, ...], np.dtype, int]:
    """Reads an MGH header as a NIfTI one, so that results can be written back on its grid; returns as
    `_read_nifti_header`.
    """
    block = _read_exactly(stream, _MGH_HEADER_BYTES)
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


def _finite(data: np.ndarray, limits: Limits) -> tuple[np.ndarray, tuple[str, ...]]:
    finite = np.isfinite(data)
    bad = data.size - int(np.count_nonzero(finite))
    if bad == 0:
        return data, ()
    if bad > limits.nan_fraction * data.size:
        raise RejectError(
            "E_NAN", f"{bad} of {data.size} voxels are NaN or Inf; at most {limits.nan_fraction:.2%} are accepted"
        )
    return np.where(finite, data, data.dtype.type(0)), ("W_NAN",)


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    block = bytearray(count)
    _fill(stream, memoryview(block))
    return bytes(block)


def _fill(stream: Any, view: memoryview) -> None:
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])
        if not count:
            raise RejectError(
                "E_TRUNCATED", f"the file ends {len(view) - filled} bytes early; copy or download it again"
            )
        filled += count


def _skip(stream: IO[bytes], count: int) -> None:
    if count:
        _read_exactly(stream, count)


def _drain(stream: IO[bytes], limit: int) -> int:
    """Reads to the end of the stream, or until more than `limit` bytes have come. Returns the number of bytes read."""
    drained = 0
    while drained <= limit and (block := stream.read(2**16)):
        drained += len(block)
    return drained
