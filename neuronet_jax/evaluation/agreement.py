"""Agreement between the tools: Dice between every two protocols for the regions that both label, and a map of votes.

`labels.REGIONS` defines the correspondence: CSF, GM and WM of the protocols that label whole brains, and the structures
that FIRST and MALP-EM share. In addition, MALP-EM's tissue map is a merge of its structures, so these two protocols can
be checked against each other class by class.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from neuronet_jax.evaluation.metrics import DiceTable, dice_per_class
from neuronet_jax.images.space import voxel_mm3
from neuronet_jax.labels import MALP_EM_TO_TISSUE, PROTOCOLS, REGIONS, TISSUES, is_comparable, tissue_classes

COLUMNS = ("kind", "region", "first", "second", "dice", "first_mm3", "second_mm3")
_BITS = 2  # background, CSF, GM and WM of one protocol
VOTERS = tuple(REGIONS[0].ids)  # the protocols with tissues: four, whose votes fit one byte


@dataclass(frozen=True)
class Pair:
    """The agreement of two protocols on one region."""

    kind: str  # "tissue", "structure", or "merge": a class of MALP-EM's tissue map against its merged structures
    region: str
    first: str
    second: str
    dice: float  # NaN if neither has the region
    first_mm3: float
    second_mm3: float


@dataclass(frozen=True)
class Agreement:
    """The agreement between the label maps of one scan.

    A voxel of `votes` counts the `voters` that give it its most frequent label among CSF, GM, WM and none; it is 0
    where no voter sees tissue. A voxel that a single tool calls tissue thus counts as contested, which a vote among
    tissues only would hide. With all four voters, 4 means unanimity and 2 is the usual disagreement. MALP-EM then has
    two votes, which differ only where its two maps contradict each other.
    """

    pairs: tuple[Pair, ...]
    voters: tuple[str, ...]
    votes: UInt8[np.ndarray, "x y z"] | None  # None with fewer than two voters
    unanimous: float  # share of the voxels that any voter calls GM or WM on which all agree; NaN with fewer than two

    @property
    def consistency(self) -> float:
        """Mean Dice between MALP-EM's tissue map and its structures merged into the same tissues; NaN without both."""
        return self.mean("merge")

    def mean(self, kind: str, region: str | None = None) -> float:
        """Returns the mean Dice over the applicable pairs of a kind, of one region or all, or NaN if there is none.

        Pairs whose protocols mean different things by the region do not count (see `labels.is_comparable`).
        """
        values = [
            pair.dice
            for pair in self.pairs
            if pair.kind == kind
            and region in (None, pair.region)
            and not np.isnan(pair.dice)
            and (kind == "merge" or is_comparable(pair.region, pair.first, pair.second))
        ]
        return float(np.mean(values)) if values else float("nan")


def compare(maps: Mapping[str, UInt8[np.ndarray, "x y z"]], affine: np.ndarray) -> Agreement:
    """Compares the label maps of one scan, which hold the tools' ids on one grid."""
    unit = voxel_mm3(affine)
    voters = tuple(name for name in maps if name in VOTERS)
    codes = _codes(maps, voters) if voters else None
    pairs = [*_tissues(codes, voters)] if codes is not None else []
    for one, other in itertools.combinations(maps, 2):
        pairs += _structures(one, maps[one], other, maps[other])
    pairs += _merge(maps)
    scaled = (Pair(p.kind, p.region, p.first, p.second, p.dice, p.first_mm3 * unit, p.second_mm3 * unit)
              for p in pairs)  # fmt: skip
    if codes is None or len(voters) < 2:
        return Agreement(tuple(scaled), voters, None, float("nan"))
    return Agreement(tuple(scaled), voters, _votes(len(voters))[codes], _unanimous(codes, len(voters)))


def table(agreement: Agreement) -> list[list[str]]:
    """Returns the rows of `sub-…_agreement.tsv`, header first. Dice is `n/a` if neither protocol has the region."""
    rows: list[list[str]] = [list(COLUMNS)]
    for p in agreement.pairs:
        dice = "n/a" if np.isnan(p.dice) else f"{p.dice:.6f}"
        rows.append([p.kind, p.region, p.first, p.second, dice, f"{p.first_mm3:.10g}", f"{p.second_mm3:.10g}"])
    return rows


