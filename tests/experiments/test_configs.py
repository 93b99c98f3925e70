"""Named configs, their overrides on the command line, and their frozen text.

After an intended change of a config, write the goldens again with `PYTHONPATH=. python
tests/experiments/test_configs.py` from the root of the repository, and read the difference before committing it.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import flags
from experiments.flags import NAMES, load
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.labels import PROTOCOLS
from tests.processes import PATIENCE_S

GOLDENS = Path(__file__).parent / "goldens"
PUBLISHED = [name for name in NAMES if name != "pretrained"]  # which names its stores, and has no variant
REFERENCES = [f"{name}{variant}" for name in PUBLISHED for variant in ("", ":demo")]


def _golden(reference: str) -> Path:
    return GOLDENS / f"{reference.replace(':', '_')}.json"


@pytest.mark.parametrize("reference", REFERENCES)
def test_named_config_is_unchanged(reference):
    assert load(reference).to_json() == _golden(reference).read_text().rstrip("\n")


def test_the_published_variants_exist():
    assert set(PUBLISHED) == {"all_targets", "tissue", *PROTOCOLS}
    assert load("all_targets").protocols == tuple(PROTOCOLS)
    assert all(load(name).protocols == (name,) for name in PROTOCOLS)
    assert set(load("tissue").protocols) == {"fsl_fast", "spm_tissue", "malp_em_tissue"}


def test_variants_differ_only_in_their_protocols():
    shared = {dataclasses.replace(load(name), name="", protocols=("malp_em",)) for name in PUBLISHED}
    assert len(shared) == 1


def test_the_recipe_of_the_network_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NeuronetError, match=r"no folder 'stores/pretrained/brains-1mm'; give the --store"):
        load("pretrained")
    (tmp_path / "stores" / "pretrained" / "brains-1mm").mkdir(parents=True)
    assert load("pretrained").to_json() == _golden("pretrained").read_text().rstrip("\n")
    with pytest.raises(UsageError, match=r"the variants are '', '2mm' and '1\.5mm'"):
        load("pretrained:demo")


def test_family_changes_nothing_else():
    config = load("all_targets", ["--config.model.family=reference"])
    assert dataclasses.replace(config, model=load("all_targets").model) == load("all_targets")


def test_overrides_of_every_type(tmp_path):
    config = load(
        "all_targets:demo",
        [
            "--config.steps=7",
            "--config.optimizer.learning_rate=1",
            "--config.augment.flip=false",
            "--config.model.filters=[8, 16]",
            "--config.protocols=fsl_fast,'malp_em'",
            "--config.data.crop",
            "(32, 16, 8)",
            f"--config.data.store={tmp_path}",
            "--config.steps=9",
        ],
    )
    assert (config.name, config.steps, config.optimizer.learning_rate) == ("all_targets:demo", 9, 1.0)
    assert (config.augment.flip, config.model.filters) == (False, (8, 16))
    assert (config.protocols, config.data.crop) == (("fsl_fast", "malp_em"), (32, 16, 8))
    assert config.data.store == str(tmp_path)
    assert load("tissue", ["--config.data.crop=64"]).data.crop == (64, 64, 64)


def test_a_file_of_the_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from experiments.configs.common import config\n"
        "def get_config(variant=''):\n"
        "    return config(('malp_em', 'fsl_fast'), variant)\n"
    )
    config = load(f"{file}:demo", ["--config.batch=2"])
    assert (config.name, config.protocols, config.batch) == ("mine:demo", ("malp_em", "fsl_fast"), 2)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.learning_rate=1e-3", "did you mean 'optimizer.learning_rate'"),
        ("--config.optimizer.learning_rat=1e-3", "did you mean 'optimizer.learning_rate'"),
        ("--config.model.dropout=.1", "no such field"),
        ("--config.model=reference", "no such field"),
        ("--config.steps=1e3", "takes a whole number, got '1e3'"),
        ("--config.steps", "needs a value"),
        ("--config.augment.flip=yes", "takes true or false"),
        ("--config.optimizer.learning_rate=fast", "takes a number"),
        ("--config.optimizer.learning_rate=nan", "optimizer.learning_rate must be finite"),
        ("--config.optimizer.learning_rate=-1", "optimizer.learning_rate must be finite and not negative"),
        ("--config.batch=-1", "batch must be finite and not negative"),
        ("--config.batch=0", "batch must be at least 1"),
        ("--config.data.crop=64,64", "config.data.crop takes tuple"),
        ("--config.data.crop=64,64,x", "takes values like (128, 128, 128)"),
        ("--config.data.crop=60,64,64", "nearest legal side is 64"),
        ("--config.protocols=freesurfer", "protocols must be fsl_fast or"),
        ("--config.model.family=resnet", "must be reference or neuronet"),
        ("--verbose", "unknown argument"),
        ("steps=3", "unknown argument"),
    ],
)
def test_G1_bad_setting_is_an_error_that_helps(argument, said):
    with pytest.raises(NeuronetError) as raised:
        load("all_targets", [argument])
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("all_target", "did you mean 'all_targets'"),
        ("all_targets:small", "the variants are '' and 'demo', got 'small'"),
        ("missing/file.py", "one of all_targets"),
        ("common", "one of all_targets"),
        (__file__, "must define get_config"),
    ],
)
def test_G1_unknown_name_is_an_error_that_helps(reference, said):
    with pytest.raises(NeuronetError) as raised:
        load(reference)
    assert said in str(raised.value)


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".pkl"])
def test_G2_configs_are_python_only(tmp_path, suffix):
    """The project reads no YAML, so no tag or anchor can act: a config is the user's own Python file, or a name."""
    file = tmp_path / f"config{suffix}"
    file.write_text("!!python/object/apply:os.system ['touch hacked']")
    with pytest.raises(NeuronetError, match=r"path to a \.py file"):
        load(str(file))


