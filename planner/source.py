"""What a planner reads from: the Source protocol, Bytes, and batched table reads.

A source may be sparse, cut off, or say that it is 8 EiB long. Nothing here believes that it is
small or dense; bytes past the end are zeros, as QEMU reads them. Files are opened elsewhere.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from planner.arrays import I64, U8, U64, Mask, distinct, expand_ranges
from planner.errors import ReadFailed

SECTOR = 512
"""What a disk writes whole."""

BATCH_BYTES = 2 << 20
"""Bytes of tables a batch aims at: fits a level-2 cache with its derived arrays nearby."""

BATCHES_AHEAD = 8
"""Read while a batch is looked at, at most: so many requests are under way at a time."""

AHEAD_BYTES = 16 << 20
"""No more than this of it, unless a single batch is longer."""

GAP_BYTES = 16 << 10
"""Tables nearer to each other than this are fetched in one read: a request costs more."""

MAX_SPAN_BYTES = 8 << 20
"""No such read is longer, however many small tables lie near to each other."""

READ_ANYWAY_BYTES = 16 << 20
"""Below this, reading zeros out of holes is cheaper than asking where the holes are."""

READS_ANYWAY = 1 << 9
"""Where so many reads would be needed for it, asking is the cheaper of the two all the same."""

MAX_EXTENTS = 1 << 10
"""Asked for at a time, where tables lie in most of them."""

HOLE = 4096
"""Of a file with holes a file system leaves out so many bytes at a time, or a multiple."""

LARGE_TABLE = 1 << 16
"""Tables that are longer are worth asking where in them there is anything."""

FEW_BLOCKS = 8
"""Tables of which there is no more than this are read together, so many blocks at a time."""

READABLE_END = (1 << 63) - (1 << 30)
"""No file reaches further (QEMU's BDRV_MAX_LENGTH): a read there is an error, not zeros."""


class Source(Protocol):
    """Random access to the bytes of an image."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of *buffer* from *offset* on; bytes past the end are zeros."""

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """Ascending (start, end) within the range that may hold bytes other than zero."""


class Reading(Protocol):
    """A read under way: what of `concurrent.futures.Future` is used."""

    def result(self) -> object:
        """Waits for its end, and raises what it raised."""

    def done(self) -> bool: ...

    def cancel(self) -> object: ...


class Executor(Protocol):
    """What of `concurrent.futures.Executor` is used."""

    def submit(self, function: Callable[..., object], /, *arguments: Any) -> Reading: ...


@runtime_checkable
class Concurrent(Protocol):
    """What a `Source` is too that any thread may read: it has threads that wait for it."""

    @property
    def executor(self) -> Executor | None:
        """Those threads; None where what it reads from is none of these sources."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """A source in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        part = self.data[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        buffer[len(part) :] = bytes(len(buffer) - len(part))

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        end = min(offset + length, len(self.data))
        return [(offset, end)] if offset < end else []


class Patched:
    """A source of which the bytes from *offset* on read as *data*."""

    def __init__(self, source: Source, offset: int, data: bytes) -> None:
        self._source, self._offset, self._data = source, offset, data

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._source.read_into(offset, buffer)
        low = max(offset, self._offset)
        high = min(offset + len(buffer), self._offset + len(self._data))
        if low < high:
            part = self._data[low - self._offset : high - self._offset]
            buffer[low - offset : high - offset] = part

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        end = self._offset + len(self._data)
        own = [(max(offset, self._offset), min(offset + length, end))]
        beneath = self._source.data_extents(offset, length)
        return join_extents(heapq.merge(beneath, [run for run in own if run[0] < run[1]]))


class Grown:
    """A source that is longer, or as long: behind its end there are zeros."""

    def __init__(self, source: Source, size: int) -> None:
        self._source, self._size = source, size

    @property
    def size(self) -> int:
        return max(self._size, self._source.size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._source.read_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self._source.data_extents(offset, length)


class Salvaged:
    """A source of which not everything can be read: zeros in place of that, and an account of it.

    For several threads.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._unread: set[tuple[int, int]] = set()

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As of any source, but that it does not fail: what cannot be read is zeros."""
        self._unread.update(read_around(self._source, offset, buffer))

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self._source.data_extents(offset, length)

    def lost_words(self, offset: int, count: int) -> Mask:
        """Which of the *count* 64-bit words at *offset* are past the end, or could not be read."""
        lost = np.zeros(count, dtype=np.bool_)
        lost[max(0, self.size - offset) // 8 :] = True
        for start, end in list(self._unread):
            if start < offset + count * 8 and end > offset:
                lost[max(0, start - offset) // 8 : -(-(end - offset) // 8)] = True
        return lost


def read_around(source: Source, offset: int, buffer: memoryview) -> list[tuple[int, int]]:
    """Fill *buffer*, with zeros for what cannot be read: those (start, end), ascending.

    What fails is cut in halves, down to sectors.
    """
    try:
        source.read_into(offset, buffer)
    except ReadFailed:
        first = offset // SECTOR * SECTOR
        sectors = -(-(offset + len(buffer) - first) // SECTOR)
        if sectors <= 1:
            buffer[:] = bytes(len(buffer))
            return [(offset, offset + len(buffer))]
        middle = first + sectors // 2 * SECTOR - offset
        unread = read_around(source, offset, buffer[:middle])
        return unread + read_around(source, offset + middle, buffer[middle:])
    return []


def join_extents(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ascending extents that may overlap, as ascending ones that do not touch."""
    current: tuple[int, int] | None = None
    for start, end in extents:
        if current is None:
            current = start, end
        elif start <= current[1]:
            current = current[0], max(current[1], end)
        else:
            yield current
            current = start, end
    if current is not None and current[0] < current[1]:
        yield current


def executor_of(source: Source) -> Executor | None:
    """Threads that may read *source* ahead; None where it has none."""
    return source.executor if isinstance(source, Concurrent) else None


def present_bytes(source: Source) -> int:
    """How much of *source* is no hole, bytes."""
    return sum(end - start for start, end in source.data_extents(0, source.size))


def read_bytes(source: Source, offset: int, length: int) -> bytes:
    """*length* bytes from *offset*; zeros past the end."""
    buffer = bytearray(length)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def read_present(source: Source, offset: int, length: int) -> bytes:
    """As `read_bytes`, cut at the end of the file: what a header claims costs nothing."""
    return read_bytes(source, offset, max(0, min(length, source.size - offset)))


def nonzero_words(source: Source, offset: int, count: int) -> tuple[I64, U64]:
    """The words of a big-endian 64-bit table that are not zero: their indices, and their values.

    Holes and what lies past the end of the file are not read: a table costs what is there of it,
    whatever *count* claims.
    """
    end = min(offset + count * 8, source.size)
    indices, values = [], []
    buffer = np.empty(BATCH_BYTES // 8, dtype=">u8")
    for low, high in source.data_extents(offset, max(0, end - offset)):
        for start in range(low - (low - offset) % 8, high, BATCH_BYTES):
            # Whole words: one that the end of the file cuts through is completed with zeros.
            words = buffer[: -(-(min(high, start + BATCH_BYTES) - start) // 8)]
            source.read_into(start, words.view(np.uint8).data)
            found = np.flatnonzero(words)
            indices.append(found + (start - offset) // 8)
            values.append(words[found].astype(np.uint64))
    if not indices:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
    return np.concatenate(indices), np.concatenate(values)


def words_of_tables(source: Source, offset: I64, count: I64) -> tuple[I64, I64, U64]:
    """`nonzero_words` of the tables at each *offset*, of so many words: (table, index, word).

    Of which table each word is, a position in *offset*; its index in there; and itself; ascending
    by the first two. Thousands may lie in one hole: about that it is not asked for each of them.
    Thousands may lie next to each other, or over each other: what is there of such is read once.
    """
    inside = np.flatnonzero((count > 0) & (offset < source.size))
    inside = inside[np.argsort(offset[inside], kind="stable")]
    start = offset[inside]
    end = start + np.minimum(count[inside] * 8, source.size - start)
    reach = np.maximum.accumulate(end)
    may_hold = _may_hold_data(
        source,
        start,
        int(end.max(initial=0)),
        lambda at: np.searchsorted(reach, at, side="right"),
    )
    tables, indices = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    words = [np.zeros(0, dtype=np.uint64)]
    for some in _neighbours(start, end, np.flatnonzero(may_hold)):
        base = int(start[some[0]])
        index, word = nonzero_words(source, base, -((base - int(end[some].max())) // 8))
        first = (start[some] - base) // 8
        low = index.searchsorted(first)
        high = index.searchsorted((end[some] - base + 7) // 8)
        rows = expand_ranges(low, high - 1)
        tables.append(np.repeat(inside[some], high - low))
        indices.append(index[rows] - np.repeat(first, high - low))
        words.append(word[rows])
    table = np.concatenate(tables)
    order = np.argsort(table, kind="stable")
    return table[order], np.concatenate(indices)[order], np.concatenate(words)[order]


def _neighbours(start: I64, end: I64, which: I64) -> list[I64]:
    """*which* of the ranges (they ascend by *start*) lie so near that they are read as one: some.

    All words of such are words of each, so that none begins within a word of another.
    """
    found = []
    for shift in range(8):
        some = which[start[which] % 8 == shift]
        reach = np.maximum.accumulate(end[some])
        breaks = np.flatnonzero(start[some][1:] > reach[:-1] + GAP_BYTES) + 1
        found += np.split(some, breaks) if len(some) else []
    return found


def present_tables(
    source: Source, offsets: I64, table_bytes: int, *, anyway: int | None = None
) -> Mask:
    """Which of the tables (ascending *offsets*) may hold anything but zeros; bool, one a table.

    Tables in holes and past the end are all zeros and need not be read: so the work of a check is
    bounded by the bytes that are there, not by what a table claims. Leaps from table to extent to
    table, so that neither many tables nor many extents cost more than the fewer of the two; as long
    as most extents have a table, more and more of them are asked for at a time. If all have no more
    than *anyway* bytes together, by default `READ_ANYWAY_BYTES`, and `READS_ANYWAY` reads get them,
    nothing is asked, and all of them may.
    """
    count = len(offsets)
    if count * table_bytes <= (READ_ANYWAY_BYTES if anyway is None else anyway) and (
        count <= READS_ANYWAY or _count_reads(offsets, table_bytes) <= READS_ANYWAY
    ):
        return np.ones(count, dtype=np.bool_)
    # Where they end is not written down: of millions that takes as much as they do.
    return _may_hold_data(
        source,
        offsets,
        int(offsets[-1]) + table_bytes,
        lambda at: np.searchsorted(offsets, at - table_bytes, side="right"),
    )


def _may_hold_data(source: Source, start: I64, end: int, ended: Callable[[I64], I64]) -> Mask:
    """Which of the ranges have anything but a hole; they ascend by *start*, the last ends at *end*.

    *ended*: of offsets, how many of the first ranges end there or before.
    """
    count = len(start)
    present = np.zeros(count, dtype=np.bool_)
    index, number = 0, 1
    while index < count:
        position = int(start[index])
        some = source.data_extents(position, end - position)
        extents = np.array(list(itertools.islice(some, number)), dtype=np.int64).reshape(-1, 2)
        if not len(extents):
            break
        # Of ranges that are not equally long, some that end before an extent are taken with it.
        low = ended(extents[:, 0])
        high = np.searchsorted(start, extents[:, 1], side="left")
        low = np.maximum(low, index)
        hit = np.flatnonzero(low < high)
        present[expand_ranges(low[hit], high[hit] - 1)] = True
        index = max(int(low[-1]), int(high[-1]))
        number = min(2 * number, MAX_EXTENTS) if len(hit) * 16 >= len(extents) else 1
    return present


def _count_reads(offsets: I64, table_bytes: int) -> int:
    """How many requests `_fetch` would make of the tables, but for those that it cuts."""
    return 1 + int(np.count_nonzero(np.diff(offsets) > table_bytes + GAP_BYTES))


def present_pieces(
    source: Source, offsets: I64, table_bytes: int, piece: int, *, anyway: int | None = 0
) -> I64:
    """Where the pieces are, of *piece* bytes each, that may hold anything but zeros.

    Of aligned tables at ascending *offsets*, each once. What is asked is where data begins and
    ends, so that of a table that is a hole to the greater part no more is named than there is.
    *anyway*: as `present_tables` takes it; all pieces of so little are named.
    """
    whole = offsets[present_tables(source, offsets, table_bytes, anyway=anyway)]
    pieces = (whole[:, None] + np.arange(0, table_bytes, piece)).reshape(-1)
    return pieces[present_tables(source, pieces, piece, anyway=anyway)]


def pieces_of_tables(source: Source, offsets: I64, table_bytes: int, piece: int) -> tuple[I64, I64]:
    """As `present_pieces`, but of tables that may lie over each other: of each piece the number of
    its table among *offsets*, ascending, and where in it the piece begins.
    """
    tables = np.flatnonzero(present_tables(source, offsets, table_bytes, anyway=0))
    inside = np.arange(0, table_bytes, piece)
    table, inside = np.repeat(tables, len(inside)), np.tile(inside, len(tables))
    place = offsets[table] + inside
    order = np.argsort(place, kind="stable")
    held = order[present_tables(source, place[order], piece, anyway=0)]
    held.sort()
    return table[held], inside[held]


def read_tables(
    source: Source, offsets: I64, table_bytes: int, batch_bytes: int = BATCH_BYTES
) -> Iterator[tuple[slice, U8]]:
    """Read equally sized tables, many a batch, through a few reused buffers.

    *offsets* are host offsets in the order wanted (ascending reads best). Yields the slice of
    *offsets* that a batch holds and its bytes, shape (tables, table_bytes); the bytes are valid
    until the next batch. From a source that is `Concurrent`, the next batches are read meanwhile.
    """
    count, per_batch = len(offsets), max(1, batch_bytes // table_bytes)
    parts = [slice(at, min(at + per_batch, count)) for at in range(0, count, per_batch)]
    return read_parts(source, offsets, table_bytes, parts)


def read_parts(
    source: Source, offsets: I64, table_bytes: int, parts: Sequence[slice]
) -> Iterator[tuple[slice, U8]]:
    """As `read_tables`, in batches that the caller has cut."""
    longest = max((part.stop - part.start for part in parts), default=0)
    executor = executor_of(source) if len(parts) > 1 else None
    if executor is not None:
        yield from _read_ahead(executor, source, offsets, parts, (longest, table_bytes))
        return
    buffer = np.empty((longest, table_bytes), dtype=np.uint8)
    for part in parts:
        rows = buffer[: part.stop - part.start]
        _fetch(source, offsets[part], rows)
        yield part, rows


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """Some of the tables that `read_filled` was asked for, without what of them is holes.

    ``part``: which. ``blocks``: the numbers of the blocks that are held of each, ascending; the
    others are zeros in all of them. ``rows``: uint8 (tables, bytes of these blocks).
    """

    part: slice
    blocks: I64
    rows: U8

    def words(self) -> I64:
        """Which words of a table are held, 8 bytes each."""
        per_block = self.rows.shape[1] // len(self.blocks) // 8
        words: I64 = (self.blocks[:, None] * per_block + np.arange(per_block)).reshape(-1)
        return words


def read_filled(
    source: Source, offsets: I64, table_bytes: int, *, head: int = 0
) -> Iterator[Filled]:
    """As `read_tables`, of ascending *offsets*, each once; of large tables what is there of them.

    Blocks are of `HOLE` bytes, or as long as a table that is shorter. *head*: so many bytes from
    the beginning of each are held, whatever is there; the first block always is.
    """
    block = min(HOLE, table_bytes)
    if table_bytes <= LARGE_TABLE:
        whole = np.arange(table_bytes // block)
        for part, rows in read_tables(source, offsets, table_bytes):
            yield Filled(part, whole, rows)
        return
    places = present_pieces(source, offsets, table_bytes, block)
    table = np.searchsorted(offsets, places, side="right") - 1
    inside = (places - offsets[table]) // block
    parts = _parts_to_fill(np.bincount(table, minlength=len(offsets)), table_bytes)
    bounds = np.searchsorted(table, [part.start for part in parts] + [len(offsets)]).tolist()
    pieces = [slice(low, high) for low, high in itertools.pairwise(bounds)]
    kept = np.arange(max(1, -(-min(head, table_bytes) // block)))
    for part, (some, rows) in zip(parts, read_parts(source, places, block, pieces), strict=True):
        blocks = distinct(np.concatenate((kept, inside[some])))
        filled = np.zeros((part.stop - part.start, len(blocks), block), dtype=np.uint8)
        filled[table[some] - part.start, np.searchsorted(blocks, inside[some])] = rows
        yield Filled(part, blocks, filled.reshape(len(filled), -1))


def _parts_to_fill(count: I64, table_bytes: int) -> list[slice]:
    """Which tables are read at a time; *count*: the blocks that there are of each.

    Those of one part become rows of the blocks that any of them has: so it is few blocks
    altogether, or few tables.
    """
    if not len(count):
        return []
    is_full = count > FEW_BLOCKS
    share = np.where(is_full, 1 / max(1, BATCH_BYTES // table_bytes), count / FEW_BLOCKS)
    number = np.cumsum(share).astype(np.int64)
    breaks = np.flatnonzero((np.diff(number) != 0) | np.diff(is_full)) + 1
    return [slice(*ends) for ends in itertools.pairwise([0, *breaks.tolist(), len(count)])]


def _read_ahead(
    executor: Executor,
    source: Source,
    offsets: I64,
    parts: Sequence[slice],
    shape: tuple[int, int],
) -> Iterator[tuple[slice, U8]]:
    """Read *parts* while the caller is busy with the ones before.

    One ahead to begin with; twice as many each time that the caller had to wait, up to
    `BATCHES_AHEAD` and `AHEAD_BYTES`: what lies in memory needs no crowd of threads, what is far
    away does.
    """
    pending: deque[tuple[slice, U8, Reading]] = deque()
    free: list[U8] = []
    limit = min(BATCHES_AHEAD, max(1, AHEAD_BYTES // max(1, shape[0] * shape[1])))
    ahead, begun = 1, 0
    try:
        for _ in parts:
            while begun < len(parts) and len(pending) <= ahead:
                part = parts[begun]
                buffer = free.pop() if free else np.empty(shape, dtype=np.uint8)
                rows = buffer[: part.stop - part.start]
                reading = executor.submit(_fetch, source, offsets[part], rows)
                pending.append((part, buffer, reading))
                begun += 1
            part, buffer, reading = pending.popleft()
            if not reading.done():
                ahead = min(2 * ahead, limit)
            reading.result()
            yield part, buffer[: part.stop - part.start]
            free.append(buffer)
    finally:
        for _, _, left in pending:
            left.cancel()


def _fetch(source: Source, offsets: I64, rows: U8) -> None:
    """Fill rows[i] from offsets[i], neighbours in one request."""
    if not len(offsets):
        return
    table_bytes = rows.shape[1]
    steps = np.diff(offsets)
    breaks = (np.flatnonzero((steps < 0) | (steps > table_bytes + GAP_BYTES)) + 1).tolist()
    for low, high in itertools.pairwise([0, *breaks, len(offsets)]):
        start = int(offsets[low])
        if (steps[low : high - 1] == table_bytes).all():
            source.read_into(start, rows[low:high].reshape(-1).data)
            continue
        length = int(offsets[high - 1]) + table_bytes - start
        if length > max(MAX_SPAN_BYTES, 2 * table_bytes + GAP_BYTES):
            middle = (low + high) // 2
            _fetch(source, offsets[low:middle], rows[low:middle])
            _fetch(source, offsets[middle:high], rows[middle:high])
            continue
        span = np.empty(length, dtype=np.uint8)
        source.read_into(start, span.data)
        windows = np.lib.stride_tricks.sliding_window_view(span, table_bytes)
        rows[low:high] = windows[offsets[low:high] - start]
