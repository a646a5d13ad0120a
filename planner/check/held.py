"""The metadata of an image that changes meanwhile, held still: a source in which it is of a moment.

Two looks at everything between which no word differs: each word held from its first look to its
second, so all of them held together at the moment when the first look had ended and the second had
not begun (Afek and others, "Atomic snapshots of shared memory": a double collect). Reads go through
the page cache, where a word of eight bytes is read whole and nothing longer needs to be: what tears
differs in the second look. Which ranges are metadata, and how long it is worth trying, is the
caller's business.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from planner.arrays import I64, U64, join_ranges
from planner.source import READ_ANYWAY_BYTES, SECTOR, Source, executor_of, join_extents

Look = Callable[[], Source]
"""The image as it is now: a source with as many bytes as there are now."""

WHOLE_BYTES = 1 << 30
"""So much metadata is held as it is; of more only digests, which is read once more to be used."""

PIECE_BYTES = 1 << 16
"""One digest is of so much."""

ASIDE_BYTES = 8 << 20
"""From here on several threads read."""

_DIGEST_WORDS = 2


class Held:
    """The ranges of metadata that were added, as they were at the last look; the rest as it is.

    A source. ``is_whole``: whether reads of what is held come from memory. Otherwise they come from
    the image, and a look after them has to find that nothing has changed.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self._source = look()
        nothing = np.zeros(0, dtype=np.int64)
        self._ranges = self._extents = nothing, nothing
        self._at: I64 = nothing
        self._words: U64 = np.zeros(0, dtype=np.uint64)
        self.is_whole = True

    @property
    def size(self) -> int:
        return self._source.size

    def add(self, start: I64, end: I64) -> bool:
        """Hold these ranges of the file too, as from the next look; whether one is new."""
        start = start // SECTOR * SECTOR
        end = np.minimum(-(-end // SECTOR), -(-self.size // SECTOR)) * SECTOR
        some = end > start
        known_start, known_end = self._ranges
        joined = join_ranges(
            np.concatenate((known_start, start[some])), np.concatenate((known_end, end[some]))
        )
        is_new = not all(map(np.array_equal, joined, self._ranges))
        self._ranges = joined
        return is_new

    def look_again(self) -> int:
        """Read all of it once more: how many words differ from the last time, of all that is held.

        Where it was not the same ranges, or the file is shorter, that is one at least.
        """
        before, size = (*self._extents, self._words), self.size
        self._source = self._look()
        start, end = self._extents = self._clipped(*self._ranges)
        lengths = end - start
        self.is_whole = int(lengths.sum()) <= WHOLE_BYTES
        self._at = np.cumsum(lengths) - lengths
        self._words = self._read() if self.is_whole else self._digest()
        is_same = np.array_equal(before[0], start) and np.array_equal(before[1], end)
        if not is_same or len(before[2]) != len(self._words):
            return max(1, len(self._words) - len(before[2]))
        return int(np.count_nonzero(before[2] != self._words)) + (self.size < size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As of any source."""
        start, end = self._extents
        if not self.is_whole or not len(start):
            self._source.read_into(offset, buffer)
            return
        view = buffer.cast("B")
        stop = offset + len(view)
        low = int(np.searchsorted(end, offset, side="right"))
        held = memoryview(self._words.view(np.uint8).data)
        if low < len(start) and start[low] <= offset and stop <= end[low]:
            at = int(self._at[low]) + offset - int(start[low])
            view[:] = held[at : at + len(view)]
            return
        self._source.read_into(offset, view)
        for each in range(low, int(np.searchsorted(start, stop, side="left"))):
            first, last = max(offset, int(start[each])), min(stop, int(end[each]))
            at = int(self._at[each]) + first - int(start[each])
            view[first - offset : last - offset] = held[at : at + last - first]

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """As of any source: whatever is held may be data."""
        beneath = self._source.data_extents(offset, length)
        return join_extents(heapq.merge(self._held_extents(offset, offset + length), beneath))

    def _held_extents(self, offset: int, stop: int) -> Iterator[tuple[int, int]]:
        start, end = self._extents
        stop = min(stop, self.size)
        for each in range(int(np.searchsorted(end, offset, side="right")), len(start)):
            if start[each] >= stop:
                return
            yield max(offset, int(start[each])), min(stop, int(end[each]))

    def _clipped(self, start: I64, end: I64) -> tuple[I64, I64]:
        """The ranges without holes, where they are so long that these would cost something."""
        if int((end - start).sum()) <= READ_ANYWAY_BYTES:
            return start, end
        there: list[tuple[int, int]] = []
        for low, high in zip(start.tolist(), end.tolist(), strict=True):
            there += self._source.data_extents(low, high - low)
        first, last = np.array(there, dtype=np.int64).reshape(-1, 2).T
        return join_ranges(first // SECTOR * SECTOR, -(-last // SECTOR) * SECTOR)

    def _read(self) -> U64:
        """All that is held."""
        start, end = self._extents
        words = np.empty(int((end - start).sum()) // 8, dtype=np.uint64)
        memory = memoryview(words.view(np.uint8).data)

        def read(first: int, stop: int) -> None:
            rows = zip(start[first:stop], end[first:stop], self._at[first:stop], strict=True)
            for low, high, at in rows:
                self._source.read_into(int(low), memory[int(at) : int(at) + int(high - low)])

        executor = executor_of(self._source)
        if executor is None or len(memory) < ASIDE_BYTES:
            read(0, len(start))
            return words
        cuts = np.searchsorted(self._at, np.arange(0, len(memory), ASIDE_BYTES // 2))
        parts = list(zip(cuts, [*cuts[1:], len(start)], strict=True))
        for reading in [executor.submit(read, int(low), int(high)) for low, high in parts]:
            reading.result()
        return words

    def _digest(self) -> U64:
        """In place of all that, two words for each piece of it."""
        pieces = bytearray()
        buffer = memoryview(bytearray(PIECE_BYTES))
        for low, high in zip(*(column.tolist() for column in self._extents), strict=True):
            for at in range(low, high, PIECE_BYTES):
                part = buffer[: min(PIECE_BYTES, high - at)]
                self._source.read_into(at, part)
                pieces += hashlib.blake2b(part, digest_size=_DIGEST_WORDS * 8).digest()
        return np.frombuffer(bytes(pieces), dtype=np.uint64)
