"""Persistent bitmaps as somebody looks at them: how much is dirty, and what is wrong with each.

Reads the directory, the tables and, where a table does not already say it, the bits. One broken
bitmap does not hide the others. Source: docs/interop/qcow2.txt, "Bitmaps"; load_bitmap_data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U8, U64
from planner.errors import ImageError
from planner.metadata.work_limits import LIMITS, Limits, followed_tables
from planner.progress import Meter, Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.bitmaps import IN_USE, Bitmap, Refusal, list_bitmaps
from planner.qcow2.geometry import SECTOR, Geometry
from planner.qcow2.layout import Layout
from planner.source import (
    HOLE,
    READABLE_END,
    Source,
    nonzero_words,
    present_pieces,
    read_tables,
)


@dataclass(frozen=True, slots=True)
class BitmapState:
    """One bitmap. ``dirty``: guest bytes, of the part that could be read; None: of no part.

    ``data_clusters``: that its table refers to. ``problems``: what is wrong with it, of tens of
    thousands as short as it was found.
    """

    bitmap: Bitmap
    dirty: int | None
    data_clusters: int
    problems: tuple[ImageError | Refusal, ...]

    @property
    def errors(self) -> tuple[ImageError, ...]:
        """The same as errors, made each time."""
        return tuple(
            each.of(self.bitmap) if isinstance(each, Refusal) else each for each in self.problems
        )


@dataclass(frozen=True, slots=True)
class BitmapStates:
    """All bitmaps that the directory lists. ``error``: why it may have listed more.

    ``stale``: a program that does not know of bitmaps has written to the image, and there are none
    any more.
    """

    bitmaps: tuple[BitmapState, ...] = ()
    error: ImageError | None = None
    stale: bool = False


def read_bitmap_states(
    source: Source, progress: Progress = tell_nobody, limits: Limits = LIMITS
) -> BitmapStates:
    """The bitmaps of an image. *progress*: bytes read, of each of them.

    Raises `ImageError` where the header does not say where they are.
    """
    layout = Layout.read(source)
    pointer = layout.extensions.bitmaps
    if pointer is None:
        return BitmapStates(stale=layout.extensions.stale_bitmaps)
    listed = list_bitmaps(source, pointer, layout.geometry)
    reader = _Reader(source, layout.geometry, Meter(progress), limits)
    followed = np.zeros(len(listed), dtype=np.bool_)
    offset, size = listed.entries.select(listed.is_sound).tables()
    followed[listed.is_sound] = followed_tables(offset, size, source.size)
    states = [
        reader.look_at(bitmap, wrong, is_followed=each)
        for (bitmap, wrong), each in zip(listed, followed.tolist(), strict=True)
    ]
    return BitmapStates(tuple(states), listed.error)


def unsaved_bitmaps(source: Source, layout: Layout) -> Sequence[Bitmap]:
    """Those that are marked as in use, as far as the directory can be read.

    Of an image that nobody writes to they were never saved: QEMU finds them inconsistent.
    """
    pointer = layout.extensions.bitmaps
    if pointer is None:
        return ()
    listed = list_bitmaps(source, pointer, layout.geometry)
    in_use = listed.entries.fields()["flags"] & np.uint32(IN_USE) != 0
    return listed.entries.select(listed.is_sound & in_use)


class _Reader:
    """Looks at one bitmap after the other, and reads only so much of all of them."""

    def __init__(self, source: Source, geometry: Geometry, meter: Meter, limits: Limits) -> None:
        self._source, self._geometry, self._meter = source, geometry, meter
        self._room, self._cost = limits.bitmap_bytes, limits.bitmap_cost

    def look_at(self, bitmap: Bitmap, wrong: Refusal | None, *, is_followed: bool) -> BitmapState:
        """*wrong*: with its directory entry; then there is no table to believe. *is_followed*:
        whether its table is looked at, which may lie over others.
        """
        if wrong is not None:
            return BitmapState(bitmap, None, 0, (wrong,))
        offset, size = bitmap.bitmap_table_offset, bitmap.bitmap_table_size
        field = f"table of the bitmap at {bitmap.offset}"
        if offset + size * 8 > READABLE_END:
            error = ImageError(field, offset, "past the end of any file")
            return BitmapState(bitmap, None, 0, (error,))
        if not is_followed:
            error = ImageError(field, offset, "not counted: it lies over others, as more do")
            return BitmapState(bitmap, None, 0, (error,))
        table_bytes = min(size * 8, max(0, self._source.size - offset))
        if not self._spend(max(self._cost, table_bytes)):
            return BitmapState(bitmap, None, 0, (_too_much(field, size * 8),))
        index, words = nonzero_words(self._source, offset, size)
        errors = self._judge(field, words, offset + size * 8)
        sound = ~entries.bad_bitmap_entries(words, self._geometry)
        index, words = index[sound], words[sound]
        data = (words & np.uint64(entries.BITMAP_OFFSET)).astype(np.int64)
        has_data = data != 0
        granules = _Granules(bitmap, self._geometry)
        dirty = int(granules.covered(index[~has_data]).sum())
        if self._spend(int(np.count_nonzero(has_data)) * self._geometry.cluster_size):
            dirty += self._count(granules, index[has_data], data[has_data])
        else:
            errors.append(_too_much(field, int(np.count_nonzero(has_data))))
        return BitmapState(bitmap, dirty, int(np.count_nonzero(has_data)), tuple(errors))

    def _spend(self, amount: int) -> bool:
        if amount > self._room:
            return False
        self._room -= amount
        return True

    def _judge(self, field: str, words: U64, end: int) -> list[ImageError]:
        """What is wrong with a table that ends at host offset *end*, and its entries."""
        cluster, size = self._geometry.cluster_size, self._source.size
        errors = []
        if end - size >= cluster:
            errors.append(ImageError(field, end, "it ends past the end of the file"))
        bad = entries.bad_bitmap_entries(words, self._geometry)
        if bad.any():
            number, first = int(np.count_nonzero(bad)), int(words[bad][0])
            what = f"{number} invalid entries, of which this is the first: not counted"
            errors.append(ImageError(field, f"{first:#x}", what))
        data = (words[~bad] & np.uint64(entries.BITMAP_OFFSET)).astype(np.int64)
        lost = data + cluster - size >= cluster
        if lost.any():
            what = f"{int(np.count_nonzero(lost))} data clusters lie past the end of the file"
            errors.append(ImageError(field, int(data[lost][0]), what))
        return errors

    def _count(self, granules: _Granules, index: I64, data: I64) -> int:
        """Dirty bytes in data clusters: *index* of their table entries, *data* host offsets.

        Where there is nothing nothing is read, and what several entries lead to is read once.
        """
        size = self._geometry.cluster_size
        place, times = np.unique(data[index < granules.whole], return_counts=True)
        piece = min(HOLE, size)
        pieces = present_pieces(self._source, place, size, piece)
        last = data[index == granules.whole]
        dirty = 0
        self._meter.begin("bitmap", len(pieces) * piece + len(last) * size)
        for part, rows in read_tables(self._source, pieces, piece):
            owners = times[np.searchsorted(place, pieces[part], side="right") - 1]
            dirty += int((_ones(rows) * owners).sum()) * granules.size
            self._meter.advance(rows.size)
        for _, rows in read_tables(self._source, last, size):
            dirty += granules.dirty_in_last(rows[0])
            self._meter.advance(rows.size)
        return dirty


class _Granules:
    """The bits of a bitmap on the guest's disk, each a granule of ``size`` bytes."""

    def __init__(self, bitmap: Bitmap, geometry: Geometry) -> None:
        self.size = bitmap.granularity
        self._disk = geometry.virtual_size // SECTOR * SECTOR
        self._bits = geometry.cluster_size * 8
        """Of one table entry."""

    def covered(self, index: I64) -> I64:
        """Guest bytes that table entries stand for; fewer at the end of the disk."""
        span = self._bits * self.size
        # The index of an entry that is not needed may take the product past 64 bits.
        needed = index[index <= self._disk // span]
        return np.minimum(span, self._disk - needed * span)

    @property
    def whole(self) -> int:
        """Of so many table entries, the first, every granule lies wholly on the disk."""
        return self._disk // self.size // self._bits

    def dirty_in_last(self, row: U8) -> int:
        """Dirty bytes of the entry behind these, in which the disk ends."""
        first = self.whole * self._bits
        granules = -(-self._disk // self.size) - first
        bits = np.unpackbits(row, bitorder="little")[:granules]
        dirty = int(np.count_nonzero(bits)) * self.size
        if granules and bits[-1]:
            dirty -= (first + granules) * self.size - self._disk
        return dirty


def _ones(rows: U8) -> I64:
    """How many bits are set in each row, of 8 bytes or several times that.

    Sums of 2, 4 and 8 bits side by side: Warren, Hacker's Delight, 5-1.
    """
    words = rows.view(np.uint64)
    sums = words >> np.uint64(1) & np.uint64(0x5555555555555555)
    np.subtract(words, sums, out=sums)
    more = sums >> np.uint64(2) & np.uint64(0x3333333333333333)
    sums &= np.uint64(0x3333333333333333)
    sums += more
    np.right_shift(sums, np.uint64(4), out=more)
    sums += more
    sums &= np.uint64(0x0F0F0F0F0F0F0F0F)
    sums *= np.uint64(0x0101010101010101)
    sums >>= np.uint64(56)
    ones: I64 = sums.sum(axis=1).astype(np.int64)
    return ones


def _too_much(field: str, value: int) -> ImageError:
    problem = f"not counted: all bitmaps together take over {LIMITS.bitmap_bytes >> 30} GiB to read"
    return ImageError(field, value, problem)
