"""The notebook, executed by a Jupyter kernel of its own from the first cell to the last."""

import base64
import json
import os
import re
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, QUICK_XLA_FLAGS

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "segment.ipynb"


def _is_image(data: dict) -> bool:
    return base64.b64decode(data.get("image/png", ""))[:4] == b"\x89PNG"


# zmq's event loop leaves its sockets to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_runs_from_top_to_bottom(tiny_run_of_all, noisy_heads, monkeypatch, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient, as the dev extra brings it")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, as the dev extra brings it")
    monkeypatch.setenv("NEURONET_RUN", str(tiny_run_of_all))
    monkeypatch.setenv("NEURONET_SCAN", str(noisy_heads / "head1.nii.gz"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", QUICK_XLA_FLAGS)
    monkeypatch.setenv("MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", str(tmp_path)))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=PATIENCE_S, kernel_name="python3", resources=place).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    assert "'malp_em_tissue': ((60, 70, 64)," in outputs[0]["data"]["text/plain"]
    assert sum("application/vnd.jupyter.widget-view+json" in found for found in data) == 1  # the viewer
    assert sum(map(_is_image, data)) == 3  # labels, volumes and agreement
    text = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"unanimous in \d+% of the voxels", text)
    assert (
        len(re.findall(r"^(?:CSF|GM|WM) .*Dice (?:0\.\d\d|1\.00|nan)$", text, re.MULTILINE)) == 14
    )  # of 6 pairs, CSF of 2


def test_its_outputs_are_small_and_reveal_nothing_about_a_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert re.search(r"/(?:home|root|tmp|work|Users)/", text) is None
    cells = json.loads(text)["cells"]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    assert sum(map(_is_image, data)) == 3  # also where the viewer would be blank
    assert "widgets" not in json.loads(text)["metadata"]  # the volumes that a viewer held
