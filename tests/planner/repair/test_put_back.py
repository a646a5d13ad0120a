"""Refcount table entries that are put back in an image that must not grow: which, and where not."""

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.check.check import check_image
from planner.errors import UnsupportedRepair
from planner.findings.kinds import FindingKind
from planner.qcow2 import entries
from planner.repair.overlay import Overlay
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, propose
from planner.source import read_bytes
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.matrix import Row
from tests.oracle.judge import ask_qemu
from tests.oracle.repair_judge import write_out

CLUSTER = 4096
WORD = 8


def cut(clusters: int = 20, **options: object) -> Image:
    """Two L2 tables with data, of so many clusters each; the last of the first one ends the file,
    and is not whole.
    """
    builder = ImageBuilder(**{"size": 8 * MIB, "cluster_bits": 12, **options})  # type: ignore[arg-type]
    rng, size = random.Random(1), builder.geometry.cluster_size
    for l1_index in range(2):
        builder.write(l1_index * builder.geometry.l2_entries, rng.randbytes(clusters * size))
    image = builder.build()
    old, new = image.host_offset(clusters - 1), len(image.data)
    image.data += image.data[old : old + size]
    image.set_word(image.l2_at(clusters - 1), new | entries.COPIED)
    for offset, count in ((old, 0), (new, 1)):
        image.set_refcount(offset // size, count)
    del image.data[-512:]
    return image


def flags_alone(image: Image) -> None:
    image.set_word(image.reftable_at(0), 1 << 63)


def nothing_there(image: Image) -> None:
    image.set_word(image.reftable_at(0), 0)


def behind_all_clusters(image: Image) -> None:
    """What counts nothing, and says something impossible."""
    image.set_word(image.reftable_at(99), image.refblock(0) + 512)


def past_the_end(image: Image) -> None:
    image.set_word(image.reftable_at(0), (image.host_clusters + 7) * CLUSTER)


def into_data(image: Image) -> None:
    image.set_word(image.reftable_at(0), image.host_offset(3))


def misaligned(image: Image) -> None:
    image.set_word(image.reftable_at(0), image.refblock(0) + 512)


def twice(image: Image) -> None:
    image.set_word(image.reftable_at(5), image.refblock(0))


def proposal(image: Image) -> Proposal:
    return propose(image.source, check_image(image.source), RepairTier.ALL)


DAMAGES = (
    flags_alone,
    nothing_there,
    behind_all_clusters,
    past_the_end,
    into_data,
    misaligned,
    twice,
)
OF_ONE_BIT = (flags_alone, nothing_there, past_the_end)
"""The others are claims that are not told from data there, or counts that are full."""


@pytest.mark.parametrize(
    ("order", "damage"),
    [(order, damage) for order in (3, 4, 6) for damage in DAMAGES]
    + [(0, damage) for damage in OF_ONE_BIT],
)
def test_an_entry_is_put_back_where_the_file_must_not_grow(
    order: int, damage: Callable[[Image], None], tmp_path: Path
) -> None:
    image = cut(refcount_order=order)
    whole = bytes(image.data)
    damage(image)
    found = proposal(image)
    assert not found.needs_quote
    assert {left.kind for left in found.left} == {FindingKind.CUT_OFF}
    repaired = Overlay(image.source, found.plan)
    assert read_bytes(repaired, 0, repaired.size) == whole
    path = tmp_path / "repaired.qcow2"
    write_out(repaired, path)
    assert ask_qemu(Row(cluster_bits=12), path).exit_code == 0


@pytest.mark.parametrize("damage", [flags_alone, past_the_end, into_data])
def test_what_a_reference_past_the_end_lost_stays_lost(damage: Callable[[Image], None]) -> None:
    image = cut()
    past = (image.host_clusters + 9) * CLUSTER
    image.set_word(image.l2_at(300), past | entries.COPIED)
    damage(image)
    found = proposal(image)
    assert found.plan.size_after == found.plan.size_before
    assert {left.kind for left in found.left} == {FindingKind.PAST_END, FindingKind.CUT_OFF}


def test_no_other_cluster_is_taken_for_a_block() -> None:
    """Not the wrong one of two, nor one that says something else of most clusters."""
    image = cut()
    block = image.refblock(0)
    copy = image.host_offset(5)
    content = bytes(image.data[block : block + CLUSTER])
    flags_alone(image)
    for what in (content, content[1:] + b"\0", bytes(CLUSTER), b"\xff" * CLUSTER):
        other = Image(bytearray(image.data))
        other.set_word(other.l2_at(5), 0)
        other.data[copy : copy + CLUSTER] = what
        if what == content:  # it counts itself as much as the block does
            with pytest.raises(UnsupportedRepair):
                proposal(other)
        else:
            after = Overlay(other.source, proposal(other).plan)
            assert int.from_bytes(read_bytes(after, image.reftable_at(0), WORD), "big") == block
    image.data[block : block + CLUSTER] = bytes(CLUSTER)
    with pytest.raises(UnsupportedRepair):
        proposal(image)


def test_a_block_that_counts_what_was_behind_the_end_of_the_file_is_not_dropped() -> None:
    image = cut(refcount_order=6)
    block = image.host_offset(5)
    image.set_word(image.l2_at(5), 0)
    image.set_word(image.reftable_at(40), block | 3)
    flags_alone(image)
    with pytest.raises(UnsupportedRepair):
        proposal(image)


def test_what_leaks_by_a_block_that_is_put_back_is_looked_at_before_it_is_freed() -> None:
    image = cut()
    table = image.l2_table(0)
    image.data[table + 10 * WORD : table + 14 * WORD] = bytes(4 * WORD)
    flags_alone(image)
    found = proposal(image)
    assert found.needs_quote
    assert found.kept == found.after.counters.leaks == 4
    assert found.found == found.planned + found.left_count
    again = propose(Overlay(image.source, found.plan), found.after, RepairTier.ALL)
    assert again.plan.changes_nothing


def test_where_the_file_may_grow_refcounts_are_made_anew() -> None:
    image = cut()
    image.data += bytes(512)
    flags_alone(image)
    found = proposal(image)
    assert FindingKind.REFCOUNT_UNREADABLE not in found.after.counts()
    assert found.plan.size_after > found.plan.size_before


def test_looking_for_large_blocks_of_bits_takes_a_byte_for_a_bit() -> None:
    image = cut(2, cluster_bits=21, size=1 << 40, refcount_order=0)
    whole = bytes(image.data)
    flags_alone(image)
    report, refcounts = check_image(image.source), 8 * image.geometry.cluster_size
    tracemalloc.start()
    try:
        found = propose(image.source, report, RepairTier.ALL)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read_bytes(Overlay(image.source, found.plan), 0, len(whole)) == whole
    assert peak < 6 * refcounts
