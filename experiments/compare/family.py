"""Variants of the `neuronet` network for `experiments.compare`, each of which changes one thing about the first.

    family=experiments/compare/family.py
    python -m experiments.compare --out=family --variants=$family:plain,$family:wide --config.data.store=stores/cohort

With `--budgets=compute` a network with a cheaper step takes more of them. `plain` is the demo's config with all five
protocols. The comparison judges every other variant by the one that is named first.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS

# `plain` has filters 16, 32, 64, 128, batch norm, and equal weights of cross-entropy and soft Dice
CHANGES: dict[str, dict[str, dict]] = {
    "plain": {},
    "wide": {"model": {"filters": (24, 48, 96, 192)}},
    "narrow": {"model": {"filters": (8, 16, 32, 64)}},
    "deep": {"model": {"filters": (16, 32, 64, 128, 128)}},
    "shallow": {"model": {"filters": (16, 32, 64)}},
    "group-norm": {"model": {"norm": "group"}},
    "instance-norm": {"model": {"norm": "instance"}},
    "no-dice": {"loss": {"dice": 0.0}},
    "balanced": {"loss": {"class_balance": 0.5}},  # rare classes count more
    "consistent": {"loss": {"consistency": 1.0}},
    "anywhere": {"data": {"foreground_fraction": 0.0}},  # crops from the whole volume
    "no-average": {"optimizer": {"ema_decay": 0.0}},
}


def get_config(variant: str = "") -> ConfigDict:
    if variant not in CHANGES:
        raise ValueError(f"the variants are {', '.join(map(repr, CHANGES))}, got {variant!r}")
    settings = config(TASKS["all_targets"], "demo")
    settings.update(CHANGES[variant])
    return settings
