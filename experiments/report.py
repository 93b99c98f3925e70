"""Writes an evaluation as one self-contained HTML file that names no subject.

python -m experiments.report --run=runs/all_targets --eval=evaluation --out=report.html
"""

import argparse
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

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.results.pictures import save_curves
from neuronet_jax.results.reports import css, embed, environment
from neuronet_jax.runs.directory import RunDirectory

LOWEST = 10  # structures listed, for a first look

_TEMPLATE = environment().from_string("""\
{% extends "base.html" %}
{% block title %}NeuroNet-JAX: {{ summary.run.config }}{% endblock %}
{% block body %}
<h1>{{ summary.run.config }} on {{ subjects }} {{ summary.split }} subject{{ "s" if subjects != 1 }}</h1>
{% if summary.note %}<p class="note">{{ summary.note }}</p>{% endif %}
<p>Step {{ summary.run.step }}. Dice similarity coefficient over whole scans: for each subject the mean over the
structures present in the reference or the prediction, then mean ± standard deviation and minimum over subjects.</p>
<div class="scroll"><table>
  <tr><th>protocol<th>tool<th class="number">Dice, mean ± sd<th class="number">min<th class="number">subjects</tr>
  {% for name, row in summary.protocols.items() %}
  <tr><td>{{ name }}<td>{{ tools[name] }}<td class="number">{{ row.mean | number }} ± {{ row.sd | number }}
  <td class="number">{{ row.minimum | number }}<td class="number">{{ row.subjects }}</tr>
  {% endfor %}
</table></div>
{% if summary.surfaces is defined and summary.surfaces %}
<div class="scroll"><table>
  <tr><th>protocol<th>HD95, median, mm<th>surface Dice at {{ summary.nsd_tolerance_mm }} mm<th>missed structures</tr>
  {% for name, row in summary.surfaces.items() %}
  <tr><td>{{ name }}<td class="number">{{ "∞" if row.hd95_mm is none else "%.2f" | format(row.hd95_mm) }}
  <td class="number">{{ row.nsd | number }}<td class="number">{{ row.missed }}</tr>
  {% endfor %}
</table></div>
<p>Missed: present in one map only. The distance is then infinite, and the median includes it.</p>
{% endif %}
{% if strips %}<p class="legend">{% for color, names in legend.items() %}
  <span class="name"><span class="key" style="background: {{ color }}"></span>{{ names | join(", ") }}</span>
{% endfor %}<span class="faint">in the maps of tissues; FIRST’s and MALP-EM’s structures have their own colours. L and R
are the subject’s left and right, P and A posterior and anterior.</span></p>{% endif %}
{% for picture in strips %}<p><img alt="a held-out scan and its predicted label maps" src="{{ picture }}">{% endfor %}
<h2>Hardest structures</h2>
<div class="scroll"><table>
  <tr><th>protocol<th>structure<th class="number">mean Dice<th class="number">subjects</tr>
  {% for row in lowest %}
  <tr><td>{{ row.protocol }}<td>{{ row.name }}<td class="number">{{ row.dice | number }}
  <td class="number">{{ row.subjects }}</tr>
  {% endfor %}
</table></div>
<h2>Image, reference, prediction</h2>
<div class="pair">
  {% for picture in comparisons %}<img alt="image, reference, prediction" src="{{ picture }}">{% endfor %}
</div>
{% if curves %}<h2>Training</h2><p><img alt="training curves" src="{{ curves }}">{% endif %}
{% endblock %}
""")


def report(run: str, evaluation: Path, out: Path) -> None:
    """Writes the report of an evaluation (`experiments.evaluate --out`) of a run to the file `out`.

    Raises NeuronetError if the evaluation is missing or damaged, or if the report cannot be written.
    """
    try:
        summary = json.loads((evaluation / "summary.json").read_text())
        with (evaluation / "dice.tsv").open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        pictures = sorted((evaluation / "pictures").glob("head*.png"))
        text = _TEMPLATE.render(
            summary=summary,
            subjects=max(row["subjects"] for row in summary["protocols"].values()),
            legend=_legend(),
            tools={name: PROTOCOLS[name].tool for name in summary["protocols"]},
            lowest=lowest_structures(rows),
            strips=[embed(path.read_bytes()) for path in pictures if "_" not in path.name],
            comparisons=[embed(path.read_bytes()) for path in pictures if "_" in path.name],
            curves=_curves(RunDirectory(run).metrics()),
        )
    except (OSError, ValueError, KeyError, jinja2.UndefinedError) as error:
        raise NeuronetError(f"{evaluation} holds no evaluation ({error}): run experiments.evaluate first") from error
    Files(str(out.absolute().parent)).write(out.name, text.encode())


def lowest_structures(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Returns the structures with the lowest mean Dice over the subjects to which it applies, worst first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if not math.isnan(float(row["dice"])):
            found[row["protocol"], row["name"]].append(float(row["dice"]))
    means = [
        {"protocol": protocol, "name": name, "dice": sum(values) / len(values), "subjects": len(values)}
        for (protocol, name), values in found.items()
    ]
    return sorted(means, key=lambda row: row["dice"])[:LOWEST]


def _legend() -> dict[str, list[str]]:
    """Returns the tissues that each colour of the tissue maps stands for; the tools share colours."""
    found: dict[str, list[str]] = {}
    for protocol in ("fsl_fast", "malp_em_tissue"):
        for structure in PROTOCOLS[protocol].structures[1:]:
            names = found.setdefault(css(structure.color), [])
            names += [structure.name] if structure.name not in names else []
    return found


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    """Returns loss and validation Dice over the steps of a run, empty if it has no metrics."""
    curves: dict[str, list[tuple[int, float]]] = {"loss": [], "dice": []}
    for values in metrics:
        for name, points in curves.items():
            if values.get(name) is not None:
                points.append((values["step"], values[name]))
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    picture = io.BytesIO()
    save_curves(picture, curves)
    return embed(picture.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.report", description=__doc__)
    parser.add_argument("--run", required=True, metavar="DIR", help="workdir of the training run")
    parser.add_argument("--eval", required=True, type=Path, metavar="DIR", help="--out of experiments.evaluate")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="output file, .html")
    return run(parser, _report, arguments)


def _report(args: argparse.Namespace) -> int:
    report(args.run, args.eval, args.out)
    print(args.out)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
