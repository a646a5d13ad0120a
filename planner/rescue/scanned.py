"""How far the scans of a file have come, so that one that was stopped goes on.

A scan goes through a file once, in order. What is kept of it is where it is, and which places have
to be looked at again: those that hold metadata, or may. What they hold the file itself says: who
made up what is kept can hide something from a scan, and put nothing into it but where files end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.qcow2.header import CLUSTER_BITS
from planner.source import SECTOR

TABLES, CLAIMS = "tables", "claims"
"""The scan of a whole file, of which no header is known: what may be part of a table, and what says
something of itself."""

MOST_CLUSTER = 1 << CLUSTER_BITS[-1]

PIECE_BYTES = 64 << 10
"""Of which it is told: no block of a file system is larger."""


def whole_end(size: int) -> int:
    """Where the scan of a file of *size* bytes has come to its end: no cluster reaches further."""
    return -(-size // MOST_CLUSTER) * MOST_CLUSTER


def reach_of(done: int) -> int:
    """What leads so far may be an entry to a scan that ends at *done*; a power of two."""
    return 1 << max(40, (2 * done).bit_length())


def _none() -> I64:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Section:
    """One scan: what of a file lies before ``done`` has been looked at.

    ``again``: the places of which something is needed, ascending. ``ends``, ``filled``: sectors
    elsewhere that end in zeros, and how much of each is filled; all bytes, int64.
    """

    done: int = 0
    again: I64 = field(default_factory=_none)
    ends: I64 = field(default_factory=_none)
    filled: I64 = field(default_factory=_none)

    def fits(self, end: int, step: int) -> bool:
        """Whether a scan of a file of *end* bytes in pieces of *step* can have come to this."""
        if self.done % SECTOR or not self.done >= 0 or len(self.ends) != len(self.filled):
            return False
        last = min(self.done, end)
        is_filled = ((self.filled >= 0) & (self.filled <= SECTOR)).all()
        return _ascend(self.again, last, step) and _ascend(self.ends, last, 1) and bool(is_filled)


def _ascend(offset: I64, end: int, step: int) -> bool:
    if not len(offset):
        return True
    inside = bool(offset[0] >= 0 and offset[-1] < end)
    return inside and bool((offset[1:] > offset[:-1]).all() and (offset % step == 0).all())


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What pieces of a file say of themselves, as this process has read them, from ``start`` on.

    A claim a row, as `planner.rescue.placing.claims` has them, but for sectors that end in zeros:
    uint8, and int64 thrice.
    """

    start: int
    sort: U8
    place: I64
    key: I64
    aux: I64

    def select(self, which: Mask) -> Said:
        """Some of the rows."""
        return Said(
            self.start, self.sort[which], self.place[which], self.key[which], self.aux[which]
        )


@dataclass(slots=True)
class Scanned:
    """Scans by their names. ``note``: is called whenever one has come further. ``said``: what the
    scan of the whole file heard; None: that was too much to be kept, or it did not come to its end.
    It is of this process alone: from who kept something elsewhere only places are taken.
    """

    sections: dict[str, Section] = field(default_factory=dict)
    note: Callable[[], None] = lambda: None
    said: Said | None = None
    _running: dict[str, Callable[[], Section]] = field(default_factory=dict)

    def known(self, name: str, end: int, step: int) -> Section:
        """How far the scan of that *name* has come, of a file of *end* bytes in such pieces."""
        section = self.sections.get(name)
        return section if section is not None and section.fits(end, step) else Section()

    def whole(self, size: int, end: int, reach: int) -> tuple[Section, Section] | None:
        """What the scan of the whole file, of *size* bytes, tells of what lies before *end*: tables
        that lead no further than *reach*, and claims. None where it has not come so far.
        """
        tables, claims = (self.known(name, size, SECTOR) for name in (TABLES, CLAIMS))
        done = min(tables.done, claims.done)
        return (tables, claims) if end <= done and reach <= reach_of(done) else None

    def keep(self, name: str, section: Callable[[], Section]) -> None:
        """The scan of that *name* has come further: *section* tells how far, when it is asked."""
        self._running[name] = section
        self.note()

    def gathered(self) -> dict[str, Section]:
        """All of them, as far as they are."""
        self.sections |= {name: section() for name, section in self._running.items()}
        return self.sections
