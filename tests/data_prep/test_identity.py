"""Identity by content: changed files are seen, and withdrawn participants stay unnamed."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import build as build_module
from data_prep import shard
from data_prep.purge import purge
from data_prep.sources import files
from experiments import evaluate, train
from experiments.flags import load
from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.provenance import TrainingData
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

SMALL = ["--voxel-size-mm=4", "--grid=48,56,48", "--workers=0", "--shard-subjects=1"]
NAMES = ("1001", "1002", "1003", "1004")


def repaint(brain, manifest, number: int, seed: int) -> None:
    """Replaces a subject's image by another one."""
    brain.write(manifest.parent / str(number) / "T1.nii.gz", brain.head(seed))


def test_A43_changed_files_of_a_finished_store_are_seen_and_built_again(make_cohort, brain, tmp_path, capsys, tree):
    manifest = make_cohort(NAMES, protocols=("fsl_fast",))
    store, command = tmp_path / "store", [f"--manifest={manifest}", f"--store={tmp_path / 'store'}", *SMALL]
    assert build_module.main(command) == 0
    before = tree(store)
    for path in (manifest.parent / "0").iterdir():  # copied anew: another time, the same content
        os.utime(path, ns=(1, 1))
    assert build_module.main(command) == 0
    assert "finished already" in capsys.readouterr().out
    repaint(brain, manifest, 1, 77)
    assert build_module.main(command) == 1
    assert "E_CHANGED: the files of 1 subjects have changed" in capsys.readouterr().err
    assert tree(store) == before
    assert build_module.main([*command, "--repair"]) == 0
    after = Store.open(store)
    assert np.count_nonzero(after.read_image(1)[4:44, 4:52, 4:44] != brain.head(77)) == 0
    same = {name for name, content in tree(store).items() if before.get(name) == content}
    assert {f"image/c/{shard}/0/0/0" for shard in (0, 2, 3)} <= same and "image/c/1/0/0/0" not in same
    assert build_module.main(command) == 0


def test_A43_an_interrupted_build_continued_with_other_files_mixes_nothing(
    make_cohort, build, brain, tmp_path, tree, killed_at
):
    manifest = make_cohort(NAMES, protocols=("fsl_fast",))
    with killed_at(9) as reached:
        build(manifest, "mixed", shard_subjects=2)
    assert reached and (tmp_path / "mixed" / "unfinished-00000000.json").exists()
    for number in range(4):
        repaint(brain, manifest, number, 100 + number)
    build(manifest, "mixed", shard_subjects=2)
    build(manifest, "whole", shard_subjects=2)
    assert tree(tmp_path / "mixed") == tree(tmp_path / "whole")


def test_A43_a_rejected_file_that_was_repaired_is_seen(make_cohort, brain, tmp_path, capsys):
    manifest = make_cohort(NAMES, protocols=("fsl_fast",))
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(b"")
    command = [f"--manifest={manifest}", f"--store={tmp_path / 'store'}", *SMALL, "--max-reject-fraction=1"]
    assert build_module.main(command) == build_module.main(command) == 0
    repaint(brain, manifest, 1, 1)
    assert build_module.main(command) == 1
    assert build_module.main([*command, "--repair"]) == 0
    assert len(Store.open(tmp_path / "store").subjects) == 4


def test_A43_a_file_that_changes_while_it_is_read_is_not_taken(make_cohort, build, brain, monkeypatch):
    monkeypatch.setattr(shard, "_RETRY_AFTER_S", (0,))
    manifest = make_cohort(("1002",), protocols=("fsl_fast",))
    rewritten = []

    def slow(self, size=-1, original=files._Hashing.read):
        if not rewritten:
            rewritten.append(brain.write(manifest.parent / "0" / "T1.nii.gz", brain.head(5)))
        return original(self, size)

    monkeypatch.setattr(files._Hashing, "read", slow)
    _, store = build(manifest)
    assert rewritten and np.array_equal(store.read_image(0)[4:44, 4:52, 4:44], brain.head(5))  # the second reading


def test_the_fingerprints_name_nobody(make_cohort, build, tmp_path):
    build(make_cohort(NAMES, protocols=("fsl_fast",)))
    table = (tmp_path / "store" / "inputs.tsv").read_text()
    assert table.splitlines()[0] == "slot\tinput\tbytes\tmodified_ns\tsha256" and len(table.splitlines()) == 9
    assert "100" not in re.sub(r"\t\d+\t\d+\t\w{64}\n", "\n", table) and "raw" not in table


