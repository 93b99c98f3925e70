"""Ten failed label maps of five kinds, planted among sound ones, are found; nothing else is."""

import dataclasses
import shutil

import numpy as np
import pytest
from scipy import ndimage

from data_prep import references, report
from data_prep.build import build as build_store
from data_prep.purge import purge
from neuronet_jax.files import Files
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import StoreError

KINDS = ("empty", "shifted", "mirrored", "scrambled", "another's")


def fail(kind: str, classes: np.ndarray, protocol: str, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns a map, class indices [x y z], as a failed tool would have left it."""
    if kind == "empty":  # but for a twentieth of its voxels, as the failed SPM map of the published study
        return np.where(rng.random(classes.shape) < 0.05, classes, 0).astype(np.uint8)
    if kind == "shifted":  # by a sixth of the head
        return np.roll(classes, classes.shape[1] // 6, axis=1)
    if kind == "mirrored":
        return np.ascontiguousarray(classes[::-1])
    if kind == "scrambled":
        count = PROTOCOLS[protocol].num_classes
        return np.array([0, *np.roll(np.arange(1, count), 1)], np.uint8)[classes]
    return other


def anatomies(brain, count: int) -> list[np.ndarray]:
    """Returns MALP-EM maps [x y z] of different heads: each scaled, bent and asymmetric in its own way."""
    grid = np.stack(np.meshgrid(*map(np.arange, brain.shape), indexing="ij")).astype(float)
    centre = np.array(brain.shape).reshape(3, 1, 1, 1) / 2
    heads = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        zooms = [n / 4 for n in brain.shape]
        bends = [np.asarray(ndimage.zoom(rng.normal(0, 1.5, (4, 4, 4)), zooms, order=1)) for _ in range(3)]
        points = centre + (grid - centre) * rng.normal(1, 0.04, (3, 1, 1, 1)) + np.stack(bends)
        heads.append(ndimage.map_coordinates(brain.malp_em, points, order=0))
    return heads


def image(malp_em: np.ndarray, seed: int) -> np.ndarray:
    brightness = np.array([0, 200, 500, 450, 700, 250])[MALP_EM_TO_TISSUE[malp_em]]
    return (brightness + np.random.default_rng(seed).normal(40, 15, malp_em.shape)).clip(0).astype(np.int16)


def derived(brain, malp_em: np.ndarray) -> dict[str, np.ndarray]:
    """Returns all five maps of an anatomy, as the tools write them."""
    tables = {name: np.zeros(256, np.uint8) for name in PROTOCOLS}
    for name, table in tables.items():
        table[brain.malp_em] = brain.ids(name)
    return {name: table[malp_em] for name, table in tables.items()}


@pytest.fixture
def cohort(brain, make_cohort):
    """Writes 24 heads with ten failed maps; returns the manifest and the planted (slot, protocol)."""
    names = tuple(str(1001 + number) for number in range(24))
    manifest = make_cohort(names)
    heads = [derived(brain, malp_em) for malp_em in anatomies(brain, len(names))]
    planted = {}
    for number, maps in enumerate(heads):
        folder = manifest.parent / str(number)
        brain.write(folder / "T1.nii.gz", image(maps["malp_em"], number), brain.affine)
        for name, ids in maps.items():
            brain.write(folder / f"{name}.nii.gz", ids, brain.affine)
    for number in range(10):
        kind, name, slot = KINDS[number % 5], tuple(PROTOCOLS)[(number + number // 5) % 5], 2 * number
        protocol = PROTOCOLS[name]
        classes, other = (protocol.to_classes(heads[n][name]) for n in (slot, slot + 3))
        failed = protocol.to_ids(fail(kind, classes, name, other, np.random.default_rng(number)))
        brain.write(manifest.parent / str(slot) / f"{name}.nii.gz", failed, brain.affine)
        planted[slot, name] = kind
    return manifest, planted


def test_planted_failures_are_flagged_and_dropped(cohort, build, tmp_path, capsys, tree):
    manifest, planted = cohort
    _, before = build(manifest)
    assert len(before.subjects) == 24
    assert references.main([f"--store={before.dest}"]) == 0
    scores = references.read_scores(Files(before.dest))
    assert len(scores) == 24 * 5
    flagged = {(row.slot, row.protocol): row.flagged for row in scores if row.flagged}
    assert set(flagged) == set(planted), {key: planted.get(key) for key in set(flagged) ^ set(planted)}
    table = tree(tmp_path / "store")["references.tsv"].decode()
    assert "1001" not in table and "1024" not in table  # slots only
    assert Store.open(before.dest).subjects == before.subjects

    assert references.main([f"--store={before.dest}", "--drop-outliers"]) == 0
    after = Store.open(before.dest)
    for subject in after.subjects:
        absent = {name for name, has in zip(after.info.protocols, subject.present, strict=True) if not has}
        assert absent == {name for slot, name in planted if slot == subject.slot}
    dropped = references.read_dropped(after)
    assert {(row.slot, row.protocol): row.flagged for row in dropped} == flagged
    by_map = {(row.slot, row.protocol): row for row in scores}
    for row in dropped:
        assert (row.volume, row.agreement) == pytest.approx(
            (by_map[row.slot, row.protocol].volume, by_map[row.slot, row.protocol].agreement), nan_ok=True
        )
        assert row.limit == references.LIMIT and row.software.startswith("neuronet-jax ")
    assert references.main([f"--store={before.dest}", "--drop-outliers"]) == 0  # and again: nothing changes
    assert "0 maps are now absent" in capsys.readouterr().out
    assert Store.open(before.dest).subjects == after.subjects and references.read_dropped(after) == dropped
    page = report.report(after, pictures=0)
    assert "10 of the absent maps were dropped because of" in page and "more than\n  4.5 robust" in page
    assert build(manifest)[0].already
    purge(before.dest, {"1003"})
    assert "references.tsv" not in tree(tmp_path / "store")  # scores of a withdrawn participant
    left = [row for row in dropped if row.slot != 2]
    assert len(left) == 9 and references.read_dropped(Store.open(before.dest)) == left
    assert "\n2\t" not in tree(tmp_path / "store")["dropped.tsv"].decode()
    assert references.main([f"--store={before.dest}"]) == 0  # what was dropped is scored as ever
    assert len(references.read_scores(Files(before.dest))) == 23 * 5


def test_a_drop_that_is_killed_anywhere_is_done_or_undone_by_the_build(make_cohort, build, killed_at, tmp_path, tree):
    """Never in part: both maps are absent, or none is; every other file is that of a whole drop or of none."""
    manifest = make_cohort()
    build(manifest, "whole", shard_subjects=1)
    failed = [references.Score(slot, name, 9, 9, 9, 9, "volume") for slot, name in ((1, "malp_em"), (2, "fsl_fast"))]
    undone, places = tree(tmp_path / "whole"), set()
    done = Store.open(shutil.copytree(tmp_path / "whole", tmp_path / "done"))
    assert references.drop(done, failed) == 2
    for operation in range(40):
        copy = shutil.copytree(tmp_path / "whole", tmp_path / f"killed{operation}")
        with killed_at(operation) as reached:
            references.drop(Store.open(copy), failed)
        if not (copy / "COMPLETE").exists():
            places.add("unfinished")
            with pytest.raises(StoreError, match="E_INCOMPLETE"):
                Store.open(copy)
        build(manifest, copy.name, shard_subjects=1)
        absent = [sum(not has for has in subject.present) for subject in Store.open(copy).subjects]
        assert absent in ([0, 0, 0], [0, 1, 1])
        assert [row.slot for row in references.read_dropped(Store.open(copy))] == ([1, 2] if any(absent) else [])
        places.add("done" if any(absent) else "undone")
        found = tree(copy)
        if not any(absent):
            found.pop("dropped.tsv", None)  # its rows mean nothing
        assert found == (tree(tmp_path / "done") if any(absent) else undone), operation
        if not reached:
            break
    assert places == {"undone", "unfinished", "done"} and operation > 5


def sound(seed: int) -> references.Measures:
    """Returns the measures of a head whose maps are as such maps are: all within a few percent of the others'."""
    rng = np.random.default_rng(seed)
    names = ("fsl_fast", "spm_tissue", "malp_em_tissue")
    count = {name: PROTOCOLS[name].num_classes - 1 for name in names}
    pairs = (("fsl_fast", "spm_tissue"), ("fsl_fast", "malp_em_tissue"), ("spm_tissue", "malp_em_tissue"))
    return references.Measures(
        volumes={n: (10_000 * rng.normal(1, 0.03, count[n])).astype(np.float32) for n in names},
        centroids={n: (np.arange(3) + rng.normal(0, 0.03, (count[n], 3))).astype(np.float32) for n in names},
        contrast={n: 0.8 + rng.normal(0, 0.01) for n in names},
        dice={pair: 0.85 + rng.normal(0, 0.01) for pair in pairs},
    )


BAD = "spm_tissue"
ALONE = {
    "volume": lambda m: m.volumes[BAD].__imul__(3),  # of the whole map
    "volume of a structure": lambda m: m.volumes[BAD].__setitem__(0, 500),  # the total hardly changes
    "position": lambda m: m.centroids[BAD].__iadd__(1),
    "contrast": lambda m: m.contrast.__setitem__(BAD, 0.5),
    "agreement": lambda m: m.dice.update({pair: 0.5 for pair in m.dice if BAD in pair}),
}


@pytest.mark.parametrize("fault", ALONE)
def test_each_measure_flags_what_only_it_sees(fault: str) -> None:
    cohort = {slot: sound(slot) for slot in range(12)}
    assert not any(row.flagged for row in references.score(cohort))
    ALONE[fault](cohort[7])
    flagged = [(row.slot, row.protocol, row.flagged) for row in references.score(cohort) if row.flagged]
    assert flagged == [(7, BAD, fault.split()[0])]


@pytest.mark.parametrize("fault", ALONE)
def test_a_quarter_of_a_small_cohort_that_fails_alike_does_not_hide_itself(fault: str) -> None:
    """Failures widen the spread that they are judged by. Medians bear that."""
    cohort = {slot: sound(slot) for slot in range(12)}
    for slot in (2, 5, 7):
        ALONE[fault](cohort[slot])
    flagged = {(row.slot, row.protocol) for row in references.score(cohort) if row.flagged}
    assert flagged == {(slot, BAD) for slot in (2, 5, 7)}


def test_a_dropped_map_that_a_repair_has_brought_back_counts_as_dropped_no_more(make_cohort, build) -> None:
    manifest = make_cohort()
    _, store = build(manifest, shard_subjects=1)
    failed = [references.Score(slot, "malp_em", 9, np.nan, 9, 9, "volume") for slot in (1, 2)]
    assert [references.drop(Store.open(store.dest), [row]) for row in reversed(failed)] == [1, 1]
    (manifest.parent / "1" / "T1.nii.gz").write_bytes((manifest.parent / "1" / "T1.nii.gz").read_bytes() + bytes(9))
    _, store = build(manifest, shard_subjects=1, repair=True)
    assert [sum(subject.present) for subject in store.subjects] == [5, 5, 4]
    assert [row.slot for row in references.read_dropped(store)] == [2]


def test_the_worst_map_is_judged_first_and_not_held_against_the_others() -> None:
    """It disagrees with both others. They have nobody else to agree with, and are not flagged for that."""
    cohort = {slot: sound(slot) for slot in range(12)}
    cohort[7] = dataclasses.replace(cohort[7], dice={pair: 0.5 for pair in cohort[7].dice if BAD in pair})
    rows = {row.protocol: row for row in references.score(cohort) if row.slot == 7}
    assert [name for name, row in rows.items() if row.flagged] == [BAD]
    assert all(np.isnan(row.agreement) for name, row in rows.items() if name != BAD)


def test_a_small_cohort_is_not_judged(make_cohort, build, caplog):
    _, store = build(make_cohort())
    scores = references.score_store(store)
    assert len(scores) == 15 and not any(row.flagged for row in scores)
    assert "too few to judge by" in caplog.text


@pytest.mark.soak
def test_failures_among_real_brains_are_flagged(tmp_path, real_data):
    store_at = str(tmp_path / "store")
    build_store(real_data / "cohort" / "cohort.csv", store_at, voxel_size_mm=3.0, workers=2)
    store = Store.open(store_at)
    names = store.info.protocols
    images = {subject.slot: store.read_image(subject.slot) for subject in store.subjects}
    maps = {slot: dict(zip(names, store.read_labels(slot, names), strict=True)) for slot in images}
    sound = {slot: references.measure(images[slot], maps[slot]) for slot in images}
    assert not [row for row in references.score(sound) if row.flagged]
    for seed in range(4):
        rng, cohort, planted = np.random.default_rng(seed), dict(sound), set()
        for number, slot in enumerate(rng.permutation(list(images))[:10].tolist()):
            name, other = names[rng.integers(len(names))], maps[(slot + 1) % len(maps)]
            failed = fail(KINDS[number % 5], maps[slot][name], name, other[name], rng)
            cohort[slot] = references.measure(images[slot], maps[slot] | {name: failed})
            planted.add((slot, name))
        assert {(row.slot, row.protocol) for row in references.score(cohort) if row.flagged} == planted
