"""Words of the tables: masks, types and ranges, against the specification told word by word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.qcow2 import entries
from planner.qcow2.entries import COMPRESSED, COPIED, ZERO, ClusterType
from planner.qcow2.geometry import Geometry

ALL_BITS = (1 << 64) - 1
CLUSTER_BITS = range(9, 22)
words = st.integers(0, ALL_BITS)
# Words in which the bits that matter are often set, and the offset is often zero.
telling_words = st.builds(
    lambda offset, flags, noise: offset | sum(flags) | noise,
    st.sampled_from([0, 1 << 16, 5 << 16, 1 << 55]),
    st.lists(st.sampled_from([COPIED, COMPRESSED, ZERO]), unique=True),
    st.sampled_from([0, 0, 0, 2, 1 << 9, 1 << 56]),
)


def geometry(cluster_bits: int = 16, *, extended: bool = False, external: bool = False) -> Geometry:
    return Geometry(3, cluster_bits, 4, 1 << 30, extended_l2=extended, external_data=external)


def as_words(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


MASKS = {
    "l1": [COPIED, entries.L1_OFFSET, entries.L1_RESERVED],
    "l2": [COPIED, COMPRESSED, ZERO, entries.L2_OFFSET, entries.L2_RESERVED],
    "reftable": [entries.REFTABLE_OFFSET, entries.REFTABLE_RESERVED],
    "bitmap": [entries.BITMAP_ALL_ONES, entries.BITMAP_OFFSET, entries.BITMAP_RESERVED],
    "subclusters": [entries.SUBCLUSTERS_ALLOCATED, entries.SUBCLUSTERS_ZERO],
} | {
    f"compressed-{bits}": [
        COPIED,
        COMPRESSED,
        entries.compressed_offset_mask(geometry(bits)),
        entries.compressed_sectors_mask(geometry(bits)),
    ]
    for bits in CLUSTER_BITS
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_masks_are_disjoint_and_together_all_64_bits(masks) -> None:
    assert sum(masks) == ALL_BITS
    assert sum(mask.bit_count() for mask in masks) == 64


def test_masks_are_those_of_the_specification() -> None:
    assert entries.L1_OFFSET == entries.L2_OFFSET == 0x00FF_FFFF_FFFF_FE00
    assert entries.L1_RESERVED == 0x7F00_0000_0000_01FF
    assert entries.L2_RESERVED == 0x3F00_0000_0000_01FE
    assert entries.REFTABLE_OFFSET == 0xFFFF_FFFF_FFFF_FE00
    assert entries.REFTABLE_RESERVED == 0x1FF
    assert entries.BITMAP_OFFSET == 0x00FF_FFFF_FFFF_FE00
    assert entries.BITMAP_RESERVED == 0xFF00_0000_0000_01FE


def type_of(word: int, *, extended: bool, external: bool) -> ClusterType:
    """qcow2_get_cluster_type, one word at a time."""
    if word & COMPRESSED:
        return ClusterType.COMPRESSED
    offset = word & entries.L2_OFFSET
    if word & ZERO and not extended:
        return ClusterType.ZERO_ALLOC if offset else ClusterType.ZERO_PLAIN
    if not offset:
        allocated = external and word & COPIED
        return ClusterType.NORMAL if allocated else ClusterType.UNALLOCATED
    return ClusterType.NORMAL


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("extended", [False, True])
@given(values=st.lists(telling_words | words, max_size=40))
def test_cluster_types_follow_the_specification(extended, external, values) -> None:
    types = entries.cluster_types(as_words(*values), geometry(extended=extended, external=external))
    expected = [type_of(word, extended=extended, external=external) for word in values]
    assert types.tolist() == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0, ClusterType.UNALLOCATED),
        (COPIED, ClusterType.UNALLOCATED),
        (ZERO, ClusterType.ZERO_PLAIN),
        (5 << 16 | ZERO, ClusterType.ZERO_ALLOC),
        (5 << 16, ClusterType.NORMAL),
        (COPIED | 5 << 16, ClusterType.NORMAL),
        (COMPRESSED, ClusterType.COMPRESSED),
        (COMPRESSED | 0x1234, ClusterType.COMPRESSED),
        (COMPRESSED | COPIED | ZERO, ClusterType.COMPRESSED),
    ],
)
def test_type_of_a_standard_entry(word, expected) -> None:
    assert entries.cluster_types(as_words(word), geometry()).tolist() == [expected]


def test_zero_bit_of_an_extended_entry_is_ignored() -> None:
    types = entries.cluster_types(as_words(ZERO, 5 << 16 | ZERO), geometry(extended=True))
    assert types.tolist() == [ClusterType.UNALLOCATED, ClusterType.NORMAL]


def test_offset_zero_with_copied_is_data_in_an_external_data_file() -> None:
    types = entries.cluster_types(as_words(COPIED, 0), geometry(external=True))
    assert types.tolist() == [ClusterType.NORMAL, ClusterType.UNALLOCATED]


@given(values=st.lists(words, max_size=20))
def test_offsets_keep_their_shape_and_drop_flags(values) -> None:
    table = as_words(*values, *values).reshape(2, len(values))
    offsets = entries.l2_offsets(table)
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [[word & entries.L2_OFFSET for word in values]] * 2


@pytest.mark.parametrize("cluster_bits", CLUSTER_BITS)
@given(values=st.lists(words, min_size=1, max_size=20))
def test_compressed_ranges_follow_the_specification(cluster_bits, values) -> None:
    offset, length = entries.compressed_ranges(as_words(*values), geometry(cluster_bits))
    shift = 62 - (cluster_bits - 8)
    for word, start, size in zip(values, offset.tolist(), length.tolist(), strict=True):
        assert start == word % (1 << shift)
        sectors = (word >> shift) % (1 << (cluster_bits - 8)) + 1
        assert size == sectors * 512 - start % 512
        assert (start + size) % 512 == 0


def test_compressed_range_of_an_entry_written_down_by_hand() -> None:
    # 64 KiB clusters: offset in bits 0-53; sectors beyond the first in bits 54-61.
    word = COMPRESSED | 2 << 54 | 0x50_0123
    offset, length = entries.compressed_ranges(as_words(word), geometry())
    assert (offset[0], length[0]) == (0x50_0123, 3 * 512 - 0x123)


@pytest.mark.parametrize(
    ("word", "bad"),
    [
        (0, False),
        (1, False),
        (7 << 16, False),
        (7 << 16 | 1, True),
        (7 << 16 | 1 << 9, True),
        (2, True),
        (1 << 8, True),
        (1 << 56, True),
        (1 << 63 | 7 << 16, True),
    ],
)
def test_bitmap_table_entry(word, bad) -> None:
    assert entries.bad_bitmap_entries(as_words(word), geometry()).tolist() == [bad]
