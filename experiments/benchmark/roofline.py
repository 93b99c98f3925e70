"""Predicts the time of a training step from what a chip moves and multiplies, and what chips exchange.

    step = max(FLOPs / peak, HBM bytes / bandwidth) + exchange

This is a lower bound with these assumptions:

* Arithmetic and HBM traffic overlap perfectly, and each runs at its peak. The vector unit is never the limit. XLA's own
  estimate of cycles, which the table shows too, contradicts this: the fused head has 169 exponentials for each voxel.
* Exchange overlaps with nothing. It goes along one axis of the slice at a time, over one link of a chip in one
  direction, and no axis closes to a ring. XLA does better in part: it overlaps, and uses several links.
* An all-reduce of n bytes among g chips moves 2 n (g − 1) / g bytes over each link, an all-gather or reduce-scatter
  half of that, an all-to-all an eighth, a permutation n. Each takes at least a hop's latency for each link on its way:
  https://jax-ml.github.io/scaling-book/sharding gives the rule and the latency.
* With more chips, each chip computes the same crop, and what grows is the exchange among the replicas of the data axis.

Input, host and start-up take no time here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.benchmark.hlo import Collective

HOP_S = 1e-6  # latency of one hop between neighbours (the scaling book's figure)
POD_CHIPS = 256  # the largest slice of v5e


@dataclass(frozen=True)
class Machine:
    """Peaks of one chip, and what feeds it."""

    flops_per_s: float  # bfloat16 on a TPU
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # over one link in one direction
    clock_hz: float
    axes: int  # of the mesh of chips: 2-D or 3-D
    host_chips: int
    host_vcpus: int  # of the virtual machine that holds `host_chips` chips


# Clocks: https://jax-ml.github.io/scaling-book/tpus. Peaks, HBM, links and virtual machines:
# https://cloud.google.com/tpu/docs/v5e and /v5p, which give the bandwidth of all ports of a chip in both directions:
# 400 GB/s over 4 ports (v5e), 1,200 GB/s over 6 (v5p).
MACHINES = {
    "v5e": Machine(197e12, 819e9, 50e9, 1.5e9, axes=2, host_chips=8, host_vcpus=224),
    "v5p": Machine(459e12, 2765e9, 100e9, 1.75e9, axes=3, host_chips=4, host_vcpus=208),
}
# Bytes over each link for one byte of a collective among g chips.
_SHARE = {
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-gather": lambda g: (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / (4 * g),
    "collective-permute": lambda g: 1.0,
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step, by part."""

    compute_s: float
    memory_s: float
    exchange_s: float

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.memory_s) + self.exchange_s


def predict(machine: Machine, flops: float, hbm_bytes: float, collectives: Sequence[Collective]) -> Prediction:
    """Returns the roofline of a step that does this on each chip."""
    exchange = sum(c.times * exchange_s(machine, c) for c in collectives)
    return Prediction(flops / machine.flops_per_s, hbm_bytes / machine.hbm_bytes_per_s, exchange)


def exchange_s(machine: Machine, collective: Collective) -> float:
    """Returns the seconds of one collective."""
    if collective.group < 2:
        return 0.0
    if collective.kind == "collective-permute":
        hops = 1.0
    else:  # axis by axis of a cube of chips, from one end to the other; an all-reduce goes there and back
        side = collective.group ** (1 / machine.axes)
        hops = machine.axes * (side - 1) * (2 if collective.kind == "all-reduce" else 1)
    moved = _SHARE[collective.kind](collective.group) * collective.nbytes
    return max(hops * HOP_S, moved / machine.link_bytes_per_s)


def scaled(collectives: Sequence[Collective], chips: int, target: int, space: int) -> list[Collective]:
    """Returns the collectives of a slice of `chips` as they would be among `target`, with as many crops per chip.

    Groups of at most `space` chips share a volume and stay as they are. The others are of the data axis.
    """
    grown = target / chips
    return [c._replace(group=math.ceil(c.group * grown)) if c.group > space else c for c in collectives]
