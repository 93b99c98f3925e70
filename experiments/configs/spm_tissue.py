"""One network for SPM's tissues alone: a single-protocol baseline.

    python -m experiments.train --config=spm_tissue --workdir=runs/spm_tissue --config.data.store=STORE

The full run has not been timed yet; `--config=spm_tissue:demo` takes minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from experiments.configs.common import config


def get_config(variant: str = "") -> ConfigDict:
    return config(("spm_tissue",), variant)
