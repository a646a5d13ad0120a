"""The list of what a copy holds, in the format of GNU ddrescue's mapfiles.

Text in, columns out, and back; what is copied from where is nobody's business here. Source: GNU
ddrescue manual, "Mapfile structure".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.arrays import I64, U8, distinct
from planner.errors import NotAMapfile

UNTRIED, BAD, READ = b"?-+"
"""What became of a block: not tried yet, could not be read, finished."""

_AS_UNTRIED = b"*/"
"""ddrescue's own steps between the two: parts of such a block may be there, or not."""

_LINES_AT_ONCE = 1 << 12

_STATUS_HEADING = "# current_pos  current_status  current_pass"
_BLOCK_HEADING = "#      pos        size  status"


@dataclass(frozen=True, slots=True)
class Mapfile:
    """Blocks of ``size`` bytes, adjacent and ascending, no two neighbours of the same status.

    ``start``: where each begins. ``status``: UNTRIED, BAD or READ. ``position``: where the next is
    to be tried. ``remarks``: comment lines without their ``#``.
    """

    size: int
    start: I64
    status: U8
    position: int = 0
    remarks: tuple[str, ...] = ()

    @classmethod
    def untried(cls, size: int, remarks: tuple[str, ...] = ()) -> Mapfile:
        """Nothing of it has been tried."""
        start = np.zeros(1 if size else 0, dtype=np.int64)
        return cls(size, start, np.full(len(start), UNTRIED, dtype=np.uint8), 0, remarks)

    @property
    def length(self) -> I64:
        """Bytes of each block."""
        return np.diff(self.start, append=self.size)

    def blocks(self, *status: int) -> list[tuple[int, int]]:
        """Start and end of what has one of these statuses, neighbours together."""
        chosen = np.isin(self.status, status)
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        bounds = np.append(self.start, self.size)[edges].reshape(-1, 2)
        return [(start, end) for start, end in bounds.tolist()]

    def bytes_of(self, status: int) -> int:
        """How many have that status."""
        return int(self.length[self.status == status].sum())

    def overlaid(self, blocks: Sequence[tuple[int, int, int]] | I64) -> Mapfile:
        """The same where (start, end, status) of *blocks*, ascending and apart, do not say more."""
        if not len(blocks):
            return self
        start, end, status = np.asarray(blocks, dtype=np.int64).T
        points = distinct(np.concatenate((self.start, start, end[end < self.size])))
        over = np.searchsorted(start, points, side="right") - 1
        covered = (over >= 0) & (points < end[over])
        under = self.status[np.searchsorted(self.start, points, side="right") - 1]
        return replace(self, start=points, status=np.where(covered, status[over], under)).joined()

    def joined(self) -> Mapfile:
        """Neighbours of the same status as one."""
        first = np.ones(len(self.start), dtype=np.bool_)
        first[1:] = self.status[1:] != self.status[:-1]
        return replace(self, start=self.start[first], status=self.status[first].astype(np.uint8))

    def render(self) -> Iterator[bytes]:
        """The text, in parts."""
        done = "?" if (self.status == UNTRIED).any() else "+"
        lines = [*(f"# {remark}" for remark in self.remarks), _STATUS_HEADING]
        lines += [f"0x{self.position:08X}     {done}               1", _BLOCK_HEADING]
        yield "".join(f"{line}\n" for line in lines).encode()
        length = self.length
        for at in range(0, len(self.start), _LINES_AT_ONCE):
            part = slice(at, at + _LINES_AT_ONCE)
            columns = (self.start[part], length[part], self.status[part])
            rows = zip(*(column.tolist() for column in columns), strict=True)
            yield "".join(f"0x{a:08X}  0x{n:08X}  {chr(s)}\n" for a, n, s in rows).encode()


def parse_mapfile(text: bytes) -> Mapfile:
    """Read one. Raises `NotAMapfile`."""
    remarks, position, starts, statuses, end = [], -1, [], [], 0
    for number, line in enumerate(text.decode("utf-8", "replace").split("\n"), 1):
        content, mark, remark = line.partition("#")
        words = content.split()
        if mark and not words:
            remarks.append(remark.strip())
        if not words:
            continue
        try:
            if position < 0:
                position, _ = int(words[0], 0), words[1]
                continue
            start, length, (status,) = int(words[0], 0), int(words[1], 0), words[2].encode()
        except (ValueError, IndexError) as error:
            raise NotAMapfile(number, "it is no line of a mapfile") from error
        if start != end or length <= 0 or start + length >= 1 << 63:
            raise NotAMapfile(number, "its block does not follow the one before it")
        if status not in (UNTRIED, BAD, READ, *_AS_UNTRIED):
            raise NotAMapfile(number, "its status is none of a mapfile's")
        starts.append(start)
        statuses.append(UNTRIED if status in _AS_UNTRIED else status)
        end = start + length
    if position < 0:
        raise NotAMapfile(1, "there is no status line")
    return Mapfile(
        end,
        np.array(starts, dtype=np.int64),
        np.array(statuses, dtype=np.uint8),
        position,
        tuple(remarks),
    ).joined()
