"""Names for what the planner passes around, and what numpy does not do well.

The words for places, each of which is a number, and none of them another:

- *host offset*: bytes from the start of the image file. *Guest offset*: of the disk that a guest
  sees, or of a snapshot's.
- *cluster*: a host cluster's number, its host offset divided by the cluster size. *Guest cluster*:
  the same of a guest offset.
- *slot*: where the counters of a cluster stand in their arrays, see `ClusterIndex`.
- *L1 index*, *L2 index*: which entry of its table. *Position*: of an entry among those of many
  tables, one behind the other.

Single ones have types of their own; columns of them are all `I64`.
"""

from __future__ import annotations

from typing import Any, NewType

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.unsignedinteger[Any]]

HostOffset = NewType("HostOffset", int)
GuestOffset = NewType("GuestOffset", int)
Cluster = NewType("Cluster", int)
Slot = NewType("Slot", int)


_KEY_BITS = 63
"""Of a number that stands for several columns in their order: an int64 without its sign."""


def expand_ranges(first: I64, last: I64) -> I64:
    """All numbers of the ranges first[i]..last[i], inclusive, in order."""
    lengths = last - first + 1
    if (lengths == 1).all():
        return first
    starts = np.repeat(first - np.cumsum(lengths) + lengths, lengths)
    starts += np.arange(len(starts))
    return starts


def join_ranges(start: I64, end: I64) -> tuple[I64, I64]:
    """Ranges start[i]..end[i]-1 in any order as ascending ones that neither overlap nor touch."""
    return join_bounds(np.sort(start, kind="stable"), np.sort(end, kind="stable"))


def join_bounds(starts: I64, ends: I64) -> tuple[I64, I64]:
    """`join_ranges` of the ranges that have these bounds, the starts and the ends in order.

    Whichever belong together: where as many have ended as had begun before the next begins, none of
    them reaches further.
    """
    new = np.ones(len(starts), dtype=np.bool_)
    np.greater(starts[1:], ends[:-1], out=new[1:])
    if new.all():
        return starts, ends
    return starts[new], ends[np.append(new[1:], True)]


def without_ranges(whole: tuple[I64, I64], part: tuple[I64, I64]) -> tuple[I64, I64]:
    """What is left of ranges, as `join_ranges` gives them, without others that lie within them.

    Every bound is one of what is left, but where both have one.
    """
    bounds = np.sort(np.concatenate((*whole, *part)), kind="stable")
    alone = np.ones(len(bounds), dtype=np.bool_)
    differs = bounds[1:] != bounds[:-1]
    alone[1:] = differs
    alone[:-1] &= differs
    left = bounds[alone]
    return left[::2], left[1::2]


_SEARCHED = 1 << 18
"""Values that are looked for at a time."""


def is_among(values: I64, ascending: I64) -> Mask:
    """Which of *values* are among others, which are in order.

    As np.isin says, which joins and sorts both: of seven million that takes half a gigabyte.
    """
    result = np.zeros(len(values), dtype=np.bool_)
    if len(ascending):
        for start in range(0, len(values), _SEARCHED):
            part = values[start : start + _SEARCHED]
            at = np.minimum(np.searchsorted(ascending, part), len(ascending) - 1)
            result[start : start + _SEARCHED] = ascending[at] == part
    return result


def is_any_of(values: I64, others: I64) -> Mask:
    """As `is_among`, of *others* in any order."""
    return is_among(values, distinct(others))


def distinct(values: I64) -> I64:
    """The values of a 1-D array without repeats, ascending.

    As np.unique gives them, which loads all of numpy.ma to ask whether they are masked: that takes
    longer than to check a small image. Most columns are in order by then.
    """
    if (values[1:] >= values[:-1]).all():
        return without_repeats(values)
    low, high = int(values.min()), int(values.max())
    if high - low >= len(values):
        return without_repeats(np.sort(values, kind="stable"))
    is_there = np.zeros(high - low + 1, dtype=np.bool_)
    is_there[values - low] = True
    return (np.flatnonzero(is_there) + low).astype(values.dtype, copy=False)


