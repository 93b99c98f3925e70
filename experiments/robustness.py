"""Measures how robust a network is: Dice against the strength of what may be wrong with a scan.

    python -m experiments.robustness --store=stores/brains --split=validation --out=robustness
    python -m experiments.robustness --store=stores/brains --split=validation --run=runs/a --peer --out=robustness

Every scan of the split is disturbed on the grid of the store and segmented as `neuronet segment` does, with the
warnings that its page would have, so that one sees from which strength on a bad scan is flagged. `--peer` adds
DIPY's tissue classifier (a hidden Markov random field, for stripped brains alone), against the maps of `fsl_fast`.
Writes `robustness.tsv`, `robustness.png` and `robustness.json` (the network and the scans), which name no subject.
The same command continues where it was interrupted.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments.evaluate import check
from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation import agreement, plausibility
from neuronet_jax.evaluation.metrics import dice_per_class, mean_dice
from neuronet_jax.evaluation.quality import assess
from neuronet_jax.files import Files
from neuronet_jax.images.space import Volume
from neuronet_jax.inference.segment import segment_volume
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.runs.calibration import UNKNOWN, Calibration, load_calibration
from neuronet_jax.runs.directory import shipped
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.restore import restore
from neuronet_jax.store.reader import Store
from neuronet_jax.training import artefacts
from neuronet_jax.training.augment import warp

Scan = tuple[np.ndarray, np.ndarray]  # image ≥ 0, float32 [x y z]; labels, uint8 [p x y z], UNSCORED where none hold
UNSCORED = 255  # no class of any protocol
TSV, PICTURE, MEASURED = "robustness.tsv", "robustness.png", "robustness.json"
COLUMNS = ("disturbance", "strength", "scan", "method", "protocol", "dice", "warnings")
NETWORK, PEER = "network", "DIPY"
PEER_PROTOCOL = "fsl_fast"  # three tissues by intensity, as the peer has them


@dataclass(frozen=True)
class Disturbance:
    """A fault that a scan may have: `apply(image, labels, strength, voxel_size_mm)`."""

    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[np.ndarray, np.ndarray, float, float], Scan]


def noise(image: np.ndarray, labels: np.ndarray, strength: float, _: float) -> Scan:
    """Adds Gaussian noise to the head; its deviation is `strength` times the head's median."""
    level = strength * np.median(image[image > 0])
    grain = np.random.default_rng(0).normal(0, level, image.shape)
    return np.where(image > 0, np.maximum(image + grain, 0), image).astype(np.float32), labels


def bias(image: np.ndarray, labels: np.ndarray, strength: float, _: float) -> Scan:
    """Brightens from back to front: by e^−strength to e^strength over the grid."""
    ramp = np.exp(strength * np.linspace(-1, 1, image.shape[1], dtype=np.float32))
    return image * ramp[None, :, None], labels


def turn(image: np.ndarray, labels: np.ndarray, strength: float, _: float) -> Scan:
    """Nods the head, and its labels with it, by `strength` degrees."""
    matrix = artefacts.rotation(jnp.deg2rad(jnp.asarray([strength, 0.0, 0.0])))
    moved, classes = warp(jnp.asarray(image)[..., None], jnp.asarray(labels), matrix)
    return np.asarray(moved)[..., 0], np.asarray(classes)


def contrast(image: np.ndarray, labels: np.ndarray, strength: float, _: float) -> Scan:
    """Raises brightness to the power of `strength`, which darkens what is grey."""
    white = np.percentile(image[image > 0], 99)
    return (white * (image / white) ** strength).astype(np.float32), labels


def resolution(image: np.ndarray, labels: np.ndarray, strength: float, voxel_size_mm: float) -> Scan:
    """Averages over axial slices of `strength` mm."""
    thickness = jnp.asarray(strength / voxel_size_mm, jnp.float32)
    return np.asarray(artefacts.thick_slices(jnp.asarray(image), jnp.asarray(2), thickness)), labels


