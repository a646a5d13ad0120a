"""The superblock of XFS: what it says, whether that makes sense, and where its copies are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64
from planner.guestfs.names import written_uuid
from planner.guestfs.reading import Holes
from planner.source import SECTOR, present_tables, read_bytes, read_tables

MAGIC = b"XFSB"
SIZE = 512

FTYPE2, CRC2 = 0x200, 0x100
"""Of ``features2``, which version 4 has."""

FTYPE, SPARSE_INODES, META_UUID, NREXT64, METADIR = 0x1, 0x2, 0x4, 0x20, 0x100
"""Of ``features_incompat``."""

FINOBT, RMAPBT, REFLINK = 0x1, 0x2, 0x4
"""Of ``features_ro_compat``."""

MIN_AG_BLOCKS = 64
NO_INODE_NUMBER = (1 << 64) - 1
"""Where a field that names an inode names none."""

FIELDS = np.dtype(
    {
        "names": [
            "magicnum", "blocksize", "dblocks", "rblocks", "uuid", "logstart", "rootino",
            "rbmino", "rsumino", "agblocks", "agcount", "logblocks", "versionnum", "sectsize",
            "inodesize", "inopblock", "fname", "blocklog", "inodelog", "inopblog", "agblklog",
            "uquotino", "gquotino", "inoalignmt", "dirblklog", "features2",
            "features_ro_compat", "features_incompat", "pquotino", "meta_uuid",
        ],
        "formats": [
            "V4", ">u4", ">u8", ">u8", "V16", ">u8", ">u8",
            ">u8", ">u8", ">u4", ">u4", ">u4", ">u2", ">u2",
            ">u2", ">u2", "V12", "u1", "u1", "u1", "u1",
            ">u8", ">u8", ">u4", "u1", ">u4",
            ">u4", ">u4", ">u8", "V16",
        ],
        "offsets": [
            0, 4, 8, 16, 32, 48, 56,
            64, 72, 84, 88, 96, 100, 102,
            104, 106, 108, 120, 122, 123, 124,
            160, 168, 180, 192, 200,
            212, 216, 232, 248,
        ],
        "itemsize": SIZE,
    }
)  # fmt: skip
"""Those that are used, by the kernel's names without their ``sb_``."""


