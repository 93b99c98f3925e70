"""The report pages: their contents, that nothing in them can run, and that pictures show the correct side."""

import io
import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from experiments.flags import load
from neuronet_jax.cli import main
from neuronet_jax.codes import CODES
from neuronet_jax.evaluation import agreement, quality, volumetry
from neuronet_jax.images import intensity, nifti
from neuronet_jax.images.space import Volume
from neuronet_jax.inference.segmentation import Confidence, Segmentation
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.models.readout import Readout
from neuronet_jax.results import bids, cohort_page, reports, scan_page, tables
from neuronet_jax.results.dataset import update_summary, write_cohort
from neuronet_jax.results.mosaic import AXIAL, CORONAL, SAGITTAL, Mosaic, axis_codes
from neuronet_jax.results.pictures import colors_of, votes_colors
from neuronet_jax.results.reports import ml
from neuronet_jax.results.write import write_results
from neuronet_jax.runs import restore as restoring
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import Origin, Provenance
from tests.browser import browser

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
    first[20:25][first[20:25] > 0] = 17  # half brain stem, half left hippocampus
    maps = {"fsl_fast": tissue, "fsl_first": first, "spm_tissue": spm}
    sure = {name: Confidence(*np.full((4, PROTOCOLS[name].num_classes), 100.0)) for name in maps}
    return Segmentation(maps, sure, {})


def _write(out: Path, stem: str, provenance: Provenance, affine: np.ndarray = AFFINE) -> tables.Row:
    target = bids.Target(Path(f"{stem}{ATTACK}.nii.gz".replace("/", "")), out, stem)
    return write_results(target, _volume(affine), _result(), False, provenance, command="--run=mine")


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
    strange = scan_page.ScanPage(
        ATTACK,
        _volume(),
        _result().maps,
        volumetry.volumes_mm3(volumetry.voxel_counts(_result().maps), AFFINE),
        compared,
        quality.assess({}),
        (ATTACK,),
        Provenance(),
        {},
        ATTACK,
        ATTACK,
        ATTACK,
    )
    assert "<script" not in scan_page.render_scan(strange)[0]
    assert "sub-01&lt;script&gt;" in cohort  # the input's name, as the user gave it


def test_pages_are_self_contained(tmp_path):
    rows = [_write(tmp_path, f"sub-0{number}", Provenance((Origin(note="demonstration"),))) for number in (1, 2)]
    update_summary(tmp_path, rows)
    write_cohort(tmp_path, Provenance((Origin(note="demonstration"),)))
    for path in tmp_path.rglob("*report.html"):
        page = path.read_text()
        assert not re.findall(r"https?:|@import|<link|url\(", page)
        assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', page))
        assert "About this model: demonstration" in page
        for link in re.findall(r'href="([^"]*)"', page):
            assert (path.parent / link.partition("#")[0]).is_file()
    head = (tmp_path / "sub-01" / "anat" / "sub-01_report.html").read_text()
    slices = 4 * 6  # three planes and the deep structures
    assert head.count('src="data:') == slices * (1 + 2 * (3 + 1))  # the image; three maps and the votes, in two styles
    assert head.count("<b>L</b><b>R</b>") == 3 * 6 and head.count("<b>P</b><b>A</b>") == 6
    origin = ("50 × 60 × 48 voxels", "2 × 2 × 2.5 mm", "RAS", "neuronet segment sub-01&lt;script&gt;", "--run=mine")
    assert all(text in head for text in origin)
    for text in (
        "Agreement on tissue",
        "uncalibrated",
        "W_BRAIN_VOLUME",
        CODES["W_BRAIN_VOLUME"].remedy,
        "BrainStem",
        "FSL FIRST (fsl_first)",
        "brain volume",
        "intracranial volume",
        "BrainStem</span>",  # the legend
    ):
        assert text in head


