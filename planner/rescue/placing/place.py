"""Where the lost L2 tables of an image belong: the front door of this room."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from planner.arrays import I64, Mask, distinct, is_among
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
from planner.rescue.placing.grid import read_grid
from planner.rescue.placing.placements import LISTED_CANDIDATES, Placements
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
from planner.rescue.scanned import Scanned
from planner.source import Patched, Source, present_bytes

LOOKED_AT = 1 << 16
"""L1 entries at a time."""

FOR_ANY = 1_200_000.0
"""Of work: the disk is looked at round after round."""


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """What was found of an image: its L1 table as it stands, its tables, their placements.

    ``mismatches``: of the check of it without entries that lead nowhere. ``shared``: offsets of the
    tables without a place that snapshots lead to as well, ascending. ``note``: why not all that may
    say where they belong was read; empty: it was.
    """

    l1: L1Table
    board: Board
    placements: Placements
    mismatches: Mismatches
    shared: I64
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
    placements = _placements(solver)
    return Placed(l1, board, placements, sound.mismatches, lost[is_shared], solver.note)


def with_candidates(found: Placed) -> tuple[Placed, Mask]:
    """*found* with the candidates of tables that are not placed; which L1 indices are any's, as far
    as there are some.

    A table may belong to every entry that leads nowhere, unless what it maps would lie behind the
    end of the disk. One that maps nothing but zeros reads as if it were not there, and has none.
    """
    board, known = found.board, found.placements
    is_open = ~found.l1.leads[: board.tables.windows]
    is_open[known.l1_index[known.placed]] = False
    end = np.where(known.placed, 0, _ends(board, known.offset))
    count = np.zeros_like(end)
    for each in distinct(end).tolist():  # the disk ends in the last window, or in that before
        count[end == each] = np.count_nonzero(is_open[:each])
    is_likely = (known.votes_for > 0) & (known.l1_index >= 0) & (known.l1_index < end)
    is_likely[is_likely] = is_open[known.l1_index[is_likely]]
    listed = _first_of(is_open, LISTED_CANDIDATES + 1)
    placements = replace(known, candidate_count=count, is_likely=is_likely, candidates=listed)
    return replace(found, placements=placements), is_open[: end.max(initial=0)]


def _ends(board: Board, offset: I64) -> I64:
    """The window behind the last in which what each table maps lies on the disk; 0: it maps zeros.

    *offset*: of the tables in the file.
    """
    tables = np.searchsorted(board.tables.offset, offset)
    last = board.tables.grid.last(tables, zeros=board.has_backing)
    clusters = -(-board.size >> board.geometry.cluster_bits)
    end = np.maximum(0, -(-(clusters - last) // board.geometry.l2_entries))
    end[last < 0] = 0
    return np.minimum(end, board.tables.windows)


def _first_of(are: Mask, most: int) -> I64:
    """Which are, of many millions the first."""
    found = np.zeros(0, dtype=np.int64)
    for start in range(0, len(are), LOOKED_AT):
        found = np.append(found, start + np.flatnonzero(are[start : start + LOOKED_AT]))
        if len(found) >= most:
            break
    return found[:most]


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
    lost, theirs = distinct(np.concatenate((lost, hints[0]))), late[0]
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
        *(np.stack((np.searchsorted(offset, shown[0]), shown[1])) for shown in (hints, late)),
    )
    # What a table has in common with a snapshot is in use, and says where it is all the same.
    rest = distinct(tables.grid.filled(tables.lost).cluster)
    rest = rest[~is_among(rest, unused)]
    Pass(source, layout.header, collector).look(rest, going.scanned, Meter())
    return tables, collector, has_l1


def _placements(solver: Solver) -> Placements:
    board = solver.board
    tables = board.tables.lost
    tables = tables[board.window[tables] != A_SNAPSHOTS]
    index = board.window[tables]
    placed = index != NO_WINDOW
    ballots = solver.tallied.ballots()
    ballots = ballots.select(is_among(ballots.table, tables))
    best = ballots.best()
    at = np.searchsorted(tables, best.table)
    index[at] = np.where(placed[at], index[at], best.window)
    index[index == NO_WINDOW] = NONE
    votes_for, votes = np.zeros_like(tables), np.zeros_like(tables)
    at = np.searchsorted(tables, ballots.table)
    np.add.at(votes, at, ballots.count)
    mine = ballots.window == index[at]
    votes_for[at[mine]] = ballots.count[mine]
    evidence = np.zeros(len(tables), dtype=np.uint8)
    evidence[at[mine]] = ballots.evidence[mine]
    against = votes - votes_for
    return Placements.of(board.tables.offset[tables], index, evidence, (votes_for, against), placed)
