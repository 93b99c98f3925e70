"""Writes the results of one scan, and those of all scans together."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuronet_jax import __version__
from neuronet_jax.codes import CODES
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation import agreement, plausibility, quality
from neuronet_jax.images import nifti
from neuronet_jax.images.space import Volume
from neuronet_jax.inference.segmentation import Segmentation
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.results import reports
from neuronet_jax.results.bids import GENERATOR, Target, bids_label
from neuronet_jax.results.tables import (
    Row,
    color_table,
    label_table,
    read_tsv,
    tsv,
    volume_table,
    volumes_of,
    votes_table,
    write_text,
)
from neuronet_jax.runs.calibration import UNKNOWN, Calibration
from neuronet_jax.runs.provenance import Provenance

_NO_BIDS = (  # files without a name in BIDS
    *("summary*.tsv", "volumes.tsv", "*_volumes.tsv", "*_agreement.tsv", "*_quality.tsv", "*_provenance.json"),
    *("*_lut.txt", "*report.html"),
)


def prepare(out: Path, protocols: Sequence[str], provenance: Provenance, overwrite: bool) -> None:
    """Creates the dataset: its description and the look-up tables.

    Raises NeuronetError if `out` cannot be written, or holds a different dataset or results of a different provenance.
    """
    made_by = {**provenance.to_json(), "label_tables_sha256": {name: PROTOCOLS[name].version for name in protocols}}
    description = {
        "Name": f"{GENERATOR} segmentations",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": GENERATOR, "Version": __version__, "Description": json.dumps(made_by)}],
    }
    existing = out / "dataset_description.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(existing.read_text()) if existing.exists() else description
        if [tool.get("Name") for tool in there.get("GeneratedBy", [])] != [GENERATOR]:
            raise NeuronetError(
                f"{out} holds a different dataset, {there.get('Name')!r}: choose a different --out folder"
            )
        if there != description and not overwrite:
            raise NeuronetError(
                f"{out} holds results of a different model or different options: add --overwrite to replace them, or "
                "choose a different --out folder"
            )
        write_text(existing, json.dumps(description, indent=2) + "\n")
        write_text(out / ".bidsignore", "\n".join(_NO_BIDS) + "\n")
        for name in protocols:
            write_text(out / f"seg-{bids_label(name)}_dseg.tsv", label_table(PROTOCOLS[name]))
            write_text(out / f"seg-{bids_label(name)}_lut.txt", color_table(PROTOCOLS[name]))
        if (voters := sum(name in agreement.VOTERS for name in protocols)) > 1:
            write_text(out / "desc-agreement_dseg.tsv", votes_table(voters))
    except (OSError, ValueError) as error:
        raise NeuronetError(f"cannot write to {out}: {error}; choose a different --out folder") from error


def write_results(
    target: Target,
    volume: Volume,
    result: Segmentation,
    overwrite: bool,
    provenance: Provenance,
    calibration: Calibration = UNKNOWN,
    report: bool = True,
) -> Row:
    """Writes one scan's results, each file under its final name only when complete. Returns the scan's row.

    `calibration` belongs to the model's run; `report` asks for the page. Raises NeuronetError if writing fails.
    """
    maps = result.maps
    compared = agreement.compare(maps, volume.affine)
    expected = quality.assess(result.confidence, calibration)
    warnings = sorted({*volume.warnings, *plausibility.check(volume, maps, compared), *expected.warnings})
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        for name, ids in maps.items():
            nifti.write_labels(target.labels(name), ids, volume, overwrite)
            what = f"Labels in the style of {PROTOCOLS[name].tool}, predicted by {GENERATOR}"
            _write_sidecar(target.labels(name), what, name, volume, warnings, provenance)
        for wanted, probability in result.posteriors.items():
            nifti.write_posterior(target.posterior(wanted), probability, volume, overwrite)
            name, _, structure = wanted.partition(":")
            what = f"Probability of {structure} as labelled by {PROTOCOLS[name].tool}, by {GENERATOR}; not calibrated"
            _write_sidecar(target.posterior(wanted), what, name, volume, warnings, provenance)
        if compared.votes is not None:
            nifti.write_labels(target.votes, compared.votes, volume, overwrite)
            what = "Number of protocols that give the voxel its most frequent tissue (CSF, GM, WM or none)"
            content = {"Description": f"{what}; 0 if no protocol labels it as tissue", "Protocols": compared.voters}
            _write_json(target.votes, content, provenance)
        write_text(target.volumes, volume_table(maps, volume.affine))
        write_text(target.table("agreement"), tsv(agreement.table(compared)))
        if expected.predicted:
            write_text(target.table("quality"), tsv(quality.table(expected)))
        if report:
            page = reports.ScanPage(target.stem, volume, maps, compared, expected, tuple(warnings), provenance)
            write_text(target.report, reports.render_scan(page))
    except OSError as error:
        raise NeuronetError(
            f"cannot write to {target.folder}: {error}; make room, or choose a different --out folder"
        ) from error
    return Row(
        target.source.name,
        target.stem,
        "done",
        warnings=",".join(warnings) or "n/a",
        agreement=_number(compared.consistency),
        predicted_dice=_number(expected.score),
        calibrated="n/a" if np.isnan(expected.score) else "yes" if calibration.heads else "no",
    )


def _number(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:.4f}"


def write_cohort(
    out: Path,
    rows: Sequence[Row],
    provenance: Provenance,
    calibration: Calibration = UNKNOWN,
    report: bool = True,
) -> None:
    """Writes OUT/volumes.tsv for all scans below `out` and, with `report`, report.html.

    With `report`, the page of each scan in `rows` also gets its comparison with the other scans. Arguments are as for
    `write_results`. Raises NeuronetError if writing fails.
    """
    table = volumes_of(out)
    write_text(out / "volumes.tsv", tsv([["scan", *table.columns], *table.rows()]))
    if not report:
        return
    thumbnails, agreements = {}, {}
    for target in (Target(Path(row.input), out, row.output) for row in rows if row.status == "done"):
        if target.table("agreement").exists():
            agreements[target.stem] = read_tsv(target.table("agreement"))
        if target.report.exists():
            text = target.report.read_text(encoding="utf-8")
            thumbnails[target.stem] = reports.thumbnail(text)
            if (placed := reports.place_among(text, target.stem, table)) != text:
                write_text(target.report, placed)
    write_text(out / "report.html", reports.render_cohort(rows, table, agreements, thumbnails, calibration, provenance))


def _write_sidecar(
    path: Path, what: str, protocol: str, volume: Volume, warnings: Sequence[str], provenance: Provenance
) -> None:
    members = provenance.members
    content = {
        "Description": what,
        "Manual": False,
        "Protocol": protocol,
        "LabelTableSHA256": PROTOCOLS[protocol].version,
        "WeightsSHA256": [member.weights_sha256 or "n/a" for member in members],
        "Config": [member.config or "n/a" for member in members],
        "Version": __version__,
        "Warnings": list(warnings),
        "Repairs": [CODES[code].meaning for code in sorted(volume.warnings) if CODES[code].repair],
    }
    _write_json(path, content, provenance)


def _write_json(path: Path, content: dict[str, Any], provenance: Provenance) -> None:
    """Writes the sidecar of an image, with the model's note, for example that it is a demonstration."""
    if provenance.note:
        content["Note"] = provenance.note
    write_text(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), json.dumps(content, indent=2) + "\n")
