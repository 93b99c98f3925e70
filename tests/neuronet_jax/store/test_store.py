"""The store reads back its contents and reports every fault by name (rows B1 to B10 of the fault table)."""

import dataclasses
import hashlib
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files, kvstore_spec
from neuronet_jax.store.reader import Store, read_rejects
from neuronet_jax.store.schema import (
    Record,
    Reject,
    StoreError,
    Subject,
    sample_foreground,
    subjects_from_tsv,
    subjects_to_tsv,
)
from neuronet_jax.store.writer import StoreWriter

PROTOCOLS = ("fsl_fast", "fsl_first", "malp_em")
SPLITS = ("train", "train", "", "validation", "test")
SHARDS = {"image": "c/0/0/0/0", "labels": "c/0/0/0/0/0", "foreground": "c/0/0/0"}  # of slots 0 and 1

MakeStore = Callable[..., tuple[Store, dict[int, Record]]]


def read_all(store: Store, slot: int) -> None:
    store.read_crop(slot, (0, 0, 0), store.info.grid, PROTOCOLS)
    store.read_foreground(slot)


def failure(store: Store, slot: int) -> StoreError | None:
    try:
        read_all(store, slot)
    except StoreError as error:
        return error
    return None


def seal(root: Path) -> None:
    """Recomputes COMPLETE, so that a test reaches the later checks."""
    (root / "COMPLETE").write_text(hashlib.sha256((root / "store.json").read_bytes()).hexdigest())


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- reading back ---


def test_crops_equal_slices_of_the_written_records(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS)
    rng = np.random.default_rng(0)
    for _ in range(40):
        slot = int(rng.choice(list(records)))
        start = rng.integers(0, store.info.grid).tolist()
        shape = [int(rng.integers(1, side - first + 1)) for side, first in zip(store.info.grid, start, strict=True)]
        chosen = list(rng.permutation(PROTOCOLS)[: rng.integers(1, 4)])
        image, labels = store.read_crop(slot, start, shape, chosen)
        box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        np.testing.assert_array_equal(image, records[slot].image[box])
        expected = np.stack([records[slot].labels[(PROTOCOLS.index(name), *box)] for name in chosen])
        np.testing.assert_array_equal(labels, expected)
        assert image.dtype == np.float32
        assert labels.dtype == np.uint8


def test_subjects_and_whole_volumes_read_back(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS)
    assert store.subjects == tuple(record.subject for record in records.values())
    assert [subject.slot for subject in store.split("train")] == [0, 1]
    assert store.info.subjects == 4
    for slot, record in records.items():
        np.testing.assert_array_equal(store.read_image(slot), record.image)
        np.testing.assert_array_equal(store.read_labels(slot, PROTOCOLS), record.labels)
        np.testing.assert_array_equal(store.read_foreground(slot), record.foreground)
    assert store.gaps() == []
    assert (Path(store.dest) / "rejects.tsv").read_text() == "id\tcode\treason\tvisit\nrejected2\tE_CRC\tbad gzip\t\n"


def test_arrays_are_sharded_zarr3_with_checksums_and_names(make_store: MakeStore) -> None:
    store, _ = make_store(SPLITS)
    axes = {"image": ["subject", "x", "y", "z"], "labels": ["subject", "protocol", "x", "y", "z"]}
    for name, names in axes.items():
        metadata = json.loads((Path(store.dest) / name / "zarr.json").read_text())
        (sharding,) = metadata["codecs"]
        assert metadata["zarr_format"] == 3
        assert metadata["dimension_names"] == names
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"]["codecs"][-1]["name"] == "crc32c"
        assert sharding["configuration"]["index_codecs"][-1]["name"] == "crc32c"
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"][0] == 2


def test_a_hole_and_a_box_outside_the_grid_are_refused(make_store: MakeStore) -> None:
    store, _ = make_store(SPLITS)
    with pytest.raises(StoreError, match=r"E_SHARD_MISSING.*slot 2"):
        store.read_image(2)
    for start, shape in (((-1, 0, 0), (4, 4, 4)), ((33, 0, 0), (4, 4, 4)), ((0, 0, 0), (0, 4, 4))):
        with pytest.raises(NeuronetError, match="box must lie in the grid"):
            store.read_image(0, start, shape)
    with pytest.raises(NeuronetError, match="slots 0…4, got 5"):
        store.read_image(5)
    with pytest.raises(NeuronetError, match="not 'spm_tissue'"):
        store.read_labels(0, ["spm_tissue"])


