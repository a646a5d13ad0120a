"""What the content of a cluster begins with: file systems, partition tables, well-known files.

A small table of magic numbers, to name a leaked cluster to a person. Nothing is decided by it.
Sources: the formats' own documents, and the offsets that file(1) and blkid(8) look at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import U8, Mask

TEXT = "text"
TEXT_BYTES = 512
"""So much of a cluster must be text, up to where zeros begin."""

SHORTEST_TEXT = 16

_K = 1024


@dataclass(frozen=True, slots=True)
class Signature:
    """``name`` is what a cluster is that has ``magic`` at ``offset`` bytes from its start."""

    name: str
    offset: int
    magic: bytes


SIGNATURES = (
    # A boot sector may have a file system's own magic too: that says more, so it comes first.
    Signature("NTFS boot sector", 3, b"NTFS    "),
    Signature("exFAT boot sector", 3, b"EXFAT   "),
    Signature("FAT boot sector", 54, b"FAT1"),
    Signature("FAT boot sector", 82, b"FAT32   "),
    Signature("GPT partition table", 512, b"EFI PART"),
    Signature("GPT partition table", 0, b"EFI PART\0\0\1\0"),
    Signature("LVM2 physical volume", 512, b"LABELONE"),
    Signature("swap area", 4086, b"SWAPSPACE2"),
    Signature("btrfs superblock", 64, b"_BHRfS_M"),
    Signature("btrfs superblock", 64 * _K + 64, b"_BHRfS_M"),
    Signature("F2FS superblock", _K, b"\x10\x20\xf5\xf2"),
    Signature("ISO 9660 volume", 32 * _K + 1, b"CD001"),
    Signature("XFS superblock", 0, b"XFSB"),
    Signature("XFS allocation group", 512, b"XAGF"),
    Signature("ext journal", 0, b"\xc0\x3b\x39\x98\0\0\0"),
    Signature("SquashFS superblock", 0, b"hsqs"),
    Signature("LUKS header", 0, b"LUKS\xba\xbe"),
    Signature("qcow2 image", 0, b"QFI\xfb"),
    Signature("VMDK image", 0, b"KDMV"),
    Signature("VHDX image", 0, b"vhdxfile"),
    Signature("ELF program", 0, b"\x7fELF"),
    Signature("gzip data", 0, b"\x1f\x8b\x08"),
    Signature("zip archive", 0, b"PK\x03\x04"),
    Signature("xz data", 0, b"\xfd7zXZ\0"),
    Signature("zstd data", 0, b"\x28\xb5\x2f\xfd"),
    Signature("bzip2 data", 0, b"BZh91AY&SY"),
    Signature("7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    Signature("tar archive", 257, b"ustar"),
    Signature("deb package or static library", 0, b"!<arch>\n"),
    Signature("RPM package", 0, b"\xed\xab\xee\xdb"),
    Signature("SQLite database", 0, b"SQLite format 3\0"),
    Signature("systemd journal", 0, b"LPKSHHRH"),
    Signature("PNG picture", 0, b"\x89PNG\r\n\x1a\n"),
    Signature("JPEG picture", 0, b"\xff\xd8\xff"),
    Signature("GIF picture", 0, b"GIF8"),
    Signature("PDF document", 0, b"%PDF-"),
    Signature("OLE document", 0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    Signature("MP4 or QuickTime film", 4, b"ftyp"),
    Signature("Matroska film", 0, b"\x1a\x45\xdf\xa3"),
    Signature("Ogg sound", 0, b"OggS"),
    Signature("Windows program", 0, b"MZ\x90\0\x03\0\0\0"),
    Signature("Java class", 0, b"\xca\xfe\xba\xbe\0\0\0"),
)

_OFFSETS = frozenset(signature.offset for signature in SIGNATURES)

_EXT, _MBR = "ext2/3/4 superblock", "MBR partition table"

NAMES = ("", *dict.fromkeys(signature.name for signature in SIGNATURES), _EXT, _MBR, TEXT)
"""What `recognise` numbers; the first is for content that nothing here knows."""

REACH = max(TEXT_BYTES, *(each.offset + len(each.magic) for each in SIGNATURES))
"""What is recognised is recognised by no more than so many bytes from the beginning."""

_PARTITIONS_AT = 446
_TEXT_KIND = np.zeros(256, dtype=np.uint8)
_TEXT_KIND[[0x09, 0x0A, 0x0D, *range(0x20, 0x7F)]] = 1
_TEXT_KIND[0x80:] = 1  # UTF-8, or an older code page
_TEXT_KIND[0] = 2


def recognise(rows: U8) -> U8:
    """Which of `NAMES` each cluster begins with, uint8 (n,). *rows*: uint8 (n, cluster size)."""
    found = np.zeros(len(rows), dtype=np.uint8)
    for is_it, name in (
        (_looks_like_text(rows), TEXT),
        (_has_partitions(rows), _MBR),
        (_has_ext_superblock(rows), _EXT),
    ):
        found[is_it] = NAMES.index(name)
    begins = {offset: _bytes_at(rows, offset) for offset in _OFFSETS}
    for signature in reversed(SIGNATURES):  # the first in the table is the last to say
        if begins[signature.offset][signature.magic[0]]:
            found[_has_magic(rows, signature.offset, signature.magic)] = NAMES.index(signature.name)
    return found


def _bytes_at(rows: U8, offset: int) -> Mask:
    """Which bytes there are at that offset in any of *rows*, (256,)."""
    seen = np.zeros(256, dtype=np.bool_)
    seen[rows[:, offset : offset + 1]] = True
    return seen


def _has_magic(rows: U8, offset: int, magic: bytes) -> Mask:
    if offset + len(magic) > rows.shape[1]:
        return np.zeros(len(rows), dtype=np.bool_)
    wanted = np.frombuffer(magic, dtype=np.uint8)
    # Of very many rows most fail at the first byte.
    hit: Mask = rows[:, offset] == wanted[0]
    at = np.flatnonzero(hit)
    hit[at] = (rows[at, offset : offset + len(magic)] == wanted).all(axis=1)
    return hit


def _has_partitions(rows: U8) -> Mask:
    """A boot signature, and four partition entries that are active or not, one of them used."""
    hit = _has_magic(rows, 510, b"\x55\xaa")
    status = rows[:, _PARTITIONS_AT : _PARTITIONS_AT + 64 : 16]
    kinds = rows[:, _PARTITIONS_AT + 4 : _PARTITIONS_AT + 64 : 16]
    good: Mask = hit & ((status & 0x7F) == 0).all(axis=1) & kinds.any(axis=1)
    return good


def _has_ext_superblock(rows: U8) -> Mask:
    """s_magic of the primary superblock, 1 KiB into the file system, with a block size that is."""
    hit = _has_magic(rows, _K + 0x38, b"\x53\xef")
    if hit.any():
        hit &= (rows[:, _K + 0x18] <= 6) & ~rows[:, _K + 0x19 : _K + 0x1C].any(axis=1)
    return hit


def _looks_like_text(rows: U8) -> Mask:
    """Printable from the start on, up to the end of the sample or to zeros that fill it."""
    kind = _TEXT_KIND[rows[:, :TEXT_BYTES]]
    odd = kind != 1
    length = np.where(odd.any(axis=1), odd.argmax(axis=1), kind.shape[1])
    filled = np.count_nonzero(kind != 2, axis=1) == length
    ascii_only = (rows[:, :SHORTEST_TEXT] < 0x80).all(axis=1)
    text: Mask = (length >= SHORTEST_TEXT) & filled & ascii_only
    return text
