"""The wall-clock time of a run, by what it was spent on."""

import contextlib

import pytest

from neuronet_jax.training.goodput import KINDS, Goodput


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_every_second_counts_once_for_the_innermost_block():
    clock = Clock()
    spent = Goodput(clock)
    clock.now_s += 1  # other
    with spent.on("evaluate"):
        clock.now_s += 2
        with spent.on("save"):
            clock.now_s += 4
            with spent.on("evaluate"):
                clock.now_s += 8
        clock.now_s += 16
    with spent.on("step"):
        clock.now_s += 32
    clock.now_s += 64
    expected = dict.fromkeys(KINDS, 0.0) | {"evaluate": 26.0, "save": 4.0, "step": 32.0, "other": 65.0}
    assert spent.seconds() == expected
    assert sum(expected.values()) == clock.now_s - 100
    assert spent.metrics()["goodput"] == pytest.approx(32 / 127)
    assert spent.metrics()["seconds/save"] == 4.0
    assert spent.describe().startswith("time: other 65.0 s (51 %), step 32.0 s (25 %), evaluate 26.0 s (20 %), save")


def test_time_is_counted_in_a_block_that_is_still_open_and_in_one_that_raised():
    clock = Clock()
    spent = Goodput(clock)
    with contextlib.suppress(KeyError), spent.on("input"):
        clock.now_s += 3
        raise KeyError
    with spent.on("step"):
        clock.now_s += 5
        assert spent.seconds()["step"] == 5 and spent.seconds()["input"] == 3
        clock.now_s += 1
    assert spent.seconds()["step"] == 6 and spent.seconds()["other"] == 0


def test_a_run_without_time_has_no_goodput():
    assert Goodput(Clock()).metrics()["goodput"] == 0.0
