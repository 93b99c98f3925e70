"""The T1w images of a raw BIDS dataset, and the rules for their names.

    sub-01/anat/sub-01_T1w.nii.gz
    sub-01/ses-2/anat/sub-01_ses-2_acq-mprage_run-1_T1w.nii

BIDS names and order the parts of a name ("Modality specific files: anatomical data"); https://bids.neuroimaging.io.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from neuronet_jax.errors import NeuronetError, shortened

_ORDER = ("sub", "ses", "task", "acq", "ce", "rec", "run", "echo", "part", "chunk")  # entities of a T1w image
_NUMBERS = ("run", "echo", "chunk")
_PART = re.compile("([a-z]+)-([A-Za-z0-9+]+)")
_NAMED = 20  # faults or labels in one message


class Image(NamedTuple):
    """A T1w image, by the folders that it lies in."""

    path: Path
    participant: str  # without sub-
    session: str  # without ses-; empty where the participant has none


def check_description(folder: Path, advice: str) -> None:
    """Raises NeuronetError, ending with `advice`, if dataset_description.json is missing or not that of a raw dataset.

    Name and BIDSVersion are required, and texts.
    """
    path = folder / "dataset_description.json"
    if not path.exists() and (root := _root_of(folder)):
        raise NeuronetError(f"{folder} is a part of the BIDS dataset {root}: give that folder, or {advice}")
    if not path.exists():
        raise NeuronetError(
            f"{folder} has no dataset_description.json, as every BIDS dataset: give a dataset's own folder, or {advice}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NeuronetError(f"{path} cannot be read ({error}): correct it, or {advice}") from error
    if not isinstance(content, dict):
        raise NeuronetError(f"{path} must hold an object {{…}}: correct it, or {advice}")
    if bad := [name for name in ("Name", "BIDSVersion") if not isinstance(content.get(name), str)]:
        raise NeuronetError(f"{path} must have {' and '.join(bad)}, as text: correct it, or {advice}")
    if (kind := content.get("DatasetType", "raw")) != "raw":  # BIDS' own default
        raise NeuronetError(f"{folder} is a BIDS dataset of type {kind!r}: give the raw dataset, or {advice}")


def _root_of(folder: Path) -> Path | None:
    """Returns the dataset that `folder` is a part of."""
    return next((p for p in folder.absolute().parents if (p / "dataset_description.json").is_file()), None)


def images(folder: Path) -> list[Image]:
    """Returns the T1w images in sub-*/[ses-*/]anat, sorted. Phase, real and imaginary parts are no pictures of a head.

    A link whose file was not fetched counts too.
    """
    found = []
    for place in sorted((*folder.glob("sub-*/anat"), *folder.glob("sub-*/ses-*/anat"))):
        owner, *session = place.relative_to(folder).parts[:-1]
        for name in sorted(os.listdir(place)):
            if name.startswith(".") or not name.endswith(("_T1w.nii.gz", "_T1w.nii")):
                continue
            parts = dict(_PART.findall(name))
            if parts.get("part", "mag") == "mag":
                label = session[0].removeprefix("ses-") if session else parts.get("ses", "")
                found.append(Image(place / name, owner.removeprefix("sub-"), label))
    return found


def check_names(chosen: Iterable[Image], advice: str) -> None:
    """Raises NeuronetError, ending with `advice`, that names the images whose names break a rule of BIDS."""
    if faults := [f"{image.path}: {fault}" for image in chosen if (fault := _fault(image.path))]:
        text = "\n  ".join(shortened(faults, _NAMED))
        raise NeuronetError(f"names that break the rules of BIDS:\n  {text}\nrename the files, or {advice}")


def _fault(path: Path) -> str:
    """Says which rule a name breaks, or returns an empty string."""
    *parts, _ = path.name.split("_")
    keys = []
    for part in parts:
        if not (match := _PART.fullmatch(part)):
            return f"{part} is not an entity such as acq-mprage, of letters and digits"
        key, value = match.groups()
        if key not in _ORDER:
            return f"a T1w image has no entity {key}-"
        if key in _NUMBERS and not value.isdecimal():
            return f"{part} must be a number"
        keys.append(key)
    folders = [folder for folder in path.parts[-4:-2] if folder.startswith(("sub-", "ses-"))]
    if parts[: len(folders)] != folders or "ses" in keys[len(folders) :]:
        return f"the folders say {'_'.join(folders)}"
    if len(set(keys)) < len(keys) or keys != sorted(keys, key=_ORDER.index):
        return f"the order is {', '.join(_ORDER)}, each once"
    return ""


def choose(
    folder: Path, found: Sequence[Image], participants: Sequence[str], sessions: Sequence[str]
) -> tuple[list[Image], list[str]]:
    """Returns the images of these participants and sessions, of all if none is named, and what is left out.

    Left out are participants without a T1w image, and those without one of a chosen session. Raises NeuronetError for a
    label that does not exist, for a chosen participant without an image, and if no image is left.
    """
    everyone = sorted(path.name.removeprefix("sub-") for path in folder.glob("sub-*") if path.is_dir())
    people = [label.removeprefix("sub-") for label in participants]
    visits = [label.removeprefix("ses-") for label in sessions]
    _check_labels(folder, "sub", people, everyone)
    _check_labels(folder, "ses", visits, sorted({image.session for image in found} - {""}))
    imaged = {image.participant for image in found}
    if without := [f"sub-{label}" for label in people if label not in imaged]:
        raise NeuronetError(f"{', '.join(without)}: no T1w image (anat/*_T1w.nii.gz) in {folder}")
    chosen = [
        image
        for image in found
        if (not people or image.participant in people) and (not visits or image.session in visits)
    ]
    if not chosen:
        asked = " of the chosen participants and sessions" if people or visits else ""
        raise NeuronetError(f"{folder} has no T1w image (sub-*/[ses-*/]anat/*_T1w.nii.gz){asked}")
    return chosen, list(_left_out(people or everyone, visits, chosen))


def _check_labels(folder: Path, entity: str, asked: Sequence[str], there: Sequence[str]) -> None:
    for label in asked:
        if label in there:
            continue
        near = difflib.get_close_matches(label, there, 1)
        some = ", ".join(f"{entity}-{known}" for known in there[:_NAMED]) + (", …" if len(there) > _NAMED else "")
        hint = f"did you mean {entity}-{near[0]}?" if near else f"there are {some}" if there else f"it has no {entity}-"
        raise NeuronetError(f"{folder} has no {entity}-{label}; {hint}")


def _left_out(people: Iterable[str], visits: Sequence[str], chosen: Iterable[Image]) -> Iterator[str]:
    there = {(image.participant, image.session) for image in chosen} | {(image.participant, "") for image in chosen}
    for person in people:
        for visit in visits or ("",):
            if (person, visit) not in there:
                yield f"sub-{person}" + (f" ses-{visit}" if visit else "")
