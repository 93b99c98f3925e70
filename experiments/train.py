"""Trains one network on a store.

    python -m experiments.train --config=all_targets:demo
    python -m experiments.train --config=all_targets --workdir=runs/a --config.data.store=/data/ukb --config.batch=16
    python -m experiments.train --config=all_targets --workdir=runs/a --config.data.store=/data/ukb --resume

Ctrl-C, SIGTERM and SIGUSR1 save and end with status 0. `--resume` then continues with the very next batch, as if the
run had not been interrupted.
"""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data_prep.demo.cohort import ensure_demo_store
from experiments import flags
from neuronet_jax import runtime
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError, UsageError
from neuronet_jax.evaluation.metrics import mean_dice
from neuronet_jax.evaluation.scoring import calibrate_on, predict_subject, score, validation_of
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.programs import DONE, INTERRUPTED, NOT_FINITE, OUT_OF_MEMORY, STALLED, Parser, run
from neuronet_jax.results.pictures import label_picture
from neuronet_jax.runs.calibration import save_calibration
from neuronet_jax.runs.checkpoint import Checkpoints
from neuronet_jax.runs.directory import SKIPPED, RunDirectory, shipped
from neuronet_jax.runs.model import Model
from neuronet_jax.runs.provenance import TrainingData
from neuronet_jax.runs.restore import restore
from neuronet_jax.runtime import keep_compiled
from neuronet_jax.store.reader import Store
from neuronet_jax.store.withdrawal import refuse_withdrawn
from neuronet_jax.training.goodput import Goodput
from neuronet_jax.training.mesh import batch_rows, make_mesh, put_batch
from neuronet_jax.training.monitor import Monitor
from neuronet_jax.training.pipeline import training_iterator, validation_subjects
from neuronet_jax.training.profile import Profile
from neuronet_jax.training.signals import StopRequest, Watchdog
from neuronet_jax.training.sinks import require_sinks
from neuronet_jax.training.skips import Skips, TooManySkippedError
from neuronet_jax.training.step import ADDED, TrainState, evaluation_network, init_state, make_train_step

STATUSES = {
    DONE: "done, or saved after a signal",
    NOT_FINITE: "too many updates skipped: loss or gradient not finite, or gradient far above its average",
    OUT_OF_MEMORY: "out of device memory",
    STALLED: "no progress",
    INTERRUPTED: "stopped by Ctrl-C before the first step, or by a second Ctrl-C",
}
STALL_S = 1800.0  # longer than any compilation, evaluation or save

log = logging.getLogger(__name__)


