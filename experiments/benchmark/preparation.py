"""Measures the preparation of data: subjects per minute, memory, and where the time goes.

A cohort of any size is made of the given one: its scans are repeated under new ids, each with noise of its own, because
a build rejects a scan that it has seen. Label maps are repeated as they are.
"""

import cProfile
import csv
import dataclasses
import itertools
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from data_prep.assemble import default_grid
from data_prep.shard import build_shard
from data_prep.sources.files import on_disk
from data_prep.sources.manifest import read_manifest
from data_prep.sources.source import Source
from data_prep.subject import Settings
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.store.writer import StoreWriter

ARCHIVE = 50_000  # subjects, about as many as UK Biobank has scanned
CORES = (32, 512)
DOLLARS = 0.05  # assumed for a core of a cloud and an hour
PROFILED = 6  # subjects
# Functions whose time is that of a stage, as (file, name). None of them runs within another one.
STAGES = {
    "read and inflate the files, check their headers": [("nifti.py", "_read")],
    "resample to the store's grid": [("space.py", "conform"), ("space.py", "place"), ("space.py", "to_grid")],
    "check intensities and labels": [
        ("intensity.py", "clip_spikes"),
        ("intensity.py", "statistics"),
        ("intensity.py", "is_label_map"),
        ("labels.py", "to_classes"),
        ("subject.py", "_check_maps"),
    ],
    "draw foreground points": [("schema.py", "sample_foreground")],
    "hash the content": [("subject.py", "content_hash")],
    "compress and write": [("writer.py", "write_shard")],
}


@dataclasses.dataclass(frozen=True)
class Build:
    """One build by the command line."""

    workers: int
    subjects: int
    seconds: float
    cpu_s: float  # of all its processes
    peak_mib: float  # of the largest one

    @property
    def per_minute(self) -> float:
        return 60 * self.subjects / self.seconds


def measure(manifest: str, subjects: int, voxel_size_mm: float, workers: Sequence[int], out: Path) -> None:
    """Prints and writes the tables of builds, of stages, and of what an archive takes."""
    if not manifest:
        raise NeuronetError("--preparation needs --manifest, a cohort whose scans are repeated")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeated = repeat(read_manifest(Path(manifest)), subjects, folder)
        builds = [build(repeated, count, voxel_size_mm, folder / f"store{count}") for count in workers]
        stored = sum(path.stat().st_size for path in (folder / f"store{workers[0]}").rglob("*") if path.is_file())
        sources = read_manifest(repeated)
        read = sum(on_disk(file).stat().st_size for source in sources for file in source.files.values())
        stages = profile(sources[:PROFILED], voxel_size_mm, folder / "profiled")
    cpu_s = builds[0].cpu_s / subjects
    lines = [f"# Preparation of data, {voxel_size_mm:g} mm\n", *table(builds), ""]
    lines += [
        f"A subject is {read / subjects / 1e6:.1f} MB of files and {stored / subjects / 1e6:.1f} MB of store.",
        "",
    ]
    lines += [*shares(stages), "", *archive(cpu_s, read / subjects)]
    print("\n".join(lines))
    out.mkdir(parents=True, exist_ok=True)
    (out / "preparation.md").write_text("\n".join(lines) + "\n")
    sizes = {"read": read / subjects, "stored": stored / subjects}
    rows = [dataclasses.asdict(row) for row in builds]
    (out / "preparation.json").write_text(json.dumps({"builds": rows, "stages": stages, "bytes": sizes}, indent=2))
    print(f"Written to {out / 'preparation.md'} and {out / 'preparation.json'}")


def repeat(sources: Sequence[Source], subjects: int, folder: Path) -> Path:
    """Writes a manifest of `subjects` rows and their scans, with noise of one level of brightness. Returns its path."""
    manifest = folder / "cohort.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "t1", *PROTOCOLS], restval="")
        writer.writeheader()
        for number, source in zip(range(subjects), itertools.cycle(sources), strict=False):
            scan: Any = nib.load(on_disk(source.t1))
            voxels = np.asanyarray(scan.dataobj)
            noise = np.random.default_rng(number).integers(-1, 2, voxels.shape)
            noisy: Any = np.where(voxels > 0, np.maximum(voxels + noise, 1), voxels).astype(np.int16)
            nib.Nifti1Image(noisy, scan.affine).to_filename(folder / f"{number}.nii.gz")
            labels = {name: str(on_disk(map_).absolute()) for name, map_ in source.labels.items()}
            writer.writerow({"id": f"{1_000_001 + number}", "t1": str(folder / f"{number}.nii.gz"), **labels})
    return manifest


