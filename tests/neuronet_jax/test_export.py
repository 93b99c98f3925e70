"""Releases: the program that runs without this library gives `segment`'s labels; a damaged release is not restored."""

import ast
import hashlib
import json
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
import pytest
from safetensors.numpy import load_file, save

import neuronet_jax
from experiments.flags import load
from neuronet_jax import cli, export, restore, segment
from neuronet_jax.errors import NeuronetError, RejectError
from neuronet_jax.images import intensity
from neuronet_jax.inference.segmentation import Options
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.network import build
from neuronet_jax.runs.calibration import Calibration, Line, Threshold, load_calibration, save_calibration
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Origin
from tests.processes import PATIENCE_S

SHAPE = (64, 96, 32)

RAW = Options(clean_up=False)  # what the exported program gives


def _model(family: str) -> Model:
    config = load("all_targets:demo")
    settings = replace(config.model, family=family, filters=(4, 6, 8, 10))
    config = replace(
        config,
        model=settings,
        data=replace(config.data, store="/home/someone/store", stores=("/home/someone/heads",), weights=(0.4, 0.6)),
    )
    return Model(build(settings.on("cpu"), config.protocols, seed=3), config, 2.0, Origin("test", 7))


@pytest.fixture(scope="module")
def model() -> Model:
    return _model("neuronet")


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work") / "release"
    export.export(model, folder)
    return folder


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    """Returns a raw image whose sides are not multiples of 32, with a spike to be clipped."""
    image = np.random.default_rng(0).gamma(2, 150, (51, 77, 30))
    image[:, :9] = 0
    image[30, 40, 20] = 1e6
    return image.astype(np.float32)


@pytest.fixture(scope="module")
def labels(model: Model, head: np.ndarray) -> dict[str, np.ndarray]:
    labels = segment(model, head, options=RAW)
    assert all(len(np.unique(ids)) > 1 for ids in labels.values())  # something to compare
    return labels


def _example() -> str:
    """Returns the code in the docstring of `neuronet_jax.export`."""
    text = ast.get_docstring(ast.parse(Path(export.__file__).read_text())) or ""
    return textwrap.dedent("\n".join(line for line in text.splitlines() if line.startswith("    ") or not line))


def test_the_documented_example_gives_the_same_labels_in_a_fresh_process(folder, head, labels):
    np.save(folder.parent / "image.npy", head)
    code = (
        _example()
        + "\nimport sys\nassert not any(name.startswith(('neuronet_jax', 'flax', 'orbax')) for name in sys.modules)"
        + "\nnp.savez('labels.npz', **labels)"
    )
    # -I: neither the working directory nor PYTHONPATH is searched
    subprocess.run([sys.executable, "-I", "-W", "error", "-c", code], cwd=folder.parent, check=True, timeout=PATIENCE_S)
    with np.load(folder.parent / "labels.npz") as found:
        assert sorted(found.files) == sorted(PROTOCOLS)
        for name, expected in labels.items():
            np.testing.assert_array_equal(found[name], expected, err_msg=name)


@cache
def _program(path: Path) -> Any:
    return jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)


def _call(folder: Path, image: np.ndarray, file: str = "segment.jax_export") -> dict[str, np.ndarray]:
    """Returns the labels of a release's program for an image padded to multiples of 32, in this process."""
    padded = np.pad(image, [(0, -side % 32) for side in image.shape])
    weights = load_file(folder / "weights.safetensors")
    found = _program(folder / file)(weights, padded, np.array(image.shape, np.int32))
    return {name: np.asarray(ids)[tuple(map(slice, image.shape))] for name, ids in found.items()}


def test_one_program_serves_three_platforms_and_holds_no_weights(folder):
    content = (folder / "segment.jax_export").read_bytes()
    assert jax.export.deserialize(bytearray(content)).platforms == ("cpu", "cuda", "tpu")
    weights = load_file(folder / "weights.safetensors")
    assert len(content) < 200_000 and weights["encoder/stem/kernel"].tobytes() not in content


