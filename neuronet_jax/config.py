"""The settings of a run as frozen dataclasses: complete, typed, checked once, saved as JSON with every checkpoint.

`experiments/configs` fills them; only `experiments` knows ml-collections. To add a setting, add the field, raise
SCHEMA, and enter in ADDED the value that keeps the behaviour of older runs. Their files then open as before.
"""

import copy
import dataclasses
import inspect
import json
import math
import types
import typing
from typing import Any, Self

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS

GROUPS = 8  # of channels with model.norm="group": two channels each at full resolution
_MOST_FILTERS, _MOST_SCALES = 2**14, 12  # a scale halves the grid: 12 need sides of 2,048 voxels
# No whole number of a config comes near this one. A larger one is damage, and must not become the shape of an array.
_LARGEST = 10**12
SCHEMA = 5  # of saved configs; raised with every added field
# Per schema, the fields that it added, as "group.field", and the value that keeps the behaviour of older runs.
ADDED: dict[int, dict[str, Any]] = {
    2: {"loss.class_balance": 0.0, "loss.consistency": 0.0},
    3: {"optimizer.spike_factor": 0.0, "profile_steps": "", "sinks": ()},
    4: {
        "data.stores": (),
        "data.weights": (),
        "augment.elastic": 0.0,
        "augment.resolution": 0.0,
        "augment.any_contrast": 0.0,
        "model.norm": "batch",
        "optimizer.base_batch": 0,
        "accumulate": 1,
    },
    5: {"augment.artefacts": 0.0},
}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    store: str  # path, gs:// or s3:// of a finished store, without credentials; empty: the demo cohort
    crop: tuple[int, int, int]  # voxels along x, y, z; multiples of 8 (three stride-2 scales)
    foreground_fraction: float  # share of crops centred on a labelled voxel, the rest uniform
    workers: int  # reader processes; 0 reads in threads of the main process
    read_threads: int  # concurrent reads per process
    prefetch: int  # batches kept ready
    stores: tuple[str, ...]  # further stores to train on, such as one of `data_prep.heads`; validation is on `store`
    weights: tuple[float, ...]  # shares of the crops from `store` and from each of `stores`; empty: equal shares


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    flip: bool  # mirror left-right, swapping partner labels
    intensity: float  # strength of contrast, brightness, bias field and noise changes; 0 is none
    spatial: float  # strength of rotation, scaling and shear; 0 is none
    elastic: float  # strength of smooth deformation; 0 is none
    resolution: float  # strength of blur along each axis: thick slices, partial volume; 0 is none
    any_contrast: float  # share of painted heads whose tissues take any brightness; the others are T1-like
    artefacts: float  # share of crops with each of: motion, ghosts, a spike, thick slices, no face, a cut field of view


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    family: str  # "reference": the published network exactly; "neuronet": ours
    filters: tuple[int, ...]  # channels per scale, finest first; each scale halves the grid
    compute_dtype: str  # "float32", "bfloat16" or "auto" (bfloat16 on GPU and TPU); parameters, moments, loss: float32
    norm: str  # "batch", over the crops of all devices; "group" (eight groups of channels) or "instance", of one crop

    @property
    def stride(self) -> int:
        """Voxels of the image along one voxel of the coarsest features: sides must be multiples of it."""
        return 2 ** (len(self.filters) - 1)

    def on(self, platform: str) -> "ModelConfig":
        """Returns these settings with the dtype "auto" decided for a platform as JAX names it.

        It is bfloat16 where the hardware multiplies it natively (GPU, TPU), float32 on a CPU.
        """
        decided = "float32" if platform == "cpu" else "bfloat16"
        return dataclasses.replace(self, compute_dtype=decided) if self.compute_dtype == "auto" else self


@dataclasses.dataclass(frozen=True)
class LossConfig:
    cross_entropy: float  # weight of the mean voxel cross-entropy of a protocol
    dice: float  # weight of 1 − mean soft Dice of a protocol
    # Cross-entropy weighs a voxel by n^−class_balance, n being the voxels of its class in the batch. With 0 all voxels
    # count alike, with 1 all classes.
    class_balance: float
    # Weight of the Jensen–Shannon divergence between malp_em_tissue and the tissues that malp_em implies, where a
    # subject has both. 0: none.
    consistency: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float  # peak
    schedule: str  # "constant" or "cosine" (linear warm-up, cosine to zero)
    warmup_steps: int  # steps until the learning rate is at its peak
    epsilon: float  # of Adam, added to the root of the second moment
    weight_decay: float  # decoupled (AdamW); 0 is plain Adam
    clip_norm: float  # global gradient norm; 0 is no clipping
    ema_decay: float  # decay of the averaged weights used for evaluation; 0 is none
    spike_factor: float  # updates whose gradient norm exceeds this multiple of its average are skipped; 0 skips none
    base_batch: int  # the batch that learning_rate is for: others multiply it by √(batch / base_batch); 0: none do


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    space: int  # devices that share one volume; the rest of the devices is the data axis


