"""Counters over host clusters: growable in width, dense or sparse in extent.

A `ClusterIndex` maps cluster numbers to slots, so that a file that claims to be huge costs what is
in it; `ClusterCounts` holds one number a slot in the narrowest dtype that fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, Counts, Mask, Slot, count_each

_WIDTHS: tuple[type[np.unsignedinteger], ...] = (np.uint8, np.uint16, np.uint32, np.uint64)


class ClusterIndex:
    """Which slot a cluster has.

    Dense: slot = cluster, for clusters below *size*. Sparse: slots number the ascending *keys*, the
    only clusters that matter. Runs of adjacent known clusters are runs of adjacent slots in both.
    """

    def __init__(self, size: int, keys: I64 | None = None) -> None:
        self.clusters = size
        self.keys = keys
        self.slots = size if keys is None else len(keys)

    def slots_of(self, clusters: I64) -> I64:
        """Slots of clusters that are known to have one."""
        if self.keys is None:
            return clusters
        return np.searchsorted(self.keys, clusters)

    def find(self, clusters: I64) -> tuple[I64, Mask]:
        """Slots of any clusters, and which of them have one; the others' slots are 0."""
        if self.keys is None:
            known = clusters < self.slots
        else:
            slots = np.searchsorted(self.keys, clusters)
            known = slots < self.slots
            known[known] = self.keys[slots[known]] == clusters[known]
            clusters = slots
        return clusters * known, known

    def slots_before(self, cluster: int) -> Slot:
        """How many slots belong to clusters below *cluster*."""
        return Slot(int(self.count_before(np.array([cluster]))[0]))

    def count_before(self, clusters: I64) -> I64:
        """`slots_before` of each of many."""
        if self.keys is None:
            return np.minimum(clusters, self.slots)
        return np.searchsorted(self.keys, clusters)

    def clusters_of(self, slots: I64) -> I64:
        """The inverse of `slots_of`."""
        return slots if self.keys is None else self.keys[slots]


PAGE_BITS = 6
"""A page of clusters: 64. Of stored refcounts of one bit it is 8 bytes, whatever is set in them."""

_TABLED = 1 << 14
"""So many numbers of pages are looked up in a table, however few of them there are."""


class PagedIndex(ClusterIndex):
    """Slots for all clusters of some pages, and no others.

    A file that lies in holes to the greater part has few pages, however many clusters: where all
    of them have a bit in a refcount block, naming each takes eight bytes, a page one bit a cluster.
    """

    def __init__(self, size: int, pages: I64) -> None:
        """*pages*: ascending, below *size* clusters; of the last some may be past that."""
        super().__init__(size, pages)
        self._pages = pages
        self.slots = len(pages) << PAGE_BITS
        # To look up what is there takes a fraction of the time of a search.
        end = int(pages[-1]) + 1 if len(pages) else 0
        is_table = end <= max(_TABLED, 4 * len(pages))
        self._before = np.searchsorted(pages, np.arange(end + 1)) if is_table else None

    def slots_of(self, clusters: I64) -> I64:
        inside = clusters & ((1 << PAGE_BITS) - 1)
        return (self._pages_before(clusters >> PAGE_BITS) << PAGE_BITS) + inside

    def find(self, clusters: I64) -> tuple[I64, Mask]:
        at, known = self._find_pages(clusters >> PAGE_BITS)
        known &= clusters < self.clusters
        inside = clusters & ((1 << PAGE_BITS) - 1)
        return ((at << PAGE_BITS) + inside) * known, known

    def count_before(self, clusters: I64) -> I64:
        at, there = self._find_pages(clusters >> PAGE_BITS)
        return (at << PAGE_BITS) + np.where(there, clusters & ((1 << PAGE_BITS) - 1), 0)

    def _find_pages(self, pages: I64) -> tuple[I64, Mask]:
        """How many of its pages are before each of these, and which of these are among them."""
        at = self._pages_before(pages)
        if self._before is not None:
            return at, self._pages_before(pages + 1) != at
        there = at < len(self._pages)
        there[there] = self._pages[at[there]] == pages[there]
        return at, there

    def _pages_before(self, pages: I64) -> I64:
        if self._before is None:
            return np.searchsorted(self._pages, pages)
        return self._before.take(pages, mode="clip")

    def clusters_of(self, slots: I64) -> I64:
        first: I64 = self._pages[slots >> PAGE_BITS] << PAGE_BITS
        return first + (slots & ((1 << PAGE_BITS) - 1))


@dataclass(frozen=True, slots=True)
class Tally:
    """How often slots occur: once in ``single``, where these are many; ``times`` in ``slots``.

    In both of them each slot is there once.
    """

    single: I64
    slots: npt.NDArray[np.integer[Any]]
    times: I64

    @classmethod
    def of(cls, slots: I64) -> Tally:
        """Of *slots* in any order."""
        nothing = np.zeros(0, dtype=np.int64)
        step = np.diff(slots)
        if (step > 0).all():
            return cls(slots, nothing, nothing)
        # Of a table that is damaged here and there most go on one after the other: those need not
        # be sorted, if only the others are in disorder.
        start = np.append(0, np.flatnonzero(step != 1) + 1)
        length = np.diff(start, append=len(slots))
        is_run = length >= RUN
        first, number, single = slots[start[is_run]], length[is_run], nothing
        if number.sum() * 2 > len(slots) and (first[1:] >= first[:-1] + number[:-1]).all():
            goes_on = np.repeat(is_run, length)
            single, slots = slots[goes_on], slots[~goes_on]
        return cls(single, *count_each(slots))


