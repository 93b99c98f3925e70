"""The page of all scans in a folder: which to look at first, how they look, and how their volumes compare."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuronet_jax.errors import shortened
from neuronet_jax.labels import PROTOCOLS, REGIONS, is_comparable
from neuronet_jax.results.bids import Target
from neuronet_jax.results.reports import css, environment, explained, facts
from neuronet_jax.results.tables import Row, Volumes, of_cell
from neuronet_jax.runs.calibration import Calibration
from neuronet_jax.runs.provenance import Provenance

FAR = 3.5  # robust deviations of an outlier (Iglewicz and Hoaglin, "How to detect and handle outliers", 1993)
LEAST_FOR_OUTLIERS = 10  # scans: with fewer, the median absolute deviation is hardly known
MOST_OUTLIERS, MOST_THUMBNAILS = 40, 200  # as many as a person looks through; 200 pictures are 3 MB
_NAMED = 3  # scans that a dot names where several share its place, and structures that are absent
_FEW = 5  # colours that a legend of one line explains
_WIDTH = 220  # of a drawn axis, in pixels


def in_order(rows: Sequence[Row], volumes: Volumes) -> list[Row]:
    """Returns the scans in the order in which to look at them.

    Rejected ones come first, then those with most warnings, with absent structures, with unusual volumes, and with the
    lowest predicted Dice.
    """
    absent = _absent(volumes)
    unusual = {row["scan"]: row["z"] for row in reversed(_outliers(volumes))}

    def urgency(row: Row) -> tuple[Any, ...]:
        warnings = 0 if row.warnings == "n/a" else 1 + row.warnings.count(",")
        dice = 1.0 if row.predicted_dice == "n/a" else float(row.predicted_dice)
        return (
            row.status == "done",
            -warnings,
            -len(absent.get(row.output, ())),
            -abs(unusual.get(row.output, 0.0)),
            dice,
            row.key,
        )

    return sorted(rows, key=urgency)


def render_cohort(
    rows: Sequence[Row],
    volumes: Volumes,
    agreements: Mapping[str, Sequence[Mapping[str, str]]],
    thumbnails: Mapping[str, str],
    calibration: Calibration,
    provenance: Provenance,
) -> str:
    """Returns the page of all scans in a folder as HTML, with `rows` in the order given (see `in_order`).

    `agreements` has the rows of each scan's agreement table, `thumbnails` a data URL of each scan's small picture,
    empty for scans that have a page and no picture.
    """
    absent = _absent(volumes)
    shown = [
        {**vars(row), "remarks": row.warnings.replace("n/a", "").replace(",", ", "),
         "absent": _absence(absent.get(row.output, ())),
         "dice": of_cell(row.predicted_dice), "agree": of_cell(row.agreement),
         "brain_mm3": 1000 * of_cell(row.brain_ml), "intracranial_mm3": 1000 * of_cell(row.intracranial_ml),
         "link": _link(row.output) if row.output in thumbnails else ""}
        for row in rows
    ]  # fmt: skip
    numbers = {scan: number for number, scan in enumerate(volumes.scans)}  # by which dots know their scans
    pictures = [
        {"name": row.output, "link": _link(row.output), "source": source, "remarks": row.warnings.replace("n/a", ""),
         "number": numbers.get(row.output, -1)}
        for row in rows
        if (source := thumbnails.get(row.output))
    ]  # fmt: skip
    outliers = _outliers(volumes)
    return environment().get_template("cohort.html").render(
        rows=shown,
        done=sum(row.status == "done" for row in rows),
        note=provenance.note,
        warned=explained(rows),
        calibration=calibration.describe() if any(row.predicted_dice != "n/a" for row in rows) else "",
        thumbnails=pictures,
        hidden=len(thumbnails) - len(pictures),
        outlines=_outlines(volumes),
        scans=len(volumes.scans),
        agreement=_agreement(agreements),
        distribution=_distributions(volumes) if len(volumes.scans) > 1 else [],
        outliers=outliers[:MOST_OUTLIERS],
        far=FAR,
        provenance=facts(provenance),
    )  # fmt: skip


def _absent(volumes: Volumes) -> dict[str, list[str]]:
    """Returns, by scan, the structures that are absent and that more than half of the scans have."""
    present = np.nan_to_num(volumes.values, nan=0.0) > 0
    usual = present.sum(axis=0) * 2 > np.isfinite(volumes.values).sum(axis=0)
    found = zip(volumes.scans, usual & (volumes.values == 0), strict=True)
    return {scan: [volumes.columns[i] for i in np.flatnonzero(missing)] for scan, missing in found if missing.any()}


def _absence(columns: Sequence[str]) -> str:
    """Names the absent structures for people."""
    if not columns:
        return ""
    named = [f"{name} ({protocol})" for protocol, _, name in (column.partition(".") for column in columns)]
    return f"absent: {', '.join(shortened(named, _NAMED))}"


def _outlines(volumes: Volumes) -> dict[str, Any]:
    """Returns the protocol whose outlines the thumbnails have, and its colours if there are few.

    It is the first one that was asked for, in the tables as in the pictures.
    """
    if not volumes.columns:
        return {}
    protocol = PROTOCOLS[volumes.columns[0].partition(".")[0]]
    colors = [(s.name, css(s.color)) for s in protocol.structures[1:]]
    return {"title": f"{protocol.tool} ({protocol.name})", "colors": colors if len(colors) <= _FEW else []}


def _agreement(agreements: Mapping[str, Sequence[Mapping[str, str]]]) -> list[dict[str, Any]]:
    """Returns the mean and lowest Dice of every region and pair of protocols, over the scans to which it applies.

    Pairs that define the region differently are left out: their Dice says nothing about either.
    """
    found: dict[tuple[str, ...], list[tuple[float, str]]] = defaultdict(list)
    for scan, rows in agreements.items():
        for row in rows:
            named = row["region"], row["first"], row["second"]
            if row["kind"] != "merge" and row["dice"] != "n/a" and is_comparable(*named):
                found[named].append((float(row["dice"]), scan))
    return [
        {
            "region": region, "first": first, "second": second, "scans": len(values),
            "mean": float(np.mean([dice for dice, _ in values])), "lowest": min(values)[0], "scan": min(values)[1],
        }
        for (region, first, second), values in found.items()
    ]  # fmt: skip


def _distributions(volumes: Volumes) -> list[dict[str, Any]]:
    """Returns, for every region that several protocols label, the volumes of all scans as named dots on a line."""
    found = [(r.name, name, volumes.of(name, ids)) for r in REGIONS for name, ids in r.ids.items()]
    return [
        _distribution(name, protocol, values, volumes.scans)
        for name, protocol, values in found
        if not np.isnan(values).all()
    ]


def _distribution(name: str, protocol: str, values: np.ndarray, scans: Sequence[str]) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    least, most, median = float(known.min()), float(known.max()), float(np.median(known))
    places: dict[float, list[int]] = defaultdict(list)  # scans that share a pixel share a dot
    for number, value in enumerate(values):
        if not math.isnan(value):
            places[_x(float(value), least, most)].append(number)
    far = (len(known) >= LEAST_FOR_OUTLIERS) & (np.abs(_deviations(values)) > FAR)
    dots = [
        {"x": x, "scans": numbers, "title": _title(numbers, scans, values), "far": bool(far[numbers].any())}
        for x, numbers in sorted(places.items())
    ]  # fmt: skip
    return {
        "name": name, "protocol": protocol, "least": least, "most": most, "median": median,
        "tick": _x(median, least, most), "dots": dots,
        "smallest": scans[int(np.nanargmin(values))], "largest": scans[int(np.nanargmax(values))],
    }  # fmt: skip


def _title(numbers: Sequence[int], scans: Sequence[str], values: np.ndarray) -> str:
    return ", ".join(shortened([f"{scans[number]}: {values[number] / 1000:.4g} ml" for number in numbers], _NAMED))


def _outliers(volumes: Volumes) -> list[dict[str, Any]]:
    rows = []
    if len(volumes.scans) >= LEAST_FOR_OUTLIERS:
        for column, values in zip(volumes.columns, volumes.values.T, strict=True):
            protocol, _, name = column.partition(".")
            deviations = _deviations(values)
            for number in np.flatnonzero(np.abs(deviations) > FAR):
                rows.append({"scan": volumes.scans[number], "name": name, "protocol": protocol,
                             "value": values[number], "z": float(deviations[number]),
                             "median": float(np.nanmedian(values))})  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row["z"]))


def _deviations(values: np.ndarray) -> np.ndarray:
    """Returns how many robust standard deviations each value is above the median, or zeros if they have no spread.

    NaN stays NaN and does not count.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return values
    median = np.median(known)
    spread = 1.4826 * np.median(np.abs(known - median))  # equals the standard deviation of a normal distribution
    return (values - median) / spread if spread > 0 else np.zeros_like(values)


def _x(value: float, least: float, most: float) -> float:
    """Returns the position of a value on a drawn axis, in pixels."""
    share = (value - least) / (most - least) if most > least else 0.5
    return round(6 + share * (_WIDTH - 12), 1)


def _link(stem: str) -> str:
    return Target(Path(), Path(), stem).report.as_posix()
