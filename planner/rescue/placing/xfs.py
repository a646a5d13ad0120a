"""XFS: from version 5 on every block of metadata says where it lies, and of which file system.

Blocks have their address in sectors, records of files their number, and headers of allocation
groups that of their group. Source: the kernel's xfs-self-describing-metadata.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.guestfs.columns import big
from planner.guestfs.xfs.filesystem import Xfs
from planner.guestfs.xfs.superblock import SIZE, is_sound
from planner.rescue.placing.claims import Claims, Piece, Sort, Spotted, uuid_half
from planner.rescue.placing.sites import Site
from planner.rescue.placing.votes import Evidence, Votes
from planner.source import SECTOR

BLOCKS = (
    # Magic and where it is; where the address and the UUID are.
    ((b"AB3B", b"AB3C", b"IAB3", b"FIB3", b"RMB3", b"R3FC"), 0, 16, 32),
    ((b"BMA3",), 0, 24, 40),
    ((b"XDB3", b"XDD3", b"XDF3"), 0, 8, 24),
    ((b"\x3b\xee\0\0", b"\x3d\xf1\0\0", b"\x3d\xff\0\0", b"\x3e\xbe\0\0"), 8, 16, 32),
    ((b"XARM", b"XSLM"), 0, 40, 16),
)

RECORD = b"IN"
LOG = b"\xfe\xed\xba\xbe"
"""Of a record of the log, which says in which sector of the log it is."""

GROUP_HEADERS = ((b"XAGF", 1, 8, 64), (b"XAGI", 2, 8, 296), (b"XAFL", 3, 4, 8))
"""Magic; in which sector of the group; where its number and the UUID are."""


def spot(piece: Piece) -> Iterator[Spotted]:
    """The claims of blocks of XFS."""
    flat = piece.flat
    for magics, offset, address, uuid in BLOCKS:
        for magic in magics:
            at = piece.marked(magic, offset)
            if len(at):
                yield Sort.XFS_BLOCK, at, big(flat, at + address, 8), uuid_half(flat, at + uuid)
    at = piece.marked(RECORD, 0)
    at = at[flat[at + 4] == 3] if len(at) else at
    if len(at):
        yield Sort.XFS_INODE, at, big(flat, at + 152, 8), uuid_half(flat, at + 160)
    for magic, sector, number, uuid in GROUP_HEADERS:
        at = piece.marked(magic, 0)
        if len(at):
            key = big(flat, at + number, 4) * 4 + sector
            yield Sort.XFS_GROUP, at, key, uuid_half(flat, at + uuid)
    at = piece.marked(LOG, 0)
    if len(at):
        yield Sort.XFS_LOG, at, big(flat, at + 20, 4), uuid_half(flat, at + 304)
    at = piece.marked(b"XFSB", 0)
    kept = [place for place in at.tolist() if is_sound(flat[place : place + SIZE].tobytes())]
    if kept:
        at = np.array(kept, dtype=np.int64)
        yield Sort.XFS_SUPER, at, np.zeros(len(at), dtype=np.int64), uuid_half(flat, at + 32)


def weigh(site: Site, claims: Claims) -> Iterator[Votes]:
    """Votes by an XFS whose superblock is known."""
    filesystem = site.filesystem
    if not isinstance(filesystem, Xfs):
        return
    superblock = filesystem.superblock
    half = int.from_bytes(superblock.meta_uuid[:8], "little", signed=True)
    claims = claims.select(claims.aux == half)
    offset = np.full(len(claims), -1, dtype=np.int64)
    is_block = (claims.sort == Sort.XFS_BLOCK) & (claims.key < superblock.blocks << 7)
    offset[is_block] = claims.key[is_block] * SECTOR
    is_record = claims.sort == Sort.XFS_INODE
    offset[is_record] = superblock.inode_offset(claims.key[is_record])
    is_log = (claims.sort == Sort.XFS_LOG) & (claims.key < superblock.log_blocks << 7)
    log = (
        int(superblock.linear(np.array([superblock.log_start]))[0]) if superblock.log_start else -1
    )
    if log >= 0:
        offset[is_log] = log * superblock.block_size + claims.key[is_log] * SECTOR
    group = (claims.sort == Sort.XFS_GROUP) & (claims.key >> 2 < superblock.ag_count)
    number, sector = claims.key[group] >> 2, claims.key[group] & 3
    start = number * superblock.ag_blocks * superblock.block_size
    offset[group] = start + sector * superblock.sector_size
    offset[(offset < 0) | (offset >= filesystem.size)] = -1
    yield site.votes(Evidence.SELF_ADDRESS, claims, np.arange(len(claims)), offset)
