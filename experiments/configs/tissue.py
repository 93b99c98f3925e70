"""One network for the three tissue protocols.

    python -m experiments.train --config=tissue --workdir=runs/tissue --config.data.store=STORE

Expected: 3 to 5 hours on one H200-class GPU; `--config=tissue:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import TISSUE, config


def get_config(variant: str = "") -> ConfigDict:
    return config(TISSUE, variant)