def test_a_person_switches_layers_and_reads_on_a_phone(run, heads, tmp_path):
    """The pages of a command with three scans, one of them rejected and one labelled apart from the brain."""
    out, loose = tmp_path / "out", nib.Nifti1Image.from_filename(heads / "a.nii.gz")
    data = np.asarray(loose.dataobj).copy()
    data[20:30, 20:30, 58:62] = 900  # apart from the brain
    nib.save(nib.Nifti1Image(data, loose.affine), heads / "e.nii.gz")
    assert main(["segment", *(str(heads / f"{name}.nii.gz") for name in "abe"), run, f"--out={out}"]) == 3
    visible = (
        "[...document.querySelectorAll('.tile:first-of-type .layer')].filter(i => i.offsetWidth).map(i => i.className)"
    )
    with browser(tmp_path) as tab:
        for path in (out / "report.html", out / "sub-e" / "anat" / "sub-e_report.html"):
            for width in (400, 1280):
                tab.open(path.as_uri(), width=width)
                assert tab.run("document.documentElement.scrollWidth") <= width
            if path.name == "report.html":
                assert tab.run("document.querySelector('h1').innerText") == "2 of 3 scans segmented"
                assert tab.run("[...document.querySelectorAll('table.scans tr[id]')].map(r => r.id)")[0] == "sub-b"
                dots = tab.run("[...document.querySelectorAll('circle title')].map(t => t.textContent)")
                assert any(text.startswith("sub-a: ") for text in dots) and len(dots) > 3
                assert tab.run("[...document.querySelectorAll('.thumbs img')].every(i => i.naturalWidth > 100)")
                tab.run("document.querySelectorAll('.scans .name').forEach(n => { n.innerText = 'long'.repeat(9) })")
                assert width == 400 or tab.run("document.querySelector('.scans .bad').offsetHeight") < 90  # 4 lines
        tab.run("document.images[0].decode()")
        assert tab.run("[...document.querySelectorAll('.tile')].every(t => t.querySelectorAll('b').length === 2)")
        text = tab.run("document.body.innerText")
        told = ("60 × 70 × 64 voxels", "2 × 2 × 2 mm", "LAS", "neuronet segment e.nii.gz", "segmented on", "version")
        assert [one for one in told if one not in text] == []
        assert set(tab.run(visible)) == {"layer fsl_fast contour"}
        wide = tab.run("document.querySelector('.tile').offsetWidth")
        for key in ("show-fsl_first", "filled", "large"):
            tab.run(f"document.querySelector('label[for={key}]').click()")
        assert set(tab.run(visible)) == {"layer fsl_first fill"}
        assert tab.run("document.querySelector('.tile').offsetWidth") > wide
        shown = "[...document.querySelectorAll('p.legend')].filter(p => p.offsetWidth).map(p => p.innerText)"
        (legend,) = tab.run(shown)
        assert "LeftThalamusProper" in legend
        tab.run("document.querySelector('label[for=show-none]').click()")
        assert tab.run(visible) == tab.run(shown) == []


# What a head consists of: brightness and place, in voxels of 2 mm. The later lie within the earlier ones, and the
# thalami, the brightest, are far from the middle.
_PARTS: dict[str, tuple[float, tuple[slice, ...]]] = {
    "sulci": (100.0, np.s_[6:54, 8:62, 6:58]),
    "cortex": (200.0, np.s_[8:52, 10:60, 8:56]),
    "ventricle": (150.0, np.s_[28:32, 30:40, 30:40]),
    "left thalamus": (300.0, np.s_[34:46, 14:26, 12:22]),
    "right thalamus": (400.0, np.s_[14:26, 14:26, 12:22]),
}
_FAST = ("CSF", "CSF", "GM", "WM", "WM")
_LEVELS: dict[str, tuple[str, ...]] = {  # by rising brightness: sulci, ventricle, cortex, left and right thalamus
    "fsl_fast": _FAST,
    "fsl_first": ("", "", "", "LeftThalamusProper", "RightThalamusProper"),
    "spm_tissue": _FAST,
    "malp_em": ("", "3rdVentricle", "BrainStem", "LeftThalamusProper", "RightThalamusProper"),
    "malp_em_tissue": ("", "Ventricles", "CorticalGM", "DeepGM", "DeepGM"),
}


