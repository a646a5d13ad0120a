"""The map of a guest's disk: for each run of bytes the member of the chain that it is read from.

Pure: a chain is described by `Stratum`s, which the caller opens. The rows are those that
``qemu-img map`` gives (get_block_status in qemu-img.c, qcow2_co_block_status,
bdrv_co_block_status), and what cannot be known is a row that says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.arrays import I32, I64, U8, Mask, distinct, expand_ranges, is_any_of
from planner.guest.mapping import Mapping, Reading, RunKind, Runs, read_freely
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.qcow2.entries import NO_HOST
from planner.qcow2.layout import Layout, sector_end
from planner.source import Source

UNKNOWN = 255
"""In place of a flaw: the bytes are in a file that is not read."""


MAX_PIECES = 1 << 16
"""Into so many, and one row more, are rows broken at a time."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """One disk of a chain.

    ``mapping``: None for a raw disk, which lies in ``data`` byte for byte. ``data``: where its data
    is, None where that file is not read. ``size``: its bytes. ``sparse``: whether holes in ``data``
    are to be looked for behind what is mapped: where the metadata was preallocated. ``hidden``:
    whether host offsets say nothing, as the data is encrypted. ``backing``: what lies beneath;
    UNKNOWN where that is not read.
    """

    mapping: Mapping | None
    data: Source | None
    size: int
    sparse: bool = False
    hidden: bool = False
    backing: Stratum | int | None = None

    def marked(self, offset: int, end: int) -> Stratum:
        """The same chain, with damage where tables were overwritten: see `Mapping.marked`."""
        end, backing = min(end, self.size), self.backing
        return replace(
            self,
            mapping=self.mapping.marked(offset, end) if self.mapping else None,
            backing=backing.marked(offset, end) if isinstance(backing, Stratum) else backing,
        )


@dataclass(frozen=True, slots=True)
class Extents:
    """Rows of the map, adjacent and ascending; offsets and lengths in bytes, all columns as long.

    ``depth``: how far down the chain, 0 for the image. ``present``, ``zero``, ``data``,
    ``compressed`` as in ``qemu-img map``. ``offset``: in the file of the data, or `NO_HOST`.
    ``flaw``: `planner.guest.mapping.Flaw`, or `UNKNOWN`.
    """

    start: I64
    length: I64
    depth: I32
    present: Mask
    zero: Mask
    data: Mask
    compressed: Mask
    offset: I64
    flaw: U8

    def __len__(self) -> int:
        return len(self.start)

    @classmethod
    def concatenate(cls, parts: Sequence[Extents]) -> Extents:
        """All of them, one after the other."""
        return cls(
            start=np.concatenate([part.start for part in parts]),
            length=np.concatenate([part.length for part in parts]),
            depth=np.concatenate([part.depth for part in parts]),
            present=np.concatenate([part.present for part in parts]),
            zero=np.concatenate([part.zero for part in parts]),
            data=np.concatenate([part.data for part in parts]),
            compressed=np.concatenate([part.compressed for part in parts]),
            offset=np.concatenate([part.offset for part in parts]),
            flaw=np.concatenate([part.flaw for part in parts]),
        )

    def select(self, which: I64 | Mask | slice) -> Extents:
        """The rows *which*."""
        return Extents(
            start=self.start[which],
            length=self.length[which],
            depth=self.depth[which],
            present=self.present[which],
            zero=self.zero[which],
            data=self.data[which],
            compressed=self.compressed[which],
            offset=self.offset[which],
            flaw=self.flaw[which],
        )

    def split(self, starts: I64, end: int) -> Extents:
        """The same, broken at *starts* too, which are ascending; up to *end*."""
        which = np.searchsorted(self.start, starts, side="right") - 1
        rows = self.select(which)
        moved = np.where(rows.offset == NO_HOST, 0, starts - rows.start)
        return replace(
            rows, start=starts, length=np.diff(starts, append=end), offset=rows.offset + moved
        )

    def joined(self) -> Extents:
        """Rows that continue each other as one: entry_mergeable."""
        if len(self) < 2:
            return self
        goes_on = np.where(self.offset == NO_HOST, NO_HOST, self.offset + self.length)
        breaks = np.ones(len(self), dtype=np.bool_)
        breaks[1:] = self.offset[1:] != goes_on[:-1]
        for column in (
            self.depth, self.present, self.zero, self.data, self.compressed, self.flaw
        ):  # fmt: skip
            breaks[1:] |= column[1:] != column[:-1]
        if breaks.all():
            return self
        first = np.flatnonzero(breaks)
        return replace(self.select(first), length=np.add.reduceat(self.length, first))


def extents(
    stratum: Stratum, offset: int, end: int, reading: Reading = read_freely
) -> Iterator[Extents]:
    """The map of *offset* to *end* of the uppermost disk of a chain, in batches, as long as it is.

    Each batch is joined, and with the ones before and after it too. *reading*: is told how many
    entries are about to be read, and may raise.
    """
    held: Extents | None = None
    for batch in _extents_of(stratum, offset, min(end, stratum.size), 0, reading):
        rows = (batch if held is None else Extents.concatenate([held, batch])).joined()
        if len(rows) > 1:
            yield rows.select(slice(0, -1))
        held = rows.select(slice(-1, None))
    if held is not None:
        yield held


def _extents_of(
    stratum: Stratum, offset: int, end: int, depth: int, reading: Reading
) -> Iterator[Extents]:
    if offset >= end:
        return
    if stratum.mapping is None:
        yield from _raw_extents(stratum, offset, end, depth)
        return
    for rows in _rows_of_all(
        stratum, stratum.mapping.walk(offset, end, packed=True, reading=reading), depth
    ):
        missing = ~rows.present
        beneath = stratum.backing
        if not missing.any() or beneath is None:
            yield rows
        elif isinstance(beneath, int):
            yield replace(
                rows,
                depth=rows.depth + missing.astype(np.int32),
                zero=rows.zero & ~missing,
                offset=np.where(missing, NO_HOST, rows.offset),
                flaw=np.where(missing, UNKNOWN, rows.flaw).astype(np.uint8),
            )
        else:
            yield from _through(rows, missing, beneath, depth, reading)


def _through(
    rows: Extents, missing: Mask, beneath: Stratum, depth: int, reading: Reading
) -> Iterator[Extents]:
    """*rows* with what *beneath* has in place of the *missing* ones, as far as that reaches."""
    holes = np.flatnonzero(missing)
    low = int(rows.start[holes[0]])
    high = min(int(rows.start[holes[-1]] + rows.length[holes[-1]]), beneath.size)
    end = int(rows.start[-1] + rows.length[-1])
    if low >= high:
        yield rows
        return
    if len(rows) == 1:  # so large a hole that what is beneath comes in batches
        yield from _extents_of(beneath, low, high, depth + 1, reading)
        if high < end:
            yield rows.split(np.array([high]), end)
        return
    under = Extents.concatenate(list(_extents_of(beneath, low, high, depth + 1, reading)))
    # Where the disk beneath ends, the hole is one of the disk above.
    starts = distinct(np.concatenate((rows.start, under.start, [min(high, end - 1)])))
    above, below = rows.split(starts, end), under.split(np.maximum(starts, low), high)
    from_below = missing[np.searchsorted(rows.start, starts, side="right") - 1] & (starts < high)
    mixed = Extents.concatenate([above, below])
    chosen = mixed.select(np.arange(len(starts)) + np.where(from_below, len(starts), 0))
    yield replace(chosen, start=starts, length=np.diff(starts, append=end))


def _rows_of_all(stratum: Stratum, walk: Iterable[Runs], depth: int) -> Iterator[Extents]:
    for runs in walk:
        rows = _rows_of(stratum, runs, depth)
        if stratum.sparse and stratum.data is not None:
            yield from _with_holes(rows, stratum.data)
        else:
            yield rows


def _rows_of(stratum: Stratum, runs: Runs, depth: int) -> Extents:
    """What the runs of a qcow2 disk say; an unallocated one reads as zeros as long as nothing is
    known of what is beneath."""
    damaged = runs.kind == RunKind.DAMAGED
    packed = runs.kind == RunKind.COMPRESSED
    unallocated = runs.kind == RunKind.UNALLOCATED
    return Extents(
        start=runs.guest,
        length=runs.length,
        depth=np.full(len(runs), depth, dtype=np.int32),
        present=~unallocated,
        zero=(runs.kind == RunKind.ZERO) | unallocated,
        data=(runs.kind == RunKind.DATA) | packed | damaged,
        compressed=packed,
        offset=np.where(packed | stratum.hidden, NO_HOST, runs.host),
        flaw=runs.flaw,
    )


def _with_holes(rows: Extents, data: Source) -> Iterator[Extents]:
    """*rows*, broken where holes begin and end in *data*; data in holes is zero too.

    In parts: thousands of rows may each have the same holes in them.
    """
    held = np.flatnonzero(rows.data & (rows.offset != NO_HOST))
    low = rows.offset[held]
    high = low + rows.length[held]
    start, stop = _held_extents(data, low, high)
    pieces = np.ones(len(rows), dtype=np.int64)
    inside = np.searchsorted(start, high) - np.searchsorted(stop, low, side="right")
    pieces[held] += 2 * np.maximum(0, inside)
    part = np.cumsum(pieces) // MAX_PIECES
    ends = np.flatnonzero(np.diff(part, append=-1)) + 1
    for begin, end in itertools.pairwise([0, *ends.tolist()]):
        yield _broken(rows.select(slice(begin, end)), start, stop)


def _broken(rows: Extents, start: I64, stop: I64) -> Extents:
    """*rows*, broken where the extents begin and end that their data is in."""
    held = np.flatnonzero(rows.data & (rows.offset != NO_HOST))
    low, shift = rows.offset[held], rows.start[held] - rows.offset[held]
    high = low + rows.length[held]
    # Of each row the extents that reach into it.
    first, last = np.searchsorted(stop, low, side="right"), np.searchsorted(start, high) - 1
    row = np.repeat(np.arange(len(held)), np.maximum(0, last - first + 1))
    inside = expand_ranges(first[first <= last], last[first <= last])
    begins = np.maximum(start[inside], low[row]) + shift[row]
    ends = np.minimum(stop[inside], high[row]) + shift[row]
    is_open = np.ones(len(held), dtype=np.bool_)
    is_open[first <= last] = start[first[first <= last]] > low[first <= last]
    holes = np.concatenate(((low + shift)[is_open], ends[ends < (high + shift)[row]]))
    end = int(rows.start[-1] + rows.length[-1])
    breaks = np.concatenate((begins, ends, holes))
    every = distinct(np.concatenate((rows.start, breaks[breaks < end])))
    broken = rows.split(every, end)
    return replace(broken, zero=broken.zero | is_any_of(every, holes))


def _held_extents(data: Source, low: I64, high: I64) -> tuple[I64, I64]:
    """What *data* holds of ranges, in any order, that may overlap: ascending extents, in the least
    number of questions. They may reach further than the ranges.
    """
    order = np.argsort(low, kind="stable")
    low, reach = low[order], np.maximum.accumulate(high[order])
    starts: list[int] = []
    stops: list[int] = []
    index = 0
    while index < len(low):
        position = max(int(low[index]), stops[-1] if stops else 0)
        extent = next(iter(data.data_extents(position, int(reach[-1]) - position)), None)
        if extent is None:
            break
        if stops and extent[0] == stops[-1]:
            stops[-1] = extent[1]
        else:
            starts.append(extent[0])
            stops.append(extent[1])
        # The first range that reaches behind it.
        index = int(np.searchsorted(reach, extent[1], side="right"))
    return np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)


def _raw_extents(stratum: Stratum, offset: int, end: int, depth: int) -> Iterator[Extents]:
    """A raw disk: data, and holes."""
    starts, holds = [], []
    position = offset
    for low, high in stratum.data.data_extents(offset, end - offset) if stratum.data else ():
        if position < low:
            starts.append(position)
            holds.append(False)
        starts.append(low)
        holds.append(True)
        position = high
    if position < end:
        starts.append(position)
        holds.append(False)
    start, data = np.array(starts, dtype=np.int64), np.array(holds, dtype=np.bool_)
    yield Extents(
        start=start,
        length=np.diff(start, append=end),
        depth=np.full(len(start), depth, dtype=np.int32),
        present=np.ones(len(start), dtype=np.bool_),
        zero=~data,
        data=data,
        compressed=np.zeros(len(start), dtype=np.bool_),
        offset=start,
        flaw=np.zeros(len(start), dtype=np.uint8),
    )


def has_preallocated_metadata(source: Source, layout: Layout, allocated: int) -> bool:
    """Whether more clusters are in use than *source* has disk space for.

    *allocated*: bytes that the file system has set aside. See qcow2_detect_metadata_preallocation.
    """
    real = allocated // layout.geometry.cluster_size
    threshold = max(real * 10 // 9, real + 2)
    clusters = -(-sector_end(source.size) // layout.geometry.cluster_size)
    if clusters < threshold:
        return False
    return StoredRefcounts(source, layout, Reftable(source, layout)).in_use(clusters) >= threshold
