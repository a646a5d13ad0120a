"""Where btrfs's logical addresses are on the device: chunks, each there once or as copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, Mask
from planner.guestfs.btrfs.items import CHUNK_ITEM, Items
from planner.guestfs.columns import little

HEAD, STRIPE = 48, 32
"""Bytes of a chunk before its stripes, and of each stripe."""

KEY = 17
MAX_COPIES = 4
STRIPED = 8 | 64 | 128 | 256
"""Of the types of chunks: RAID 0, 10, 5 and 6, in which one follows another on several devices."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Chunks, ascending and disjoint: ``start`` and ``length``, logical bytes, and ``copies``,
    shape (n, `MAX_COPIES`), where on this device each is, -1 where there is none.
    """

    start: I64
    length: I64
    copies: I64

    def __len__(self) -> int:
        return len(self.start)

    def places(self, logical: I64, length: I64 | int) -> tuple[I64, I64]:
        """Where ranges are, shape (n, `MAX_COPIES`), -1 where they are not, and how much of each
        is there in one piece.
        """
        if not len(self):
            return np.full((len(logical), MAX_COPIES), -1, dtype=np.int64), np.zeros_like(logical)
        at = np.maximum(np.searchsorted(self.start, logical, side="right") - 1, 0)
        within = logical - self.start[at]
        inside = (within >= 0) & (within < self.length[at])
        copies = self.copies[at]
        there = inside[:, None] & (copies >= 0)
        left = np.clip(np.minimum(length, self.length[at] - within), 0, None)
        return np.where(there, copies + within[:, None], -1), np.where(inside, left, 0)


def chunks_of(items: Items, device: int, size: int) -> Chunks:
    """The chunks in items, as far as they are on *device*, which has *size* bytes."""
    items = items.of(CHUNK_ITEM, HEAD + STRIPE)
    flat, at = items.flat, items.at
    length, kind = little(flat, at, 8), little(flat, at + 24, 8)
    stripes = np.minimum(little(flat, at + 44, 2), (items.size - HEAD) // STRIPE)
    copies = np.full((len(items), MAX_COPIES), -1, dtype=np.int64)
    filled = np.zeros(len(items), dtype=np.int64)
    for number in range(int(stripes.max(initial=0))):
        some = np.flatnonzero((number < stripes) & (kind & STRIPED == 0) & (filled < MAX_COPIES))
        place = at[some] + HEAD + number * STRIPE
        offset = little(flat, place + 8, 8)
        mine = (little(flat, place, 8) == device) & (offset >= 0) & (offset <= size)
        mine &= (length[some] >= 0) & (length[some] <= size - offset)
        some, offset = some[mine], offset[mine]
        copies[some, filled[some]] = offset
        filled[some] += 1
    kept = (items.offset >= 0) & (length > 0) & (items.offset < (1 << 62)) & (length < 1 << 62)
    return _disjoint(items.offset[kept], length[kept], copies[kept])


def chunks_in_array(raw: bytes, device: int, size: int) -> Chunks:
    """Those that the superblock has: keys and chunks, one behind the other."""
    at, found = 0, list[tuple[int, ...]]()
    while at + KEY + HEAD <= len(raw):
        stripes = int.from_bytes(raw[at + KEY + 44 : at + KEY + 46], "little")
        length = HEAD + stripes * STRIPE
        if not stripes or at + KEY + length > len(raw):
            break
        offset = int.from_bytes(raw[at + 9 : at + 17], "little", signed=True)
        found.append((0, 0, raw[at + 8], offset, at + KEY, length))
        at += KEY + length
    row, object_, kind, start, begin, bytes_ = np.array(found, np.int64).reshape(-1, 6).T
    flat = np.frombuffer(raw, dtype=np.uint8)
    return chunks_of(Items(row, object_, kind, start, begin, bytes_, flat), device, size)


def joined(known: Chunks, more: Chunks) -> Chunks:
    """All of both; where they are of the same addresses, *known*."""
    return _disjoint(
        np.concatenate((known.start, more.start)),
        np.concatenate((known.length, more.length)),
        np.concatenate((known.copies, more.copies)),
    )


def _disjoint(start: I64, length: I64, copies: I64) -> Chunks:
    order = np.argsort(start, kind="stable")
    start, length, copies = start[order], length[order], copies[order]
    # Of those that overlap the first: chunks that do are garbage.
    before = np.append(np.iinfo(np.int64).min, np.maximum.accumulate(start + length)[:-1])
    kept: Mask = start >= before[: len(start)]
    return Chunks(start[kept], length[kept], copies[kept])