@dataclasses.dataclass(frozen=True)
class Config:
    name: str  # of the config, with its variant
    protocols: tuple[str, ...]  # label maps to learn, in the order of the network's outputs
    data: DataConfig
    augment: AugmentConfig
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    mesh: MeshConfig
    batch: int  # crops per step over all devices and hosts
    accumulate: int  # parts of a batch that are computed one after the other, for batches that do not fit into memory
    steps: int  # updates of the weights, over all restarts
    seed: int  # of weights, crops and augmentation
    log_every: int  # steps between lines of metrics
    evaluate_every: int  # steps between validation Dice
    evaluate_subjects: int  # validation subjects scored during training; 0 is all
    checkpoint_every: int  # steps between checkpoints
    keep_checkpoints: int  # latest ones kept, beside the best
    profile_steps: str  # "first,last": the steps that a profile is made of; empty: none
    sinks: tuple[str, ...]  # services that get the metrics too: "wandb", "mlflow"

    def __post_init__(self) -> None:
        check(self)

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last step of the profile; None without one."""
        if not self.profile_steps:
            return None
        first, last = map(int, self.profile_steps.split(","))
        return first, last

    def to_fields(self) -> dict[str, Any]:
        """Returns the settings as saved: nested dicts, with the schema."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_fields(), indent=2)

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Reads settings saved by `to_fields`, of this version or an older one.

        Raises NeuronetError for a newer schema, and if a field is missing, unknown, of the wrong type or out of range.
        """
        if not isinstance(fields, dict):
            raise NeuronetError(f"the saved config must be a JSON object, got {fields!r:.80}")
        schema = fields.get("schema", 1)  # version 0.1.0 did not write it
        return from_dict(cls, upgrade({name: fields[name] for name in fields if name != "schema"}, schema))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads settings from the text of a file; otherwise as `from_fields`."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise NeuronetError(f"the saved config is not JSON: {error}") from error
        return cls.from_fields(fields)


def meanings(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Returns what every field means, by its dotted name: the comment beside it, or above it, in this file."""
    found: dict[str, str] = {}
    above: list[str] = []
    hints = typing.get_type_hints(cls)
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.strip().partition("# ")
        name = code.partition(":")[0]
        if not code:
            above.append(comment)
        elif name in hints and code.startswith(f"{name}:"):
            if dataclasses.is_dataclass(hints[name]):
                found |= meanings(typing.cast(type, hints[name]), f"{prefix}{name}.")
            else:
                found[prefix + name] = comment or " ".join(above)
            above = []
        else:
            above = []
    return found


def upgrade(fields: dict[str, Any], schema: int) -> dict[str, Any]:
    """Returns the fields of a config saved with `schema`, in the form of this version.

    Fields added since get the value in ADDED. Raises NeuronetError for a newer schema.
    """
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise NeuronetError(
            f"the saved config has schema {schema!r}, this version reads up to {SCHEMA}: update neuronet-jax"
        )
    upgraded = copy.deepcopy(fields)
    for added in range(schema + 1, SCHEMA + 1):
        for path, value in ADDED[added].items():
            *groups, name = path.split(".")
            group = upgraded
            for key in groups:
                group = group.setdefault(key, {})
                if not isinstance(group, dict):
                    raise NeuronetError(f"config.{key} takes a group of fields, got {group!r:.80}")
            group.setdefault(name, value)
    return upgraded


