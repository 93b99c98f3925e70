"""Tools that are run for absent label maps: real processes that succeed, fail, hang, lie and write half."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import build
from data_prep.tools import process
from data_prep.tools.tools import from_spm
from neuronet_jax import lease
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.reader import Store
from tests.processes import PATIENCE_S

NAMES = "fsl_fast,fsl_first,spm,malp_em"
# Programs as shell scripts, which find their maps in $MAPS and say in $MAPS/calls how they were called.
SAY = '#!/bin/sh\necho "$(basename "$0") $*" >> "$MAPS/calls"\n'
PROGRAMS = {
    "bet": 'cp "$1" "$2"',
    "fast": 'test -f brain.nii.gz && cp "$MAPS/fsl_fast.nii.gz" fast_seg.nii.gz',
    "run_first_all": 'cp "$MAPS/fsl_first.nii.gz" first_all_fast_firstseg.nii.gz',
    "spm12": 'test -f T1.nii && grep -q preproc "$2" && cp "$MAPS"/c?T1.nii .',
    "malpem-proot": (
        'mkdir "$4" && cp "$MAPS/malp_em.nii.gz" "$4/T1_MALPEM.nii.gz" '
        '&& cp "$MAPS/malp_em_tissue.nii.gz" "$4/T1_MALPEM_tissues.nii.gz"'
    ),
}


@pytest.fixture
def maps(tmp_path: Path, brain, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of the maps that the stand-ins copy. The programs are on the PATH."""
    folder, programs = tmp_path / "maps", tmp_path / "programs"
    for protocol in PROTOCOLS:
        brain.write(folder / f"{protocol}.nii.gz", brain.ids(protocol))
    tissues = brain.ids("spm_tissue")
    for number, id_ in ((1, 2), (2, 3), (3, 1)):  # c1 is grey, c2 white matter, c3 CSF
        brain.write(folder / f"c{number}T1.nii", np.where(tissues == id_, 0.9, 0.02).astype(np.float32))
    programs.mkdir()
    for name, body in PROGRAMS.items():
        script(programs / name, body)
    monkeypatch.setenv("MAPS", str(folder))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return folder


def script(path: Path, body: str) -> None:
    path.write_text(f"{SAY}{body}\n")
    path.chmod(0o755)


@pytest.fixture
def command(tmp_path: Path, make_cohort: Callable[..., Path]) -> Callable[..., list[str]]:
    """Returns the arguments of a build of two visits without label maps, or with those of `protocols`."""

    def arguments(tools: str, *extra: str, protocols: tuple[str, ...] = ()) -> list[str]:
        manifest = make_cohort(("1001", "1002"), protocols)
        return [
            f"--manifest={manifest}",
            f"--store={tmp_path / 'store'}",
            f"--tools-out={tmp_path / 'out'}",
            f"--run-tools={tools}",
            "--voxel-size-mm=4",
            "--grid=48,56,48",
            "--workers=0",
            *extra,
        ]

    return arguments


def called(maps: Path) -> list[str]:
    calls = maps / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_all_tools_give_all_protocols_once(maps: Path, command, tmp_path: Path, brain, capsys) -> None:
    assert build.main(command(NAMES)) == 0
    store = Store.open(str(tmp_path / "store"))
    assert store.info.protocols == tuple(PROTOCOLS) and all(all(s.present) for s in store.subjects)
    made = tmp_path / "out" / "malp_em" / "1001"
    assert sorted(path.name for path in made.iterdir()) == [
        "log.txt",
        "made.json",
        "malp_em.nii.gz",
        "malp_em_tissue.nii.gz",
    ]
    for name, folder in {"fsl_fast": "fsl_fast", "spm_tissue": "spm", "malp_em": "malp_em"}.items():
        found = brain.read(tmp_path / "out" / folder / "1002" / f"{name}.nii.gz")
        np.testing.assert_array_equal(found, brain.ids(name))
    expected = [
        "bet T1.nii.gz brain.nii.gz -R",
        "fast -t 1 -n 3 -o fast brain.nii.gz",
        "run_first_all -i T1.nii.gz -o first",
        "spm12 batch job.m",
        "malpem-proot -i T1.nii.gz -o malpem",
    ]
    assert called(maps) == expected * 2
    assert not list((tmp_path / "out").rglob(".*"))  # no working folder is left
    assert build.main(command(NAMES)) == 0 and "finished already" in capsys.readouterr().out
    assert called(maps) == expected * 2


