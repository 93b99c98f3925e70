"""The folder of a run: the claim of a training to it, and the description of its data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.flags import load
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs.directory import CONFIG, LEASE, METRICS, TRAINING_DATA, RunDirectory, code_sha256
from neuronet_jax.runs.provenance import Imported, Origin, Provenance, TrainingData
from neuronet_jax.store.schema import StoreInfo
from tests.processes import run_two

GOLDEN = Path(__file__).parent / "goldens" / "run_v1"
DATA = TrainingData(("fsl_fast",), 2.0, (24, 24, 24), "abc", "a test", store={"software": "neuronet-jax", "n": [1]})
IMPORTED = Imported("TensorFlow SavedModel", "SAL", {"variables.index": "ff"})


@pytest.fixture(scope="module")
def config() -> Config:
    return load("tissue:demo")


def test_D13_a_used_folder_is_refused_unless_it_is_the_same_run(tmp_path, config):
    run = RunDirectory(tmp_path / "run")
    run.claim(config, DATA)
    assert (run.config(), run.training_data()) == (config, DATA)
    with pytest.raises(NeuronetError, match="continue it with --resume"):
        run.claim(config, DATA)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    run.claim(replace(config, log_every=3, steps=7), DATA, resume=True)  # these may change within a run
    with pytest.raises(NeuronetError, match=r"seed was 0, is 7$"):
        run.claim(replace(config, seed=7, log_every=3), DATA, resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("voxel_size_mm", 1.0, "voxel_size_mm was 2.0, is 1.0"),
        ("grid", (24, 24, 32), r"grid was \(24, 24, 24\), is \(24, 24, 32\)"),
        ("protocols", ("fsl_fast", "malp_em"), "protocols was .*'malp_em'"),
        ("split_hash", "abd", "split_hash was 'abc', is 'abd'"),
        ("content_hash", "ee", "content_hash was 'dd', is 'ee'"),
    ],
)
def test_D17_different_data_are_refused_with_both_values(tmp_path, config, field, value, said):
    run, data = RunDirectory(tmp_path), replace(DATA, content_hash="dd")
    run.claim(config, data)
    run.claim(config, replace(data, store={"software": "moved"}, note=""), resume=True)  # where it lies is no matter
    with pytest.raises(NeuronetError, match=said):
        run.claim(config, replace(data, **{field: value}), resume=True)
    assert run.training_data() == data


def test_D16_a_run_in_use_is_refused_before_anything_is_touched(tmp_path, config):
    run = RunDirectory(tmp_path)
    with run.hold(config, DATA) as check_owner:
        check_owner()
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for resume in (False, True):
            with pytest.raises(NeuronetError, match="E_LEASE"), run.hold(replace(config, seed=7), DATA, resume):
                pass
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not (tmp_path / LEASE).exists()


TWO = """
import sys
from dataclasses import replace
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, run, changed = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(f"localhost:{port}", 2, rank, initialization_timeout=300)
from experiments.flags import load
from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs import directory
from neuronet_jax.runs.provenance import TrainingData
config = load("tissue:demo")
if rank and "config" in changed:
    config = replace(config, seed=7, name="longer than the other")
if rank and "code" in changed:
    directory.code_sha256 = lambda: "a different working copy"
try:
    directory.RunDirectory(run).claim(config, TrainingData(("fsl_fast",), 2.0))
    print("claimed", flush=True)
except NeuronetError as error:
    print(error, flush=True)
