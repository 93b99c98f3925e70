"""The report pages: their contents, that nothing in them can run, and that pictures show the correct side."""

import io
import re
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest

from neuronet_jax.codes import CODES
from neuronet_jax.evaluation import agreement, quality
from neuronet_jax.images import nifti
from neuronet_jax.images.space import Volume
from neuronet_jax.inference.segmentation import Confidence, Segmentation
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results import bids, reports, tables
from neuronet_jax.results.dataset import update_summary, write_cohort
from neuronet_jax.results.pictures import Slices, votes_colors
from neuronet_jax.results.write import write_results
from neuronet_jax.runs.provenance import Origin, Provenance

ATTACK = "<script>alert(1)</script>"
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])


def _volume(affine: np.ndarray = AFFINE) -> Volume:
    data = np.zeros((50, 60, 48), np.float32)
    data[10:40, 10:50, 10:40] = np.random.default_rng(0).uniform(500, 900, (30, 40, 30))
    return nifti.check_image(nib.Nifti1Image(data, affine))


def _result() -> Segmentation:
    tissue = np.zeros((50, 60, 48), np.uint8)
    tissue[12:38, 12:48, 12:38] = 2
    tissue[20:30, 20:40, 20:30] = 3
    spm = np.roll(tissue, 1, axis=0)
    first = np.where(tissue == 3, 16, 0).astype(np.uint8)
    maps = {"fsl_fast": tissue, "fsl_first": first, "spm_tissue": spm}
    sure = {name: Confidence(*np.full((4, PROTOCOLS[name].num_classes), 100.0)) for name in maps}
    return Segmentation(maps, sure, {})


def _write(out: Path, stem: str, provenance: Provenance, affine: np.ndarray = AFFINE) -> tables.Row:
    target = bids.Target(Path(f"{stem}{ATTACK}.nii.gz".replace("/", "")), out, stem)
    return write_results(target, _volume(affine), _result(), False, provenance)


def test_G05_names_and_provenance_never_become_markup(tmp_path):
    provenance = Provenance((Origin(ATTACK, note=f"demonstration {ATTACK}"),))
    row = _write(tmp_path, "sub-01", provenance)
    rejected = tables.Row(ATTACK, f"sub-{ATTACK}", "rejected", "E_CRC", ATTACK)
    update_summary(tmp_path, [row, rejected])
    write_cohort(tmp_path, provenance)
    cohort = (tmp_path / "report.html").read_text()
    head = (tmp_path / "sub-01" / "anat" / "sub-01_report.html").read_text()
    for page in (cohort, head):
        assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    compared = agreement.compare(_result().maps, AFFINE)
    strange = reports.ScanPage(ATTACK, _volume(), _result().maps, compared, quality.assess({}), (ATTACK,), Provenance())
    assert "<script" not in reports.render_scan(strange)
    assert "sub-01&lt;script&gt;" in cohort  # the input's name, as the user gave it


def test_pages_are_self_contained(tmp_path):
    rows = [_write(tmp_path, f"sub-0{number}", Provenance((Origin(note="demonstration"),))) for number in (1, 2)]
    update_summary(tmp_path, rows)
    write_cohort(tmp_path, Provenance((Origin(note="demonstration"),)))
    for path in tmp_path.rglob("*report.html"):
        page = path.read_text()
        assert not re.findall(r"https?:|@import|<link|url\(", page)
        assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
        assert "This model is a demonstration" in page
        for link in re.findall(r'href="([^"]*)"', page):
            assert (path.parent / link).is_file()
    head = (tmp_path / "sub-01" / "anat" / "sub-01_report.html").read_text()
    assert head.count('src="data:') == 1 + 3 + 1 + 1  # image, maps, votes, and the small one
    for text in (
        "Agreement on tissue",
        "uncalibrated",
        "W_BRAIN_VOLUME",
        CODES["W_BRAIN_VOLUME"].remedy,
        "BrainStem",
        "FSL FIRST (fsl_first)",
    ):
        assert text in head


