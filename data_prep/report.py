"""Writes what a store holds as one self-contained HTML file that names no participant.

    python -m data_prep.report --store=stores/cohort --out=cohort.html

It counts subjects, label maps, rejects and warnings, each code with its remedy, and draws how voxel sizes and labelled
volumes are distributed. It shows the heads with the worst label maps, if `data_prep.references` has scored them, and
some heads drawn at random. Heads are named by slot; `subjects.tsv` of the store gives the id.
"""

import argparse
import io
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from data_prep.references import Dropped, Score, read_dropped, read_scores
from neuronet_jax.codes import explain
from neuronet_jax.files import Files
from neuronet_jax.images.space import voxel_mm3
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, number, run
from neuronet_jax.results.pictures import save_strip
from neuronet_jax.results.reports import embed, environment
from neuronet_jax.store.reader import Store, read_rejects
from neuronet_jax.store.schema import Subject

MEASURED = 500  # subjects whose volumes are measured: enough for the shape of a distribution
BINS = 24

_TEMPLATE = environment().from_string("""\
{% extends "base.html" %}
{% from "text.html" import with_code %}
{% macro histogram(h) %}
<figure style="background: none"><svg viewBox="0 0 240 92" role="img" aria-label="{{ h.title }}" width="100%">
  {% for share in h.shares %}
  <rect x="{{ loop.index0 * 240 / h.shares | length }}" y="{{ 70 - 68 * share }}" height="{{ 68 * share }}"
    width="{{ 240 / h.shares | length - 1 }}" fill="#2563a8"/>
  {% endfor %}
  <line x1="0" y1="70.5" x2="240" y2="70.5" stroke="#616e7c"/>
  <text x="0" y="86" font-size="12" fill="#616e7c">{{ h.low }}</text>
  <text x="240" y="86" font-size="12" fill="#616e7c" text-anchor="end">{{ h.high }} {{ h.unit }}</text>
</svg><figcaption>{{ h.title }}: median {{ h.median }} {{ h.unit }}, {{ h.count }} values</figcaption></figure>
{% endmacro %}
{% block title %}NeuroNet-JAX: a store{% endblock %}
{% block body %}
<h1>{{ subjects }} scans, {{ info.protocols | length }} protocols</h1>
{% if info.provenance.get("note") %}<p class="note">{{ info.provenance["note"] }}</p>{% endif %}
{% if info.provenance.get("purged") %}<p class="note">Participants were purged from this store.</p>{% endif %}
<dl class="facts">
  <div><dt>participants</dt><dd>{{ participants }}</dd></div>
  {% for name, count in splits.items() %}<div><dt>{{ name }}</dt><dd>{{ count }}</dd></div>{% endfor %}
  <div><dt>rejected</dt><dd class="{{ 'bad' if rejects else 'good' }}">{{ rejects.values() | sum }}</dd></div>
  <div><dt>grid</dt><dd>{{ info.grid | join(" × ") }}</dd></div>
  <div><dt>voxel size</dt><dd>{{ "%g" | format(info.voxel_size_mm) }} mm</dd></div>
</dl>
<h2>Label maps</h2>
<div class="scroll"><table>
  <tr><th>protocol<th>tool<th class="number">maps{% for name in splits %}<th class="number">{{ name }}{% endfor %}
  <th class="number">absent{% if scored %}<th class="number">flagged{% endif %}
  {% if dropped %}<th class="number">dropped{% endif %}</tr>
  {% for row in maps %}
  <tr><td>{{ row.name }}<td>{{ row.tool }}<td class="number">{{ row.count }}
  {% for name in splits %}<td class="number">{{ row.splits[name] }}{% endfor %}
  <td class="number">{{ subjects - row.count }}{% if scored %}<td class="number">{{ row.flagged }}{% endif %}
  {%- if dropped %}<td class="number">{{ row.dropped }}{% endif %}</tr>
  {% endfor %}
</table></div>
{% if dropped %}<p>{{ dropped | length }} of the absent maps were dropped because of
  {% for reason, count in reasons.items() %}{{ reason }} ({{ count }}){{ ", " if not loop.last }}{% endfor %}, more than
  {{ dropped | map(attribute="limit") | unique | join(" or ") }} robust standard deviations from the cohort's.</p>
{% endif %}
{% if not scored %}<p>No map has been scored: <code>python -m data_prep.references</code> finds maps that failed.</p>
{% endif %}
{% for title, codes in (("Rejected", rejects), ("Warnings", warnings)) %}
<h2>{{ title }}</h2>
{% if codes %}
<div class="scroll"><table>
  <tr><th>code<th class="number">scans<th>meaning and remedy</tr>
  {% for code, count in codes.items() %}
  <tr><td class="name">{{ code }}<td class="number">{{ count }}<td>{{ with_code(explain(code)) }}</tr>
  {% endfor %}
</table></div>
{% else %}<p>None.</p>{% endif %}
{% endfor %}
<h2>Distributions</h2>
{% if measured < subjects %}<p>Volumes are those of {{ measured }} scans drawn at random.</p>{% endif %}
<div class="thumbs">{% for h in histograms %}{{ histogram(h) }}{% endfor %}</div>
{% for title, pictures in galleries.items() if pictures %}
<h2>{{ title }}</h2>
{% for name, picture in pictures.items() %}
<figure><img alt="a scan and its label maps" src="{{ picture }}"><figcaption>{{ name }}</figcaption></figure>
<br>
{% endfor %}{% endfor %}
{% endblock %}
""")


