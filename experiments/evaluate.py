"""Scores a run on whole held-out scans, as published: Dice per structure, mean ± sd [min] over subjects per protocol.

    python -m experiments.evaluate --run=runs/all_targets --split=test --out=evaluation
    python -m experiments.evaluate --run=runs/all_targets --store=/data/other --split=validation --out=evaluation/other
    python -m experiments.evaluate --run=runs/all_targets --split=test --surfaces --out=evaluation
    python -m experiments.evaluate --run=runs/all_targets --calibrate

Writes `dice.tsv` (a row per subject, protocol and structure), and `summary.json` and `pictures/`, which name no
subject. `--surfaces` adds `hd95_mm` (`inf` if only one map has the structure) and `nsd`, the surface Dice at a
tolerance of one voxel. `--calibrate` scores nothing: it writes the run's quality.json from the validation subjects of
all its stores (or of `--store` alone), as training does at its end.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep.demo.cohort import ensure_demo_store
from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.evaluation.metrics import DiceTable, Summary, mean_dice, summarise
from neuronet_jax.evaluation.scoring import calibrate_on, predict_subject, score, score_surfaces, validation_of
from neuronet_jax.evaluation.surfaces import SurfaceSummary, SurfaceTable, summarise_surfaces
from neuronet_jax.files import Files
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.results.pictures import save_comparison, save_strip
from neuronet_jax.runs.calibration import save_calibration
from neuronet_jax.runs.directory import shipped
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.restore import restore
from neuronet_jax.runtime import keep_compiled, one_per_core
from neuronet_jax.store.reader import Store
from neuronet_jax.store.schema import Subject
from neuronet_jax.store.withdrawal import refuse_withdrawn

COLUMNS = ("subject", "protocol", "index", "name", "dice", "reference_voxels", "predicted_voxels")
DICE, SUMMARY = "dice.tsv", "summary.json"
SURFACE_COLUMNS = ("hd95_mm", "nsd")
PICTURED = 2  # subjects: enough to illustrate the numbers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The summaries of each protocol for which at least one subject has a reference."""

    dice: dict[str, Summary]
    surfaces: dict[str, SurfaceSummary]  # empty unless requested
    tolerance_mm: float  # of the surface Dice


def evaluate(
    model: Model, store: Store, split: str, out: Path, surfaces: bool = False, overwrite: bool = False
) -> Evaluation:
    """Predicts every subject of a split and writes dice.tsv, summary.json and pictures below `out`.

    Only foreground structures are scored. `index` is the tool's id, and `dice` is `nan` if a structure is empty in both
    maps. The tolerance of the surface Dice is one voxel, because a grid cannot resolve less. Raises NeuronetError for
    an empty split, for a voxel size other than the model's, for an evaluation in `out` without `overwrite`, and if
    `out` cannot be written.
    """
    check(model, store, split)
    refuse_existing(out, overwrite)
    subjects = store.split(split)
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NeuronetError(f"cannot write to {out}: {error}; choose a different --out") from error
    lines = ["\t".join((*COLUMNS, *SURFACE_COLUMNS) if surfaces else COLUMNS)]
    scores: dict[str, list[float]] = {name: [] for name in model.config.protocols}
    distances: dict[str, list[SurfaceTable]] = {name: [] for name in model.config.protocols}
    tolerance_mm = store.info.voxel_size_mm
    console = Console(stderr=True)
    for number, subject in enumerate(
        track(subjects, f"scoring {split}", console=console, disable=not console.is_terminal)
    ):
        prediction = predict_subject(model, store, subject)
        tables = score(prediction, store, subject)
        measured = score_surfaces(prediction, store, subject, tolerance_mm) if surfaces else {}
        for name, table in tables.items():
            lines += dice_rows(subject.name, name, table, measured.get(name))
            scores[name].append(mean_dice(table))
        for name, apart in measured.items():
            distances[name].append(apart)
        if number < PICTURED:
            _draw(out / "pictures", number + 1, store, subject, prediction, tables)
    result = Evaluation(
        {name: summarise(values) for name, values in scores.items() if values},
        {name: summarise_surfaces(values) for name, values in distances.items() if values},
        tolerance_mm,
    )
    save(out, lines, _describe(model, store, split, result))
    return result


