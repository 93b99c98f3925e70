"""The page about a store: what it counts, what it shows, and that it names nobody."""

import numpy as np
import pytest

from data_prep import report
from data_prep.references import Score, write_scores
from neuronet_jax.files import Files
from neuronet_jax.store.reader import Store

SPLITS = ("train", "train", "validation", "", "train")  # the fourth was rejected; a third of malp_em is absent


@pytest.fixture
def store(make_store) -> Store:
    return Store.open(make_store(SPLITS)[0].dest)


def test_it_counts_maps_rejects_and_warnings_with_their_remedies_and_names_nobody(store, tmp_path, capsys) -> None:
    out = tmp_path / "page.html"
    assert report.main([f"--store={store.dest}", f"--out={out}", "--pictures=1"]) == 0
    page = " ".join(out.read_text().split())
    assert "4 scans, 3 protocols" in page and "No map has been scored" in page
    cells = page[page.index("<td>MALP-EM") :].replace('<td class="number">', " ").split()
    assert cells[1:5] == ["3", "3", "0", "1</tr>"]  # maps; of train and of validation; absent
    assert 'E_CRC<td class="number">1<td>' in page and "with <code>data_prep.build … --repair</code>" in page
    assert 'W_LABEL_MISSING<td class="number">1<td>' in page
    assert page.count("<img") == 1 and "deviate most" not in page
    for subject in store.subjects:
        assert subject.id not in page
    assert "rejected3" not in page and str(out) in capsys.readouterr().out


def test_the_worst_maps_come_first_and_dropped_ones_are_drawn_too(store) -> None:
    """Slot 2 has no malp_em: it was dropped after it was flagged."""
    nothing = float("nan")
    scores = [
        Score(0, "fsl_fast", 5.0, nothing, 0.1, nothing, flagged="volume"),
        Score(1, "fsl_fast", 0.1, 0.2, 0.3, 0.4),
        Score(2, "malp_em", 1.0, nothing, 9.0, 20.0, flagged="contrast,agreement"),
    ]
    write_scores(Files(store.dest), scores)
    worst = report._worst(store, scores)
    assert [(subject.slot, reasons) for subject, reasons in worst] == [
        (2, {"malp_em": "flagged: contrast,agreement"}),
        (0, {"fsl_fast": "flagged: volume"}),
    ]
    page = report.report(store, pictures=1)
    assert "deviate most" in page and page.count("<img") == 2
    assert page.index("slot 2") < page.index("drawn at random")


def test_the_seed_draws_the_heads(store) -> None:
    pages = [report.report(store, pictures=2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert pages[0] == pages[1] and len(set(pages)) > 1


def test_volumes_are_those_of_the_maps_and_bars_are_shares_of_the_highest(store) -> None:
    (volumes, *_) = [report._volumes_ml(store, subject) for subject in store.subjects]
    labels = store.read_labels(0, ["fsl_fast"])[0]
    assert volumes["fsl_fast"] == np.count_nonzero(labels) / 1000  # the fixture's affine has voxels of 1 mm³
    found = report.histogram("of these", "mm", [1.0, 1.0, 2.0, 5.0])
    assert found.shares[0] == 1 and found.shares[-1] == 0.5 and sum(found.shares) == 2
    assert (found.low, found.median, found.high, found.count) == ("1", "1.5", "5", 4)
