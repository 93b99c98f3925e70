"""Purging withdrawn participants from stores, and verifying stores."""

import numpy as np
import pytest

from data_prep import build as build_module
from data_prep import purge as purge_module
from data_prep import verify
from data_prep.purge import purge
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

GRID = (48, 56, 48)


def test_A31_purge_removes_voxels_rows_and_names(make_cohort, build, tmp_path, tree):
    manifest = make_cohort(("1001", "1002", "1003", "1004"))
    (manifest.parent / "3" / "T1.nii.gz").write_bytes(b"")  # 1004 is rejected, and withdraws as well
    _, before = build(manifest, shard_subjects=2)
    kept = before.read_image(0)
    assert purge(str(tmp_path / "store"), {"1002", "1004"}) == 1
    after = Store.open(tmp_path / "store")
    assert [row.id for row in after.subjects] == ["1001", "1003"]
    np.testing.assert_array_equal(after.read_image(0), kept)
    with pytest.raises(StoreError, match="E_SHARD_MISSING"):
        after.read_image(1)
    assert list(verify.verify(str(tmp_path / "store"))) == []
    assert not any(b"100" + digit in content for content in tree(tmp_path / "store").values() for digit in (b"2", b"4"))
    assert after.info.split_hash != before.info.split_hash
    assert after.info.provenance["purged"] and "purged" not in before.info.provenance


def test_A31_the_purge_command(make_cohort, build, tmp_path, capsys):
    build(make_cohort(), shard_subjects=1)
    (tmp_path / "withdrawn.csv").write_text("1003\n10O2\n")
    arguments = [f"--store={tmp_path / 'store'}", f"--exclude={tmp_path / 'withdrawn.csv'}"]
    assert purge_module.main(arguments) == 0
    said = capsys.readouterr().out
    assert "1 subjects removed" in said and "10O2" not in said  # a participant is named by the line alone
    assert "1 of 2 ids to exclude are not in the store; lines of the list: 2" in said
    (tmp_path / "withdrawn.csv").write_text("1001\n1002\n1003\n")
    assert purge_module.main(arguments) == 1
    assert [row.id for row in Store.open(tmp_path / "store").subjects] == ["1001", "1002"]  # and still finished


def test_the_same_command_completes_a_killed_purge(make_cohort, build, tmp_path, monkeypatch, tree, killed_at):
    manifest = make_cohort(protocols=("fsl_fast",))
    build(manifest, "whole", shard_subjects=3)
    purge(str(tmp_path / "whole"), {"1002"})
    whole = tree(tmp_path / "whole")
    for operation in range(50):
        build(manifest, f"killed{operation}", shard_subjects=3)
        with killed_at(operation) as reached:
            purge(str(tmp_path / f"killed{operation}"), {"1002"})
        if not reached:
            break
        purge(str(tmp_path / f"killed{operation}"), {"1002"})
        assert tree(tmp_path / f"killed{operation}") == whole
    assert operation > 5


def test_verify_finds_damage_and_gaps(make_cohort, build, tmp_path, capsys):
    build(make_cohort(protocols=("fsl_fast",)), shard_subjects=1)
    store = tmp_path / "store"
    assert verify.main([f"--store={store}"]) == 0
    (shard,) = (path for path in (store / "image" / "c" / "1").rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert verify.main([f"--store={store}"]) == 1
    assert "E_CRC: image of the subject in slot 1" in capsys.readouterr().out
    shard.unlink()
    (store / "image" / "c" / "stale.__lock").touch()
    assert verify.main([f"--store={store}", "--fix"]) == 1
    assert "E_SHARD_MISSING" in capsys.readouterr().out
    assert not list(store.rglob("*.__lock"))
    (store / "store.json").write_text("{}")
    assert verify.main([f"--store={store}"]) == 1


def _damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _shard(store, name, index):
    (path,) = (path for path in (store / name / "c" / str(index)).rglob("*") if path.is_file())
    return path


def test_B02_repair_builds_the_damaged_shards_again_and_no_others(make_cohort, tmp_path, capsys, tree, killed_at):
    """The commands that somebody with a damaged store types, until it is sound again."""
    store, manifest = tmp_path / "store", make_cohort(("1001", "1002", "1003", "1004"), protocols=("fsl_fast",))
    command = [f"--store={store}", f"--manifest={manifest}", "--voxel-size-mm=4", "--grid=48,56,48", "--workers=0"]
    command += ["--shard-subjects=1"]
    assert build_module.main(command) == 0
    whole = tree(store)
    _damage(_shard(store, "image", 1))
    _shard(store, "labels", 2).unlink()
    kept = _shard(store, "image", 3).stat().st_mtime_ns
    capsys.readouterr()
    assert verify.main([f"--store={store}"]) == 1
    said = capsys.readouterr().out
    assert "E_CRC: image of the subject in slot 1" in said and "with --repair, builds that shard again" in said
    assert build_module.main(command) == 0
    assert "the store is finished already" in (said := capsys.readouterr().out) and "--repair" in said
    assert verify.main([f"--store={store}"]) == 1
    for operation in (1, 4, 6, 9, 12):  # killed on the way, the next one goes on
        with killed_at(operation):
            build_module.main([*command, "--repair"])
    capsys.readouterr()
    assert build_module.main([*command, "--repair"]) == 0
    assert verify.main([f"--store={store}"]) == 0
    assert tree(store) == whole and _shard(store, "image", 3).stat().st_mtime_ns == kept
    assert build_module.main([*command, "--repair"]) == 0
    assert "the store is finished already" in capsys.readouterr().out


def test_verify_lists_the_gaps_of_an_unfinished_store(make_cohort, build, tmp_path, monkeypatch, killed_at):
    manifest = make_cohort(protocols=("fsl_fast",))
    (manifest.parent / "1" / "T1.nii.gz").write_bytes(b"")
    with killed_at(5):
        build(manifest, shard_subjects=1)
    faults = list(verify.verify(str(tmp_path / "store")))
    assert faults[0].startswith("E_INCOMPLETE")
    assert any("the shard at slot 2" in fault for fault in faults)
