"""The frozen settings: their checks, and their round trip through JSON."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments.flags import load
from neuronet_jax import config as config_module
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError

GOLDEN = Path(__file__).parent / "runs" / "goldens" / "run_v1"  # by a version without schemas, see test_older_versions


@pytest.fixture(scope="module")
def config() -> Config:
    return load("all_targets:demo")


def _json(config: Config, **changes) -> str:
    fields = json.loads(config.to_json())
    for path, value in changes.items():
        *groups, name = path.split("__")
        group = fields
        for key in groups:
            group = group[key]
        group[name] = value
    return json.dumps(fields)


def test_json_round_trip_is_the_identity(config):
    assert Config.from_json(config.to_json()) == config
    assert hash(Config.from_json(config.to_json())) == hash(config)


def test_whole_numbers_are_numbers(config):
    assert Config.from_json(_json(config, loss__dice=1)).loss.dice == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 3}, "config has no field 'stepz'"),
        ({"data__storage": ""}, "config.data has no field 'storage'"),
        ({"steps": "3"}, "config.steps takes int, got '3'"),
        ({"steps": True}, "config.steps takes int, got True"),
        ({"steps": 3.0}, "config.steps takes int"),
        ({"augment__flip": 1}, "config.augment.flip takes bool"),
        ({"data": 3}, "config.data takes a group of fields"),
        ({"data__crop": [64, 64]}, "config.data.crop takes tuple"),
        ({"data__crop": [64, 64, "64"]}, "config.data.crop[2] takes int"),
        ({"data__crop": [0, 64, 64]}, "nearest legal side is 8"),
        ({"data__prefetch": 0}, "at least 1"),
        ({"data__foreground_fraction": 1.5}, "in [0, 1]"),
        ({"protocols": []}, "one protocol or more"),
        ({"protocols": ["malp_em", "malp_em"]}, "each once"),
        ({"loss__dice": float("nan")}, "config.loss.dice must be finite"),
        ({"loss__cross_entropy": 0, "loss__dice": 0}, "positive in cross_entropy or dice"),
        ({"loss__cross_entropy": 0, "loss__dice": 1, "loss__class_balance": 1}, "0 without loss.cross_entropy"),
        ({"protocols": ["malp_em"], "loss__consistency": 1}, "both malp_em and malp_em_tissue"),
        ({"seed": -1}, "config.seed must be finite and not negative"),
        ({"mesh__space": 0}, "at least 1"),
        ({"model__filters": []}, "positive channels"),
        ({"optimizer__ema_decay": 1.0}, "below 1"),
        ({"optimizer__schedule": "linear"}, "constant or cosine"),
    ],
)
def test_G1_bad_field_is_named(config, change, said):
    with pytest.raises(NeuronetError) as raised:
        Config.from_json(_json(config, **change))
    assert said in str(raised.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_a_saved_file_that_is_not_a_config(text):
    with pytest.raises(NeuronetError, match="saved config"):
        Config.from_json(text)


def test_missing_field_is_named(config):
    fields = json.loads(config.to_json())
    del fields["optimizer"]["epsilon"]
    with pytest.raises(NeuronetError, match=r"config\.optimizer lacks the field 'epsilon'"):
        Config.from_json(json.dumps(fields))


@dataclasses.dataclass(frozen=True)
class LaterLoss(config_module.LossConfig):
    focal: float  # weight of a loss that this version does not have


@dataclasses.dataclass(frozen=True)
class LaterConfig(Config):
    loss: LaterLoss  # type: ignore[assignment]
    shuffle: bool


@pytest.fixture
def later(monkeypatch):
    """Returns a later version with two more settings."""
    monkeypatch.setattr(config_module, "SCHEMA", config_module.SCHEMA + 1)
    added = {config_module.SCHEMA: {"loss.focal": 0.0, "shuffle": True}}
    monkeypatch.setattr(config_module, "ADDED", config_module.ADDED | added)


@pytest.mark.parametrize("file", ["config.json", "checkpoints/1/run/metadata", "../release_v1/release.json"])
def test_a_config_of_an_older_version_opens_with_the_defaults_of_new_fields(later, file):
    saved = json.loads((GOLDEN / file).read_text())
    opened = LaterConfig.from_fields(saved.get("config", saved))
    loss = LaterLoss(cross_entropy=1.0, dice=1.0, class_balance=0.0, consistency=0.0, focal=0.0)
    assert (opened.loss, opened.shuffle) == (loss, True)
    again = LaterConfig.from_json(dataclasses.replace(opened, shuffle=False).to_json())
    assert again.shuffle is False  # a file of the later version has its own value


def test_a_field_without_an_entry_in_ADDED_is_missing(later, monkeypatch):
    monkeypatch.setattr(config_module, "ADDED", config_module.ADDED | {config_module.SCHEMA: {"loss.focal": 0.0}})
    with pytest.raises(NeuronetError, match="config lacks the field 'shuffle'"):
        LaterConfig.from_json((GOLDEN / "config.json").read_text())


@pytest.mark.parametrize("schema", [config_module.SCHEMA + 1, "1", None])
def test_a_config_of_a_newer_version_is_refused(config, schema):
    with pytest.raises(
        NeuronetError, match=rf"schema {schema!r}, this version reads up to {config_module.SCHEMA}: update neuronet-jax"
    ):
        Config.from_json(_json(config, schema=schema))


def test_replace_is_checked(config):
    with pytest.raises(NeuronetError, match="batch"):
        dataclasses.replace(config, batch=0)
