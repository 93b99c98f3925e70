"""A trained network with the data needed to apply it. `restore` reads one, or an ensemble, from training runs."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from flax import nnx

from neuronet_jax.config import Config
from neuronet_jax.errors import NeuronetError
from neuronet_jax.runs.provenance import UNKNOWN_ORIGIN, Origin, Provenance


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network with the data needed to apply it to any scan."""

    # nnx module; `features(image f32[b x y z 1])` gives its features and readout, with the protocols in the order of
    # config.protocols
    network: Any
    config: Config
    voxel_size_mm: float  # of its training grid
    origin: Origin = UNKNOWN_ORIGIN  # of this network's weights
    max_voxels: int = 0  # larger volumes are tiled; 0: as many as the device's memory allows
    others: tuple["Model", ...] = ()  # further members of an ensemble, whose scores are averaged with this one's

    def __repr__(self) -> str:
        """Describes the model without its weights."""
        members = f"ensemble of {len(self.members)}, " if self.others else ""
        return (
            f"Model({members}{self.config.name}, step {self.origin.step}, {self.voxel_size_mm:g} mm, "
            f"protocols {', '.join(self.config.protocols)})"
        )

    @cached_property
    def parts(self) -> tuple[Any, Any]:
        """Structure and arrays of the network, as a compiled program takes them."""
        return nnx.split(self.network, graph=False)

    @property
    def members(self) -> tuple["Model", ...]:
        return (self, *self.others)

    @property
    def provenance(self) -> Provenance:
        """The origins of all members."""
        return Provenance(tuple(member.origin for member in self.members))


def ensemble(first: Model, *others: Model) -> Model:
    """Returns one model that averages the scores of all. Raises NeuronetError if protocols or voxel sizes differ."""
    for other in others:
        for what, mine, its in (
            ("protocols", ", ".join(first.config.protocols), ", ".join(other.config.protocols)),
            ("voxel size in mm", first.voxel_size_mm, other.voxel_size_mm),
        ):
            if mine != its:
                raise NeuronetError(f"an ensemble needs models of one {what}, got {mine} and {its}: run them apart")
    return replace(first, others=others) if others else first