def from_dict(cls: type, fields: dict[str, Any], path: str = "config") -> Any:
    """Builds the dataclass `cls` from plain nested dicts, refusing missing and unknown keys and wrong types."""
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(fields) - set(hints)):
        raise NeuronetError(f"{path} has no field {unknown[0]!r}; its fields are {', '.join(hints)}")
    if missing := sorted(set(hints) - set(fields)):
        raise NeuronetError(f"{path} lacks the field {missing[0]!r}")
    return cls(**{name: _convert(hint, fields[name], f"{path}.{name}") for name, hint in hints.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise NeuronetError(f"{path} takes a group of fields, got {value!r:.80}")
        return from_dict(typing.cast(type, hint), value, path)
    if isinstance(hint, types.GenericAlias):  # tuple[int, int, int] or tuple[str, ...]
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or (items[-1] is not ... and len(value) != len(items)):
            raise NeuronetError(f"{path} takes {hint}, got {value!r:.80}")
        return tuple(_convert(items[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf  # which no field takes
    if type(value) is not hint:
        raise NeuronetError(f"{path} takes {hint.__name__}, got {value!r:.80}")
    return value


def check(config: Config) -> None:
    """Raises NeuronetError on values that cannot train, before any device is touched."""

    def require(holds: bool, path: str, value: Any, rule: str) -> None:
        if not holds:
            raise NeuronetError(f"config.{path} must be {rule}, got {value!r}")

    def among(path: str, value: str, *choices: str) -> None:
        require(value in choices, path, value, " or ".join(choices))

    for path, value in flatten(dataclasses.asdict(config)).items():
        if isinstance(value, (int, float)):
            require(0 <= value < math.inf, path, value, "finite and not negative")
            require(type(value) is float or value <= _LARGEST, path, value, f"at most {_LARGEST:,}")
    weights = config.data.weights
    require(
        not weights or (len(weights) == 1 + len(config.data.stores) and min(weights) >= 0 < sum(weights)),
        "data.weights",
        weights,
        f"empty, or {1 + len(config.data.stores)} numbers: for data.store and each of data.stores",
    )
    require(config.augment.any_contrast <= 1, "augment.any_contrast", config.augment.any_contrast, "in [0, 1]")
    require(config.augment.artefacts <= 1, "augment.artefacts", config.augment.artefacts, "in [0, 1]")
    for path in ("batch", "accumulate", "steps", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
        require(getattr(config, path) >= 1, path, getattr(config, path), "at least 1")

    require(
        not config.profile_steps or _is_interval(config.profile_steps),
        "profile_steps",
        config.profile_steps,
        'empty or two steps such as "10,13", the first not after the last',
    )
    for sink in config.sinks:
        among("sinks", sink, "wandb", "mlflow")

    require(
        config.batch % config.accumulate == 0, "accumulate", config.accumulate, f"a divisor of batch={config.batch}"
    )

    names = config.protocols
    require(len(names) > 0 and len(set(names)) == len(names), "protocols", names, "one protocol or more, each once")
    for name in names:
        among("protocols", name, *PROTOCOLS)

    data, model, loss, optimizer = config.data, config.model, config.loss, config.optimizer
    secretive = "free of credentials (user:password@); they belong in the environment"
    require("@" not in data.store, "data.store", "***", secretive)
    for index, store in enumerate(data.stores):
        require("@" not in store, f"data.stores[{index}]", "***", secretive)
    require(data.foreground_fraction <= 1, "data.foreground_fraction", data.foreground_fraction, "in [0, 1]")
    require(data.read_threads >= 1, "data.read_threads", data.read_threads, "at least 1")
    require(data.prefetch >= 1, "data.prefetch", data.prefetch, "at least 1")

    among("model.family", model.family, "reference", "neuronet")
    among("model.norm", model.norm, "batch", "group", "instance")
    require(
        model.norm == "batch" or model.family == "neuronet",
        "model.norm",
        model.norm,
        '"batch" with model.family="reference", whose decoders are folded through it',
    )
    require(
        model.norm != "group" or all(filters % GROUPS == 0 for filters in model.filters),
        "model.filters",
        model.filters,
        f'multiples of {GROUPS} with model.norm="group"',
    )
    among("model.compute_dtype", model.compute_dtype, "auto", "float32", "bfloat16")
    require(
        len(model.filters) > 0 and 0 < min(model.filters) <= max(model.filters) <= _MOST_FILTERS,
        "model.filters",
        model.filters,
        f"positive channels per scale, at most {_MOST_FILTERS}",
    )
    require(len(model.filters) <= _MOST_SCALES, "model.filters", model.filters, f"at most {_MOST_SCALES} scales")
    stride = model.stride
    for side in data.crop:
        legal = (
            f"positive multiples of {stride}; the nearest legal side is {max(stride, round(side / stride) * stride)}"
        )
        require(side > 0 and side % stride == 0, "data.crop", data.crop, legal)

    require(loss.cross_entropy + loss.dice > 0, "loss", loss, "positive in cross_entropy or dice")
    require(
        loss.class_balance == 0 or loss.cross_entropy > 0,
        "loss.class_balance",
        loss.class_balance,
        "0 without loss.cross_entropy, whose voxels it weighs",
    )
    require(
        loss.consistency == 0 or {"malp_em", "malp_em_tissue"} <= set(names),
        "loss.consistency",
        loss.consistency,
        "0 unless both malp_em and malp_em_tissue are among the protocols, which it compares",
    )
    among("optimizer.schedule", optimizer.schedule, "constant", "cosine")
    require(optimizer.ema_decay < 1, "optimizer.ema_decay", optimizer.ema_decay, "below 1")
    require(
        optimizer.spike_factor == 0 or optimizer.spike_factor > 1,
        "optimizer.spike_factor",
        optimizer.spike_factor,
        "0 or above 1",
    )
    require(config.mesh.space >= 1, "mesh.space", config.mesh.space, "at least 1")


def _is_interval(text: str) -> bool:
    """Tells whether `text` is two whole numbers from 1 on, such as "10,13", in order."""
    first, _, last = text.partition(",")
    digits = all(part.isascii() and part.isdecimal() and len(part) <= 12 for part in (first, last))
    return digits and 1 <= int(first) <= int(last)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested groups of settings by their dotted names, such as "data.crop"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
