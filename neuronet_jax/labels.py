"""The label tables: the only source of the protocols' ids, names, sides, partners, tissues, colours and BIDS mapping.

A *class* is the index of a structure within its protocol, which the network predicts; an *id* is the number that the
tool writes. The MALP-EM table is data, `data/malp_em.tsv`. Its names, Neuromorphometrics ids and tissues are those of
MALP-EM's own source (ledigchr/MALPEM); centroids (RAS+ mm) and volumes (mm³) in MNI space were measured on the
maximum-probability Neuromorphometrics map that SPM12 carries. FIRST's ids are those of FreeSurfer's colour table.
"""

import colorsys
import csv
import dataclasses
import hashlib
import json
from functools import cached_property
from importlib import resources

import numpy as np

from neuronet_jax.errors import NeuronetError, RejectError

_GOLDEN = 0.618034  # successive multiples, modulo 1, spread evenly over the colour circle however many there are

# BIDS' common labels (BIDS specification, "Common image-derived labels"); None: no common label describes it.
_GM, _WM, _CSF, _CORTICAL_GM, _SUBCORTICAL_GM, _BRAIN_STEM, _CEREBELLUM = 1, 2, 3, 8, 9, 10, 11


@dataclasses.dataclass(frozen=True)
class Structure:
    """One class of a protocol."""

    index: int  # class index within the protocol; 0 is background
    id: int  # the number that the tool writes
    name: str  # unique within the protocol
    side: str  # "left", "right", "midline", or "NA" where sides have no meaning (background, whole-brain tissues)
    partner: int  # class index of the same structure on the other side, else its own index
    tissue: int | None  # class of `malp_em_tissue` that contains it, if any
    color: tuple[int, int, int]  # sRGB, 0 to 255
    mapping: int | None  # id among BIDS' common labels (the `mapping` column of a dseg.tsv)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The label map of one tool: its classes in order, and the conversion between ids and classes."""

    name: str
    tool: str
    filename: str  # member of a UK Biobank-style subject folder
    structures: tuple[Structure, ...]

    @property
    def num_classes(self) -> int:
        return len(self.structures)

    @cached_property
    def ids(self) -> np.ndarray:
        """The tool's id of every class, int64[k], read-only."""
        return _frozen([structure.id for structure in self.structures], np.int64)

    @cached_property
    def partners(self) -> np.ndarray:
        """The class on the other side, int32[k], read-only. An involution."""
        return _frozen([structure.partner for structure in self.structures], np.int32)

    @cached_property
    def version(self) -> str:
        """SHA-256 of the table. It changes as soon as a label changes its meaning; colours do not count."""
        rows = [(s.index, s.id, s.name, s.side, s.partner, s.tissue, s.mapping) for s in self.structures]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @cached_property
    def _classes(self) -> np.ndarray:
        """The class of each id, int16[largest id + 1], -1 for ids without a class."""
        table = np.full(self.ids.max() + 1, -1, np.int16)
        table[self.ids] = np.arange(self.num_classes)
        return table

    def to_classes(self, ids: np.ndarray) -> np.ndarray:
        """Returns class indices, uint8 of the same shape, from the tool's ids.

        Raises RejectError E_LABEL_SET, listing the values, if an id is not in the table. Such a label is an error,
        never background.
        """
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise NeuronetError(f"{self.name} label ids must be integers, got an array of {ids.dtype}; round it first")
        if ids.size and (ids.min() < 0 or ids.max() >= len(self._classes)):
            self._refuse(ids)
        classes = self._classes[ids]
        if (classes < 0).any():
            self._refuse(ids)
        return classes.astype(np.uint8)

    def to_ids(self, classes: np.ndarray) -> np.ndarray:
        """Returns the tool's ids, uint8 of the same shape, from class indices: the exact inverse of `to_classes`."""
        classes = np.asarray(classes)
        if classes.dtype.kind not in "iu" or (
            classes.size and (classes.min() < 0 or classes.max() >= self.num_classes)
        ):
            raise NeuronetError(
                f"{self.name} has the classes 0 to {self.num_classes - 1}; got {classes.dtype} values "
                f"from {classes.min()} to {classes.max()}"
            )
        return self.ids.astype(np.uint8)[classes]

    def mirror(self, classes: np.ndarray, axis: int = 0) -> np.ndarray:
        """Returns the label map of the mirrored head: `axis` (left-right) reversed, partners swapped, same dtype."""
        return self.partners.astype(classes.dtype)[np.flip(classes, axis)]

    def _refuse(self, ids: np.ndarray) -> None:
        unknown = np.setdiff1d(ids, self.ids).tolist()
        listed = ", ".join(map(str, unknown[:20])) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        legal = (
            f"0 to {self.num_classes - 1}"
            if np.array_equal(self.ids, np.arange(self.num_classes))
            else self.ids.tolist()
        )
        raise RejectError(
            "E_LABEL_SET", f"{listed} not among the {self.name} ids ({legal}); is this a {self.tool} map?"
        )