def test_a_scan_can_be_compared_with_the_others_repeatedly(tmp_path):
    rows = [
        _write(tmp_path, f"sub-0{n}", Provenance(), np.diag([2.0, 2.0, 2.5 * n**0.1, 1.0])) for n in (1, 2, 3)
    ]  # each head larger than the one before
    pages = []
    for _ in range(2):
        update_summary(tmp_path, rows)
        write_cohort(tmp_path, Provenance())
        pages.append((tmp_path / "sub-02" / "anat" / "sub-02_report.html").read_text())
    assert pages[0] == pages[1] and pages[0].count("Comparison with the other scans in this folder") == 1
    assert "3 scans, including this one" in pages[0]
    table = tables.volumes_of(tmp_path)
    assert table.scans == ("sub-01", "sub-02", "sub-03") and len(table.columns) == 3 + 15 + 3
    white = table.of("fsl_fast", (3,))
    np.testing.assert_allclose(white, [10 * 20 * 10 * 4 * 2.5 * n**0.1 for n in (1, 2, 3)], rtol=1e-6)
    placed = reports._place("WM", "fsl_fast", white[1], white)
    assert placed["share"] == 0.5 and placed["dot"] == placed["tick"] and not placed["extreme"]


def test_unusual_volumes_are_listed_with_the_right_scan():
    values = np.full((12, 2), 1000.0) + np.arange(12)[:, None]
    values[7, 1] = 1500
    heads = tuple(f"sub-{n}" for n in range(12))
    found = reports._outliers(tables.Volumes(heads, ("fsl_fast.CSF", "malp_em.BrainStem"), values))
    assert [(row["scan"], row["name"], row["protocol"]) for row in found] == [("sub-7", "BrainStem", "malp_em")]
    # the others' deviations from their median of 1006 are 0 to 6, of which 3 is the median
    median = np.median(values[:, 1])
    spread = 1.4826 * np.median(np.abs(values[:, 1] - median))
    assert found[0]["z"] == pytest.approx((1500 - median) / spread) and found[0]["z"] > 80
    assert reports._outliers(tables.Volumes(heads[:9], ("a.b", "c.d"), values[:9])) == []  # too few to say


@pytest.mark.parametrize("turn", [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 0, 2), (-1, -1, 1))])
def test_left_is_left_and_up_is_up_in_any_orientation(turn):
    order, signs = turn
    labels = np.zeros((50, 60, 48), np.uint8)
    labels[10:14, 20:50, 30:40] = 1  # the subject's left (RAS+: small x), high up
    labels[36:40, 20:50, 10:20] = 2
    plain = Slices(_volume(), labels > 0).png(labels, np.array(votes_colors(2), float))
    flips = tuple(slice(None, None, sign) for sign in signs)
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for new, old in enumerate(order):  # voxel of the turned array → voxel of the plain one
        back[old, new] = signs[old]
        back[old, 3] = 0 if signs[old] > 0 else labels.shape[old] - 1
    turned = nib.Nifti1Image(np.ascontiguousarray(_volume().data[flips].transpose(order)), AFFINE @ back)
    there = np.ascontiguousarray(labels[flips].transpose(order))
    assert Slices(nifti.check_image(turned), there > 0).png(there, np.array(votes_colors(2), float)) == plain
    pixels = (matplotlib.image.imread(io.BytesIO(plain)) * 255).round()[..., :3]  # h w 3
    coronal = pixels[:, 104:204]  # after 100 mm of axial plane and its frame of 2 + 2 pixels
    one, two = (np.argwhere(np.argmax(coronal, -1) == channel) for channel in (0, 2))
    amber, blue = (np.argwhere(_is_like(coronal, color)) for color in votes_colors(2)[1:])
    assert amber[:, 1].mean() < 50 < blue[:, 1].mean()  # left on the left
    assert amber[:, 0].mean() < blue[:, 0].mean()  # higher is up
    assert len(one) and len(two)


def _is_like(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Returns a mask of the pixels where `color` lies over grey: the channels' differences are those of `color`, scaled
    by its opacity.
    """
    wanted = 0.6 * (np.array(color) - color[1])
    return (np.abs(pixels - pixels[..., 1:2] - wanted).max(axis=-1) < 3) & (pixels.max(axis=-1) > 0)
