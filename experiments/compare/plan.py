"""Plan of a comparison: a cell for every network to train, and the budgets in which the cells take part.

A budget says what the networks of a comparison have in common:

* `crops`: every network sees as many crops. Five networks of one protocol then cost up to five times one of five.
* `compute`: networks that together give all protocols cost as much as the one that gives all. A network of p of the P
  protocols gets p/P of that network's operations (`work.py` counts them), so a cheaper step buys more steps.

The network of all protocols takes as many steps in both, and is trained once.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import flags
from experiments.compare.work import operations
from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.programs import SETTING

BUDGETS = ("crops", "compute")


@dataclass(frozen=True)
class Arm:
    """One kind of network under one budget; its seeds are its repetitions."""

    budget: str
    family: str
    variant: str  # a named config, such as "all_targets" or "all_targets:demo"
    protocols: tuple[str, ...]
    steps: int
    operations: float  # of one step

    @property
    def name(self) -> str:
        path, colon, kind = self.variant.partition(":")
        return f"{self.family}/{Path(path).stem}{'-' * bool(colon)}{kind}"


@dataclass(frozen=True)
class Cell:
    """One network to train and to score."""

    name: str  # its folder below the comparison's
    variant: str
    overrides: tuple[str, ...]  # settings of the command line, the last of equal ones wins

    def config(self) -> Config:
        return flags.load(self.variant, self.overrides)


@dataclass(frozen=True)
class Plan:
    """All arms of a comparison. Arms of two budgets that are the same network share its cells."""

    arms: tuple[Arm, ...]
    seeds: int
    overrides: tuple[str, ...]

    def cells(self) -> list[Cell]:
        """Returns every cell once, one seed after the other: what is finished first compares all arms."""
        return list(
            {(cell := self.cell(arm, seed)).name: cell for seed in range(self.seeds) for arm in self.arms}.values()
        )

    def cell(self, arm: Arm, seed: int, tuned: Sequence[str] = ()) -> Cell:
        """Returns the cell of an arm and a seed. It is scored at its end, so no other step is evaluated."""
        own = {"model.family": arm.family, "steps": arm.steps, "evaluate_every": arm.steps, "seed": seed}
        settings = tuple(f"{SETTING}{field}={value}" for field, value in own.items())
        return Cell(f"{arm.name}/{arm.steps}-steps/seed-{seed}", arm.variant, (*self.overrides, *tuned, *settings))


def make_plan(
    variants: Sequence[str], families: Sequence[str], budgets: Sequence[str], seeds: int, overrides: Sequence[str]
) -> Plan:
    """Returns the plan. Raises NeuronetError if no variant has the protocols of all others, and as `flags.load`."""
    configs = {
        (family, variant): flags.load(variant, [*overrides, f"{SETTING}model.family={family}"])
        for family in families
        for variant in variants
    }
    wanted = {name for config in configs.values() for name in config.protocols}
    joint = next((key for key, config in configs.items() if set(config.protocols) == wanted), None)
    if joint is None and "compute" in budgets:
        raise NeuronetError(
            f"--budgets=compute shares out the cost of the network that gives all protocols: add a variant with "
            f"{', '.join(sorted(wanted))}, or compare with --budgets=crops"
        )
    work = {key: operations(config) for key, config in configs.items()}
    arms = []
    for budget in budgets:
        for (family, variant), config in configs.items():
            steps = config.steps
            if budget == "compute" and joint is not None:
                share = len(config.protocols) / len(wanted)
                steps = max(1, round(configs[joint].steps * share * work[joint] / work[family, variant]))
            arms.append(Arm(budget, family, variant, config.protocols, steps, work[family, variant]))
    return Plan(tuple(arms), seeds, tuple(overrides))


def to_json(plan: Plan) -> bytes:
    """Returns the plan as a file. It names no store, whose path may say more than a page should."""
    told = [text for text in plan.overrides if not text.startswith(f"{SETTING}data.store")]
    fields = {"arms": [dataclasses.asdict(arm) for arm in plan.arms], "seeds": plan.seeds, "overrides": told}
    return (json.dumps(fields, indent=1) + "\n").encode()