@pytest.fixture
def run_of_all(monkeypatch, tmp_path, threshold_network) -> str:
    """Returns the option `--run` of a run of all protocols that names the parts of the head in `tmp_path / "a.nii"`."""
    image = np.zeros((60, 70, 64), np.int16)
    for brightness, place in _PARTS.values():
        image[place] = brightness
    image[image > 0] += np.random.default_rng(0).integers(-10, 10, np.count_nonzero(image), np.int16)
    nib.save(nib.Nifti1Image(image, np.diag([-2.0, 2, 2, 1])), tmp_path / "a.nii")
    found = intensity.statistics(image)
    limits = [(raw - found.mean) / found.std for raw in (50.0, 125.0, 175.0, 250.0, 350.0)]
    slopes, bias = [], []
    for name, levels in _LEVELS.items():  # the highest line at each brightness is that of the class there
        classes = {s.name: s.index for s in PROTOCOLS[name].structures}
        slope, height = np.zeros(len(classes)), np.full(len(classes), -1e3)
        steps = [(0, 0.0, 0.0)]
        for level, limit in zip(levels, limits, strict=True):
            index, steep, low = steps[-1]
            if level and classes[level] != index:
                steps.append((classes[level], steep + 1, low - limit))
        for index, steep, low in steps:
            slope[index], height[index] = steep, low
        slopes, bias = [*slopes, *slope], [*bias, *height]

    class Levels(type(threshold_network)):
        def readout(self) -> Readout:
            lines = jnp.asarray(slopes, jnp.float32)[None]  # c k
            heights = jnp.asarray(bias, jnp.float32)
            return Readout([lines, 0 * lines], [heights, 0 * heights])

    model = Model(Levels(), replace(load("tissue:demo"), protocols=tuple(PROTOCOLS)), 2.0, Origin("test"))
    monkeypatch.setattr(restoring, "restore", lambda run: model)
    return f"--run={tmp_path}"


def test_pages_and_tables_of_all_protocols_use_one_language(run_of_all, tmp_path):
    """The names, figures and pictures of one command, by hand."""
    out = tmp_path / "out"
    assert main(["segment", str(tmp_path / "a.nii"), run_of_all, f"--out={out}"]) == 0
    anat = out / "sub-a" / "anat"
    page, folder_page = (anat / "sub-a_report.html").read_text(), (out / "report.html").read_text()
    rows = {name: tables.read_tsv(anat / f"sub-a_{name}.tsv") for name in ("volumes", "agreement")}
    for name, protocol in PROTOCOLS.items():
        title = f"{protocol.tool} ({name})"
        assert f'for="show-{name}">{title}</label>' in page
        assert f"{title}, {protocol.num_classes - 1} structures</summary>" in page
        names = [row["name"] for row in rows["volumes"] if row["protocol"] == name]
        assert names == [s.name for s in protocol.structures]
        assert all(re.search(rf"</span>{re.escape(one)}<td", page) for one in names[1:])
    legend = page.partition('<p class="legend malp_em">')[2].partition("</p>")[0]
    assert re.findall(r"([\w/]+)</span>\n", legend) == ["3rdVentricle", "BrainStem", "Left/RightThalamusProper"]
    regions = dict(re.findall(r'<tr><td class="name">(\w+)(?:<td.*)+\n *<td class="number">(\S+)</tr>', page))
    assert {row["region"] for row in rows["agreement"] if row["kind"] != "merge"} <= set(regions)
    assert regions["CSF"] == "1.000" and float(regions["GM"]) < 1  # FAST and SPM agree; MALP-EM's CSF does not count
    compared = re.findall(r'<tr><td class="name">CSF<td class="name">(\w+, \w+)', folder_page)
    assert sorted(compared) == ["fsl_fast, spm_tissue", "malp_em, malp_em_tissue"]
    (row,) = tables.read_tsv(out / "summary.tsv")
    volume_ml = {name: np.zeros((60, 70, 64))[place].size * 0.008 for name, (_, place) in _PARTS.items()}
    brain_ml = volume_ml["cortex"] - volume_ml["ventricle"]
    assert (row["brain_ml"], row["intracranial_ml"]) == (f"{brain_ml:.1f}", f"{volume_ml['sulci']:.1f}")
    for text in (page, folder_page):
        assert f">{brain_ml:.0f}" in text and f">{volume_ml['sulci']:.0f}" in text
    thumbnail = _pixels((anat / "sub-a_thumbnail.webp").read_bytes()).mean(axis=-1)
    assert all(half.max() > 150 for half in np.array_split(thumbnail, 2, axis=1))  # both slices go through the thalami


