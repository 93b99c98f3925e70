"""A store with planted errors: in one protocol, in training subjects alone, of a known kind and number."""

import numpy as np
import pytest

from experiments import plant
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.reader import Store


def test_errors_are_in_one_protocol_of_some_training_subjects(make_store, tmp_path, capsys) -> None:
    clean = Store.open(make_store(("train", "train", "validation", "train", "train", "test"))[0].dest)
    command = [
        f"--store={clean.dest}",
        "--protocol=malp_em",
        "--kind=mirrored",
        "--rate=0.5",
        f"--out={tmp_path / 'bad'}",
    ]
    assert plant.main(command) == 0
    planted = Store.open(tmp_path / "bad")
    assert planted.info.split_hash == clean.info.split_hash
    different, names = [], clean.info.protocols
    for subject in clean.subjects:
        np.testing.assert_array_equal(planted.read_image(subject.slot), clean.read_image(subject.slot))
        maps = zip(
            names,
            clean.read_labels(subject.slot, names),
            planted.read_labels(subject.slot, names),
            strict=True,
        )
        for name, before, after in maps:
            if not np.array_equal(before, after):
                different.append((name, subject.split))
                np.testing.assert_array_equal(after, PROTOCOLS[name].partners[before])
    has = sum(subject.present[names.index("malp_em")] for subject in clean.split("train"))
    assert different == [("malp_em", "train")] * round(has / 2)
    assert f"{round(has / 2)} of 4 training maps" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["shifted", "missing"])
def test_the_error_of_a_map_does_not_depend_on_the_others(make_store, tmp_path, kind) -> None:
    """Nor on the look whether the error changes anything: it draws nothing from what the copy draws from."""
    clean = Store.open(make_store(("train",) * 8)[0].dest)
    voxel_size_mm, some = clean.info.voxel_size_mm, str(tmp_path / "some")
    plant.plant(clean, "fsl_first", kind, 0.5, 3, some)
    plant.plant(clean, "fsl_first", kind, 1.0, 3, str(tmp_path / "all"))
    everywhere, partly, seen = Store.open(tmp_path / "all"), Store.open(some), set()
    for slot in range(8):
        before, one, other = (store.read_labels(slot, ["fsl_first"])[0] for store in (clean, partly, everywhere))
        if not np.array_equal(before, one):
            np.testing.assert_array_equal(one, other)
            seen.add(slot)
        expected = plant.KINDS[kind](before, "fsl_first", voxel_size_mm, np.random.default_rng([3, slot]))
        np.testing.assert_array_equal(other, expected)
    assert len(seen) > 1


def test_kinds_of_error() -> None:
    rng = np.random.default_rng(0)
    classes = np.zeros((12, 12, 12), np.uint8)
    classes[3:9, 3:9, 3:9] = np.arange(1, 4).repeat(2)
    moved = plant.shifted(classes, "fsl_fast", 3.0, rng)
    shifts = [tuple(np.subtract(a.min(0), b.min(0))) for a, b in [(np.argwhere(moved), np.argwhere(classes))]]
    assert sorted(np.abs(shifts[0])) == [0, 0, 2]  # 6 mm of 3 mm voxels
    thin = plant.thin(classes, "fsl_fast", 3.0, rng)
    assert (thin > 0).sum() == 4**3 and (thin == classes)[thin > 0].all()
    less = plant.missing(classes, "fsl_fast", 3.0, rng)
    assert len(np.unique(less)) == len(np.unique(classes)) - 1
    assert plant.shifted(np.ones((4, 4, 4), np.uint8), "fsl_fast", 6.0, rng).sum() == 48  # nothing comes in again


def test_an_error_that_changes_nothing_is_refused(make_store, tmp_path) -> None:
    store = Store.open(make_store(("train", "train"))[0].dest)
    with pytest.raises(plant.NeuronetError, match="--kind=mirrored changes nothing in fsl_fast"):
        plant.plant(store, "fsl_fast", "mirrored", 1.0, 0, str(tmp_path / "bad"))
    assert not (tmp_path / "bad").exists()  # nothing is written before something can be done