def _codes(maps: Mapping[str, np.ndarray], voters: tuple[str, ...]) -> np.ndarray:
    """Returns uint8 [x y z]: every voter's tissue (0 none, then CSF, GM, WM) in two bits each, the first one lowest."""
    codes = np.zeros(maps[voters[0]].shape, np.uint8)
    for number, name in enumerate(voters):
        codes |= (tissue_classes(name) << (_BITS * number)).astype(np.uint8)[maps[name]]
    return codes


def _answers(voters: int) -> np.ndarray:
    """Returns uint8 [code voter]: each voter's tissue, for every code."""
    return np.arange(4**voters)[:, None] >> (_BITS * np.arange(voters)) & 3


def _votes(voters: int) -> np.ndarray:
    """Returns uint8 [code]: the number of voters with the most frequent tissue; 0 for code 0, where all vote
    background.
    """
    answers = _answers(voters)
    counts = np.stack([(answers == tissue).sum(axis=1) for tissue in range(4)])  # [tissue code]
    votes = counts.max(axis=0).astype(np.uint8)
    votes[0] = 0
    return votes


def _unanimous(codes: np.ndarray, voters: int) -> float:
    """Returns the share of the voxels that any voter calls GM or WM on which all agree.

    CSF does not count: MALP-EM labels the ventricles only, so that the sulci would count as disagreement.
    """
    counts, answers = _counts(codes, voters), _answers(voters)
    seen = (answers >= TISSUES.index("GM") + 1).any(axis=1)
    agreed = seen & (answers == answers[:, :1]).all(axis=1)
    return float(counts[agreed].sum() / counts[seen].sum()) if counts[seen].any() else float("nan")


def _counts(codes: np.ndarray, voters: int) -> np.ndarray:
    """Returns int64 [code]: how many voxels have each code."""
    return np.sum([np.bincount(plane.ravel(), minlength=256) for plane in codes], axis=0)[: 4**voters]


def _tissues(codes: np.ndarray, voters: tuple[str, ...]) -> Iterator[Pair]:
    counts = _counts(codes, len(voters))
    answers = _answers(len(voters))
    for (i, one), (j, other) in itertools.combinations(enumerate(voters), 2):
        for index, tissue in enumerate(TISSUES, start=1):
            first, second = answers[:, i] == index, answers[:, j] == index
            a, b, both = (int(counts[mask].sum()) for mask in (first, second, first & second))
            yield Pair("tissue", tissue, one, other, 2 * both / (a + b) if a + b else float("nan"), a, b)


def _structures(one: str, first: np.ndarray, other: str, second: np.ndarray) -> Iterator[Pair]:
    shared = [r for r in REGIONS if r.kind == "structure" and one in r.ids and other in r.ids]
    if not shared:
        return
    numbered = []
    for name, ids in ((one, first), (other, second)):
        numbers = np.zeros(256, np.uint8)  # of every id: its number among the shared structures
        for number, region in enumerate(shared, start=1):
            numbers[list(region.ids[name])] = number
        numbered.append(numbers[ids])
    table = dice_per_class(numbered[0], numbered[1], len(shared) + 1)
    yield from _pairs("structure", [region.name for region in shared], one, other, table)


def _merge(maps: Mapping[str, np.ndarray]) -> Iterator[Pair]:
    if {"malp_em", "malp_em_tissue"} <= maps.keys():
        tissues = PROTOCOLS["malp_em_tissue"]
        table = dice_per_class(MALP_EM_TO_TISSUE[maps["malp_em"]], maps["malp_em_tissue"], tissues.num_classes)
        yield from _pairs("merge", [s.name for s in tissues.structures[1:]], "malp_em", "malp_em_tissue", table)


def _pairs(kind: str, names: list[str], one: str, other: str, table: DiceTable) -> Iterator[Pair]:
    rows = zip(names, table.dice[1:], table.reference_voxels[1:], table.predicted_voxels[1:], strict=True)
    for name, dice, a, b in rows:
        yield Pair(kind, name, one, other, float(dice), float(a), float(b))
