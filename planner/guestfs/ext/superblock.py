"""The superblock of ext2/3/4: what it says, whether that makes sense, and where its copies are."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntFlag
from functools import cached_property

import numpy as np

from planner.guestfs.checksums import crc
from planner.guestfs.names import written_uuid
from planner.guestfs.reading import Holes
from planner.source import read_bytes

OFFSET = 1024
SIZE = 1024
MAGIC = 0xEF53

ROOT_INODE = 2
RESIZE_INODE = 7
JOURNAL_INODE = 8

MIN_BLOCKS_PER_GROUP = 256
"""As mke2fs makes them, at least."""

MAX_GROUPS = 1 << 21
"""256 TiB of the usual ones: of more than these nothing is looked at."""

FIELDS = np.dtype(
    {
        "names": [
            "inodes_count", "blocks_count_lo", "first_data_block", "log_block_size",
            "log_cluster_size", "blocks_per_group", "inodes_per_group", "magic", "rev_level",
            "first_ino", "inode_size", "block_group_nr", "feature_compat", "feature_incompat",
            "feature_ro_compat", "uuid", "volume_name", "reserved_gdt_blocks", "journal_inum",
            "desc_size", "first_meta_bg", "blocks_count_hi", "mmp_block", "usr_quota_inum",
            "grp_quota_inum", "backup_bgs", "prj_quota_inum", "checksum_seed", "orphan_file_inum",
        ],
        "formats": [
            "<u4", "<u4", "<u4", "<u4",
            "<u4", "<u4", "<u4", "<u2", "<u4",
            "<u4", "<u2", "<u2", "<u4", "<u4",
            "<u4", "V16", "V16", "<u2", "<u4",
            "<u2", "<u4", "<u4", "<u8", "<u4",
            "<u4", "<2u4", "<u4", "<u4", "<u4",
        ],
        "offsets": [
            0, 4, 20, 24,
            28, 32, 40, 56, 76,
            84, 88, 90, 92, 96,
            100, 104, 120, 206, 224,
            254, 260, 336, 360, 576,
            580, 588, 620, 624, 640,
        ],
        "itemsize": SIZE,
    }
)  # fmt: skip
"""Those that are used, by the kernel's names without their ``s_``."""


class Compat(IntFlag):
    """Features that a reader need not know."""

    HAS_JOURNAL = 0x4
    RESIZE_INODE = 0x10
    SPARSE_SUPER2 = 0x200


class Incompat(IntFlag):
    """Features without which nothing can be read right."""

    FILETYPE = 0x2
    RECOVER = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENTS = 0x40
    IS_64BIT = 0x80
    CSUM_SEED = 0x2000


