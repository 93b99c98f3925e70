"""The results of a comparison as Markdown, as one HTML file with box plots, and as tables. None names a subject."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.compare.plan import Plan, to_json
from experiments.compare.scores import METRICS, ArmScores, Contrast, Failed, Metric, contrasts, read, structures
from experiments.compare.statistics import LEVEL
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results.reports import embed, environment
from neuronet_jax.results.tables import tsv

_INCHES, _DPI = 2.1, 100  # a panel of one protocol

_TEMPLATE = environment().from_string("""\
{% extends "base.html" %}
{% block title %}NeuroNet-JAX: a comparison{% endblock %}
{% block body %}
<h1>A comparison of networks</h1>
{% for line in facts %}<p>{{ line }}</p>{% endfor %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.picture %}<p><img alt="box plots of every protocol" src="{{ section.picture }}">{% endif %}
{% for row in section.rows %}
{% if loop.first %}<div class="scroll"><table><tr>{% for cell in row %}<th>{{ cell }}{% endfor %}</tr>
{% else %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}</tr>{% endif %}
{% if loop.last %}</table></div>{% endif %}
{% else %}<p>Nothing to compare.</p>{% endfor %}
{% endfor %}
{% endblock %}
""")


def write(plan: Plan, out: Path, split: str, failed: Failed = ()) -> None:
    """Writes comparison.md, comparison.html, structures.tsv and plan.json below `out` from the cells that are finished.

    With `failed` references, every table is there twice: with them and without.
    """
    views = [("", read(plan, out))] + ([(" without failed references", read(plan, out, failed))] if failed else [])
    sections: list[dict[str, Any]] = [{"title": "Cost", "rows": costs(views[0][1], plan), "picture": ""}]
    for suffix, arms in views:
        tested = contrasts(arms)
        for budget in dict.fromkeys(scores.arm.budget for scores in arms):
            mine = [scores for scores in arms if scores.arm.budget == budget]
            for metric in METRICS:
                title = f"{metric.title}: equal {budget}{suffix}"
                found = [c for c in tested if (c.budget, c.metric) == (budget, metric.name)]
                sections.append({"title": title, "rows": means(mine, metric), "picture": box_plots(mine, metric)})
                sections.append({"title": f"{title}, differences", "rows": differences(found), "picture": ""})
    facts = stated(plan, views[0][1], split)
    files = Files(str(out.absolute()))
    files.write("plan.json", to_json(plan))
    files.write("structures.tsv", tsv(structures(views[0][1])).encode())
    files.write("comparison.md", markdown(facts, sections).encode())
    files.write("comparison.html", _TEMPLATE.render(facts=facts, sections=sections).encode())


def stated(plan: Plan, arms: Sequence[ArmScores], split: str) -> list[str]:
    """Returns what a reader must know to read the tables."""
    cells = {plan.cell(s.arm, seed).name for s in arms for seed in s.seeds}
    count = max((values["dice"].shape[1] for s in arms for values in s.by_protocol.values()), default=0)
    return [
        f"{len(cells)} of {len(plan.cells())} networks are trained and scored on {count} {split} subjects.",
        "Equal crops: every network saw as many crops. Equal compute: networks that together give all protocols cost "
        "as many operations as the one that gives all.",
        f"Differences are of means over seeds and subjects, with a {LEVEL:.0%} bootstrap interval over both. p is "
        "Wilcoxon's signed-rank test over subjects, corrected after Holm for all rows of a table. "
        f"With {count} subjects, p before correction cannot be below {2.0 ** (1 - count) if count else 1:.2g}.",
        "One split: nothing here tells whether other training subjects would change the order.",
    ]


def costs(arms: Sequence[ArmScores], plan: Plan) -> list[list[str]]:
    """Returns the table of what every arm costs."""
    rows = [["budget", "network", "steps", "operations", "seeds", "training, s", "peak memory, MiB"]]
    for s in arms:
        seconds = f"{np.mean(s.seconds):.0f}"
        total = f"{s.arm.steps * s.arm.operations:.2e}"
        seeds, memory = f"{len(s.seeds)} of {plan.seeds}", f"{s.memory_bytes / 2**20:.0f}"
        rows.append([s.arm.budget, s.arm.name, str(s.arm.steps), total, seeds, seconds, memory])
    return rows


def means(arms: Sequence[ArmScores], metric: Metric) -> list[list[str]]:
    """Returns mean ± sd over subjects [sd over seeds] of every arm and protocol."""
    protocols = list(dict.fromkeys(name for s in arms for name in s.arm.protocols))
    rows = [["network", *protocols]]
    for s in arms:
        cells = [_summary(s.of_subjects(name, metric)) if name in s.arm.protocols else "" for name in protocols]
        rows.append([s.arm.name, *cells])
    return rows


def _summary(values: np.ndarray) -> str:
    values = values[:, ~np.isnan(values).any(axis=0)]  # [s n]
    if not values.size:
        return "n/a"
    text = f"{values.mean():.3f}"
    if not np.isfinite(values).all():
        return text
    text += f" ± {values.mean(axis=0).std(ddof=1):.3f}" if values.shape[1] > 1 else ""
    return text + (f" [{values.mean(axis=1).std(ddof=1):.3f}]" if len(values) > 1 else "")


def differences(found: Sequence[Contrast]) -> list[list[str]]:
    """Returns the table of contrasts; empty without any."""
    rows = [["protocol", "network", "minus", "difference", f"{LEVEL:.0%} interval", "p", "p, Holm", "subjects"]]
    for c in found:
        f = c.found
        interval = "n/a" if math.isnan(f.low) else f"{f.low:+.3f} to {f.high:+.3f}"
        difference = "n/a" if math.isnan(f.difference) else f"{f.difference:+.3f}"  # of two infinite distances
        numbers = [difference, interval, f"{f.p:.3f}", f"{c.p_holm:.3f}", str(f.subjects)]
        rows.append([c.protocol, c.arm, c.baseline, *numbers])
    return rows if found else []


def box_plots(arms: Sequence[ArmScores], metric: Metric) -> str:
    """Returns box plots as a data URL: a panel per protocol, a box per arm, a dot per subject (mean over seeds)."""
    protocols = [name for name in PROTOCOLS if any(name in s.arm.protocols for s in arms)]
    figure = Figure(figsize=(_INCHES * len(protocols) + 0.6, 3.4), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(protocols), squeeze=False)[0]
    for axes, name in zip(panels, protocols, strict=True):
        shown = [s for s in arms if name in s.arm.protocols]
        values = [s.of_subjects(name, metric).mean(axis=0) for s in shown]
        values = [v[np.isfinite(v)] for v in values]
        axes.boxplot(values, widths=0.6, showfliers=False, medianprops={"color": "#2563a8"})
        for place, column in enumerate(values, start=1):
            axes.plot(np.full(len(column), place), column, "o", markersize=3, alpha=0.5, color="#616e7c")
        axes.set_xticks(range(1, len(shown) + 1), [s.arm.name for s in shown], rotation=90, fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(name, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture)
    return embed(picture.getvalue())


def markdown(facts: Sequence[str], sections: Sequence[dict[str, Any]]) -> str:
    """Returns the page without its pictures."""
    lines = ["# A comparison of networks", "", *(part for f in facts for part in (f, ""))]
    for section in sections:
        if section["rows"]:
            header, *rows = section["rows"]
            lines += [f"## {section['title']}", "", _row(header), _row(["---"] * len(header)), *map(_row, rows), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