def test_the_published_network_is_exported_too_and_for_one_shape(tmp_path, head):
    model = _model("reference")
    export.export(model, tmp_path / "release", [SHAPE])
    found = _call(tmp_path / "release", head, "segment-64-96-32.jax_export")
    for name, expected in segment(model, head, options=RAW).items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def _images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    noise = rng.normal(300, 100, (9, 14, 11)).astype(np.float32)
    cut, spikes, wrapped = (noise.copy() for _ in range(3))
    cut[:4] = 0
    spikes[2, 3, 4], spikes[5, 5, 5] = 1e7, -1e7
    wrapped[1, 1, 1] = np.inf
    return {
        "noise": noise,
        "cut": cut,
        "spikes": spikes,
        "infinite": wrapped,
        "negative": -noise - 1000,
        "negative and cut": -cut,
        "few": np.pad(noise[:1, :2, :2], [(4, 4), (6, 6), (4, 5)]),
        "large offset": noise + 1e6,
    }


@pytest.mark.parametrize("name", _images())
def test_whitening_is_that_of_intensity_to_the_last_bit(name):
    image = _images()[name]
    clipped, _ = intensity.clip_spikes(image)
    statistics = intensity.statistics(clipped)
    expected = intensity.whiten(clipped, statistics.mean, statistics.std)
    padded = np.pad(image, [(0, 3), (0, 2), (0, 5)], constant_values=123)  # the padding must not matter
    whitened, usable = jax.jit(export.whiten)(padded, np.array(image.shape, np.int32))
    whitened, inside = np.array(whitened), tuple(map(slice, image.shape))
    assert usable
    np.testing.assert_array_equal(whitened[inside], expected)
    whitened[inside] = -statistics.mean / statistics.std
    assert (whitened == np.float32(-statistics.mean / statistics.std)).all()


def test_one_program_serves_all_sizes(folder, model, head):
    found = _call(folder, head[:20, :40])
    for name, expected in segment(model, head[:20, :40], options=RAW).items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


@pytest.mark.parametrize("value", [0.0, 7.0, 1e6, np.nan])
def test_an_image_that_segment_refuses_is_all_background(folder, model, head, value):
    image = np.full((20, 40, 30), value, np.float32)
    image[::2] *= 1 + 1e-7  # the values near 1e6 are constant except for the last bit
    if np.isnan(value):
        image[1:] = head[1:20, :40]
    with pytest.raises(RejectError):
        segment(model, image)
    assert not any(ids.any() for ids in _call(folder, image).values())


def test_the_description_gives_the_meaning_of_the_ids(folder):
    text = (folder / "release.json").read_text()
    release = json.loads(text)
    assert release["version"] == neuronet_jax.__version__ and release["voxel_size_mm"] == 2.0
    assert release["programs"] == [
        {
            "file": "segment.jax_export",
            "shape": None,
            "multiple_of": 32,
            "platforms": ["cpu", "cuda", "tpu"],
        }
    ]
    for name in release["protocols"]:
        assert [row["id"] for row in release["labels"][name]] == PROTOCOLS[name].ids.tolist()
    for name, digest in release["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert "someone" not in text  # from the paths of the training stores
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "manifest.sha256"], cwd=folder, check=True)


def test_a_release_is_restored_like_a_run(folder, model, head, labels, tmp_path):
    restored = restore(folder)
    assert restored.voxel_size_mm == 2.0 and restored.provenance == model.provenance
    assert replace(restored.config, data=model.config.data) == model.config
    for name, expected in labels.items():
        np.testing.assert_array_equal(segment(restored, head, options=RAW)[name], expected, err_msg=name)
    neuronet_jax.release(restored, tmp_path / "again")
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()
    with pytest.raises(NeuronetError, match="already holds a release"):
        neuronet_jax.release(restored, tmp_path / "again")