def field_of_view(image: np.ndarray, labels: np.ndarray, strength: float, _: float) -> Scan:
    """Cuts `strength` of the brain's height off at its lower end."""
    heights = np.flatnonzero((image > 0).any(axis=(0, 1)))
    planes = np.arange(image.shape[2])
    missing = (planes >= heights[0]) & (planes < heights[0] + round(strength * len(heights)))
    return image * ~missing, np.where(missing, np.uint8(UNSCORED), labels)


def hole(image: np.ndarray, labels: np.ndarray, strength: float, voxel_size_mm: float) -> Scan:
    """Puts a ball of fluid of `strength` mm radius into one hemisphere, halfway between its middle and its surface."""
    head = np.argwhere(image > 0)
    centre = head.mean(axis=0) - [(head[:, 0].max() - head[:, 0].min()) / 4, 0, 0]
    distance_mm = voxel_size_mm * np.linalg.norm(np.moveaxis(np.indices(image.shape), 0, -1) - centre, axis=-1)
    inside = (distance_mm <= strength) & (image > 0)
    fluid = np.float32(0.3 * np.median(image[image > 0]))  # as bright as CSF is in T1-weighted scans
    return np.where(inside, fluid, image), np.where(inside, np.uint8(UNSCORED), labels)


def motion(image: np.ndarray, labels: np.ndarray, strength: float, voxel_size_mm: float) -> Scan:
    """Moves the head by `strength` mm along each axis after 60 % of k-space."""
    shift = jnp.full(3, strength / voxel_size_mm, jnp.float32)
    moved = artefacts.motion(jnp.asarray(image), jnp.eye(3), shift, jnp.asarray(0.6, jnp.float32))
    return np.maximum(np.asarray(moved), 0), labels


DISTURBANCES = {
    "noise": Disturbance("of the median", (0.1, 0.2, 0.4), noise),
    "bias field": Disturbance("log factor at the ends", (0.3, 0.6, 1.2), bias),
    "rotation": Disturbance("degrees", (15, 30, 60), turn),
    "contrast": Disturbance("exponent", (1.5, 2, 3), contrast),
    "resolution": Disturbance("mm slices", (4, 6, 10), resolution),
    "field of view": Disturbance("of the height missing", (0.15, 0.3, 0.45), field_of_view),
    "motion": Disturbance("mm", (2, 4, 8), motion),
    "hole": Disturbance("mm radius", (5, 15, 25), hole),
}
NEUTRAL: tuple[str, float] = ("none", 0.0)
CASES: tuple[tuple[str, float], ...] = (
    NEUTRAL,
    *((name, float(s)) for name, d in DISTURBANCES.items() for s in d.strengths),
)


Labelled = tuple[Mapping[str, np.ndarray], Sequence[str]]  # classes by protocol; warnings


