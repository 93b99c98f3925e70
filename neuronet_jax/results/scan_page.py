"""The page of one scan: slices with every label map, volumes, agreement between the tools, and warnings."""

import datetime
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from neuronet_jax.codes import explain
from neuronet_jax.evaluation import volumetry
from neuronet_jax.evaluation.agreement import Agreement
from neuronet_jax.evaluation.plausibility import BRAIN_MM3
from neuronet_jax.evaluation.quality import Quality
from neuronet_jax.images.space import Volume
from neuronet_jax.labels import PROTOCOLS, REGIONS, Protocol, Structure
from neuronet_jax.results.mosaic import Mosaic, axis_codes
from neuronet_jax.results.pictures import colors_of, votes_colors
from neuronet_jax.results.reports import css, embed, environment, facts, ml
from neuronet_jax.results.tables import cell, of_cell
from neuronet_jax.runs.provenance import Provenance

_LEGEND = 24  # entries of the largest structures: as many as the eye tells apart
_SIDES = ("Left", "Right")  # how the names of structures with a partner begin
_LANDMARK = "ThalamusProper"  # thumbnails show the slices through its middle


@dataclass(frozen=True)
class ScanPage:
    """The contents of one scan's page."""

    name: str
    volume: Volume
    maps: Mapping[str, np.ndarray]  # tool ids, on the volume's grid
    mm3: Mapping[str, np.ndarray]  # volumes of every id, per protocol
    agreement: Agreement
    quality: Quality
    warnings: tuple[str, ...]
    provenance: Provenance
    removed_ml: Mapping[str, float] = field(default_factory=dict)  # per protocol, by the clean-up; empty without it
    source: str = ""  # name of the input file
    command: str = ""  # what made the labels, without folders
    folder_page: str = ""  # link to the page of all scans
    ranges_mm3: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # per calibrated protocol, [2 k], see `intervals`
    coverage: str = ""  # how well they held


@dataclass(frozen=True)
class Layer:
    """A label map to lay over the slices, and the colours that the legend explains."""

    key: str  # its name in the page
    title: str
    labels: np.ndarray  # [x y z], file order
    colors: np.ndarray  # [label 3]
    legend: list[tuple[str, list[str]]]  # name, one colour or those of left and right
    note: str = ""


def render_scan(page: ScanPage) -> tuple[str, bytes]:
    """Returns the page of one scan as HTML, and its thumbnail as WebP."""
    mm3 = page.mm3
    mosaic = Mosaic(page.volume, np.any([ids > 0 for ids in page.maps.values()], axis=0), _structures(page.maps))
    layers = [*_layers(page, mm3)]
    text = environment().get_template("scan.html").render(
        scan=page.name,
        note=page.provenance.note,
        warnings=[(code, _measured(code, mm3) + explain(code)) for code in page.warnings],
        score=of_cell(cell(page.quality.score)),
        calibration=page.quality.calibration,
        unanimous=page.agreement.unanimous,
        consistency=of_cell(cell(page.agreement.consistency)),
        brain_mm3=1000 * of_cell(cell(volumetry.brain_mm3(mm3) / 1000, 1)),
        intracranial_mm3=1000 * of_cell(cell(volumetry.intracranial_mm3(mm3) / 1000, 1)),
        removed_ml=max(page.removed_ml.values(), default=math.nan),
        layers=layers,
        rows=_tiles(mosaic, layers),
        window=mosaic.window,
        protocols=list(page.maps),
        regions=_regions(page, mm3),
        coverage=page.coverage,
        everything=[_everything(name, page.quality, volumes, page.ranges_mm3) for name, volumes in mm3.items()],
        origin=_origin(page),
        command=page.command,
        folder_page=page.folder_page,
        provenance=facts(page.provenance),
    )  # fmt: skip
    first = layers[0]
    return text, mosaic.thumbnail(first.labels, first.colors, _structures(page.maps, _LANDMARK))


def _origin(page: ScanPage) -> dict[str, str]:
    """Returns what identifies the scan and the day on which it was segmented."""
    sides = " × ".join(f"{side:.3g}" for side in page.volume.spacing_mm)
    return {
        "input": page.source or "n/a",
        "grid": " × ".join(map(str, page.volume.data.shape)) + " voxels",
        "voxel size": f"{sides} mm",
        "orientation": axis_codes(page.volume.affine),
        "segmented on": datetime.date.today().isoformat(),
    }


def _structures(maps: Mapping[str, np.ndarray], name: str = "") -> np.ndarray | None:
    """Returns where FIRST's structures are, or those of them whose name ends with `name`: bool [x y z].

    Where FIRST's map is absent, MALP-EM's is used, which has the same structures. The brain stem does not count: it
    reaches far beyond the others.
    """
    wanted = {s.name for s in PROTOCOLS["fsl_first"].structures[1:] if s.side != "midline" and s.name.endswith(name)}
    for protocol in ("fsl_first", "malp_em"):
        if protocol in maps:
            ids = [s.id for s in PROTOCOLS[protocol].structures if s.name in wanted]
            return np.isin(maps[protocol], ids)
    return None


