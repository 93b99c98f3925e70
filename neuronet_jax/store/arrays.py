"""The store's arrays: conformed scans and their label maps in sharded zarr3, written once and read by chunk.

    DEST/image       float32 [subject x y z]           raw intensities on the common grid
    DEST/labels      uint8   [subject protocol x y z]  class indices
    DEST/foreground  int16   [subject point axis]      labelled voxel positions, to place crops without reading volumes
    DEST/subjects.tsv, rejects.tsv, store.json and, last, COMPLETE (the hash of store.json)

A shard holds whole subjects and is written once by one worker. The unit of reading is an inner chunk of one subject,
with all protocols together. Chunks and indexes carry a crc32c. Background is stored; a missing chunk is an error.

Measured on a 192×224×192 scan with five label maps (2 cores, no cache): milliseconds to read image and labels of random
crops of 64³ / 96³ / 128³, by the side of a chunk: 16 6/15/29, 32 4/10/20, 48 6/13/20, 64 13/17/26. One chunk per
protocol (32) takes 5/11/23 and three times the requests. Size per subject: zstd 7.6 MB, lz4 13.2 (128³: 14 ms), no
codec 74.
"""

from collections.abc import Sequence
from typing import Any

import tensorstore as ts

from neuronet_jax.files import RETRIES, Files, kvstore_spec
from neuronet_jax.store.schema import FOREGROUND_POINTS, StoreInfo, Subject

CACHE_BYTES = 64 * 2**20  # keeps shard indexes and foreground points between reads; volumes of a large cohort never fit
_CODEC = {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 1, "shuffle": "shuffle"}}


def open_arrays(
    dest: str, info: StoreInfo, concurrency: int | None, create: bool = False, write: bool = False
) -> dict[str, Any]:
    """Opens each array. `concurrency` bounds codec threads and requests in flight; None leaves it to TensorStore."""
    requests = {"file": "file_io_concurrency", "gcs": "gcs_request_concurrency", "s3": "s3_request_concurrency"}
    driver = kvstore_spec(dest)["driver"]
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}, **RETRIES})
    if concurrency is not None:
        limit = {"limit": concurrency}
        context = ts.Context({"data_copy_concurrency": limit, requests[driver]: limit}, parent=context)
    arrays = {}
    for name, metadata in array_metadata(info).items():
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore_spec(dest, name),
            "fill_missing_data_reads": False,  # a missing chunk is an error
            "store_data_equal_to_fill_value": True,  # therefore background is stored too
            "recheck_cached_data": False,  # finished stores do not change
        }
        if create:
            spec["metadata"] = metadata
        arrays[name] = ts.open(spec, context=context, read=True, write=write, create=create, open=True).result()
    return arrays


def array_metadata(info: StoreInfo) -> dict[str, dict[str, Any]]:
    """Returns the zarr3 metadata of each array."""
    sides = tuple(-(-side // info.chunk) * info.chunk for side in info.grid)  # a shard is a whole number of chunks
    cube = (info.chunk,) * 3
    protocols = len(info.protocols)
    per_shard = info.shard_subjects

    def array(dtype: str, shape: tuple, shard: tuple, chunk: tuple, names: tuple) -> dict[str, Any]:
        inner = {
            "chunk_shape": chunk,
            "codecs": [{"name": "bytes"}, _CODEC, {"name": "crc32c"}],
            "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
        }
        return {
            "shape": shape,
            "data_type": dtype,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
            "dimension_names": names,
        }

    n, points = info.slots, FOREGROUND_POINTS
    volume = ("x", "y", "z")
    return {
        "foreground": array(
            "int16", (n, points, 3), (per_shard, points, 3), (1, points, 3), ("subject", "point", "axis")
        ),
        "labels": array(
            "uint8",
            (n, protocols, *info.grid),
            (per_shard, protocols, *sides),
            (1, protocols, *cube),
            ("subject", "protocol", *volume),
        ),
        "image": array("float32", (n, *info.grid), (per_shard, *sides), (1, *cube), ("subject", *volume)),
    }


def shard_key(name: str, number: int) -> str:
    """Returns the file name of a shard below the store."""
    return f"{name}/c/{number}" + "/0" * {"foreground": 2, "labels": 4, "image": 3}[name]


def gaps(files: Files, info: StoreInfo, subjects: Sequence[Subject]) -> list[str]:
    """Returns the file names of the missing shards of these subjects."""
    numbers = sorted({subject.slot // info.shard_subjects for subject in subjects})
    return [
        key
        for name in array_metadata(info)
        for there in [set(files.names(f"{name}/c/"))]
        for number in numbers
        if (key := shard_key(name, number)) not in there
    ]
