"""Refcount tables and blocks that were left for newer ones are waste, and nobody's data."""

import random
import struct

import pytest

from planner.check.check import check_image
from planner.check.classify import Look
from planner.qcow2 import entries
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose
from planner.triage.triage import Triage, triage_leaks
from tests.images.builder import MIB, Image, ImageBuilder
from tests.planner.sources import Sparse

SIZE = 1 << 12
ORDERS = (0, 1, 2, 4, 6)


def with_old_refcounts(order: int, *, old_block: bool) -> tuple[Image, int, int]:
    """An image, and the host offsets of an old refcount table and of an old block, which leak.

    Without *old_block* the table leads to the block that is still in use.
    """
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12, refcount_order=order)
    builder.write(0, random.Random(1).randbytes(5 * SIZE))
    table, block = builder.place(bytes(SIZE)), builder.place(bytes(SIZE))
    image = builder.build()
    image.set_refcount(table // SIZE, 1)
    image.set_refcount(block // SIZE, int(old_block))
    start = image.refblock(0)
    if old_block:
        image.data[block : block + SIZE] = image.data[start : start + SIZE]
    image.set_word(table, block if old_block else start)
    return image, table, block


def bytes_read_of_leaks(image: Image) -> int:
    """How much a look at what leaks reads, the check apart."""
    report = check_image(image.source)
    source = Sparse.of(bytes(image.data), len(image.data))
    triage_leaks(source, report)
    return source.bytes_read


def triage(image: Image) -> Triage:
    return triage_leaks(image.source, check_image(image.source))


@pytest.mark.parametrize("old_block", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_old_refcounts_are_no_lost_table_and_not_missing(order: int, old_block: bool) -> None:
    image, _, _ = with_old_refcounts(order, old_block=old_block)
    found = triage(image)
    expected = {Look.REFTABLE: 1, Look.OLD_REFBLOCK: 1} if old_block else {Look.REFTABLE: 1}
    assert found.looks() == expected
    assert found.losses.missing == 0
    assert not found.suspects
    assert not propose(image.source, check_image(image.source), RepairTier.LEAKS).needs_quote


def test_parts_of_an_old_table_go_on_where_the_one_before_ended() -> None:
    builder = ImageBuilder(size=1 * MIB, cluster_bits=9, refcount_order=6)
    builder.write(0, random.Random(1).randbytes(1 * MIB))
    table = builder.place(bytes(4 * 512))
    builder.skip(2000)
    builder.write_zeros(1)
    image = builder.build()
    words = [image.word(image.reftable_at(index)) for index in range(4 * 64)]
    used = [index for index, word in enumerate(words) if word and index < 64 + 10]
    assert max(used) >= 64, "the table takes two clusters"
    for index in used:
        image.set_word(table + 8 * index, words[index])
    for cluster in range(2):
        image.set_refcount(table // 512 + cluster, 1)
    assert triage(image).looks() == {Look.REFTABLE: 2}


@pytest.mark.parametrize("order", ORDERS)
def test_what_leads_to_data_is_no_old_table(order: int) -> None:
    image, _, block = with_old_refcounts(order, old_block=True)
    image.data[block : block + SIZE] = random.Random(2).randbytes(SIZE)
    assert Look.REFTABLE not in triage(image).looks()


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_of_other_clusters_is_no_old_block(order: int) -> None:
    """A lost table may lead to data like refcounts: they would have to be those of that index."""
    image, table, block = with_old_refcounts(order, old_block=True)
    image.set_word(table, 0)
    image.set_word(table + 8, block)
    assert triage(image).suspects


def test_an_entry_with_a_flag_is_none_of_a_refcount_table() -> None:
    image, table, _ = with_old_refcounts(4, old_block=True)
    image.set_bits(table, entries.COPIED)
    assert triage(image).suspects


def test_a_disk_may_hold_an_image_that_begins_as_this_one_does() -> None:
    """One word as in the table in use, where that table lies as in every image that was made."""
    image, table, _ = with_old_refcounts(4, old_block=False)
    header = image.header
    moved, first = header.refcount_table_offset, image.host_offset(0)
    image.data[first : first + SIZE] = image.data[moved : moved + SIZE]
    image.set_word(image.l2_at(0), moved | entries.COPIED)
    image.change_header(refcount_table_offset=first)
    assert first < table
    assert triage(image).losses.missing == SIZE


def leaked_tables_to_the_same_blocks(tables: int, blocks: int) -> Image:
    """No two tables lead to a block at the same index. The blocks lie behind the header, and the
    tables behind them.
    """
    size = 1 << 16
    builder = ImageBuilder(size=8 * MIB, refcount_order=0)
    places = [builder.place(b"\x01" * size) for _ in range(blocks)]
    leaked = [builder.place(bytes(size)) for _ in range(tables)]
    image = builder.build()
    for number, table in enumerate(leaked):
        for index, place in enumerate(places):
            image.set_word(table + 8 * (1 + number * blocks + index), place)
    for place in (*places, *leaked):
        image.set_refcount(place // size, 1)
    return image


def test_a_block_that_a_table_leads_to_again_and_again_is_read_once() -> None:
    image = leaked_tables_to_the_same_blocks(1, 1)
    image.data[2 << 16 : 3 << 16] = struct.pack(">Q", 1 << 16) * 8192
    assert Look.REFTABLE not in triage(image).looks()
    assert bytes_read_of_leaks(image) < len(image.data) + MIB


def test_blocks_that_many_tables_lead_to_are_weighed_a_few_times() -> None:
    image = leaked_tables_to_the_same_blocks(40, 8)
    assert Look.REFTABLE not in triage(image).looks()
    assert bytes_read_of_leaks(image) < len(image.data) + 8 * MIB


def test_blocks_that_are_holes_are_not_read() -> None:
    image, table, _ = with_old_refcounts(0, old_block=False)
    first = len(image.data) // SIZE
    image.data += bytes(SIZE // 8 * SIZE)
    for index in range(SIZE // 8):
        image.set_word(table + 8 * index, (first + index) * SIZE)
        image.set_refcount(first + index, 1)
    assert Look.REFTABLE not in triage(image).looks()
    assert bytes_read_of_leaks(image) < len(image.data) + 100 * SIZE
