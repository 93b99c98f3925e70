"""Weights & Biases and MLflow: real ones where they are installed, and stand-ins that note what they are given."""

import importlib.util
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.training.monitor import Monitor
from neuronet_jax.training.sinks import require_sinks


def stand_in(said: list[Any]) -> SimpleNamespace:
    """Returns a module in place of both packages. `said` gets every call."""

    def note(name: str, result: Any = None) -> Any:
        return lambda *arguments, **options: said.append((name, arguments, options)) or result

    run = SimpleNamespace(log=note("log"), finish=note("finish"))
    client = SimpleNamespace(
        get_experiment_by_name=note("get", SimpleNamespace(experiment_id="7")),
        create_run=note("create_run", SimpleNamespace(info=SimpleNamespace(run_id="r"))),
        log_batch=note("log_batch"),
        set_terminated=note("set_terminated"),
    )
    return SimpleNamespace(
        Settings=lambda **options: options,
        init=note("init", run),
        MlflowClient=lambda: client,
        entities=SimpleNamespace(Metric=lambda *values: values),
    )


def test_both_get_numbers_under_fixed_names_and_nothing_else(tmp_path, monkeypatch):
    said: list[Any] = []
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, stand_in(said))
    with Monitor(tmp_path, total_steps=10, sinks=("wandb", "mlflow")) as watch:
        watch.scalars(3, {"loss": 0.5, "gradient_norm": float("nan")})
    names = [name for name, _, _ in said]
    assert names == ["init", "get", "create_run", "log", "log_batch", "finish", "set_terminated"]
    calls = {name: (arguments, options) for name, arguments, options in said}
    assert calls["log"] == (({"loss": 0.5},), {"step": 3})  # W&B would keep a text for what is no number
    ((_, ((metric, value, _, step),)), _) = calls["log_batch"]
    assert (metric, value, step) == ("loss", 0.5, 3)
    _, options = calls["init"]
    assert set(options) == {"project", "dir", "settings"} and options["dir"] == str(tmp_path)
    assert options["settings"]["x_disable_meta"] and options["settings"]["disable_git"]
    assert calls["create_run"] == (("7",), {})  # no name, no tags


def test_D12_a_sink_that_fails_is_reported_once_and_left_alone(tmp_path, caplog, monkeypatch):
    tried: list[int] = []

    def fail(numbers: Any, step: int) -> None:
        tried.append(step)
        raise ConnectionError("no route to host")

    run = SimpleNamespace(log=fail, finish=lambda: None)
    module = SimpleNamespace(Settings=lambda **options: None, init=lambda **options: run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with caplog.at_level(logging.WARNING), Monitor(tmp_path, total_steps=10, sinks=("wandb",)) as watch:
        for step in range(1, 6):
            watch.scalars(step, {"loss": 1.0})
    assert caplog.messages == ["wandb cannot be written; training continues without it: no route to host"]
    assert tried == [1]
    assert [line["step"] for line in RunDirectory(tmp_path).metrics()] == [1, 2, 3, 4, 5]


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # which W&B itself makes where it is used, and which looks like an empty package
    monkeypatch.syspath_prepend(str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None) if name == "wandb" else find(name)
    )
    with pytest.raises(NeuronetError, match=r"'wandb', which is not installed: pip install 'neuronet-jax\[wandb\]'"):
        require_sinks(("wandb",))
    require_sinks(())


@pytest.mark.filterwarnings("default")
def test_the_real_wandb_keeps_numbers_alone_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Monitor(tmp_path, total_steps=10, sinks=("wandb",)) as watch:
        watch.scalars(3, {"loss": 0.515625})
    (log,) = tmp_path.rglob("*.wandb")
    content = log.read_bytes()
    assert b"0.515625" in content
    assert __file__.encode() not in content and sys.executable.encode() not in content


@pytest.mark.filterwarnings("default")
def test_the_real_mlflow_keeps_numbers_alone(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with Monitor(tmp_path / "run", total_steps=10, sinks=("mlflow",)) as watch:
        watch.scalars(3, {"loss": 0.5, "dice/fsl_fast": 0.25})
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("neuronet-jax").experiment_id])
    assert run.data.metrics == {"loss": 0.5, "dice/fsl_fast": 0.25} and run.info.status == "FINISHED"
    assert set(run.data.tags) <= {"mlflow.runName"} and run.data.params == {}
