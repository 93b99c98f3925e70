"""Executes a notebook of this folder and saves it with its outputs: `python notebooks/execute.py`.

Outputs of widgets are left out: they hold whole volumes, and show nothing without a running kernel. Pictures are kept
with few colours, which makes them a third as large.
"""

import base64
import io
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

NOTEBOOK = Path(__file__).with_name("segment.ipynb")
WIDGET = "application/vnd.jupyter.widget-view+json"
COLOURS = 64  # of a saved picture


def small(picture: str) -> str:
    """Returns a PNG with fewer colours, both in base64."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(COLOURS).save(
        stream, "png", optimize=True
    )
    return base64.b64encode(stream.getvalue()).decode()


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    options = {"store_widget_state": False, "record_timing": False}
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources=place, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr" and WIDGET not in output.get("data", {})  # stderr tells the machine
            ]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = small(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
