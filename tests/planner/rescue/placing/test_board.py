"""planner.rescue.placing.board: what many tables map at one place is what each of them does."""

from __future__ import annotations

import numpy as np
import pytest

from planner.arrays import I64
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.rescue.placing import ext
from planner.rescue.placing.board import ENTRIES_A_TIME, Board
from planner.rescue.placing.grid import PACKED, Grid, read_grid
from planner.rescue.placing.tables import NO_WINDOW, Tables
from planner.source import Bytes
from tests.planner.rescue.placing.test_grid import GEOMETRIES

TABLES, CLUSTERS = 9, 12


def made_board(
    geometry: Geometry, rng: np.random.Generator, *, has_backing: bool
) -> tuple[Board, list[int]]:
    """Tables without a place that lead to clusters of noise, and entries that they have."""
    size = geometry.cluster_size
    used = sorted({*rng.integers(0, geometry.l2_entries - 4, 3).tolist(), 0})
    words = np.zeros((TABLES, geometry.l2_entries, geometry.l2_entry_size // 8), dtype=np.uint64)
    for entry in range(used[0], used[-1] + 4):
        leads = rng.integers(0, TABLES + CLUSTERS + 3, TABLES).astype(np.uint64)
        flags = rng.choice([0, 0, 0, entries.ZERO, entries.COMPRESSED], TABLES).astype(np.uint64)
        words[:, entry, 0] = leads << np.uint64(geometry.cluster_bits) | flags
        words[:, entry, 1:] = 0xFFFF_FFFF
    data = words.astype(">u8").tobytes() + rng.bytes(CLUSTERS * size)
    offset = np.arange(TABLES) * size
    window = np.full(TABLES, NO_WINDOW)
    tables = Tables(geometry, offset, read_grid(Bytes(data), offset, geometry), window, TABLES)
    return Board(Bytes(data), tables, 1 << 40, has_backing=has_backing), used


@pytest.mark.parametrize("has_backing", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["small", "usual", "extended"])
def test_what_many_tables_map_is_what_each_of_them_maps(
    geometry: Geometry, seed: int, *, has_backing: bool
) -> None:
    rng = np.random.default_rng(seed)
    board, used = made_board(geometry, rng, has_backing=has_backing)
    size, filled = geometry.cluster_size, 0
    some = rng.permutation(TABLES)[:6]
    for entry in used:
        for within, length in ((0, size), (size // 2, size // 2), (size - 100, 300), (7, 5)):
            inside = entry * size + within
            each = [board.bytes_of(table, inside, length) for table in some.tolist()]
            rows = board.rows_of(some, inside, length)
            assert [row.tobytes() for row in rows] == each
            filled += int(np.count_nonzero(rows.any(axis=1)))
    assert filled
    assert board.rows_of(some[:0], 0, size).shape == (0, size)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["small", "usual", "extended"])
def test_what_is_allocated_is_what_each_entry_says(geometry: Geometry, seed: int) -> None:
    rng = np.random.default_rng(seed)
    board, _ = made_board(geometry, rng, has_backing=False)
    size = geometry.cluster_size
    board.place(rng.integers(0, TABLES, 6), rng.permutation(TABLES)[:6])
    end = TABLES * geometry.l2_coverage
    for _ in range(20):
        low, high = sorted(rng.integers(0, end, 2).tolist())
        assert list(board.data_extents(low, high - low)) == extents_by_entry(board, low, high, size)
    assert list(board.data_extents(0, end)) == extents_by_entry(board, 0, end, size)
    assert list(board.data_extents(1 << 41, 5)) == []


def extents_by_entry(board: Board, low: int, high: int, size: int) -> list[tuple[int, int]]:
    """Runs of entries of one table that lead to a cluster, or compressed data."""
    found: list[tuple[int, int]] = []
    for window in range(TABLES):
        start, here = window * board.coverage, len(found)
        if board._next_of[window] == 0:
            continue
        leads = board.tables.grid.cut(int(board._next_of[window]) - 1, 0, board.coverage // size)
        for entry in np.flatnonzero((leads > 0) | (leads == PACKED)).tolist():
            begin, end = max(low, start + entry * size), min(high, start + (entry + 1) * size)
            if begin >= end:
                continue
            if len(found) > here and found[-1][1] == begin:
                begin = found.pop()[0]
            found.append((begin, end))
    return found


def test_what_is_allocated_is_told_of_many_small_tables_at_a_time(monkeypatch) -> None:
    geometry, count, calls = GEOMETRIES[0], 5000, []
    words = np.full(geometry.l2_entries, 1 << geometry.cluster_bits, dtype=">u8")
    offset, window = np.zeros(count, dtype=np.int64), np.arange(count)
    data = Bytes(words.tobytes() * 2)
    tables = Tables(geometry, offset, read_grid(data, offset, geometry), window, count)
    board, allocated = Board(data, tables, count * geometry.l2_coverage), Grid.allocated

    def counted(*asked) -> tuple[I64, I64]:
        calls.append(asked)
        return allocated(*asked)

    monkeypatch.setattr(Grid, "allocated", counted)
    assert len(list(board.data_extents(0, board.size))) == count
    assert len(calls) == -(-count * geometry.l2_entries // ENTRIES_A_TIME)


@pytest.mark.parametrize("together", [5, 1 << 12])
def test_blocks_at_many_places_of_many_tables_come_together(
    monkeypatch, seed: int, together: int
) -> None:
    size = 512
    monkeypatch.setattr(ext, "BATCH_BYTES", together * size)
    board, used = made_board(GEOMETRIES[1], np.random.default_rng(seed), has_backing=False)
    places = np.array([entry * GEOMETRIES[1].cluster_size + 4096 for entry in used])
    wanted = [
        (table, place, block)
        for place in places.tolist()
        for table in range(TABLES)
        if any(block := board.bytes_of(table, place, size))
    ]
    parts = list(ext._blocks_at(board, places, size))
    found = [
        (table, place, row.tobytes())
        for tables, where, rows in parts
        for table, place, row in zip(tables.tolist(), where.tolist(), rows, strict=True)
    ]
    assert found == wanted
    assert len(parts) <= -(-len(wanted) // min(together, len(wanted)))
