"""A comparison as a command: interrupted, continued and shared among processes; its tables from its cells."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.compare import __main__ as command
from experiments.compare import page, scores
from experiments.compare.plan import Arm, Cell, Plan
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.lease import lease
from neuronet_jax.runs.directory import RunDirectory
from neuronet_jax.runs.provenance import TrainingData
from neuronet_jax.store.reader import Store

SUBJECTS = ("person-1", "person-2", "person-3", "person-4")
ARMS = tuple(
    Arm("crops", "neuronet", f"{variant}:demo", protocols, 10, 1e9)
    for variant, protocols in (("tissue", ("fsl_fast", "spm_tissue", "malp_em_tissue")), ("fsl_fast", ("fsl_fast",)))
)
PLAN = Plan(ARMS, 1, ())


def _score(folder: Path, protocols: tuple[str, ...], dice: float) -> None:
    """Writes the files of a finished cell: subject i has `dice` + i / 100 in every structure, and misses the last."""
    (folder / "evaluation").mkdir(parents=True)
    lines = ["subject\tprotocol\tindex\tname\tdice\thd95_mm"]
    for number, subject in enumerate(SUBJECTS):
        for protocol in protocols:
            for s in PROTOCOLS[protocol].structures[1:]:
                last = s.index == PROTOCOLS[protocol].num_classes - 1
                value, apart = ("nan", "inf") if last else (f"{dice + number / 100:.6f}", "2.0000")
                lines.append(f"{subject}\t{protocol}\t{s.id}\t{s.name}\t{value}\t{apart}")
    (folder / "evaluation" / "dice.tsv").write_text("\n".join(lines) + "\n")
    summary = {"protocols": {protocol: {"mean": dice} for protocol in protocols}}
    (folder / "evaluation" / "summary.json").write_text(json.dumps(summary))
    (folder / "run").mkdir(exist_ok=True)
    sittings = [(1, 2.0), (2, 5.0), (3, 1.0), (4, 3.0)]  # interrupted after 5 s, then 3 s more
    rows = [{"step": step, "seconds/step": s, "peak_memory_bytes": 2**20 * step} for step, s in sittings]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Plan, Path]:
    """Returns a plan of two arms and two seeds, of which the joint network is better by .1, with all its cells."""
    plan = Plan(ARMS, 2, ())
    for arm, dice in zip(ARMS, (0.8, 0.7), strict=True):
        for seed in range(2):
            _score(tmp_path / "cells" / plan.cell(arm, seed).name, arm.protocols, dice)
    return plan, tmp_path


def test_what_cells_scored_becomes_arrays(finished):
    joint, single = scores.read(*finished)
    dice = joint.by_protocol["fsl_fast"]["dice"]
    assert dice.shape == (2, len(SUBJECTS), 3)
    np.testing.assert_allclose(dice[0, :, 0], [0.80, 0.81, 0.82, 0.83])
    np.testing.assert_allclose(joint.of_subjects("fsl_fast", scores.METRICS[0])[1], [0.80, 0.81, 0.82, 0.83])
    np.testing.assert_array_equal(joint.of_subjects("fsl_fast", scores.METRICS[1]), 2.0)  # one of three is infinite
    assert (joint.seconds, joint.memory_bytes, single.seeds) == ((8.0, 8.0), 4 * 2**20, (0, 1))


def test_a_median_is_a_measured_distance():
    values = np.array([[3.0, np.inf, 1.0, np.nan], [np.nan, 2.0, 5.0, np.nan], [np.nan] * 4])
    np.testing.assert_array_equal(scores.METRICS[1].over_structures(values), [3.0, 5.0, np.nan])


def test_the_joint_network_is_compared_with_the_single_one_alone(finished):
    found = scores.contrasts(scores.read(*finished))
    assert {(c.protocol, c.arm, c.baseline) for c in found} == {
        ("fsl_fast", "neuronet/tissue-demo", "neuronet/fsl_fast-demo")
    }
    dice = next(c for c in found if c.metric == "dice")
    assert dice.found.difference == pytest.approx(0.1)
    assert (dice.found.low, dice.found.high) == pytest.approx((0.1, 0.1))
    assert dice.found.p == pytest.approx(2 / 2**4) == dice.p_holm  # four subjects; one row


def test_networks_of_the_same_protocols_are_compared_with_the_first(tmp_path):
    arms = tuple(Arm("compute", "neuronet", name, ("fsl_fast",), 10, 1e9) for name in ("plain", "wide", "deep"))
    plan = Plan(arms, 1, ())
    for arm in arms:
        _score(tmp_path / "cells" / plan.cell(arm, 0).name, arm.protocols, 0.8)
    pairs = {(c.arm, c.baseline) for c in scores.contrasts(scores.read(plan, tmp_path))}
    assert pairs == {("neuronet/wide", "neuronet/plain"), ("neuronet/deep", "neuronet/plain")}


def test_the_pace_counts_the_networks_of_others_and_tells_the_time_left(tmp_path, monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(command.time, "monotonic", lambda: now_s)
    plan = Plan(ARMS, 2, ())  # four networks of the same size
    folders = [tmp_path / "cells" / cell.name for cell in plan.cells()]
    _score(folders[0], ("fsl_fast",), 0.8)
    pace = command.Pace(plan, tmp_path)
    assert str(pace) == "1 of 4 networks finished"
    now_s = 90.0
    _score(folders[1], ("fsl_fast",), 0.8)
    assert str(pace) == "2 of 4 networks finished, about 3 min 0 s left"
    for folder in folders[2:]:
        _score(folder, ("fsl_fast",), 0.8)
    assert str(pace) == "4 of 4 networks finished"


def test_scores_against_failed_references_are_shown_with_and_without(finished):
    plan, out = finished
    (out / "failed.tsv").write_text("id\tprotocol\nperson-1\tfsl_fast\n")
    failed = command.read_failed(out / "failed.tsv")
    joint = scores.read(plan, out, failed)[0]
    assert np.isnan(joint.by_protocol["fsl_fast"]["dice"][:, 0]).all()
    assert not np.isnan(joint.by_protocol["spm_tissue"]["dice"][:, 0, 0]).any()
    page.write(plan, out, "test", failed)
    text = (out / "comparison.md").read_text()
    assert "## Dice, mean over structures: equal crops without failed references" in text
    assert "| fsl_fast | neuronet/tissue-demo | neuronet/fsl_fast-demo | +0.100 |" in text
    shared = text + (out / "comparison.html").read_text() + (out / "structures.tsv").read_text()
    assert not any(name in shared for name in SUBJECTS)


@pytest.fixture
def train_nothing(monkeypatch: pytest.MonkeyPatch, make_store, tmp_path: Path):
    """Replaces the process of a cell. Returns the names of the cells that it was given, in order."""
    store = Store.open(make_store(("train", "validation", "test"))[0].dest)
    given: list[str] = []

    def stand_in(cell: Cell, folder: Path, split: str, surfaces: bool = True) -> int:
        given.append(cell.name if "tuning" not in str(folder) else folder.name)
        if "fails" in os.environ.get("TEST_CELL", ""):
            return 1
        config = cell.config()
        _score(folder, config.protocols, config.optimizer.learning_rate)
        RunDirectory(folder / "run").describe(config, TrainingData.of_store(store.info))
        return 0

    monkeypatch.setattr(command, "_in_own_process", stand_in)
    monkeypatch.chdir(tmp_path)
    return given


def test_a_finished_cell_is_never_trained_again(train_nothing, tmp_path):
    assert command.work(PLAN, tmp_path, "test", 0) == []
    assert train_nothing == ["neuronet/tissue-demo/10-steps/seed-0", "neuronet/fsl_fast-demo/10-steps/seed-0"]
    assert command.work(PLAN, tmp_path, "test", 0) == []
    assert len(train_nothing) == 2
    changed = Plan(ARMS, 1, ("--config.batch=4",))
    with pytest.raises(command.NeuronetError, match="trained with different settings: batch was 2, is 4"):
        command.work(changed, tmp_path, "test", 0)


def test_a_cell_that_somebody_else_trains_is_left_to_them(train_nothing, tmp_path):
    folder = tmp_path / "cells" / PLAN.cell(ARMS[0], 0).name
    folder.mkdir(parents=True)
    with lease(Files(str(folder)), command.LEASE):
        assert command.work(PLAN, tmp_path, "test", 0) == []
    assert train_nothing == ["neuronet/fsl_fast-demo/10-steps/seed-0"]


def test_a_cell_that_fails_does_not_end_the_others(train_nothing, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_CELL", "fails")
    assert command.work(PLAN, tmp_path, "test", 0) == train_nothing
    assert len(train_nothing) == 2


def test_every_arm_has_as_many_trials_and_trains_with_the_best(train_nothing, tmp_path):
    pytest.importorskip("optuna", reason="needs the extra `tuning`")
    assert command.work(PLAN, tmp_path, "test", 3) == []
    assert train_nothing[:6] == [f"trial-{number}" for number in (1, 2, 3)] * 2
    record = json.loads((tmp_path / "tuning/neuronet/fsl_fast-demo/10-steps/trials.json").read_text())
    rates = [trial["settings"]["optimizer.learning_rate"] for trial in record]
    assert len(set(rates)) == 3 and [trial["dice"] for trial in record] == rates  # the stand-in scores the rate
    run = RunDirectory(tmp_path / "cells" / PLAN.cell(ARMS[1], 0).name / "run").config()
    assert run is not None and run.optimizer.learning_rate == max(rates)
    record.pop()  # as after an interruption: the last trial is the same again
    (tmp_path / "tuning/neuronet/fsl_fast-demo/10-steps/trials.json").write_text(json.dumps(record))
    (tmp_path / "tuning/neuronet/fsl_fast-demo/10-steps/trial-3").rename(tmp_path / "aside")
    assert command.work(PLAN, tmp_path, "test", 3) == []
    record = json.loads((tmp_path / "tuning/neuronet/fsl_fast-demo/10-steps/trials.json").read_text())
    assert [trial["settings"]["optimizer.learning_rate"] for trial in record] == rates
    assert len(train_nothing) == 9


def _command(store: str, out: Path, *extra: str) -> subprocess.Popen[str]:
    settings = {"data.store": store, "data.crop": 16, "data.workers": 0, "model.filters": "4,6", "steps": 40}
    settings |= {"log_every": 1, "checkpoint_every": 100, "evaluate_subjects": 1}
    fixed = [
        f"--out={out}",
        f"--variants={out.parent / 'both.py'}:demo,fsl_fast:demo",
        "--budgets=compute",
        "--seeds=1",
    ]
    alone = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    alone |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(out.parent / "compiled")}
    arguments = [*fixed, *(f"--config.{name}={value}" for name, value in settings.items()), *extra]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.compare", *arguments], env=alone, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.soak
def test_an_interrupted_comparison_goes_on_where_it_was(make_store, tmp_path):
    store = make_store(("train", "train", "validation", "test", "test"))[0].dest
    joint = tmp_path / "out/cells/neuronet/both-demo/40-steps/seed-0"
    both = "def get_config(variant):\n    return config(('fsl_fast', 'malp_em'), variant)\n"
    (tmp_path / "both.py").write_text("from experiments.configs.common import config\n\n\n" + both)
    first = _command(store, tmp_path / "out")
    while not ((joint / "run/metrics.jsonl").exists() and (joint / "run/metrics.jsonl").read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=600)
    assert first.returncode == command.INTERRUPTED, errors
    reached = RunDirectory(joint / "run").metrics()[-1]["step"]
    assert 1 <= reached < 40 and not (joint / "evaluation").exists()
    again = _command(store, tmp_path / "out")
    _, errors = again.communicate(timeout=1800)
    assert again.returncode == 0, errors
    assert [row["step"] for row in RunDirectory(joint / "run").metrics()][reached - 1 : reached + 1] == [
        reached,
        reached + 1,
    ]
    text = (tmp_path / "out/comparison.md").read_text()
    assert "2 of 2 networks are trained and scored on 2 test subjects." in text
    assert "| fsl_fast | neuronet/both-demo | neuronet/fsl_fast-demo |" in text
    assert store not in text + (tmp_path / "out/comparison.html").read_text() + (tmp_path / "out/plan.json").read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--budgets=time",), "--budgets takes crops and compute, got 'time'"),
        (("--trials=2", "--split=validation"), "score on --split=test"),
        ((), "a comparison needs a store"),
    ],
)
def test_wrong_options_are_named(options, told, capsys, tmp_path):
    assert command.main([f"--out={tmp_path}", "--variants=fsl_fast:demo", *options]) == 2
    assert told in capsys.readouterr().err
