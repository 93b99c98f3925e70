import dataclasses
from pathlib import Path

import pytest

from data_prep import build
from data_prep.sources.files import on_disk
from data_prep.sources.manifest import read_manifest
from data_prep.sources.source import Source
from data_prep.splits import assign_splits
from neuronet_jax.errors import NeuronetError
from neuronet_jax.programs import FAILED
from neuronet_jax.store.withdrawal import read_ids

HEADER = "id,t1,fsl_fast,fsl_first,spm_tissue,malp_em,malp_em_tissue,split\n"


def manifest(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "cohort.csv"
    path.write_text(header + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def test_reads_the_published_columns(tmp_path):
    path = manifest(tmp_path, "1,a/T1.nii.gz,a/fast.nii.gz,,,/abs/malp.nii.gz,,train", "2,b.nii.gz,,,,,,test")
    one, two = read_manifest(path)
    fast, malp_em = tmp_path / "a/fast.nii.gz", Path("/abs/malp.nii.gz")
    assert one == Source("1", tmp_path / "a/T1.nii.gz", {"fsl_fast": fast, "malp_em": malp_em}, "train")
    assert two.labels == {}


def test_reads_the_real_manifest(real_data):
    sources = read_manifest(real_data / "cohort" / "cohort.csv")
    assert len(sources) == 15
    assert [source.split for source in sources].count("validation") == 3
    assert all(path.exists() for source in sources for path in map(on_disk, source.files.values()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,fsl_fast\n1,a\n", "'t1' is missing"),
        ("id,t1,fsl_fats\n1,a,b\n", "the column 'fsl_fats'; did you mean 'fsl_fast'"),
        ("id,t1,malpem\n1,a,b\n", "did you mean 'malp_em'"),
        ("id,t1\n1\n", "must have 2 cells"),
        ("id,t1\n1,a,b\n", "must have 2 cells"),
        ("id,t1\n1,\n", "row 2 .* no t1"),
        ("id,t1\n", "no rows"),
        ("id,t1,split\n1,a,dev\n", "E_SPLIT: row 2"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path, content, message):
    with pytest.raises(NeuronetError, match=message):
        read_manifest(manifest(tmp_path, header=content))


@pytest.mark.parametrize("row", ['"3,c,,,,,,train', '3,c,"f.nii,,,,,train', '3,"c" x,,,,,,train'])
def test_A42_a_stray_quote_names_its_row_and_swallows_none(tmp_path, row):
    rows = [f"{number},a,,,,,,train" for number in (1, 2)] + [row] + [f"{number},a,,,,,,train" for number in (4, 5, 6)]
    with pytest.raises(NeuronetError, match=r"^row 4 of cohort.csv has a stray quote"):
        read_manifest(manifest(tmp_path, *rows))
    splits = tmp_path / "splits.csv"
    splits.write_text('id,split\n1,train\n"2,test\n3,train\n')
    with pytest.raises(NeuronetError, match=r"row 3 of splits.csv has a stray quote"):
        assign_splits([Source("1", Path("a"), {})], splits)


def test_A42_every_line_is_a_row(tmp_path):
    """Blank lines are none, other separators are a part of their cell, and a cell in quotes may hold a comma or one."""
    path = tmp_path / "cohort.csv"
    path.write_bytes('id,t1\r\n1,"a, b.nii"\r\n\r\n2,c\u2028d.nii\r3,"""e"".nii"\n'.encode())
    sources = read_manifest(path)
    assert [source.row for source in sources] == [2, 4, 5]
    assert [on_disk(source.t1).name for source in sources] == ["a, b.nii", "c\u2028d.nii", '"e".nii']
    (tmp_path / "withdrawn.csv").write_text('"1001\n1002"\n\n1003,"x\n', encoding="utf-8")
    assert read_ids(tmp_path / "withdrawn.csv") == {"1001": 1, "1002": 2, "1003": 4}
    (tmp_path / "withdrawn.csv").write_text("1001\u20281002\n", encoding="utf-8")
    with pytest.raises(NeuronetError, match="E_ID: the id in row 1"):
        read_ids(tmp_path / "withdrawn.csv")


def test_A42_a_column_twice_is_refused(tmp_path):
    with pytest.raises(NeuronetError, match="has the column 't1' more than once"):
        read_manifest(manifest(tmp_path, "1,a,b", header="id,t1, t1\n"))


def test_A47_ids_that_differ_in_case_alone(tmp_path):
    with pytest.raises(NeuronetError, match="E_ID: the ids in rows 2 and 4 differ only in upper and lower case"):
        read_manifest(manifest(tmp_path, "ab1,a,,,,,,train", "ab2,b,,,,,,train", "aB1,c,,,,,,train"))


def test_visits_of_one_participant(tmp_path):
    header = "id,visit,t1\n"
    two, three = read_manifest(manifest(tmp_path, "1,ses-2,a", "1,3,b", header=header))
    assert (two.visit, three.visit) == ("2", "3")
    visits = [dataclasses.replace(visit, id=str(number)) for number in range(200) for visit in (two, three)]
    splits = [source.split for source in assign_splits(visits)]
    assert splits[::2] == splits[1::2] and len(set(splits)) == 3
    with pytest.raises(NeuronetError, match="E_DUPLICATE: rows 2 and 3"):
        read_manifest(manifest(tmp_path, "1,2,a", "1,2,b", header=header))
    with pytest.raises(NeuronetError, match="E_ID: the visit in row 3"):
        read_manifest(manifest(tmp_path, "1,2,a", "1,../3,b", header=header))


@pytest.mark.parametrize("bad", ["a/b", "..", "日本", "-rf", "", "a b", "é1", " 1"])
def test_A40_only_letters_and_digits_reach_paths(tmp_path, bad):
    with pytest.raises(NeuronetError, match="E_ID: the id in row 3") as caught:
        read_manifest(manifest(tmp_path, "1,a,,,,,,train", f"{bad},b,,,,,,train"))
    assert not bad.strip() or bad not in str(caught.value)


def test_A28_the_same_subject_twice(tmp_path):
    with pytest.raises(NeuronetError, match="E_DUPLICATE: rows 2 and 4"):
        read_manifest(manifest(tmp_path, "1,a,,,,,,train", "2,b,,,,,,train", "1,c,,,,,,train"))


def test_A29_one_subject_in_two_splits(tmp_path):
    """Two visits of one participant share the id: splits are made by subject."""
    with pytest.raises(NeuronetError, match="E_LEAK: rows 2 and 3"):
        read_manifest(manifest(tmp_path, "1,visit2,,,,,,train", "1,visit3,,,,,,test"))


def test_A30_overlapping_splits(tmp_path):
    sources = read_manifest(manifest(tmp_path, "1,a,,,,,,", "2,b,,,,,,"))
    splits = tmp_path / "splits.csv"
    splits.write_text("id,split\n1,train\n2,test\n1,test\n")
    with pytest.raises(NeuronetError, match="E_LEAK: row 4 of the splits"):
        assign_splits(sources, splits)
    splits.write_text("id,split\n1,train\n2,test\n")
    assert [source.split for source in assign_splits(sources, splits)] == ["train", "test"]


def test_A30_manifest_and_splits_file_must_agree(tmp_path):
    sources = read_manifest(manifest(tmp_path, "1,a,,,,,,train"))
    splits = tmp_path / "splits.tsv"
    splits.write_text("id\tsplit\n1\ttest\n")
    with pytest.raises(NeuronetError, match=r"E_SPLIT: row 2 is train .* and test"):
        assign_splits(sources, splits)


def test_a_split_for_all_or_for_none(tmp_path):
    sources = read_manifest(manifest(tmp_path, "1,a,,,,,,train", "2,b,,,,,,"))
    with pytest.raises(NeuronetError, match="E_SPLIT: the subject of row 3"):
        assign_splits(sources)


def test_hashed_splits_are_stable_and_near_90_5_5():
    sources = [Source(str(number), Path("t1"), {}) for number in range(4000)]
    splits = {source.id: source.split for source in assign_splits(sources)}
    counts = {name: list(splits.values()).count(name) for name in ("train", "validation", "test")}
    assert 0.88 < counts["train"] / 4000 < 0.92
    assert 0.04 < counts["validation"] / 4000 < 0.06
    later = {source.id: source.split for source in assign_splits(sources[::-1][:500])}
    assert all(splits[name] == split for name, split in later.items())


@pytest.mark.parametrize(
    "text", ["1001\n1002\n", "eid\n1001\n1002", "\ufeff1001,\n\n1002,,\n", "id,date\r\n1001,x\r\n1002,y\r\n"]
)
def test_withdrawal_lists(tmp_path, text):
    (tmp_path / "withdrawn.csv").write_text(text, encoding="utf-8")
    ids = read_ids(tmp_path / "withdrawn.csv")
    assert set(ids) == {"1001", "1002"}
    lines = text.lstrip("\ufeff").splitlines()
    assert all(lines[number - 1].startswith(id_) for id_, number in ids.items())


def test_all_bad_rows_are_named_up_to_twenty(tmp_path, capsys):
    rows = ["1,a,,,,,,train", "b/d,b,,,,,,train", "1,c,,,,,,train", "2,,,,,,,train", "3,d,,,,,,dev"]
    assert build.main([f"--manifest={manifest(tmp_path, *rows)}", f"--store={tmp_path / 'store'}"]) == FAILED
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "python -m data_prep.build: error: 4 rows cannot be used:" and len(said) == 5
    assert not (tmp_path / "store").exists()
    for text in (
        "row 5 of the manifest has no t1",
        "E_ID: the id in row 3",
        "E_DUPLICATE: rows 2 and 4",
        "E_SPLIT: row 6",
    ):
        assert any(text in line for line in said)
    many = manifest(tmp_path, *["-,a,,,,,,train"] * 25)
    assert build.main([f"--manifest={many}", f"--store={tmp_path / 'store'}"]) == FAILED
    said = capsys.readouterr().err
    assert "E_ID: the id in row 21 " in said and "row 22" not in said and "\n  and 5 more" in said
    (tmp_path / "splits.csv").write_text("id,split\n1,train\n2,dev\n-,test\n")
    with pytest.raises(NeuronetError, match="2 rows cannot be used"):
        assign_splits([Source("1", Path("a"), {})], tmp_path / "splits.csv")


def test_a_manifest_takes_what_a_list_takes(tmp_path, caplog):
    """The table of `neuronet segment @cohort.csv` may be a manifest, and the other way round."""
    header = "id,t1,age,fsl_fast\n"
    (one,) = read_manifest(manifest(tmp_path, "sub-01,a,77,b", header=header))
    assert one == Source("01", tmp_path / "a", {"fsl_fast": tmp_path / "b"})
    assert "columns of the manifest that are not used: 'age'" in caplog.text and "77" not in caplog.text
    with pytest.raises(NeuronetError, match="E_DUPLICATE: rows 2 and 3"):
        read_manifest(manifest(tmp_path, "sub-01,a,,b", "01,c,,d", header=header))
    (tmp_path / "withdrawn.csv").write_text("sub-01\n")
    assert read_ids(tmp_path / "withdrawn.csv") == {"01": 1}
