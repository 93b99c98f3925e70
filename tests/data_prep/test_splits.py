"""Splits by participant: stratified, published, and what may not leak from one to another."""

import csv
import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep import splits
from data_prep.sources.source import Source
from data_prep.splits import assign_splits, published, read_strata, stratified
from experiments.flags import load
from neuronet_jax.errors import NeuronetError
from neuronet_jax.spreadsheets import read_table
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError, subjects_to_tsv
from neuronet_jax.training.pipeline import training_iterator


@pytest.fixture
def participants(tmp_path) -> Path:
    """Writes two visits for each of 1,000 participants, of three sites, two sexes and many ages."""
    rng = np.random.default_rng(0)
    path = tmp_path / "participants.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["participant_id", "visit", "site", "sex", "age"])
        for number in range(1000):
            row = [rng.choice(["A", "B", "rare"], p=[0.6, 0.35, 0.05]), rng.choice(["f", "m"]), rng.integers(40, 80)]
            for visit in (2, 3):
                writer.writerow([f"sub-{1000000 + number}", visit, *row])
    return path


def test_every_stratum_has_its_share(participants):
    strata = read_strata(read_table(participants), ("site", "sex", "age"))
    assert len(strata) == 1000 and len(set(strata.values())) == 3 * 2 * 5
    split = stratified(strata, seed=3, fractions=(0.8, 0.1, 0.1))
    assert Counter(split.values()) == {"train": 800, "validation": 100, "test": 100}
    for stratum, count in Counter(strata.values()).items():
        held = Counter(split[id_] for id_ in strata if strata[id_] == stratum)
        assert abs(held["train"] - 0.8 * count) < 2.01 and abs(held["test"] - 0.1 * count) < 2.01
    assert stratified(dict(reversed(strata.items())), 3, (0.8, 0.1, 0.1)) == split  # whatever the order of the rows
    assert stratified(strata, 4, (0.8, 0.1, 0.1)) != split


def test_the_command_writes_a_table_that_a_build_takes(participants, tmp_path, capsys):
    out = tmp_path / "splits.csv"
    command = [f"--table={participants}", f"--out={out}", "--stratify=site,sex", "--fractions=50,25,25", "--seed=1"]
    assert splits.main(command) == 0
    assert "train 500, validation 250, test 250" in capsys.readouterr().out
    visits = [Source("1000007", Path("a"), {}, visit=visit) for visit in "23"]
    assert len({source.split for source in assign_splits(visits, out)}) == 1
    assert splits.main(command) == 1 and "a store may depend on it" in capsys.readouterr().err
    for wrong in ("90,5", "a,b,c", "90,5,6", "110,-5,-5"):
        assert splits.main([command[0], f"--out={tmp_path / 'new'}", f"--fractions={wrong}"]) == 2
    for other in ("--stratify=site", "--seed=0", "--fractions=90,5,5"):
        assert splits.main([command[0], f"--out={tmp_path / 'new'}", "--published", other]) == 2
    assert splits.main([command[0], f"--out={tmp_path / 'new'}", "--stratify=centre"]) == 1
    assert "no column 'centre'" in capsys.readouterr().err


def test_the_published_split_is_by_sorted_id(tmp_path):
    ids = [str(9_000_000 - number) for number in range(5800)] + ["999"]
    split = published(ids)
    ordered = ["999", *sorted(ids[:-1])]
    assert [split[id_] for id_ in ordered[:5000]] == ["train"] * 5000
    assert [split[id_] for id_ in ordered[5000:5723]] == ["validation"] * 10 + ["test"] * 713
    assert {split[id_] for id_ in ordered[5723:]} == {"none"}
    (tmp_path / "splits.csv").write_text(f"id,split\n999,train\n{ordered[-1]},none\n")
    kept = assign_splits([Source("999", Path("a"), {}), Source(ordered[-1], Path("b"), {})], tmp_path / "splits.csv")
    assert [source.id for source in kept] == ["999"]
    with pytest.raises(NeuronetError, match="needs 5723 participants, and the table has 3"):
        published(["1", "2", "3"])


