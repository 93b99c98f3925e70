"""Every command in README.md and the pages is run by the program that it names, on tiny files in place of the reader's.

A few can only be understood here: they need a cluster, a cloud, a GPU or hours. Their options are checked by the
program's own parser.
"""

import contextlib
import importlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from experiments import train
from neuronet_jax.config import Config
from neuronet_jax.programs import Parser
from neuronet_jax.training.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "text"}  # of fenced blocks: run, run, and shown only

# What makes a command tiny. It comes last on the command line, where it wins.
TINY = {
    "data_prep.build": "--voxel_size_mm=4 --grid=24,32,24 --workers=0",
    "experiments.train": "--config.model.filters=2,4 --config.data.crop=8 --config.batch=2 --config.steps=1"
    " --config.data.workers=0 --config.evaluate_subjects=1 --config.augment.intensity=0 --config.augment.flip=false"
    " --config.loss.dice=0",
}
# Understood, not run: what it takes.
UNDERSTOOD = {
    "experiments.benchmark": "minutes, other frameworks, a TPU compiler",
    "data_prep.demo": "drawing phantoms, which tests/data_prep/demo does",
    "neuronet import-dltk": "the published weights; tests/neuronet_jax/dltk imports others",
}
# Where the main function is, if not in the module of the program's name.
MODULES = {
    "neuronet": "neuronet_jax.cli",
    "experiments.benchmark": "experiments.benchmark.__main__",
    "data_prep.demo": "data_prep.demo.cohort",
}
# Places in the pages that are not the reader's own folder.
ELSEWHERE = {"/shared/stores/cohort": "stores/cohort", "/shared/runs/a": "runs/on_slurm"}


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str

    def commands(self) -> list[str]:
        joined = re.sub(r"\\\n\s*", "", self.text)
        return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def blocks(text: str) -> list[Block]:
    found = []
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        found.append(Block(text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return found


class Understood(Exception):
    """The program took the arguments."""


@pytest.fixture(scope="session")
def workplace(files) -> Path:
    """The reader's folder after the four commands of the Train page: a store, a run, an evaluation, a report."""
    first = next(block for block in blocks((ROOT / "docs" / "train.md").read_text()) if block.language == "bash")
    with contextlib.chdir(files), pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]  # eight take as long to compile for as a page takes to run
        patch.setattr(train, "make_mesh", lambda config: make_mesh(config, one))
        for command in first.commands():
            run(command, trained=False)
        for copy in ("runs/a", "runs/b", "runs/demo-20260131-120000/run"):
            shutil.copytree("runs/all_targets", copy)
    return files


@pytest.mark.filterwarnings("default")  # what a tiny network deserves
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_tells_to_run_runs(page, workplace, tmp_path, monkeypatch):
    place = tmp_path / "place"
    shutil.copytree(workplace, place)
    monkeypatch.chdir(place)
    names: dict = {}
    for block in blocks(page.read_text(encoding="utf-8")):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: a block is one of {LANGUAGES}"
        if block.language == "python":
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
        if block.language == "bash":
            for command in block.commands():
                try:
                    run(command)
                except BaseException as error:
                    error.add_note(f"{page.name}:{block.line}: {command}")
                    raise


def test_the_pages_show_commands():
    shown = [command for page in PAGES for block in blocks(page.read_text()) for command in block.commands()]
    assert len(shown) > 40


def run(command: str, trained: bool = True) -> None:
    """Runs one command line. `trained`: runs exist, and training a further one is understood only."""
    for there, here in ELSEWHERE.items():
        command = command.replace(there, here)
    words = shlex.split(command.replace("$SLURM_ARRAY_TASK_ID", "1"))
    program, *arguments = words
    match program:
        case "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert arguments[0] == "install" and re.fullmatch(r"\.(\[\w+\])?", arguments[1])
            assert arguments[1] == "." or arguments[1][2:-1] in extras
        case "sbatch":
            wrapped = [word.removeprefix("--wrap=") for word in arguments if word.startswith("--wrap=")]
            script = list(_taken_while(reversed(arguments), r"(?!experiments/launch/).*"))[::-1]
            if wrapped:
                run(wrapped[0])
            else:
                run(shlex.join([arguments[-len(script) - 1], *script]))
        case "experiments/launch/slurm.sh":
            _call("experiments.train", arguments, trained=True)
        case "experiments/launch/tpu_pod.sh":
            command, *rest = arguments
            subprocess.run([ROOT / program, command, "--dry-run", *rest], check=True, capture_output=True)
            if "--" in rest:
                _call("experiments.train", rest[rest.index("--") + 1 :], trained=True)
        case "neuronet":
            _call("neuronet", arguments, trained)
        case "python" if arguments[0] == "-m":
            _call(arguments[1], arguments[2:], trained)
        case "python" if arguments[0] == "-c":
            exec(arguments[1], {})
        case _:
            raise AssertionError(f"no rule to run {program!r}")


def _call(program: str, arguments: list[str], trained: bool) -> None:
    """Calls the main function of a program, as a shell would."""
    module = importlib.import_module(MODULES.get(program, program))
    named = f"neuronet {arguments[0]}" if program == "neuronet" else program
    remote = any(word.startswith(("--scheduler=", "--store=gs:")) for word in arguments)
    with pytest.MonkeyPatch.context() as patch:
        if named in UNDERSTOOD or remote:
            patch.setattr(sys, "argv", [program, *arguments])
            parse = Parser.parse_args

            def understood(self, *given):
                raise Understood(parse(self, *given))

            patch.setattr(Parser, "parse_args", understood)
            with pytest.raises(Understood):
                module.main()
            return
        patch.setattr(sys, "argv", [program, *arguments, *TINY.get(program, "").split()])
        if program == "experiments.train" and trained:
            patch.setattr(train, "train", _copied)
        try:
            status = module.main()
        except SystemExit as exit:  # --help
            status = exit.code
        assert status in (0, None), f"exit status {status}"


def _copied(config: Config, workdir: str, *options: bool) -> None:
    """In place of training: the run of the workplace, under the name of the new one."""
    if "://" not in workdir and not Path(workdir).exists():
        shutil.copytree("runs/all_targets", workdir)


def _taken_while(words, pattern: str) -> Iterator[str]:
    for word in words:
        if not re.fullmatch(pattern, word):
            return
        yield word