def test_a_store_can_be_sent_to_a_different_process(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read_image(3), records[3].image)
    error = pickle.loads(pickle.dumps(StoreError("E_CRC", "slot 3")))
    assert (error.code, error.reason) == ("E_CRC", "slot 3")


@given(
    numbers=st.lists(st.floats(allow_nan=False), min_size=2, max_size=2),
    origin=st.lists(st.integers(-99, 99), min_size=3, max_size=3),
    text=st.text(),
)
@settings(max_examples=50, deadline=None)
def test_rows_survive_the_table_exactly(numbers: list[float], origin: list[int], text: str) -> None:
    affine = ((numbers[0], 0.0, 0.0, 0.0),) * 4
    subject = Subject(
        slot=3,
        id="s3",
        split="test",
        present=(True, False),
        mean=numbers[0],
        std=numbers[1],
        source_shape=(1, 2, 3),
        source_affine=affine,
        affine=affine,
        conformed_shape=(4, 5, 6),
        origin=tuple(origin),
        warnings=(text,),
    )
    assert subjects_from_tsv(subjects_to_tsv([subject])) == (subject,)


def test_an_interrupted_shard_is_replaced_not_merged(make_store: MakeStore, tmp_path: Path) -> None:
    """A shard rewritten with a hole must not keep the old subject in the hole."""
    store, records = make_store(SPLITS)
    writer = StoreWriter.reopen(store.dest)
    with pytest.raises(StoreError, match="E_INCOMPLETE"):
        Store.open(store.dest)
    writer.write_shard(0, [records[0], None])
    writer.finalize([records[slot].subject for slot in (0, 3, 4)], [])
    again = Store.open(store.dest)
    np.testing.assert_array_equal(again.read_image(0), records[0].image)
    with pytest.raises(StoreError, match="E_SHARD_MISSING"):
        again.read_image(1)
    assert again.info.split_hash != store.info.split_hash


def test_finalize_refuses_gaps_leaks_and_bad_ids(make_store: MakeStore, tmp_path: Path) -> None:
    _, records = make_store(SPLITS)
    writer = StoreWriter.create(
        str(tmp_path / "other"),
        protocols=PROTOCOLS,
        grid=(36, 40, 32),
        voxel_size_mm=2.0,
        slots=4,
        shard_subjects=2,
        provenance={},
    )
    writer.write_shard(0, [records[0], records[1]])
    assert writer.has_shard(0)
    assert not writer.has_shard(2)
    first, second = records[0].subject, records[1].subject
    with pytest.raises(StoreError, match=r"E_SHARD_MISSING.*foreground/c/1"):
        writer.finalize([first, second, records[3].subject], [])
    with pytest.raises(StoreError, match="E_LEAK"):
        writer.finalize([first, dataclasses.replace(second, id=first.id, split="test")], [])
    with pytest.raises(StoreError, match="E_ID"):
        writer.finalize([dataclasses.replace(first, id="../1")], [])
    with pytest.raises(StoreError, match="E_MISMATCH"):
        writer.finalize([first, first], [])
    assert not (tmp_path / "other" / "COMPLETE").exists()


def test_write_shard_checks_its_arguments(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS)
    writer = StoreWriter.reopen(store.dest)
    record = records[0]
    bad = np.array(record.image)
    bad[0, 0, 0] = np.nan
    for name, value, text in (
        ("image", record.image.astype(np.float64), "must be float32"),
        ("image", record.image[:-1], "must be float32"),
        ("labels", record.labels[:2], "must be uint8"),
        ("foreground", record.foreground[:5], "must be int16"),
        ("image", bad, "finite"),
    ):
        with pytest.raises(NeuronetError, match=text):
            writer.write_shard(0, [dataclasses.replace(record, **{name: value})])
    with pytest.raises(NeuronetError, match="belongs to slot 0"):
        writer.write_shard(2, [record])
    with pytest.raises(NeuronetError, match="multiple of 2"):
        writer.write_shard(1, [record])