def test_only_absent_maps_are_made_and_a_stripped_scan_is_not_stripped_again(maps: Path, command) -> None:
    (maps.parent / "programs" / "bet").unlink()
    script(maps.parent / "programs" / "fast", 'cp "$MAPS/fsl_fast.nii.gz" fast_seg.nii.gz')
    have = ("fsl_first", "spm_tissue", "malp_em", "malp_em_tissue")
    assert build.main(command(NAMES, "--stripped", protocols=have)) == 0
    assert called(maps) == ["fast -t 1 -n 3 -o fast T1.nii.gz"] * 2


def test_a_withdrawn_participant_is_shown_to_no_tool(maps: Path, command, tmp_path: Path) -> None:
    (tmp_path / "withdrawn.csv").write_text("1002\n")
    assert build.main(command("malp_em", f"--exclude={tmp_path / 'withdrawn.csv'}")) == 0
    assert [path.name for path in (tmp_path / "out" / "malp_em").iterdir()] == ["1001"]


def test_leading_words_stand_before_the_arguments_and_name_the_folder(maps: Path, command, tmp_path: Path) -> None:
    script(maps.parent / "programs" / "container", 'cd "$1" && shift && exec "$@"')
    assert build.main(command("fsl_first", "--tool", "fsl_first=container {folder}")) == 0
    assert called(maps)[0].split()[0] == "container" and called(maps)[0].endswith("run_first_all -i T1.nii.gz -o first")