"""


def test_D11_processes_with_a_different_config_or_code_are_refused(tmp_path):
    wanted = {"config": "process 1 has different configs:", "code": "process 1 has different code:"}
    for changed, said in wanted.items():
        texts, _ = run_two(TWO, str(tmp_path / changed), changed, environment={"XLA_FLAGS": ""})
        for text in texts:
            assert "must have the same config, code and JAX as the first one" in text and said in text
        assert not (tmp_path / changed).exists()  # nothing was written


def test_the_code_has_one_digest(monkeypatch):
    assert len(code_sha256()) == 64 and code_sha256() == code_sha256()


def test_a_run_that_was_killed_while_it_began_can_begin_again(tmp_path, config):
    run = RunDirectory(tmp_path)
    run.claim(config, DATA)
    (tmp_path / CONFIG).unlink()  # it is the last one written
    run.claim(config, DATA)
    assert run.config() == config


def test_resuming_a_run_that_never_began_is_refused_unless_told(tmp_path, config, caplog):
    with pytest.raises(NeuronetError, match="holds no run to continue; correct --workdir, or add --begin"):
        RunDirectory(tmp_path).claim(config, DATA, resume=True)
    assert not (tmp_path / CONFIG).exists()
    RunDirectory(tmp_path).claim(config, DATA, resume=True, begin=True)
    assert "holds no run yet, starting at step 0" in caplog.text and (tmp_path / CONFIG).exists()


@pytest.mark.parametrize("older", [False, True])
def test_an_imported_network_is_not_trained_over(tmp_path, config, older):
    run = RunDirectory(tmp_path)
    if older:  # version 0.1.0 described an imported run as a store without slots
        provenance = {"imported": IMPORTED.to_json(), "note": "published"}
        info = StoreInfo(1, config.protocols, (128, 128, 128), 1.0, 0, 1, 128, provenance)
        (tmp_path / "store.json").write_bytes(info.to_json())
    else:
        run.describe(config, TrainingData(config.protocols, 1.0, note="published", imported=IMPORTED))
    assert run.training_data() == TrainingData(config.protocols, 1.0, note="published", imported=IMPORTED)
    for resume in (False, True):
        with pytest.raises(NeuronetError, match="imported network, which cannot be trained further"):
            run.claim(config, DATA, resume)


def test_the_store_of_an_older_run_describes_its_training_data():
    data = RunDirectory(GOLDEN).training_data()
    store = StoreInfo.from_json((GOLDEN / "store.json").read_bytes())
    assert data is not None and data == TrainingData.of_store(store)
    assert (data.note, data.voxel_size_mm, data.imported) == ("made for a test", 2.0, None)


def test_a_folder_that_does_not_exist_is_empty_and_stays_so(tmp_path):
    run = RunDirectory(tmp_path / "nothing")
    assert (run.config(), run.training_data(), run.metrics(), run.is_release()) == (None, None, [], False)
    assert not (tmp_path / "nothing").exists()


def test_lines_cut_short_are_left_out_of_the_metrics(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    assert [line["step"] for line in RunDirectory(tmp_path).metrics()] == [1, 3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 2}, "schema 2, this version reads up to 1"),
        ({"voxel_size_mm": "2"}, "'voxel_size_mm' of training data must be of type float"),
        ({"note": None}, "'note' of training data must be of type str"),
        ({"imported": {"from": "elsewhere"}}, "'axes' of imported must be of type str"),
    ],
)
def test_damaged_or_newer_training_data_are_refused(tmp_path, change, said):
    (tmp_path / TRAINING_DATA).write_text(json.dumps({**json.loads(DATA.to_json()), **change}))
    with pytest.raises(NeuronetError, match=said):
        RunDirectory(tmp_path).training_data()


def test_a_file_that_is_not_json_is_refused(tmp_path):
    for text in ("", "[1]", "{"):
        (tmp_path / TRAINING_DATA).write_text(text)
        with pytest.raises(NeuronetError, match="training data"):
            RunDirectory(tmp_path).training_data()


# -- provenance: the JSON that other programs read


def test_provenance_of_one_network_is_flat():
    origin = Origin("tissue", 7, "abc", "ff", "demonstration", IMPORTED)
    fields = {"config": "tissue", "step": 7, "split_hash": "abc", "weights_sha256": "ff", "note": "demonstration"}
    fields |= {"imported": {"from": "TensorFlow SavedModel", "axes": "SAL", "sha256": {"variables.index": "ff"}}}
    assert origin.to_json() == fields and Origin.from_json(fields) == origin
    made = Provenance((origin,), "cc", {"flip": True}).to_json()
    assert list(made.items()) == [*fields.items(), ("calibration_sha256", "cc"), ("flip", True)]
    assert Provenance((Origin("tissue", 7),)).to_json() == {
        "config": "tissue", "step": 7, "split_hash": "", "weights_sha256": ""
    }  # fmt: skip


def test_provenance_of_an_ensemble_lists_its_members_and_each_note_once():
    members = (Origin("a", 1, note="synthetic"), Origin("b", 2, note="synthetic"), Origin("c", 3, note="published"))
    made = Provenance(members, options={"flip": True}).to_json()
    assert made == {
        "ensemble": [member.to_json() for member in members],
        "note": "synthetic; published",
        "flip": True,
    }


def test_a_network_without_a_run_has_no_provenance():
    assert Origin().to_json() == {} and Provenance((Origin(),)).to_json() == {} and Provenance().to_json() == {}
    assert Origin.from_json({}) == Origin()


@pytest.mark.parametrize("content", [{"step": "7"}, {"imported": "x"}, {"config": ["a"]}, []])
def test_provenance_of_the_wrong_type_is_refused(content):
    with pytest.raises(NeuronetError, match="must be"):
        Origin.from_json(content)
