"""One network for all five protocols.

    python -m experiments.train --config=all_targets --workdir=runs/all_targets --config.data.store=STORE

Expected: 4 to 6 hours on one H200-class GPU; `--config=all_targets:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import ALL_TARGETS, config


def get_config(variant: str = "") -> ConfigDict:
    return config(ALL_TARGETS, variant)
