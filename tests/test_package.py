"""The package as others install it: built without a network, imported from elsewhere than the repository."""

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
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
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


def test_importing_the_library_loads_nothing_heavy():
    """JAX takes seconds to import; its users may only want `--help` or the label tables."""
    code = """
import sys, neuronet_jax
assert {"segment", "restore", "Options"} <= set(dir(neuronet_jax))
print(*sorted({name.partition('.')[0] for name in sys.modules} & {"jax", "numpy", "nibabel", "flax", "orbax"}))
assert neuronet_jax.PROTOCOLS["malp_em"].num_classes == 139
print("jax" in sys.modules)
"""
    assert _run(sys.executable, "-c", code, cwd=ROOT).splitlines() == ["", "False"]
