"""All programs as users start them: the same options, exit statuses and form of messages everywhere."""

import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import neuronet_jax
from neuronet_jax.programs import DONE, FAILED, PARTIAL, USAGE, Parser, run, spelled

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
    "data_prep.purge": ("--excluded", "--exclude", "--store={here}/none --exclude={here}/none.csv"),
    "data_prep.demo": ("--tran", "--train", "--out={here}/file/none"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Returns the finished process of every program and kind of call. Two run at a time."""
    here = tmp_path_factory.mktemp("programs")
    (here / "file").touch()  # no folder can be made below it
    cache = here / "cache"  # nobody's cached demo cohort

    def start(words: list[str]) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
        return subprocess.run(
            [sys.executable, "-m", *words], cwd=here, env=environment, capture_output=True, text=True, timeout=240
        )

    asked: dict[tuple[str, str], Future] = {}
    with ThreadPoolExecutor(2) as pool:
        for program, (mistyped, _, missing) in PROGRAMS.items():
            for kind, words in {
                "mistyped": mistyped,
                "--help": "--help",
                "--version": "--version",
                "missing": missing,
            }.items():
                if words is not None:
                    asked[program, kind] = pool.submit(start, [*program.split(), *words.format(here=here).split()])
    return {key: future.result() for key, future in asked.items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_mistyped_option_ends_with_2_and_suggests_the_right_one(answers, program):
    process = answers[program, "mistyped"]
    assert process.returncode == USAGE and process.stdout == ""
    last = process.stderr.splitlines()[-1]
    mistyped, meant, _ = PROGRAMS[program]
    assert last.endswith(f"error: there is no option {spelled(mistyped)}; did you mean {meant}?")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_states_the_exit_statuses_and_spells_options_with_hyphens(answers, program):
    process = answers[program, "--help"]
    assert process.returncode == DONE and process.stderr == ""
    _, _, statuses = process.stdout.partition("exit status:\n")
    assert {0, 1, 2, 130} <= {int(status) for status in re.findall(r"^  (\d+) ", statuses, re.MULTILINE)}
    names = re.findall(r"(?<![\w-])--[\w-]+", process.stdout)
    assert [name for name in names if "_" in name] == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_tells_the_version(answers, program):
    process = answers[program, "--version"]
    assert (process.returncode, process.stdout) == (DONE, f"neuronet {neuronet_jax.__version__}\n")


@pytest.mark.parametrize("program", [program for program, (*_, missing) in PROGRAMS.items() if missing])
def test_a_missing_file_is_one_message_and_status_1(answers, program):
    process = answers[program, "missing"]
    assert process.returncode == FAILED, process.stderr
    assert "Traceback" not in process.stderr
    last = process.stderr.splitlines()[-1]
    prog = program.replace("neuronet_jax", "neuronet") if "neuronet" in program else f"python -m {program}"
    assert re.match(rf"{re.escape(prog.split(' segment')[0].split(' import')[0].split(' export')[0])}: error: ", last)
    assert ";" in last or ":" in last.partition("error: ")[2]  # the reason, and what to do


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
