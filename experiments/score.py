"""Scores a network on raw scans, each on its own grid, as `neuronet segment` labels them: Dice per structure.

    python -m experiments.score --manifest=cohort.csv --split=validation --out=scores
    python -m experiments.score --manifest=cohort.csv --run=runs/all_targets --out=scores

The manifest is that of `data_prep.build`: a row per scan, with the label maps of the tools. `experiments.evaluate`
scores on the grid of a store instead, where the network works: what is lost on the way from the scan's own grid and
back counts only here. Writes `dice.tsv` and `summary.json`, as `experiments.evaluate` does.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from data_prep.sources.manifest import read_manifest
from experiments.evaluate import COLUMNS, Evaluation, dice_rows, plain, refuse_existing, save, table
from neuronet_jax import runtime
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation.metrics import DiceTable, Summary, dice_per_class, mean_dice, summarise
from neuronet_jax.images import nifti
from neuronet_jax.inference.segment import segment
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, Parser, run
from neuronet_jax.runs.directory import shipped
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.restore import restore


def score_scan(model: Model, scan: Path, references: Mapping[str, Path]) -> dict[str, DiceTable]:
    """Labels a scan with the default options and compares with the label maps `references`, by protocol.

    Raises NeuronetError for a map on a different grid than the scan's, and as `segment` does.
    """
    found = segment(model, scan, protocols=tuple(references))
    tables = {}
    for name, path in references.items():
        reference = nifti.read_labels(path)
        ids = np.asarray(found[name].dataobj)
        grid = np.asarray(found[name].affine, float)
        if reference.data.shape != ids.shape or not np.allclose(reference.affine, grid, atol=1e-3):
            raise NeuronetError(f"E_GEOMETRY: the map of {name} lies on a different grid than its scan: leave it out")
        protocol = PROTOCOLS[name]
        tables[name] = dice_per_class(
            protocol.to_classes(reference.data), protocol.to_classes(ids), protocol.num_classes
        )
    return tables


def score(model: Model, manifest: Path, split: str, out: Path, overwrite: bool = False) -> dict[str, Summary]:
    """Scores the scans of one split, or of all rows where `split` is empty, and writes the tables below `out`.

    Raises NeuronetError if no such row has a label map, and for an evaluation in `out` without `overwrite`.
    """
    refuse_existing(out, overwrite)
    known = model.config.protocols
    rows = [source for source in read_manifest(manifest) if not split or source.split == split]
    # a manifest lists files, never members of archives
    scans = [(row, {name: Path(str(row.labels[name])) for name in known if name in row.labels}) for row in rows]
    scans = [(row, maps) for row, maps in scans if maps]
    if not scans:
        raise NeuronetError(f"no row of the manifest's {split or 'cohort'} has a label map of {', '.join(known)}")
    lines, scores = ["\t".join(COLUMNS)], {name: [] for name in known}
    console = Console(stderr=True)
    for row, maps in track(scans, "scoring", console=console, disable=not console.is_terminal):
        try:
            tables = score_scan(model, Path(str(row.t1)), maps)
        except NeuronetError as error:
            raise NeuronetError(f"row {row.row} of the manifest: {error}") from error
        for name, found in tables.items():
            lines += dice_rows(row.id, name, found)
            scores[name].append(mean_dice(found))
    summaries = {name: summarise(values) for name, values in scores.items() if values}
    described = {
        "run": model.provenance.to_json(),
        "split": split or "all",
        "grid": "of each scan",
        "protocols": {name: plain(summary) for name, summary in summaries.items()},
    }
    save(out, lines, described)
    return summaries


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m experiments.score", description=__doc__)
    parser.add_argument("--manifest", required=True, type=Path, metavar="CSV", help="table of scans and label maps")
    parser.add_argument(
        "--run", metavar="DIR", help="folder of a run or release (default: the network that ships with the package)"
    )
    parser.add_argument("--split", default="", choices=("train", "validation", "test"), help="default: every row")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace scores that --out holds already")
    return run(parser, _score, arguments)


def _score(args: argparse.Namespace) -> int:
    runtime.plain()
    runtime.keep_compiled()
    runtime.one_per_core()
    model = restore(args.run or shipped())
    summaries = score(model, args.manifest, args.split, args.out, args.overwrite)
    title = f"{model.config.name}, {args.split or 'all'} scans, on their own grids"
    Console().print(table(Evaluation(summaries, {}, math.nan), title))
    print(f"written to {args.out}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
