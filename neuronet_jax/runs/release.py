"""A trained network as files that need no checkpoint library to read: a *release*.

    DIR/weights.safetensors    every parameter and moment by its path (`encoder/stem/kernel`), float32
        release.json           config, protocols and their label tables, voxel size, provenance, version, checksums
        quality.json           calibration of predicted Dice, if the run has one (see `calibration.py`)
        *.jax_export           exported programs, if any (see `export.py`)
        manifest.sha256        checksum of every file above; `sha256sum -c` reads it

`restore` takes a release like a run. A release has no pickle and no code in it. Sizes, checksums, names, shapes and
dtypes of a downloaded release are checked before use.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load, save

from neuronet_jax import __version__
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.network import abstract
from neuronet_jax.runs.calibration import UNKNOWN, Calibration, calibration_to_json
from neuronet_jax.runs.checksums import MANIFEST
from neuronet_jax.runs.directory import QUALITY, RELEASE
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Origin

SCHEMA = 1  # raised when a release can no longer read what an older one wrote
WEIGHTS = "weights.safetensors"
_HEADER_BYTES = 2**20  # of safetensors, at most: names, dtypes and shapes of some hundred arrays take 20 kB
_FIX = "fetch the release again"


class Program(NamedTuple):
    """One exported program of a release."""

    file: str
    shape: tuple[int, int, int] | None  # of its image; None: any sides in multiples of `multiple_of`
    multiple_of: int
    platforms: tuple[str, ...]
    content: bytes


def release(
    model: Model,
    folder: str | os.PathLike[str],
    programs: Sequence[Program] = (),
    calibration: Calibration = UNKNOWN,
) -> None:
    """Writes the model's weights, and everything else that `restore` needs, into `folder` (local, gs:// or s3://).

    `calibration` belongs to the model's run (`load_calibration`). Raises NeuronetError if the folder already holds a
    release or cannot be written.
    """
    files = Files(os.fspath(folder))
    if files.read(MANIFEST) is not None or files.read(RELEASE) is not None:
        raise NeuronetError(f"{folder} already holds a release; give a different --out")
    variables = nnx.to_flat_state(nnx.state(model.network, graph=False))
    weights = {weight_name(path): np.asarray(variable[...]) for path, variable in variables}
    contents = {WEIGHTS: save(weights), **{program.file: program.content for program in programs}}
    if calibration.heads:
        contents[QUALITY] = calibration_to_json(calibration)
    data = model.config.data  # its paths are private to the training site; the weights go with the number of stores
    data = dataclasses.replace(data, store="", stores=("",) * len(data.stores))
    config = dataclasses.replace(model.config, data=data)
    description = {
        "schema": SCHEMA,
        "version": __version__,
        "config": config.to_fields(),
        "protocols": model.config.protocols,
        "labels": {name: _label_table(name) for name in model.config.protocols},
        "voxel_size_mm": model.voxel_size_mm,
        "orientation": "RAS",
        "provenance": model.origin.to_json(),
        "programs": [{k: v for k, v in program._asdict().items() if k != "content"} for program in programs],
        "sha256": {name: _sha256(content) for name, content in contents.items()},
    }
    contents[RELEASE] = (json.dumps(description, indent=2) + "\n").encode()
    for name, content in contents.items():
        files.write(name, content)
    lines = [f"{_sha256(content)}  {name}\n" for name, content in sorted(contents.items())]
    files.write(MANIFEST, "".join(lines).encode())  # last: a release without it is unfinished


def restore_release(folder: str) -> Model:
    """Reads the model of a release. Raises NeuronetError if it is damaged, inconsistent or of a newer schema."""
    files = Files(folder)
    manifest, text = files.read(MANIFEST), files.read(RELEASE)
    if manifest is None or text is None:
        raise NeuronetError(f"the release in {folder} is incomplete: {RELEASE} or {MANIFEST} is missing; {_FIX}")
    lines = [line.partition("  ") for line in manifest.decode("ascii", "replace").splitlines()]
    listed = {name: digest for digest, _, name in lines}
    description = _described(_checked(RELEASE, text, listed))
    config = Config.from_fields(description["config"])
    settings = config.model.on(jax.local_devices()[0].platform)
    shapes = abstract(settings, config.protocols)
    structure, state = nnx.split(shapes, graph=False)
    variables = nnx.to_flat_state(state)
    weights = _weights(files, listed, sum(variable.size * variable.dtype.itemsize for _, variable in variables))
    wanted = {weight_name(path): variable for path, variable in variables}
    if different := sorted(set(weights) ^ set(wanted)):
        raise NeuronetError(f"{WEIGHTS} and {RELEASE} disagree about {len(different)} arrays, such as {different[0]!r}")
    for name, variable in wanted.items():
        if weights[name].shape != variable.shape or weights[name].dtype != variable.dtype:
            raise NeuronetError(
                f"{name} of {WEIGHTS} is {weights[name].dtype}{list(weights[name].shape)}, "
                f"the network takes {variable.dtype}{list(variable.shape)}"
            )
    filled = [(path, variable.replace(jnp.asarray(weights[weight_name(path)]))) for path, variable in variables]
    network = nnx.merge(structure, nnx.from_flat_state(filled))
    return Model(network, config, description["voxel_size_mm"], Origin.from_json(description["provenance"]))


def weight_name(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


def _weights(files: Files, listed: dict[str, str], expected_bytes: int) -> dict[str, np.ndarray]:
    content = files.read(WEIGHTS)
    if content is None:
        raise NeuronetError(f"the release lacks {WEIGHTS}; {_FIX}")
    if len(content) > expected_bytes + _HEADER_BYTES:
        raise NeuronetError(f"{WEIGHTS} has {len(content)} bytes, its network takes {expected_bytes}; {_FIX}")
    try:
        return load(_checked(WEIGHTS, content, listed))
    except SafetensorError as error:
        raise NeuronetError(f"{WEIGHTS} is not a safetensors file ({error}); {_FIX}") from error


def _described(text: bytes) -> dict[str, Any]:
    """Returns the content of release.json after checking the types of the fields that `restore_release` needs."""
    types = {"schema": int, "config": dict, "voxel_size_mm": float, "provenance": dict}
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NeuronetError(f"{RELEASE} is not JSON ({error}); {_FIX}") from error
    for name, kind in types.items():
        if not isinstance(description, dict) or type(description.get(name)) is not kind:
            raise NeuronetError(f"{RELEASE} needs the field {name!r}, of type {kind.__name__}; {_FIX}")
    if description["schema"] > SCHEMA:
        raise NeuronetError(
            f"the release has schema {description['schema']}, this version reads up to {SCHEMA}: update neuronet-jax"
        )
    if not 0 < description["voxel_size_mm"] < float("inf"):
        raise NeuronetError(f"voxel_size_mm of {RELEASE} must be positive, got {description['voxel_size_mm']}; {_FIX}")
    return description


def _checked(name: str, content: bytes, listed: dict[str, str]) -> bytes:
    if listed.get(name) != _sha256(content):
        raise NeuronetError(f"{name} does not have its checksum in {MANIFEST}: it is damaged or was changed; {_FIX}")
    return content


def _label_table(protocol: str) -> list[dict[str, Any]]:
    """Returns one row per class, in class order: the meaning of the programs' ids."""
    return [dataclasses.asdict(structure) for structure in PROTOCOLS[protocol].structures]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
