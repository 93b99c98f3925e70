"""One network for FSL FIRST alone: a single-protocol baseline.

    python -m experiments.train --config=fsl_first --workdir=runs/fsl_first --config.data.store=STORE

The full run has not been timed yet; `--config=fsl_first:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["fsl_first"], variant)