def build(manifest: Path, workers: int, voxel_size_mm: float, store: Path) -> Build:
    """Builds a store by the command line, and measures the command and all processes that it starts."""
    words = [f"--manifest={manifest}", f"--store={store}", f"--workers={workers}", f"--voxel-size-mm={voxel_size_mm:g}"]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep.build", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)  # with its children, which it waits for
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise NeuronetError(f"the build ended with status {process.returncode}; try python -m data_prep.build {words}")
    subjects = len(read_manifest(manifest))
    return Build(workers, subjects, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def profile(sources: Sequence[Source], voxel_size_mm: float, store: Path) -> dict[str, float]:
    """Returns processor seconds per subject of each stage, and of the rest. Threads count for who waits for them."""
    settings = Settings(tuple(PROTOCOLS), default_grid(voxel_size_mm), voxel_size_mm)
    of_store = {"protocols": settings.protocols, "grid": settings.grid, "voxel_size_mm": voxel_size_mm}
    StoreWriter.create(str(store), **of_store, slots=len(sources), shard_subjects=1, provenance={})
    profiler = cProfile.Profile(time.process_time)
    for slot, source in enumerate(sources):
        result = profiler.runcall(build_shard, str(store), slot, [source], settings, {})
        if isinstance(result, NeuronetError) or result.rejects:
            raise NeuronetError("a scan of the manifest is rejected; build it first, and repair what the build names")
    return stage_times(pstats.Stats(profiler).stats, len(sources))  # type: ignore[attr-defined]


def stage_times(stats: Mapping[tuple[str, int, str], tuple], subjects: int) -> dict[str, float]:
    """Returns seconds per subject of each stage and of the rest, from a profile's rows by (file, line, function)."""
    cumulative = {(Path(file).name, name): row[3] for (file, _, name), row in stats.items()}
    missing = [key for keys in STAGES.values() for key in keys[:1] if key not in cumulative]
    if missing:
        raise NeuronetError(f"the profile lacks {missing[0]}: name the function of that stage in {__name__}")
    times = {stage: sum(cumulative.get(key, 0.0) for key in keys) / subjects for stage, keys in STAGES.items()}
    whole = cumulative["shard.py", "build_shard"] / subjects
    return times | {"everything else": whole - sum(times.values())}


def table(builds: Sequence[Build]) -> list[str]:
    rows = [
        "| workers | subjects | subjects/min | processor s per subject | MiB of the largest process |",
        "|---" * 5 + "|",
    ]
    for row in builds:
        cells = (row.workers, row.subjects, f"{row.per_minute:.1f}", f"{row.cpu_s / row.subjects:.2f}")
        rows.append("| " + " | ".join(map(str, cells)) + f" | {row.peak_mib:.0f} |")
    return rows


def shares(stages: Mapping[str, float]) -> list[str]:
    whole = sum(stages.values())
    rows = ["| stage | processor ms per subject | share |", "|---|---|---|"]
    return rows + [f"| {name} | {1000 * s:.0f} | {100 * s / whole:.0f} % |" for name, s in stages.items()]


def archive(cpu_s: float, read_bytes: float) -> list[str]:
    """Returns what an archive takes on so many cores, if its disk keeps up: time = subjects × processor s ÷ cores."""
    rows = [
        f"| cores | hours for {ARCHIVE:,} subjects | $, at {DOLLARS} per core and hour | GB/s to read |",
        "|---" * 4 + "|",
    ]
    for cores in CORES:
        hours = ARCHIVE * cpu_s / cores / 3600
        rate = ARCHIVE * read_bytes / (hours * 3600) / 1e9
        rows.append(f"| {cores} | {hours:.2f} | {hours * cores * DOLLARS:.2f} | {rate:.2f} |")
    return rows
