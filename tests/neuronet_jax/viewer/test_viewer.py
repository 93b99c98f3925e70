"""The viewer: in a real browser through the real command, and what its server answers to whom."""

import csv
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuronet_jax.cli import main
from neuronet_jax.errors import NeuronetError
from neuronet_jax.images import nifti
from neuronet_jax.inference.segmentation import Segmentation
from neuronet_jax.results.bids import Target
from neuronet_jax.results.dataset import write_cohort
from neuronet_jax.results.resume import Records, identify
from neuronet_jax.results.write import write_results
from neuronet_jax.runs.provenance import Origin, Provenance
from neuronet_jax.viewer import catalogue
from neuronet_jax.viewer.notes import Notes
from neuronet_jax.viewer.server import Server
from tests.browser import browser
from tests.processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Returns a folder with two scans, and with their results in `out`."""
    folder = tmp_path_factory.mktemp("viewer")
    records = Records(Provenance((Origin("test"),)), ("fsl_fast", "fsl_first"))
    image = np.zeros((44, 48, 44), np.int16)
    image[10:34, 8:40, 23:43] = np.random.default_rng(0).integers(
        500, 900, (24, 32, 20)
    )  # above the middle of the image
    for name in "ae":
        nib.save(nib.Nifti1Image(image, np.diag([-2.0, 2, 2, 1])), folder / f"{name}.nii.gz")
        target = Target(folder / f"{name}.nii.gz", folder / "out", f"sub-{name}")
        maps = {"fsl_fast": (image > 0).astype(np.uint8), "fsl_first": np.where(image > 0, 17, 0).astype(np.uint8)}
        records.begin(target, identify(target.source))
        volume = nifti.read_image(target.source)
        row = write_results(target, volume, Segmentation(maps, {}, {}), True, records.provenance)
        records.complete(target, row)
    write_cohort(folder / "out", records.provenance)
    return folder


@pytest.fixture
def heads(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "made")


@pytest.fixture
def results(heads) -> Path:
    return heads / "out"


@pytest.fixture
def server(results, heads) -> Iterator[Server]:
    scans = catalogue.images_of(results, [str(heads / "a.nii.gz")])
    with Server(catalogue.catalogue(results, scans), results) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def _ask(server: Server, path: str, body: str | None = None, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def _set(name: str, value: str, event: str) -> str:
    """Returns JavaScript that does what a person does with a field."""
    return f"(f => {{ f.value = {value!r}; f.dispatchEvent(new Event({event!r})) }})(document.getElementById({name!r}))"


def _notes(out: Path) -> list[dict[str, str]]:
    with (out / "qc.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_a_person_looks_at_two_heads_and_notes_which_is_good(results, heads, tmp_path):
    command = [sys.executable, "-m", "neuronet_jax", "view", str(results), *map(str, heads.glob("?.nii.gz"))]
    process = subprocess.Popen(
        [*command, "--no-browser"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        with browser(tmp_path) as tab:
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/\S+/", line)
            assert address, line + process.stderr.read()
            tab.open(address[0])
            tab.until("document.body.dataset.state === 'sub-a fsl_fast'")
            maps = tab.run("[...document.getElementById('map').options].map(o => o.value)")
            assert maps == ["fsl_fast", "fsl_first", "desc-brain"]
            # it starts in the middle of what is labelled, and the place that is clicked is labelled too
            tab.until("/^CSF \\(fsl_fast 1\\)/.test(document.getElementById('structure').textContent)")
            seen = set()
            for x in range(200, 400, 50):
                tab.click(x, 400)
                seen.add(tab.run("document.getElementById('structure').textContent"))
            assert len(seen) > 1 and any(text.startswith("CSF (fsl_fast 1)") for text in seen)
            before = tab.picture()
            tab.run(_set("opacity", "0", "input"))
            assert tab.picture() != before  # the labels have gone
            tab.press("g")
            tab.until("document.getElementById('saved').textContent.includes('saved in qc.tsv')")
            tab.press("n")
            tab.until("document.body.dataset.state === 'sub-e fsl_fast'")
            tab.run(
                "(m => { m.value = 'fsl_first'; m.dispatchEvent(new Event('change')) })(document.getElementById('map'))"
            )
            tab.until("document.body.dataset.state === 'sub-e fsl_first'")
            tab.run(_set("remark", "neck\tlabelled", "change"))
            tab.until("document.getElementById('saved').textContent.includes('2 of 2')")
            tab.run("document.querySelector('button[value=bad]').click()")
            tab.until("document.querySelector('button[value=bad]').getAttribute('aria-pressed') === 'true'")
            assert tab.run("document.getElementById('message').textContent") == ""
            fetched = tab.run("performance.getEntriesByType('resource').map(entry => entry.name)")
            here = address[0].rpartition("/")[0].rpartition("/")[0]
            assert len(fetched) > 5 and [name for name in fetched if not name.startswith(f"{here}/")] == []
            tab.open(address[0], width=400)  # a narrow window; the notes are still there
            tab.until("document.body.dataset.state === 'sub-a fsl_fast'")
            assert tab.run("document.querySelector('[aria-pressed=true]').value") == "good"
            tab.run("document.getElementById('scan').options[0].text = 'sub-' + 'longname'.repeat(9)")
            assert tab.run("document.documentElement.scrollWidth") <= 400
            assert tab.run("document.getElementById('back').offsetTop === document.getElementById('next').offsetTop")
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    rows = [(row["scan"], row["verdict"], row["remark"]) for row in _notes(results)]
    assert rows == [("sub-a", "good", ""), ("sub-e", "bad", "neck labelled")]


def test_only_what_the_page_needs_is_served(server, results, heads, tmp_path):
    base = f"/{server.token}/"
    status, content = _ask(server, f"{base}catalogue.json")
    scans = json.loads(content)["scans"]
    assert status == 200 and [scan["name"] for scan in scans] == ["sub-a", "sub-e"]
    assert scans[0]["image"] and not scans[1]["image"]  # it was not among the inputs
    served = [scans[0]["image"], scans[0]["page"], "report.html", *(m["file"] for m in scans[0]["maps"])]
    for name in served:
        assert _ask(server, base + name)[0] == 200
    assert _ask(server, base + scans[0]["image"])[1] == (heads / "a.nii.gz").read_bytes()
    (tmp_path / "secret").write_text("secret")
    (results / "notes.txt").write_text("secret")
    for name in (
        *(
            "../secret",
            "..%2Fsecret",
            "sub-a/../../secret",
            "%2e%2e/secret",
            "/etc/passwd",
            "%2Fetc%2Fpasswd",
            "notes.txt",
        ),
        *("summary.tsv", "sub-a/anat/sub-a_provenance.json", "scans/sub-e/e.nii.gz", "static/viewer.js", "viewer.html"),
    ):
        status, content = _ask(server, base + name)
        assert status == 404 and b"secret" not in content, name


def test_no_table_begins_with_a_colour(results):
    """NiiVue shows the first 2/256 of a table alike: the background of MALP-EM's 139 ids would look like id 1."""
    for table in catalogue.catalogue(results, {}).tables.values():
        assert table["I"][:2] == [-1, 0] and table["A"][:3] == [0, 0, 255]