FAULTS = {
    "fails": ("echo broken; exit 3", "ended with status 3"),
    "is killed": ("kill -9 $$", "ended with signal 9"),
    "lies": ("exit 0", "left 0 files"),
    "writes half": ('head -c 300 "$MAPS/fsl_first.nii.gz" > first_all_fast_firstseg.nii.gz', "E_"),
    "another grid": ('cp "$MAPS/small.nii.gz" first_all_fast_firstseg.nii.gz', "different grid"),
    "nothing in it": ('cp "$MAPS/empty.nii.gz" first_all_fast_firstseg.nii.gz', "is empty"),
    "unknown ids": ('cp "$MAPS/malp_em.nii.gz" first_all_fast_firstseg.nii.gz', "E_LABEL_SET"),
    "interpolated": ('cp "$MAPS/c1T1.nii" x.nii && gzip -c x.nii > first_all_fast_firstseg.nii.gz', "E_LABEL_FLOAT"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_A35_a_tool_that_fails_on_one_scan_costs_that_map_and_is_run_again(
    fault: str, maps: Path, command, tmp_path: Path, brain, capsys, caplog
) -> None:
    body, reason = FAULTS[fault]
    brain.write(maps / "small.nii.gz", brain.ids("fsl_first")[:-1])
    brain.write(maps / "empty.nii.gz", 0 * brain.ids("fsl_first"))
    first = "mkdir $MAPS/first 2> /dev/null"  # true for one scan
    good = PROGRAMS["run_first_all"]
    script(maps.parent / "programs" / "run_first_all", f"if {first}; then {body}; else {good}; fi")
    have = ("fsl_fast", "malp_em")
    assert build.main(command("fsl_first", protocols=have)) == 3
    said = capsys.readouterr().err + caplog.text
    assert (
        "1 of 2 runs of tools failed" in said and "W_TOOL" in said and reason in said and "row 2" in said
    )  # the first below the header
    assert "1001" not in said and "1002" not in said
    out = tmp_path / "out" / "fsl_first"
    assert sorted(path.name for path in out.iterdir()) == ["1001.log", "1002"]
    assert "$ run_first_all -i" in (out / "1001.log").read_text()
    assert not (tmp_path / "store" / "COMPLETE").exists()
    assert build.main(command("fsl_first", protocols=have)) == 0
    assert len(called(maps)) == 3 and sorted(path.name for path in out.iterdir()) == ["1001", "1002"]
    assert all(all(s.present) for s in Store.open(str(tmp_path / "store")).subjects)


def test_failures_that_may_be_rejected_cost_their_maps_only(maps: Path, command, tmp_path: Path) -> None:
    script(maps.parent / "programs" / "run_first_all", "exit 1")
    assert build.main(command("fsl_first", "--max-reject-fraction=1", protocols=("malp_em",))) == 0
    assert Store.open(str(tmp_path / "store")).info.protocols == ("malp_em",)


def test_A36_a_full_disk_ends_the_build_and_the_next_one_makes_the_rest(
    maps: Path, command, tmp_path: Path, small_disk, capsys
) -> None:
    """A scan, a map or a log has no room: no half of a map is ever taken for a whole one."""
    (tmp_path / "out").symlink_to(small_disk.folder)
    said = []
    for left in range(0, 2**19, 3 * 2**14):
        small_disk.leave(left)
        if (status := build.main(command("fsl_first", protocols=("malp_em",)))) == 0:
            break
        said.append(capsys.readouterr().err)
        assert status == 1 and "E_IO: cannot write" in said[-1] and "No space left on device" in said[-1]
        assert "1001" not in said[-1] and "Traceback" not in said[-1]
        assert not (tmp_path / "store" / "COMPLETE").exists()
        small_disk.free()
        assert not [path for path in (small_disk.folder / "fsl_first").glob("*") if path.suffix != ".log"]
    assert len(said) > 2
    small_disk.free()
    assert build.main(command("fsl_first", protocols=("malp_em",))) == 0
    assert all(all(s.present) for s in Store.open(str(tmp_path / "store")).subjects)


def test_A35_a_missing_program_is_named_before_any_runs(maps: Path, command, tmp_path: Path, capsys) -> None:
    (maps.parent / "programs" / "spm12").unlink()
    assert build.main(command("fsl_fast,spm")) == 1
    said = capsys.readouterr().err
    assert "--run-tools=spm needs the program spm12" in said and "--tool spm=" in said
    assert called(maps) == [] and not (tmp_path / "out").exists()


def test_A35_a_tool_that_hangs_is_ended_with_its_children(
    maps: Path, command, tmp_path: Path, monkeypatch, capsys, caplog
):
    """The child ignores being asked to end."""
    monkeypatch.setattr(process, "GRACE_S", 0.2)
    child = "sh -c 'trap \"\" TERM; echo $$ > $MAPS/child; while :; do sleep 0.1; done' & wait"
    script(maps.parent / "programs" / "run_first_all", child)
    given: Any = build._tools  # the least limit of the command line is too long for a test
    monkeypatch.setattr(build, "_tools", lambda options: dataclasses.replace(given(options), hours=0.5 / 3600))
    assert build.main(command("fsl_first", protocols=("malp_em",))) == 3
    assert "took longer than" in capsys.readouterr().err + caplog.text
    assert gone(int((maps / "child").read_text()))


def gone(pid: int) -> bool:
    """Tells whether a process has ended. It may still have to be waited for by its new parent."""
    for _ in range(400):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_interrupted_ends_its_tools_and_goes_on_when_repeated(
    number: signal.Signals, maps: Path, command, tmp_path: Path
) -> None:
    body = f"test -f $MAPS/go || (touch $MAPS/begun; exec sleep 60); {PROGRAMS['run_first_all']}"
    script(maps.parent / "programs" / "run_first_all", body)
    arguments = command("fsl_first", "--tool-jobs=2", protocols=("malp_em",))
    running = subprocess.Popen([sys.executable, "-m", "data_prep.build", *arguments], stderr=subprocess.PIPE)
    for _ in range(600):
        if (maps / "begun").exists():
            break
        time.sleep(0.1)
    time.sleep(0.3)
    running.send_signal(number)
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode not in (0, 3), errors
    assert not [path for path in (tmp_path / "out" / "fsl_first").iterdir() if path.suffix != ".log"]
    (maps / "go").touch()
    assert build.main(arguments) == 0
    assert len(Store.open(str(tmp_path / "store")).subjects) == 2


def test_a_killed_build_ends_its_tools_and_the_next_one_removes_their_folders(
    maps: Path, command, tmp_path: Path
) -> None:
    body = "sh -c 'echo $$ > $MAPS/child; exec sleep 60' & echo $$ > $MAPS/tool; wait"
    script(maps.parent / "programs" / "run_first_all", body)
    arguments = command("fsl_first", protocols=("malp_em",))
    running = subprocess.Popen([sys.executable, "-m", "data_prep.build", *arguments], stderr=subprocess.DEVNULL)
    started = [maps / "tool", maps / "child"]
    while not all(path.exists() and path.read_text() for path in started):
        assert running.poll() is None
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert all(gone(int(path.read_text())) for path in started)
    (left,) = (tmp_path / "out" / "fsl_first").glob(".*")
    assert re.fullmatch(r"\.[0-9a-f]{16}-\d+-\d+\.[0-9a-f]{32}", left.name)  # no participant
    script(maps.parent / "programs" / "run_first_all", PROGRAMS["run_first_all"])
    assert build.main(arguments) == 0
    assert not list((tmp_path / "out" / "fsl_first").glob(".*"))


def test_a_tool_that_ignores_being_asked_ends_with_a_killed_build(maps: Path, tmp_path: Path) -> None:
    """The program that waits for it is killed, and the shell that watches both is given one second."""
    body = "trap '' TERM; echo $$ > $MAPS/tool; while :; do sleep 0.1; done"
    script(tmp_path / "stubborn", body)
    code = (
        "import sys; from pathlib import Path; from data_prep.tools import process\n"
        "process.GRACE_S = 1.0; folder = Path(sys.argv[1])\n"
        "process.run([str(folder / 'stubborn')], folder, folder / 'log', 60)"
    )
    running = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    while not (maps / "tool").exists() or not (maps / "tool").read_text():
        assert running.poll() is None
        time.sleep(0.02)
    running.kill()
    running.wait()
    tool = int((maps / "tool").read_text())
    try:
        assert gone(tool)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(tool, signal.SIGKILL)


def test_only_folders_that_nobody_works_in_are_removed(maps: Path, command, tmp_path: Path) -> None:
    """Others may be at work in the same folder: here, or on a machine whose processes cannot be seen."""
    out, ours, old = tmp_path / "out" / "fsl_first", lease.this_process(), time.time() - 8 * 24 * 3600
    machine, pid, started = ours.split("-")
    kept = [f".{ours}.1", f".{'0' * 16}-{pid}-1.1", f".{'0' * 16}-{pid}-1.2", ".1001.7"]
    gone = [f".{machine}-{pid}-{int(started) - 1}.1", f".{machine}-999999999-1.1", f".{'0' * 16}-{pid}-1.3", ".1001.8"]
    for name in kept + gone:
        (out / name / "malpem").mkdir(parents=True)
        (out / name / "malpem" / "map.nii").touch()
    for name in (kept[2], *gone[2:]):
        for path in (out / name / "malpem" / "map.nii", out / name / "malpem", out / name):
            os.utime(path, (old, old))
    (out / kept[2] / "malpem" / "map.nii").touch()  # written now, in a folder that was made long ago
    assert build.main(command("fsl_first")) == 0
    assert sorted(path.name for path in out.glob(".*")) == sorted(kept)


def test_signals_are_what_they_were_when_tools_have_run() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with process.ending():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_changed_scan_or_command_is_run_again(maps: Path, command, tmp_path: Path, brain) -> None:
    arguments = command("malp_em")
    assert build.main(arguments) == 0 and len(called(maps)) == 2
    script(maps.parent / "programs" / "other", PROGRAMS["malpem-proot"])
    assert build.main([*arguments, "--tool", "malp_em=other"]) == 0  # the maps are the same
    assert len(called(maps)) == 4
    brain.write(tmp_path / "raw" / "0" / "T1.nii.gz", brain.head(7))
    build.main([*arguments, "--tool", "malp_em=other"])
    assert len(called(maps)) == 5


def test_spm_takes_the_most_probable_and_the_rest_is_background() -> None:
    csf, grey, white = np.array([[0.1, 0.5, 0.2, 0.1, 0.0], [0.1, 0.3, 0.5, 0.3, 0.0], [0.1, 0.1, 0.2, 0.6, 0.0]])
    assert from_spm(csf, grey, white).tolist() == [0, 1, 2, 3, 0]
    half = np.array([0.5])
    assert from_spm(half, half, 0 * half).tolist() == [1]  # of equals, CSF comes before grey matter


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--run-tools=freesurfer", "the tools are fsl_fast"),
        ("--run-tools=spm", "needs --tools-out"),
        ("--tool-jobs=2", "go with --run-tools"),
        ("--tool=spm", "it takes NAME=WORDS"),
    ],
)
def test_wrong_options_are_refused(option: str, said: str, tmp_path: Path, capsys) -> None:
    try:
        status = build.main([f"--manifest={tmp_path / 'none.csv'}", f"--store={tmp_path / 'store'}", option])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2 and said in capsys.readouterr().err
