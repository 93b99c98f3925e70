"""All programs as users start them: the same options, exit statuses and form of messages everywhere."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

import neuronet_jax
from data_prep import build, verify
from neuronet_jax import cli
from neuronet_jax.programs import DONE, FAILED, PARTIAL, USAGE, Parser, run, spelled
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]

# Program: a mistyped option, the option that was meant, and arguments that name a file that is not there.
PROGRAMS = {
    "neuronet_jax": ("--versoin", "--version", None),
    "neuronet_jax segment": ("--consistent_tisue", "--consistent-tissue", "none.nii.gz --run={here} --out={here}/out"),
    "neuronet_jax import-dltk": ("--axis", "--axes", "{here}/none --out={here}/out"),
    "neuronet_jax export": ("--shap", "--shape", "--run={here}/none --out={here}/out"),
    "experiments.train": ("--reset_dat", "--reset-data", "--config=tissue --config.data.store={here}/none"),
    "experiments.evaluate": ("--surface", "--surfaces", "--run={here}/none --out={here}/out"),
    "experiments.report": ("--evla", "--eval", "--run={here} --eval={here}/none --out={here}/out.html"),
    "experiments.demo": ("--confg", "--config", "--out={here}/out --config.data.store={here}/none"),
    "experiments.benchmark": ("--repeat", "--repeats", "--input --store={here}/none --out={here}/out"),
    "data_prep.build": ("--voxel_size_m", "--voxel-size-mm", "--manifest={here}/none.csv --store={here}/out"),
    "data_prep.verify": ("--thread", "--threads", "--store={here}/none"),
    "data_prep.references": ("--drop-outlier", "--drop-outliers", "--store={here}/none"),
    "data_prep.report": ("--picture", "--pictures", "--store={here}/none --out={here}/report.html"),
    "data_prep.purge": ("--excluded", "--exclude", "--store={here}/none --exclude={here}/none.csv"),
    "data_prep.heads": ("--brian", "--brains", "--maps={here}/none --store={here}/out"),
    "data_prep.demo": ("--tran", "--train", "--out={here}/file/none"),
}


@dataclass(frozen=True)
class Answers:
    """Answers of one program: a finished process for each kind of call."""

    program: str
    processes: dict[str, subprocess.CompletedProcess]


@pytest.fixture(scope="module", params=PROGRAMS)
def answers(request, tmp_path_factory) -> Answers:
    """Runs one program with a mistyped option, --help, --version and a missing file; two processes at a time."""
    here = tmp_path_factory.mktemp("programs")
    (here / "file").touch()  # no folder can be made below it
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(here)}  # nobody's cached demo cohort
    mistyped, _, missing = PROGRAMS[request.param]
    calls = {"mistyped": mistyped, "--help": "--help", "--version": "--version", "missing": missing}

    def start(words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *request.param.split(), *words.format(here=here).split()]
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)

    with ThreadPoolExecutor(2) as pool:
        asked = {kind: pool.submit(start, words) for kind, words in calls.items() if words is not None}
    return Answers(request.param, {kind: process.result() for kind, process in asked.items()})


def test_a_mistyped_option_ends_with_2_and_suggests_the_right_one(answers):
    process = answers.processes["mistyped"]
    assert process.returncode == USAGE and process.stdout == ""
    mistyped, meant, _ = PROGRAMS[answers.program]
    usage, *_, last = process.stderr.splitlines()
    assert last.endswith(f"error: there is no option {spelled(mistyped)}; did you mean {meant}?")
    command = answers.program.removeprefix("neuronet_jax").strip()
    assert usage.startswith(f"usage: {'neuronet ' if command != answers.program else 'python -m '}{command}".rstrip())


def test_help_states_the_exit_statuses_and_spells_options_with_hyphens(answers):
    process = answers.processes["--help"]
    assert process.returncode == DONE and process.stderr == ""
    _, _, statuses = process.stdout.partition("exit status:\n")
    assert {0, 1, 2, 130} <= {int(status) for status in re.findall(r"^  (\d+) ", statuses, re.MULTILINE)}
    names = re.findall(r"(?<![\w-])--[\w-]+", process.stdout)
    assert [name for name in names if "_" in name] == []


def test_every_program_tells_the_version(answers):
    process = answers.processes["--version"]
    assert (process.returncode, process.stdout) == (DONE, f"neuronet {neuronet_jax.__version__}\n")


def test_a_missing_file_is_one_message_and_status_1(answers):
    if answers.program == "neuronet_jax":
        pytest.skip("takes no file; only its commands do")
    process = answers.processes["missing"]
    assert process.returncode == FAILED, process.stderr
    assert "Traceback" not in process.stderr
    name = "neuronet" if answers.program.startswith("neuronet") else f"python -m {answers.program}"
    last = process.stderr.splitlines()[-1]
    assert last.startswith(f"{name}: error: ")
    assert ";" in last or ":" in last.removeprefix(f"{name}: error: ")  # the reason, and what to do


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--voxel_size_mm=2", "--voxel-size-mm=2"),
        ("--max-reject_fraction=a_b", "--max-reject-fraction=a_b"),
        ("--config.model.compute-dtype=b-f", "--config.model.compute_dtype=b-f"),
        ("--config.data.store", "--config.data.store"),
        ("--no_report", "--no-report"),
        ("in_file", "in_file"),
        ("-a_b", "-a_b"),
    ],
)
def test_options_are_spelled_with_either_sign(given, meant):
    assert spelled(given) == meant and spelled(meant) == meant


def _parser(**arguments) -> Parser:
    parser = Parser("try", **arguments)
    parser.add_argument("--first-number", type=float)
    parser.add_argument("files", nargs="*")
    return parser


def test_values_operands_and_settings_stay_as_they_are():
    args = _parser(settings=True).parse_args(["--first_number", "-1.5", "--config.x_y=c-d", "--", "a_b", "--e_f"])
    assert args.files == ["a_b", "--e_f"] and args.first_number == -1.5 and args.overrides[0] == "--config.x_y=c-d"


@pytest.mark.parametrize("arguments", [["--first=2"], ["--config.a=1"], ["-f", "1"], ["--frist-number=1"]])
def test_neither_abbreviations_nor_settings_of_other_programs(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        _parser().parse_args(arguments)
    assert (
        raised.value.code == USAGE and f"there is no option {arguments[0].partition('=')[0]}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (neuronet_jax.errors.NeuronetError("no room"), FAILED),
        (neuronet_jax.errors.RejectError("E_CRC", "no room"), FAILED),
        (neuronet_jax.errors.UsageError("no room"), USAGE),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_a_status(error, status, capsys):
    def command(_) -> int:
        raise error

    assert run(_parser(), command, []) == status
    printed = capsys.readouterr().err
    assert printed.startswith("try: ") and printed.count("\n") == 1
    assert ("no room" in printed) == (status != 130)


def test_other_exceptions_are_defects_and_keep_their_traceback():
    def command(_) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(_parser(), command, [])
    assert run(_parser(), lambda _: PARTIAL, []) == PARTIAL


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (build.main, ["--voxel-size-mm=-1"], "--voxel-size-mm: it takes a number from 0.2 to 10, got '-1'"),
        (build.main, ["--workers=-3"], "--workers: it takes a whole number from 0, got '-3'"),
        (build.main, ["--shard-subjects=0"], "a whole number from 1, got '0'"),
        (build.main, ["--max-reject-fraction=nan"], "a number from 0 to 1, got 'nan'"),
        (build.main, ["--grid=0,1,2"], "a grid is X,Y,Z in voxels"),
        (verify.main, ["--threads=many"], "a whole number from 1, got 'many'"),
        (cli.main, ["export", "--shape=3"], "'3' is not a shape: write X,Y,Z"),
    ],
)
def test_a_wrong_value_is_status_2_before_anything_is_read(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2 and message in capsys.readouterr().err
