"""Compiled programs are kept in the user's chosen folder, or else in one for this processor."""

import platform
from pathlib import Path

import jax
import pytest

from neuronet_jax.runtime import keep_compiled


def folder() -> str | None:
    return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]: made at import


@pytest.fixture
def cache_setting():
    before = folder()
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("cache_setting")
def test_the_users_choice_stays_and_the_default_is_specific_to_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "/chosen")
    keep_compiled()
    assert folder() == "/chosen"
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled()
    default = Path(folder() or "")
    assert default.parent == tmp_path / "neuronet-jax"
    assert default.name.startswith(f"xla-{platform.machine()}-")