def test_G3_unset_variable_and_missing_path(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_STORE", raising=False)
    monkeypatch.setenv("SOME_STORE", str(tmp_path))
    assert load("tissue", ["--config.data.store=$SOME_STORE"]).data.store == str(tmp_path)
    with pytest.raises(NeuronetError, match="variable NO_SUCH_STORE is not set"):
        load("tissue", ["--config.data.store=${NO_SUCH_STORE}/store"])
    with pytest.raises(NeuronetError, match="no folder"):
        load("tissue", [f"--config.data.store={tmp_path}/missing"])
    assert load("tissue", ["--config.data.store=gs://bucket/store"]).data.store == "gs://bucket/store"


def test_G3_settings_are_checked_before_devices():
    """A config loads, and fails, without JAX, so no device can have been allocated."""
    program = (
        "import sys; from experiments.flags import load; load('all_targets:demo'); "
        "sys.exit('jax was imported' if 'jax' in sys.modules else 0)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=PATIENCE_S)


def test_G4_credentials_are_refused_and_not_echoed():
    with pytest.raises(NeuronetError, match="credentials") as raised:
        load("tissue", ["--config.data.store=s3://key:hunter2@bucket/store"])
    assert "hunter2" not in str(raised.value)
    with pytest.raises(NeuronetError, match="no such field"):  # there is no field where a token could go
        load("tissue", ["--config.wandb_key=hunter2"])


def test_configs_are_complete_and_locked():
    settings = flags._builder("all_targets")("")
    assert isinstance(settings, ConfigDict)
    assert settings.is_locked
    with pytest.raises(KeyError):
        settings.update({"optimizer": {"momentum": 0.9}})
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(settings.to_dict()) == fields - {"name"}
    assert json.loads(json.dumps(settings.to_dict())) is not None  # plain data


if __name__ == "__main__":
    for reference in REFERENCES:
        _golden(reference).write_text(load(reference).to_json() + "\n")
