"""planner.rescue.placing.grid: tables as pages, held against the same tables word by word."""

import tracemalloc

import numpy as np
import pytest

from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.rescue.placing.grid import NOWHERE, PACKED, PAGE_BYTES, ZEROS, read_grid
from planner.source import Bytes
from tests.planner.sources import Sparse

GEOMETRIES = [
    Geometry(3, 9, 4, 0),
    Geometry(3, 16, 4, 0),
    Geometry(3, 16, 4, 0, extended_l2=True),
]


def made_tables(geometry: Geometry, rng: np.random.Generator) -> tuple[bytes, list[int]]:
    """A file of tables with zeros for the most, and where they are; one of them twice."""
    size, clusters = geometry.cluster_size, 12
    words = np.zeros(clusters * size // 8, dtype=np.uint64)
    at = rng.choice(len(words), len(words) // 40, replace=False)
    words[at] = rng.integers(0, clusters + 3, len(at)).astype(np.uint64) << np.uint64(
        geometry.cluster_bits
    )
    for flag in (entries.COPIED, entries.ZERO, entries.COMPRESSED):
        words[rng.choice(at, len(at) // 5)] |= np.uint64(flag)
    offsets = [number * size for number in rng.permutation(clusters).tolist()]
    return words.astype(">u8").tobytes(), [*offsets[:9], offsets[3]]


def read_by_word(data: bytes, offset: int, geometry: Geometry) -> list[tuple[int, bool]]:
    """Where each entry of one table leads, as qcow2.txt says, and whether it is the disk's own."""
    found, step = [], geometry.l2_entry_size
    for at in range(offset, offset + geometry.cluster_size, step):
        word = int.from_bytes(data[at : at + 8], "big")
        bitmap = int.from_bytes(data[at + 8 : at + 16], "big") if step == 16 else 1
        place = (word & entries.L2_OFFSET) >> geometry.cluster_bits
        if word & entries.COMPRESSED:
            place = PACKED
        elif step == 8 and word & entries.ZERO:
            place = ZEROS
        elif place << geometry.cluster_bits >= len(data) or not bitmap & 0xFFFF_FFFF:
            place = NOWHERE
        found.append((place, bool(word & entries.COPIED)))
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["small", "usual", "extended"])
def test_pages_say_what_the_words_do(geometry, seed) -> None:
    rng = np.random.default_rng(seed)
    data, offsets = made_tables(geometry, rng)
    grid = read_grid(Bytes(data), np.array(offsets), geometry)
    truth = [read_by_word(data, offset, geometry) for offset in offsets]
    places = np.array([[place for place, _ in table] for table in truth])
    for table, row in enumerate(places):
        for entry in rng.integers(0, geometry.l2_entries, 20).tolist():
            assert grid.at(table, entry) == row[entry]
        first, end = sorted(rng.integers(0, geometry.l2_entries + 1, 2).tolist())
        assert grid.cut(table, first, end).tolist() == row[first:end].tolist()
    every = np.arange(len(offsets))
    assert np.array_equal(grid.used(every), places != NOWHERE)
    for entry in rng.integers(0, geometry.l2_entries, 20).tolist():
        assert np.array_equal(grid.leads(every, entry), places[:, entry] > 0)
    for own in (False, True):
        wanted = [
            (table, entry, place)
            for table, row in enumerate(truth[:-1])  # the last is one that was there before
            for entry, (place, is_own) in enumerate(row)
            if place > 0 and (is_own or not own)
        ]
        found = grid.filled(every, own=own)
        columns = (found.table, found.entry, found.cluster)
        assert list(zip(*(each.tolist() for each in columns), strict=True)) == wanted
    last = grid.filled(every[-1:])
    assert last.cluster.tolist() == [place for place, _ in truth[-1] if place > 0]


def test_tables_in_holes_take_what_is_there_of_them() -> None:
    geometry = Geometry(3, 21, 4, 0)
    offsets = np.arange(1, 100_001, dtype=np.int64) << 21
    page = (entries.COPIED | 1 << 21).to_bytes(8, "big").ljust(PAGE_BYTES, b"\0")
    there = range(0, len(offsets), len(offsets) // 50)
    blocks = {int(offsets[number]) // PAGE_BYTES: page for number in there}
    source = Sparse(blocks, size=1 << 43, block=PAGE_BYTES)
    tracemalloc.start()
    try:
        grid = read_grid(source, offsets, geometry)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.flatnonzero(grid.leads(np.arange(len(offsets)), 0)), there)
    assert source.bytes_read <= len(there) * PAGE_BYTES
    assert peak < 32 << 20


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["small", "usual", "extended"])
def test_the_last_entry_of_a_table_is_the_last_that_leads_somewhere(
    geometry: Geometry, seed: int, *, zeros: bool
) -> None:
    data, offsets = made_tables(geometry, np.random.default_rng(seed))
    grid = read_grid(Bytes(data), np.array(offsets), geometry)
    nothing = (NOWHERE,) if zeros else (NOWHERE, ZEROS)
    for tables in (np.arange(len(offsets)), np.array([4, 1, 4]), np.zeros(0, dtype=np.int64)):
        expected = []
        for table in tables.tolist():
            words = read_by_word(data, offsets[table], geometry)
            leads = [entry for entry, (place, _) in enumerate(words) if place not in nothing]
            expected.append(leads[-1] if leads else -1)
        assert grid.last(tables, zeros=zeros).tolist() == expected