def measure(
    model: Model, store: Store, split: str, out: Path, peer: bool, calibration: Calibration = UNKNOWN
) -> list[dict[str, str]]:
    """Segments every scan under every disturbance, and returns the rows of robustness.tsv.

    Rows that the file has already are kept. Raises NeuronetError as `evaluate.check`, if they are of a different
    network or of different scans, and without DIPY for `peer`.
    """
    check(model, store, split)
    files = Files(str(out.absolute()))
    _claim(files, model, store, split)
    rows = list(csv.DictReader((files.read(TSV) or b"").decode().splitlines(), delimiter="\t"))
    done = {(row["disturbance"], float(row["strength"]), row["scan"], row["method"]) for row in rows}
    protocols = [name for name in model.config.protocols if name in store.info.protocols]
    todo = [(number, subject, *case) for number, subject in enumerate(store.split(split), 1) for case in CASES]
    console = Console(stderr=True)
    for number, subject, name, strength in track(todo, "disturbing", console=console, disable=not console.is_terminal):
        present = dict(zip(store.info.protocols, subject.present, strict=True))
        names = [protocol for protocol in protocols if present[protocol]]
        methods: dict[str, Callable[[np.ndarray], Labelled]] = {
            NETWORK: lambda image: by_network(model, calibration, image, store.info.voxel_size_mm)
        }
        if peer and PEER_PROTOCOL in names:
            methods[PEER] = by_dipy
        missing = {m: f for m, f in methods.items() if (name, strength, str(number), m) not in done}
        if not missing:
            continue
        image = np.maximum(store.read_image(subject.slot), 0).astype(np.float32)
        labels = np.stack([*store.read_labels(subject.slot, names)])
        if name in DISTURBANCES:
            image, labels = DISTURBANCES[name].apply(image, labels, strength, store.info.voxel_size_mm)
        for method, labelled in missing.items():
            found, warnings = labelled(image)
            for protocol in (name for name in names if name in found):
                reference = labels[names.index(protocol)]
                scored = reference != UNSCORED
                dice = mean_dice(
                    dice_per_class(reference * scored, found[protocol] * scored, PROTOCOLS[protocol].num_classes)
                )
                told = (name, f"{strength:g}", str(number), method, protocol, f"{dice:.6f}", ",".join(warnings))
                rows.append(dict(zip(COLUMNS, told, strict=True)))
        lines = ["\t".join(COLUMNS), *("\t".join(row[column] for column in COLUMNS) for row in rows)]
        files.write(TSV, ("\n".join(lines) + "\n").encode())
    return rows


def _claim(files: Files, model: Model, store: Store, split: str) -> None:
    """Records what is measured. Raises NeuronetError if the folder holds the measurement of something else."""
    scans = {"split": split, "split_hash": store.info.split_hash}
    own = {"network": model.provenance.to_json(), **scans, "columns": COLUMNS}
    content = json.dumps(own, indent=2, sort_keys=True).encode()
    if (before := files.read(MEASURED)) is not None and before != content:
        raise NeuronetError(
            f"{files.dest} holds the measurement of a different network, split or store ({MEASURED}): "
            "choose a different --out"
        )
    files.write(MEASURED, content)


def by_network(model: Model, calibration: Calibration, image: np.ndarray, voxel_size_mm: float) -> Labelled:
    """Returns the classes of every protocol, with the default options, and the warnings of the scan's page."""
    volume = Volume(image, np.diag([voxel_size_mm] * 3 + [1.0]))
    result = segment_volume(model, volume)
    compared = agreement.compare(result.maps, volume.affine)
    implausible = plausibility.check(volume, result.maps, compared, result.removed)
    told = sorted({*result.warnings, *implausible, *assess(result.confidence, calibration).warnings})
    return {name: PROTOCOLS[name].to_classes(ids) for name, ids in result.maps.items()}, told


def by_dipy(image: np.ndarray) -> Labelled:
    """Returns three tissues of a stripped brain, darkest first, as FAST numbers them.

    Raises NeuronetError without DIPY.
    """
    try:
        from dipy.segment.tissue import TissueClassifierHMRF  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise NeuronetError("--peer needs DIPY: pip install 'neuronet-jax[benchmark]'") from error
    _, classes, _ = TissueClassifierHMRF(verbose=False).classify(image.astype(np.float64), nclasses=3, beta=0.1)
    return {PEER_PROTOCOL: np.where(image > 0, np.maximum(classes, 0), 0).astype(np.uint8)}, ()  # −1: it has failed


def means(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], dict[tuple[str, float], float]]:
    """Returns the mean Dice over scans by method and protocol, then by disturbance and strength."""
    found: dict[tuple[str, str], dict[tuple[str, float], list[float]]] = {}
    for row in rows:
        cases = found.setdefault((row["method"], row["protocol"]), {})
        cases.setdefault((row["disturbance"], float(row["strength"])), []).append(float(row["dice"]))
    return {who: {case: float(np.mean(values)) for case, values in cases.items()} for who, cases in found.items()}


