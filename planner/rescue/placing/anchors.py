"""What says where on the whole disk it lies, before any file system can be read.

Partition tables say where they are themselves. Superblocks and boot sectors say how far they are
from the first byte of their file system: that puts them where the partition table has one, or, if
that is lost, where it fits on the disk at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.arrays import I64
from planner.guestfs.columns import little
from planner.guestfs.ext import superblock as ext
from planner.guestfs.volumes.partitions import (
    EXTENDED,
    MBR_ENTRY,
    SECTOR_SIZES,
    TABLE_AT,
    Table,
)
from planner.guestfs.xfs import superblock as xfs
from planner.rescue.placing.board import Board
from planner.rescue.placing.claims import Claims, Piece, Sort, Spotted
from planner.rescue.placing.votes import Evidence, Votes, without_rivals
from planner.source import SECTOR

MARK = b"\x55\xaa", 510
"""Of a boot sector, and where it is."""

MANY, OF_ONE, WINDOWS = 4096, 64, 4096
"""Superblocks that are looked at; those of one file system; places of it that are tried."""


def spot(piece: Piece) -> Iterator[Spotted]:
    """The claims of partition tables, of physical volumes and of boot sectors."""
    flat = piece.flat
    at = piece.marked(b"EFI PART", 0)
    if len(at):
        yield Sort.GPT, at, little(flat, at + 24, 8), little(flat, at + 32, 8)
    at = piece.marked(b"LABELONE", 0)
    if len(at):
        yield Sort.LVM, at, little(flat, at + 8, 8), np.zeros(len(at), dtype=np.int64)
    at = piece.marked(*MARK)
    if not len(at):
        return
    is_ntfs = _has(piece, at, 3, b"NTFS    ")
    is_fat = (
        _has(piece, at, 3, b"EXFAT   ")
        | _has(piece, at, 82, b"FAT32")
        | _has(piece, at, 54, b"FAT1")
    )
    yield Sort.NTFS_BOOT, at[is_ntfs], *_volume(flat, at[is_ntfs])
    yield Sort.FAT_BOOT, at[is_fat], *_volume(flat, at[is_fat])
    others = at[~is_ntfs & ~is_fat]
    others = others[others % piece.cluster_size == 0]
    none = np.zeros(len(others), dtype=np.int64)
    yield Sort.BOOT, others, none, none


def _has(piece: Piece, at: I64, offset: int, magic: bytes) -> np.ndarray:
    found = np.ones(len(at), dtype=np.bool_)
    for number, byte in enumerate(magic):
        found &= piece.flat[at + offset + number] == byte
    return found


def _volume(flat: np.ndarray, at: I64) -> tuple[I64, I64]:
    return little(flat, at + 0x28, 8), little(flat, at + 0x1C, 4)


# ---- partition tables ----


def weigh_tables(board: Board, claims: Claims) -> Iterator[Votes]:
    """Votes of partition tables, which say where they are."""
    gpt = claims.of(Sort.GPT)
    for sector in SECTOR_SIZES:
        # The copy at the end has the other's place as 1.
        own = (gpt.key == 1) | (gpt.aux == 1)
        own &= (gpt.key > 0) & (gpt.key < board.size // sector)
        offset = gpt.key * sector
        fits = own & ((offset - gpt.inside) % board.coverage == 0) & (offset >= gpt.inside)
        some = gpt.select(fits)
        window = (offset[fits] - some.inside) // board.coverage
        yield without_rivals(
            Votes(Evidence.SELF_ADDRESS, some.table.astype(np.int64), window, some.inside)
        )
    boot = claims.of(Sort.BOOT)
    boot = boot.select(boot.inside == 0)
    tables = [each for each in boot.table.tolist() if mbr_entries(board, each) is not None]
    table = np.array(tables, dtype=np.int64)
    zeros = np.zeros(len(table), dtype=np.int64)
    yield without_rivals(Votes(Evidence.SELF_ADDRESS, table, zeros, zeros))


def mbr_entries(board: Board, table: int) -> npt.NDArray[np.void] | None:
    """The partitions of the master boot record that *table* begins with, if it has one.

    None where the disk has no room for them.
    """
    raw = board.bytes_of(table, 0, SECTOR)
    entries = np.frombuffer(raw, dtype=MBR_ENTRY, count=4, offset=TABLE_AT)
    if not np.isin(entries["boot"], (0, 0x80)).all():
        return None
    used = entries[(entries["type"] != 0) & (entries["sectors"] > 0)]
    start = used["start"].astype(np.int64)
    end = start + used["sectors"].astype(np.int64)
    is_protective = (used["type"] == 0xEE) | np.isin(used["type"], EXTENDED)
    inside = (end <= board.size // SECTOR) | is_protective
    return used if len(used) and (start > 0).all() and inside.all() else None


# ---- superblocks ----


@dataclass(frozen=True, slots=True)
class Anchor:
    """A superblock or boot sector: ``table`` has it ``inside`` bytes from where its window begins.

    ``offsets``: how far from the first byte of the file system it may be. ``size``: of that.
    ``name``: which file system it is. ``start``: where on the disk it begins, if it says so.
    """

    table: int
    inside: int
    offsets: tuple[int, ...]
    size: int
    name: tuple[object, ...]
    start: int = 0


def find_anchors(board: Board, claims: Claims) -> list[Anchor]:
    """All of tables that wait for a place, `MANY` at most."""
    waiting = set(board.waiting.tolist())
    sorts = (Sort.EXT_SUPER, Sort.XFS_SUPER, Sort.NTFS_BOOT, Sort.FAT_BOOT, Sort.LVM)
    some = claims.of(*sorts)
    rows = zip(some.sort.tolist(), some.table.tolist(), some.inside.tolist(), strict=True)
    found = []
    for sort, table, inside in list(rows)[:MANY]:
        if table in waiting:
            anchor = _READ[Sort(sort)](board, table, inside)
            if anchor is not None:
                found.append(anchor)
    return found


def _ext(board: Board, table: int, inside: int) -> Anchor | None:
    raw = board.bytes_of(table, inside, ext.SIZE)
    if not ext.is_sound(raw):
        return None
    found = ext.Superblock(raw, 1 << 62)
    group = found.group_number
    offset = found.group_start(group) * found.block_size if group else ext.OFFSET
    size = found.claimed_blocks * found.block_size
    return Anchor(table, inside, (offset,), size, ("ext", found.raw_uuid))


def _xfs(board: Board, table: int, inside: int) -> Anchor | None:
    raw = board.bytes_of(table, inside, xfs.SIZE)
    if not xfs.is_sound(raw):
        return None
    found = xfs.Superblock(raw, 1 << 62)
    header = board.bytes_of(table, inside + found.sector_size, SECTOR)
    if header[:4] != b"XAGF":
        return None
    group = int.from_bytes(header[8:12], "big")
    offset = group * found.ag_blocks * found.block_size
    size = found.claimed_blocks * found.block_size
    return Anchor(table, inside, (offset,), size, ("xfs", found.raw_uuid))


def _ntfs(board: Board, table: int, inside: int) -> Anchor | None:
    raw = board.bytes_of(table, inside, SECTOR)
    sector, sectors = (int.from_bytes(raw[a : a + n], "little") for a, n in ((0x0B, 2), (0x28, 8)))
    if sector not in (512, 1024, 2048, 4096) or not 0 < sectors < 1 << 50:
        return None
    start = int.from_bytes(raw[0x1C:0x20], "little") * sector
    size = (sectors + 1) * sector
    return Anchor(table, inside, (0, sectors * sector), size, ("ntfs", raw[0x48:0x50]), start)


def _fat(board: Board, table: int, inside: int) -> Anchor | None:
    raw = board.bytes_of(table, inside, SECTOR)
    if raw[3:11] == b"EXFAT   ":
        start, size = (int.from_bytes(raw[a : a + 8], "little") * SECTOR for a in (0x40, 0x48))
        return Anchor(table, inside, (0, 12 * SECTOR), size, ("exfat", raw[0x64:0x68]), start)
    sector = int.from_bytes(raw[0x0B:0x0D], "little")
    sectors = int.from_bytes(raw[0x13:0x15], "little") or int.from_bytes(raw[0x20:0x24], "little")
    if sector not in (512, 1024, 2048, 4096) or not sectors:
        return None
    start = int.from_bytes(raw[0x1C:0x20], "little") * sector
    offsets = (0, 6 * sector) if raw[82:87] == b"FAT32" else (0,)
    serial = raw[0x43:0x47] if raw[82:87] == b"FAT32" else raw[0x27:0x2B]
    return Anchor(table, inside, offsets, sectors * sector, ("fat", serial), start)


def _lvm(board: Board, table: int, inside: int) -> Anchor | None:
    raw = board.bytes_of(table, inside, SECTOR)
    sector = int.from_bytes(raw[8:16], "little")
    if sector > 3 or int.from_bytes(raw[20:24], "little") > SECTOR - 40:
        return None
    header = 0 + int.from_bytes(raw[20:24], "little")
    size = int.from_bytes(raw[header + 32 : header + 40], "little")
    return Anchor(table, inside, (sector * SECTOR,), size, ("lvm", raw[header : header + 32]))


_READ = {
    Sort.EXT_SUPER: _ext,
    Sort.XFS_SUPER: _xfs,
    Sort.NTFS_BOOT: _ntfs,
    Sort.FAT_BOOT: _fat,
    Sort.LVM: _lvm,
}


def weigh_anchors(board: Board, anchors: list[Anchor], table: Table | None) -> Iterator[Votes]:
    """Where superblocks put tables: by the partition *table*, or by what room there is."""
    if table is not None:
        places = [(each.start, each.length) for each in table.partitions]
        yield _votes(board, [(each, start) for each in anchors for start, length in places
                             if length // 8 * 7 <= each.size <= length])  # fmt: skip
        return
    names = {each.name for each in anchors}
    for name in sorted(names, key=repr):
        mine = [each for each in anchors if each.name == name][:OF_ONE]
        start = _only_start(board, mine)
        if start is not None:
            yield _votes(board, [(each, start) for each in mine])


def _votes(board: Board, fits: list[tuple[Anchor, int]]) -> Votes:
    rows = []
    for anchor, start in fits:
        for offset in anchor.offsets:
            window, rest = divmod(start + offset - anchor.inside, board.coverage)
            if rest == 0 and window >= 0:
                rows.append((anchor.table, window, anchor.inside))
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return without_rivals(Votes(Evidence.SELF_ADDRESS, *columns))


def _only_start(board: Board, anchors: list[Anchor]) -> int | None:
    """Where the file system begins that *anchors* are of, if there is one place only."""
    rests = likely_rests(board, anchors)
    starts = [start for rest in rests for start in _feasible(board, anchors, rest)]
    said = {each.start for each in anchors if each.start} & set(starts)
    if len(said) == 1:
        return said.pop()
    return starts[0] if len(starts) == 1 else None


def likely_rests(board: Board, anchors: list[Anchor]) -> list[int]:
    """How far from where a window begins the file system may begin that *anchors* are of: what most
    of them say."""
    support: dict[int, int] = {}
    for each in anchors:
        for rest in {(each.inside - offset) % board.coverage for offset in each.offsets}:
            support[rest] = support.get(rest, 0) + 1
    most = max(support.values())
    return [rest for rest, count in support.items() if count == most]


def _feasible(board: Board, anchors: list[Anchor], rest: int) -> Iterator[int]:
    """The places of the disk on which all of it fits, *rest* bytes into a window."""
    size = max(each.size for each in anchors)
    last = (board.size - size - rest) // board.coverage
    if last >= WINDOWS:
        return
    for number in range(max(0, last + 1)):
        start = rest + number * board.coverage
        windows = [
            (start + offset - each.inside) // board.coverage
            for each in anchors
            for offset in each.offsets
            if (start + offset - each.inside) % board.coverage == 0
        ]
        if windows and board.are_vacant(np.array(windows)).all():
            yield start