def test_a_release_keeps_the_calibration_of_its_run(model, tmp_path, capsys):
    line = Line(1.0, (0.0,) * PROTOCOLS["fsl_fast"].num_classes, None)
    calibration = Calibration(7, 3, {"fsl_fast": line}, Threshold(0.5, 0, 3, 0.63))
    neuronet_jax.release(model, tmp_path / "run")
    save_calibration(str(tmp_path / "run"), calibration)
    assert cli.main(["export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'release'}"]) == 0
    assert "calibrated on 3 validation subjects; scans below 0.500 are flagged" in capsys.readouterr().out
    assert load_calibration(str(tmp_path / "release"), 7) == calibration
    weights = ("export", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'weights'}", "--weights-only")
    assert cli.main([*weights, "--note=for research only"]) == 0
    assert "holds the weights and their description" in capsys.readouterr().out
    assert not list((tmp_path / "weights").glob("*.jax_export"))
    assert restore(tmp_path / "weights").origin == replace(model.origin, note="for research only")
    assert cli.main([*weights, "--shape=32,32,32"]) == 2
    content = (tmp_path / "release" / "quality.json").read_bytes()
    assert (
        f"{hashlib.sha256(content).hexdigest()}  quality.json" in (tmp_path / "release" / "manifest.sha256").read_text()
    )


def _flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file and its line in the manifest, as an attacker would."""
    path.write_bytes(content)
    manifest = path.with_name("manifest.sha256")
    lines = [line for line in manifest.read_text().splitlines() if not line.endswith(f"  {path.name}")]
    manifest.write_text("\n".join([*lines, f"{hashlib.sha256(content).hexdigest()}  {path.name}"]) + "\n")


def _described(folder: Path, **changes: object) -> None:
    release = json.loads((folder / "release.json").read_text())
    _replace(folder / "release.json", json.dumps({**release, **changes}).encode())


def _weights(folder: Path, change) -> None:
    weights = load_file(folder / "weights.safetensors")
    change(weights)
    _replace(folder / "weights.safetensors", save(weights))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _flip(f / "weights.safetensors"), "weights.safetensors does not have its checksum"),
        (lambda f: _flip(f / "release.json", 40), "release.json does not have its checksum"),
        (lambda f: (f / "weights.safetensors").write_bytes(b""), "weights.safetensors does not have its checksum"),
        (lambda f: (f / "weights.safetensors").unlink(), "lacks weights.safetensors"),
        (lambda f: (f / "manifest.sha256").unlink(), "is incomplete"),
        (lambda f: _described(f, schema=2), "has schema 2, this version reads up to 1: update"),
        (lambda f: _described(f, voxel_size_mm=-1.0), "must be positive, got -1.0"),
        (lambda f: _described(f, config=None), "needs the field 'config', of type dict"),
        (lambda f: _described(f, config={"name": "x"}), "config lacks the field"),
        (lambda f: _replace(f / "release.json", b"!python"), "is not JSON"),
        (lambda f: _replace(f / "weights.safetensors", struct.pack("<Q", 2**31) + b"{}"), "is not a safetensors file"),
        (lambda f: _replace(f / "weights.safetensors", bytes(2**23)), "has 8388608 bytes, its network takes"),
        (
            lambda f: _weights(f, lambda w: w.pop("encoder/stem/kernel")),
            "disagree about 1 arrays, such as 'encoder/stem",
        ),
        (lambda f: _weights(f, lambda w: w.update(more=np.zeros(1))), "disagree about 1 arrays, such as 'more'"),
        (
            lambda f: _weights(f, lambda w: w.update({"encoder/stem/kernel": np.zeros((3, 3, 3, 4), np.float32)})),
            "encoder/stem/kernel of weights.safetensors is float32[3, 3, 3, 4], the network takes",
        ),
    ],
)
def test_E12_a_damaged_or_forged_release_is_refused(folder, tmp_path, damage, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(NeuronetError) as raised:
        restore(tmp_path)
    assert message in str(raised.value)


def test_the_command_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", f"--run={folder}", f"--out={tmp_path / 'any'}"]) == 0
    assert (tmp_path / "any" / "segment.jax_export").exists()
    assert cli.main(["export", f"--run={folder}", f"--out={out}", "--shape=32,32,64", "--shape=64,64,64"]) == 0
    assert sorted(path.name for path in out.glob("*.jax_export")) == [
        "segment-32-32-64.jax_export",
        "segment-64-64-64.jax_export",
    ]
    assert cli.main(["export", f"--run={folder}", f"--out={tmp_path / 'odd'}", "--shape=32,30,64"]) == 1
    assert "--shape takes three multiples of 32, got 32,30,64" in capsys.readouterr().err
    assert not (tmp_path / "odd").exists()
    with pytest.raises(SystemExit):
        cli.main(["export", f"--run={folder}", f"--out={out}", "--shape=32,64"])