def test_options_in_the_text_of_a_code_are_shown_as_code_and_all_else_is_escaped():
    source = '{% from "text.html" import with_code %}{{ with_code(text) }}'
    render = reports.environment().from_string(source).render
    assert render(text="add `--a<b>`, or <i>") == "add <code>--a&lt;b&gt;</code>, or &lt;i&gt;"


def test_the_page_of_all_scans_is_made_without_reading_their_pages(tmp_path, monkeypatch):
    rows = [
        _write(tmp_path, f"sub-0{n}", Provenance(), np.diag([2.0, 2.0, 2.5 * n**0.1, 1.0])) for n in (1, 2, 3)
    ]  # each head larger than the one before
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_report.html")}
    opened = []
    for name in ("read_text", "read_bytes", "open"):
        real = getattr(Path, name)
        monkeypatch.setattr(
            Path, name, lambda path, *given, real=real, **more: opened.append(path) or real(path, *given, **more)
        )
    update_summary(tmp_path, rows)
    write_cohort(tmp_path, Provenance())
    assert len(before) == 3 and not set(opened) & set(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("sub-02: ") == 3 + 3 + 15 + 1
    )  # the names of its dots (tissues of two tools, FIRST) and its thumbnail
    assert (
        '<tr id="sub-02">' in page and "report.html#sub-02" in (tmp_path / "sub-02/anat/sub-02_report.html").read_text()
    )
    table = tables.volumes_of(tmp_path, [row.output for row in rows])
    assert table.scans == ("sub-01", "sub-02", "sub-03") and len(table.columns) == 3 + 15 + 3
    white = table.of("fsl_fast", (3,))
    np.testing.assert_allclose(white, [10 * 20 * 10 * 4 * 2.5 * n**0.1 for n in (1, 2, 3)], rtol=1e-6)
    drawn = cohort_page._distribution("WM", "fsl_fast", white, table.scans)
    assert [dot["scans"] for dot in drawn["dots"]] == [[0], [1], [2]] and drawn["tick"] == drawn["dots"][1]["x"]
    assert (drawn["smallest"], drawn["largest"]) == ("sub-01", "sub-03")


def test_what_to_look_at_first_is_at_the_top():
    rows = [
        tables.Row("a", "sub-a", "done", predicted_dice="0.9"),
        tables.Row("b", "sub-b", "done", predicted_dice="0.8"),
        tables.Row("c", "sub-c", "done", predicted_dice="0.9"),
        tables.Row("d", "sub-d", "done", warnings="W_CUT,W_PIECES"),
        tables.Row("e", "sub-e", "rejected", "E_CRC", "broken"),
        tables.Row("f", "sub-f", "done", warnings="W_CUT"),
    ]
    scans = tuple(row.output for row in rows if row.status == "done")
    volumes = np.array([[0.0 if scan == "sub-c" else 1000.0] for scan in scans])  # c lacks what the others have
    ordered = cohort_page.in_order(rows, tables.Volumes(scans, ("fsl_first.LeftHippocampus",), volumes))
    assert [row.input for row in ordered] == ["e", "d", "f", "c", "b", "a"]


