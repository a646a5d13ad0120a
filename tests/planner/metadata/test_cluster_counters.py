"""Counters that widen: against sums that never run out of room, and in every way of adding."""

import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.arrays import Slot, distinct, without_repeats
from planner.metadata.cluster_counters import (
    PAGE_BITS,
    ClusterCounts,
    NearOne,
    PagedIndex,
    Tally,
)

SLOTS = 12
runs = st.lists(
    st.tuples(st.integers(0, SLOTS - 1), st.integers(1, SLOTS)).map(
        lambda run: (run[0], min(run[1], SLOTS - run[0]))
    ),
    max_size=5,
)
orders = st.lists(st.integers(0, SLOTS - 1), max_size=30)


def neighbours(several: list[tuple[int, int]]) -> list[int]:
    """Runs of slots, each of them by itself."""
    return [slot for first, count in several for slot in range(first, first + count)]


in_runs = st.tuples(runs, orders, runs).map(
    lambda parts: [*neighbours(parts[0]), *parts[1], *neighbours(parts[2])]
)
slots = st.one_of(orders, in_runs)
amounts = st.sampled_from([1, 2, 100, 250, 255, 256, 60_000, 70_000, 1 << 31])


@given(steps=st.lists(st.tuples(st.booleans(), slots, runs, amounts), max_size=8))
def test_counts_are_sums_whatever_their_width(steps) -> None:
    found, expected = ClusterCounts(SLOTS), np.zeros(SLOTS, dtype=np.uint64)
    for taken_back, single, several, amount in steps:
        found.add(np.array(single, dtype=np.int64), amount)
        first, count = np.array(several, dtype=np.int64).reshape(-1, 2).T
        found.add_runs(first, count, amount)
        for slot, times in Counter(single).items():
            expected[slot] += np.uint64(times * amount)
        for first, length in several:
            expected[first : first + length] += np.uint64(amount)
        if taken_back:
            found.subtract(np.array(single, dtype=np.int64), np.full(len(single), amount))
            for slot in single:
                expected[slot] -= np.uint64(amount)
    assert found.values.tolist() == expected.tolist()


@given(single=slots)
def test_a_tally_says_how_often_each_slot_occurs(single) -> None:
    tally = Tally.of(np.array(single, dtype=np.int64))
    found = Counter(tally.single.tolist())
    found.update(dict(zip(tally.slots.tolist(), tally.times.tolist(), strict=True)))
    assert found == Counter(single)
    assert len(set(tally.single.tolist())) == len(tally.single)


@given(
    numbers=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    width=st.sampled_from([np.uint16, np.uint32, np.uint64]),
)
def test_numbers_near_one_are_what_they_were(numbers, width) -> None:
    plain = np.array(numbers, dtype=width)
    held = NearOne.of(plain)
    assert len(held) == len(plain)
    assert held.dtype == width
    assert held[:].tolist() == numbers
    assert held[1:3].tolist() == numbers[1:3]
    assert held[np.array([0, 0])].tolist() == [numbers[0]] * 2
    assert held.are_one(slice(None)).tolist() == [number == 1 for number in numbers]


def test_a_copy_is_counted_on_by_itself() -> None:
    first = ClusterCounts(2)
    first.add_run(Slot(0), 1, 300)
    second = first.copy()
    second.add_distinct(np.array([0, 1]), 65_500)
    assert first.values.tolist() == [300, 0]
    assert second.values.tolist() == [65_800, 65_500]


def test_counters_are_one_byte_wide_while_that_is_enough() -> None:
    found = ClusterCounts(1000)
    for slot in range(1000):
        found.add_run(Slot(slot), 1, 1)
    assert found.values.dtype == np.uint8


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_counters_that_widen_take_memory_where_something_is_counted() -> None:
    found = ClusterCounts(1 << 28)
    before = resident_bytes()
    found.add(np.array([5, (1 << 28) - 1]).repeat(300), 1)
    assert resident_bytes() - before < 64 << 20
    assert found.values.dtype == np.uint16
    assert found.values[[5, 6, -1]].tolist() == [300, 0, 300]


far = st.integers(-(1 << 63), (1 << 63) - 1)


@given(values=st.one_of(st.lists(far, max_size=20), st.lists(st.integers(-9, 9), max_size=40)))
def test_distinct_values_are_those_of_a_set(values) -> None:
    array = np.array(values, dtype=np.int64)
    assert distinct(array).tolist() == sorted(set(values))
    assert without_repeats(np.sort(array)).tolist() == sorted(set(values))


@pytest.mark.parametrize("last", [9, 1 << 30])
def test_pages_have_slots_for_all_their_clusters_and_for_no_others(last) -> None:
    """Whether they are near one another, or one is far away."""
    pages, size = np.array([0, 3, 4, last]), (last << PAGE_BITS) + 10
    index = PagedIndex(size, pages)
    assert index.slots == 4 << PAGE_BITS
    slots = np.arange(index.slots)
    clusters = index.clusters_of(slots)
    assert (np.diff(clusters) > 0).all()
    assert set((clusters >> PAGE_BITS).tolist()) == set(pages.tolist())
    assert (index.slots_of(clusters) == slots).all()
    found, known = index.find(clusters)
    assert (known == (clusters < size)).all()
    assert (found[known] == slots[known]).all()
    assert not found[~known].any()
    assert not index.find(np.array([-64, -1, 64, 191, 320, size, size + 64, 1 << 40]))[1].any()
    some = np.array([0, 1, 63, 64, 191, 192, 319, 320, size - 10, size - 1, 1 << 40])
    before = [np.count_nonzero(clusters < cluster) for cluster in some]
    assert index.count_before(some).tolist() == before
    assert [index.slots_before(cluster) for cluster in some.tolist()] == before


def test_no_page_has_a_cluster_where_there_are_none() -> None:
    index = PagedIndex(100, np.zeros(0, dtype=np.int64))
    found, known = index.find(np.array([0, 99]))
    assert not found.any()
    assert not known.any()


@pytest.mark.parametrize(("limit", "width"), [(15, np.uint8), (255, np.uint8), (65_535, np.uint16)])
def test_counts_that_are_clipped_take_no_more_room_than_their_limit(limit, width) -> None:
    found = ClusterCounts(3)
    found.add_run(Slot(0), 1, 7)
    found.add_run(Slot(1), 1, 70_000)
    found.clip(np.array([1]), limit)
    assert found.values.dtype == width
    assert found.values.tolist() == [7, limit, 0]
