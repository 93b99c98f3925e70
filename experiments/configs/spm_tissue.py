"""One network for SPM's tissues alone: a single-protocol baseline.

    python -m experiments.train --config=spm_tissue --workdir=runs/spm_tissue --config.data.store=STORE

The full run has not been timed yet; `--config=spm_tissue:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["spm_tissue"], variant)
