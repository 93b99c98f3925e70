"""Rows E12 and E15: a run with any file damaged or forged is read past the damage, and says so, or is refused."""

import hashlib
import json
import logging
import os
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from experiments.flags import load
from neuronet_jax import cli
from neuronet_jax.errors import CodedWarning, NeuronetError
from neuronet_jax.runs import checksums
from neuronet_jax.runs.calibration import calibration_to_json, load_calibration, uncalibrated
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.checksums import MANIFEST
from neuronet_jax.runs.directory import CONFIG, QUALITY, TRAINING_DATA, RunDirectory
from neuronet_jax.runs.provenance import TrainingData
from neuronet_jax.runs.restore import restore
from neuronet_jax.training.mesh import make_mesh
from neuronet_jax.training.step import init_state

BEST, OTHER, LATEST = 1, 2, 3  # the steps of the run; BEST is restored, then OTHER


@pytest.fixture(scope="module")
def config():
    config = load("all_targets:demo")
    settings = replace(config.model, filters=(2, 4), compute_dtype="float32")
    return replace(config, protocols=("fsl_fast", "fsl_first"), model=settings)


@pytest.fixture(scope="module")
def sound(config, tmp_path_factory) -> Path:
    """Returns the folder of a run with three checkpoints, the first of them the best."""
    run = tmp_path_factory.mktemp("sound") / "run"
    _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
    with Checkpoints(run) as checkpoints:
        for step, score in ((BEST, 0.9), (OTHER, 0.5), (LATEST, None)):
            checkpoints.save(step, state, {"position": step}, config, score=score)
    data = TrainingData(config.protocols, 2.0, (32, 32, 32), split_hash="abc")
    RunDirectory(run).describe(config, data)
    return run


@pytest.fixture
def run(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


FORGED = {
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "no keys": b"{}",
    "deep": b"[" * 100_000,
    "digits": b"1" * 100_000,
    "not text": bytes(range(128, 256)),
    "nan": b"NaN",
}
DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": _truncate,
    "flipped": _flip,
    "emptied": _empty,
    "removed": Path.unlink,
}