def _layers(page: ScanPage, mm3: Mapping[str, np.ndarray]) -> Iterator[Layer]:
    for name, ids in page.maps.items():
        protocol = PROTOCOLS[name]
        legend, left = _legend(protocol, mm3[name])
        note = f"and {left} others; the tables below have their colours" if left else ""
        yield Layer(name, f"{protocol.tool} ({name})", ids, colors_of(protocol), legend, note)
    if page.agreement.votes is not None:
        voters = len(page.agreement.voters)
        colors = votes_colors(voters)
        legend = [(f"{votes} of {voters}", [css(colors[votes])]) for votes in range(voters, 1, -1)]
        note = "tissue maps that give the voxel its most frequent label among CSF, GM, WM and none"
        yield Layer("votes", "Agreement on tissue", page.agreement.votes, np.array(colors, np.float64), legend, note)


def _legend(protocol: Protocol, mm3: np.ndarray) -> tuple[list[tuple[str, list[str]]], int]:
    """Returns FIRST's and the largest other structures that are present, left and right in one entry, and how many
    others there are.
    """
    entries: dict[int, list[Structure]] = {}
    for s in protocol.structures[1:]:
        if mm3[s.id] > 0:
            entries.setdefault(min(s.index, s.partner), []).append(s)
    by_size = sorted(entries.values(), key=lambda pair: -sum(mm3[s.id] for s in pair))
    deep = {s.name for s in PROTOCOLS["fsl_first"].structures}  # they are small, and looked at most
    largest = sorted(by_size, key=lambda pair: pair[0].name not in deep)[:_LEGEND]
    shown = sorted(largest, key=lambda pair: pair[0].index)
    return [(_unsided(pair), [css(s.color) for s in sorted(pair, key=lambda s: s.side)]) for pair in shown], sum(
        map(len, entries.values())
    ) - sum(map(len, shown))


def _unsided(pair: list[Structure]) -> str:
    if len(pair) == 1:
        return pair[0].name
    return "Left/Right" + pair[0].name.removeprefix(_SIDES[0]).removeprefix(_SIDES[1])


def _tiles(mosaic: Mosaic, layers: list[Layer]) -> list[dict[str, Any]]:
    """Returns the rows of slices, each slice with its image and, per layer, its labels filled and as contours."""
    images = mosaic.image()
    drawn = [(layer.key, mosaic.layers(layer.labels, layer.colors)) for layer in layers]
    return [
        {
            "title": row.title,
            "tiles": [
                {
                    "place": one.place,
                    "letters": one.letters,
                    "image": embed(next(images)),
                    "layers": [(key, *map(embed, next(pictures))) for key, pictures in drawn],
                }
                for one in row.slices
            ],
        }
        for row in mosaic.rows
    ]


def _measured(code: str, mm3: Mapping[str, np.ndarray]) -> str:
    """Returns the figures behind a warning, where there are some."""
    if code != "W_BRAIN_VOLUME":
        return ""
    found = []
    for name in mm3.keys() - {"fsl_first"}:
        volume_mm3 = float(mm3[name][1:].sum())
        if size := "too small" if volume_mm3 < BRAIN_MM3[0] else "too large" if volume_mm3 > BRAIN_MM3[1] else "":
            found.append(f"{name}: {ml(volume_mm3)} ml, {size}")
    return f"{'; '.join(sorted(found))}. "


def _regions(page: ScanPage, mm3: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Returns the volumes by protocol, and the mean Dice of the pairs, of each region that several protocols label."""
    return [
        {
            "name": region.name,
            "volumes": [
                float(mm3[name][list(region.ids[name])].sum()) if name in region.ids else math.nan for name in mm3
            ],
            "dice": page.agreement.mean(region.kind, region.name),
        }
        for region in REGIONS
        if region.ids.keys() & mm3.keys()
    ]


def _everything(name: str, quality: Quality, mm3: np.ndarray, ranges_mm3: Mapping[str, np.ndarray]) -> dict[str, Any]:
    protocol = PROTOCOLS[name]
    unknown = np.full(protocol.num_classes, np.nan)
    low, high = ranges_mm3.get(name, (unknown, unknown))
    entropy, predicted = quality.entropy.get(name, unknown), quality.predicted.get(name, unknown)
    return {
        "title": f"{protocol.tool} ({name})",
        "ranges": name in ranges_mm3,
        "rows": [
            {
                "id": s.id,
                "color": css(s.color),
                "name": s.name,
                "mm3": mm3[s.id],
                "interval": "–" if np.isnan(low[s.index]) else f"{low[s.index]:.0f} to {high[s.index]:.0f}",
                "entropy": entropy[s.index],
                "dice": predicted[s.index],
            }
            for s in protocol.structures[1:]
        ],
    }
