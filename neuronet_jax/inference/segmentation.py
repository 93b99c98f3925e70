"""What is asked of a segmentation and what comes of it: plain data, for the network's side and the files' side."""

import difflib
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS, Protocol, Structure


@dataclass(frozen=True)
class Options:
    """What is done beside running the network once. The defaults are what the published numbers are measured with."""

    flip: bool = False  # average with the mirrored head, partners swapped
    crops: int = 1  # average over so many positions of the head on the network's coarsest grid
    fast: bool = False  # a tight box around the head, no interpolation of scores, no averaging, no confidence
    posteriors: tuple[str, ...] = ()  # "PROTOCOL:STRUCTURE" names whose probability maps are wanted
    consistent_tissue: bool = False  # malp_em_tissue is derived from malp_em, so that the two agree exactly

    def __post_init__(self) -> None:
        """Raises NeuronetError for options that contradict each other and for structures that are in no label table."""
        if self.crops < 1:
            raise NeuronetError(f"crops must be at least 1, got {self.crops}")
        if self.fast and (self.flip or self.crops > 1 or self.posteriors):
            raise NeuronetError("fast leaves out averages and posteriors: give fast, or flip, crops and posteriors")
        for text in self.posteriors:
            posterior(text)

    @property
    def passes(self) -> int:
        """How often a network runs over a head."""
        return self.crops * (2 if self.flip else 1)

    def changed(self) -> dict[str, Any]:
        """The options that are not at their default, as JSON: part of a result's provenance."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def posterior(text: str) -> tuple[Protocol, Structure]:
    """The protocol and structure of "PROTOCOL:STRUCTURE". Raises NeuronetError, with the nearest name, for others."""
    name, _, structure = text.partition(":")
    if name not in PROTOCOLS:
        raise NeuronetError(f"posteriors are named PROTOCOL:STRUCTURE, with {', '.join(PROTOCOLS)}; got {text!r}")
    table = {s.name: s for s in PROTOCOLS[name].structures}
    if structure not in table:
        near = difflib.get_close_matches(structure, table, 1, 0)
        raise NeuronetError(f"{name} has no structure {structure!r}; the nearest name is {near[0]!r}")
    return PROTOCOLS[name], table[structure]


class Confidence(NamedTuple):
    """How sure the network is of each class of a protocol: sums over voxels of the network's grid, float64 [k] each.

    The sums count the voxels that could be something else than background: those where the background is less than
    e^7, 1,100 times, as likely as the likeliest structure. Elsewhere structures are so unlikely that their sums hardly
    change, and the network's scores need not be computed. Probabilities are the softmax over the protocol's classes.
    """

    voxels: np.ndarray  # voxels where the class is the most likely one
    certain: np.ndarray  # sum of the class's probability over those voxels
    probability: np.ndarray  # sum of the class's probability over all that count: its expected number of voxels
    entropy: np.ndarray  # sum of the softmax's entropy over the voxels where the class is the most likely one, in nats


@dataclass(frozen=True)
class Segmentation:
    """One head, on the grid of its own file."""

    maps: dict[str, np.ndarray]  # per protocol uint8 [x y z] of the tool's ids
    confidence: dict[str, Confidence]  # per protocol; empty with Options.fast
    posteriors: dict[str, np.ndarray]  # per wanted "PROTOCOL:STRUCTURE" float32 [x y z], 0 to 1
