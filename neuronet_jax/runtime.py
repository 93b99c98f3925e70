"""The process that a program runs in: its messages, compiled programs, devices and peers."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import random
import resource
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the store of keys and values that JAX's processes share has no public name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neuronet_jax.errors import CodedWarning, NeuronetError, UsageError
from neuronet_jax.files import user_cache
from neuronet_jax.programs import STALLED

# Messages.


def plain(prefix: str = "") -> None:
    """Makes warnings and log messages plain lines on stderr, without file, logger and level, after a `prefix`.

    Developers can use those names; users need only the code at the start of a warning.
    """
    warnings.formatwarning = lambda message, *_, **__: prefix + _line(message)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.root.handlers:  # absl, which comes with Orbax, may have made one already
        if type(handler) is logging.StreamHandler:  # leaves the handlers of tests alone
            handler.setFormatter(logging.Formatter(prefix.replace("%", "%%") + "%(message)s"))


def _line(message: Any, *_: Any) -> str:
    return f"warning: {' '.join(str(message).split())}\n"


# Compiled programs are kept between processes: a training step compiles for 20 s on two cores, and restarts are common.


def keep_compiled() -> None:
    """Turns on JAX's persistent compilation cache below the user's cache folder, unless the user has chosen one.

    `JAX_COMPILATION_CACHE_DIR` names a different folder; `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
    """
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]: made at import
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / f"xla-{_processor()}"))


def _processor() -> str:
    """Returns a name for this host's CPU features: a shared home folder serves different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"


# Devices.


class Turns:
    """A lock by which threads with a scan each take turns on the device, which has memory for one. It counts their
    time.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self.taken_s = 0.0
        self.share = 0.0  # of the work on the scan whose turn it is, from 0 to 1

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Holds the device for the duration of the block."""
        with self._lock:
            start, self.share = time.perf_counter(), 0.0
            try:
                yield
            finally:
                self.taken_s += time.perf_counter() - start


TURNS = Turns()  # one per process, which has one device for inference


def use(device: str | None, threads: int | None) -> None:
    """Restricts this process to a kind of device and a number of CPU cores. Call it before JAX's first computation.

    The cores are chosen at random among those that the process may use, so that several limited programs rarely share
    one. Raises UsageError if there are fewer, or no such device.
    """
    if threads is not None:
        if threads > cores():
            raise UsageError(f"--threads={threads}, but this process may use {cores()} CPU cores: give at most as many")
        os.environ["NPROC"] = str(threads)  # the threads that XLA starts
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, random.sample(sorted(os.sched_getaffinity(0)), threads))
    if device is not None:
        jax.config.update("jax_platforms", device)
        try:
            found = jax.devices()[0].platform
        except (RuntimeError, AssertionError) as error:  # JAX asserts that a plugin of that name is installed
            reason = str(error).splitlines()[0] if str(error) else "not installed"
            raise UsageError(
                f"--device={device}: there is none ({reason}); leave --device out for the fastest that there is"
            ) from error
        if found != device:
            raise UsageError(f"--device={device}: this process runs on {found} already")


def start() -> str:
    """Starts JAX and returns a line about its device. If the platform in JAX_PLATFORMS is missing, warns and uses the
    CPU.
    """
    is_choice = (jax.config.jax_platforms or "").startswith("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a plugin of that name is installed
        wanted = os.environ.get("JAX_PLATFORMS")
        reason = str(error).splitlines()[0] if str(error) else "not installed"
        warnings.warn(
            CodedWarning("W_DEVICE", f"JAX_PLATFORMS={wanted}: {reason}; continuing on the CPU"), stacklevel=2
        )
        jax.config.update("jax_platforms", "cpu")
        device = jax.devices()[0]
    if device.platform == "cpu":
        found = "" if is_choice else "no GPU or TPU found, "
        return f"{found}running on {cores()} CPU {'core' if cores() == 1 else 'cores'}"
    return f"running on {device.device_kind}"


def cores() -> int:
    """Returns the number of CPU cores that this process may use, which a Slurm job or a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_per_core(most: int | None = None) -> None:
    """Makes one XLA device of each CPU core, at most `most`, unless the environment sets the number.

    Much of a program runs on one thread per device: two devices on two cores label a volume split between them in two
    thirds of the time. Call it before JAX's first computation.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES") or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    jax.config.update("jax_num_cpu_devices", min(cores(), most or cores()))


def sharers(units: int, most: int) -> int:
    """Returns the largest number of devices, up to `most`, that can share `units` evenly."""
    return max(n for n in range(1, most + 1) if units % n == 0)


def over_cores(image: np.ndarray, axis: int, stride: int) -> Any:
    """Returns the image split along `axis` over the XLA devices of a CPU, in multiples of `stride`.

    A mesh splits y in the same way (see `mesh.py`). On other platforms, the image is returned as it is.
    """
    mesh = mesh_over_cores(image.shape[axis] // stride)
    if mesh.devices.size == 1:
        return image
    return jax.device_put(image, NamedSharding(mesh, PartitionSpec(*[None] * axis, *mesh.axis_names)))


def on_cpu() -> bool:
    """Returns True if scans are segmented on the CPU."""
    return jax.local_devices()[0].platform == "cpu"


def mesh_over_cores(units: int) -> Mesh:
    """Returns the local devices that share one volume, in a mesh of one axis: on a CPU as many, of one per core, as can
    share `units` evenly; on other platforms the first device.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu" or len(devices) > cores():  # more devices than cores: a test of sharding
        devices = devices[:1]
    count = sharers(units, len(devices))
    return jax.make_mesh((count,), ("space",), axis_types=(AxisType.Auto,), devices=devices[:count])


def memory_bytes() -> int:
    """Returns the memory of the first device. On CPU, that is the machine's memory or the limit of the container or
    job.
    """
    statistics = jax.local_devices()[0].memory_stats() or {}
    if limit := statistics.get("bytes_limit"):
        return limit
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    granted = Path("/sys/fs/cgroup/memory.max")
    text = granted.read_text().strip() if granted.exists() else "max"
    return machine if text == "max" else min(machine, int(text))


def peak_memory_bytes() -> int:
    """Returns the most memory that a device of this process has had in use, or the process itself on a platform that
    does not count.
    """
    counted = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return max(counted) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Peers.

_METADATA_S = 10.0  # a metadata server answers within milliseconds
JOIN_S = 290.0  # JAX aborts after 300 s, with a trace of C++ that names nobody
MEET_S = 600.0  # for the slowest process to read a checkpoint from a busy file system
_MEETINGS = itertools.count()  # the same in all processes, which meet in the same order


def join_cluster() -> None:
    """Joins the other processes of a Slurm step, of a Cloud TPU slice, or of the address in JAX_COORDINATOR_ADDRESS.

    Does nothing if there are none. Call it before JAX's first computation. Raises NeuronetError on a machine with TPU
    chips if the number of hosts in its slice is unknown.
    """
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment and "JAX_NUM_PROCESSES" in environment:
        count, index = int(environment["JAX_NUM_PROCESSES"]), int(environment["JAX_PROCESS_ID"])
        _join(environment["JAX_COORDINATOR_ADDRESS"], count, index)
    elif (tasks := int(environment.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:  # set by srun alone, unlike SLURM_NTASKS
        one_per_node = tasks == int(environment["SLURM_STEP_NUM_NODES"])
        # Under Slurm, JAX restricts a process to the GPU of its number on the node. An empty list means all of them.
        _join(local_device_ids=[] if one_per_node else None)
    elif _tpu_hosts() > 1:
        _join()


def _join(*given: Any, **named: Any) -> None:
    """Joins the other processes. Ends this one with a message if some have not come after JOIN_S."""
    too_late = threading.Timer(JOIN_S, _give_up)
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(*given, **named)
    finally:
        too_late.cancel()


def _give_up() -> None:
    cluster = distributed.global_state
    own, count = cluster.process_id, cluster.num_processes
    missing = [str(index) for index in range(count) if index != own]
    who = f"process {missing[0]}" if len(missing) == 1 else f"one or more of the processes {', '.join(missing)}"
    print(
        f"error: process {own} of {count} has waited {JOIN_S:.0f} s for {who} at {cluster.coordinator_address}: start "
        "all processes of the run together, and let them reach this address; the log of each says how far it came",
        file=sys.stderr,
        flush=True,
    )
    os._exit(STALLED)  # JAX waits in C++, which no exception reaches


def _tpu_hosts() -> int:
    """Returns the number of hosts in this machine's Cloud TPU slice: from the environment on GKE, else from its
    metadata.

    It is 1 on machines where JAX found no TPU chips when it was imported: JAX marks the others with TPU_ML_PLATFORM.
    """
    names = os.environ.get("TPU_WORKER_HOSTNAMES")
    if names is None:
        if "TPU_ML_PLATFORM" not in os.environ or "TPU_SKIP_MDS_QUERY" in os.environ:
            return 1
        names = _tpu_endpoints()
    return names.count(",") + 1


def _tpu_endpoints() -> str:
    """Returns the hosts of the slice, separated by commas, or "" if the machine's metadata name none."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # as JAX looks it up
    url = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=_METADATA_S
        ) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        reason = str(error)
    except OSError as error:
        reason = str(error)
    raise NeuronetError(
        f"this machine has TPU chips, but the list of its slice's hosts cannot be read from {url} ({reason}); "
        "to train on this host alone, set TPU_WORKER_HOSTNAMES=localhost"
    )


def my_prefix() -> str:
    """Returns the start of this process's messages: its number if there are several, such as `[process 1 of 4] `."""
    count = jax.process_count()
    return f"[process {jax.process_index()} of {count}] " if count > 1 else ""


def agreed(text: str) -> str:
    """Returns the first process's text in all processes, such as a name that holds the time."""
    return gathered(text, "agreeing on a name")[0]


def gathered(value: Any, purpose: str) -> list[Any]:
    """Returns the values of all processes, which are any JSON, in the order of the processes.

    Every process calls it, in the same order. Unlike a computation over all devices it ends: raises NeuronetError, in
    which the missing process is named, after MEET_S.
    """
    own, count = jax.process_index(), jax.process_count()
    if count == 1:
        return [value]
    client, meeting = distributed.global_state.client, f"neuronet_jax/{next(_MEETINGS)}"
    assert client is not None, "processes meet after they have joined"
    client.key_value_set(f"{meeting}/{own}", json.dumps(value))
    end, values = time.monotonic() + MEET_S, []
    for index in range(count):
        left_ms = max(1, int(1000 * (end - time.monotonic())))
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{meeting}/{index}", left_ms)))
        except jax.errors.JaxRuntimeError as error:
            raise NeuronetError(
                f"process {own} of {count} has waited {MEET_S:.0f} s for process {index} while {purpose}: see the log "
                "of that process, end all of them, and start them again with --resume"
            ) from error
    return values
