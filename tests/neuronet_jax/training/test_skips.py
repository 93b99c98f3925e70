"""The record of skipped updates, and the end of a run that has too many."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from neuronet_jax.training.skips import LEAST_STEPS, MOST_IN_A_ROW, Skips, TooManySkippedError


def add(skips: Skips, step: int, skipped: int, total: int, norm: float = 2.0) -> None:
    values = {"loss": 0.5, "gradient_norm": norm, "skipped": skipped, "skipped_total": total, "more": 1.0}
    batch = {"slot": np.array([step, 7], np.int32), "start": np.full((2, 3), step, np.int32)}
    skips.add(step, {name: jnp.float32(value) for name, value in values.items()}, batch)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def test_D01_the_batch_of_each_skipped_update_is_recorded(tmp_path):
    skips = Skips(tmp_path)
    for step, skipped in ((1, 0), (2, 1), (3, 0), (4, 1), (5, 2)):
        add(skips, step, skipped, total=0, norm=np.nan if step == 4 else 2.0)
    assert not (tmp_path / "skipped.jsonl").exists()  # nothing waits for a step before the metrics are read
    skips.look()
    skips.look()  # nothing new
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 5]
    assert lines(tmp_path)[1] == {
        "step": 4,
        "loss": 0.5,
        "gradient_norm": None,
        "slots": [4, 7],
        "starts": [[4, 4, 4], [4, 4, 4]],
    }


def test_the_message_counts_in_words_that_agree(tmp_path, caplog):
    skips = Skips(tmp_path)
    for step, skipped in ((1, 1), (2, 0), (3, 1), (4, 2)):
        add(skips, step, skipped, total=0)
        if step in (2, 4):
            skips.look()
    one, two = caplog.messages
    assert one.startswith("1 update skipped up to step 2: ") and two.startswith("2 updates skipped up to step 4: ")


def test_a_batch_that_is_used_again_is_recorded_as_it_was(tmp_path):
    skips, slot = Skips(tmp_path), np.array([3], np.int32)
    metrics = {name: jnp.float32(1) for name in ("loss", "gradient_norm", "skipped", "skipped_total")}
    skips.add(1, metrics, {"slot": slot, "start": np.zeros((1, 3), np.int32)})
    slot[:] = 9
    skips.look()
    assert lines(tmp_path)[0]["slots"] == [3]


def test_resuming_drops_steps_that_will_run_again(tmp_path):
    skips = Skips(tmp_path)
    for step in (1, 2, 3):
        add(skips, step, skipped=1, total=step)
    skips.look()
    with (tmp_path / "skipped.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')
    Skips(tmp_path, resume_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_D01_too_many_in_a_row_end_the_run_even_if_it_recovered_since(tmp_path):
    skips = Skips(tmp_path)
    for step in range(1, MOST_IN_A_ROW + 1):
        add(skips, step, skipped=step, total=step)
    skips.look()  # as many as are tolerated
    add(skips, MOST_IN_A_ROW + 1, skipped=MOST_IN_A_ROW + 1, total=MOST_IN_A_ROW + 1)
    add(skips, MOST_IN_A_ROW + 2, skipped=0, total=MOST_IN_A_ROW + 1)
    with pytest.raises(TooManySkippedError, match="11 updates in a row were skipped up to step 12"):
        skips.look()
    assert len(lines(tmp_path)) == MOST_IN_A_ROW + 1


def test_D18_too_large_a_share_ends_the_run(tmp_path):
    skips = Skips(tmp_path)
    add(skips, LEAST_STEPS - 1, skipped=0, total=50)
    skips.look()  # too early to tell
    add(skips, 200, skipped=0, total=20)
    skips.look()
    add(skips, 201, skipped=1, total=21)
    with pytest.raises(TooManySkippedError, match="21 of the first 201 updates were skipped"):
        skips.look()


def test_D12_a_record_that_cannot_be_written_is_reported_once(tmp_path, caplog):
    (tmp_path / "run").write_text("a file where the folder should be")
    skips = Skips(tmp_path / "run")
    for step in (1, 2):
        add(skips, step, skipped=1, total=step)
        skips.look()
    assert sum("skipped.jsonl cannot be written" in message for message in caplog.messages) == 1
