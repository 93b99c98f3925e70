import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate, report
from experiments.flags import load
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation import quality, scoring
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.runs.calibration import QUALITY, load_calibration
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Origin
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import PAINTED, Record, Subject, sample_foreground
from neuronet_jax.store.writer import StoreWriter

GRID = (36, 40, 33)
NAMES = ("fsl_fast", "fsl_first", "spm_tissue")  # of the store; the model predicts the first two
AFFINE = tuple(tuple(row) for row in np.diag([2.0, 2, 2, 1]).tolist())


def _record(slot: int, split: str, present: tuple[bool, ...]) -> Record:
    image = np.zeros(GRID, np.float32)
    image[10:20, 10:20, 10:20] = 500  # predicted as class 1 of both protocols: 1,000 voxels
    labels = np.zeros((3, *GRID), np.uint8)
    labels[0, 10:20, 10:20, 10:20] = 1
    labels[1, 10:20, 10:20, 10:15] = 1  # half of it: Dice 2·500 / (500 + 1000)
    labels[1, 10:20, 10:20, 15:20] = 2  # never predicted: Dice 0
    subject = Subject(
        slot, f"person{slot}", split, present, float(image.mean()), float(image.std()),
        GRID, AFFINE, AFFINE, GRID, (0, 0, 0),
    )  # fmt: skip
    return Record(image, labels, sample_foreground(labels, present, seed=slot), subject)


@pytest.fixture
def store(tmp_path) -> Store:
    dest = str(tmp_path / "store")
    writer = StoreWriter.create(
        dest, protocols=NAMES, grid=GRID, voxel_size_mm=2.0, slots=4, shard_subjects=4, provenance={"note": "a test"}
    )
    absent = (True, False, True)
    records = [
        _record(0, "test", (True, True, True)),
        _record(1, "train", (True, True, True)),
        _record(2, "test", absent),
        _record(3, "test", (True, True, True)),
    ]
    writer.write_shard(0, records)
    writer.finalize([record.subject for record in records], [])
    return Store.open(dest)


@pytest.fixture
def model(store, threshold_network) -> Model:
    config = replace(load("tissue:demo"), protocols=NAMES[:2])
    return Model(threshold_network, config, 2.0, Origin("tissue:demo", 7, store.info.split_hash))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_every_subject_of_the_split_is_scored_once(model, store, tmp_path):
    summaries = evaluate.evaluate(model, store, "test", tmp_path / "out").dice
    assert (summaries["fsl_fast"].mean, summaries["fsl_fast"].subjects) == (1.0, 3)
    first = summaries["fsl_first"]  # of the 15 structures, two are in the maps: Dice 2/3 and 0
    assert (first.mean, first.minimum, first.sd, first.subjects) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 0, 2)

    rows = _rows(tmp_path / "out" / "dice.tsv")
    assert tuple(rows[0]) == evaluate.COLUMNS
    assert len(rows) == 3 * 3 + 2 * 15  # foreground only; subject 2 has no fsl_first map
    assert [row["subject"] for row in rows if row["protocol"] == "fsl_first"] == ["person0"] * 15 + ["person3"] * 15
    by_name = {row["name"]: row for row in rows if row["protocol"] == "fsl_first" and row["subject"] == "person0"}
    one, two, three = (by_name[structure.name] for structure in PROTOCOLS["fsl_first"].structures[1:4])
    assert (one["index"], one["dice"], one["reference_voxels"], one["predicted_voxels"]) == (
        "10", "0.666667", "500", "1000",
    )  # fmt: skip
    assert (float(two["dice"]), two["reference_voxels"], two["predicted_voxels"]) == (0, "500", "0")
    assert math.isnan(float(three["dice"]))  # in neither map

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["protocols"]["fsl_fast"] == {"mean": 1.0, "sd": 0.0, "minimum": 1.0, "subjects": 3}
    assert summary["note"] == "a test"


def test_A41_only_dice_tsv_names_subjects(model, store, tmp_path, capsys):
    evaluate.evaluate(model, store, "test", tmp_path / "out")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "dice": 0.5}\n')
    report.report(str(tmp_path), tmp_path / "out", tmp_path / "out" / "report.html")
    for path in (tmp_path / "out").rglob("*"):
        assert "person" not in path.name
        if path.is_file() and path.name != "dice.tsv":
            assert b"person0" not in path.read_bytes()
    said = capsys.readouterr()
    assert "person" not in said.out + said.err


