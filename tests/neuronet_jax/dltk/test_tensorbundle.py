"""TensorFlow's checkpoint files, and the runs imported from them.

Files written here by hand, following LevelDB's and TensorFlow's formats, read back. A published network's variables
become a run whose labels are those of the published network.
"""

import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neuronet_jax import cli, dltk, restore, segment
from neuronet_jax.config import ModelConfig
from neuronet_jax.dltk import tensorbundle
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.network import build
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.provenance import TrainingData

DTYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9}
VARIABLES = {
    "conv3d/kernel": np.arange(54, dtype=np.float32).reshape(3, 3, 3, 1, 2) / 7,
    "encoder/unit_1_0/beta": np.array([1.5, -2.5], np.float64),
    "encoder/unit_1_0/beta/Adam": np.zeros(0, np.float32),
    "encoder/unit_1_1/steps": np.array([[1, -2], [2**31 - 1, 0]], np.int32),
    "global_step": np.array(-(2**40), np.int64),
    **{f"tail_{i}/last": np.full((1, i + 1), i, np.float32) for i in range(20)},  # beyond one restart interval
}


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def masked(content: bytes) -> int:
    crc = tensorbundle.crc32c(content)
    return ((crc >> 15 | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def block(items: Iterable[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    """Returns entries with shared prefixes, restarting at every 16th, then restart points, compression and checksum."""
    content, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % 16:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        else:
            restarts.append(len(content))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    content += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + bytes([kind])
    return content + struct.pack("<I", masked(content))


def write_bundle(
    prefix: Path,
    variables: dict[str, np.ndarray],
    shards: int = 1,
    per_block: int = 8,
    header: bytes | None = None,
    kind: int = 0,
    extra: bytes = b"",
) -> None:
    """Writes files like TensorFlow's BundleWriter; `extra` adds fields to the last variable."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    data = [b""] * shards
    entries = [(b"", field(1, shards) + field(3, field(1, 1)) if header is None else header)]
    for i, (name, value) in enumerate(sorted(variables.items())):
        shard, content = i % shards, value.tobytes()
        shape = b"".join(field(2, field(1, side)) for side in value.shape)
        entry = field(1, DTYPES[str(value.dtype)]) + field(2, shape)
        entry += field(3, shard) + field(4, len(data[shard])) + field(5, len(content))
        entry += bytes([6 << 3 | 5]) + struct.pack("<I", masked(content))
        entries.append((name.encode(), entry + (extra if i == len(variables) - 1 else b"")))
        data[shard] += content
    table, index = b"", []
    for start in range(0, len(entries), per_block):
        content = block(entries[start : start + per_block], kind)
        index.append((entries[start : start + per_block][-1][0], varint(len(table)) + varint(len(content) - 5)))
        table += content
    handles = b""
    for content in (block([]), block(index)):
        handles += varint(len(table)) + varint(len(content) - 5)
        table += content
    table += handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table)
    for shard, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[n].dtype == v.dtype and found[n].shape == v.shape and np.array_equal(found[n], v)
        for n, v in expected.items()
    )


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "variables" / "variables"


@pytest.mark.parametrize(
    ("content", "crc"),
    [  # RFC 3720, B.4; the last is the customary check value of the algorithm
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_crc32c(content, crc):
    assert tensorbundle.crc32c(content) == crc


@pytest.mark.parametrize(("shards", "per_block"), [(1, 100), (1, 1), (3, 20)])
def test_written_variables_read_back(prefix, shards, per_block):
    write_bundle(prefix, VARIABLES, shards, per_block)
    assert same(tensorbundle.read(prefix), VARIABLES)


def test_the_reference_implementations_own_file(golden):
    with np.load(golden / "neuronet_all_eval.npz") as file:
        expected = {name.removeprefix("var/"): file[name] for name in file.files if name.startswith("var/")}
    found = tensorbundle.read(golden / "saved_model" / "variables" / "variables")
    fixed = {name for name in found if name.endswith("/linear_up_kernel")}
    assert same({name: found[name] for name in found.keys() - fixed}, expected) and len(fixed) == 15


def test_no_damage_to_the_index_goes_unseen(prefix):
    """Flips each byte and truncates at each: the result is an error or (footer padding, meta index) unchanged."""
    few = {name: VARIABLES[name] for name in ("conv3d/kernel", "global_step", "tail_1/last")}
    write_bundle(prefix, few, per_block=2)
    path = prefix.with_name("variables.index")
    whole = path.read_bytes()
    messages = []
    for at in range(len(whole)):
        for damaged in (whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :], whole[:at]):
            path.write_bytes(damaged)
            try:
                assert same(tensorbundle.read(prefix), few)
            except NeuronetError as error:
                messages.append(str(error))
    assert all("fetch them again" in message for message in messages)
    assert len(messages) > 2 * len(whole) - 80  # the footer has 40 bytes, not all in use


@pytest.mark.parametrize("name", ["conv3d/kernel", "tail_19/last"])
def test_damaged_data_names_the_variable(prefix, name):
    write_bundle(prefix, VARIABLES)
    path = prefix.with_name("variables.data-00000-of-00001")
    whole = path.read_bytes()
    at = whole.index(VARIABLES[name].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(NeuronetError, match=f"{name} does not match its checksum; the files are damaged"):
        tensorbundle.read(prefix)
    path.write_bytes(whole[: at + 1])
    with pytest.raises(NeuronetError, match="beyond its end; the files are damaged or incomplete: fetch them again"):
        tensorbundle.read(prefix)


def test_missing_files_are_named(prefix):
    with pytest.raises(NeuronetError, match=r"variables\.index cannot be read .*give the folder of the SavedModel"):
        tensorbundle.read(prefix)
    write_bundle(prefix, VARIABLES, shards=2)
    prefix.with_name("variables.data-00001-of-00002").unlink()
    with pytest.raises(NeuronetError, match=r"variables\.data-00001-of-00002 cannot be read"):
        tensorbundle.read(prefix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": 1}, "variables.index is compressed"),
        ({"header": field(1, 1) + field(2, 1)}, "big-endian"),
        ({"header": field(1, 2**40)}, "1099511627776 data files"),
        ({"extra": field(2, 1)}, "'v' has a number in place of a message"),
        ({"extra": field(5, b"12")}, "field 5 of a description is not a number"),
        ({"extra": field(7, b"")}, "v is partitioned into slices"),
        ({"extra": field(5, 2**62)}, "v of shape .3,. is said to take 4611686018427387904 bytes"),
        ({"extra": field(4, 2**62)}, "v lies at byte .* beyond its end"),
        ({"extra": field(2, field(2, field(1, 2**62)))}, "v of shape .4611686018427387904,. is said to take 12 bytes"),
    ],
)
def test_unsupported_features_are_refused(prefix, changes, message):
    write_bundle(prefix, {"v": np.zeros(3, np.float32)}, **changes)
    with pytest.raises(NeuronetError, match=message):
        tensorbundle.read(prefix)


def test_other_dtypes_are_refused(prefix):
    write_bundle(prefix, {"v": np.zeros(3, np.uint8)})
    with pytest.raises(NeuronetError, match="v has TensorFlow's dtype number 4"):
        tensorbundle.read(prefix)


def published(protocols: tuple[str, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random variables of a published network, with the names and shapes of its own implementation."""
    network = build(ModelConfig("reference", (16, 32, 64, 128), "float32", "batch"), protocols, seed)
    names: dict[Any, str] = {**dltk.variable_paths(network)}
    rng = np.random.default_rng(seed)
    variables = {"global_step": np.array(99_000, np.int64), "beta1_power": np.array(0.5, np.float32)}
    for path, variable in nnx.to_flat_state(nnx.state(network, graph=False)):
        value = np.asarray(variable[...])
        value = value.reshape(1, 1, 1, *value.shape) if value.ndim == 2 else value
        value = rng.uniform(0.5, 1.5, value.shape).astype(np.float32) if value.ndim == 1 else value
        variables[names[path]] = value
        variables[f"{names[path]}/Adam"] = np.zeros(1, np.float32)
    for tail, protocol in enumerate(protocols):
        ramp = np.array([0.25, 0.75, 0.75, 0.25], np.float32)
        cube = ramp[:, None, None] * ramp[:, None] * ramp
        fixed = cube[..., None, None] * np.eye(PROTOCOLS[protocol].num_classes, dtype=np.float32)
        variables |= {f"tail_{tail}/upscore_{scale}/linear_up_kernel": fixed for scale in range(3)}
    return variables


@pytest.fixture(scope="module")
def spm() -> dict[str, np.ndarray]:
    return published(("spm_tissue",))


def _import(folder: Path, variables: dict[str, np.ndarray], *arguments: str) -> int:
    write_bundle(folder / "saved" / "variables" / "variables", variables)
    return cli.main(["import-dltk", str(folder / "saved"), f"--out={folder / 'run'}", *arguments])


def test_an_imported_network_is_a_run(spm, tmp_path, capsys):
    assert _import(tmp_path, spm, "--config=spm_tissue", "--axes=RAS") == 0
    assert "published network spm_tissue" in capsys.readouterr().out
    model = restore(tmp_path / "run")
    assert model.config.protocols == ("spm_tissue",) and model.voxel_size_mm == 1.0
    assert model.origin.step == 99_000 and model.origin.imported is not None
    assert len(model.origin.imported.sha256["variables.data-00000-of-00001"]) == 64
    assert str(tmp_path) not in str(model.origin) and "spm_tissue" in model.origin.note
    with pytest.raises(NeuronetError, match="imported network, which cannot be trained further"):
        RunDirectory(tmp_path / "run").claim(model.config, TrainingData(("spm_tissue",), 1.0), resume=True)

    network = build(model.config.model, ("spm_tissue",), seed=5)
    dltk.load_variables(network, {name: spm[name] for name in dltk.variable_paths(network).values()})
    image = np.random.default_rng(0).gamma(2, 100, (32, 32, 32)).astype(np.float32)
    labels = segment(model, image)["spm_tissue"]
    assert len(np.unique(labels)) > 1
    np.testing.assert_array_equal(labels, segment(replace(model, network=network), image)["spm_tissue"])

    assert _import(tmp_path, spm, "--config=spm_tissue") == 1  # the run is in use
    assert "already holds a run; give a different --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, [], "[4] classes are those of fsl_fast and spm_tissue: say which by --config"),
        ({}, ["--config=malp_em"], "[4] classes are those of fsl_fast or spm_tissue, not of 'malp_em'"),
        ({}, ["--config=fsl_fast", "--axes=RAL"], "axes are one letter each"),
        ({"encoder/unit_2_0/sub_unit1/conv3d/kernel": None}, ["--config=fsl_fast"], "lack 'encoder/unit_2_0/sub"),
        ({"tail_0/last/conv3d/kernel": None}, [], "no published NeuroNet has tails of no classes"),
        ({"conv3d/kernel": np.zeros((3, 3, 3, 1, 8), np.float32)}, ["--config=fsl_fast"], "conv3d/kernel has shape"),
        ({"tail_0/upscore_1/linear_up_kernel": np.zeros((4, 4, 4, 4, 4), np.float32)}, [], "not the fixed linear"),
        ({"another": np.zeros(2, np.float32)}, ["--config=fsl_fast"], "no place for 1 variables, 'another'"),
    ],
)
def test_other_networks_are_refused(spm, tmp_path, capsys, changes, arguments, message):
    changed = {name: value for name, value in {**spm, **changes}.items() if value is not None}
    assert _import(tmp_path, changed, *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_seven_published_networks_are_told_apart():
    assert len(dltk.TASKS) == 7
    for name, protocols in dltk.TASKS.items():
        counts = [PROTOCOLS[protocol].num_classes for protocol in protocols]
        tails = {f"tail_{i}/last/conv3d/kernel": np.zeros((1, 1, 1, k, k)) for i, k in enumerate(counts)}
        assert dltk.variant(tails, name) == name
        if counts != [4]:
            assert dltk.variant(tails, None) == name


@jax.jit
def _logits(network, image):
    return network.logits(image)


@pytest.mark.parametrize(
    ("axes", "turn"),
    [
        ("RAS", lambda x: x),
        ("SAL", lambda x: x.transpose(2, 1, 0, 3)[::-1]),  # theirs [s a l] → ours [r a s]
        ("PIR", lambda x: x.transpose(2, 0, 1, 3)[:, ::-1, ::-1]),  # theirs [p i r] → ours [r a s]
    ],
)
def test_the_reference_implementations_own_logits(golden, tmp_path, axes, turn):
    dltk.import_run(golden / "saved_model", str(tmp_path / "run"), axes=axes)
    model = restore(tmp_path / "run")
    assert model.config.name == "all_targets"
    with np.load(golden / "neuronet_all_eval.npz") as file:
        logits = _logits(model.network, jnp.asarray(turn(file["x"][0])[None]))
        for name in PROTOCOLS:
            expected = turn(file[f"out/logits_{name}"][0])
            np.testing.assert_allclose(logits[name][0], expected, rtol=0, atol=1e-4 * expected.std(), err_msg=name)