def _frozen(values: list, dtype: type) -> np.ndarray:
    array = np.array(values, dtype)
    array.flags.writeable = False
    return array


def _read_malp_em() -> list[dict[str, str]]:
    """Returns the rows of `data/malp_em.tsv`, in class order."""
    text = resources.files("neuronet_jax").joinpath("data", "malp_em.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t"))


_ROWS = _read_malp_em()

_BACKGROUND = Structure(0, 0, "Background", "NA", 0, 0, (0, 0, 0), 0)

_TISSUES = (  # name, colour, BIDS mapping (deep GM holds the brain stem too: grey matter is its nearest common label)
    ("Background", (0, 0, 0), 0),
    ("Ventricles", (64, 118, 191), _CSF),
    ("DeepGM", (230, 140, 70), _GM),
    ("CorticalGM", (190, 90, 105), _CORTICAL_GM),
    ("WM", (240, 228, 200), _WM),
    ("Other", (110, 165, 120), None),
)


def _malp_em_color(pair: int, side: str, tissue: int) -> tuple[int, int, int]:
    """Returns a colour for a left-right pair: neighbours differ, partners look alike, and right is darker than left."""
    lightness = (0.44, 0.54, 0.64)[pair % 3] + {"left": 0.025, "right": -0.025}.get(side, 0)
    lightness, saturation = (lightness + 0.24, 0.35) if tissue == 4 else (lightness, 0.62)
    red, green, blue = colorsys.hls_to_rgb(pair * _GOLDEN % 1, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def _malp_em_mapping(index: int, tissue: int) -> int | None:
    if index == 7:
        return _BRAIN_STEM
    if index in (10, 11, 12, 13, 36, 37, 38):
        return _CEREBELLUM
    if index == 18:
        return _CSF
    if index == 35:  # the optic chiasm is a tract, although MALP-EM counts it as deep grey matter
        return _WM
    return {1: _CSF, 2: _SUBCORTICAL_GM, 3: _CORTICAL_GM, 4: _WM}.get(tissue)  # exterior and vessel: none


def _malp_em() -> tuple[Structure, ...]:
    structures, pairs = [_BACKGROUND], {}
    for row in _ROWS[1:]:
        index, partner, tissue = int(row["index"]), int(row["left_right_partner"]), int(row["malp_em_tissue"])
        side = "midline" if row["side"] == "NA" else row["side"]
        color = _malp_em_color(pairs.setdefault(min(index, partner), len(pairs)), side, tissue)
        mapping = _malp_em_mapping(index, tissue)
        structures.append(Structure(index, index, row["name"], side, partner, tissue, color, mapping))
    return tuple(structures)


def _fsl_first(malp_em: tuple[Structure, ...]) -> tuple[Structure, ...]:
    """Derives FIRST's table from MALP-EM's: MALP-EM has all its structures, so everything but the id is known."""
    twins = sorted((int(row["fsl_first_id"]), malp_em[int(row["index"])]) for row in _ROWS if row["fsl_first_id"])
    classes = {twin.index: index for index, (_, twin) in enumerate(twins, start=1)}
    return (
        _BACKGROUND,
        *(
            dataclasses.replace(twin, index=index, id=id_, partner=classes[twin.partner])
            for index, (id_, twin) in enumerate(twins, start=1)
        ),
    )


def _csf_gm_wm() -> tuple[Structure, ...]:
    names = (("CSF", _TISSUES[1][1], _CSF), ("GM", _TISSUES[3][1], _GM), ("WM", _TISSUES[4][1], _WM))
    return (
        _BACKGROUND,
        *(
            Structure(i, i, name, "NA", i, None, color, mapping)
            for i, (name, color, mapping) in enumerate(names, start=1)
        ),
    )


def _protocols() -> dict[str, Protocol]:
    malp_em = _malp_em()
    tissues = tuple(
        Structure(i, i, name, "NA", i, i, color, mapping) for i, (name, color, mapping) in enumerate(_TISSUES)
    )
    protocols = (
        Protocol("fsl_fast", "FSL FAST", "T1_brain_seg.nii.gz", _csf_gm_wm()),
        Protocol("fsl_first", "FSL FIRST", "T1_first_all_fast_firstseg.nii.gz", _fsl_first(malp_em)),
        Protocol("spm_tissue", "SPM", "T1_brain_seg_spm.nii.gz", _csf_gm_wm()),
        Protocol("malp_em", "MALP-EM", "T1_MALPEM.nii.gz", malp_em),
        Protocol("malp_em_tissue", "MALP-EM", "T1_MALPEM_tissues.nii.gz", tissues),
    )
    return {protocol.name: protocol for protocol in protocols}


PROTOCOLS: dict[str, Protocol] = _protocols()

# The protocols of each published network, in the order of its outputs: together, the tissues alone, one at a time.
TASKS: dict[str, tuple[str, ...]] = {
    "all_targets": tuple(PROTOCOLS),
    "tissue": ("fsl_fast", "spm_tissue", "malp_em_tissue"),
    **{name: (name,) for name in PROTOCOLS},
}

# uint8[139]: the `malp_em_tissue` class of every `malp_em` class. The tissue map is exactly this merge.
MALP_EM_TO_TISSUE = _frozen([int(row["malp_em_tissue"]) for row in _ROWS], np.uint8)

# float64[139, 3] in RAS+ mm and float64[139] in mm³, MNI space; NaN and 0 if the source map lacks the structure.
MALP_EM_CENTROIDS_MM = _frozen([[float(row[f"mni_{a}_mm"] or "nan") for a in "xyz"] for row in _ROWS], np.float64)
MALP_EM_VOLUMES_MM3 = _frozen([float(row["mni_volume_mm3"] or 0) for row in _ROWS], np.float64)


@dataclasses.dataclass(frozen=True)
class Region:
    """A tissue or structure that several protocols label, each with its own ids."""

    kind: str  # "tissue" or "structure"
    name: str
    ids: dict[str, tuple[int, ...]]  # per protocol: the tool's ids that belong to it


TISSUES = ("CSF", "GM", "WM")  # in the order of their brightness in T1-weighted images
_TISSUE_OF_MAPPING = {_CSF: "CSF", _GM: "GM", _CORTICAL_GM: "GM", _SUBCORTICAL_GM: "GM", _WM: "WM"}


def tissue_of(structure: Structure) -> str | None:
    """Returns CSF, GM or WM, as the tool itself classifies the structure, or None if it does not say.

    MALP-EM merges its structures into tissues, and that merge decides first. It counts the brain stem as deep grey
    matter, whereas FAST and SPM, which go by intensity, call it white. The tools do disagree there, and the comparison
    should show it. For MALP-EM's fifth tissue, "other", the structure's own BIDS label decides (CSF).
    """
    merged = None if structure.tissue is None else _TISSUES[structure.tissue][2]
    return _TISSUE_OF_MAPPING.get(merged or structure.mapping or 0)


def _regions() -> tuple[Region, ...]:
    tissues: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in TISSUES}
    structures: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, protocol in PROTOCOLS.items():
        members = {t: tuple(s.id for s in protocol.structures if tissue_of(s) == t) for t in TISSUES}
        if all(members.values()):  # FIRST labels some structures of the brain, not its tissues
            for tissue, ids in members.items():
                tissues[tissue][name] = ids
        for s in protocol.structures:
            if s.side != "NA":
                structures.setdefault(s.name, {})[name] = (s.id,)
    shared = (Region("structure", name, ids) for name, ids in structures.items() if len(ids) > 1)
    return (*(Region("tissue", name, ids) for name, ids in tissues.items()), *shared)


REGIONS: tuple[Region, ...] = _regions()  # all regions that more than one protocol labels


_VENTRICLES_ONLY = ("malp_em", "malp_em_tissue")  # their CSF leaves out the sulci


def is_comparable(region: str, first: str, second: str) -> bool:
    """Tells whether two protocols mean the same by a region. By CSF, MALP-EM means the ventricles only."""
    return region != "CSF" or (first in _VENTRICLES_ONLY) == (second in _VENTRICLES_ONLY)


def tissue_classes(protocol: str) -> np.ndarray:
    """Returns uint8 [256]: the tissue of every id of a protocol, 0 for none, then CSF, GM and WM as in TISSUES."""
    classes = np.zeros(256, np.uint8)
    for index, region in enumerate(REGIONS[: len(TISSUES)], start=1):
        classes[list(region.ids[protocol])] = index
    return classes
