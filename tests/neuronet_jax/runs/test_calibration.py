"""The calibration file of a run: it reads back as written, and every damage is reported."""

import json

import pytest

from neuronet_jax.errors import CodedWarning
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs import calibration as calibrations
from neuronet_jax.runs.calibration import QUALITY, Calibration, Line, Threshold, load_calibration, save_calibration


def test_the_file_round_trips_and_damage_is_reported(tmp_path):
    run = str(tmp_path)
    assert load_calibration(run, 3).describe() == "uncalibrated: the run has no quality.json"
    calibration = Calibration(
        3, 4, {"malp_em": Line(0.9, (0.01,) * PROTOCOLS["malp_em"].num_classes, 0.02)}, Threshold(0.7, 0, 4, 0.53)
    )
    save_calibration(run, calibration)
    assert load_calibration(run, 3) == calibration
    with pytest.warns(
        CodedWarning, match=rf"^W_UNCALIBRATED: .* to step 3, its weights .* 4: .* --run={run} --calibrate"
    ):
        stale = load_calibration(run, 4)
    assert stale.describe() == "uncalibrated: the run's quality.json belongs to step 3, its weights to step 4"
    path = tmp_path / QUALITY
    text = path.read_text()
    for damaged, message in (
        (text.replace('"heads": 4', '"heads": 9'), "checksum"),
        (text[: len(text) // 2], "cannot be used"),
        ("[]", "cannot be used"),
        ("{}", "sha256"),
    ):
        path.write_text(damaged)
        with pytest.warns(CodedWarning, match=message):
            assert load_calibration(run, 3).heads == 0
    newer = json.loads(text) | {"schema_version": 2}
    newer.pop("sha256")
    path.write_text(json.dumps({**newer, "sha256": calibrations._digest(newer)}))
    with pytest.warns(CodedWarning, match="schema version"):
        assert load_calibration(run, 3).heads == 0
