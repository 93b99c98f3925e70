"""One network for MALP-EM's 138 structures alone: a single-protocol baseline.

    python -m experiments.train --config=malp_em --workdir=runs/malp_em --config.data.store=STORE

Its cost has not been measured. Each step computes less than a step of `all_targets`, whose file has figures.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["malp_em"], variant)