def save(out: Path, lines: Sequence[str], summary: dict) -> None:
    """Writes dice.tsv and summary.json below `out`."""
    files = Files(str(out.absolute()))
    files.write(DICE, ("\n".join(lines) + "\n").encode())
    files.write(SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises NeuronetError if `out` holds an evaluation that may not be replaced."""
    if not overwrite and (there := [name for name in (DICE, SUMMARY) if (out / name).exists()]):
        raise NeuronetError(
            f"{out} holds an evaluation already ({there[0]}): add --overwrite to replace it, or choose another --out"
        )


def check(model: Model, store: Store, split: str) -> None:
    """Raises NeuronetError if the store cannot score this model. Warns if its split is not the run's own."""
    if not store.split(split):
        raise NeuronetError(f"{store.dest} has no subject in its {split} split: choose a different --split or --store")
    if abs(store.info.voxel_size_mm - model.voxel_size_mm) > 1e-3:
        raise NeuronetError(
            f"the store has voxels of {store.info.voxel_size_mm} mm, the run was trained on {model.voxel_size_mm} mm: "
            "build a store with the --voxel-size-mm of the run"
        )
    if store.info.split_hash != model.origin.split_hash:
        log.warning(
            "the store's splits differ from the run's: make sure that the run was not trained on these subjects"
        )


def dice_rows(subject: str, protocol: str, table: DiceTable, apart: SurfaceTable | None = None) -> list[str]:
    """Returns the lines of dice.tsv for one subject and protocol: foreground structures in class order."""
    return [
        f"{subject}\t{protocol}\t{s.id}\t{s.name}\t{table.dice[s.index]:.6f}"
        f"\t{table.reference_voxels[s.index]}\t{table.predicted_voxels[s.index]}"
        + (f"\t{apart.hd95_mm[s.index]:.4f}\t{apart.nsd[s.index]:.6f}" if apart else "")
        for s in PROTOCOLS[protocol].structures[1:]
    ]


def _draw(
    folder: Path,
    number: int,
    store: Store,
    subject: Subject,
    prediction: dict[str, np.ndarray],
    tables: dict[str, DiceTable],
) -> None:
    """Draws pictures of one subject, numbered instead of named, because pictures are shared."""
    image = store.read_image(subject.slot)
    titles = {name: f"DSC {mean_dice(table):.3f}" for name, table in tables.items()}
    save_strip(folder / f"head{number}.png", image, prediction, titles)
    for name, reference in zip(tables, store.read_labels(subject.slot, list(tables)) if tables else (), strict=True):
        save_comparison(folder / f"head{number}_{name}.png", image, reference, prediction[name], PROTOCOLS[name])


def _describe(model: Model, store: Store, split: str, result: Evaluation) -> dict:
    return {
        "run": model.provenance.to_json(),
        "split": split,
        "split_hash": store.info.split_hash,
        "note": store.info.provenance.get("note", ""),
        "protocols": {name: plain(summary) for name, summary in result.dice.items()},
        "surfaces": {name: plain(summary) for name, summary in result.surfaces.items()},
        "nsd_tolerance_mm": result.tolerance_mm,
    }


def plain(summary: Summary | SurfaceSummary) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in asdict(summary).items()}  # JSON has no NaN


def table(result: Evaluation, title: str) -> Table:
    """Returns the rows of the published table: Dice similarity coefficient, mean ± sd [min] over subjects, and
    surfaces.
    """
    printed = Table("protocol", "tool", "DSC mean ± sd \\[min]", "subjects", title=title)
    if result.surfaces:
        for column in ("HD95 median, mm", f"surface Dice at {result.tolerance_mm:g} mm", "missed structures"):
            printed.add_column(column)
    for name, summary in result.dice.items():
        row = [name, PROTOCOLS[name].tool, str(summary).replace("[", "\\["), str(summary.subjects)]
        if apart := result.surfaces.get(name):
            row += [f"{apart.hd95_mm:.2f}", f"{apart.nsd:.4f}", str(apart.missed)]
        printed.add_row(*row)
    return printed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.evaluate", description=__doc__)
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="workdir of a training run, or a release (default: the network that ships with the package)",
    )
    parser.add_argument("--store", metavar="DEST", help="store of the subjects (default: the run's store)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--out", type=Path, metavar="DIR", help="output folder")
    todo.add_argument("--calibrate", action="store_true", help="write RUN/quality.json from the validation subjects")
    parser.add_argument("--surfaces", action="store_true", help="also HD95 and surface Dice (about 20 s per 1 mm scan)")
    parser.add_argument(
        "--exclude", type=Path, metavar="FILE", help="refuse a store that holds one of these withdrawn participants"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation that --out holds already")
    return run(parser, _evaluate, arguments)


def _evaluate(args: argparse.Namespace) -> int:
    runtime.plain()
    keep_compiled()
    one_per_core()
    if not args.run and args.calibrate:
        raise UsageError("--calibrate writes into the folder of a run: name it with --run")
    if not args.run and not args.store:
        raise UsageError("the network that ships with the package has no store of its own: name one with --store")
    model = restore(args.run or shipped())
    store = Store.open(args.store or model.config.data.store or str(ensure_demo_store()))
    stores = [store]
    if args.calibrate and not args.store:
        stores += map(Store.open, model.config.data.stores)
    if args.exclude:
        refuse_withdrawn(stores, args.exclude)
    if args.calibrate:
        check(model, store, "validation")
        calibration = calibrate_on(model, validation_of(stores))
        save_calibration(args.run, calibration)
        print(f"predicted Dice: {calibration.describe()}")
        return DONE
    result = evaluate(model, store, args.split, args.out, args.surfaces, args.overwrite)
    note = store.info.provenance.get("note", "")
    Console().print(table(result, f"{model.config.name}, {args.split} split" + (f" ({note})" if note else "")))
    print(f"written to {args.out}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
