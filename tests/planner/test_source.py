"""Reading tables from a source: batches, holes, ends, and reads that many tables share."""

import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import source as source_module
from planner.arrays import I64, U64
from planner.source import (
    FEW_BLOCKS,
    GAP_BYTES,
    HOLE,
    LARGE_TABLE,
    MAX_SPAN_BYTES,
    READ_ANYWAY_BYTES,
    Bytes,
    Source,
    nonzero_words,
    present_tables,
    read_bytes,
    read_filled,
    read_parts,
    read_present,
    read_tables,
    words_of_tables,
)
from tests.planner.sources import Sparse

contents = st.binary(max_size=60)


@given(data=contents, offset=st.integers(0, 80), length=st.integers(0, 80))
def test_bytes_past_the_end_are_zeros(data, offset, length) -> None:
    assert read_bytes(Bytes(data), offset, length) == (data + bytes(200))[offset : offset + length]


@given(data=contents, offset=st.integers(0, 80), length=st.integers(0, 80))
def test_present_bytes_end_with_the_file(data, offset, length) -> None:
    assert read_present(Bytes(data), offset, length) == data[offset : offset + length]


def test_present_bytes_of_a_huge_claim_cost_what_is_there() -> None:
    assert read_present(Bytes(b"abc"), 1, 1 << 62) == b"bc"


@given(data=contents, offset=st.integers(0, 80), length=st.integers(0, 80))
def test_extents_of_bytes_are_clipped(data, offset, length) -> None:
    extents = list(Bytes(data).data_extents(offset, length))
    inside = range(offset, min(offset + length, len(data)))
    assert [at for start, end in extents for at in range(start, end)] == list(inside)


words = st.lists(st.sampled_from([0, 0, 1, 1 << 63, (1 << 64) - 1]), max_size=40)


@given(values=words, before=st.integers(0, 20), cut=st.integers(0, 9))
def test_nonzero_words_are_found_wherever_the_table_stands(values, before, cut) -> None:
    table = np.array(values, dtype=">u8").tobytes()
    data = bytes(before) + table[: max(0, len(table) - cut)]
    index, word = nonzero_words(Bytes(data), before, len(values))
    whole = np.frombuffer(data[before:].ljust(len(table), b"\0"), dtype=">u8")
    assert index.tolist() == np.flatnonzero(whole).tolist()
    assert word.tolist() == [value for value in whole.tolist() if value]
    assert word.dtype == np.uint64


def test_nonzero_words_across_batches(monkeypatch) -> None:
    monkeypatch.setattr(source_module, "BATCH_BYTES", 64)
    values = list(range(100))
    index, word = nonzero_words(Bytes(np.array(values, dtype=">u8").tobytes()), 0, 100)
    assert index.tolist() == word.tolist() == values[1:]


def test_nonzero_words_of_a_table_that_claims_more_than_the_file() -> None:
    data = (7).to_bytes(8, "big")
    index, word = nonzero_words(Bytes(data), 0, 1 << 58)
    assert (index.tolist(), word.tolist()) == ([0], [7])


def test_nonzero_words_skip_holes() -> None:
    source = Sparse({3: b"\1" * 8, 1 << 40: b"\2" * 8}, size=1 << 60)
    index, word = nonzero_words(source, 0, 1 << 57)
    assert index.tolist() == [3 * 64, (1 << 40) * 64]
    assert word.tolist() == [0x0101010101010101, 0x0202020202020202]
    assert source.bytes_read == 1024


def test_nonzero_words_where_data_begins_inside_a_word() -> None:
    source = Sparse({1: b"\xff" * 4, 2: b"\xee" * 4}, size=1 << 20, block=4)
    index, word = nonzero_words(source, 0, 2)
    assert word.tolist() == [0x0000_0000_FFFF_FFFF, 0xEEEE_EEEE_0000_0000]
    assert index.tolist() == [0, 1]


@given(
    data=st.binary(min_size=1, max_size=400),
    numbers=st.lists(st.integers(0, 30), max_size=20),
    table=st.sampled_from([8, 16, 64]),
    batch=st.sampled_from([1, 64, 100, 1 << 20]),
)
def test_tables_are_read_in_the_order_asked_for(data, numbers, table, batch) -> None:
    offsets = np.array([number * 16 for number in numbers], dtype=np.int64)
    got: list[bytes] = []
    for part, rows in read_tables(Bytes(data), offsets, table, batch):
        assert part.start == len(got)
        assert rows.shape == (part.stop - part.start, table)
        got += [row.tobytes() for row in rows]
    padded = data + bytes(1000)
    assert got == [padded[number * 16 : number * 16 + table] for number in numbers]


@dataclass(frozen=True)
class Shared(Bytes):
    """Bytes that threads may read; a read of what is at *broken* fails."""

    executor: Executor
    broken: int = -1

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset <= self.broken < offset + len(buffer):
            raise OSError(self.broken)
        super().read_into(offset, buffer)


