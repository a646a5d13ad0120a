"""planner.metadata.refcounts: how many clusters are in use, against refcounts read one by one."""

import random
import tracemalloc

import numpy as np
import pytest

from planner.metadata.cluster_counters import PagedIndex
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.progress import Meter, tell_nobody
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import pack_refcounts
from planner.source import Source
from tests.images.builder import ImageBuilder
from tests.planner.sources import Sparse


def stored(source: Source) -> StoredRefcounts:
    layout = Layout.read(source)
    return StoredRefcounts(source, layout, Reftable(source, layout))


@pytest.mark.parametrize("seed", range(4))
def test_a_block_counts_for_every_entry_that_leads_to_it(seed: int) -> None:
    rng = random.Random(seed)
    image = ImageBuilder(cluster_bits=9, size=1 << 20).build()
    table = Layout.read(image.source).header.refcount_table_offset
    blocks = [len(image.data) + n * 512 for n in range(3)]
    values = [[rng.choice([0, 0, 1, 3]) for _ in range(256)] for _ in blocks]
    for block in values:
        image.data += np.array(block, dtype=">u2").tobytes()
    chosen = [rng.choice([0, 1, 2, None]) for _ in range(64)]
    words = [0 if which is None else blocks[which] for which in chosen]
    image.data[table : table + 512] = np.array(words, dtype=">u8").tobytes()
    every = [n for which in chosen for n in (values[which] if which is not None else [0] * 256)]
    for clusters in (0, 1, 255, 256, 257, rng.randrange(64 * 256), 64 * 256):
        assert stored(image.source).in_use(clusters) == np.count_nonzero(every[:clusters])


def test_blocks_in_holes_are_not_read() -> None:
    image = ImageBuilder(cluster_bits=9, size=1 << 20).build()
    table = Layout.read(image.source).header.refcount_table_offset
    words = (1 << 30) + np.arange(64, dtype=">u8") * 512
    image.data[table : table + 512] = words.tobytes()
    source = Sparse.of(bytes(image.data), 1 << 40)
    refcounts = stored(source)
    before = source.bytes_read
    assert refcounts.in_use(64 * 256) == 0
    assert source.bytes_read == before


MIB = 1 << 20


def with_blocks(cluster_bits: int, order: int, blocks: dict[int, np.ndarray]) -> Sparse:
    """A file of a header, a refcount table, and these blocks by their index: refcounts, of which
    pages of zeros are holes."""
    made = ImageBuilder(cluster_bits=cluster_bits, refcount_order=order, size=MIB).build()
    table = Layout.read(made.source).header.refcount_table_offset
    data = dict(Sparse.of(bytes(made.data), 0, 4096).blocks)
    words = np.zeros(512, dtype=">u8")
    offset = -(-len(made.data) >> cluster_bits) << cluster_bits
    for index, values in blocks.items():
        words[index] = offset
        block = pack_refcounts(values, order).tobytes()
        pages = Sparse.of(block, 0, 4096).blocks
        data |= {offset // 4096 + at: part for at, part in pages.items()}
        offset += 1 << cluster_bits
    page = data[table // 4096]
    assert table % 4096 == 0
    data[table // 4096] = words.tobytes() + page[4096:]
    return Sparse(data, offset, 4096)


@pytest.mark.parametrize("order", range(7))
def test_refcounts_past_the_end_are_those_of_the_blocks(order: int) -> None:
    per_block = 65536 * 8 >> order
    rng = np.random.default_rng(order)
    values = {index: np.zeros(per_block, dtype=np.uint8) for index in (2, 3, 7)}
    for block in values.values():
        block[rng.integers(0, per_block, 5)] = 1
    every = np.zeros(9 * per_block, dtype=np.uint8)
    for index, block in values.items():
        every[index * per_block :][:per_block] = block
    refcounts = stored(with_blocks(16, order, values))
    used = np.flatnonzero(every)
    assert refcounts.counted_end(2 * per_block) == used[-1] + 1
    assert refcounts.counted_end(int(used[-1]) + 1) == 0
    found = np.concatenate(
        [
            (first[:, None] + np.arange(part.shape[1]))[part != 0]
            for first, part in refcounts.pieces_past(2 * per_block, np.zeros(0, dtype=np.int64))
        ]
    )
    assert np.array_equal(np.sort(found), used)
    asked = np.concatenate((used, rng.integers(2 * per_block, len(every), 100), used + 1))
    assert np.array_equal(refcounts.look_up(asked) != 0, every[asked] != 0)


def test_of_large_blocks_no_more_is_unpacked_than_what_is_there() -> None:
    per_block = (2 << 20) * 8
    values = np.zeros(per_block, dtype=np.uint8)
    values[[0, per_block // 2, -1]] = 1
    source = with_blocks(21, 0, dict.fromkeys(range(1, 20), values))
    refcounts = stored(source)
    before = source.bytes_read
    some = np.arange(1, 20) * per_block + per_block // 2
    tracemalloc.start()
    try:
        assert refcounts.counted_end(per_block) == 20 * per_block
        pieces = refcounts.pieces_past(per_block, np.zeros(0, dtype=np.int64))
        assert sum(np.count_nonzero(part) for _, part in pieces) == 19 * 3
        assert (refcounts.look_up(some) == 1).all()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * MIB
    assert source.bytes_read - before < 4 * MIB


def test_pages_are_read_into_no_third_copy() -> None:
    count = 8 << 21
    bits = np.random.default_rng(1).integers(0, 2, count, dtype=np.uint8)
    refcounts = stored(with_blocks(21, 0, {1: bits}))
    tracemalloc.start()
    try:
        page, refcount = refcounts.read_pages(2 * count, Meter(tell_nobody, "refcounts", 1))
        refcounts.set_pages(PagedIndex(2 * count, page), page, refcount)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert np.array_equal(refcounts.values[:], bits)
    assert peak < 3 * count