def flagged(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, float], str]:
    """Returns how many scans the network's pages flag, and how often by what, by disturbance and strength."""
    told: dict[tuple[str, float], dict[str, list[str]]] = {}
    for row in rows:
        if row["method"] == NETWORK:
            case = told.setdefault((row["disturbance"], float(row["strength"])), {})
            case[row["scan"]] = [code for code in row["warnings"].split(",") if code]
    texts = {}
    for case, scans in told.items():
        codes = Counter(code for codes in scans.values() for code in codes)
        by = f" ({', '.join(f'{code} {n}' for code, n in sorted(codes.items()))})" if codes else ""
        texts[case] = f"{sum(map(bool, scans.values()))} of {len(scans)}{by}"
    return texts


def draw(averages: Mapping[tuple[str, str], Mapping[tuple[str, float], float]], path: Path) -> None:
    """Draws a panel per disturbance, a line per method and protocol, from the undisturbed scan on the left."""
    figure = Figure(figsize=(10, 7), dpi=90, layout="constrained")
    panels = figure.subplots(3, 3, sharey=True).ravel()
    for axes, (name, disturbance) in zip(panels, DISTURBANCES.items(), strict=False):
        for (method, protocol), cases in averages.items():
            points = [cases.get(NEUTRAL), *(cases.get((name, float(s))) for s in disturbance.strengths)]
            values = [np.nan if value is None else value for value in points]
            style = {"linestyle": "--", "color": "black"} if method == PEER else {}
            label = f"{method}: {protocol}" if method == PEER else protocol
            axes.plot(range(len(values)), values, marker="o", markersize=3, label=label, **style)
        axes.set_xticks(range(len(disturbance.strengths) + 1), ["none", *(f"{s:g}" for s in disturbance.strengths)])
        axes.set_title(f"{name} ({disturbance.unit})", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].axis("off")
    panels[-1].legend(handles, labels, fontsize=8, loc="center", title="mean Dice")
    figure.savefig(path)


def table(
    averages: Mapping[tuple[str, str], Mapping[tuple[str, float], float]], flags: Mapping[tuple[str, float], str]
) -> list[list[str]]:
    """Returns mean Dice by disturbance and strength, a column per method and protocol, and the flags; header first."""
    rows = [["disturbance", "strength", *(f"{method}, {protocol}" for method, protocol in averages), "flagged"]]
    for name, strength in CASES:
        values = [cases.get((name, strength)) for cases in averages.values()]
        if any(value is not None for value in values):
            unit = f" {DISTURBANCES[name].unit}" if name in DISTURBANCES else ""
            numbers = ("" if v is None else f"{v:.3f}" for v in values)
            rows.append([name, f"{strength:g}{unit}", *numbers, flags.get((name, strength), "")])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.robustness", description=__doc__)
    parser.add_argument("--store", required=True, metavar="DEST", help="store of the scans")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument(
        "--run", metavar="DIR", help="folder of a run or release (default: the network that ships with the package)"
    )
    parser.add_argument("--peer", action="store_true", help="also DIPY's tissue classifier (stripped brains)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    return run(parser, _robustness, arguments)


def _robustness(options: argparse.Namespace) -> int:
    runtime.plain()
    runtime.keep_compiled()
    runtime.one_per_core()
    run_ = options.run or shipped()
    model, store = restore(run_), Store.open(options.store)
    calibration = load_calibration(run_, model.origin.step)
    measured = measure(model, store, options.split, options.out, options.peer, calibration)
    averages = means(measured)
    header, *rows = table(averages, flagged(measured))
    printed = Table(*header, title=f"mean Dice, {options.split} scans")
    for row in rows:
        printed.add_row(*row)
    Console().print(printed)
    draw(averages, options.out / PICTURE)
    print(f"written to {options.out}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