@pytest.fixture(scope="module")
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as executor:
        yield executor


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 10, 100])
def test_tables_read_ahead_come_in_the_order_asked_for(threads, count) -> None:
    data = np.random.default_rng(count).bytes(64 * count)
    offsets = np.random.default_rng(count).permutation(count) * 64
    parts = list(read_tables(Bytes(data), offsets, 64, 64))
    ahead = [
        (part, rows.tobytes()) for part, rows in read_tables(Shared(data, threads), offsets, 64, 64)
    ]
    assert [part for part, _ in parts] == [part for part, _ in ahead]
    assert b"".join(rows for _, rows in ahead) == b"".join(data[at : at + 64] for at in offsets)


def test_a_read_ahead_that_fails_is_told_in_its_turn(threads) -> None:
    source = Shared(bytes(6400), threads, broken=640)
    batches = read_tables(source, np.arange(100) * 64, 64, 64)
    assert [next(batches)[0].start for _ in range(10)] == list(range(10))
    with pytest.raises(OSError, match="640"):
        next(batches)


def test_parts_are_read_as_they_are_cut(threads) -> None:
    data = bytes(range(256))
    cuts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    for source in (Bytes(data), Shared(data, threads)):
        got = [
            (part, rows.tobytes()) for part, rows in read_parts(source, np.arange(6) * 8, 8, cuts)
        ]
        assert got == [(cut, data[cut.start * 8 : cut.stop * 8]) for cut in cuts]


def test_neighbouring_tables_are_one_request() -> None:
    source = Sparse({}, size=1 << 30)
    requests = []
    source.read_into = lambda offset, buffer: requests.append((offset, len(buffer)))  # type: ignore[method-assign]
    offsets = np.array([0, 512, 1024, 1 << 20, (1 << 20) + 1024], dtype=np.int64)
    list(read_tables(source, offsets, 512))
    assert requests == [(0, 1536), (1 << 20, 1536)]


def test_tables_with_little_between_them_are_no_request_without_end() -> None:
    source = Sparse({}, size=1 << 30)
    requests = []
    source.read_into = lambda offset, buffer: requests.append((offset, len(buffer)))  # type: ignore[method-assign]
    offsets = np.arange(4096, dtype=np.int64) * GAP_BYTES
    list(read_tables(source, offsets, 512))
    assert max(length for _, length in requests) <= MAX_SPAN_BYTES
    assert len(requests) == 4096 * GAP_BYTES // MAX_SPAN_BYTES


def test_tables_are_all_read_while_that_is_cheap() -> None:
    source = Sparse({}, size=1 << 30)
    present = present_tables(source, np.arange(4, dtype=np.int64) * 512, 512)
    assert present.all()
    assert not source.asked


def test_where_many_reads_would_be_needed_what_is_there_is_asked_for_first() -> None:
    source = Sparse({}, size=1 << 40)
    apart = np.arange(1 << 16, dtype=np.int64) << 16
    assert not present_tables(source, apart, 512).any()
    assert len(source.asked) == 1


@pytest.mark.parametrize("reach", [1, 511, 512])
def test_tables_in_holes_are_left_out(monkeypatch, reach) -> None:
    monkeypatch.setattr(source_module, "READ_ANYWAY_BYTES", 0)
    source = Sparse({2: b"x", 3: b"x", 9: b"x"}, size=1 << 30)
    offsets = np.arange(12, dtype=np.int64) * 512
    assert np.flatnonzero(present_tables(source, offsets, 512)).tolist() == [2, 3, 9]
    assert np.flatnonzero(present_tables(source, offsets + 512 - reach, 512)).tolist() == (
        [1, 2, 3, 8, 9] if reach < 512 else [2, 3, 9]
    )


