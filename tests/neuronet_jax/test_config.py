"""The frozen settings: what they refuse, and their way through JSON."""

import dataclasses
import json

import pytest

from experiments.flags import load
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError


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
        ({"data__stores": ""}, "config.data has no field 'stores'"),
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
        ({"loss": {"cross_entropy": 0, "dice": 0}}, "positive in one of its weights"),
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
def test_saved_config_that_is_no_config(text):
    with pytest.raises(NeuronetError, match="saved config"):
        Config.from_json(text)


def test_missing_field_is_named(config):
    fields = json.loads(config.to_json())
    del fields["optimizer"]["epsilon"]
    with pytest.raises(NeuronetError, match=r"config\.optimizer lacks the field 'epsilon'"):
        Config.from_json(json.dumps(fields))


def test_replace_is_checked(config):
    with pytest.raises(NeuronetError, match="batch"):
        dataclasses.replace(config, batch=0)