def count_each(values: I64) -> tuple[npt.NDArray[np.integer[Any]], I64]:
    """The values of a 1-D array, none of them negative, without repeats, ascending; and how often
    each is there.

    As np.unique gives them, which sorts them in any case.
    """
    if not len(values):
        return values, values
    low, high = int(values.min()), int(values.max())
    if high - low < len(values):  # A counter for each in between takes no more room than they.
        times = np.bincount(values - low)
        there = np.flatnonzero(times)
        return there + low, times[there]
    # Half the width sorts in half the time.
    narrow = values.astype(np.uint32) if high < 1 << 32 else values
    ordered: npt.NDArray[np.integer[Any]] = np.sort(narrow)
    first = np.ones(len(ordered), dtype=np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    return ordered[starts], np.diff(starts, append=len(ordered))


def distinct_columns(columns: I64) -> tuple[I64, I64]:
    """The columns of a 2-D array without repeats, ascending, and which of them each column is.

    As np.unique gives them along an axis, which takes three times as long to sort whole columns.
    """
    first, which = distinct_rows(*columns)
    return columns[:, first], which


def distinct_rows(*columns: npt.NDArray[Any]) -> tuple[I64, I64]:
    """Of the rows of *columns*, equally long, without repeats and ascending: where the first of
    each is, and which of them each row is.
    """
    order, new = rows_in_order(*columns)
    which = np.empty(len(new), dtype=np.int64)
    which[order] = np.cumsum(new) - 1
    return np.flatnonzero(new) if isinstance(order, slice) else order[new], which


def rows_in_order(*columns: npt.NDArray[Any]) -> tuple[I64 | slice, Mask]:
    """The order in which rows of *columns*, equally long, ascend; and, in that order, which differ
    from the one before. Of long ones one column is copied at a time.

    Where they ascend already, which takes little to see, that order is all of them.
    """
    order: I64 | slice = slice(None)
    equal: Mask = np.ones(max(0, len(columns[0]) - 1), dtype=np.bool_)
    for column in columns:
        if (equal & (column[1:] < column[:-1])).any():
            order = np.lexsort(_in_few(columns)[::-1])
            break
        equal &= column[1:] == column[:-1]
    new = np.zeros(len(columns[0]), dtype=np.bool_)
    new[:1] = True
    for column in columns:
        ordered = column[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    return order, new


def _in_few(columns: tuple[npt.NDArray[Any], ...]) -> list[npt.NDArray[Any]]:
    """As few columns as can be, of which rows come in the same order: each takes a sort.

    One behind the other they go into 63 bits, where each has as many as its values need.
    """
    few: list[npt.NDArray[Any]] = []
    left = 0
    for column in columns:
        low = int(column.min())
        width = (int(column.max()) - low).bit_length()
        if width > _KEY_BITS:
            few.append(column)
            left = 0
        elif width:
            wide = column if column.dtype == np.uint64 else column.astype(np.int64)
            key: I64 = (wide - low).astype(np.int64)
            if width > left:
                few.append(key)
                left = _KEY_BITS
            else:
                few[-1] = few[-1] << width | key
            left -= width
    return few


def union(one: I64, other: I64) -> I64:
    """What is in *one* or in *other*, ascending, each once; *other* is in order."""
    return merged(one, other) if len(one) else other


def merged(*columns: I64) -> I64:
    """What is in any of *columns*, ascending, each once; in the least time if they are in order."""
    return without_repeats(np.sort(np.concatenate(columns), kind="stable"))


def without_repeats(ascending: I64) -> I64:
    """The values of a sorted 1-D array, each once."""
    first = np.ones(len(ascending), dtype=np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=first[1:])
    return ascending[first]
