"""The request and the result of a segmentation, as plain data shared by inference and output files."""

import difflib
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS, Protocol, Structure


@dataclass(frozen=True)
class Options:
    """Options beyond one pass of the network. The published numbers are measured with the defaults."""

    flip: bool = False  # average with the mirrored head, partners swapped
    crops: int = 1  # average over this many positions of the volume on the network's coarsest grid
    fast: bool = False  # a tight box around the head, no interpolation of scores, no averaging, no confidence
    posteriors: tuple[str, ...] = ()  # names "PROTOCOL:STRUCTURE" of requested probability maps
    consistent_tissue: bool = False  # derive malp_em_tissue from malp_em, so that the two agree exactly
    clean_up: bool = True  # remove labels that lie apart from the brain, see `cleanup`

    def __post_init__(self) -> None:
        """Raises NeuronetError for options that contradict each other and for structures that no label table has."""
        if self.crops < 1:
            raise NeuronetError(f"crops must be at least 1, got {self.crops}")
        if self.fast and (self.flip or self.crops > 1 or self.posteriors):
            raise NeuronetError("fast leaves out averages and posteriors: give fast, or flip, crops and posteriors")
        if isinstance(self.posteriors, str):
            raise NeuronetError(f"posteriors takes a tuple of names, such as ({self.posteriors!r},), got one string")
        for text in self.posteriors:
            posterior(text)

    @property
    def passes(self) -> int:
        """Number of times that a network runs over a volume."""
        return self.crops * (2 if self.flip else 1)

    def changed(self) -> dict[str, Any]:
        """Returns the options that differ from the defaults, as JSON: part of a result's provenance."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def posterior(text: str) -> tuple[Protocol, Structure]:
    """Returns the protocol and structure of "PROTOCOL:STRUCTURE". Raises NeuronetError, with the nearest name, for
    others.
    """
    name, _, structure = text.partition(":")
    if name not in PROTOCOLS:
        raise NeuronetError(f"posteriors are named PROTOCOL:STRUCTURE, with {', '.join(PROTOCOLS)}; got {text!r}")
    table = {s.name: s for s in PROTOCOLS[name].structures}
    if structure not in table:
        near = difflib.get_close_matches(structure, table, 1, 0)
        raise NeuronetError(f"{name} has no structure {structure!r}; the nearest name is {near[0]!r}")
    return PROTOCOLS[name], table[structure]


class Confidence(NamedTuple):
    """The network's certainty about each class of a protocol: sums over voxels of its own grid, float64 [k] each.

    The sums count the voxels that could be different from background: those where the background is less than e^7,
    1,100 times, as likely as the likeliest structure. Elsewhere structures are so unlikely that their sums hardly
    change, and the scores need not be computed. Probabilities are the softmax over the protocol's classes.
    """

    voxels: np.ndarray  # voxels where the class is the most likely one
    certain: np.ndarray  # sum of the class's probability over those voxels
    probability: np.ndarray  # sum of the class's probability over all that count: its expected number of voxels
    entropy: np.ndarray  # sum of the softmax's entropy over the voxels where the class is the most likely one, in nats


@dataclass(frozen=True)
class Segmentation:
    """The segmentation of one scan, on the grid of its file."""

    maps: dict[str, np.ndarray]  # per protocol uint8 [x y z] of the tool's ids
    confidence: dict[str, Confidence]  # per protocol; empty with Options.fast
    posteriors: dict[str, np.ndarray]  # per requested "PROTOCOL:STRUCTURE" float32 [x y z], 0 to 1
    removed: dict[str, int] = field(default_factory=dict)  # per protocol voxels that the clean-up turned to background
    warnings: tuple[str, ...] = ()  # W_… of the intensities