class Superblock:
    """What one copy says, in Python's numbers; see `FIELDS`.

    ``blocks``, ``ag_count``: what of the file system the source holds. ``root``: 0 where this copy
    does not know it; ``lacks_own``: it does not know the inodes of the realtime section.
    """

    def __init__(self, raw: bytes, source_size: int) -> None:
        """*raw*: `SIZE` bytes that `is_sound` was asked about."""
        fields = np.frombuffer(raw, dtype=FIELDS)[0]
        number = {
            name: int(fields[name]) for name in FIELDS.names or () if FIELDS[name].kind == "u"
        }
        self.is_v5 = number["versionnum"] & 0xF == 5
        incompat = number["features_incompat"] if self.is_v5 else 0
        self.block_size = number["blocksize"]
        self.sector_size = number["sectsize"]
        self.inode_size = number["inodesize"]
        self.ag_blocks = number["agblocks"]
        self.ag_block_bits = number["agblklog"]
        self.inode_bits = number["inopblog"]
        self.claimed_blocks = number["dblocks"]
        self.blocks = min(number["dblocks"], source_size // self.block_size)
        self.ag_count = -(-self.blocks // self.ag_blocks)
        self.realtime_blocks = number["rblocks"]
        self.log_start, self.log_blocks = number["logstart"], number["logblocks"]
        if self.log_start >> self.ag_block_bits >= self.ag_count:
            self.log_start = 0
        is_inside = number["rootino"] >> self.ag_inode_bits < self.ag_count
        self.root = number["rootino"] if is_inside else 0
        self.own_inodes = {
            number[name] for name in ("rbmino", "rsumino", "uquotino", "gquotino", "pquotino")
            if name != "pquotino" or self.is_v5
        } - {0, NO_INODE_NUMBER, self.root}  # fmt: skip
        # The copies that mkfs.xfs writes name the root at best. They do not where it has no such.
        told = {number["rbmino"], number["rsumino"]}
        self.lacks_own = not incompat & METADIR and bool(told & {0, NO_INODE_NUMBER})
        self.dir_block_size = self.block_size << number["dirblklog"]
        self.has_types = bool(incompat & FTYPE if self.is_v5 else number["features2"] & FTYPE2)
        self.has_sparse_inodes = bool(incompat & SPARSE_INODES)
        self.ro_compat = number["features_ro_compat"] if self.is_v5 else 0
        self.raw_uuid: bytes = fields["uuid"].tobytes()
        self.meta_uuid = fields["meta_uuid"].tobytes() if incompat & META_UUID else self.raw_uuid
        self.raw_label: bytes = fields["fname"].tobytes().split(b"\0")[0]

    @property
    def label(self) -> str:
        return self.raw_label.decode("utf-8", "replace")

    @property
    def uuid(self) -> str:
        return written_uuid(self.raw_uuid)

    @property
    def ag_inode_bits(self) -> int:
        """Bits of an inode's number that count within its allocation group."""
        return self.ag_block_bits + self.inode_bits

    @property
    def header_bytes(self) -> int:
        """Of the superblock, the AGF, the AGI and the AGFL, a sector each."""
        return 4 * self.sector_size

    def linear(self, fsblock: I64) -> I64:
        """Where blocks are, -1 for those that there are not."""
        group = fsblock >> self.ag_block_bits
        block = fsblock & ((1 << self.ag_block_bits) - 1)
        return self.linear_in(group, block)

    def linear_in(self, group: I64, block: I64) -> I64:
        """Where block *block* of *group* is, -1 where there is none."""
        inside = (group >= 0) & (group < self.ag_count) & (block >= 0) & (block < self.ag_blocks)
        place = np.where(inside, group, 0) * self.ag_blocks + block
        return np.where(inside & (place < self.blocks), place, -1)

    def inode_offset(self, inode: I64) -> I64:
        """Byte offset of the records of inodes, -1 where there is none."""
        group = inode >> self.ag_inode_bits
        within = inode & ((1 << self.ag_inode_bits) - 1)
        block = self.linear_in(group, within >> self.inode_bits)
        slot = within & ((1 << self.inode_bits) - 1)
        return np.where(block >= 0, block * self.block_size + slot * self.inode_size, -1)


def is_sound(raw: bytes) -> bool:
    """Whether *raw* can be a superblock: of each field that all else rests upon."""
    if len(raw) < SIZE or raw[:4] != MAGIC:
        return False
    fields = np.frombuffer(raw, dtype=FIELDS)[0]
    number = {name: int(fields[name]) for name in FIELDS.names or () if FIELDS[name].kind == "u"}
    sector, blocks, groups = number["sectsize"], number["dblocks"], number["agcount"]
    per_group, bits = number["agblocks"], number["blocklog"]
    return (
        number["versionnum"] & 0xF in (4, 5)
        and 9 <= bits <= 16
        and number["blocksize"] == 1 << bits
        and SECTOR <= sector <= 32768
        and sector & (sector - 1) == 0
        and 8 <= number["inodelog"] <= 11
        and number["inodesize"] == 1 << number["inodelog"]
        and number["inopblog"] == bits - number["inodelog"]
        and bits + number["dirblklog"] <= 16
        and per_group >= MIN_AG_BLOCKS
        and number["agblklog"] == (per_group - 1).bit_length()
        and groups > 0
        and (groups - 1) * per_group < blocks <= groups * per_group
    )


def find_superblock(source: Holes) -> tuple[Superblock, int] | None:
    """The first copy that makes sense, and where it is; None: there is none."""
    raw = read_bytes(source, 0, SIZE)
    if is_sound(raw):
        return None if behind_beginning(source) else (Superblock(raw, source.size), 0)
    for offset in _places(source):
        raw = read_bytes(source, offset, SIZE)
        if not is_sound(raw):
            continue
        superblock = Superblock(raw, source.size)
        group, rest = divmod(offset, superblock.ag_blocks * superblock.block_size)
        # The next sector, the AGF, says which group this is.
        number = read_bytes(source, offset + superblock.sector_size + 8, 4)
        if not rest and int.from_bytes(number, "big") in (0, group):
            return superblock, offset
    return None


def behind_beginning(source: Holes) -> int:
    """How far behind the first byte of its file system the superblock that *source* begins with
    is: 0, unless it is one of another group than the first.
    """
    raw = read_bytes(source, 0, SIZE)
    if not is_sound(raw):
        return 0
    superblock = Superblock(raw, source.size)
    header = read_bytes(source, superblock.sector_size, 12)
    group = int.from_bytes(header[8:], "big") if header[:4] == b"XAGF" else 0
    return group * superblock.ag_blocks * superblock.block_size


PROBED_STEP = 256 << 10
"""What a quarter of a whole number of mebibytes is a multiple of: most often there are 4 groups."""

MAX_PROBED = 1 << 17


def _places(source: Holes) -> Iterator[int]:
    """Where copies may be: where mkfs.xfs would put them now, or did when this was smaller."""
    seen = {0}
    for bits in (12, 10, 9, 11, 13, 14, 15, 16):
        blocks = source.size >> bits
        for shift in (2, 3, 4, 5, 1):
            per_group = -(-blocks >> shift)
            for group in (1, 2, 3):
                offset = per_group * group << bits
                if offset not in seen and offset + SIZE <= source.size:
                    seen.add(offset)
                    yield offset
    # The AGF says how long its group is, if it was not lost with the superblock.
    for sector in (512, 4096):
        header = read_bytes(source, sector, 16)
        if header[:4] == b"XAGF":
            length = int.from_bytes(header[12:16], "big")
            yield from (length << bits for bits in range(9, 17))
    count = min(MAX_PROBED, source.size // PROBED_STEP)
    offsets = np.arange(1, max(1, count), dtype=np.int64) * PROBED_STEP
    offsets = offsets[present_tables(source, offsets, SECTOR, anyway=0)]
    offsets = offsets[~source.are_holes(offsets, SECTOR)]
    magic = np.frombuffer(MAGIC, dtype=np.uint8)
    for part, rows in read_tables(source, offsets, SECTOR, batch_bytes=64 << 10):
        yield from offsets[part][(rows[:, :4] == magic).all(axis=1)].tolist()