class RoCompat(IntFlag):
    """Features without which nothing can be written right."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    BTREE_DIR = 0x4
    GDT_CSUM = 0x10
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400


_EXT3_INCOMPAT = Incompat.FILETYPE | Incompat.RECOVER | Incompat.META_BG
_EXT3_RO_COMPAT = RoCompat.SPARSE_SUPER | RoCompat.LARGE_FILE | RoCompat.BTREE_DIR


class Superblock:
    """What one copy says, in Python's numbers; see `FIELDS` and the specification."""

    def __init__(self, raw: bytes, source_size: int) -> None:
        """*raw*: `SIZE` bytes that `is_sound` was asked about. Blocks are cut at *source_size*."""
        fields = np.frombuffer(raw, dtype=FIELDS)[0]
        number = {name: int(fields[name]) for name in FIELDS.names or () if FIELDS[name].kind == "u"
                  and not FIELDS[name].shape}  # fmt: skip
        self.compat = Compat(number["feature_compat"])
        self.incompat = Incompat(number["feature_incompat"])
        self.ro_compat = RoCompat(number["feature_ro_compat"])
        self.block_size = 1024 << number["log_block_size"]
        has_clusters = RoCompat.BIGALLOC in self.ro_compat
        self.cluster_size = 1024 << number["log_cluster_size"] if has_clusters else self.block_size
        self.first_data_block = number["first_data_block"]
        claimed = number["blocks_count_lo"]
        if Incompat.IS_64BIT in self.incompat:
            claimed |= number["blocks_count_hi"] << 32
        self.claimed_blocks = claimed
        self.blocks = min(claimed, source_size // self.block_size)
        self.blocks_per_group = number["blocks_per_group"]
        self.inodes_per_group = number["inodes_per_group"]
        is_old = number["rev_level"] == 0
        self.inode_size = 128 if is_old else number["inode_size"]
        self.first_inode = 11 if is_old else max(11, number["first_ino"])
        self.group_number = number["block_group_nr"]
        self.desc_size = 32
        if Incompat.IS_64BIT in self.incompat:
            self.desc_size = max(32, number["desc_size"])
        self.reserved_gdt_blocks = number["reserved_gdt_blocks"]
        self.first_meta_bg = number["first_meta_bg"]
        self.mmp_block = number["mmp_block"]
        self.journal_inode = number["journal_inum"]
        self.orphan_inode = number["orphan_file_inum"]
        self.quota_inodes = {
            number[f"{of}_quota_inum"] for of in ("usr", "grp", "prj")
        } - {0}  # fmt: skip
        self.backup_groups = [int(group) for group in fields["backup_bgs"]]
        self.raw_uuid: bytes = fields["uuid"].tobytes()
        self.raw_label: bytes = fields["volume_name"].tobytes().split(b"\0")[0]
        self.checksum_seed = self._seed(number["checksum_seed"])

    def _seed(self, stored: int) -> int:
        if Incompat.CSUM_SEED in self.incompat:
            return stored
        return int(crc(np.frombuffer(self.raw_uuid, dtype=np.uint8)[None], 0xFFFFFFFF)[0])

    @property
    def has_checksums(self) -> bool:
        """Whether structures have a CRC-32C with them."""
        return RoCompat.METADATA_CSUM in self.ro_compat

    @property
    def kind(self) -> str:
        """As blkid says it: by the features, not by who mounts it."""
        if self.incompat & ~_EXT3_INCOMPAT or self.ro_compat & ~_EXT3_RO_COMPAT:
            return "ext4"
        return "ext3" if Compat.HAS_JOURNAL in self.compat else "ext2"

    @property
    def label(self) -> str:
        return self.raw_label.decode("utf-8", "replace")

    @property
    def uuid(self) -> str:
        return written_uuid(self.raw_uuid)

    @cached_property
    def groups(self) -> int:
        """How many there are, `MAX_GROUPS` at most."""
        blocks = max(0, self.blocks - self.first_data_block)
        return min(MAX_GROUPS, -(-blocks // self.blocks_per_group))

    @property
    def inode_table_blocks(self) -> int:
        """How many each group has."""
        return -(-self.inodes_per_group * self.inode_size // self.block_size)

    @property
    def descriptors_per_block(self) -> int:
        return self.block_size // self.desc_size

    @property
    def descriptor_blocks(self) -> int:
        """How many the table of groups has."""
        return -(-self.groups // self.descriptors_per_block)

    def group_start(self, group: int) -> int:
        """The first block of a group; of the one with the superblock the block that it is in."""
        start = self.first_data_block + group * self.blocks_per_group
        # With clusters the first block is number 0, and the superblock is where it always is.
        return 1 if start == 0 and self.block_size == OFFSET else start

    def groups_with_superblock(self) -> list[int]:
        """All of them, ascending."""
        if Compat.SPARSE_SUPER2 in self.compat:
            return sorted({0} | {group for group in self.backup_groups if 0 < group < self.groups})
        if RoCompat.SPARSE_SUPER not in self.ro_compat:
            return list(range(self.groups))
        return [group for group in sparse_groups() if group < self.groups]


def sparse_groups() -> list[int]:
    """The groups below `MAX_GROUPS` that have a superblock where few have one, ascending."""
    powers = {base**exponent for base in (3, 5, 7) for exponent in range(14)}
    return sorted({0} | {group for group in powers if group < MAX_GROUPS})


def is_sound(raw: bytes) -> bool:
    """Whether *raw* can be a superblock: of each field that all else rests upon."""
    if len(raw) < SIZE:
        return False
    fields = np.frombuffer(raw, dtype=FIELDS)[0]
    if fields["magic"] != MAGIC or fields["log_block_size"] > 6:
        return False
    block_size = 1024 << int(fields["log_block_size"])
    inode_size = 128 if fields["rev_level"] == 0 else int(fields["inode_size"])
    clusters = int(fields["log_cluster_size"])
    desc_size = int(fields["desc_size"])
    has_clusters = bool(fields["feature_ro_compat"] & RoCompat.BIGALLOC)
    is_64bit = bool(fields["feature_incompat"] & Incompat.IS_64BIT)
    per_group = int(fields["inodes_per_group"])
    return (
        not fields["feature_incompat"] & Incompat.JOURNAL_DEV
        and fields["first_data_block"] <= 1
        and fields["blocks_count_lo"] | fields["blocks_count_hi"] != 0
        and fields["blocks_per_group"] >= MIN_BLOCKS_PER_GROUP
        and fields["blocks_per_group"] % 8 == 0
        and 128 <= inode_size <= block_size
        and inode_size & (inode_size - 1) == 0
        and 0 < per_group <= 8 * block_size
        and (not has_clusters or int(fields["log_block_size"]) <= clusters <= 20)
        and int(fields["blocks_per_group"]) <= _bitmap_blocks(fields, block_size)
        and (not is_64bit or (desc_size in (0, 32, 64, 128, 256, 512, 1024)))
    )


def _bitmap_blocks(fields: np.void, block_size: int) -> int:
    """How many blocks a bitmap of one block tells of."""
    if not fields["feature_ro_compat"] & RoCompat.BIGALLOC:
        return 8 * block_size
    return 8 * block_size << int(fields["log_cluster_size"]) - int(fields["log_block_size"])


def find_superblock(source: Holes) -> tuple[Superblock, int] | None:
    """The first copy that makes sense, and where it is; None: there is none."""
    for offset, group in _places(source.size):
        raw = read_bytes(source, offset, SIZE)
        if not is_sound(raw):
            continue
        superblock = Superblock(raw, source.size)
        start = superblock.group_start(group) * superblock.block_size if group else OFFSET
        if superblock.group_number == group and start == offset:
            return superblock, offset
    return None


def behind_beginning(source: Holes) -> int:
    """How far behind the first byte of its file system *source* begins: 0, unless there is a copy
    of the superblock where a group of it begins.
    """
    for offset in (OFFSET, 0):
        raw = read_bytes(source, offset, SIZE)
        if is_sound(raw):
            superblock = Superblock(raw, source.size)
            blocks = superblock.group_number * superblock.blocks_per_group
            return blocks * superblock.block_size
    return 0


def _places(size: int) -> Iterator[tuple[int, int]]:
    """Where a copy can be in a source of so many bytes, and in which group that is.

    For each block size with groups as large as mke2fs makes them: as many blocks as a bitmap of one
    block has bits. With clusters these are more blocks: a power of two of them.
    """
    yield OFFSET, 0
    seen = {OFFSET}
    for bits in (2, 0, 1, 3, 4, 5, 6):
        block_size = 1024 << bits
        for ratio in (1, 16, 2, 4, 8, 32, 64):
            group_bytes = 8 * block_size * block_size * ratio
            first = block_size if bits == 0 and ratio == 1 else 0
            last = (size - first - 1) // group_bytes
            numbers = [group for group in sparse_groups() if 0 < group <= last][:12]
            for group in [*numbers, *([last] if last > 0 else [])]:
                offset = first + group * group_bytes
                if offset not in seen:
                    seen.add(offset)
                    yield offset, group
