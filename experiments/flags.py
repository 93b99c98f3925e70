"""`--config=NAME[:VARIANT]` and `--config.FIELD=VALUE`, turned into one checked `Config` before any device is touched.

A program takes its own options with `programs.Parser(settings=True)` and gives `overrides` to `load`.
"""

import ast
import difflib
import os
import re
import runpy
import textwrap
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from neuronet_jax.config import Config, flatten, from_dict, meanings
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.programs import SETTING

_FOLDER = Path(__file__).parent / "configs"
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem not in ("__init__", "common")))


def load(reference: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the settings `reference` (a name among NAMES or a path to a .py file, then an optional `:variant`).

    `overrides` are command line arguments, `--config.FIELD=VALUE` or `--config.FIELD VALUE`; the last one wins.
    Raises UsageError for an unknown name, variant, field or argument and for a value of the wrong type; NeuronetError
    for a value out of range and for a store that refers to an unset variable or does not exist.
    """
    path, _, variant = reference.partition(":")
    try:
        settings = _builder(path)(variant)
    except ValueError as error:
        raise UsageError(f"--config={reference}: {error}") from error
    for field, text in _pairs(overrides):
        _override(settings, field, text)
    data = settings.to_dict()["data"]
    store, stores = _expand("data.store", data["store"]), tuple(_expand("data.stores", s) for s in data["stores"])
    if store and "://" not in store and not os.path.isdir(store):
        raise NeuronetError(
            f"config.data.store: there is no folder {store!r}; give the --store of a finished data_prep.build"
        )
    settings.update({"data": {"store": store, "stores": stores}})
    return to_config(settings, f"{Path(path).stem}:{variant}" if variant else Path(path).stem)


def described() -> str:
    """Returns a list of all fields for `--help`, with the value in `all_targets` and the meaning of each."""
    values = flatten(_builder("all_targets")("").to_dict())
    lines = ["settings (the values are those of all_targets):"]
    for field, meaning in meanings().items():
        if field in values:  # the name is no setting
            value = values[field]
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.append(f"  {SETTING}{field}={str(text).lower() if isinstance(value, bool) else text}")
            lines += textwrap.wrap(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def to_config(settings: ConfigDict, name: str) -> Config:
    """Returns `settings` as the frozen, checked dataclass that the library takes."""
    return from_dict(Config, {"name": name, **settings.to_dict()})


def _builder(path: str) -> Callable[[str], ConfigDict]:
    """Returns the `get_config` of a named config or of the user's own file."""
    file = _FOLDER / f"{path}.py" if path in NAMES else Path(path)
    if file.suffix != ".py" or not file.is_file():
        hint = _nearest(path, NAMES)
        raise UsageError(f"--config takes one of {', '.join(NAMES)} or a path to a .py file, got {path!r}{hint}")
    names = runpy.run_path(str(file))
    if "get_config" not in names:
        raise NeuronetError(f"--config={path}: the file must define get_config(variant)")
    return names["get_config"]


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Returns `--config.a=1 --config.b 2` as [("a", "1"), ("b", "2")]."""
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.partition("=")
        if not key.startswith(SETTING):
            raise UsageError(f"unknown argument {argument!r}; settings are changed with --config.FIELD=VALUE")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"{key} needs a value: {key}=VALUE")
            text = rest.pop(0)
        pairs.append((key.removeprefix(SETTING), text))
    return pairs


def _override(settings: ConfigDict, field: str, text: str) -> None:
    fields = flatten(settings.to_dict())
    if field not in fields:
        raise UsageError(f"--config.{field}: there is no such field{_nearest(field, tuple(fields))}")
    settings.update_from_flattened_dict({field: _parse(field, fields[field], text)})


def _parse(field: str, default: Any, text: str) -> Any:
    """Parses `text` as a value of the type of `default`."""
    kind = type(default)
    if kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            return _parse_tuple(field, text)
        return kind(text)
    except (ValueError, KeyError, SyntaxError):
        example = default or "1,2"
        takes = {bool: "true or false", int: "a whole number", float: "a number", tuple: f"values like {example}"}
        raise UsageError(f"--config.{field} takes {takes[kind]}, got {text!r}") from None


def _parse_tuple(field: str, text: str) -> tuple:
    """Parses `64,64,64`, `(64, 64, 64)` or `[64, 64, 64]`, and words such as `fsl_fast,malp_em`, with or without
    quotes.
    """
    if _items(field) is str:
        return tuple(word.strip(" '\"") for word in text.strip("()[]").split(",") if word.strip(" '\""))
    value = ast.literal_eval(text)
    if field == "data.crop" and isinstance(value, int):
        return (value,) * 3  # one number is a cube
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _items(field: str) -> Any:
    """Returns the type of the items of a field that is a tuple."""
    kind: Any = Config
    for name in field.split("."):
        kind = typing.get_type_hints(kind)[name]
    return typing.get_args(kind)[0]


def _expand(field: str, store: str) -> str:
    """Returns `store` with ~ and variables expanded. Raises NeuronetError for an unset variable."""
    path = os.path.expanduser(os.path.expandvars(store))
    if unset := re.search(r"\$\{?(\w+)", path):
        raise NeuronetError(f"config.{field} is {store!r}, but the variable {unset[1]} is not set")
    return path


def _nearest(word: str, words: Sequence[str]) -> str:
    """Returns a hint with the nearest of `words`, compared whole first, then by the last part (`learning_rate`)."""
    near = difflib.get_close_matches(word, words, 1)
    if not near:
        last = {name.rpartition(".")[2]: name for name in words}
        near = [last[match] for match in difflib.get_close_matches(word.rpartition(".")[2], last, 1)]
    return f"; did you mean {near[0]!r}?" if near else ""
