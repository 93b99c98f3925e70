"""Reads the variables of a TensorFlow checkpoint or SavedModel (a "tensor bundle") without TensorFlow.

    PREFIX.index                  a sorted string table: variable name → dtype, shape, place and checksum of its bytes
    PREFIX.data-00000-of-00001    the bytes of all variables, little-endian

The table is LevelDB's (its `table_format.md`): blocks of prefix-compressed keys, each block followed by its compression
and checksum, found through an index block that the footer points to. The values are protocol buffers
(`tensor_bundle.proto`, `tensor_shape.proto`). All checksums are CRC-32C, rotated and offset ("masked"). The files come
from a download: nothing in them is believed before it is checked.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts

from neuronet_jax.errors import NeuronetError

_MAGIC = 0xDB4775248B80FB57  # at the end of every LevelDB table
_FOOTER_BYTES = 48  # two block handles of at most 20 bytes each, padded, and the magic number
_TRAILER_BYTES = 5  # after each block: its compression and its masked checksum
_MASK_DELTA = 0xA282EAD8  # of LevelDB's masked checksums
_DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # of types.proto: those of networks and their counters
_MOST_SHARDS = 1000  # a network of 25 MB has one
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
_FIX = "the files are damaged or incomplete: fetch them again"


def read(prefix: Path) -> dict[str, np.ndarray]:
    """Returns every variable by its name, from PREFIX.index and its data files.

    Raises NeuronetError if a file is missing or truncated, if a checksum does not match, or for features that this
    reader does not support: compressed blocks, partitioned variables, big-endian files, other dtypes.
    """
    entries = dict(_table(_bytes(prefix.with_name(f"{prefix.name}.index")), f"{prefix.name}.index"))
    if "" not in entries:
        raise NeuronetError(f"{prefix.name}.index is not a TensorFlow checkpoint: it lacks the header; {_FIX}")
    header = _message(entries.pop(""), f"{prefix.name}.index")
    if _number(header, 2) != 0:
        raise NeuronetError(
            f"{prefix.name}.index was written on a big-endian machine; save it again on a little-endian one"
        )
    shards = _number(header, 1)
    if not 1 <= shards <= _MOST_SHARDS:
        raise NeuronetError(f"{prefix.name}.index announces {shards} data files; {_FIX}")
    data = [_bytes(prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{shards:05d}")) for i in range(shards)]
    return {name: _variable(name, _message(entry, name), data) for name, entry in entries.items()}


def _variable(name: str, entry: dict[int, list], data: list[bytes]) -> np.ndarray:
    """Returns the array that a BundleEntryProto describes."""
    if 7 in entry:
        raise NeuronetError(f"{name} is partitioned into slices, which is not supported; save it as one variable")
    dtype = _DTYPES.get(_number(entry, 1))
    if dtype is None:
        raise NeuronetError(f"{name} has TensorFlow's dtype number {_number(entry, 1)}; {sorted(_DTYPES)} are read")
    dimensions = _message(entry.get(2, [b""])[-1], name).get(2, [])
    shape = tuple(_number(_message(dimension, name), 1) for dimension in dimensions)
    shard, offset, size = (_number(entry, field) for field in (3, 4, 5))
    if size != math.prod(shape) * np.dtype(dtype).itemsize:
        raise NeuronetError(f"{name} of shape {shape} is said to take {size} bytes, which cannot be; {_FIX}")
    if shard >= len(data) or offset + size > len(data[shard]):
        raise NeuronetError(
            f"{name} lies at byte {offset} to {offset + size} of data file {shard}, beyond its end; {_FIX}"
        )
    content = data[shard][offset : offset + size]
    _check(content, _number(entry, 6), name)
    return np.frombuffer(content, dtype).reshape(shape)


def _table(data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """Yields the keys and values of a sorted string table, in order."""
    footer = data[-_FOOTER_BYTES:]
    if len(footer) < _FOOTER_BYTES or struct.unpack("<Q", footer[-8:])[0] != _MAGIC:
        raise NeuronetError(f"{name} does not end like the index of a TensorFlow checkpoint; {_FIX}")
    _, _, at = _handle(footer, 0, name)  # of the meta index, which holds nothing here
    start, size, _ = _handle(footer, at, name)
    for _, handle in _block(data, start, size, name):
        start, size, _ = _handle(handle, 0, name)
        for key, value in _block(data, start, size, name):
            yield key.decode(errors="replace"), value


def _block(data: bytes, start: int, size: int, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of one block. Each key states how many bytes it shares with the one before, and the
    rest.
    """
    end = start + size
    if end + _TRAILER_BYTES > len(data) or size < 4:
        raise NeuronetError(f"{name} has a block at byte {start} to {end}, beyond its end; {_FIX}")
    _check(data[start : end + 1], struct.unpack("<I", data[end + 1 : end + _TRAILER_BYTES])[0], name)
    if data[end] != 0:
        raise NeuronetError(f"{name} is compressed (type {data[end]}), which TensorFlow's own checkpoints are not")
    content = data[start:end]
    limit = size - 4 * (1 + struct.unpack("<I", content[-4:])[0])  # restart points and their number close a block
    at, key = 0, b""
    while at < limit:
        shared, at = _varint(content, at, name)
        unshared, at = _varint(content, at, name)
        length, at = _varint(content, at, name)
        if at + unshared + length > limit or shared > len(key):
            raise NeuronetError(f"{name} has an entry that leaves its block; {_FIX}")
        key = key[:shared] + content[at : at + unshared]
        at += unshared + length
        yield key, content[at - length : at]


