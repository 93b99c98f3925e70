"""A classical tool as a contender."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import nibabel as nib
import numpy as np

from experiments.benchmark.contender import Contender
from experiments.benchmark.heads import HEADS


class Dipy(Contender):
    """DIPY's hidden Markov random field tissue classifier: three tissues of a skull-stripped head, on CPU."""

    def prepare(self) -> Callable[[], Any]:
        from dipy.segment.tissue import TissueClassifierHMRF  # pyright: ignore[reportMissingImports]

        if self.job.what not in HEADS:
            raise ValueError(f"dipy segments whole heads and cannot run {self.job.what!r}: use --what=head")
        image = np.asarray(nib.load(self.job.head).dataobj, np.float64)  # pyright: ignore[reportAttributeAccessIssue]
        return lambda: TissueClassifierHMRF(verbose=False).classify(image, nclasses=3, beta=0.1)

    def about(self) -> dict[str, str]:
        return super().about() | {"dipy": version("dipy")}
