"""A manifest: a table of subjects and their files. It is checked before any image is read."""

import difflib
import logging
from pathlib import Path

from data_prep.sources.source import Source, check
from neuronet_jax.errors import NeuronetError
from neuronet_jax.labels import PROTOCOLS
from neuronet_jax.spreadsheets import Faults, read_table
from neuronet_jax.store.schema import bare_id

_NEAR = 0.75  # likeness of a mistyped column, such as fsl_fats or malpem, to the known one

log = logging.getLogger(__name__)


def read_manifest(path: Path) -> list[Source]:
    """Reads a table with the columns `id,t1,fsl_fast,fsl_first,spm_tissue,malp_em,malp_em_tissue[,split][,visit]`, in
    row order.

    Paths are absolute or relative to the manifest; an empty cell means an absent map. `sub-01` is the id 01, as in the
    lists of `neuronet segment`. Further columns are left out, and reported. Raises NeuronetError for missing columns or
    cells, for a column that nearly has a known name, and as `spreadsheets.read_table` and `source.check` do.
    """
    rows = read_table(path, "id", "t1")
    known = ("id", "t1", *PROTOCOLS, "split", "visit")
    unknown = [name for name in rows[0][1] if name not in known]
    for name in unknown:
        if near := difflib.get_close_matches(name.lower(), known, 1, _NEAR):
            raise NeuronetError(f"the manifest has the column {name!r}; did you mean {near[0]!r}?")
    if unknown:
        log.warning("columns of the manifest that are not used: %s", ", ".join(map(repr, unknown)))
    faults, sources = Faults(), []
    for number, row in rows:
        if not row["t1"]:
            faults.add(f"row {number} of the manifest has no t1 image")
        labels = {name: path.parent / row[name] for name in PROTOCOLS if row.get(name)}
        visit = row.get("visit", "").removeprefix("ses-")
        sources.append(
            Source(bare_id(row["id"]), path.parent / row["t1"], labels, row.get("split", ""), visit, row=number)
        )
    check(sources, faults)
    return sources
