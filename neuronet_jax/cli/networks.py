"""`neuronet import-dltk` and `neuronet export`: networks from and for other programs."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronet_jax.errors import UsageError
from neuronet_jax.programs import DONE, some


def add_import_dltk(commands: Any) -> None:
    command = commands.add_parser(
        "import-dltk",
        help="make a run from the published NeuroNet weights",
        description="Makes a run from a published TensorFlow SavedModel, without TensorFlow. The grid is 1 mm.",
        epilog="""\
examples:
  the published network for all five protocols (neuronet_all.tar.gz, unpacked)
    neuronet import-dltk neuronet_all/1514764800 --out=runs/published
    neuronet segment T1.nii.gz --run=runs/published --out=labels

  a network whose classes fit two protocols: name the right one
    neuronet import-dltk spm_tissue/1514764800 --out=runs/published_spm --config=spm_tissue
""",
    )
    command.add_argument(
        "saved_model", type=some(Path), metavar="SAVED_MODEL_DIR", help="the folder of saved_model.pb and variables/"
    )
    command.add_argument("--out", required=True, type=some(str), metavar="RUN", help="the run to write")
    command.add_argument(
        "--config", metavar="NAME", help="the network's name, if its classes fit several (fsl_fast, spm_tissue)"
    )
    command.add_argument(
        "--axes",
        default="SAL",
        metavar="XYZ",
        help="directions of the axes of its training arrays (default: %(default)s, as the authors read UK Biobank's "
        "files)",
    )
    command.set_defaults(command=_import_dltk)


def _import_dltk(args: argparse.Namespace) -> int:
    from neuronet_jax.dltk import import_run

    config = import_run(args.saved_model, args.out, args.config, args.axes)
    print(f"{args.out} holds the published network {config.name}: {', '.join(config.protocols)}")
    return DONE


def add_export(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="write a trained network as one program with its weights, for use without this library",
        description="Writes a run as StableHLO, safetensors and JSON. Programs take arrays [x y z] in RAS+ order at "
        "the run's voxel size; reorienting and resampling are left to the caller.",
        epilog="""\
examples:
  a program for images of any size (sides padded to multiples of 32), with its weights
    neuronet export --run=runs/all_targets --out=release

  the weights alone, with a sentence that every report made with them will show
    neuronet export --run=runs/all_targets --out=release --weights-only --note='for research only'

  programs for two fixed sizes
    neuronet export --run=runs/all_targets --out=release --shape=192,224,192 --shape=256,256,256

  the folder is also a run
    neuronet segment T1.nii.gz --run=release --out=labels

  how to run the program without this library
    python -c "import neuronet_jax.export; help(neuronet_jax.export)"

results:
  release/segment.jax_export    StableHLO for CPU, CUDA and TPU: whitening, network, tool ids
  release/weights.safetensors   its first argument
  release/release.json          config, protocols, label tables, voxel size, provenance, checksums
  release/quality.json          calibration of predicted Dice, if the run has one
  release/manifest.sha256       for sha256sum -c
""",
    )
    command.add_argument("--run", required=True, type=some(str), metavar="DIR", help="folder of a run or release")
    command.add_argument("--out", required=True, type=some(str), metavar="DIR", help="output folder")
    command.add_argument(
        "--shape",
        action="append",
        default=[],
        type=_shape,
        metavar="X,Y,Z",
        help="write a program for this size only, in multiples of 32; may be repeated",
    )
    command.add_argument(
        "--weights-only", action="store_true", help="write no program, which takes a few seconds to make"
    )
    command.add_argument("--note", metavar="TEXT", help="a sentence for every report made with these weights")
    command.set_defaults(command=_export)


def _shape(text: str) -> tuple[int, ...]:
    sides = text.split(",")
    if len(sides) != 3 or not all(side.strip().isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape: write X,Y,Z, such as 192,224,192")
    return tuple(int(side) for side in sides)


def _export(args: argparse.Namespace) -> int:
    from neuronet_jax.export import export
    from neuronet_jax.runs.calibration import load_calibration
    from neuronet_jax.runs.release import release
    from neuronet_jax.runs.restore import restore

    if args.weights_only and args.shape:
        raise UsageError("--shape is the size of a program, and --weights-only writes none: leave one of them out")
    model = restore(args.run)
    if args.note is not None:
        model = replace(model, origin=replace(model.origin, note=args.note))
    calibration = load_calibration(args.run, model.origin.step)
    if args.weights_only:
        release(model, args.out, calibration=calibration)
    else:
        export(model, args.out, args.shape, calibration)
    held = "the weights" if args.weights_only else "the program, its weights"
    print(f"{args.out} holds {held} and their description; sha256sum -c manifest.sha256 checks them")
    print(f"predicted Dice of `segment --run={args.out}`: {calibration.describe()}")
    return DONE
