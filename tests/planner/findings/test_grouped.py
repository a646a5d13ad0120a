"""Findings in groups: as many as a table has entries, in few bytes, and told as all others."""

import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.check.check import check_image
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import (
    COLUMNS,
    KINDS,
    Columns,
    FindingKind,
    Numbers,
    Structure,
    make_findings,
)
from planner.qcow2 import entries
from planner.source import Bytes
from tests.images.bombs import append, base, with_bitmaps, with_snapshots
from tests.images.builder import Image, ImageBuilder

COUNT = 1 << 18
MIB = 1 << 20
CLUSTER = 1 << 16
FAR = 1 << 40


def table(first: int, step: int = CLUSTER) -> bytes:
    """A table of `COUNT` words."""
    return (first + step * np.arange(COUNT, dtype=np.uint64)).astype(">u8").tobytes()


def aligned(image: Image, content: bytes) -> int:
    image.data += bytes(-len(image.data) % CLUSTER)
    return append(image, content)


def damaged_l1() -> Image:
    """Each entry has all that an L1 entry can have."""
    image = base(16)
    at = aligned(image, table(entries.COPIED | 1 << 60 | FAR + 512))
    image.change_header(l1_table_offset=at, l1_size=COUNT)
    return image


def damaged_reftable() -> Image:
    image = base(16)
    at = aligned(image, table(FAR + 513))
    image.change_header(refcount_table_offset=at, refcount_table_clusters=COUNT * 8 // CLUSTER)
    return image


def refcount_blocks_past_the_end() -> Image:
    image = base(16)
    at = aligned(image, table(FAR))
    image.change_header(refcount_table_offset=at, refcount_table_clusters=COUNT * 8 // CLUSTER)
    return image


def damaged_bitmap() -> Image:
    image = base(16)
    return with_bitmaps(image, COUNT >> 13, aligned(image, table(FAR + 2)), 1 << 13, step=CLUSTER)


def bitmap_past_the_end() -> Image:
    image = base(16)
    return with_bitmaps(image, COUNT >> 13, aligned(image, table(FAR)), 1 << 13, step=CLUSTER)


def clusters_used_too_often() -> Image:
    """All of the disk and of a snapshot, where a refcount has a single bit."""
    count = COUNT // 4
    image = ImageBuilder(cluster_bits=9, size=count * 512, refcount_order=0).build()
    l2 = append(image, bytes(count * 8))
    data = append(image, bytes(count * 512))
    words = entries.COPIED | data + 512 * np.arange(count, dtype=np.uint64)
    image.data[l2 : l2 + count * 8] = words.astype(">u8").tobytes()
    tables = entries.COPIED | l2 + 512 * np.arange(count // 64, dtype=np.uint64)
    l1 = append(image, tables.astype(">u8").tobytes())
    image.change_header(l1_table_offset=l1, l1_size=count // 64)
    return with_snapshots(image, 1, l1, count // 64)


DAMAGE: dict[Callable[[], Image], int] = {
    damaged_l1: 300,
    damaged_reftable: 150,
    refcount_blocks_past_the_end: 150,
    damaged_bitmap: 150,
    bitmap_past_the_end: 150,
    clusters_used_too_often: 150,
}
"""Images, and bytes that a check takes for each entry of the table that is damaged."""


@pytest.mark.parametrize("make", DAMAGE, ids=lambda make: make.__name__)
def test_findings_about_a_whole_table_are_held_in_bounded_memory(make: Callable[[], Image]) -> None:
    source = Bytes(bytes(make().data))
    tracemalloc.start()
    try:
        report = check_image(source)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        number = sum(len(batch) for batch in report.batches())
        _, told = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert number >= COUNT // 4
    assert held < 4 * MIB + DAMAGE[make] * COUNT * 2 // 3
    assert peak < 8 * MIB + DAMAGE[make] * COUNT
    assert told - held < 8 * MIB


@pytest.mark.parametrize("make", DAMAGE, ids=lambda make: make.__name__)
def test_a_finding_takes_at_most_40_bytes(make: Callable[[], Image]) -> None:
    for group in check_image(Bytes(bytes(make().data))).findings.groups.values():
        columns = [getattr(group, name) for name in COLUMNS]
        assert sum(column.itemsize for column in columns if column.strides[0]) <= 40


@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from([FindingKind.PAST_END, FindingKind.LEAK, FindingKind.L1_COPIED]),
            st.sampled_from([Structure.L1_TABLE, Structure.CLUSTER]),
            st.lists(st.integers(0, 9), min_size=1, max_size=4),
            st.integers(0, 1),
        )
    )
)
def test_groups_hold_what_was_added_in_order(
    parts: list[tuple[FindingKind, Structure, list[int], int]],
) -> None:
    builder, expected = FindingsBuilder(), []
    for kind, structure, offsets, index in parts:
        at = offsets[0] if len(offsets) == 1 else np.array(offsets)
        builder.add(kind, structure=structure, host_offset=at, length=index + 1, index=index)
        expected += [(kind, structure, each, index, index + 1) for each in offsets]
    found = builder.build()
    rows = [
        (row.kind, row.structure, row.host_offset, row.index, row.length)
        for group in found.groups.values()
        for row in group.rows()
    ]
    badness = {kind: -KINDS[kind].severity for kind in FindingKind}
    assert [row[:3] for row in rows] == sorted(
        (row[:3] for row in expected), key=lambda row: (badness[row[0]], *row)
    )
    assert sorted(rows) == sorted(expected)
    assert found.counts() == Counter(row[0] for row in expected)


@pytest.mark.parametrize("offset", [7, np.array([7]), np.array([], dtype=np.int64)])
def test_a_misspelt_column_is_refused(offset: Numbers) -> None:
    typo: Columns = {"hots_offset": offset}  # type: ignore[typeddict-unknown-key]
    with pytest.raises(TypeError, match="no column hots_offset"):
        FindingsBuilder().add(FindingKind.LEAK, **typo)
    with pytest.raises(TypeError, match="no column hots_offset"):
        make_findings(FindingKind.LEAK, **typo)


def test_columns_that_can_be_said_are_those_of_findings() -> None:
    said = Columns.__optional_keys__  # of `Where` too
    assert {"kind"} | said == COLUMNS.keys()


def test_nothing_was_added() -> None:
    found = FindingsBuilder().build()
    assert not found.counts()
    assert not len(found.of(FindingKind.LEAK))