def _quietly(run: Path) -> tuple[int, list[str]]:
    """Returns the step that `restore` takes and what it says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = restore(run).origin.step
    return step, [str(warning.message) for warning in caught if isinstance(warning.message, CodedWarning)]


def _seal(checkpoint: Path) -> None:
    """Writes the manifest again, as somebody would who forges a checkpoint."""
    checksums.write_manifest(epath.Path(checkpoint))


def _files(run: Path, step: int) -> list[str]:
    return [*checksums.covered(epath.Path(run / "checkpoints" / str(step))), MANIFEST]


@pytest.mark.parametrize("damage", DAMAGES)
def test_E15_restore_passes_over_a_checkpoint_with_any_file_damaged(sound, tmp_path, damage, caplog):
    for step in (BEST, LATEST):
        names = _files(sound, step)
        assert len(names) > 8
        for number, name in enumerate(names):
            run = Path(shutil.copytree(sound, tmp_path / f"{number}-{step}"))
            DAMAGES[damage](run / "checkpoints" / str(step) / name)
            caplog.clear()
            with Checkpoints(run, read_only=True) as checkpoints:
                best = checkpoints.best()
            assert best == (OTHER if step == BEST else BEST), name
            said = [*checkpoints.faults.values(), *caplog.messages]  # without its manifest it counts as unfinished
            assert len(said) == 1, (name, said)
            shutil.rmtree(run)


@pytest.mark.parametrize("name", ["run/metadata", "state/manifest.ocdbt", "state/_METADATA", MANIFEST])
def test_E15_the_real_restore_takes_the_next_best(run, name, caplog):
    _flip(run / "checkpoints" / str(BEST) / name)
    step, said = _quietly(run)
    assert step == OTHER
    assert len(said) == 1 and said[0].startswith(f"W_CHECKPOINT: checkpoint {BEST} of {run} is damaged and passed over")
    _flip(run / "checkpoints" / str(OTHER) / name)
    step, said = _quietly(run)
    assert step == LATEST and len(said) == 2
    _flip(run / "checkpoints" / str(LATEST) / name)
    with pytest.raises(NeuronetError, match=r"all checkpoints of .* are damaged; copy the run again"):
        _quietly(run)


def test_E15_the_commit_files_of_orbax_are_not_needed(run):
    """The manifest cannot cover them: Orbax writes them after it. Nothing reads them."""
    for file in (run / "checkpoints").glob("*/_CHECKPOINT_METADATA"):
        file.write_bytes(b"{]")
    assert _quietly(run) == (BEST, [])
    with Checkpoints(run) as checkpoints:
        assert checkpoints.best() == BEST


def test_E15_segment_passes_over_damage_and_says_so(run, noisy_heads, tmp_path):
    _truncate(run / "checkpoints" / str(BEST) / "run" / "metadata")
    head, out = noisy_heads / "head0.nii.gz", tmp_path / "out"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cli.main(["segment", str(head), f"--run={run}", f"--out={out}"]) == 0
    assert any(str(warning.message).startswith(f"W_CHECKPOINT: checkpoint {BEST} of") for warning in caught)
    (found,) = out.rglob("*_provenance.json")
    assert f'"step": {OTHER}' in found.read_text()


def test_E15_the_next_save_passes_over_damage_and_says_so(run, config, caplog):
    """The running training saves, and removes what is beyond `keep`, whatever happened to the files in between."""
    _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
    damages, first = list(DAMAGES.values()), LATEST + 1
    with Checkpoints(run, keep=2) as checkpoints, caplog.at_level(logging.WARNING):
        for step in range(first, first + len(_files(run, BEST)) + 1):
            caplog.clear()
            checkpoints.save(step, state, {}, config, score=0.8)
            checkpoints.wait()
            if step > first:
                (said,) = (message for message in caplog.messages if "DAMAGED" in message)
                assert f"CHECKPOINT {step - 1} IS DAMAGED" in said
                assert step - 1 not in checkpoints.sound() and checkpoints.latest() == step
                shutil.rmtree(run / "checkpoints" / str(step - 1))
            name = _files(run, step)[min(step - first, len(_files(run, step)) - 1)]
            damage = damages[step % (3 if name == MANIFEST else 4)]  # without a manifest it would be no checkpoint
            damage(run / "checkpoints" / str(step) / name)
        assert checkpoints.best() == BEST


def test_E15_a_verified_checkpoint_is_not_hashed_again(run, config, monkeypatch):
    """The cost of a save must not grow with the checkpoints that are kept."""
    _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
    hashed: list[str] = []
    true_damage = checksums.damage
    monkeypatch.setattr(
        "neuronet_jax.runs.inspection.damage", lambda folder: hashed.append(folder.name) or true_damage(folder)
    )
    with Checkpoints(run, keep=3) as checkpoints:
        for step in range(LATEST + 1, LATEST + 4):
            checkpoints.save(step, state, {}, config)
            checkpoints.wait()
    assert sorted(hashed) == [str(BEST), str(OTHER), str(LATEST)]  # once each: those of the run before


def test_names_that_are_no_steps_are_left_alone(run):
    for name in ("²", "007", "-1", "1.5"):
        (run / "checkpoints" / name).mkdir()
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [BEST, OTHER, LATEST]


# -- forged: with a manifest that fits


def _forge(run: Path, step: int, change: Callable[[dict[str, Any]], object]) -> None:
    file = run / "checkpoints" / str(step) / "run" / "metadata"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    _seal(file.parents[1])


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.parametrize("name", ["run/metadata", "position/position.json"])
def test_E12_forged_json_of_a_checkpoint(run, config, name, kind):
    for step in (BEST, OTHER, LATEST):
        (run / "checkpoints" / str(step) / name).write_bytes(FORGED[kind])
        _seal(run / "checkpoints" / str(step))
    if name == "run/metadata":
        with pytest.raises(NeuronetError, match="all checkpoints"):
            _quietly(run)
        return
    assert _quietly(run) == (BEST, [])  # a model needs no position
    _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
    with Checkpoints(run) as checkpoints:
        if kind in ("deep", "digits", "not text"):  # no JSON
            with pytest.raises(NeuronetError, match="is not JSON"):
                checkpoints.restore(state)
        else:
            checkpoints.restore(state)  # the data iterator judges what it says, see test_pipeline.py


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", "1"),
        ("schema", None),
        ("schema", 0),
        ("score", "0.9"),
        ("score", float("nan")),
        ("score", [1]),
        ("score", True),
        ("arrays", []),
        ("arrays", {"params/a": "float32"}),
        ("arrays", {"params/a": ["float32", [-1]]}),
        ("arrays", {"params/a": ["float32", ["8"]]}),
        ("config", [1]),
        ("key_impls", {"a": 1}),
        ("versions", "new"),
    ],
)
def test_E12_forged_fields_of_a_checkpoint_are_passed_over(run, field, value):
    _forge(run, BEST, lambda content: content.update({field: value}))
    step, said = _quietly(run)
    assert step == OTHER and len(said) == 1 and repr(field) in said[0]


def test_E12_an_absurd_shape_is_refused_before_memory_is_allocated(run):
    """The config and every array agree on a network of 100 GB; only the files are too small for it."""

    def inflate(content: dict[str, Any]) -> None:
        content["config"]["model"]["filters"] = [2**14, 2**14]
        content["arrays"].update(arrays)

    for step in (OTHER, LATEST):
        shutil.rmtree(run / "checkpoints" / str(step))
    _forge(run, BEST, lambda content: content["config"]["model"].update(filters=[2**14, 2**14]))
    with pytest.raises(NeuronetError) as raised:
        restore(run)
    lines = str(raised.value).splitlines()
    assert "does not fit this model" in lines[0]  # the arrays are still those of the small network
    arrays = {}
    for line in lines[1:]:
        path, _, rest = line.strip().partition(": ")
        arrays[path] = ["float32", json.loads(rest.rpartition(", float32")[2].removesuffix(" here"))]
    assert sum(np.prod(shape) * 4.0 for _, shape in arrays.values()) > 1e11
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _forge(run, BEST, inflate)
    with pytest.raises(NeuronetError, match=r"claims arrays of \d+ bytes, but its files hold \d+"):
        restore(run)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 2**19  # kB: half a GB


@pytest.mark.parametrize(
    "change",
    [
        {"filters": [2**40, 4]},
        {"filters": [2] * 5000},
        {"filters": []},
        {"filters": "many"},
        {"family": 7},
        {"compute_dtype": "float128"},
    ],
)
def test_E12_a_forged_network_is_refused(run, change):
    for step in (BEST, OTHER, LATEST):
        _forge(run, step, lambda content: content["config"]["model"].update(change))
    with pytest.raises(NeuronetError, match=r"config\."):
        _quietly(run)


def test_E12_weights_that_are_not_finite_are_refused(sound, config, tmp_path):
    _, state = init_state(config, make_mesh(config, jax.devices()[:1]))
    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan") if leaf.dtype == "float32" else leaf, state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, broken, {}, config)
    for name in (CONFIG, TRAINING_DATA):
        shutil.copy(sound / name, tmp_path)
    with pytest.raises(NeuronetError, match=r"weights in .* are not all finite numbers"):
        restore(tmp_path)


@pytest.mark.parametrize("kind", [*FORGED, "truncated", "emptied", "huge"])
@pytest.mark.parametrize("name", [CONFIG, TRAINING_DATA, "store.json"])
def test_E12_forged_descriptions_of_a_run_are_refused(run, config, name, kind):
    if name == "store.json":
        (run / TRAINING_DATA).rename(run / name)
    if kind in FORGED:
        (run / name).write_bytes(FORGED[kind])
    elif kind == "huge":
        os.truncate(run / name, 2**40)  # a terabyte of nothing, on paper
    else:
        DAMAGES[kind](run / name)
    folder = RunDirectory(run)
    with pytest.raises(NeuronetError):
        folder.config() if name == CONFIG else folder.training_data()
    with pytest.raises(NeuronetError):
        folder.claim(config, TrainingData(config.protocols, 2.0), resume=True)
    if name != CONFIG:  # which a model does not need: every checkpoint has its own
        with pytest.raises(NeuronetError):
            restore(run)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocols", [1]),
        ("voxel_size_mm", float("nan")),
        ("voxel_size_mm", -1.0),
        ("voxel_size_mm", 2),
        ("grid", ["a"]),
        ("grid", [0, 1, 2]),
        ("store", []),
        ("schema", True),
    ],
)
def test_E12_forged_training_data_are_refused(run, field, value):
    content = json.loads((run / TRAINING_DATA).read_text())
    (run / TRAINING_DATA).write_text(json.dumps({**content, field: value}))
    with pytest.raises(NeuronetError, match=f"'{field}' of"):
        restore(run)


@pytest.mark.parametrize("schema", [0, -3, True, "1", 1.5])
def test_E12_a_config_of_no_schema_is_refused(run, schema):
    content = json.loads((run / CONFIG).read_text())
    (run / CONFIG).write_text(json.dumps({**content, "schema": schema}))
    with pytest.raises(NeuronetError, match="schema"):
        RunDirectory(run).config()


def test_E12_a_group_of_an_older_config_that_is_no_group_is_refused(run):
    content = json.loads((run / CONFIG).read_text())
    (run / CONFIG).write_text(json.dumps({**content, "schema": 1, "loss": [1.0]}))
    with pytest.raises(NeuronetError, match="loss takes a group of fields"):
        RunDirectory(run).config()


def _calibration(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Returns a calibration whose own checksum fits after the change."""
    line = {"slope": 1.0, "offsets": [0.0] * 4, "error": None}
    content = {"step": BEST, "heads": 2, "lines": {"fsl_fast": line}, "threshold": None, "schema_version": 1}
    assert set(content) == set(json.loads(calibration_to_json(uncalibrated("none")))) - {"sha256"}
    change(content)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}).encode()


def test_a_calibration_that_is_sound_is_used(run):
    (run / QUALITY).write_bytes(_calibration(lambda content: None))
    assert load_calibration(str(run), BEST).heads == 2


@pytest.mark.parametrize(
    "content",
    [
        *FORGED.values(),
        b"",
        _calibration(lambda content: content["lines"]["fsl_fast"].update(slope=float("nan"))),
        _calibration(lambda content: content["lines"]["fsl_fast"].update(offsets=[10**400] * 4)),
        _calibration(lambda content: content["lines"]["fsl_fast"].update(error="small")),
        _calibration(lambda content: content.update(lines=[1])),
        _calibration(lambda content: content.update(heads=-1)),
        _calibration(lambda content: content.update(threshold={"score": 1.0})),
        _calibration(
            lambda content: content.update(
                threshold={"score": float("inf"), "false_alarms": 0, "heads": 2, "rate_at_most": 0.5}
            )
        ),
    ],
)
def test_E12_a_forged_calibration_is_not_used(run, content):
    (run / QUALITY).write_bytes(content)
    with pytest.warns(CodedWarning, match="W_UNCALIBRATED"):
        assert load_calibration(str(run), BEST).heads == 0
