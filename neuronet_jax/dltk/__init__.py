"""Weights of the published TensorFlow implementation: their names, and the import of its SavedModels as runs.

`variable_paths` maps each parameter and moment of our `reference` network to the name of the same published variable.
`import_run` turns a SavedModel, as published by the authors, into a run that `restore` accepts.

The published networks see a head in a different orientation. Their reader (`reader.py` of the DLTK model zoo) takes
SimpleITK's array, whose axes are those of the file in reverse, [z y x], and UK Biobank's files follow FSL in running
from right to left. So their axes point to superior, anterior, left; ours point to right, anterior, superior. Every
operation of the network treats all axes alike, and both directions of an axis alike (on even sides). Turned kernels
therefore do the same for a turned head, and `turned` turns them.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from neuronet_jax.config import AugmentConfig, Config, DataConfig, LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from neuronet_jax.dltk import tensorbundle
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS, TASKS
from neuronet_jax.models.network import Network, build
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.provenance import Imported, TrainingData

AXES = "SAL"  # directions of the axes of the authors' arrays, see above
_LINEAR = np.array([0.25, 0.75, 0.75, 0.25])  # the fixed upsampling per axis, stored as a variable there
_TRAINING_ONLY = ("global_step", "beta1_power", "beta2_power")  # and Adam's moments, by the suffix of their names


def import_run(saved_model: Path, run: str, name: str | None = None, axes: str = AXES) -> Config:
    """Writes the run directory `run` (local or gs://) from a published SavedModel and returns its config.

    `name` is one of the `TASKS`, needed where two have the same classes (`fsl_fast`, `spm_tissue`). `axes` gives the
    directions of the axes of the training arrays. The grid is UK Biobank's, 1 mm. Raises NeuronetError if the files are
    damaged, are not a published network or not that variant, or if `run` is in use.
    """
    prefix = saved_model / "variables" / "variables"
    variables = tensorbundle.read(prefix)
    step = int(variables.get("global_step", np.int64(0)))
    variables = turned(_of_the_network(variables), axes)
    config = _config(variant(variables, name))
    network = build(config.model, config.protocols, config.seed)
    load_variables(network, variables)
    _, params, moments = nnx.split(network, nnx.Param, nnx.BatchStat, graph=False)

    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(prefix.parent.glob("variables.*"))}
    imported = Imported("TensorFlow SavedModel", axes.upper(), hashes)
    index = hashes["variables.index"][:12]  # it holds the checksums of all data, so it identifies them
    note = (
        f"weights of the published {config.name} network, imported from TensorFlow; variables.index has sha256 {index}…"
    )
    folder, in_use = RunDirectory(run), f"{run} already holds a run; give a different --out"
    if folder.config() is not None or folder.training_data() is not None:
        raise NeuronetError(in_use)
    with Checkpoints(run) as checkpoints:
        if checkpoints.latest() is not None:
            raise NeuronetError(in_use)
        checkpoints.save(step, {"params": params, "moments": moments}, None, config)
    folder.describe(config, TrainingData(config.protocols, voxel_size_mm=1.0, note=note, imported=imported))
    return config


def turned(variables: Mapping[str, np.ndarray], axes: str) -> dict[str, np.ndarray]:
    """Returns kernels [i j k c f] for RAS+ arrays, from a network whose axes pointed to `axes` (such as SAL)."""
    letters = axes.upper()
    found = [next((i for i, letter in enumerate(letters) if letter in pair), -1) for pair in ("RL", "AP", "SI")]
    if sorted(found) != [0, 1, 2] or len(letters) != 3:
        raise NeuronetError(f"axes are one letter each of R or L, A or P, S or I, such as {AXES}; got {axes!r}")
    flipped = tuple(ours for ours, theirs in enumerate(found) if letters[theirs] in "LPI")
    return {
        name: np.flip(value.transpose(*found, 3, 4), flipped) if value.ndim == 5 else value
        for name, value in variables.items()
    }


def _of_the_network(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops variables that only training needs, and checks and drops the fixed upsampling."""
    kept = {}
    for name, value in variables.items():
        if name.endswith("/linear_up_kernel"):
            cube = np.einsum("i,j,k->ijk", _LINEAR, _LINEAR, _LINEAR)[..., None, None] * np.eye(value.shape[-1])
            if value.shape != cube.shape or not np.allclose(value, cube, rtol=0, atol=1e-6):
                raise NeuronetError(f"{name} is not the fixed linear upsampling: this network is not NeuroNet")
        elif name not in _TRAINING_ONLY and not name.endswith(("/Adam", "/Adam_1")):
            kept[name] = value
    return kept


def variant(variables: Mapping[str, np.ndarray], name: str | None) -> str:
    """Returns the one of the `TASKS` that has the class counts of these tails; `name` decides between several.

    Raises NeuronetError if none fits, if `name` does not fit, or if several fit and there is no `name`.
    """
    counts = []
    while (last := variables.get(f"tail_{len(counts)}/last/conv3d/kernel")) is not None:
        counts.append(last.shape[-1])
    fitting = [
        variant
        for variant, protocols in TASKS.items()
        if [PROTOCOLS[protocol].num_classes for protocol in protocols] == counts
    ]
    if not fitting:
        raise NeuronetError(f"no published NeuroNet has tails of {counts or 'no'} classes: is this a NeuroNet?")
    if name is None and len(fitting) > 1:
        raise NeuronetError(f"tails of {counts} classes are those of {' and '.join(fitting)}: say which by --config")
    if name is not None and name not in fitting:
        raise NeuronetError(f"tails of {counts} classes are those of {' or '.join(fitting)}, not of {name!r}")
    return name or fitting[0]


def _config(name: str) -> Config:
    """Returns the published training settings, as far as our config can express them."""
    return Config(
        name=name,
        protocols=TASKS[name],
        data=DataConfig(
            "", (128, 128, 128), foreground_fraction=0.0, workers=0, read_threads=1, prefetch=1, stores=(), weights=()
        ),
        augment=AugmentConfig(
            flip=False, intensity=0.0, spatial=0.0, elastic=0.0, resolution=0.0, any_contrast=0.0, artefacts=0.0
        ),
        # bfloat16 was never tried on these weights
        model=ModelConfig("reference", (16, 32, 64, 128), "float32", "batch"),
        loss=LossConfig(cross_entropy=1.0, dice=0.0, class_balance=0.0, consistency=0.0),
        optimizer=OptimizerConfig(
            1e-3, "constant", 0, 1e-5, weight_decay=0, clip_norm=0, ema_decay=0, spike_factor=0, base_batch=0
        ),
        mesh=MeshConfig(space=1),
        batch=1,
        accumulate=1,
        steps=100_000,
        seed=0,
        log_every=50,
        evaluate_every=2_000,
        evaluate_subjects=0,
        checkpoint_every=1_000,
        keep_checkpoints=1,
        profile_steps="",
        sinks=(),
    )


def variable_paths(network: Network) -> dict[tuple[str | int, ...], str]:
    """Returns {path in our network: published name} for all parameters and moments of a `reference` network."""
    paths: dict[tuple[str | int, ...], str] = {("encoder", "stem", "kernel"): "conv3d/kernel"}
    for index in range(len(network.encoder.units)):
        scale, unit = divmod(index, 2)
        theirs = f"encoder/unit_{scale + 1}_{unit}"
        for sub in (0, 1):
            ours = ("encoder", "units", index)
            paths[*ours, f"conv{sub}", "kernel"] = f"{theirs}/sub_unit{sub}/conv3d/kernel"
            paths |= _norm((*ours, f"norm{sub}"), f"{theirs}/sub_unit{sub}/batch_normalization")
    for tail, protocol in enumerate(network.protocols):
        ours, theirs = ("decoders", "protocols", protocol), f"tail_{tail}"
        coarsest = len(network.decoders.protocols[protocol].projections) - 1
        for scale in range(coarsest):
            paths[*ours, "projections", scale] = f"{theirs}/upscore_{scale}/conv3d/kernel"
            paths |= _norm((*ours, "norms", scale), f"{theirs}/upscore_{scale}/batch_normalization")
        paths[*ours, "projections", coarsest] = f"{theirs}/upscore_{coarsest - 1}/filter_conversion/kernel"
        paths[*ours, "last"] = f"{theirs}/last/conv3d/kernel"
    return paths


def load_variables(network: Network, variables: Mapping[str, np.ndarray]) -> None:
    """Sets every parameter and moment of a `reference` network from the published variables.

    Raises NeuronetError if a variable is missing, left over, or of a different shape.
    """
    paths = variable_paths(network)
    if left_over := sorted(set(variables) - set(paths.values())):
        raise NeuronetError(f"the network has no place for {len(left_over)} variables, {left_over[0]!r} among them")
    state = nnx.state(network, graph=False)
    flat = dict(nnx.to_flat_state(state))
    if unmapped := set(flat) - set(paths):
        raise NeuronetError(
            f"no published variable is known for {sorted(map(str, unmapped))[0]}: is the family `reference`?"
        )
    for path, name in paths.items():
        if name not in variables:
            raise NeuronetError(f"the published variables lack {name!r}: they are not those of {network.protocols}")
        ours, theirs = flat[path], np.asarray(variables[name], np.float32)
        if theirs.shape[:3] == (1, 1, 1) and theirs.ndim == 5:
            theirs = theirs[0, 0, 0]  # 1³ convolutions are matrices here
        if ours.shape != theirs.shape:
            raise NeuronetError(f"{name} has shape {theirs.shape}, the network takes {ours.shape}")
        flat[path] = ours.replace(jnp.asarray(theirs))
    nnx.update(network, nnx.from_flat_state(list(flat.items())))


def _norm(ours: tuple[str | int, ...], theirs: str) -> dict[tuple[str | int, ...], str]:
    names = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
    return {(*ours, here): f"{theirs}/{there}" for here, there in names.items()}
