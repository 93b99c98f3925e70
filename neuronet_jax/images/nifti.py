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
import math
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.spatialimages import HeaderDataError, SpatialImage

from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.files import Files
from neuronet_jax.images.headers import CONVERT, DEFAULT_LIMITS, Limits, fill, read_exactly, read_header
from neuronet_jax.images.space import Volume, spacing_mm

_DEFLATE_ERROR: type[Exception] = getattr(isal_zlib, "error")  # noqa: B009 (its stub types it as an instance)
_Part = TypeVar("_Part")


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


def check_image(image: SpatialImage, limits: Limits = DEFAULT_LIMITS) -> Volume:
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
    header = _read(path, limits, read_header)
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
    """Returns a `part` of the file, `read_header` or `_volume`."""
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
        raise RejectError("E_FORMAT", f"this is a folder, not an image; {CONVERT}")
    if not stat.S_ISREG(mode):  # opening a pipe waits until somebody writes to it
        raise RejectError("E_FORMAT", "this is a pipe, a socket or a device; save the image as a file first")
    with path.open("rb") as file:
        yield file


def _parse(file: IO[bytes], name: str, limits: Limits, part: Callable[..., _Part]) -> _Part:
    suffix = next((s for s in (".nii.gz", ".nii", ".mgz") if name.lower().endswith(s)), None)
    if suffix is None:
        raise RejectError("E_FORMAT", f"unknown file type {Path(name).suffix!r}; {CONVERT}")
    magic = file.read(2)
    file.seek(0)
    if not magic or (magic == b"\x1f\x8b") != (suffix != ".nii"):
        found = "gzip data" if magic == b"\x1f\x8b" else "data that are not gzip" if magic else "no data"
        raise RejectError("E_FORMAT", f"this {suffix} file holds {found}; rename it or export it again")
    if suffix == ".nii":
        return part(file, False, limits)
    stream: Any = igzip.IGzipFile(fileobj=file, mode="rb")
    try:
        try:
            return part(stream, suffix == ".mgz", limits)
        except RejectError as error:
            if error.code != "E_TRAILING":  # the header may be wrong because the stream is damaged; the CRC tells
                _drain(stream, limits.bytes)
            raise
    except EOFError as error:
        raise RejectError("E_TRUNCATED", "the gzip stream ends early; copy or download the file again") from error
    except (gzip.BadGzipFile, _DEFLATE_ERROR) as error:
        raise RejectError("E_CRC", f"the gzip stream is damaged ({error}); copy or download the file again") from error


def _volume(stream: IO[bytes], is_mgh: bool, limits: Limits) -> Volume:
    header, shape, dtype, offset, affine, slope, intercept, warnings = read_header(stream, is_mgh, limits)
    read_exactly(stream, offset)
    buffer = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    fill(stream, buffer.data)
    if _drain(stream, limits.trailing_bytes) > limits.trailing_bytes:
        raise RejectError(
            "E_TRAILING", f"more than {limits.trailing_bytes} bytes follow the voxels; the file is damaged or hostile"
        )
    data = buffer.view(dtype).reshape(shape, order="F")
    data = data.astype(dtype.newbyteorder("="), copy=False)
    if (slope, intercept) != (1.0, 0.0):
        data = data * np.float64(slope) + np.float64(intercept)
    return Volume(data, affine, header, warnings)


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


def _drain(stream: IO[bytes], limit: int) -> int:
    """Reads to the end of the stream, or until more than `limit` bytes have come. Returns the number of bytes read."""
    drained = 0
    while drained <= limit and (block := stream.read(2**16)):
        drained += len(block)
    return drained
