"""Disturbances by their laws, and the table of a run that was interrupted."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import robustness
from experiments.flags import load
from experiments.robustness import DISTURBANCES, NETWORK
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Origin
from neuronet_jax.store.reader import Store


@pytest.fixture
def model(threshold_network) -> Model:
    config = replace(load("tissue:demo"), protocols=("fsl_fast", "fsl_first"))
    return Model(threshold_network, config, 2.0, Origin("tissue:demo", 7, ""))


def _scan() -> tuple[np.ndarray, np.ndarray]:
    image = np.zeros((20, 24, 20), np.float32)
    image[4:16, 6:18, 5:15] = np.random.default_rng(0).uniform(50, 150, (12, 12, 10))
    return image, (image > 0).astype(np.uint8)[None]


@pytest.mark.parametrize(
    ("name", "neutral"),
    [
        ("noise", 0),
        ("bias field", 0),
        ("rotation", 0),
        ("contrast", 1),
        ("resolution", 2),
        ("field of view", 0),
        ("motion", 0),
        ("hole", -1),
    ],
)
def test_a_neutral_strength_changes_nothing(name: str, neutral: float) -> None:
    image, labels = _scan()
    changed, classes = DISTURBANCES[name].apply(image, labels, neutral, 2.0)
    np.testing.assert_allclose(changed, image, atol=1e-3)
    np.testing.assert_array_equal(classes, labels)


def test_strengths_have_their_units() -> None:
    image, labels = _scan()
    noisy, _ = robustness.noise(image, labels, 0.2, 2.0)
    inside = image > 0
    assert (noisy - image)[inside].std() == pytest.approx(0.2 * np.median(image[inside]), rel=0.05)
    assert not noisy[~inside].any()
    ones = np.ones_like(image)
    biased, _ = robustness.bias(ones, labels, 0.5, 2.0)
    assert (biased[0, 0, 0], biased[0, -1, 0]) == pytest.approx((np.exp(-0.5), np.exp(0.5)))
    turned, _ = robustness.turn(image[:, :20], labels[:, :, :20], 90.0, 2.0)
    np.testing.assert_allclose(np.sort(turned.ravel()), np.sort(image[:, :20].ravel()), atol=1e-2)
    dark, _ = robustness.contrast(image, labels, 2.0, 2.0)
    assert (dark[inside] <= image[inside] * 1.02).all() and dark.max() == pytest.approx(image.max(), rel=0.05)
    cut, classes = robustness.field_of_view(image, labels, 0.3, 2.0)
    assert not cut[..., :8].any() and (classes[..., 5:8] == robustness.UNSCORED).all()  # three of ten planes from 5 on
    np.testing.assert_array_equal(cut[..., 8:], image[..., 8:])
    holed, classes = robustness.hole(image, labels, 4.0, 2.0)
    changed = classes[0] == robustness.UNSCORED
    assert 20 < changed.sum() < 33 + 1 and (holed != image).sum() == changed.sum()  # a ball of two voxels has 33
    assert np.argwhere(changed).mean(axis=0)[0] < 8  # the middle of the head is at 9.5


def test_flags_are_counted_by_scan_and_code() -> None:
    def row(strength: str, scan: str, protocol: str, warnings: str, method: str = NETWORK) -> dict[str, str]:
        told = ("noise", strength, scan, method, protocol, "0.5", warnings)
        return dict(zip(robustness.COLUMNS, told, strict=True))

    rows = [
        row("0.1", "1", "fsl_fast", ""),
        row("0.1", "2", "fsl_fast", ""),
        row("0.4", "1", "fsl_fast", "W_CUT,W_QUALITY"),
        row("0.4", "1", "fsl_first", "W_CUT,W_QUALITY"),  # the same scan
        row("0.4", "2", "fsl_fast", "W_QUALITY"),
        row("0.4", "3", "fsl_fast", ""),
        row("0.4", "3", "fsl_fast", "", robustness.PEER),
    ]
    flags = robustness.flagged(rows)
    assert flags == {("noise", 0.1): "0 of 2", ("noise", 0.4): "2 of 3 (W_CUT 1, W_QUALITY 2)"}
    assert robustness.table(robustness.means(rows), flags)[-1][-1] == "2 of 3 (W_CUT 1, W_QUALITY 2)"


def test_the_network_flags_what_its_page_would(model, tmp_path: Path) -> None:
    """Nothing but noise is no head."""
    image = np.random.default_rng(0).uniform(0, 100, (24, 24, 24)).astype(np.float32)
    found, warnings = robustness.by_network(model, robustness.UNKNOWN, image, 2.0)
    assert set(found) == {"fsl_fast", "fsl_first"} and "W_BRAIN_VOLUME" in warnings


def test_an_interrupted_measurement_goes_on(make_store, threshold_network, monkeypatch, tmp_path: Path) -> None:
    store = Store.open(make_store(("train", "validation", "validation"))[0].dest)
    config = replace(load("tissue:demo"), protocols=("fsl_fast", "fsl_first"))
    model = Model(threshold_network, config, 2.0, Origin("tissue:demo", 7, store.info.split_hash))
    calls = []

    def by_network(model, calibration, image, voxel_size_mm):
        calls.append(image)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return {name: np.ones(image.shape, np.uint8) for name in config.protocols}, ["W_QUALITY"]

    monkeypatch.setattr(robustness, "by_network", by_network)
    monkeypatch.setattr(robustness, "restore", lambda run: model)
    monkeypatch.setattr(robustness, "load_calibration", lambda run, step: robustness.UNKNOWN)
    command = [f"--store={store.dest}", "--split=validation", f"--out={tmp_path / 'out'}"]
    assert robustness.main(command) == 130
    assert robustness.main(command) == 0
    cases = 2 * (1 + sum(len(d.strengths) for d in DISTURBANCES.values()))  # of two scans
    assert len(calls) == cases + 1  # the interrupted one twice
    with (tmp_path / "out" / robustness.TSV).open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    present = [subject.present for subject in store.split("validation")]
    known = sum(row[store.info.protocols.index(name)] for row in present for name in config.protocols)
    assert len(rows) == known * cases / 2 and {row["method"] for row in rows} == {NETWORK}
    named = {subject.id for subject in store.split("validation")}
    assert not named & {row["scan"] for row in rows}
    assert (tmp_path / "out" / robustness.PICTURE).stat().st_size < 100_000
    model = replace(model, origin=replace(model.origin, step=8))
    assert robustness.main(command) == 1  # rows of two networks never share a table
    assert len(calls) == cases + 1


def test_dipys_classes_are_those_of_fast() -> None:
    pytest.importorskip("dipy", reason="needs the extra `benchmark`")
    names = [s.name for s in PROTOCOLS["fsl_fast"].structures]
    rng = np.random.default_rng(0)
    image = np.zeros((24, 24, 24), np.float32)
    for tissue, level in enumerate((30, 80, 120)):  # CSF is dark, white matter bright
        image[2:22, 2:22, 2 + 7 * tissue : 9 + 7 * tissue] = level
    image = np.where(image > 0, np.maximum(image + rng.normal(0, 8, image.shape), 1), 0).astype(np.float32)
    classes = robustness.by_dipy(image)[0]["fsl_fast"]
    assert [names[classes[12, 12, z]] for z in (5, 12, 19)] == [names[1], names[2], names[3]]
    assert not classes[image == 0].any()