def test_visits_that_contradict_each_other_are_named(tmp_path):
    (tmp_path / "table.csv").write_text("eid,site\n1,A\n2,B\n1,B\n")
    with pytest.raises(NeuronetError, match="rows 2 and 4 are one participant with different site"):
        read_strata(read_table(tmp_path / "table.csv"), ("site",))


def test_cells_are_strata_and_only_many_numbers_are_binned(tmp_path):
    """Codes of ten sites stay as they are, ages become fifths, and who has no age is a stratum of its own."""
    path = tmp_path / "table.csv"
    path.write_text("eid,site,age\n" + "".join(f"{n},{n % 10},{n + 40 if n else ''}\n" for n in range(21)))
    strata = read_strata(read_table(path), ("site", "age"))
    assert {site for site, _ in strata.values()} == {str(n) for n in range(10)}
    assert strata["0"][1] == "" and Counter(age for _, age in strata.values() if age) == dict.fromkeys("01234", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [("eid,site\n1,A\n2/3,B\n", "E_ID: the id in row 3"), ("name,site\n1,A\n", "needs one of the columns id, eid")],
)
def test_a_table_without_usable_ids_is_refused(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(NeuronetError, match=message):
        read_strata(read_table(tmp_path / "table.csv"), ("site",))


def test_a_splits_file_takes_ids_as_bids_writes_them(tmp_path):
    (tmp_path / "splits.csv").write_text("id,split\nsub-01,test\n")
    assert [source.split for source in assign_splits([Source("01", Path("a"), {})], tmp_path / "splits.csv")] == [
        "test"
    ]


def edited(store: Store, slot: int, **changes) -> None:
    """Changes a row of a finished store, with all its hashes."""
    subjects = [dataclasses.replace(row, **changes) if row.slot == slot else row for row in store.subjects]
    root, table = Path(store.dest), subjects_to_tsv(subjects)
    (root / "subjects.tsv").write_bytes(table)
    info = json.loads((root / "store.json").read_text()) | {"subjects_hash": hashlib.sha256(table).hexdigest()}
    (root / "store.json").write_text(json.dumps(info, indent=2, sort_keys=True) + "\n")
    (root / "COMPLETE").write_text(hashlib.sha256((root / "store.json").read_bytes()).hexdigest())


def test_A29_one_image_in_two_splits_of_a_store_is_refused(make_store):
    store, _ = make_store(("train", "train", "validation"))
    edited(store, 1, content_hash=store.subjects[0].content_hash)  # twice in training: wasteful, but no leak
    edited(Store.open(store.dest), 2, content_hash="f" * 64)
    Store.open(store.dest)
    edited(Store.open(store.dest), 2, content_hash=store.subjects[0].content_hash)
    with pytest.raises(StoreError, match="E_LEAK: the image of slot 2 is in validation and train"):
        Store.open(store.dest)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_A29_a_held_out_image_in_the_training_of_another_store_is_refused(make_store, tmp_path, caplog, split):
    first, _ = make_store(("train", "train", split), str(tmp_path / "a"))
    second, _ = make_store(("train", "train", "train"), str(tmp_path / "b"))
    data = dataclasses.replace(
        load("tissue:demo").data, store=first.dest, stores=(second.dest,), crop=(8, 8, 8), workers=0
    )
    config = dataclasses.replace(load("tissue:demo"), data=data, protocols=("fsl_fast",), batch=1)
    with pytest.raises(
        StoreError, match=rf"E_LEAK: the image of slot 2 of .*b is in training, and in {split} as slot 2"
    ):
        training_iterator(first, config)
    edited(second, 2, content_hash="f" * 64)
    training_iterator(first, config).close()
    assert "1 training subjects have the id of a subject that another store keeps" in caplog.text