def test_absent_structures_are_named():
    columns = tuple(f"malp_em.{name}" for name in ("BrainStem", "Cortex", "OpticChiasm", "Rightvessel"))
    values = np.ones((5, 4))
    values[0] = [1, 1, 0, 1]
    values[1] = 0
    found = cohort_page._absent(tables.Volumes(tuple(f"sub-{n}" for n in "abcde"), columns, values))
    assert cohort_page._absence(found["sub-a"]) == "absent: OpticChiasm (malp_em)"
    assert cohort_page._absence(found["sub-b"]).endswith("OpticChiasm (malp_em), and 1 more") and "sub-c" not in found


def test_pages_and_table_round_alike(tmp_path, monkeypatch):
    """A Dice of 0.80552 is 0.8055 in the table: no page may make 0.806 of the one and 0.805 of the other."""
    assess = quality.assess
    monkeypatch.setattr(quality, "assess", lambda *given: replace(assess(*given), score=0.80552))
    row = _write(tmp_path, "sub-01", Provenance())
    update_summary(tmp_path, [row])
    write_cohort(tmp_path, Provenance())
    assert row.predicted_dice == "0.8055"
    shown = [
        f"{float(row.predicted_dice):.3f}",
        *(ml(1000 * float(text)) for text in (row.brain_ml, row.intracranial_ml)),
    ]
    for page in (tmp_path / "report.html", tmp_path / "sub-01" / "anat" / "sub-01_report.html"):
        assert all(re.search(f">{re.escape(text)}( ml)?<", page.read_text()) for text in shown), page
    legend = (tmp_path / "report.html").read_text().partition("Outlines: ")[2].partition("</p>")[0]
    assert legend.startswith("FSL FAST (fsl_fast)") and all(f"</span>{name}<" in legend for name in ("CSF", "GM", "WM"))


def test_csf_of_different_definitions_is_compared_nowhere_on_a_page():
    rows = [{"kind": "tissue", "region": "CSF", "first": "fsl_fast", "second": second, "dice": "0.5"}
            for second in ("spm_tissue", "malp_em")]  # fmt: skip
    (found,) = cohort_page._agreement({"sub-1": rows})
    assert found["second"] == "spm_tissue"


def test_unusual_volumes_are_listed_with_the_right_scan():
    values = np.full((12, 2), 1000.0) + np.arange(12)[:, None]
    values[7, 1] = 1500
    heads = tuple(f"sub-{n}" for n in range(12))
    found = cohort_page._outliers(tables.Volumes(heads, ("fsl_fast.CSF", "malp_em.BrainStem"), values))
    assert [(row["scan"], row["name"], row["protocol"]) for row in found] == [("sub-7", "BrainStem", "malp_em")]
    # the others' deviations from their median of 1006 are 0 to 6, of which 3 is the median
    median = np.median(values[:, 1])
    spread = 1.4826 * np.median(np.abs(values[:, 1] - median))
    assert found[0]["z"] == pytest.approx((1500 - median) / spread) and found[0]["z"] > 80
    assert cohort_page._outliers(tables.Volumes(heads[:9], ("a.b", "c.d"), values[:9])) == []  # too few to say


