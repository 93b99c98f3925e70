"""NeuroNet in JAX: one network reads a raw T1-weighted brain MRI and reproduces the outputs of FSL, SPM and MALP-EM.

    model = neuronet_jax.restore()  # the network that ships; or restore("runs/all_targets")
    labels = neuronet_jax.segment(model, "T1.nii.gz")  # {protocol: label map on the grid of the input}

Importing the package is cheap: JAX is imported on first use of a name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuronet_jax.inference.segment import segment
    from neuronet_jax.inference.segmentation import Options
    from neuronet_jax.labels import PROTOCOLS
    from neuronet_jax.runs.model import Model
    from neuronet_jax.runs.release import release
    from neuronet_jax.runs.restore import restore

__version__ = "0.1.0"
__all__ = ["PROTOCOLS", "Model", "Options", "release", "restore", "segment"]

_HOMES = {
    "restore": "runs.restore",
    "segment": "inference.segment",
    "Model": "runs.model",
    "Options": "inference.segmentation",
    "release": "runs.release",
    "PROTOCOLS": "labels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
