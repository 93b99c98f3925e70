"""Writes the results of one scan."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuronet_jax import __version__
from neuronet_jax.codes import CODES
from neuronet_jax.errors import NeuronetError
from neuronet_jax.evaluation import agreement, intervals, plausibility, quality, volumetry
from neuronet_jax.files import Files
from neuronet_jax.images import nifti
from neuronet_jax.images.space import Volume, voxel_mm3
from neuronet_jax.inference.segmentation import Segmentation
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import shown
from neuronet_jax.results.bids import GENERATOR, Target
from neuronet_jax.results.extras import write_extras
from neuronet_jax.results.scan_page import ScanPage, render_scan
from neuronet_jax.results.tables import Row, cell, file_cell, tsv, volume_table, write_text
from neuronet_jax.runs.calibration import UNKNOWN, Calibration
from neuronet_jax.runs.provenance import Provenance


def write_results(
    target: Target,
    volume: Volume,
    result: Segmentation,
    overwrite: bool,
    provenance: Provenance,
    calibration: Calibration = UNKNOWN,
    report: bool = True,
    command: str = "",
    also: Sequence[str] = (),
) -> Row:
    """Writes one scan's results, each file under its final name only when complete. Returns the scan's row.

    `calibration` belongs to the model's run; `report` asks for the page, which tells the options in `command`; `also`
    asks for `extras`. Raises NeuronetError if writing fails.
    """
    maps = result.maps
    counts = volumetry.voxel_counts(maps)
    mm3 = volumetry.volumes_mm3(counts, volume.affine)
    ranges_mm3 = intervals.intervals_of(mm3, calibration.volumes)
    compared = agreement.compare(maps, volume.affine)
    expected = quality.assess(result.confidence, calibration)
    removed_ml = {name: voxels * voxel_mm3(volume.affine) / 1000 for name, voxels in result.removed.items()}
    implausible = plausibility.check(volume, maps, compared, result.removed)
    warnings = sorted({*volume.warnings, *result.warnings, *implausible, *expected.warnings})
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        for name, ids in maps.items():
            nifti.write_labels(target.labels(name), ids, volume, overwrite)
            what = f"Labels in the style of {PROTOCOLS[name].tool}, predicted by {GENERATOR}"
            cleaned = {"RemovedMillilitres": round(removed_ml[name], 1)} if name in removed_ml else None
            _write_sidecar(target.labels(name), what, name, volume, warnings, provenance, cleaned)
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
        if (mask := volumetry.brain_mask(maps)) is not None:
            nifti.write_labels(target.mask, mask, volume, overwrite)
            what = "Brain: voxels that at least half of the tools label, without holes"
            _write_json(target.mask, {"Description": what, "Type": "Brain"}, provenance)
        write_extras(target, volume, maps, mm3, also, overwrite)
        write_text(target.volumes, volume_table(counts, volume.affine, ranges_mm3))
        write_text(target.table("agreement"), tsv(agreement.table(compared)))
        if expected.predicted:
            write_text(target.table("quality"), tsv(quality.table(expected)))
        if report:
            up = "../" * len(target.folder.relative_to(target.out).parts)
            page = ScanPage(
                target.stem,
                volume,
                maps,
                mm3,
                compared,
                expected,
                tuple(warnings),
                provenance,
                removed_ml,
                shown(target.source.name),
                shown(f"neuronet segment {target.source.name} {command}".rstrip()),
                f"{up}report.html",
                ranges_mm3,
                intervals.describe(calibration.volumes, list(ranges_mm3)),
            )
            text, thumbnail = render_scan(page)
            Files(str(target.folder.absolute())).write(target.thumbnail.name, thumbnail)
            write_text(target.report, text)
    except OSError as error:
        raise NeuronetError(
            f"cannot write to {target.folder}: {error}; make room, or choose a different --out folder"
        ) from error
    return Row(
        file_cell(target.source.name),
        target.stem,
        "done",
        warnings=",".join(warnings) or "n/a",
        agreement=cell(compared.consistency),
        predicted_dice=cell(expected.score),
        calibrated="n/a" if np.isnan(expected.score) else "yes" if calibration.heads else "no",
        removed_ml=f"{max(removed_ml.values()):.1f}" if removed_ml else "n/a",
        brain_ml=cell(volumetry.brain_mm3(mm3) / 1000, 1),
        intracranial_ml=cell(volumetry.intracranial_mm3(mm3) / 1000, 1),
    )


def _write_sidecar(
    path: Path,
    what: str,
    protocol: str,
    volume: Volume,
    warnings: Sequence[str],
    provenance: Provenance,
    cleaned: Mapping[str, float] | None = None,
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
        **(cleaned or {}),
    }
    _write_json(path, content, provenance)


def _write_json(path: Path, content: dict[str, Any], provenance: Provenance) -> None:
    """Writes the sidecar of an image, with the model's note, for example that it is a demonstration."""
    if provenance.note:
        content["Note"] = provenance.note
    write_text(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), json.dumps(content, indent=2) + "\n")
