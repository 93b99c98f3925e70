"""A profile of some steps, by JAX's own profiler."""

import jax.numpy as jnp
import pytest

from neuronet_jax.errors import NeuronetError
from neuronet_jax.training import profile as module
from neuronet_jax.training.profile import Profile


def steps(profile: Profile, count: int = 5) -> None:
    for step in range(1, count + 1):
        profile.before(step)
        profile.after(step, jnp.ones(3) * step)
    profile.close()


def test_a_real_profile_is_written(tmp_path, caplog):
    steps(Profile(tmp_path, (2, 3)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "the profile of the steps 2 to 3 is in" in caplog.text


@pytest.mark.parametrize(("asked", "process"), [(None, 0), ((2, 3), 1), ((9, 10), 0)])
def test_no_profile_unless_asked_in_the_first_process_and_reached(tmp_path, asked, process):
    steps(Profile(tmp_path, asked, process))
    assert not (tmp_path / "profile").exists()


def test_a_run_that_ends_early_ends_its_profile(tmp_path):
    steps(Profile(tmp_path, (2, 99)))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profiler_that_fails_stops_nothing(tmp_path, caplog, monkeypatch):
    def fail(*_):
        raise RuntimeError("only one profile may be run at a time")

    monkeypatch.setattr(module.jax.profiler, "start_trace", fail)
    steps(Profile(tmp_path, (2, 3)))
    assert caplog.messages == ["no profile: only one profile may be run at a time"]


def test_a_profile_needs_a_disk():
    with pytest.raises(NeuronetError, match="profile_steps needs a --workdir on a disk"):
        Profile("gs://bucket/run", (1, 2))