@given(
    there=st.sets(st.integers(0, 40), max_size=12),
    wanted=st.sets(st.integers(0, 40), min_size=1, max_size=12),
)
def test_no_table_with_data_is_left_out(there, wanted) -> None:
    source = Sparse(dict.fromkeys(there, b"x"), size=1 << 30)
    offsets = np.array(sorted(wanted), dtype=np.int64) * 512
    before, source_module.READ_ANYWAY_BYTES = source_module.READ_ANYWAY_BYTES, 0
    try:
        present = present_tables(source, offsets, 512)
    finally:
        source_module.READ_ANYWAY_BYTES = before
    assert set((offsets[present] // 512).tolist()) == there & wanted


def test_a_million_tables_in_a_hole_are_one_question(monkeypatch) -> None:
    monkeypatch.setattr(source_module, "READ_ANYWAY_BYTES", 0)
    source = Sparse({}, size=1 << 62)
    assert not present_tables(source, np.arange(1 << 20, dtype=np.int64) << 16, 1 << 16).any()
    assert len(source.asked) == 1


def test_of_a_million_tables_no_more_is_made_than_which_are_there() -> None:
    offsets = np.arange(1 << 20, dtype=np.int64) << 16
    source = Sparse({0: b"x", 5 << 7: b"x"}, size=1 << 62)
    tracemalloc.start()
    try:
        assert np.flatnonzero(present_tables(source, offsets, 1 << 16)).tolist() == [0, 5]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(offsets)


blocks_of_tables = st.one_of(
    st.sets(st.integers(0, 400), max_size=60),
    st.builds(
        lambda full, some: (
            {at for table in full for at in range(32 * table, 32 * table + 32)} | some
        ),
        st.sets(st.integers(0, 11), max_size=4),
        st.sets(st.integers(0, 400), max_size=8),
    ),
)


@given(
    there=blocks_of_tables,
    wanted=st.sets(st.integers(0, 12), max_size=12),
    head=st.sampled_from([0, 1, HOLE, 3 * HOLE, 1 << 30]),
    size=st.sampled_from([512, HOLE, 2 * LARGE_TABLE]),
)
def test_what_is_filled_of_tables_is_all_that_is_not_zero(there, wanted, head, size) -> None:
    numbered = {at: at.to_bytes(2, "big") + bytes([7]) * (HOLE - 2) for at in there}
    source = Sparse(numbered, size=1 << 30, block=HOLE)
    offsets = np.array(sorted(wanted), dtype=np.int64) * size
    whole = np.zeros((len(offsets), size // 8), dtype=np.uint64)
    end = 0
    for filled in read_filled(source, offsets, size, head=head):
        assert filled.part.start == end
        end = filled.part.stop
        assert filled.words()[: min(head, size) // 8].tolist() == list(range(min(head, size) // 8))
        whole[filled.part, filled.words()] = filled.rows.view(np.uint64)
    assert end == len(offsets)
    assert [row.tobytes() for row in whole] == [read_bytes(source, at, size) for at in offsets]


def test_of_large_tables_in_a_hole_no_more_is_read_or_held_than_is_there() -> None:
    # One block each, all at other places: to hold these of all would be a million bytes each.
    size, count = 2 << 20, 256
    there = {number * (size // HOLE) + number: b"x" * HOLE for number in range(count)}
    source = Sparse(there, size=1 << 40, block=HOLE)
    parts = list(read_filled(source, np.arange(count) * size, size))
    assert source.bytes_read == count * HOLE
    assert max(filled.rows.size for filled in parts) <= (2 * FEW_BLOCKS) ** 2 * HOLE
    assert len(parts) <= 2 * count // FEW_BLOCKS


def words_of(source: Source, tables: list[tuple[int, int]]) -> list[tuple[I64, U64]]:
    """What is read of *tables* (offset, count), one by one: indices and words."""
    offset, count = np.array(tables, dtype=np.int64).reshape(-1, 2).T
    table, index, word = words_of_tables(source, offset, count)
    assert (table[1:] >= table[:-1]).all()
    return [(index[table == at], word[table == at]) for at in range(len(tables))]


@given(
    there=st.sets(st.integers(0, 60), max_size=12),
    tables=st.lists(
        st.tuples(st.integers(0, 60 * 64), st.sampled_from((0, 0, 1, 5)), st.integers(0, 200)),
        max_size=12,
    ),
    size=st.sampled_from((48 << 9, (48 << 9) + 3)),
)
def test_the_words_of_many_tables_are_those_of_each(there, tables, size) -> None:
    source = Sparse({at: b"x" + bytes(200) + b"y" * 311 for at in there}, size=size)
    tables = [(offset * 8 + shift, count) for offset, shift, count in tables]
    for mine, (offset, count) in zip(words_of(source, tables), tables, strict=True):
        for column, other in zip(mine, nonzero_words(source, offset, count), strict=True):
            assert column.tolist() == other.tolist()


def test_neighbours_and_tables_over_each_other_are_read_once() -> None:
    words = np.arange(1, 4097, dtype=">u8").tobytes()
    source = Sparse.of(words, size=1 << 40)
    tables = [(at * 8, count) for at in range(0, 4096, 4) for count in (3, 100)]
    found = words_of(source, tables[::-1])[::-1]
    assert [index.tolist() for index, _ in found[:2]] == [[0, 1, 2], list(range(100))]
    assert [word.tolist() for _, word in found[2:4]] == [[5, 6, 7], list(range(5, 105))]
    assert source.bytes_read == len(words)


def test_thousands_of_tables_in_a_hole_are_one_question_whatever_their_lengths() -> None:
    source = Sparse({0: b"x"}, size=1 << 62)
    tables = [(at << 20, at) for at in range(1, 5000)]
    assert not any(len(index) for index, _ in words_of(source, tables))
    assert len(source.asked) == 1


def test_tables_that_claim_more_than_is_cheap_to_read_are_asked_about() -> None:
    source = Sparse({7: b"x"}, size=1 << 40)
    offsets = np.arange(READ_ANYWAY_BYTES // 4096 + 1, dtype=np.int64) * 4096
    assert np.flatnonzero(present_tables(source, offsets, 4096)).tolist() == [0]
