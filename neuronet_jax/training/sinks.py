"""Services beside the run's own files that take its metrics: Weights & Biases and MLflow.

They get numbers by name and nothing else: no config, no path, no host, no code, no subject. Credentials and addresses
come from each service's own variables (WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI, …).
"""

import importlib
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from neuronet_jax.errors import NeuronetError

PROJECT = "neuronet-jax"  # of W&B; experiment of MLflow


class Sink(Protocol):
    """A service that takes metrics."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _WandB:
    def __init__(self, folder: str):
        wandb: Any = importlib.import_module("wandb")
        # All that it would collect by itself is switched off: the machine, its user and host, git, code, the console.
        private = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            host="",
            program="",
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(project=PROJECT, dir=folder, settings=private)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """By the client alone: `mlflow.start_run` would add the user, the script's path and the commit as tags."""

    def __init__(self, folder: str):
        mlflow: Any = importlib.import_module("mlflow")
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        identity = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        self._run = self._client.create_run(identity).info.run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._run, [self._metric(name, value, now_ms, step) for name, value in numbers.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


_KINDS: dict[str, Callable[[str], Sink]] = {"wandb": _WandB, "mlflow": _MLflow}


def require_sinks(names: tuple[str, ...]) -> None:
    """Raises NeuronetError if the package of a sink is missing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # W&B's own folder `wandb/` looks like an empty package
            raise NeuronetError(
                f"config.sinks names {name!r}, which is not installed: pip install 'neuronet-jax[{name}]'"
            )


def open_sink(name: str, folder: str) -> Sink:
    """Opens a sink, which may keep files of its own in `folder`."""
    return _KINDS[name](folder)
