"""One network for all five protocols.

    python -m experiments.train --config=all_targets --workdir=runs/all_targets --config.data.store=STORE

The full run has not been timed yet; `--config=all_targets:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["all_targets"], variant)
