"""From images and label maps on disk to a finished store.

    python -m data_prep.build --manifest=cohort.csv --store=stores/cohort
    python -m data_prep.build --ukb=/archive --spm='/spm/{eid}_{instance}.nii.gz' --store=stores/ukb
    python -m data_prep.build --bids=/dataset --store=gs://bucket/cohort --scheduler=tcp://head:8786

One task is one whole shard: its subjects are read, checked, conformed and written by one worker, once. A build that
was killed is continued by the same command: shards with a record of their own are done. Unusable subjects go to
rejects.tsv with a code and a reason.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from data_prep.assemble import MAX_REJECT_FRACTION, build_sources
from data_prep.outcome import BuildReport, TooManyRejects, explained, summary
from data_prep.sources.bids import read_dataset
from data_prep.sources.manifest import read_manifest
from data_prep.sources.source import Source, check
from data_prep.sources.ukb import read_archive
from data_prep.splits import assign_splits
from data_prep.tools.complete import Settings as Tools
from data_prep.tools.complete import complete
from data_prep.tools.tools import TOOLS
from neuronet_jax.errors import UsageError
from neuronet_jax.images.headers import DEFAULT_LIMITS, Limits
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, PARTIAL, Parser, number, run
from neuronet_jax.store.withdrawal import read_ids, unknown_lines

log = logging.getLogger(__name__)


def build(manifest: Path, store: str, **options: Any) -> BuildReport:
    """Builds the store of a manifest (columns in `data_prep.sources.manifest`); `options` as for `build_cohort`."""
    return build_cohort(read_manifest(Path(manifest)), store, "the manifest", **options)


def build_cohort(
    sources: Sequence[Source],
    store: str,
    where: str,
    *,
    exclude: Path | None = None,
    splits: Path | None = None,
    tools: Tools | None = None,
    **options: Any,
) -> BuildReport:
    """Builds the store of all `sources` but those on the list `exclude`, in the splits of a file, of the sources or of
    a hash. `where` names the sources in messages, `tools` make label maps that are absent; `options` as for
    `build_sources`.
    """
    excluded = read_ids(Path(exclude)) if exclude else {}
    sources = assign_splits(sources, Path(splits) if splits else None)
    if tools:
        sources = _with_tools(sources, excluded, tools, options)
    if unknown := unknown_lines(excluded, {source.id for source in sources}, where):
        log.warning(unknown)
    if absent := [name for name in PROTOCOLS if not any(name in source.labels for source in sources)]:
        log.warning("%s has no map of %s: the store will lack these protocols", where, ", ".join(absent))
    return build_sources(sources, store, excluded=excluded, **options)


def _with_tools(
    sources: Sequence[Source], excluded: Collection[str], tools: Tools, options: dict[str, Any]
) -> list[Source]:
    """Returns the sources with the maps that tools made. Raises TooManyRejects if more fail than may be rejected.

    No tool sees the scan of a participant who has withdrawn.
    """
    check(sources)
    known = [source for source in sources if source.id not in excluded]
    done = complete(known, tools, options.get("limits", DEFAULT_LIMITS), options.get("progress", False))
    if done.failed > options.get("max_reject_fraction", MAX_REJECT_FRACTION) * done.tried:
        raise TooManyRejects(
            f"{done.failed} of {done.tried} runs of tools failed; see their logs in {tools.out}, repair what they name "
            "or raise --max-reject-fraction, and run it again",
            {"W_TOOL": done.failed},
        )
    made = {(source.id, source.visit): source for source in done.sources}
    return [made.get((source.id, source.visit), source) for source in sources]


# ---- command line ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    statuses = {PARTIAL: "more rejects than --max-reject-fraction; the store is unfinished"}
    parser = Parser("python -m data_prep.build", description=__doc__, statuses=statuses)
    add = parser.add_argument
    add("--store", required=True, help="the store to write: a local path, gs://bucket/path or s3://bucket/path")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--manifest",
        type=Path,
        help="CSV: id,t1,fsl_fast,fsl_first,spm_tissue,malp_em,malp_em_tissue[,split][,visit]",
    )
    source.add_argument("--ukb", type=Path, help="folder with UK Biobank's EID_20252_2_0.zip, or unpacked ones")
    source.add_argument("--bids", type=Path, help="BIDS dataset with label maps in its derivatives")
    ukb = parser.add_argument_group("with --ukb")
    pattern = "path of the study's own map, such as /data/{eid}_{instance}.nii.gz"
    ukb.add_argument("--spm", metavar="PATTERN", help=pattern)
    ukb.add_argument("--malp-em", metavar="PATTERN", help=pattern)
    ukb.add_argument("--malp-em-tissue", metavar="PATTERN", help=pattern)
    ukb.add_argument("--fast", choices=("seg", "pveseg"), help="which map of FAST to take (default: seg)")
    ukb.add_argument("--instances", metavar="2,3", help="imaging visits to take (default: all)")
    tools = parser.add_argument_group("with --run-tools")
    add(
        "--run-tools",
        type=_names,
        metavar="NAMES",
        help=f"tools to run for label maps that are absent, from {', '.join(TOOLS)}",
    )
    tools.add_argument("--tools-out", type=Path, metavar="DIR", help="where their maps and logs are kept")
    tools.add_argument(
        "--tool",
        type=_words,
        action="append",
        metavar="NAME=WORDS",
        help="what comes before a tool's arguments, such as fsl_fast='apptainer exec fsl.sif'; {folder}: its folder",
    )
    tools.add_argument("--tool-jobs", type=number(int, 1), default=1, help="scans at the same time (default: 1)")
    tools.add_argument("--tool-hours", type=number(float, 0.001), help="time limit for each program (default: its own)")
    tools.add_argument("--stripped", action="store_true", help="scans are skull-stripped: FSL need not do it")
    add("--exclude", type=Path, help="ids of withdrawn participants, one per line")
    add(
        "--splits",
        type=Path,
        help="CSV id,split for subjects without a split (default: 90/5/5 %% by a hash of the id)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--workers", type=number(int, 0), help="processes on this machine (default: one per core; 0: in this process)"
    )
    where.add_argument("--scheduler", help="address of a Dask scheduler, e.g. of dask-jobqueue on Slurm")
    add(
        "--repair",
        action="store_true",
        help="read a finished store, and build its damaged and outdated shards again",
    )
    add("--voxel-size-mm", type=number(float, 0.2, 10), default=1.0)  # as the limits of an image
    add("--grid", type=_grid, help="voxels X,Y,Z of the stored volumes (default: 192x224x192 mm)")
    add(
        "--shard-subjects",
        type=number(int, 1),
        help="subjects per shard, the unit of writing (default: 8, fewer in a small cohort)",
    )
    add("--max-reject-fraction", type=number(float, 0, 1), default=MAX_REJECT_FRACTION)
    add("--missing", choices=("keep", "reject"), default="keep", help="subjects that lack some of the label maps")
    add("--resample-labels", action="store_true", help="accept label maps on a different grid than the image's")
    add("--transform", choices=("sform", "qform", "reject"), default="sform", help="which one to use if the two differ")
    add("--assume-ras", action="store_true", help="accept images without orientation; left and right are then a guess")
    return run(parser, _build, arguments)


def _build(args: argparse.Namespace) -> int:
    options = vars(args)
    limits = Limits(transform=options.pop("transform"), assume_ras=options.pop("assume_ras"))
    try:
        tools = _tools(options)
        sources, where = _sources(options)
        report = build_cohort(sources, where=where, tools=tools, limits=limits, progress=True, **options)
    except TooManyRejects as error:
        print("\n".join([f"python -m data_prep.build: error: {error}", *explained(error.codes)]), file=sys.stderr)
        return PARTIAL
    print(summary(report))
    if report.already and not options["repair"]:
        print("nothing was built; data_prep.verify checks the store, and --repair builds damaged shards again")
    return DONE


def _sources(options: dict[str, Any]) -> tuple[list[Source], str]:
    """Takes the options that name the source out of `options`. Returns its visits, and its name in messages."""
    manifest, ukb, bids = (options.pop(name) for name in ("manifest", "ukb", "bids"))
    patterns = {"spm_tissue": options.pop("spm")} | {n: options.pop(n) for n in ("malp_em", "malp_em_tissue")}
    outputs = {name: pattern for name, pattern in patterns.items() if pattern}
    fast, instances = options.pop("fast"), options.pop("instances")
    if not ukb and (outputs or fast or instances):
        raise UsageError("--spm, --malp-em, --malp-em-tissue, --fast and --instances go with --ukb")
    if manifest:
        return read_manifest(manifest), "the manifest"
    if bids:
        return read_dataset(bids), "the dataset"
    visits = tuple(instances.split(",")) if instances else ()
    return read_archive(ukb, fast=fast or "seg", instances=visits, outputs=outputs), "the archive"


def _tools(options: dict[str, Any]) -> Tools | None:
    """Takes the options of --run-tools out of `options`."""
    names, out, words = (options.pop(name) for name in ("run_tools", "tools_out", "tool"))
    jobs, hours, stripped = (options.pop(name) for name in ("tool_jobs", "tool_hours", "stripped"))
    if not names:
        if out or words or hours or stripped or jobs > 1:
            raise UsageError("--tools-out, --tool, --tool-jobs, --tool-hours and --stripped go with --run-tools")
        return None
    if not out:
        raise UsageError("--run-tools needs --tools-out, a folder that keeps what the tools make")
    return Tools(names, out, dict(words or ()), stripped, jobs, hours)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in TOOLS]:
        raise argparse.ArgumentTypeError(f"the tools are {', '.join(TOOLS)}; got {unknown[0]!r}")
    return names


def _words(text: str) -> tuple[str, tuple[str, ...]]:
    name, given, words = text.partition("=")
    if name not in TOOLS or not given or not words.strip():
        raise argparse.ArgumentTypeError(f"it takes NAME=WORDS with a name of {', '.join(TOOLS)}; got {text!r}")
    return name, tuple(shlex.split(words))


def _grid(text: str) -> tuple[int, int, int]:
    try:
        x, y, z = (int(side) for side in text.split(","))
        if min(x, y, z) < 1:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"a grid is X,Y,Z in voxels, such as 192,224,192; got {text!r}") from error
    return x, y, z


if __name__ == "__main__":
    sys.exit(main())
