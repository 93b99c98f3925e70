"""An archive of UK Biobank: sound, broken in every way, unpacked, and joined with the study's own maps."""

import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep import build as build_module
from data_prep import verify
from data_prep.assemble import build_sources
from data_prep.sources.ukb import read_archive
from data_prep.sources.zips import Member
from data_prep.splits import assign_splits
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.store.reader import Store

GRID = (48, 56, 48)
SMALL = ["--voxel-size-mm=4", "--grid=48,56,48"]
T1 = "T1/T1.nii.gz"
MEMBERS = {
    "fsl_fast": "T1/T1_fast/T1_brain_seg.nii.gz",
    "fsl_first": "T1/T1_first/T1_first_all_fast_firstseg.nii.gz",
}
Content = dict[str, bytes]  # of a zip, by name of its member


def zipped(path: Path, content: Content) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def truncated(path: Path, content: Content) -> None:
    data = zipped(path, content).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flipped(path: Path, content: Content) -> None:
    """The payload of the scan differs by one byte, which the sum of the archive tells."""
    data = bytearray(zipped(path, content).read_bytes())
    data[data.index(content[T1]) + len(content[T1]) - 1] ^= 1
    path.write_bytes(data)


def empty(path: Path, content: Content) -> None:
    path.write_bytes(b"")


def page(path: Path, content: Content) -> None:
    path.write_text("<html>401 Unauthorized</html>")


def leading_out(path: Path, content: Content) -> None:
    zipped(path, {"../../x": b"x", **content})


def absolute(path: Path, content: Content) -> None:
    zipped(path, {"/etc/x": b"x", **content})


def on_a_drive(path: Path, content: Content) -> None:
    zipped(path, {"C:x": b"x", **content})


def crowded(path: Path, content: Content) -> None:
    zipped(path, {**content, **{f"T1/{number}": b"" for number in range(20_000)}})


def packed_in_a_new_way(path: Path, content: Content) -> None:
    """The directory names a compression that no program knows yet."""
    data = bytearray(zipped(path, content).read_bytes())
    for signature, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        data[data.index(signature) + place] = 77
    path.write_bytes(data)


def linked(path: Path, content: Content) -> None:
    info = zipfile.ZipInfo(T1)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(without_scan(path, content), "a") as archive:
        archive.writestr(info, "/etc/passwd")


def bomb(path: Path, content: Content) -> None:
    with zipfile.ZipFile(without_scan(path, content), "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(T1, bytes(10_000_000))


def encrypted(path: Path, content: Content) -> None:
    data = bytearray(zipped(path, content).read_bytes())
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = -1
        while (at := data.find(signature, at + 1)) >= 0:
            data[at + place] |= 1
    path.write_bytes(data)


def nested(path: Path, content: Content) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(T1, content[T1])
    zipped(path, content | {T1: inner.getvalue()})


def short_scan(path: Path, content: Content) -> None:
    zipped(path, content | {T1: content[T1][:5000]})


def without_scan(path: Path, content: Content) -> Path:
    return zipped(path, {name: data for name, data in content.items() if name != T1})


def unusable(path: Path, content: Content) -> None:
    zipped(path, {"T1/unusable/T1.nii.gz": content[T1]})


def two_scans(path: Path, content: Content) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(zipped(path, content), "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(T1, content[T1])


BROKEN: dict[Callable[[Path, Content], object], str] = {
    truncated: "E_ZIP",
    flipped: "E_ZIP",
    empty: "E_ZIP",
    page: "E_ZIP",
    leading_out: "E_ZIP",
    absolute: "E_ZIP",
    linked: "E_ZIP",
    bomb: "E_ZIP",
    encrypted: "E_ZIP",
    nested: "E_FORMAT",
    short_scan: "E_TRUNCATED",
    without_scan: "E_ZIP_MEMBER",
    unusable: "E_ZIP_MEMBER",
    two_scans: "E_ZIP_MEMBER",
}


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (leading_out, "a member's name leads out"),
        (absolute, "a member's name leads out"),
        (on_a_drive, "a member's name leads out"),
        (crowded, "has 20001 members, more than 20000"),
        (packed_in_a_new_way, r"damaged \(NotImplementedError\)"),
        (linked, "is a link"),
        (encrypted, "is encrypted; decrypt"),
        (bomb, "inflates 10.* times"),
    ],
)
def test_an_archive_says_what_it_is_refused_for(way, reason, tmp_path):
    way(tmp_path / "visit.zip", {T1: b"scan"})
    with pytest.raises(RejectError, match=reason) as raised, Member(tmp_path / "visit.zip", T1).open() as stream:
        stream.read()
    assert raised.value.code == "E_ZIP"


