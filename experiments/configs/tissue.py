"""One network for the three tissue protocols.

    python -m experiments.train --config=tissue --workdir=runs/tissue --config.data.store=STORE

The full run has not been timed yet; `--config=tissue:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["tissue"], variant)