def train(
    config: Config,
    workdir: str,
    resume: bool = False,
    reset_data: bool = False,
    strict: bool = False,
    begin: bool = False,
    init: str = "",
    exclude: Path | None = None,
) -> TrainState:
    """Trains from step 0 or the latest checkpoint to `config.steps`, or until asked to stop. Returns the state.

    With `resume`, the folder must hold a run, unless `begin` allows to begin one. `init` is a run or release whose
    weights the first step starts from. Stores that hold a participant of the list `exclude` are refused.
    """
    # --- The places: the mesh, the data, the run's folder.
    spent = Goodput()
    require_sinks(config.sinks)
    store = open_store(config)
    if exclude is not None:
        refuse_withdrawn([store, *map(Store.open, config.data.stores)], exclude)
    process, processes = jax.process_index(), jax.process_count()
    mesh = make_mesh(config)
    data = training_iterator(store, config, batch_rows(mesh, config.batch))
    held_out = validation_subjects(store, "validation", process, processes)
    held_out = held_out[: -(-config.evaluate_subjects // processes) or None]
    start = restore(init) if init else None
    earlier = start.origin if start else None

    with (
        contextlib.closing(data),
        RunDirectory(workdir).hold(config, TrainingData.of_store(store.info, earlier), resume, begin) as check_owner,
        Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints,
        StopRequest() as stop,
        Watchdog(STALL_S) as watchdog,
        contextlib.closing(Profile(workdir, config.profiled, process)) as profile,
    ):
        # --- The computation: the state on the mesh, the step.
        graphdef, state = init_state(config, mesh, start)
        train_step = make_train_step(config, graphdef, mesh)
        if resume and any(runtime.gathered(checkpoints.latest() is not None, "looking for checkpoints")):
            with spent.on("restore"):
                state, position, _ = checkpoints.restore(state, strict=strict, reset_data=reset_data, added=ADDED)
            if position is not None:
                data.set_state(position)
        first = int(state.step)
        log.info("training %s from step %d to %d on %d devices", config.name, first, config.steps, mesh.size)
        skips = Skips(workdir, first)

        # --- The loop. Per step: batch, update, log, evaluate, save, stop if asked. Data position and save go together.
        with Monitor(workdir, config.steps, first, process, config.sinks) as monitor:
            for step in range(first + 1, config.steps + 1):
                profile.before(step)
                with spent.on("input"):
                    batch = next(data)
                with spent.on("compile" if step == first + 1 else "step"):
                    state, metrics = train_step(state, put_batch(mesh, batch))
                    if step == first + 1:
                        jax.block_until_ready(state)  # mostly compilation
                skips.add(step, metrics, batch)
                profile.after(step, state)
                last, stopping, dice = step == config.steps, stop.requested(step), None
                logs = step % config.log_every == 0 or last or stopping
                evaluates = (step % config.evaluate_every == 0 or last) and not stopping
                saves = step % config.checkpoint_every == 0 or evaluates or last or stopping
                if logs or evaluates or saves:
                    with spent.on("step"):
                        jax.block_until_ready(state)  # the device is behind; what follows would wait instead
                if logs:
                    machine = {"wait_fraction": data.wait_fraction(), "peak_memory_bytes": runtime.peak_memory_bytes()}
                    monitor.scalars(step, {**metrics, **machine, **spent.metrics()})
                    skips.look()
                if evaluates:
                    with spent.on("evaluate"):
                        model = Model(evaluation_network(graphdef, local(state)), config, store.info.voxel_size_mm)
                        scores, pictures = validate(model, store, held_out, watchdog)
                    dice = float(np.mean(list(scores.values())))
                    monitor.scalars(step, {"dice": dice, **{f"validation_dice/{k}": v for k, v in scores.items()}})
                    monitor.pictures(step, pictures)
                with spent.on("save"):
                    if saves:
                        checkpoints.save(step, state, data.get_state(), config, score=dice)
                    else:
                        checkpoints.check()
                if stopping:
                    log.warning("stopped as asked after step %d of %d; continue with --resume", step, config.steps)
                    break
                check_owner()
                watchdog.progress()
        finished = int(state.step) == config.steps
        if finished and held_out and processes == 1:
            with spent.on("save"):
                checkpoints.wait()  # the last checkpoint is still being written, and may be the best
            with spent.on("evaluate"):
                calibrate(workdir, config, store, watchdog)
        elif finished and held_out and process == 0:
            log.info("for calibrated quality scores, run: python -m experiments.evaluate --run=%s --calibrate", workdir)
    if process == 0:
        log.info(spent.describe())
    log.info("the run is in %s", workdir)
    return state


def calibrate(workdir: str, config: Config, store: Store, watchdog: Watchdog) -> None:
    """Writes quality.json for the checkpoint that `restore` will choose. A failure leaves the run uncalibrated."""
    try:
        stores = [store, *map(Store.open, config.data.stores)]
        subjects = validation_of(stores, config.evaluate_subjects or None)
        save_calibration(workdir, calibrate_on(restore(workdir), subjects, watchdog.progress))
    except NeuronetError as error:
        log.warning("no quality.json: %s", error)


def validate(
    model: Model, store: Store, subjects: Sequence[Any], watchdog: Watchdog
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns mean Dice per protocol over whole held-out volumes of all processes, and label pictures of the first
    volume.
    """
    protocols = model.config.protocols
    dice = np.full((len(subjects), len(protocols)), np.nan)  # n p
    pictures = {}
    for row, subject in enumerate(subjects):
        if subject is None:  # this process has one subject fewer than the others
            continue
        prediction = predict_subject(model, store, subject)
        for name, table in score(prediction, store, subject).items():
            dice[row, protocols.index(name)] = mean_dice(table)
        if row == 0:
            image = store.read_image(subject.slot)
            for name, classes in prediction.items():
                reference = store.read_labels(subject.slot, (name,))[0]
                pictures[f"validation/{name}"] = label_picture(image, classes, reference, PROTOCOLS[name])
        watchdog.progress()
    everywhere = multihost_utils.process_allgather(dice).reshape(-1, len(protocols))
    scored = {name: everywhere[:, p] for p, name in enumerate(protocols)}
    return {name: float(np.nanmean(values)) for name, values in scored.items() if not np.isnan(values).all()}, pictures


def open_store(config: Config) -> Store:
    """Opens the store of the config, or the demo cohort if none is given."""
    if config.data.store:
        return Store.open(config.data.store)
    if jax.process_count() > 1:
        raise NeuronetError(
            "a run of several processes needs --config.data.store=…; the demo cohort is for a single one"
        )
    log.warning(
        "NO STORE GIVEN: training on the DEMO COHORT of synthetic heads with the settings of %s. "
        "Give your own with --config.data.store=…; --strict refuses to train without one",
        config.name,
    )
    return Store.open(str(ensure_demo_store()))


def local(state: TrainState) -> TrainState:
    """Copies the replicated state to this host's memory, from where a program on any of its devices takes it."""
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), state)


def spread_over_cores(config: Config) -> None:
    """Makes one XLA device of each CPU core that the batch can use, because most of a program runs on one thread each.

    Measured on 2 cores: two devices train a batch of two in the time that one device takes for a batch of one.
    """
    runtime.one_per_core(runtime.sharers(config.batch // config.accumulate, runtime.cores()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        "python -m experiments.train", description=__doc__, epilog=flags.described(), settings=True, statuses=STATUSES
    )
    parser.add_argument(
        "--config", required=True, metavar="NAME[:demo]", help=f"one of {', '.join(flags.NAMES)}, or a .py file"
    )
    parser.add_argument("--workdir", help="the run's folder (default: runs/NAME-TIME)")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint of --workdir")
    parser.add_argument(
        "--begin",
        action="store_true",
        help="with --resume: begin at step 0 if --workdir holds no run yet, for scripts that start again by themselves",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse to train without a store and, with --resume, to pass over a damaged checkpoint",
    )
    parser.add_argument(
        "--init",
        default="",
        metavar="RUN",
        help="begin with the weights of a run or release; `pretrained` is the network that ships with the package",
    )
    parser.add_argument(
        "--exclude", type=Path, metavar="FILE", help="refuse a store that holds one of these withdrawn participants"
    )
    parser.add_argument("--reset-data", action="store_true", help="with --resume: restart the data")
    return run(parser, _train, arguments)


def _train(options: argparse.Namespace) -> int:
    runtime.plain()
    log.setLevel(logging.INFO)
    config = flags.load(options.config, options.overrides)
    if options.begin and not options.resume:
        raise UsageError("--begin goes with --resume; without it every run begins at step 0")
    if not config.data.store and ":" not in options.config:
        if options.strict or options.workdir:  # the command of a study, whose store was forgotten
            raise UsageError(
                f"--config={options.config} names no store: add --config.data.store=…, or train on the synthetic heads "
                f"of the demo with --config={options.config}:demo"
            )
        # The full settings are for thousands of 1 mm scans on accelerators; the demo cohort has sixteen 2 mm phantoms.
        config = flags.load(f"{options.config}:demo", options.overrides)
    if options.resume and not options.workdir:
        raise UsageError("--resume needs the --workdir of the run to continue")
    keep_compiled()
    runtime.join_cluster()
    if not jax.distributed.is_initialized():
        spread_over_cores(config)
    else:
        runtime.plain(runtime.my_prefix())
    workdir = options.workdir or runtime.agreed(time.strftime(f"runs/{config.name.replace(':', '-')}-%Y%m%d-%H%M%S"))
    try:
        init = shipped() if options.init == "pretrained" else options.init
        train(
            config,
            workdir,
            resume=options.resume,
            reset_data=options.reset_data,
            strict=options.strict,
            begin=options.begin,
            init=init,
            exclude=options.exclude,
        )
    except TooManySkippedError as error:
        print(
            f"error: {error}: loss or gradient were not finite, or far above their average. The last good checkpoint "
            f"is kept; {SKIPPED} names the batches. Lower optimizer.learning_rate, or clip.",
            file=sys.stderr,
        )
        return NOT_FINITE
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: out of device memory with batch {config.batch} and crop {config.data.crop}; lower --config.batch "
            f"or --config.data.crop, compute the batch in parts with --config.accumulate, or split volumes with "
            f"--config.mesh.space\n{error}",
            file=sys.stderr,
        )
        return OUT_OF_MEMORY
    return DONE


if __name__ == "__main__":
    sys.exit(main())