@pytest.fixture
def make_archive(brain, tmp_path) -> Callable[..., Path]:
    """Writes one zip for each function of (path, content), for participants 1000001 and on, in folders of ten."""

    def packed(data: np.ndarray) -> bytes:
        return brain.write(tmp_path / "one.nii.gz", data).read_bytes()

    maps = {member: packed(brain.ids(name)) for name, member in MEMBERS.items()}
    maps["T1/T1_fast/T1_brain_pveseg.nii.gz"] = packed(np.where(brain.ids("fsl_fast") == 1, 0, brain.ids("fsl_fast")))

    def make(*ways: Callable[[Path, Content], object], name: str = "archive", instance: int = 2, seed: int = 0) -> Path:
        folder = tmp_path / name
        for number, way in enumerate(ways):
            place = folder / str(number // 10)
            place.mkdir(parents=True, exist_ok=True)
            content = {T1: packed(brain.head(seed + number)), "T1/T1_brain.nii.gz": b"not read", **maps}
            way(place / f"{1000001 + number}_20252_{instance}_0.zip", content)
        return folder

    return make


def test_A32_A33_broken_archives_reject_their_visits_alone(make_archive, tmp_path):
    archive = make_archive(zipped, *BROKEN, zipped)
    options = {"voxel_size_mm": 4.0, "grid": GRID, "workers": 0, "max_reject_fraction": 1.0}
    report = build_sources(assign_splits(read_archive(archive)), str(tmp_path / "store"), **options)
    found = {reject.id: reject.code for reject in report.rejects}
    for number, (way, code) in enumerate(BROKEN.items()):
        assert found.pop(f"{1000002 + number}") == code, way.__name__
    assert found == {} and {reject.visit for reject in report.rejects} == {"2"}
    assert not any("10000" in reject.reason or str(tmp_path) in reject.reason for reject in report.rejects)
    store = Store.open(tmp_path / "store")
    assert [(row.id, row.visit) for row in store.subjects] == [("1000001", "2"), (f"{1000002 + len(BROKEN)}", "2")]
    assert [path.name for path in tmp_path.rglob("*.gz")] == ["one.nii.gz"]  # nothing is unpacked


def test_A33_unusable_scans_are_told_apart(make_archive, tmp_path):
    archive = make_archive(unusable, without_scan, zipped)
    options = {"voxel_size_mm": 4.0, "grid": GRID, "workers": 0, "max_reject_fraction": 1.0}
    report = build_sources(assign_splits(read_archive(archive)), str(tmp_path / "store"), **options)
    judged, lacking = (reject.reason for reject in report.rejects)
    assert "UK Biobank judged the scan unusable" in judged and "download the archive again" in lacking


def test_an_unpacked_archive_gives_the_same_arrays(make_archive, tmp_path):
    archive = make_archive(zipped, zipped, unusable)
    for path in archive.rglob("*.zip"):
        folder = tmp_path / "unpacked" / "deep" / path.stem
        with zipfile.ZipFile(path) as opened:
            opened.extractall(folder)
    options = {"voxel_size_mm": 4.0, "grid": GRID, "workers": 0, "max_reject_fraction": 1.0}
    stores = []
    for place in (archive, tmp_path / "unpacked"):
        report = build_sources(assign_splits(read_archive(place)), str(tmp_path / f"of_{place.name}"), **options)
        assert report.rejected == {"E_ZIP_MEMBER": 1}
        stores.append(Store.open(tmp_path / f"of_{place.name}"))
    assert stores[0].subjects == stores[1].subjects  # with the hashes of their voxels
    assert stores[0].info.protocols == ("fsl_fast", "fsl_first")
    shutil.copytree(tmp_path / "unpacked" / "deep", archive / "unpacked_too")  # beside its zip: the zip counts
    assert [source.problem for source in read_archive(archive)] == [None] * 3
    shutil.copytree(archive / "0", archive / "again")
    assert {source.problem and source.problem[0] for source in read_archive(archive)} == {"E_DUPLICATE"}


def test_names_alone_say_what_is_a_visit_and_which_file_counts(tmp_path):
    for name in (
        f"a/20_20252_2_0/{T1}",  # unpacked; its zip counts, though it comes later
        "a/20_20252_2_0/3_20252_2_0.zip",  # within a visit: none of its own
        "b/20_20252_2_0.zip",
        "c/3_20252_2_0.ZIP",
        "d/7_20252_2_0.zip",
        "d/7_20252_2_1.zip",  # a second array of one visit
        f"e/8_20252_2_0/{T1}",
        f"e/8_20252_2_0/{MEMBERS['fsl_fast']}",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = {source.id: source for source in read_archive(tmp_path)}
    problems = [(id, source.problem and source.problem[0]) for id, source in found.items()]
    assert problems == [("3", None), ("7", "E_DUPLICATE"), ("8", None), ("20", None)]  # by number
    assert found["20"].t1 == Member(tmp_path / "b/20_20252_2_0.zip", T1)
    assert found["8"].labels == {"fsl_fast": tmp_path / "e/8_20252_2_0" / MEMBERS["fsl_fast"]}  # FIRST's is not there


def test_visits_choices_and_the_studys_own_maps(make_archive, brain, tmp_path, caplog):
    archive = make_archive(zipped, zipped)
    shutil.copytree(make_archive(zipped, name="repeats", instance=3, seed=50), archive / "repeats")
    first = [(source.id, source.visit) for source in read_archive(archive)]
    assert first == [("1000001", "2"), ("1000001", "3"), ("1000002", "2")]
    assert len(read_archive(archive, instances=("2",))) == 2
    pattern = str(tmp_path / "spm" / "{eid}" / "c_{instance}.nii.gz")
    brain.write(tmp_path / "spm" / "1000001" / "c_3.nii.gz", brain.ids("spm_tissue"))
    command = [f"--ukb={archive}", f"--store={tmp_path / 'store'}", *SMALL, "--workers=0", f"--spm={pattern}"]
    assert build_module.main([*command, "--fast=pveseg"]) == 0
    assert "--spm: 2 of 3 visits have no such file" in caplog.text
    store = Store.open(tmp_path / "store")
    assert store.info.protocols == ("fsl_fast", "fsl_first", "spm_tissue")
    assert [row.present for row in store.subjects] == [(True, True, name == ("1000001", "3")) for name in first]
    assert len({row.split for row in store.subjects if row.id == "1000001"}) == 1
    assert [row.name for row in store.subjects] == ["1000001_ses-2", "1000001_ses-3", "1000002_ses-2"]
    assert not (store.read_labels(0, ("fsl_fast",)) == 1).any()  # the map by partial volume has no CSF here


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/spm/{id}.nii.gz", r"--spm: a pattern has the fields \{eid\} and \{instance\}"),
        ("/spm/all.nii.gz", "--spm: a pattern has the fields"),
        ("/spm/{eid.nii.gz", "is no pattern"),
        ("/spm/{eid}.nii.gz", r"1 visits are repeats.*add \{instance\}"),
        ("/nowhere/{eid}_{instance}.nii.gz", "no file fits"),
    ],
)
def test_a_pattern_that_cannot_be_meant(make_archive, pattern, message):
    archive = make_archive(zipped)
    shutil.copytree(make_archive(zipped, name="repeats", instance=3), archive / "repeats")
    with pytest.raises(NeuronetError, match=message):
        read_archive(archive, outputs={"spm_tissue": pattern})