def test_A44_a_killed_purge_is_continued_by_any_other(make_cohort, build, tmp_path, killed_at):
    """At whatever point the first purge dies, neither its participants nor those of the second are left."""
    manifest = make_cohort(("1001", "1002", "1003", "1004"), protocols=("fsl_fast",))
    build(manifest, "whole", shard_subjects=3)
    for operation in range(40):
        store = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"killed{operation}"))
        with killed_at(operation) as reached:
            purge(str(store), {"1002"})
        if not reached:
            break
        if (store / "purge.json").exists():
            with pytest.raises(StoreError, match="E_INCOMPLETE"):
                Store.open(store)
            with pytest.raises(NeuronetError, match="was interrupted"):
                build(manifest, store.name, shard_subjects=3)
        known = (store / "purge.json").exists() or not (store / "COMPLETE").exists()
        purge(str(store), {"1003"})
        left = [row.id for row in Store.open(store).subjects]
        assert left == (["1001", "1004"] if known or operation > 5 else ["1001", "1002", "1004"]), operation
        assert not any(path.name.startswith("purge") for path in store.iterdir())
        with pytest.raises(StoreError, match="E_SHARD_MISSING"):
            Store.open(store).read_image(2)
        with pytest.raises(NeuronetError, match="was purged since it was built"):  # the manifest still lists them
            build(manifest, store.name, shard_subjects=3)
    assert operation > 8


def test_A45_a_withdrawal_list_cannot_be_found_from_a_store_or_a_run(make_cohort, build, build_store, tmp_path, tree):
    """No file holds the hash of a list, which an id of seven digits gives away in seconds."""
    (tmp_path / "withdrawn.csv").write_text("1234567\n")
    build(make_cohort(protocols=("fsl_fast",)), exclude=tmp_path / "withdrawn.csv")
    build_store(str(tmp_path / "trained"), ("train", "train", "validation"))
    folder = tmp_path / "trained"
    info = json.loads((folder / "store.json").read_text())
    info["provenance"]["exclude_hash"] = hashlib.sha256(b"1234567").hexdigest()  # as version 0.1.0 wrote it
    (folder / "store.json").write_text(json.dumps(info, indent=2, sort_keys=True) + "\n")
    (folder / "COMPLETE").write_text(hashlib.sha256((folder / "store.json").read_bytes()).hexdigest())
    RunDirectory(tmp_path / "run").describe(load("tissue:demo"), TrainingData.of_store(Store.open(folder).info))
    purge(str(folder), {"subject1"})
    searched = [*tree(tmp_path / "store").values(), *tree(tmp_path / "run").values(), *tree(folder).values()]
    hashes = [hash_(b"1234567" + end) for hash_ in (hashlib.sha256, hashlib.md5, hashlib.sha1) for end in (b"", b"\n")]
    assert len(searched) > 16
    for content in searched:
        assert b"1234567" not in content
        assert not any(digest.hexdigest().encode() in content for digest in hashes)


def test_A31_training_and_evaluation_refuse_a_store_with_a_withdrawn_participant(
    build_store, tmp_path, capsys, monkeypatch
):
    store = str(tmp_path / "store")
    build_store(store, ("train", "train", "", "validation"))
    withdrawn = tmp_path / "withdrawn.csv"
    arguments = ["--config=tissue:demo", f"--config.data.store={store}", f"--exclude={withdrawn}"]
    for name, count in (("subject1\nsubject3\n", 2), ("rejected2\n", 1)):
        withdrawn.write_text(name)
        assert train.main([*arguments, f"--workdir={tmp_path / 'run'}"]) == 1
        said = capsys.readouterr().err
        assert f"E_WITHDRAWN: {store} holds {count} of the participants in withdrawn.csv" in said
        assert "subject1" not in said and "data_prep.purge" in said
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(evaluate, "restore", lambda run: None)
    command = ["--run=x", f"--store={store}", f"--out={tmp_path / 'out'}", f"--exclude={withdrawn}"]
    assert evaluate.main(command) == 1 and "E_WITHDRAWN" in capsys.readouterr().err
    purge(store, {"rejected2"})
    monkeypatch.setattr(evaluate, "check", lambda *_: (_ for _ in ()).throw(NeuronetError("the list is no obstacle")))
    assert evaluate.main(command) == 1 and "no obstacle" in capsys.readouterr().err