def test_a_link_that_leads_out_of_the_folder_is_not_followed(results, tmp_path):
    label_map = next(results.rglob("*fslfast_dseg.nii.gz"))
    (tmp_path / "elsewhere.nii.gz").write_bytes(label_map.read_bytes())
    label_map.unlink()
    label_map.symlink_to(tmp_path / "elsewhere.nii.gz")
    files = catalogue.catalogue(results, {}).files
    assert label_map not in files.values() and len(files) == 1 + 2 + 3 + 2  # pages, the other maps, masks


@pytest.mark.parametrize(
    ("changed", "headers"),
    [
        ("", {"Host": "evil.example:{port}"}),  # a name that resolves to this machine: DNS rebinding
        ("", {"Origin": "http://evil.example"}),
        ("", {"Origin": "null"}),
        ("x", {}),  # a wrong secret
    ],
)
def test_pages_of_others_are_refused(server, results, changed, headers):
    headers = {name: value.format(port=server.server_port) for name, value in headers.items()}
    path = f"/{server.token}{changed}/"
    assert _ask(server, path + "catalogue.json", **headers)[0] == 403
    note = json.dumps({"scan": "sub-a", "verdict": "bad", "remark": ""})
    assert _ask(server, path + "notes", note, **headers, Content_Type="application/json")[0] == 403
    assert _ask(server, "/", **headers)[0] == _ask(server, "/notes", note)[0] == 403
    assert not (results / "qc.tsv").exists()


@pytest.mark.parametrize(
    ("note", "kind", "status"),
    [
        (
            '{"scan": "sub-a", "verdict": "bad", "remark": ""}',
            "text/plain",
            404,
        ),  # as a form of a different page sends it
        ('{"scan": "sub-z", "verdict": "bad", "remark": ""}', "application/json", 400),
        ('{"scan": "sub-a", "verdict": "fine", "remark": ""}', "application/json", 400),
        ('{"scan": ["sub-a"], "verdict": "bad", "remark": ""}', "application/json", 400),
        ("[]", "application/json", 400),
        ("{", "application/json", 400),
        ("x" * 20_000, "application/json", 413),
    ],
)
def test_bad_notes_are_refused(server, results, note, kind, status):
    assert _ask(server, f"/{server.token}/notes", note, Content_Type=kind)[0] == status
    assert not (results / "qc.tsv").exists()


def test_notes_of_several_viewers_at_the_same_time_are_all_kept(tmp_path):
    viewers = [Notes(tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: viewers[n % 4].put(f"sub-{n:02}", "good", f"=remark {n}"), range(24)))
    rows = _notes(tmp_path)
    assert [row["scan"] for row in rows] == [f"sub-{n:02}" for n in range(24)]
    assert rows[3]["remark"] == "'=remark 3"  # no formula
    viewers[0].put("sub-03", "", "")
    assert len(_notes(tmp_path)) == 23 and "sub-03" not in viewers[1].all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qc.tsv"]


def test_a_folder_without_results_and_a_port_in_use(tmp_path, results, server, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["view", str(tmp_path / "empty"), "--no-browser"]) == 1
    assert main(["view", str(tmp_path / "missing"), "--no-browser"]) == 1
    errors = capsys.readouterr().err
    assert "holds no finished results" in errors and "there is no folder" in errors
    assert main(["view", str(results), "--no-browser", f"--port={server.server_port}"]) == 1
    assert "choose a different --port" in capsys.readouterr().err
    with pytest.raises(NeuronetError, match="none of the inputs exists"):
        catalogue.images_of(results, ["missing.nii.gz"])


def test_the_wheel_stays_small():
    static = ROOT / "neuronet_jax" / "viewer" / "static"
    assert sum(path.stat().st_size for path in static.iterdir()) < 1_000_000
    assert "BSD 2-Clause" in (static / "NIIVUE_LICENSE.txt").read_text()
