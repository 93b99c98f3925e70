"""Runs tasks in processes of this machine, or on the workers of a Dask scheduler.

On one machine there is no scheduler: the processes get their tasks through pipes of their parent, and nothing listens
on a port that other users of the machine could reach.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from neuronet_jax.errors import NeuronetError

_MOST_LOSSES = 3  # in a row, without a finished task between them: then it is the task that kills its worker


def run(
    function: Callable[..., Any], tasks: Mapping[str, tuple], workers: int | None = None, scheduler: str | None = None
) -> Iterator[Any]:
    """Yields the result of `function(*arguments)` for every named task, as they finish.

    Tasks run in `workers` processes on this machine (default: one per core; 0: in this process, for debugging and small
    cohorts), or on the workers of the Dask scheduler at `scheduler`. If a worker is lost, a different one gets its
    task. Raises NeuronetError if workers are lost again and again, or the scheduler is not there.
    """
    if not tasks:
        return
    if scheduler is not None:
        yield from _on_dask(function, tasks, scheduler)
    elif workers == 0:
        for arguments in tasks.values():
            yield function(*arguments)
    else:
        yield from _in_processes(function, tasks, min(workers or os.cpu_count() or 1, len(tasks)))


def _in_processes(function: Callable[..., Any], tasks: Mapping[str, tuple], workers: int) -> Iterator[Any]:
    left, losses = dict(tasks), 0
    while left:
        # spawn: a fork would copy the threads' locks of TensorStore and JAX
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
        try:
            names = {pool.submit(function, *arguments): name for name, arguments in left.items()}
            for future in as_completed(names):
                result = future.result()
                del left[names[future]]
                losses = 0
                yield result
        except BrokenProcessPool as error:  # the pool ends with any of its processes
            losses += 1
            if losses > _MOST_LOSSES:
                raise NeuronetError(
                    f"E_WORKER: worker processes were killed {losses} times in a row, perhaps for their memory; give "
                    "fewer --workers, or fewer subjects to a shard with --shard-subjects"
                ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ends this process with its parent, and at once and silently by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the parent was killed: nobody waits for the results


def _on_dask(function: Callable[..., Any], tasks: Mapping[str, tuple], scheduler: str) -> Iterator[Any]:
    # imported here, because a build on one machine does without it
    from dask.distributed import Client, KilledWorker
    from dask.distributed import as_completed as dask_completed

    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:  # what distributed raises for an address that does not answer, or is none
        raise NeuronetError(f"no Dask scheduler answers at {scheduler}: {error}; start it first") from error
    with client:
        futures = [client.submit(function, *arguments, key=name, pure=False) for name, arguments in tasks.items()]
        for future in dask_completed(futures):
            try:
                yield future.result()
            except KilledWorker as error:
                raise NeuronetError(
                    f"E_WORKER: the Dask workers of {scheduler} were killed again and again, perhaps for their memory; "
                    "give them more, or fewer subjects to a shard with --shard-subjects"
                ) from error
            except CancelledError as error:  # what every task gets when the scheduler ends
                raise NeuronetError(
                    f"the Dask scheduler at {scheduler} has ended; start it and run the build again to continue"
                ) from error