class NearOne:
    """One unsigned number a slot, most of which are 1: those take no memory.

    Held is what differs from 1. Of a new array, which is zeros, the kernel gives no page before
    something else is written to it.
    """

    def __init__(self, difference: Counts) -> None:
        """*difference*: each number and 1, one or the other and not both, bit by bit."""
        self._difference = difference

    @classmethod
    def of(cls, numbers: Counts) -> NearOne:
        """These numbers."""
        return cls(beside_one(numbers))

    def __getitem__(self, at: slice | npt.NDArray[Any]) -> Counts:
        return beside_one(self._difference[at])

    def __len__(self) -> int:
        return len(self._difference)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """Of the numbers."""
        return self._difference.dtype

    def are_one(self, at: slice | npt.NDArray[Any]) -> Mask:
        """Which of the numbers *at* those slots are 1."""
        are: Mask = self._difference[at] == 0
        return are


def beside_one(numbers: Counts) -> Counts:
    """What `NearOne` holds in place of *numbers*; and of what it holds the numbers."""
    held: Counts = np.bitwise_xor(numbers, numbers.dtype.type(1))
    return held


RUN = 4
"""From so many neighbours on it is no chance that they are."""


class ClusterCounts:
    """One unsigned number a slot. Starts at one byte each and widens before anything can wrap."""

    def __init__(self, slots: int) -> None:
        self.values: Counts = np.zeros(slots, dtype=np.uint8)
        self._bound = 0  # No value is above this.
        self._limit = int(np.iinfo(np.uint8).max)  # The most that a value can be in its dtype.

    def copy(self) -> ClusterCounts:
        """The same counts, to be counted on separately."""
        twin = ClusterCounts(0)
        twin.values = self.values.copy()
        twin._bound, twin._limit = self._bound, self._limit
        return twin

    def add_run(self, first: Slot, count: int, amount: int) -> None:
        """Add *amount* to the slots first..first+count-1."""
        part = slice(first, first + count)
        self._make_room(part, amount)
        self.values[part] += self.values.dtype.type(amount)

    def add_runs(self, first: I64, count: I64, amount: int) -> None:
        """`add_run` for each of many, which may overlap."""
        for start, length in zip(first.tolist(), count.tolist(), strict=True):
            self.add_run(start, length, amount)

    def add_distinct(self, slots: npt.NDArray[np.integer[Any]], amount: int) -> None:
        """Add *amount* to slots that are all different."""
        self._make_room(slots, amount)
        self.values[slots] += self.values.dtype.type(amount)

    def subtract(self, slots: I64, amounts: I64) -> None:
        """Take back what was added to *slots* before; few of them, and any may occur repeatedly."""
        np.subtract.at(self.values, slots, amounts.astype(self.values.dtype))

    def add(self, slots: I64, amount: int) -> None:
        """Add *amount* to each of *slots*, as often as it occurs."""
        self.add_tally(Tally.of(slots), amount)

    def add_tally(self, tally: Tally, amount: int) -> None:
        """The same of slots that were tallied: as good as sorting them again for each counter."""
        if len(tally.single):
            self.add_distinct(tally.single, amount)
        if len(tally.slots):
            times = tally.times * amount
            self._make_room(tally.slots, int(times.max()))
            self.values[tally.slots] += times.astype(self.values.dtype)

    def clip(self, over: I64, limit: int) -> None:
        """Set the slots *over*, which are all that are above *limit*, to that, once all is counted:
        the numbers take no more room than it needs.
        """
        self.values[over] = limit
        width = next(each for each in _WIDTHS if limit <= int(np.iinfo(each).max))
        if width is not self.values.dtype.type:
            self.values = _converted(self.values, width)

    def _make_room(self, slots: slice | npt.NDArray[np.integer[Any]], amount: int) -> None:
        """Widen where adding *amount* to one of *slots* could wrap.

        Only they are looked at, and only once the bound no longer tells: looking at all of a large
        file again and again takes longer than counting it.
        """
        if self._bound + amount <= self._limit:
            self._bound += amount
            return
        top = int(self.values[slots].max(initial=0)) + amount
        while top > self._limit:
            width = _WIDTHS[[np.dtype(w) for w in _WIDTHS].index(self.values.dtype) + 1]
            self.values = _converted(self.values, width)
            self._limit = int(np.iinfo(width).max)
        self._bound = max(self._bound, top)


_CONVERTED = 1 << 16
"""Numbers that are copied at a time."""


def _converted(values: Counts, width: type[np.unsignedinteger]) -> Counts:
    """*values* in that dtype; of zeros, which most are in a file of holes, nothing is written."""
    converted: Counts = np.zeros(len(values), dtype=width)
    for start in range(0, len(values), _CONVERTED):
        part = slice(start, start + _CONVERTED)
        if values[part].any():
            converted[part] = values[part]
    return converted


def fill_rows(values: Counts, rows: I64, part: Counts) -> Counts:
    """Set values[rows] = part in a 2-D array, which widens where *part* does not fit its dtype."""
    top = int(part.max(initial=0))
    if top > int(np.iinfo(values.dtype).max):
        values = values.astype(next(w for w in _WIDTHS if top <= int(np.iinfo(w).max)))
    values[rows] = part
    return values
