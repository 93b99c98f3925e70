"""One network for SPM's tissues alone: a single-protocol baseline.

    python -m experiments.train --config=spm_tissue --workdir=runs/spm_tissue --config.data.store=STORE

Its cost has not been measured. Each step computes less than a step of `all_targets`, whose file has figures.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["spm_tissue"], variant)
