"""Sources that are not a few bytes: sparse, huge, and with a record of what was asked of them."""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Sparse:
    """A source of which only some *blocks* are there, each *block* bytes long; the rest are holes.

    ``bytes_read`` and ``asked`` record what was read and which extents were asked for.
    """

    blocks: dict[int, bytes]
    size: int
    block: int = 512
    bytes_read: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)
    _order: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, data: bytes, size: int, block: int = 512) -> "Sparse":
        """*data*, followed by a hole up to *size*."""
        parts = {at // block: data[at : at + block] for at in range(0, len(data), block)}
        return cls({at: part for at, part in parts.items() if any(part)}, size, block)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.bytes_read += len(buffer)
        buffer[:] = bytes(len(buffer))
        first, last = offset // self.block, (offset + len(buffer) - 1) // self.block
        span = range(first, last + 1)
        numbers = span if len(span) < len(self.blocks) else self.blocks
        for number in numbers:
            if number in self.blocks and number in span:
                self._copy(number * self.block - offset, self.blocks[number], buffer)

    @staticmethod
    def _copy(at: int, part: bytes, buffer: memoryview) -> None:
        part = part[max(0, -at) :]
        at = max(0, at)
        part = part[: len(buffer) - at]
        buffer[at : at + len(part)] = part

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        self.asked.append((offset, length))
        numbers = sorted(self.blocks) if len(self._order) != len(self.blocks) else self._order
        self._order = numbers
        low = bisect.bisect_left(numbers, offset // self.block)
        high = bisect.bisect_left(numbers, -(-(offset + length) // self.block))
        for number in numbers[low:high]:
            start, end = number * self.block, (number + 1) * self.block
            start, end = max(start, offset), min(end, offset + length, self.size)
            if start < end:
                yield start, end
