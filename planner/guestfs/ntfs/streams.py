"""Alternate streams of NTFS: each has a number of its own, which its file's and its name give.

That is shown as a file of its own, ``name:stream``.
"""

from __future__ import annotations

import numpy as np

from planner.arrays import I64, U8
from planner.guestfs.checksums import CRC16, crc
from planner.guestfs.ntfs.attributes import (
    DATA,
    FIRST_FILE,
    MFT,
    NUMBER_BITS,
    ROOT,
    Attributes,
    Records,
)


def inodes_of(records: Records, attributes: Attributes) -> I64:
    """Of each attribute the number of its file, or of its stream."""
    base = np.where(records.base > 0, records.base, records.number)[attributes.row]
    # The MFT's own records that go on have it as their base, whose number is 0.
    goes_on = (records.base == 0) & (records.base_use > 0)
    base[goes_on[attributes.row]] = MFT
    is_stream = (attributes.type == DATA) & (attributes.name_length > 0)
    at = np.flatnonzero(is_stream & ((base >= FIRST_FILE) | (base == ROOT)))
    return _with_streams(base, records.flat, attributes, at)


def _with_streams(base: I64, flat: U8, attributes: Attributes, at: I64) -> I64:
    """*base*, of the streams in rows *at* with a number that their names give above it."""
    if not len(at):
        return base
    many = attributes.name_length[at]
    column = np.arange(2 * int(many.max()))
    within = column < 2 * many[:, None]
    place = np.where(within, attributes.name[at][:, None] + column, 0)
    value = crc(np.where(within, flat[place], 0).astype(np.uint8), 0xFFFF, CRC16).astype(np.int64)
    base[at] |= (1 + value % ((1 << 15) - 1)) << NUMBER_BITS
    return base
