"""The package as users install it: built without a network, imported from outside the repository."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import neuronet_jax

ROOT = Path(__file__).resolve().parents[1]


def _run(*command: object, cwd: Path, **environment: str) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < 77:
        pytest.skip(f"needs setuptools 77 to build, as the dev extra brings it; this is {version}")
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"  # building leaves files in the source's folder
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    shutil.copytree(
        ROOT, source, ignore=lambda at, names: {*ignored(at, names), *(["runs"] if at == str(ROOT) else [])}
    )
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-index", "--no-build-isolation")
    _run(*pip, "--no-deps", "--wheel-dir", folder, source, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_the_packages_their_data_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    information = f"neuronet_jax-{neuronet_jax.__version__}.dist-info"
    assert tops == {"neuronet_jax", "experiments", "data_prep", information}
    listed = subprocess.run(["git", "ls-files", *tops], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("needs git, which says what belongs to the packages")
    shell_scripts = {name for name in listed if name.startswith("experiments/launch/")}
    assert set(listed) - shell_scripts <= names
    assert f"{information}/licenses/LICENSE" in names


def test_the_installed_command_answers(wheel, tmp_path):
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps", "--target")
    _run(*pip, site, wheel, cwd=tmp_path)
    assert _run(site / "bin" / "neuronet", "--version", cwd=tmp_path, PYTHONPATH=str(site)) == (
        f"neuronet {neuronet_jax.__version__}\n"
    )
    code = "import neuronet_jax.labels as l; print(l.__file__, l.PROTOCOLS['malp_em'].num_classes)"
    where, classes = _run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert Path(where).is_relative_to(site) and classes == "139"


def test_citation_and_changelog_are_of_this_version():
    assert f"\nversion: {neuronet_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {neuronet_jax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_test_all_tests_the_versions_that_run_and_names_the_others(tmp_path):
    """A version manager leaves a stand-in for a version that it could install: it exists, and fails."""
    for name, script in {"python3.11": f'exec "{sys.executable}" "$@"', "python3.12": "exit 127"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    outermost = {"MAKEFLAGS": "", "MAKELEVEL": ""}  # else a make around this test adds the folders that it enters
    printed = _run("make", "test-all", "MAKE=echo", "PYTHON=none", cwd=ROOT, PATH=path, **outermost).splitlines()
    assert printed == ["test PYTHON=python3.11", "python3.12 is not installed here: its tests are left out."]


def test_importing_the_library_loads_nothing_heavy():
    """JAX takes seconds to import, but users may need only `--help` or the label tables."""
    code = """
import sys, neuronet_jax
assert {"segment", "restore", "Options"} <= set(dir(neuronet_jax))
print(*sorted({name.partition('.')[0] for name in sys.modules} & {"jax", "numpy", "nibabel", "flax", "orbax"}))
assert neuronet_jax.PROTOCOLS["malp_em"].num_classes == 139
print("jax" in sys.modules)
"""
    assert _run(sys.executable, "-c", code, cwd=ROOT).splitlines() == ["", "False"]


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that holds the installed wheel."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps", "--target")
    _run(*pip, folder, wheel, cwd=folder.parent)
    return folder


def _report_help(site: Path, cwd: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-m", "experiments.report", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def _package(folder: Path, *files: str) -> None:
    folder.mkdir()
    for name in files:
        (folder / name).write_text("")


def test_the_installed_programs_run_beside_nothing_of_their_names_without_a_word(site, tmp_path):
    _package(tmp_path / "experiments", "notes.txt")  # no Python in it: nothing is hidden
    process = _report_help(site, tmp_path)
    assert (process.returncode, process.stderr) == (0, "") and process.stdout.startswith("usage:")


def test_a_folder_that_an_installed_package_hides_is_named(site, tmp_path):
    _package(tmp_path / "experiments", "mine.py")
    for module, status in {"experiments.report": 0, "experiments.mine": 1}.items():
        command = [sys.executable, "-m", module, "--help"]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert process.returncode == status
        assert f"W_NAMESAKE: {tmp_path / 'experiments'} is hidden by {site / 'experiments'}" in process.stderr


def test_a_package_of_the_same_name_in_the_current_folder_is_refused(site, tmp_path):
    _package(tmp_path / "data_prep", "__init__.py")  # `python -m` looks in the current folder first
    process = _report_help(site, tmp_path)
    assert process.returncode == 1
    assert f"E_NAMESAKE: 'data_prep' must be the package in {site}" in process.stderr.splitlines()[-1]
    assert str(tmp_path / "data_prep") in process.stderr
    assert _report_help(site, tmp_path, "-P").returncode == 0  # as the message says


def test_files_that_a_different_distribution_replaced_are_noticed(site, tmp_path):
    mixed = tmp_path / "site"
    shutil.copytree(site, mixed)
    (mixed / "experiments" / "__init__.py").write_text("")
    command = [sys.executable, "-m", "experiments.report", "--run=a", "--eval=b", "--out=c"]
    environment = {**os.environ, "PYTHONPATH": str(mixed)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and "E_NAMESAKE" in process.stderr and "Traceback" not in process.stderr