class Histogram(NamedTuple):
    """The bars of one distribution, as shares of the highest, from the lowest to the highest value."""

    title: str
    unit: str
    shares: list[float]
    low: str
    high: str
    median: str
    count: int


def histogram(title: str, unit: str, values: Sequence[float]) -> Histogram:
    """Bins at least one value."""
    counts, _ = np.histogram(values, BINS)
    low, high, median = (f"{value:.4g}" for value in (min(values), max(values), float(np.median(values))))
    return Histogram(title, unit, (counts / counts.max()).tolist(), low, high, median, len(values))


def report(store: Store, pictures: int = 6, seed: int = 0, threads: int = 4, progress: bool = False) -> str:
    """Returns the page. It shows at most `pictures` heads of each kind, and reads the volumes of at most `MEASURED`."""
    scores = read_scores(Files(store.dest))
    rng = np.random.default_rng(seed)
    drawn = [store.subjects[index] for index in rng.permutation(len(store.subjects))]
    measured = drawn[:MEASURED]
    with ThreadPoolExecutor(threads) as pool:
        found = track(pool.map(lambda subject: _volumes_ml(store, subject), measured), "measuring", len(measured),
                      console=Console(stderr=True), transient=True, disable=not progress)  # fmt: skip
        volumes_ml = list(found)
    flagged = Counter(score.protocol for score in scores if score.flagged)
    dropped = read_dropped(store)
    return _TEMPLATE.render(
        info=store.info,
        subjects=len(store.subjects),
        participants=len({subject.id for subject in store.subjects}),
        splits=Counter(subject.split for subject in store.subjects),
        maps=[_maps(store, name, flagged[name], dropped) for name in store.info.protocols],
        scored=bool(scores),
        dropped=dropped,
        reasons=Counter(sorted(reason for row in dropped for reason in row.flagged.split(","))),
        rejects=Counter(reject.code for reject in sorted(read_rejects(Files(store.dest)), key=lambda r: r.code)),
        warnings=Counter(sorted(code for subject in store.subjects for code in subject.warnings)),
        explain=explain,
        measured=len(measured),
        histograms=_histograms(store, volumes_ml),
        galleries={
            "Label maps that deviate most": _pictures(store, _worst(store, scores)[:pictures]),
            "Scans drawn at random": _pictures(store, [(subject, {}) for subject in drawn[:pictures]]),
        },
    )


