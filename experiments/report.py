"""An evaluation as one HTML file that holds everything it shows, and names no subject.

python -m experiments.report --run=runs/all_targets --eval=evaluation --out=report.html
"""

import argparse
import base64
import csv
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from experiments.pictures import save_curves
from neuronet_jax import __version__
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS

LOWEST = 10  # structures listed: what to look at first

_ENVIRONMENT = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
_ENVIRONMENT.filters["number"] = lambda value: "–" if value is None or math.isnan(value) else f"{value:.4f}"
_TEMPLATE = _ENVIRONMENT.from_string("""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>NeuroNet-JAX: {{ summary.run.config }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
  table { border-collapse: collapse; margin: 1em 0 }
  th, td { padding: .25em 1em; border-bottom: 1px solid #ddd; text-align: left }
  td.number { text-align: right; font-variant-numeric: tabular-nums }
  img { max-width: 100% }
  .pair { display: flex; flex-wrap: wrap; gap: 1em } .pair img { max-width: 32em }
  .note { background: #fff3cd; padding: .5em 1em }
</style>
<h1>{{ summary.run.config }}, {{ summary.split }} split</h1>
{% if summary.note %}<p class="note">{{ summary.note }}</p>{% endif %}
<p>Step {{ summary.run.step }}. Dice similarity coefficient over whole heads: per subject the mean over the structures
that are present in the reference or the prediction, then mean ± standard deviation and minimum over subjects.</p>
<table>
  <tr><th>protocol<th>tool<th>mean ± sd<th>min<th>subjects</tr>
  {% for name, row in summary.protocols.items() %}
  <tr><td>{{ name }}<td>{{ tools[name] }}<td class="number">{{ row.mean | number }} ± {{ row.sd | number }}
  <td class="number">{{ row.minimum | number }}<td class="number">{{ row.subjects }}</tr>
  {% endfor %}
</table>
{% for picture in strips %}<p><img alt="a held-out head and its predicted label maps" src="{{ picture }}">{% endfor %}
<h2>Hardest structures</h2>
<table>
  <tr><th>protocol<th>structure<th>mean Dice<th>subjects</tr>
  {% for row in lowest %}
  <tr><td>{{ row.protocol }}<td>{{ row.name }}<td class="number">{{ row.dice | number }}
  <td class="number">{{ row.subjects }}</tr>
  {% endfor %}
</table>
<h2>Image, reference, prediction</h2>
<div class="pair">
  {% for picture in comparisons %}<img alt="image, reference, prediction" src="{{ picture }}">{% endfor %}
</div>
{% if curves %}<h2>Training</h2><p><img alt="training curves" src="{{ curves }}">{% endif %}
<p><small>NeuroNet-JAX {{ version }}. Not a medical device; for research.</small>
</html>
""")


def report(run: str, evaluation: Path, out: Path) -> None:
    """Writes the report of an evaluation (`experiments.evaluate --out`) of a run to the file `out`.

    Raises NeuronetError where the evaluation is missing or damaged, or the report cannot be written.
    """
    try:
        summary = json.loads((evaluation / "summary.json").read_text())
        with (evaluation / "dice.tsv").open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        pictures = sorted((evaluation / "pictures").glob("head*.png"))
        text = _TEMPLATE.render(
            summary=summary,
            tools={name: PROTOCOLS[name].tool for name in summary["protocols"]},
            lowest=lowest_structures(rows),
            strips=[_embed(path.read_bytes()) for path in pictures if "_" not in path.name],
            comparisons=[_embed(path.read_bytes()) for path in pictures if "_" in path.name],
            curves=_curves(Files(run).read("metrics.jsonl")),
            version=__version__,
        )
    except (OSError, ValueError, KeyError, jinja2.UndefinedError) as error:
        raise NeuronetError(f"{evaluation} holds no evaluation ({error}): run experiments.evaluate first") from error
    Files(str(out.absolute().parent)).write(out.name, text.encode())


def lowest_structures(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """The structures of the lowest mean Dice over the subjects to which it applies, worst first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if not math.isnan(float(row["dice"])):
            found[row["protocol"], row["name"]].append(float(row["dice"]))
    means = [
        {"protocol": protocol, "name": name, "dice": sum(values) / len(values), "subjects": len(values)}
        for (protocol, name), values in found.items()
    ]
    return sorted(means, key=lambda row: row["dice"])[:LOWEST]


def _curves(metrics: bytes | None) -> str:
    """Loss and validation Dice over the steps of a run; empty where it kept none."""
    curves: dict[str, list[tuple[int, float]]] = {"loss": [], "dice": []}
    for line in (metrics or b"").decode().splitlines():
        values = json.loads(line)
        for name, points in curves.items():
            if values.get(name) is not None:
                points.append((values["step"], values[name]))
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    picture = io.BytesIO()
    save_curves(picture, curves)
    return _embed(picture.getvalue())


def _embed(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "experiments.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="workdir of the training run")
    parser.add_argument("--eval", required=True, type=Path, metavar="DIR", help="--out of experiments.evaluate")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the report, an .html file")
    args = parser.parse_args(arguments)
    try:
        report(args.run, args.eval, args.out)
    except NeuronetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
