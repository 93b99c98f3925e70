"""The folder of a run: the names of its files, its description, and the claim of a training to it.

    WORKDIR/config.json          settings; the last file written when a run begins
            training_data.json   the data that it is trained on (older runs: store.json, a copy of the store's)
            checkpoints/         see `checkpoint.py`
            metrics.jsonl        one line per report, see `training/monitor.py`
            skipped.jsonl        one line per skipped update, see `training/skips.py`
            tensorboard/         the same for TensorBoard, and pictures
            profile/             of some steps, where the config asks for it, see `training/profile.py`
            quality.json         calibration of predicted Dice, see `calibration.py`
            run.lease            while the run trains: the process that owns it

A release (see `release.py`) holds `release.json` instead of the first three.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from neuronet_jax.config import Config, flatten
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import MOST_BYTES, Files
from neuronet_jax.lease import lease
from neuronet_jax.runs.provenance import Imported, TrainingData
from neuronet_jax.runtime import gathered
from neuronet_jax.store.schema import StoreInfo

CONFIG, TRAINING_DATA, CHECKPOINTS = "config.json", "training_data.json", "checkpoints"
METRICS, TENSORBOARD, QUALITY, RELEASE = "metrics.jsonl", "tensorboard", "quality.json", "release.json"
SKIPPED, PROFILE = "skipped.jsonl", "profile"
LEASE = "run.lease"
SHIPPED = Path(__file__).parents[1] / "pretrained"  # a release inside the package
_STORE = "store.json"  # of version 0.1.0

# Settings that may change within a run: its length (the schedule stretches to it), how data are read, logged and kept,
# and what guards it.
_FREE = (
    *("steps", "data.store", "data.workers", "data.read_threads", "data.prefetch", "mesh."),
    *("log_every", "keep_", "evaluate_", "checkpoint_"),
    *("profile_steps", "sinks"),
    "optimizer.spike_factor",  # a guard, which older runs did not have
)

log = logging.getLogger(__name__)


class RunDirectory:
    """The folder of one run or release, local or in a bucket. Making one touches nothing."""

    def __init__(self, path: str | os.PathLike[str]):
        """Keeps `path` valid when the process changes its folder. Raises NeuronetError for an unsupported kind of
        place.
        """
        given = os.fspath(path)
        self.path = given if "://" in given else os.path.abspath(given)
        self.files = Files(self.path)

    @property
    def checkpoints(self) -> str:
        return f"{self.path}/{CHECKPOINTS}"

    def is_release(self) -> bool:
        return self.files.read(RELEASE, MOST_BYTES) is not None

    def config(self) -> Config | None:
        """Returns the settings of the run, or None before it begins. Raises NeuronetError if they are damaged."""
        data = self.files.read(CONFIG, MOST_BYTES)
        return None if data is None else Config.from_json(data.decode(errors="replace"))

    def training_data(self) -> TrainingData | None:
        """Returns the data that the run is trained on, or None before it begins. Raises NeuronetError if they are
        damaged.
        """
        if (data := self.files.read(TRAINING_DATA, MOST_BYTES)) is not None:
            return TrainingData.from_json(data)
        if (data := self.files.read(_STORE, MOST_BYTES)) is not None:
            return _older_training_data(StoreInfo.from_json(data))
        return None

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl in order, each with `step` and `time`."""
        return records(self.files.read(METRICS))

    @contextlib.contextmanager
    def hold(
        self, config: Config, data: TrainingData, resume: bool = False, begin: bool = False
    ) -> Iterator[Callable[[], None]]:
        """Holds the run for the duration of the block and claims it, before anything else in its folder is opened.

        Every process of the run calls it; the first one holds the lease for all. Gives a function that raises
        NeuronetError if a different process has taken the run over since. Raises NeuronetError as `claim` does and,
        naming host and time, if a live process trains this run.
        """
        with contextlib.ExitStack() as stack:
            held, refusal = None, None
            if jax.process_index() == 0:
                try:
                    held = stack.enter_context(lease(self.files, LEASE))
                except NeuronetError as error:
                    refusal = error
            if gathered(refusal is not None, "claiming the run's folder")[0]:
                raise refusal or NeuronetError(f"the first process of this run could not get {self.path}, and says why")
            self.claim(config, data, resume, begin)
            yield held.check if held else lambda: None

    def claim(self, config: Config, data: TrainingData, resume: bool = False, begin: bool = False) -> None:
        """Makes this the folder of a run with these settings, or checks that the run in it is the one to continue.

        Every process of a run calls it while the run is held. Raises NeuronetError if the folder holds a run and
        `resume` is not asked for, if it holds none to resume and `begin` does not allow that, if the run in it has
        different settings or different data, and if it is an imported network.
        """
        earlier, earlier_data = self.config(), self.training_data()
        # after reading and before writing: the processes wait for each other here
        _check_alike(config)
        if earlier_data is not None and earlier_data.imported:
            raise NeuronetError(
                f"{self.path} holds an imported network, which cannot be trained further: give a different --workdir"
            )
        if earlier is not None:
            if not resume:
                raise NeuronetError(
                    f"{self.path} holds a run already: continue it with --resume, or give a different --workdir"
                )
            if changed := changes(earlier, config):
                raise NeuronetError(f"{self.path} was trained with a different config: {'; '.join(changed)}")
            if earlier_data is not None and (changed := earlier_data.differences(data)):
                raise NeuronetError(
                    f"{self.path} was trained on different data: {'; '.join(changed)}. Continue it with its own store, "
                    "or begin a new run with a different --workdir"
                )
            return
        if resume and not begin:
            raise NeuronetError(
                f"--resume: {self.path} holds no run to continue; correct --workdir, or add --begin to begin one there"
            )
        if resume:
            log.warning("--resume --begin: %s holds no run yet, starting at step 0", self.path)
        if jax.process_index() == 0:
            self.describe(config, data)

    def describe(self, config: Config, data: TrainingData) -> None:
        """Writes the description of a run: its data, then its settings."""
        self.files.write(TRAINING_DATA, data.to_json())
        self.files.write(CONFIG, config.to_json().encode())