def test_an_archive_without_visits_is_an_error(tmp_path, capsys):
    with pytest.raises(NeuronetError, match=r"holds no EID_20252_INSTANCE_ARRAY\.zip"):
        read_archive(tmp_path)
    with pytest.raises(NeuronetError, match="there is no folder"):
        read_archive(tmp_path / "nowhere")
    assert build_module.main([f"--manifest={tmp_path}", f"--store={tmp_path}", "--fast=seg"]) == 2
    assert "go with --ukb" in capsys.readouterr().err


def _build_of_200(make_archive, tmp_path, tree, count: int, kills: int) -> None:
    ways: list[Callable[[Path, Content], object]] = [zipped] * count
    for number, way in enumerate(BROKEN):
        ways[2 + number * ((count - 2) // len(BROKEN))] = way
    archive = make_archive(*ways)
    options = [*SMALL, "--shard-subjects=2", "--max-reject-fraction=0.5"]
    command = [sys.executable, "-m", "data_prep.build", f"--ukb={archive}", *options]
    killed = tmp_path / "killed"
    for number in range(kills):
        process = subprocess.Popen([*command, f"--store={killed}", "--workers=2"], stderr=subprocess.DEVNULL)
        done = len(list(killed.glob("unfinished-0*.json")))
        while process.poll() is None and len(list(killed.glob("unfinished-0*.json"))) < done + 3 + 2 * number:
            time.sleep(0.001)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (killed / "COMPLETE").exists()
    for place in (killed, tmp_path / "whole"):
        assert (
            subprocess.run([*command, f"--store={place}", "--workers=2"], check=False, capture_output=True).returncode
            == 0
        )
    verify.remove_locks(str(killed))
    assert tree(killed) == tree(tmp_path / "whole")
    rejects = (killed / "rejects.tsv").read_text().splitlines()[1:]
    assert [line.split("\t")[1] for line in rejects] == list(BROKEN.values())
    assert len(Store.open(killed).subjects) == count - len(BROKEN)


def test_an_archive_with_every_fault_is_killed_twice_and_equals_an_uninterrupted_build(make_archive, tmp_path, tree):
    _build_of_200(make_archive, tmp_path, tree, count=30, kills=2)


@pytest.mark.soak
def test_an_archive_of_two_hundred(make_archive, tmp_path, tree):
    _build_of_200(make_archive, tmp_path, tree, count=200, kills=2)
