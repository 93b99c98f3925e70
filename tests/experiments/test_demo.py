"""The sequence of the demo; its steps have their own tests."""

import re
import shlex

import pytest

from experiments import demo, evaluate, report, train
from neuronet_jax import cli


@pytest.fixture
def cohort(tmp_path, monkeypatch):
    """Returns a store with its manifest beside it, as `ensure_demo_store` leaves them."""
    (tmp_path / "cohort").mkdir()
    rows = ["id,t1,split", "a,a/T1.nii.gz,train", "b,b/T1.nii.gz,test", "c,c/T1.nii.gz,test"]
    (tmp_path / "cohort" / "manifest.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(demo, "ensure_demo_store", lambda: tmp_path / "store")
    return tmp_path


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Records the steps instead of running them; `steps["failing"]` names one that fails."""
    seen = {"ran": [], "failing": None}

    def stand_in(name):
        def command(arguments):
            seen["ran"].append((name, list(arguments)))
            if name == "segment":
                page = tmp_path / "here" / "heads" / "sub-T1" / "anat" / "sub-T1_report.html"
                page.parent.mkdir(parents=True)
                page.touch()
            return 3 if name == seen["failing"] else 0

        return command

    for name, module in {"train": train, "segment": cli, "evaluate": evaluate, "report": report}.items():
        monkeypatch.setattr(module, "main", stand_in(name))
    return seen


def test_held_out_head_is_the_first_test_subject(cohort):
    assert demo.held_out_head(cohort / "store") == cohort / "cohort" / "b" / "T1.nii.gz"


def test_every_step_takes_the_results_of_the_one_before(cohort, steps, monkeypatch):
    monkeypatch.chdir(cohort)
    assert demo.main(["--out=here", "--config.steps=3"]) == 0
    ran = dict(steps["ran"])
    assert list(ran) == ["train", "segment", "evaluate", "report"]
    assert "--config=all_targets:demo" in ran["train"]
    assert "--config.steps=3" in ran["train"]
    assert "--workdir=here/run" in ran["train"]
    assert all("--run=here/run" in ran[name] for name in ("segment", "evaluate", "report"))
    assert "--out=here/evaluation" in ran["evaluate"]
    assert "--eval=here/evaluation" in ran["report"]


def test_it_ends_with_pages_that_exist_and_commands_that_can_be_typed(cohort, steps, monkeypatch, capsys):
    monkeypatch.chdir(cohort)
    assert demo.main(["--out=here"]) == 0
    text = capsys.readouterr().out
    assert (cohort / "here/heads/sub-T1/anat/sub-T1_report.html").is_file()  # as `neuronet segment` names it
    assert "\n  here/heads/sub-T1/anat/sub-T1_report.html\n" in text and "\n  here/report.html\n" in text
    for name in ("view", "segment"):
        (line,) = re.findall(rf"^  \S+ -m neuronet_jax ({name} .*)", text, re.MULTILINE)
        cli._parser().parse_args(shlex.split(line))
    assert str(cohort / "cohort" / "b" / "T1.nii.gz") in text


def test_a_step_that_fails_ends_the_demo_with_its_status(cohort, steps, monkeypatch):
    monkeypatch.chdir(cohort)
    steps["failing"] = "segment"
    assert demo.main(["--out=here"]) == 3
    assert [name for name, _ in steps["ran"]] == ["train", "segment"]
