"""The interface of a contender: work to time, numbers to compare, memory to report."""

import ctypes
import dataclasses
import math
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CHECK_SIDE = 24  # voxels of the volume on which the contenders must agree: three voxels at the coarsest scale
CHECK_STEPS = 3  # losses compared: the second and third depend on the gradients of all weights


@dataclasses.dataclass(frozen=True)
class Job:
    """One contender's work."""

    contender: str  # a key of CONTENDERS
    dtype: str  # of the activations: float32 or bfloat16
    what: str  # "train": a step; "inference": labels of the same crop; one of heads.HEADS: a file's label maps
    side: int  # voxels per side of the crop
    batch: int
    head: str  # NIfTI file of the whole head
    tile: int = 0  # voxels per side of PyTorch's tiles of the whole head; 0: it takes it in one piece
    weights: str = ""  # .npz of a `neuronet` network's weights by name; empty: the published network, random weights
    python: str = ""  # interpreter of a different environment; empty: this one

    @property
    def label(self) -> str:
        """The contender's name in tables, with the folder of its environment if it has its own."""
        return f"{self.contender}@{Path(self.python).parent.parent.name}" if self.python else self.contender


class Contender:
    """The base of all contenders. `prepare` returns the work to time, which ends when the device is done.

    For a whole head, the work returns the label maps.
    """

    def __init__(self, job: Job):
        self.job = job
        self.preparing = 0.0  # peak GiB of the process until it settled

    def prepare(self) -> Callable[[], Any]:
        raise NotImplementedError

    def numbers(self) -> dict[str, np.ndarray] | None:
        """Returns `logits_<protocol>` and `losses` for the shared weights in float32, or None if there is nothing to
        compare.
        """
        return None

    def label_maps(self, found: Any) -> dict[str, np.ndarray] | None:
        """Returns the label maps, by protocol, that the work on a whole head produced, or None if there is nothing to
        compare.
        """
        return None

    def memory(self) -> dict[str, float]:
        """Returns peaks in GiB: `rss` of the process, `running` after its preparation, and `device` if there is one."""
        running = peak_rss_gib()
        return {"rss": max(running, self.preparing), "running": running}

    def settle(self) -> None:
        """Ends the preparation, whose compilers and tuners need memory of their own, and starts a new count of the
        peak.
        """
        self.preparing = peak_rss_gib()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS

    def about(self) -> dict[str, str]:
        return {"python": platform.python_version(), "device": "cpu"}


def peak_rss_gib() -> float:
    """Returns the peak memory of this process, or NaN if the system does not report it (only Linux does)."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**20 if found else math.nan
