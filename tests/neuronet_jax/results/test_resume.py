import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuronet_jax.errors import NeuronetError
from neuronet_jax.images import nifti
from neuronet_jax.inference.segmentation import Segmentation
from neuronet_jax.results import resume as records
from neuronet_jax.results.bids import Target
from neuronet_jax.results.resume import Records, identify
from neuronet_jax.results.tables import Row
from neuronet_jax.results.write import write_results
from neuronet_jax.runs.provenance import Origin, Provenance

NAMES = ("fsl_fast", "fsl_first")
RECORDS = Records(Provenance((Origin("a", 1),), options={"posteriors": ("fsl_fast:GM",)}), NAMES)


@pytest.fixture
def head(tmp_path) -> Target:
    data = np.random.default_rng(0).integers(1, 900, (40, 45, 50)).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.diag([3.0, 3, 3, 1])), tmp_path / "a.nii.gz")
    return Target(tmp_path / "a.nii.gz", tmp_path / "out", "sub-a")


@pytest.fixture
def row(head) -> Row:
    """Returns the row of a scan that is complete by RECORDS."""
    volume = nifti.read_image(head.source)
    RECORDS.begin(head, identify(head.source))
    maps = {name: np.zeros(volume.data.shape, np.uint8) for name in NAMES}
    row = write_results(head, volume, Segmentation(maps, {}, {}), True, Provenance())
    RECORDS.complete(head, row)
    return row


def _reason(of: Records, head: Target) -> str:
    """Returns why results must not be replaced."""
    assert of.unfinished([head], overwrite=True) == ([head], {})
    with pytest.raises(NeuronetError, match="add --overwrite to replace them, or choose a different --out") as raised:
        of.unfinished([head], overwrite=False)
    return str(raised.value)


def test_an_empty_folder_is_all_to_do(head):
    assert RECORDS.unfinished([head], False) == ([head], {})


def test_complete_results_of_the_same_model_are_finished(head, row):
    for overwrite in (False, True):
        assert RECORDS.unfinished([head], overwrite) == ([], {"sub-a": row})


def test_a_copy_of_the_input_is_the_same_input(head, row, tmp_path):
    copy = tmp_path / "elsewhere" / "a.nii.gz"
    copy.parent.mkdir()
    shutil.copyfile(head.source, copy)
    os.utime(copy, (1, 1))
    assert RECORDS.unfinished([replace(head, source=copy)], False) == ([], {"sub-a": row})


def test_F09_a_different_input_of_the_same_size(head, row):
    content = bytearray(head.source.read_bytes())
    content[len(content) // 2] ^= 1
    head.source.write_bytes(bytes(content))
    assert "sub-a: its results come from a different input file" in _reason(RECORDS, head)


def test_F09_a_missing_input(head, row):
    head.source.unlink()
    assert "a different input file" in _reason(RECORDS, head)


@pytest.mark.parametrize("changes", [{"members": (Origin("a", 2),)}, {"options": {"flip": True}}])
def test_F09_a_different_model_or_different_options(head, row, changes):
    other = Records(replace(RECORDS.provenance, **changes), NAMES)
    assert "from a different model, different options or a different release" in _reason(other, head)


@pytest.mark.parametrize(("before", "now"), [("", "b"), ("a", "b"), ("a", "")])
def test_F09_a_different_calibration_is_named_as_the_reason(head, row, before, now):
    def calibrated(by: str) -> Records:
        return Records(replace(RECORDS.provenance, calibration_sha256=by), NAMES)

    calibrated(before).begin(head, identify(head.source))
    calibrated(before).complete(head, row)
    assert calibrated(before).unfinished([head], False) == ([], {"sub-a": row})
    assert "sub-a: its predicted Dice comes from a different calibration of the run" in _reason(calibrated(now), head)


def test_F09_a_different_release(head, row, monkeypatch):
    monkeypatch.setattr(records, "PROGRAM", "NeuroNet-JAX 99")
    assert "a different release" in _reason(RECORDS, head)


def test_F09_fewer_protocols_are_finished_and_more_are_not(head, row):
    assert Records(RECORDS.provenance, ("fsl_first",)).unfinished([head], False) == ([], {"sub-a": row})
    assert "results for fsl_fast, fsl_first only" in _reason(Records(RECORDS.provenance, (*NAMES, "malp_em")), head)


def test_F09_results_that_somebody_corrected_are_kept(head, row):
    head.labels("fsl_first").write_bytes(b"by hand")
    assert "sub-a_seg-fslfirst_dseg.nii.gz was changed since it was written" in _reason(RECORDS, head)


def test_F09_results_of_unknown_origin_are_kept(head, row):
    head.record.unlink()
    assert "sub-a_seg-fslfast_dseg.nii.gz exists and its origin is not recorded" in _reason(RECORDS, head)
    for text in ("{", "[]", '{"made": "elsewhere"}'):
        head.record.write_text(text)
        assert "sub-a_provenance.json cannot be read" in _reason(RECORDS, head)


def test_unfinished_or_removed_results_are_made_again(head, row):
    head.labels("fsl_fast").unlink()
    assert RECORDS.unfinished([head], False) == ([head], {})
    RECORDS.begin(head, identify(head.source))
    assert RECORDS.unfinished([head], False) == ([head], {})


def test_an_error_names_a_few_scans_and_counts_the_others(tmp_path):
    heads = [Target(tmp_path / f"{n}.nii", tmp_path, f"sub-{n}") for n in range(5)]
    for head in heads:
        head.folder.mkdir(parents=True)
        head.volumes.touch()
    with pytest.raises(NeuronetError, match=r"(?s)sub-0: .*sub-2: .*\n  and 2 more\nadd --overwrite"):
        RECORDS.unfinished(heads, False)


def test_A41_an_identity_holds_no_folder(head):
    identity = identify(head.source)
    assert set(identity) == {"file", "bytes", "modified_ns", "sha256"} and identity["file"] == "a.nii.gz"
    assert str(Path(head.source).parent) not in json.dumps(identity)
