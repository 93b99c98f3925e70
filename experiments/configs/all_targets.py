"""One network for all five protocols.

    python -m experiments.train --config=all_targets --workdir=runs/all_targets --config.data.store=STORE

Measured cost:

* `all_targets:demo` on two CPU cores: 300 steps of 0.8 s, about four minutes.
* The full run, 100,000 steps of eight 128³ crops, has not been timed. A step of one 96³ crop takes 4.4 s on two CPU
  cores. For one 128³ crop on each chip of a TPU v5e, XLA plans 1.38 GiB of temporary memory. Both figures are of the
  published network (`--config.model.family=reference`); docs/performance.md has their commands.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config
from neuronet_jax.labels import TASKS


def get_config(variant: str = "") -> ConfigDict:
    return config(TASKS["all_targets"], variant)