def test_pictures_show_the_first_subjects(model, store, tmp_path):
    evaluate.evaluate(model, store, "test", tmp_path / "out")
    pictures = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert pictures == ["head1.png", "head1_fsl_fast.png", "head1_fsl_first.png", "head2.png", "head2_fsl_fast.png"]


def test_surfaces_add_two_columns_and_count_missed_structures(model, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "restore", lambda run: model)
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "out"
    assert evaluate.main(["--run=x", f"--store={store.dest}", f"--out={out}", "--surfaces"]) == 0
    rows = _rows(out / "dice.tsv")
    assert tuple(rows[0]) == (*evaluate.COLUMNS, *evaluate.SURFACE_COLUMNS)
    mine = {row["name"]: row for row in rows if (row["protocol"], row["subject"]) == ("fsl_first", "person0")}
    one, two, three = (mine[structure.name] for structure in PROTOCOLS["fsl_first"].structures[1:4])
    assert float(one["hd95_mm"]) == 10.0  # the prediction extends five voxels of 2 mm beyond the reference
    assert 0.5 < float(one["nsd"]) < 1
    assert (two["hd95_mm"], two["nsd"]) == ("inf", "0.000000")  # never predicted
    assert (three["hd95_mm"], three["nsd"]) == ("nan", "nan")
    summary = json.loads((out / "summary.json").read_text())
    assert summary["surfaces"]["fsl_fast"] == {"hd95_mm": 0.0, "nsd": 1.0, "missed": 0, "subjects": 3}
    assert summary["surfaces"]["fsl_first"]["missed"] == 2 and summary["nsd_tolerance_mm"] == 2.0
    assert summary["surfaces"]["fsl_first"]["hd95_mm"] is None  # half of them are infinite, and so is the median
    assert "missed structures" in capsys.readouterr().out
    before = (out / "dice.tsv").read_bytes()
    again = ["--run=x", f"--store={store.dest}", f"--out={out}"]
    assert evaluate.main(again) == 1  # it would have fewer columns
    assert "holds an evaluation already (dice.tsv): add --overwrite" in capsys.readouterr().err
    assert (out / "dice.tsv").read_bytes() == before
    assert report.main([f"--run={tmp_path}", f"--eval={out}", f"--out={tmp_path / 'report.html'}"]) == 0
    assert evaluate.main([*again, "--overwrite"]) == 0 and (out / "dice.tsv").read_bytes() != before
    assert "surface Dice at 2.0 mm" in (tmp_path / "report.html").read_text()


def test_calibrate_writes_the_fit_to_the_validation_subjects(model, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "restore", lambda run: model)
    command = [f"--run={tmp_path}", f"--store={store.dest}", "--calibrate"]
    assert evaluate.main(command) == 1 and "no subject in its validation split" in capsys.readouterr().err
    monkeypatch.setattr(Store, "split", lambda store, name: [store.subjects[0], store.subjects[2]])
    assert evaluate.main(command) == 0
    assert "calibrated on 2 validation subjects, too few for a threshold" in capsys.readouterr().out
    found = load_calibration(str(tmp_path), 7)
    assert found is not None and found.heads == 2 and set(found.lines) == {"fsl_fast", "fsl_first"}
    # the only subject with this reference: half of the prediction is right, and a line fits that except for the prior
    line = found.lines["fsl_first"]
    (sample,) = [scoring._sample(model, store, store.subjects[n])[0] for n in (0,)]
    expected, true = sample["fsl_first"]
    assert true[1] == pytest.approx(2 / 3) and true[2] == 0
    calibrated = quality._predict(line, expected)
    assert abs(calibrated[1] - true[1]) < abs(expected[1] - true[1])
    assert "person" not in (tmp_path / QUALITY).read_text()
    assert found.volumes == {}  # two subjects are too few for the intervals of volumes, ten are enough
    monkeypatch.setattr(Store, "split", lambda store, name: [store.subjects[0]] * 10)
    assert evaluate.main(command) == 0
    spread = load_calibration(str(tmp_path), 7).volumes["fsl_fast"]
    assert spread.coverage == 1.0 and spread.half_widths == (0.0,)  # the network's volume is always the reference's


