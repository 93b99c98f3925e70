"""One network for MALP-EM's 138 structures alone: a single-protocol baseline.

    python -m experiments.train --config=malp_em --workdir=runs/malp_em --config.data.store=STORE

The full run has not been timed yet; `--config=malp_em:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["malp_em"], variant)