def _maps(store: Store, name: str, flagged: int, dropped: Sequence[Dropped]) -> dict[str, Any]:
    place = store.info.protocols.index(name)
    splits = Counter(subject.split for subject in store.subjects if subject.present[place])
    return {
        "name": name,
        "tool": PROTOCOLS[name].tool,
        "count": splits.total(),
        "splits": splits,
        "flagged": flagged,
        "dropped": sum(row.protocol == name for row in dropped),
    }


def _volumes_ml(store: Store, subject: Subject) -> dict[str, float]:
    """Returns the labelled volume of every map of one subject."""
    names = [name for name, present in zip(store.info.protocols, subject.present, strict=True) if present]
    per_voxel_ml = voxel_mm3(np.array(subject.affine)) / 1000
    maps = store.read_labels(subject.slot, names) if names else ()
    return {name: np.count_nonzero(classes) * per_voxel_ml for name, classes in zip(names, maps, strict=True)}


def _histograms(store: Store, volumes_ml: Sequence[Mapping[str, float]]) -> list[Histogram]:
    sides = [np.linalg.norm(np.array(subject.source_affine)[:3, :3], axis=0) for subject in store.subjects]
    found = [
        histogram("longest side of a scan's voxel", "mm", [side.max() for side in sides]),
        histogram("shortest side of a scan's voxel", "mm", [side.min() for side in sides]),
    ]
    for name in store.info.protocols:
        if values := [volumes[name] for volumes in volumes_ml if name in volumes]:
            found.append(histogram(f"labelled volume, {name}", "ml", values))
    return found


def _worst(store: Store, scores: Sequence[Score]) -> list[tuple[Subject, dict[str, str]]]:
    """Returns the subjects with a flagged map, worst first, and why, by protocol."""
    reasons: dict[int, dict[str, str]] = {}
    highest: dict[int, float] = {}
    for score in scores:
        if score.flagged:
            reasons.setdefault(score.slot, {})[score.protocol] = f"flagged: {score.flagged}"
            values = (score.volume, score.position, score.contrast, score.agreement)
            highest[score.slot] = max(highest.get(score.slot, 0.0), *(v for v in values if not math.isnan(v)))
    by_slot = {subject.slot: subject for subject in store.subjects}
    order = sorted((slot for slot in reasons if slot in by_slot), key=lambda slot: -highest[slot])
    return [(by_slot[slot], reasons[slot]) for slot in order]


def _pictures(store: Store, heads: Sequence[tuple[Subject, Mapping[str, str]]]) -> dict[str, str]:
    """Returns a picture of each head with its maps, those that were dropped too, by caption."""
    drawn = {}
    for subject, titles in heads:
        named = zip(store.info.protocols, subject.present, strict=True)
        names = [name for name, present in named if present or name in titles]
        maps = dict(zip(names, store.read_labels(subject.slot, names) if names else (), strict=True))
        picture = io.BytesIO()
        save_strip(picture, store.read_image(subject.slot), maps, titles)
        drawn[f"slot {subject.slot}"] = embed(picture.getvalue())
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m data_prep.report", description=__doc__)
    parser.add_argument("--store", required=True, help="a local path, gs://bucket/path or s3://bucket/path")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="output file, .html")
    parser.add_argument("--pictures", type=number(int, 0), default=6, help="heads of each kind (default: 6)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="draws the heads (default: 0)")
    parser.add_argument("--threads", type=number(int, 1), default=4, help="subjects read at the same time")
    return run(parser, _report, arguments)


def _report(options: argparse.Namespace) -> int:
    store = Store.open(options.store)
    page = report(store, options.pictures, options.seed, options.threads, progress=True)
    Files(str(options.out.absolute().parent)).write(options.out.name, page.encode())
    print(options.out)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