@pytest.mark.parametrize("turn", [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 0, 2), (-1, -1, 1))])
def test_left_is_left_and_up_is_up_in_any_orientation(turn):
    order, signs = turn
    labels = np.zeros((50, 60, 48), np.uint8)
    labels[10:14, 20:50, 30:40] = 1  # the subject's left (RAS+: small x), high up
    labels[36:40, 20:50, 10:20] = 2
    plain = Mosaic(_volume(), labels > 0, labels == 1)
    flips = tuple(slice(None, None, sign) for sign in signs)
    back = np.zeros((4, 4))
    back[3, 3] = 1
    for new, old in enumerate(order):  # voxel of the turned array → voxel of the plain one
        back[old, new] = signs[old]
        back[old, 3] = 0 if signs[old] > 0 else labels.shape[old] - 1
    turned = nib.Nifti1Image(np.ascontiguousarray(_volume().data[flips].transpose(order)), AFFINE @ back)
    there = np.ascontiguousarray(labels[flips].transpose(order))
    assert axis_codes(AFFINE @ back) == "".join(nib.aff2axcodes(AFFINE @ back))
    mosaic, colors = Mosaic(nifti.check_image(turned), there > 0, there == 1), np.array(votes_colors(2), float)
    assert list(mosaic.image()) == list(plain.image()) and mosaic.window == plain.window
    assert list(mosaic.layers(there, colors)) == list(plain.layers(labels, colors))
    assert mosaic.thumbnail(there, colors) == plain.thumbnail(labels, colors)
    assert [row.slices[0].axis for row in plain.rows] == [AXIAL, CORONAL, SAGITTAL, CORONAL]
    layers = [_pixels(filled) for filled, _ in plain.layers(labels, colors)]
    coronal = layers[6 + 2]  # the third slice of the second row
    amber, blue = (np.argwhere(np.all(coronal[..., :3] == color, axis=-1)) for color in votes_colors(2)[1:])
    width = coronal.shape[1]
    assert len(amber) and len(blue) and amber[:, 1].mean() < width / 2 < blue[:, 1].mean()  # left on the left
    assert amber[:, 0].mean() < blue[:, 0].mean()  # higher is up


def test_slices_lie_within_the_brains_own_box_and_share_a_window():
    labels = np.zeros((50, 60, 48), np.uint8)
    labels[20:30, 20:40, 20:30] = 2
    volume = _volume()
    volume.data[0, 0, 0] = 1e6  # a bright spot outside the brain
    mosaic = Mosaic(volume, labels > 0, labels == 9)
    assert len(mosaic.rows) == 3  # no deep structures, no close-ups
    assert mosaic.window.high < 1100
    (axial, coronal, sagittal) = (row.slices for row in mosaic.rows)
    assert [one.position for one in axial] == [20, 22, 24, 25, 27, 29]
    assert axial[0].place == "z +50 mm" and coronal[-1].place == "y +76 mm" and sagittal[0].place == "x +40 mm"
    shapes = {_pixels(picture).shape[:2] for picture in mosaic.image()}
    assert shapes == {(52, 32), (35, 32), (35, 52)}  # 40 x 20 x 25 mm, and 6 mm on every side (5 of 2.5 mm voxels)


def test_contours_are_thin_and_drawn_once_between_two_structures():
    labels = np.zeros((50, 60, 48), np.uint8)
    labels[20:25, 20:40, 20:30] = 1
    labels[25:30, 20:40, 20:30] = 2
    mosaic, colors = Mosaic(_volume(), labels > 0), colors_of(PROTOCOLS["fsl_fast"])
    filled, contours = (_pixels(picture)[..., 3] > 0 for picture in next(iter(mosaic.layers(labels, colors))))
    assert filled.sum() == 20 * 40 and contours.shape == (2 * filled.shape[0], 2 * filled.shape[1])
    assert contours.sum() == 2 * (40 + 80) - 4 + (80 - 2)  # the outline, and one line between the two
    whole = np.ones_like(labels)  # it goes on beyond the picture, whose edge is no outline
    assert not _pixels(next(iter(mosaic.layers(whole, colors)))[1])[..., 3].any()


@pytest.mark.parametrize(
    ("z_mm", "place"), [(-60.0, "z 0 mm"), (-60.4, "z 0 mm"), (-59.6, "z 0 mm"), (-61.0, "z -1 mm")]
)
def test_the_place_of_a_slice_is_a_whole_number(z_mm, place):
    affine = AFFINE.copy()
    affine[2, 3] = z_mm
    labels = np.zeros((50, 60, 48), bool)
    labels[20:30, 20:40, 24] = True
    assert Mosaic(_volume(affine), labels).rows[0].slices[0].place == place


def _pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))
