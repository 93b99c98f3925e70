"""A folder and a shell for the commands of the pages.

The folder holds tiny scans, label maps, a store and trained runs, made by the commands of the Train page themselves. A
few commands are only parsed, because they need a cluster, a cloud, a GPU or hours; the program's own parser checks
their options.
"""

import argparse
import contextlib
import csv
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import nibabel as nib
import numpy as np
import pytest

import neuronet_jax
from experiments import train
from neuronet_jax.config import Config
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS
from neuronet_jax.programs import Parser
from neuronet_jax.training.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[2]

# What makes a command tiny. It comes last on the command line, where it wins.
TINY = {
    "data_prep.build": "--voxel_size_mm=4 --grid=24,32,24 --workers=0",
    "experiments.train": "--config.model.filters=2,4 --config.data.crop=8 --config.batch=2 --config.steps=1"
    " --config.data.workers=0 --config.evaluate_subjects=1 --config.augment.intensity=0 --config.augment.flip=false",
    "experiments.evaluate": "--overwrite",  # the folder holds an evaluation already, as after the Train page
}
# Understood, not run: what it takes.
UNDERSTOOD = {
    "experiments.benchmark": "minutes, other frameworks, a TPU compiler",
    "experiments.compare": "training of many networks, which tests/experiments/compare does with two",
    "experiments.robustness": "many segmentations; tests/experiments/test_robustness.py has the parts",
    "experiments.pretrain": "hours of training; tests/experiments/test_pretrain.py does it for two steps",
    "experiments.augmentations": "the demo cohort, which tests/data_prep/demo draws",
    "data_prep.demo": "drawing phantoms, which tests/data_prep/demo does",
    "data_prep.heads": "whole-head label maps, which tests/data_prep/test_heads.py draws",
    "neuronet view": "a browser; tests/neuronet_jax/viewer has one",
    "neuronet import-dltk": "the published weights; tests/neuronet_jax/dltk imports others",
}
# Where the main function is, if not in the module of the program's name.
MODULES = {
    "neuronet": "neuronet_jax.cli",
    "experiments.benchmark": "experiments.benchmark.__main__",
    "data_prep.demo": "data_prep.demo.cohort",
    "experiments.compare": "experiments.compare.__main__",
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


class Workplace(NamedTuple):
    """The reader's folder, and the files of this project that the first training and the first segmentation entered."""

    folder: Path
    trained: list[str]
    segmented: list[str]


@pytest.fixture(scope="session")
def workplace(files) -> Workplace:
    """Returns the folder after the four commands of the Train page: a store, a run, an evaluation, a report."""
    first = next(block for block in blocks((ROOT / "docs" / "train.md").read_text()) if block.language == "bash")
    trained, segmented = [], []
    with contextlib.chdir(files), pytest.MonkeyPatch.context() as patch:
        one = jax.devices()[:1]  # eight take as long to compile for as a page takes to run
        patch.setattr(train, "make_mesh", lambda config: make_mesh(config, one))
        for command in first.commands():
            with entered(trained if "experiments.train" in command else []):
                run(command, trained=False)
        model = neuronet_jax.restore("runs/all_targets")
        jax.clear_caches()  # of what validation compiled, so that the network is entered again
        with entered(segmented):
            neuronet_jax.segment(model, "T1.nii.gz")
        for copy in ("runs/a", "runs/b", "runs/demo-20260131-120000/run"):
            shutil.copytree("runs/all_targets", copy)
    return Workplace(files, trained, segmented)


@contextlib.contextmanager
def entered(found: list[str]) -> Iterator[None]:
    """Appends the files of this project whose functions are called within the block, each at its first call."""

    def called(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code not in seen:
            seen.add(frame.f_code)
            path = Path(frame.f_code.co_filename)
            if frame.f_code.co_name != "<module>" and path.is_relative_to(ROOT):  # an import runs, but says nothing
                name = path.relative_to(ROOT).as_posix()
                if name not in found and not name.startswith(("tests/", ".venv")):
                    found.append(name)

    seen: set[Any] = set()
    threading.setprofile(called)
    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture(scope="session")
def shell():
    """Runs one command line of a page in the current folder."""
    return run


@pytest.fixture(scope="session")
def read_blocks():
    """Returns the fenced blocks of a page's text."""
    return blocks


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
    # tests/data_prep makes such archives, and stand-ins for the tools
    elsewhere = ("--scheduler=", "--store=gs:", "--ukb=", "--bids=", "--run-tools=")
    remote = any(word.startswith(elsewhere) for word in arguments)
    with pytest.MonkeyPatch.context() as patch:
        if named in UNDERSTOOD or remote:
            patch.setattr(sys, "argv", [program, *arguments])
            parse = Parser.parse_args

            def understood(self, *given):
                raise Understood(parse(self, *given))

            patch.setattr(Parser, "parse_args", understood)
            with pytest.raises(Understood) as caught:
                module.main()
            if program == "experiments.benchmark":
                _check_contenders(*caught.value.args)
            return
        patch.setattr(sys, "argv", [program, *arguments, *TINY.get(program, "").split()])
        if program == "experiments.train" and trained:
            patch.setattr(train, "train", _copied)
        try:
            status = module.main()
        except SystemExit as exit:  # --help
            status = exit.code
        assert status in (0, None), f"exit status {status}"


def _check_contenders(arguments: argparse.Namespace) -> None:
    """Checks the arguments that the parser leaves to the benchmark itself."""
    from experiments.benchmark.__main__ import WHATS
    from experiments.benchmark.serve import CONTENDERS

    assert set(arguments.what.split(",")) <= set(WHATS)
    assert {re.split("[:@]", entry)[0] for entry in arguments.against.split(",")} <= set(CONTENDERS)


def _copied(config: Config, workdir: str, **options: Any) -> None:
    """Copies the workplace's run to the name of the new one, in place of training."""
    if "://" not in workdir and not Path(workdir).exists():
        shutil.copytree("runs/all_targets", workdir)


def _taken_while(words, pattern: str) -> Iterator[str]:
    for word in words:
        if not re.fullmatch(pattern, word):
            return
        yield word


# ---- the files that a reader brings

SHAPE = (24, 28, 24)
SPLITS = ("train", "train", "train", "validation", "test")
WITHDRAWN = "1001"


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """Returns the files that a reader brings: a cohort with its manifest, a scan, a BIDS dataset, a list of withdrawn
    ids.
    """
    folder = tmp_path_factory.mktemp("files")
    with (folder / "cohort.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "t1", *PROTOCOLS, "split"])
        for number, split in enumerate(SPLITS):
            identity = str(1001 + number)
            (folder / identity).mkdir()
            _write(folder / identity / "T1.nii.gz", _head(number))
            for name, protocol in PROTOCOLS.items():
                _write(folder / identity / protocol.filename, _labels(name))
            maps = [f"{identity}/{protocol.filename}" for protocol in PROTOCOLS.values()]
            writer.writerow([identity, f"{identity}/T1.nii.gz", *maps, split])
    shutil.copy(folder / "1005" / "T1.nii.gz", folder)
    anatomy = folder / "bids" / "sub-01" / "anat"
    anatomy.mkdir(parents=True)
    shutil.copy(folder / "T1.nii.gz", anatomy / "sub-01_T1w.nii.gz")
    description = {"Name": "test", "BIDSVersion": "1.10.0", "DatasetType": "raw"}
    (folder / "bids" / "dataset_description.json").write_text(json.dumps(description))
    (folder / "withdrawn.csv").write_text(f"{WITHDRAWN}\n")
    people = [f"sub-{1001 + number}\tA\t{40 + number}\tf\n" for number in range(len(SPLITS))]
    (folder / "participants.tsv").write_text("participant_id\tsite\tage\tsex\n" + "".join(people))
    (folder / "my_config.py").write_text("from experiments.configs.all_targets import get_config\n")
    return folder


def _write(path: Path, data: np.ndarray) -> None:
    image = nib.Nifti1Image(data, np.diag([4.0, 4.0, 4.0, 1.0]))
    image.header.set_xyzt_units("mm")
    image.to_filename(path)


def _structures() -> np.ndarray:
    """Returns classes of malp_em in an ellipsoid, uint8 [x y z], in slabs along z so that all tissues occur."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, side) for side in SHAPE), indexing="ij"))
    slabs = np.broadcast_to(np.arange(SHAPE[2]) * 6 % 138 + 1, SHAPE)
    return np.where((grid**2).sum(axis=0) < 0.8, slabs, 0).astype(np.uint8)


def _labels(name: str) -> np.ndarray:
    """Returns the label map of a protocol, in the tool's ids."""
    structures = _structures()
    if name == "malp_em":
        return structures
    if name == "malp_em_tissue":
        return MALP_EM_TO_TISSUE[structures]
    count = PROTOCOLS[name].num_classes
    return PROTOCOLS[name].to_ids(np.where(structures > 0, structures % (count - 1) + 1, 0).astype(np.uint8))


def _head(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 20, SHAPE)
    return (200.0 * (_structures() > 0) + 2.0 * _structures() + noise).clip(0).astype(np.int16)