def test_painted_heads_set_the_threshold_too_but_not_the_volumes(model, store, tmp_path, monkeypatch):
    """A run's further store is painted: its heads are drawn, and count for predicted Dice alone."""
    slots = 3
    writer = StoreWriter.create(
        str(tmp_path / "painted"),
        protocols=NAMES,
        grid=GRID,
        voxel_size_mm=2.0,
        slots=slots,
        shard_subjects=slots,
        provenance={"image": PAINTED},
    )
    records = [_record(slot, "train" if slot == 2 else "validation", (True, True, True)) for slot in range(slots)]
    records = [replace(r, image=np.where(r.image > 0, r.image, -1).astype(np.float32)) for r in records]
    writer.write_shard(0, records)
    writer.finalize([record.subject for record in records], [])
    painted = Store.open(writer.dest)
    given, volumes, segment_volume = [], [], scoring.segment_volume
    monkeypatch.setattr(scoring, "segment_volume", lambda m, volume: given.append(volume) or segment_volume(m, volume))
    monkeypatch.setattr(scoring.intervals, "fit", lambda measured: volumes.extend(measured) or {})
    scans = [(store, subject) for subject in store.subjects[:1]]
    calibration = scoring.calibrate_on(model, [*scans, *scoring.validation_of([store, painted])])
    assert calibration.heads == 3 and calibration.threshold is not None
    assert len(volumes) == 1  # the scan's
    for volume, record in zip(given[1:], records, strict=False):
        np.testing.assert_allclose(volume.data[10:20, 10:20, 10:20], record.image[10:20, 10:20, 10:20], rtol=1e-5)
        assert volume.data.min() >= 0  # the first tissue in place of its number


def test_A31_a_run_is_not_calibrated_on_a_further_store_with_a_withdrawn_participant(
    model, store, make_store, tmp_path, monkeypatch, capsys
):
    further, _ = make_store(("validation",), dest=str(tmp_path / "further"))
    data = replace(model.config.data, store=store.dest, stores=(further.dest,), weights=(1.0, 1.0))
    mixed = replace(model, config=replace(model.config, data=data))
    monkeypatch.setattr(evaluate, "restore", lambda run: mixed)
    (tmp_path / "withdrawn.csv").write_text("subject0\n")
    command = [f"--run={tmp_path}", "--calibrate", f"--exclude={tmp_path / 'withdrawn.csv'}"]
    assert evaluate.main(command) == 1
    assert f"E_WITHDRAWN: {further.dest} holds 1 of the participants" in capsys.readouterr().err
    assert not (tmp_path / QUALITY).exists()


def test_refusals_say_what_to_change(model, store, tmp_path):
    with pytest.raises(NeuronetError, match="no subject in its validation split"):
        evaluate.evaluate(model, store, "validation", tmp_path)
    with pytest.raises(NeuronetError, match="the run was trained on 1"):
        evaluate.evaluate(replace(model, voxel_size_mm=1.0), store, "test", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NeuronetError, match="choose a different --out"):
        evaluate.evaluate(model, store, "test", tmp_path / "file")


def test_a_different_split_gives_a_warning(model, store, tmp_path, caplog):
    evaluate.evaluate(replace(model, origin=Origin()), store, "train", tmp_path / "out")
    assert "differ from the run's" in caplog.text


def test_main_prints_the_table(model, store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "restore", lambda run: model)
    monkeypatch.setenv("COLUMNS", "120")
    assert evaluate.main(["--run=x", f"--store={store.dest}", f"--out={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "1.0000 ± 0.0000 [1.000]" in out and "0.3333 ± 0.0000 [0.333]" in out and "FSL FIRST" in out
    assert evaluate.main(["--run=x", f"--store={tmp_path}", f"--out={tmp_path / 'out'}"]) == 1


def test_the_report_is_self_contained(model, store, tmp_path):
    evaluate.evaluate(model, store, "test", tmp_path / "out")
    assert report.main([f"--run={tmp_path}", f"--eval={tmp_path / 'out'}", f"--out={tmp_path / 'report.html'}"]) == 0
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 5 and "http" not in html
    assert "1.000 ± 0.000" in html and "a test" in html
    assert 'background: #4076bf"></span>CSF, Ventricles<' in html  # one legend for all tissue maps
    assert PROTOCOLS["fsl_first"].structures[2].name in html  # the hardest one
    assert report.main([f"--run={tmp_path}", f"--eval={tmp_path / 'no'}", f"--out={tmp_path / 'r.html'}"]) == 1


def test_G05_the_report_escapes_the_content_of_files(model, store, tmp_path):
    evaluate.evaluate(model, store, "test", tmp_path / "out")
    attack = "<script>alert(1)</script>"
    table = tmp_path / "out" / "dice.tsv"
    hardest = PROTOCOLS["fsl_first"].structures[2].name
    table.write_text(table.read_text().replace("person0", attack).replace(hardest, attack))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    summary["note"] = attack
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    report.report(str(tmp_path), tmp_path / "out", tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2