def shipped() -> str:
    """Returns the folder of the network that ships with the package.

    Raises NeuronetError if this installation has none.
    """
    if not (SHIPPED / RELEASE).is_file():
        raise NeuronetError(f"this installation holds no trained network ({SHIPPED} is missing): name one with --run")
    return str(SHIPPED)


def records(data: bytes | None) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl or skipped.jsonl in order, each with `step`, without broken ones."""
    lines = []
    for line in (data or b"").splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):  # a crash or a full disk cut it short
            continue
        if isinstance(content, dict) and type(content.get("step")) is int:
            lines.append(content)
    return lines


def _check_alike(config: Config) -> None:
    """Raises NeuronetError in every process whose config, code or JAX is not that of the first one."""
    ours = {"configs": config.to_json(), "code": code_sha256(), "versions of JAX": jax.__version__}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in ours.items()}
    first, *others = gathered(digests, "comparing their configs")
    for process, theirs in enumerate(others, start=1):
        if different := [name for name in ours if theirs[name] != first[name]]:
            raise NeuronetError(
                f"the processes of this run must have the same config, code and JAX as the first one, but process "
                f"{process} has different {' and '.join(different)}: start all of them with the same command, in the "
                "same installation"
            )


def code_sha256() -> str:
    """Returns a SHA-256 of the library's code: a version alone does not tell two working copies apart."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def changes(before: Config, after: Config) -> list[str]:
    """Describes the settings that differ, except those that may change within a run."""
    old, new = flatten(asdict(before)), flatten(asdict(after))
    return [f"{k} was {old[k]!r}, is {new[k]!r}" for k in old if old[k] != new[k] and not k.startswith(_FREE)]


def _older_training_data(info: StoreInfo) -> TrainingData:
    """Returns the training data of an older run, which keeps a copy of its store's description.

    An imported run has a made-up copy, of a store with 0 slots.
    """
    data = TrainingData.of_store(info).checked()
    if "imported" not in info.provenance:
        return data
    return TrainingData(
        data.protocols, data.voxel_size_mm, note=data.note, imported=Imported.from_json(info.provenance["imported"])
    )