# --- foreground points ---


def test_foreground_is_half_uniform_and_half_balanced_over_structures() -> None:
    labels = np.zeros((2, 20, 20, 20), np.uint8)
    labels[0, 2:12, 2:12, 2:12] = 1  # 1,000 voxels
    labels[0, 15, 15, 15] = 3  # one voxel of the other structure
    labels[1, 18] = 2  # an absent protocol must not be drawn
    points = sample_foreground(labels, (True, False), seed=1)
    drawn = labels[0][tuple(points.T)]
    assert points.dtype == np.int16
    assert points.shape == (2048, 3)
    assert set(np.unique(drawn)) == {1, 3}
    # 1/4 balanced and 1/1001 of 1/2 uniform; three standard deviations of the binomial of 1,024 draws
    assert abs(np.count_nonzero(drawn == 3) - 512.5) < 3 * math.sqrt(1024 / 4)
    np.testing.assert_array_equal(points, sample_foreground(labels, (True, False), seed=1))
    with pytest.raises(NeuronetError, match="background only"):
        sample_foreground(labels, (False, False), seed=1)


# --- the fault table ---


@pytest.mark.parametrize("name", SHARDS)
def test_B01_deleted_shard_is_an_error_never_zeros(make_store: MakeStore, name: str) -> None:
    store, _ = make_store(SPLITS)
    (Path(store.dest) / name / SHARDS[name]).unlink()
    fresh = Store.open(store.dest)
    with pytest.raises(StoreError, match=f"{name} of the subject in slot 1") as caught:
        read_all(fresh, 1)
    assert caught.value.code == "E_SHARD_MISSING"
    read_all(fresh, 3)  # other shards are untouched
    assert fresh.gaps() == [f"{name}/{SHARDS[name]}"]


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("damage", ["chunk", "index", "truncated", "empty"])
def test_B02_damage_is_found_by_checksum_and_the_subject_named(make_store: MakeStore, name: str, damage: str) -> None:
    store, _ = make_store(SPLITS)
    shard = Path(store.dest) / name / SHARDS[name]
    data = bytearray(shard.read_bytes())
    if damage == "chunk":
        data[len(data) // 3] ^= 1
    elif damage == "index":
        data[-10] ^= 1
    else:
        del data[len(data) // 2 if damage == "truncated" else 0 :]
    shard.write_bytes(data)
    fresh = Store.open(store.dest)
    failures = [(slot, error) for slot in (0, 1) if (error := failure(fresh, slot))]
    assert failures
    for slot, error in failures:
        assert error.code == "E_CRC"
        assert f"{name} of the subject in slot {slot}" in str(error)


def test_B03_store_without_marker_is_refused(make_store: MakeStore) -> None:
    store, _ = make_store(SPLITS)
    root = Path(store.dest)
    (root / "COMPLETE").unlink()
    with pytest.raises(StoreError, match=r"E_INCOMPLETE.*no COMPLETE marker"):
        Store.open(root)
    seal(root)
    Store.open(root)
    (root / "store.json").unlink()
    with pytest.raises(StoreError, match="E_INCOMPLETE"):
        Store.open(root)


def test_B04_store_that_disagrees_with_its_arrays_is_refused(make_store: MakeStore) -> None:
    store, _ = make_store(SPLITS)
    root = Path(store.dest)
    originals = {path: path.read_bytes() for path in [*root.glob("*.*"), root / "COMPLETE", *root.glob("*/zarr.json")]}

    def refused(match: str) -> None:
        with pytest.raises(StoreError, match=match):
            Store.open(root)
        for path, data in originals.items():
            path.write_bytes(data)
        Store.open(root)

    edit_json(root / "store.json", provenance={"made_by": "someone else"})
    refused("store.json of .* was changed")
    edit_json(root / "store.json", subjects=3)
    seal(root)
    refused("lists 4 subjects, but store.json says 3")
    (root / "subjects.tsv").write_bytes(originals[root / "subjects.tsv"].replace(b"validation", b"train"))
    refused("subjects.tsv .* does not match store.json")
    edit_json(root / "image" / "zarr.json", shape=[5, 36, 40, 30])
    refused(r"image of .* must be float32 \(5, 36, 40, 32\)")
    edit_json(root / "labels" / "zarr.json", data_type="int8")
    refused("labels of .* must be uint8")
    edit_json(root / "store.json", surprise=1)
    seal(root)
    refused("unexpected fields.*surprise")


@pytest.mark.parametrize(("version", "fix"), [(3, "update"), (0, "rebuild")])
def test_B05_a_different_schema_version_names_both(make_store: MakeStore, version: int, fix: str) -> None:
    store, _ = make_store(SPLITS)
    edit_json(Path(store.dest) / "store.json", schema_version=version)
    seal(Path(store.dest))
    with pytest.raises(StoreError, match=f"E_SCHEMA.*version {version}, but this release reads 2.*{fix}"):
        Store.open(store.dest)


def test_B05_a_store_of_version_1_opens(make_store: MakeStore) -> None:
    """It has no visits."""
    store, records = make_store(SPLITS)
    root = Path(store.dest)
    for name in ("subjects.tsv", "rejects.tsv"):
        rows = (root / name).read_text().splitlines()
        (root / name).write_text("".join(row.rpartition("\t")[0] + "\n" for row in rows))
    table = hashlib.sha256((root / "subjects.tsv").read_bytes()).hexdigest()
    edit_json(root / "store.json", schema_version=1, subjects_hash=table)
    seal(root)
    older = Store.open(root)
    assert older.subjects == store.subjects and read_rejects(Files(store.dest)) == [
        Reject("rejected2", "E_CRC", "bad gzip")
    ]
    np.testing.assert_array_equal(older.read_image(1), records[1].image)
    StoreWriter.reopen(store.dest).finalize(older.subjects, [])
    assert Store.open(root).info.schema_version == 2


def test_B06_stale_locks_and_temporary_files_are_ignored(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS)
    root = Path(store.dest)
    for name in ("image/c/0/0/0/0.__lock", "store.json.__lock", "subjects.tsv.tmp123", "labels/c/9/0/0/0/0.__lock"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"stale")
    fresh = Store.open(root)
    np.testing.assert_array_equal(fresh.read_image(1), records[1].image)
    assert fresh.gaps() == []
    writer = StoreWriter.reopen(store.dest)  # nor do they block a writer
    writer.write_shard(0, [records[0], records[1]])
    writer.finalize([record.subject for record in records.values()], [])
    np.testing.assert_array_equal(Store.open(root).read_image(1), records[1].image)


def test_B07_finished_store_cannot_be_written(make_store: MakeStore) -> None:
    store, _ = make_store(SPLITS)
    with pytest.raises(StoreError, match="E_READ_ONLY"):
        StoreWriter.open(store.dest)
    with pytest.raises(StoreError, match=r"E_EXISTS.*read-only"):
        make_store(SPLITS)
    with pytest.raises(ValueError, match="does not support writing"):
        store._arrays["image"][0].write(0).result()


def test_B08_background_is_stored_explicitly(make_store: MakeStore) -> None:
    store, records = make_store(SPLITS)
    writer = StoreWriter.reopen(store.dest)
    blank = dataclasses.replace(records[0], image=records[0].image * 0, labels=records[0].labels * 0)
    writer.write_shard(0, [blank, None])
    writer.finalize([blank.subject, records[3].subject, records[4].subject], [])
    fresh = Store.open(store.dest)
    assert not fresh.read_image(0).any()  # a missing chunk would raise, as slot 1 does
    assert not fresh.read_labels(0, PROTOCOLS).any()
    with pytest.raises(StoreError, match="E_SHARD_MISSING"):
        fresh.read_image(1)


def test_B09_readers_see_only_committed_subjects(make_store: MakeStore, tmp_path: Path) -> None:
    _, records = make_store(SPLITS)
    dest = str(tmp_path / "growing")
    writer = StoreWriter.create(
        dest,
        protocols=PROTOCOLS,
        grid=(36, 40, 32),
        voxel_size_mm=2.0,
        slots=4,
        shard_subjects=1,
        provenance={},
        chunk=16,
    )
    for slot in (0, 1):
        writer.write_shard(slot, [records[slot]])
        with pytest.raises(StoreError, match="E_INCOMPLETE"):
            Store.open(dest)
    writer.finalize([records[0].subject], [])
    late = StoreWriter(dest, writer.info)  # a job that has not noticed the end
    late.write_shard(3, [records[3]])
    store = Store.open(dest)
    assert [subject.slot for subject in store.subjects] == [0]
    np.testing.assert_array_equal(store.read_image(0), records[0].image)


def test_B10_links_out_of_the_store_are_refused(make_store: MakeStore, tmp_path: Path) -> None:
    store, records = make_store(SPLITS)
    root = Path(store.dest)
    (tmp_path / "alias").symlink_to(root)  # the path to the store may be a link
    np.testing.assert_array_equal(Store.open(tmp_path / "alias").read_image(0), records[0].image)
    (root / "inside.tsv").symlink_to(root / "subjects.tsv")  # so may a file that stays inside
    Store.open(root)
    shard = root / "image" / SHARDS["image"]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="E_SYMLINK: image/c/0/0/0/0"):
        Store.open(root)


@pytest.mark.parametrize(
    "dest",
    [
        "file:///tmp/store",
        "http://host/store",
        "https://host/store",
        "memory://store",
        "s3+https://host/bucket/store",
        "gs://bucket/store|zarr3:",
        "s3://bucket/../other",
        "s3://bucket/store?endpoint=http://host",
        "/data/store.zip|zip:",
        '{"driver": "http", "base_url": "http://host/"}',
        "",
    ],
)
def test_B10_other_kinds_of_places_are_refused(dest: str) -> None:
    with pytest.raises(NeuronetError, match=r"a local path, gs://bucket/path or s3://|must not contain '\.\.'"):
        Store.open(dest)


def test_buckets_and_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert kvstore_spec("gs://b/a/c/", "image") == {"driver": "gcs", "bucket": "b", "path": "a/c/image/"}
    assert kvstore_spec("s3://b") == {"driver": "s3", "bucket": "b", "path": ""}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    monkeypatch.setenv("AWS_REGION", "local")
    assert kvstore_spec("s3://b/x") | {"path": ""} == {
        "driver": "s3",
        "bucket": "b",
        "path": "",
        "endpoint": "http://127.0.0.1:9000",
        "aws_region": "local",
    }


def test_files_are_replaced_by_one_of_many_and_names_are_listed(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    content, absent = files.read_version("leases/0")
    assert content is None
    first = files.replace("leases/0", b"me", absent)
    assert first is not None and files.replace("leases/0", b"you", absent) is None
    assert files.read_version("leases/0") == (b"me", first)
    second = files.replace("leases/0", b"me again", first)
    assert second is not None and files.replace("leases/0", None, first) is None
    assert files.read("leases/0") == b"me again"
    assert files.replace("leases/0", None, second) is not None and files.read("leases/0") is None
    files.write("leases/0", b"me")
    files.write("leases/1", b"")
    files.write("leaseless", b"")
    assert files.names("leases/") == ["leases/0", "leases/1"]
    files.delete("leases/0")
    files.delete("leases/0")
    assert files.read("leases/0") is None
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NeuronetError, match="E_IO: cannot write 'file/x'"):
        files.write("file/x", b"")


def test_store_lives_in_a_bucket(make_store: MakeStore, bucket: str) -> None:
    """Runs the same code against a real S3 server on this machine."""
    dest = f"{bucket}/demo/store"
    store, records = make_store(SPLITS[:3], dest=dest)
    image, labels = store.read_crop(1, (3, 5, 7), (20, 20, 20), PROTOCOLS)
    box = (slice(3, 23), slice(5, 25), slice(7, 27))
    np.testing.assert_array_equal(image, records[1].image[box])
    np.testing.assert_array_equal(labels, records[1].labels[(slice(None), *box)])
    assert store.subjects == (records[0].subject, records[1].subject)
    with pytest.raises(StoreError, match="E_READ_ONLY"):
        StoreWriter.open(dest)
    Files(dest).delete("image/c/0/0/0/0")
    with pytest.raises(StoreError, match="E_SHARD_MISSING"):
        Store.open(dest).read_image(1)
