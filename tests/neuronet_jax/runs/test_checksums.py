"""The manifest of a checkpoint."""

import subprocess
from pathlib import Path

import pytest
from etils import epath

from neuronet_jax.runs.checksums import MANIFEST, damage, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    for name in ("state/array", "position.json"):
        (tmp_path / name).write_text(name)
    write_manifest(epath.Path(tmp_path))
    return tmp_path


def test_E03_a_file_that_was_added_counts_as_damage(folder: Path) -> None:
    """Orbax would read it: more than the saved arrays could come back."""
    assert damage(epath.Path(folder)) == ""
    (folder / "state" / "another").write_text("")
    assert damage(epath.Path(folder)) == "state/another is missing or not in the manifest"


def test_E03_a_line_that_was_removed_counts_as_damage(folder: Path) -> None:
    manifest = folder / MANIFEST
    manifest.write_text("".join(line for line in manifest.read_text().splitlines(True) if "array" not in line))
    assert damage(epath.Path(folder)) == "state/array is missing or not in the manifest"


def test_other_programs_read_it(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, check=True, capture_output=True)
