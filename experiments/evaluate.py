"""Scores a run on whole held-out heads, as published: Dice per structure, mean ± sd [min] over subjects per protocol.

    python -m experiments.evaluate --run=runs/all_targets --split=test --out=evaluation
    python -m experiments.evaluate --run=runs/all_targets --store=/data/other --split=validation --out=evaluation/other

writes `dice.tsv` (a row per subject, protocol, structure), and `summary.json` and `pictures/`, which name no subject.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_prep.demo import ensure_demo_store
from experiments.pictures import save_comparison, save_strip
from neuronet_jax.compilation import keep_compiled
from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.inference import Model, restore
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.metrics import DiceTable, Summary, mean_dice, summarise
from neuronet_jax.scoring import predict_subject, score
from neuronet_jax.store import Store, Subject

COLUMNS = ("subject", "protocol", "index", "name", "dice", "reference_voxels", "predicted_voxels")
PICTURED = 2  # subjects: enough to see what the numbers mean

log = logging.getLogger(__name__)


def evaluate(model: Model, store: Store, split: str, out: Path) -> dict[str, Summary]:
    """Predicts every subject of a split and writes dice.tsv, summary.json and pictures below `out`.

    Returns the summary of each protocol that at least one subject has a reference for. Structures are foreground only,
    `index` is the tool's id, `dice` is `nan` where a structure is empty in both maps. Raises NeuronetError for an empty
    split, for another voxel size than the model's, and where `out` cannot be written.
    """
    check(model, store, split)
    subjects = store.split(split)
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NeuronetError(f"cannot write to {out}: {error}; choose another --out") from error
    lines = ["\t".join(COLUMNS)]
    scores: dict[str, list[float]] = {name: [] for name in model.config.protocols}
    console = Console(stderr=True)
    for number, subject in enumerate(
        track(subjects, f"scoring {split}", console=console, disable=not console.is_terminal)
    ):
        prediction = predict_subject(model, store, subject)
        tables = score(prediction, store, subject)
        for name, table in tables.items():
            lines += dice_rows(subject.id, name, table)
            scores[name].append(mean_dice(table))
        if number < PICTURED:
            _draw(out / "pictures", number + 1, store, subject, prediction, tables)
    summaries = {name: summarise(values) for name, values in scores.items() if values}
    files = Files(str(out.absolute()))
    files.write("dice.tsv", ("\n".join(lines) + "\n").encode())
    files.write("summary.json", (json.dumps(_describe(model, store, split, summaries), indent=2) + "\n").encode())
    return summaries


def check(model: Model, store: Store, split: str) -> None:
    """Raises NeuronetError where the store cannot score this model; warns where its split is not the run's own."""
    if not store.split(split):
        raise NeuronetError(f"{store.dest} has no subject in its {split} split: choose another --split or --store")
    if abs(store.info.voxel_size_mm - model.voxel_size_mm) > 1e-3:
        raise NeuronetError(
            f"the store has voxels of {store.info.voxel_size_mm} mm, the run was trained on {model.voxel_size_mm} mm: "
            "build a store with --voxel_size_mm of the run"
        )
    if store.info.split_hash != model.provenance.get("split_hash"):
        log.warning("the store's splits are not those of the run: make sure that it was not trained on these subjects")


def dice_rows(subject: str, protocol: str, table: DiceTable) -> list[str]:
    """The lines of dice.tsv for one subject and protocol, foreground structures in class order."""
    return [
        f"{subject}\t{protocol}\t{s.id}\t{s.name}\t{table.dice[s.index]:.6f}"
        f"\t{table.reference_voxels[s.index]}\t{table.predicted_voxels[s.index]}"
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
    """Pictures of one subject, numbered and not named: they are for sharing."""
    image = store.read_image(subject.slot)
    titles = {name: f"DSC {mean_dice(table):.3f}" for name, table in tables.items()}
    save_strip(folder / f"head{number}.png", image, prediction, titles)
    for name, reference in zip(tables, store.read_labels(subject.slot, list(tables)) if tables else (), strict=True):
        save_comparison(folder / f"head{number}_{name}.png", image, reference, prediction[name], PROTOCOLS[name])


def _describe(model: Model, store: Store, split: str, summaries: dict[str, Summary]) -> dict:
    return {
        "run": model.provenance,
        "split": split,
        "split_hash": store.info.split_hash,
        "note": store.info.provenance.get("note", ""),
        "protocols": {
            name: {key: None if value != value else value for key, value in asdict(summary).items()}  # NaN is no JSON
            for name, summary in summaries.items()
        },
    }


def table(summaries: dict[str, Summary], title: str) -> Table:
    """The published table's rows: Dice similarity coefficient, mean ± sd [min] over subjects."""
    result = Table("protocol", "tool", "DSC mean ± sd \\[min]", "subjects", title=title)
    for name, summary in summaries.items():
        result.add_row(name, PROTOCOLS[name].tool, str(summary).replace("[", "\\["), str(summary.subjects))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "experiments.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="workdir of a training run")
    parser.add_argument("--store", metavar="DEST", help="where the subjects are (default: the run's store)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    keep_compiled()
    try:
        model = restore(args.run)
        store = Store.open(args.store or model.config.data.store or str(ensure_demo_store()))
        summaries = evaluate(model, store, args.split, args.out)
    except NeuronetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    note = store.info.provenance.get("note", "")
    Console().print(table(summaries, f"{model.config.name}, {args.split} split" + (f" ({note})" if note else "")))
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
