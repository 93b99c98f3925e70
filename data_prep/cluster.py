"""Runs tasks with Dask: on this machine by default, or on any Dask scheduler by its address."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dask.distributed import Client, LocalCluster, as_completed


def run(
    function: Callable[..., Any], tasks: Mapping[str, tuple], workers: int | None = None, scheduler: str | None = None
) -> Iterator[Any]:
    """Yields the result of `function(*arguments)` for every named task, as they finish.

    Tasks run in `workers` processes on this machine (default: one per core; 0: in this process, for debugging and small
    cohorts), or on the workers of the Dask scheduler at `scheduler`. If a worker is lost, a different one gets its
    task.
    """
    if workers == 0 and scheduler is None:
        for arguments in tasks.values():
            yield function(*arguments)
        return
    if not tasks:
        return
    with contextlib.ExitStack() as stack:
        address: Any = scheduler
        if scheduler is None:
            count = min(workers or os.cpu_count() or 1, len(tasks))
            local = LocalCluster(n_workers=count, threads_per_worker=1, processes=True, dashboard_address=":0")
            address = stack.enter_context(local)
        client = stack.enter_context(Client(address))
        futures = [client.submit(function, *arguments, key=name, pure=False) for name, arguments in tasks.items()]
        for future in as_completed(futures):
            yield future.result()
