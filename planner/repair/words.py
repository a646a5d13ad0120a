"""Single words of tables, many at a time: read, and drafted anew.

What they become is decided by the caller.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U8, U64, distinct
from planner.findings.kinds import FindingKind, Structure
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.source import SECTOR, Source, read_tables

WORD = 8


def read_words(source: Source, offset: I64) -> U64:
    """The words at *offset*, host offsets that are multiples of 8, in any order."""
    sectors, rows = _sectors_with(source, offset)
    return rows.view(">u8").reshape(-1)[_places(sectors, offset)].astype(np.uint64)


def draft_words(
    scope: Scope,
    kind: FindingKind,
    offset: I64,
    words: U64,
    *,
    stage: StageKind = StageKind.CORRECT,
    structure: Structure = Structure.L1_TABLE,
) -> None:
    """Draft the *words* of tables at *offset*, ascending, that findings of *kind* are about."""
    if not len(offset):
        return
    # Whole sectors: a draft of these alone is held once.
    sectors, rows = _sectors_with(scope.drafted, offset)
    rows.view(">u8").reshape(-1)[_places(sectors, offset)] = words
    scope.draft.write_tables(stage, sectors * SECTOR, rows)
    ones = np.ones_like(offset)
    scope.explain_runs(stage, structure, kind, (offset, WORD * ones, ones))


def _sectors_with(source: Source, offset: I64) -> tuple[I64, U8]:
    """The sectors with the bytes at *offset*, ascending, and their content, uint8 (n, 512)."""
    sectors = distinct(offset // SECTOR)
    rows = np.empty((len(sectors), SECTOR), dtype=np.uint8)
    for part, found in read_tables(source, sectors * SECTOR, SECTOR):
        rows[part] = found
    return sectors, rows


def _places(sectors: I64, offset: I64) -> I64:
    """Where in the words of *sectors* those at *offset* stand."""
    within: I64 = offset % SECTOR // WORD
    return np.searchsorted(sectors, offset // SECTOR) * (SECTOR // WORD) + within
