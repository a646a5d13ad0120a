"""Where the lost L2 tables of an image belong: the front door of this room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from planner.arrays import I64, distinct, is_among
from planner.check.check import check_image
from planner.check.refcount_comparison import Mismatches
from planner.check.report import Report
from planner.findings.kinds import NONE
from planner.guestfs.work import Work
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.rescue.placing.board import Board
from planner.rescue.placing.claims import Claims, Collector
from planner.rescue.placing.going_on import Pass
from planner.rescue.placing.grid import NOWHERE, PACKED, read_grid
from planner.rescue.placing.solve import SPOTTERS, Solver
from planner.rescue.placing.tables import (
    A_SNAPSHOTS,
    NO_WINDOW,
    Finder,
    L1Table,
    Tables,
    read_l1,
    snapshot_hints,
    unused_clusters,
)
from planner.rescue.placing.votes import Evidence
from planner.rescue.scanned import Scanned
from planner.source import Patched, Source, present_bytes

LISTED_CANDIDATES = 16
"""Of one table."""

FOR_ANY = 1_200_000.0
"""Of work: the disk is looked at round after round."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A lost table, and where it belongs.

    ``offset``: of the table in the file, bytes. ``l1_index``: the entry that is to lead there, of
    one that is not ``placed`` the likeliest, `NONE` where nothing speaks for any. ``evidence``:
    what says so; ``votes_for``, ``votes_against``: how often, and how often otherwise.
    ``candidates``: the entries that one which is not placed may belong to, the likeliest first,
    `LISTED_CANDIDATES` at most of ``candidate_count``.
    """

    offset: int
    l1_index: int
    evidence: tuple[Evidence, ...]
    votes_for: int
    votes_against: int
    placed: bool
    candidates: tuple[int, ...] = ()
    candidate_count: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """What was found of an image: its L1 table as it stands, its tables, their placements.

    ``mismatches``: of the check of it without entries that lead nowhere. ``shared``: offsets of the
    tables without a place that snapshots lead to as well. ``note``: why not all that may say where
    they belong was read; empty: it was.
    """

    l1: L1Table
    board: Board
    placements: tuple[Placement, ...]
    mismatches: Mismatches
    shared: frozenset[int]
    note: str = ""


def without_unsound(source: Source, l1: L1Table) -> Source:
    """*source* as if its L1 table had no entries but those that lead to tables."""
    words = np.where(l1.leads, l1.words, np.uint64(0)).astype(">u8")
    return Patched(source, l1.offset, words.tobytes())


def find_placements(
    source: Source,
    report: Report,
    progress: Progress = tell_nobody,
    *,
    free: bool = False,
    scanned: Scanned | None = None,
) -> Placed | None:
    """Where the tables belong that no entry leads to; None where there is nothing to look for.

    *report*: of a check of *source*. *free*: also those in clusters that are counted as free.
    *scanned*: how far this had come before.
    """
    layout = report.layout
    if layout is None:
        return None
    l1 = read_l1(source, layout.header, report)
    clean, sound = source, report
    if ((l1.words != 0) & ~l1.leads).any():
        clean = without_unsound(source, l1)
        sound = check_image(clean)
    if sound.mismatches is None:
        return None
    unused = unused_clusters(clean, sound, free=free)
    going = _Going(progress, scanned or Scanned())
    tables, collector, _ = _look(clean, sound, layout, l1, going, unused=unused)
    lost = tables.offset[tables.lost]
    is_shared = sound.mismatches.count_references(lost >> layout.geometry.cluster_bits) > 0
    board = Board(
        source,
        tables,
        layout.geometry.virtual_size,
        has_backing=bool(layout.header.backing_file_offset),
        work=Work(present_bytes(source), FOR_ANY),
    )
    # Of an older copy of a table, which leads to the same in part, nothing counts.
    waits = np.flatnonzero(tables.window == NO_WINDOW)
    solver = Solver(board, collector.claims(tables.grid, waits))
    solver.solve()
    shared = frozenset(lost[is_shared].tolist())
    placements = tuple(_placements(solver))
    return Placed(l1, board, placements, sound.mismatches, shared, solver.note)


def with_candidates(found: Placed) -> tuple[Placed, I64]:
    """*found* with the candidates of tables that are not placed; the L1 indices that are any's.

    A table may belong to every entry that leads nowhere, unless what it maps would lie behind the
    end of the disk. One that maps nothing but zeros reads as if it were not there, and has none.
    """
    board = found.board
    is_open = ~found.l1.leads[: board.tables.windows]
    is_open[[each.l1_index for each in found.placements if each.placed]] = False
    vacant, most = np.flatnonzero(is_open), 0
    placements = []
    for each in found.placements:
        if not each.placed:
            count = int(np.searchsorted(vacant, _end(board, each)))
            most = max(most, count)
            each = replace(each, **_shown(each, vacant[:count]))  # noqa: PLW2901
        placements.append(each)
    return replace(found, placements=tuple(placements)), vacant[:most]


def _end(board: Board, placement: Placement) -> int:
    """The window behind the last in which what a table maps lies on the disk; 0: it maps zeros."""
    table = int(np.searchsorted(board.tables.offset, placement.offset))
    entries_of_it = board.geometry.l2_entries
    row = board.tables.grid.cut(table, 0, entries_of_it)
    counts = row != NOWHERE if board.has_backing else (row > 0) | (row == PACKED)
    used = np.flatnonzero(counts)
    clusters = -(-board.size >> board.geometry.cluster_bits)
    return max(0, -(-(clusters - int(used[-1])) // entries_of_it)) if len(used) else 0


def _shown(placement: Placement, candidates: I64) -> dict[str, Any]:
    """Those of *candidates*, ascending, that are listed: what most speaks for comes first."""
    listed = candidates[: LISTED_CANDIDATES + 1].tolist()
    if placement.votes_for and is_among(np.array([placement.l1_index]), candidates).all():
        rest = [index for index in listed if index != placement.l1_index]
        listed = [placement.l1_index, *rest]
    return {
        "candidates": tuple(listed[:LISTED_CANDIDATES]),
        "candidate_count": len(candidates),
    }


@dataclass(frozen=True, slots=True, eq=False)
class Around:
    """What there is of tables, before anything is known of their places. ``has_l1``: whether one of
    them looks like the L1 table of a disk."""

    tables: Tables
    claims: Claims
    has_l1: bool


def look_around(
    source: Source, progress: Progress = tell_nobody, scanned: Scanned | None = None
) -> Around | None:
    """The tables of an image whose L1 table is empty, and what their clusters say.

    *scanned*: how far this had come before.
    """
    report = check_image(source)
    if report.layout is None or report.mismatches is None:
        return None
    l1 = read_l1(source, report.layout.header, report)
    unused = unused_clusters(source, report)
    going = _Going(progress, scanned or Scanned())
    tables, collector, has_l1 = _look(source, report, report.layout, l1, going, unused=unused)
    return Around(tables, collector.claims(tables.grid, np.arange(len(tables))), has_l1)


@dataclass(frozen=True, slots=True)
class _Going:
    """Who is told how far it is, and how far it had come before."""

    progress: Progress
    scanned: Scanned


def _look(
    source: Source,
    report: Report,
    layout: Layout,
    l1: L1Table,
    going: _Going,
    *,
    unused: I64,
) -> tuple[Tables, Collector, bool]:
    """The tables there are, and what the clusters say that those lead to which wait for a place.
    They are looked for in *unused* clusters.

    And whether something that nothing leads to looks like an L1 table.
    """
    geometry = layout.geometry
    finder = Finder(source, report, layout)
    collector = Collector(SPOTTERS, geometry.cluster_bits)
    meter = Meter(going.progress, "scan", len(unused) << geometry.cluster_bits)
    Pass(source, layout.header, collector, finder).look(unused, going.scanned, meter)
    lost, has_l1 = finder.tables()
    index = np.flatnonzero(l1.leads)
    windows = min(len(l1.words), geometry.l1_entries_needed)
    found = read_grid(source, lost, geometry)
    hints, late = snapshot_hints(source, report, lost, found, ~l1.leads[:windows])
    known = np.array([table for table, _ in hints], dtype=np.int64)
    lost = distinct(np.concatenate((lost, known)))
    theirs = np.array([table for table, _ in late], dtype=np.int64)
    offset = np.concatenate((lost, theirs, entries.l1_offsets(l1.words[index])))
    window = np.concatenate(
        (np.full(len(lost), NO_WINDOW), np.full(len(theirs), A_SNAPSHOTS), index)
    )
    order = np.argsort(offset, kind="stable")
    offset, window = offset[order], window[order]
    tables = Tables(
        geometry,
        offset,
        read_grid(source, offset, geometry),
        window,
        windows,
        *(
            tuple((int(np.searchsorted(offset, table)), place) for table, place in shown)
            for shown in (hints, late)
        ),
    )
    # What a table has in common with a snapshot is in use, and says where it is all the same.
    rest = distinct(tables.grid.filled(tables.lost).cluster)
    rest = rest[~is_among(rest, unused)]
    Pass(source, layout.header, collector).look(rest, going.scanned, Meter())
    return tables, collector, has_l1


def _placements(solver: Solver) -> Iterator[Placement]:
    board = solver.board
    for table in board.tables.lost.tolist():
        each = solver.tallies.get(table)
        window = int(board.window[table])
        if window == A_SNAPSHOTS:
            continue
        placed = window != NO_WINDOW
        best = window if placed else each.best if each else NONE
        evidence = tuple(sorted(each.by_window.get(best, {}))) if each else ()
        count = each.count(best) if each else 0
        against = sum(map(each.count, each.by_window)) - count if each else 0
        yield Placement(int(board.tables.offset[table]), best, evidence, count, against, placed)
