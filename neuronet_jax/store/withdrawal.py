"""Lists of withdrawn participants, and the check that a store holds none of them.

A store knows its subjects by name, so that a list is compared with them directly. Nothing of a list is kept in a store
or a run, not even a hash: ids of few digits are found from their hash in seconds.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from neuronet_jax.errors import NeuronetError
from neuronet_jax.files import Files
from neuronet_jax.spreadsheets import MOST_FAULTS, Faults, lines, read_text
from neuronet_jax.store.reader import Store, read_rejects
from neuronet_jax.store.schema import bare_id, is_id


def read_ids(path: Path) -> dict[str, int]:
    """Reads a withdrawal list: one id per line. Further columns and a header `id` or `eid` are ignored.

    Returns the line of each id, so that messages can name lines instead of participants. Raises NeuronetError E_ID.
    """
    faults, ids = Faults(), {}
    for number, line in lines(read_text(path)):
        cell = re.split(r"[,;\t ]", line.strip(), maxsplit=1)[0].strip('"')
        if not cell or (not ids and cell.lower() in ("id", "eid")):
            continue
        if is_id(bare_id(cell)):
            ids.setdefault(bare_id(cell), number)
        else:
            faults.add(
                f"E_ID: the id in row {number} of {path.name} must consist of ASCII letters and digits only; correct it"
            )
    faults.raise_any()
    return ids


def unknown_lines(excluded: Mapping[str, int], known: Collection[str], where: str) -> str:
    """Says which lines of a withdrawal list name nobody in `where`; empty if all do."""
    numbers = [number for id_, number in excluded.items() if id_ not in known]
    if not numbers:
        return ""
    listed = ", ".join(map(str, numbers[:MOST_FAULTS])) + (" and others" if len(numbers) > MOST_FAULTS else "")
    return f"{len(numbers)} of {len(excluded)} ids to exclude are not in {where}; lines of the list: {listed}"


def refuse_withdrawn(stores: Iterable[Store], withdrawn: Path) -> None:
    """Raises NeuronetError E_WITHDRAWN if a store holds a participant of the list `withdrawn`, or names one."""
    ids = read_ids(withdrawn)
    for store in stores:
        rows = (*store.subjects, *read_rejects(Files(store.dest)))
        if count := len({row.id for row in rows} & set(ids)):
            raise NeuronetError(
                f"E_WITHDRAWN: {store.dest} holds {count} of the participants in {withdrawn.name}; remove them with "
                f"python -m data_prep.purge --store={store.dest} --exclude={withdrawn}"
            )