def _handle(data: bytes, at: int, name: str) -> tuple[int, int, int]:
    """Returns the start and size of a block, and the position of the next handle."""
    start, at = _varint(data, at, name)
    size, at = _varint(data, at, name)
    return start, size, at


def _message(data: bytes | int, name: str) -> dict[int, list]:
    """Returns the fields of a protocol buffer by number: integers, or the bytes of strings and messages."""
    if isinstance(data, int):
        raise NeuronetError(f"the description of {name!r} has a number in place of a message; {_FIX}")
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, name)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at, name)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
            if wire == _BYTES:
                size, at = _varint(data, at, name)
            if size > len(data) - at or wire not in (_FIXED64, _BYTES, _FIXED32):
                raise NeuronetError(f"the description of {name!r} cannot be read; {_FIX}")
            value = data[at : at + size] if wire == _BYTES else int.from_bytes(data[at : at + size], "little")
            at += size
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: dict[int, list], number: int) -> int:
    """Returns an integer field: the last one given, or 0."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise NeuronetError(f"field {number} of a description is not a number; {_FIX}")
    return value


def _varint(data: bytes, at: int, name: str) -> tuple[int, int]:
    """Returns a number of seven bits per byte, low bits first, and the position after it."""
    value = 0
    for count, byte in enumerate(data[at : at + 10]):  # ten bytes hold 64 bits
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, at + count + 1
    raise NeuronetError(f"{name!r} holds an unterminated number; {_FIX}")


def _check(content: bytes, expected: int, name: str) -> None:
    crc = crc32c(content)
    if (((crc >> 15 | crc << 17) & 0xFFFFFFFF) + _MASK_DELTA) & 0xFFFFFFFF != expected:
        raise NeuronetError(f"{name} does not match its checksum; {_FIX}")


def crc32c(content: bytes) -> int:
    """Returns CRC-32C (Castagnoli, RFC 3720) of `content`, as TensorStore appends it to a chunk with that codec."""
    if not content:
        return 0
    array = np.frombuffer(content, np.uint8)
    metadata = {
        "shape": [array.size],
        "data_type": "uint8",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [array.size]}},
        "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
    }
    spec = {"driver": "zarr3", "kvstore": "memory://", "metadata": metadata, "store_data_equal_to_fill_value": True}
    chunk = ts.open(spec, create=True).result()
    chunk.write(array).result()
    assert chunk.kvstore is not None  # the `memory://` above
    return int.from_bytes(chunk.kvstore.read("c/0").result().value[-4:], "little")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NeuronetError(
            f"{path} cannot be read ({error.strerror}); give the folder of the SavedModel, which holds "
            "variables/variables.index and variables/variables.data-00000-of-00001"
        ) from error
