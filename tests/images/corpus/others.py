"""Rules about the header's bits, the LUKS header and bitmaps."""

from __future__ import annotations

from dataclasses import replace

from planner.findings.kinds import ACTIVE, Structure
from planner.findings.kinds import FindingKind as Kind
from planner.qcow2.extensions import CRYPTO_HEADER
from planner.qcow2.header import Autoclear, Incompatible
from planner.qcow2.layout import Layout
from planner.qcow2.luks import DISABLED, ENABLED, LUKS_BYTES, encode_luks
from tests.images.builder import Image
from tests.images.corpus.rule import (
    SIZE,
    Rule,
    builder,
    fill,
    finding,
    leak,
    missing,
    plain,
    rule,
)
from tests.images.luks_headers import luks_bytes, small_luks_header

# The header


@rule
def corrupt_bit() -> Rule:
    """The corrupt bit is a finding, and no counter of QEMU's."""
    image = plain()
    image.change_header(incompatible_features=Incompatible.CORRUPT)
    return Rule(
        image,
        [finding(Kind.CORRUPT_BIT, structure=Structure.HEADER, host_offset=72, found=1)],
    )


@rule
def dirty_bit() -> Rule:
    """The dirty bit is a finding, and no counter of QEMU's."""
    image = plain(lazy_refcounts=True)
    image.change_header(incompatible_features=Incompatible.DIRTY)
    return Rule(
        image,
        [finding(Kind.DIRTY_BIT, structure=Structure.HEADER, host_offset=72, found=1)],
    )


@rule
def l1_table_past_end() -> Rule:
    """An active L1 table past the end counts nothing and reads as zeros: an empty disk."""
    image = builder().build()
    old, beyond = image.header.l1_table_offset, len(image.data) + SIZE
    image.change_header(l1_table_offset=beyond)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.L1_TABLE,
                host_offset=beyond,
                length=16,
                snapshot=ACTIVE,
                found=beyond,
            ),
            leak(old // SIZE),
        ],
        corruptions=1,
        leaks=1,
        complete=False,
    )


# LUKS


LUKS_CLUSTERS = len(luks_bytes()) // SIZE


def luks(**options: object) -> Image:
    return fill(builder(crypt_method=2, luks_header=luks_bytes(), **options)).build()


def luks_offset(image: Image) -> int:
    crypto = Layout.read(image.source).extensions.crypto
    assert crypto is not None
    return crypto.offset


@rule
def luks_header_counts() -> Rule:
    """Every cluster of the LUKS header is counted."""
    image = luks()
    first = luks_offset(image) // SIZE
    image.set_refcount(first, 0)
    image.set_refcount(first + 2, 2)
    return Rule(
        image,
        [
            missing(first),
            leak(first + 2, found=2, expected=1),
        ],
        corruptions=1,
        leaks=1,
        needs_rebuild=True,
    )


@rule
def luks_header_past_end() -> Rule:
    """A LUKS header that reaches past the end counts nothing."""
    image = luks()
    first = luks_offset(image) // SIZE
    extensions = Layout.read(image.source).extensions.all
    at = next(each.offset for each in extensions if each.magic == CRYPTO_HEADER)
    image.set_word(at + 8, 1 << 40)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.LUKS,
                host_offset=first * SIZE,
                length=1 << 40,
                found=first * SIZE,
            ),
            leak(first, LUKS_CLUSTERS),
        ],
        corruptions=1,
        leaks=LUKS_CLUSTERS,
        complete=False,
    )


@rule
def luks_header_longer_than_its_pointer_says() -> Rule:
    """The rest of it looks leaked and is not: named, and not to be freed."""
    image = luks()
    first = luks_offset(image) // SIZE
    extensions = Layout.read(image.source).extensions.all
    at = next(each.offset for each in extensions if each.magic == CRYPTO_HEADER)
    image.set_word(at + 8, 3 * SIZE)
    return Rule(
        image,
        [
            finding(
                Kind.LUKS_HEADER_LENGTH,
                structure=Structure.LUKS,
                host_offset=first * SIZE,
                found=3 * SIZE,
                expected=LUKS_CLUSTERS * SIZE,
            ),
            finding(Kind.LUKS_HEADER_INVALID, structure=Structure.LUKS, found=3 * SIZE),
            leak(first + 3, LUKS_CLUSTERS - 3),
        ],
        leaks=LUKS_CLUSTERS - 3,
        complete=False,
    )


@rule
def luks_header_that_is_gone() -> Rule:
    """Its clusters are its own all the same: nothing looks leaked that is not."""
    image = luks()
    first = luks_offset(image)
    image.data[first : first + SIZE] = bytes(SIZE)
    length = LUKS_CLUSTERS * SIZE
    gone = {"structure": Structure.LUKS, "host_offset": first, "found": length}
    return Rule(image, [finding(Kind.LUKS_HEADER_INVALID, **gone)])


@rule
def luks_header_without_keys() -> Rule:
    """A LUKS header in which every key slot is disabled opens for nobody."""
    header = small_luks_header()
    slots = tuple(replace(slot, active=DISABLED) for slot in header.key_slots)
    image = luks()
    first = luks_offset(image)
    image.data[first : first + LUKS_BYTES] = encode_luks(replace(header, key_slots=slots))
    return Rule(image, [finding(Kind.LUKS_HEADER_INVALID, structure=Structure.LUKS)])


@rule
def luks_key_slot_that_is_overwritten() -> Rule:
    """One of two passwords opens nothing any more; the other does."""
    header = small_luks_header()
    slots = list(header.key_slots)
    slots[2] = replace(slots[2], active=ENABLED, iterations=1000)
    image = luks()
    first = luks_offset(image)
    image.data[first : first + LUKS_BYTES] = encode_luks(replace(header, key_slots=tuple(slots)))
    sector = slots[2].key_material_offset + 3
    start = first + sector * 512
    image.data[start : start + 512] = bytes(512)
    gone = {"structure": Structure.LUKS, "host_offset": first, "index": 2, "found": sector}
    return Rule(image, [finding(Kind.LUKS_KEY_SLOT_GONE, **gone)])


# Bitmaps


def with_bitmap() -> Image:
    made = fill(builder())
    made.add_bitmap("backup", {0, 3}, granularity_bits=16)
    return made.build()


def directory(image: Image) -> int:
    pointer = Layout.read(image.source).extensions.bitmaps
    assert pointer is not None
    return pointer.bitmap_directory_offset


def bitmap_extension(image: Image) -> int:
    """Where the content of the bitmaps extension stands."""
    return image.header.header_length + 8


@rule
def bitmap_clusters_count() -> Rule:
    """Directory, table and data of a bitmap are counted."""
    image = with_bitmap()
    table = image.bitmaps[0].bitmap_table_offset
    data = image.word(table)
    image.set_refcount(table // SIZE, 3)
    image.set_refcount(data // SIZE, 2)
    image.set_refcount(directory(image) // SIZE, 0)
    return Rule(
        image,
        [
            missing(directory(image) // SIZE),
            leak(data // SIZE, found=2, expected=1),
            leak(table // SIZE, found=3, expected=1),
        ],
        corruptions=1,
        leaks=2,
        needs_rebuild=True,
    )


@rule
def bitmap_entry_of_all_ones() -> Rule:
    """A bitmap table entry may say that all bits are one: no cluster is counted."""
    image = with_bitmap()
    table = image.bitmaps[0].bitmap_table_offset
    data = image.word(table)
    image.set_word(table, 1)
    return Rule(image, [leak(data // SIZE)], leaks=1)


@rule
def bitmap_entry_invalid() -> Rule:
    """A malformed bitmap table entry is a corruption, and stops QEMU."""
    image = with_bitmap()
    table = image.bitmaps[0].bitmap_table_offset
    data = image.word(table)
    image.set_bits(table, 1 << 60)
    return Rule(
        image,
        [
            finding(Kind.CHECK_STOPPED, structure=Structure.BITMAP_TABLE, index=0),
            finding(
                Kind.BITMAP_ENTRY_INVALID,
                structure=Structure.BITMAP_TABLE,
                host_offset=table,
                index=0,
                found=data | 1 << 60,
            ),
            leak(data // SIZE),
        ],
        check_errors=1,
        corruptions=1,
        leaks=1,
        complete=False,
    )


@rule
def bitmap_data_past_end() -> Rule:
    """Bitmap data past the end counts nothing."""
    image = with_bitmap()
    table = image.bitmaps[0].bitmap_table_offset
    data, beyond = image.word(table), len(image.data) + 9 * SIZE
    image.set_word(table, beyond)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.BITMAP_DATA,
                host_offset=beyond,
                index=0,
                found=beyond,
            ),
            leak(data // SIZE),
        ],
        corruptions=1,
        leaks=1,
    )


@rule
def bitmap_table_past_end() -> Rule:
    """A bitmap table past the end counts nothing and reads as zeros."""
    image = with_bitmap()
    table, beyond = image.bitmaps[0].bitmap_table_offset, len(image.data) + 9 * SIZE
    data = image.word(table)
    image.set_word(image.bitmaps[0].offset, beyond)
    return Rule(
        image,
        [
            finding(
                Kind.PAST_END,
                structure=Structure.BITMAP_TABLE,
                host_offset=beyond,
                index=0,
                found=beyond,
            ),
            leak(data // SIZE, 2),
        ],
        corruptions=1,
        leaks=2,
        complete=False,
    )


def lost_bitmap(image: Image, table: int, data: int) -> Rule:
    """What any directory that cannot be interpreted gives: the bitmap's own clusters are leaked."""
    at = directory(image)
    return Rule(
        image,
        [
            finding(Kind.CHECK_STOPPED, structure=Structure.BITMAP_DIRECTORY),
            finding(
                Kind.BITMAP_DIRECTORY_INVALID,
                structure=Structure.BITMAP_DIRECTORY,
                host_offset=at,
            ),
            leak(data // SIZE, 2),
        ],
        check_errors=1,
        corruptions=1,
        leaks=2,
        complete=False,
    )


def damaged_directory(offset: int, value: bytes) -> Rule:
    """A rule about a directory entry of which the bytes at *offset* are *value*."""
    image = with_bitmap()
    table = image.bitmaps[0].bitmap_table_offset
    data = image.word(table)
    at = image.bitmaps[0].offset + offset
    image.data[at : at + len(value)] = value
    return lost_bitmap(image, table, data)


@rule
def bitmap_directory_entry_past_its_end() -> Rule:
    """A name that runs past the directory."""
    return damaged_directory(18, b"\x03\x00")


@rule
def bitmap_directory_entry_with_extra_data() -> Rule:
    """Extra data is not known."""
    return damaged_directory(20, b"\0\0\0\x02")


@rule
def bitmap_directory_granularity() -> Rule:
    """A granularity must be 2^9 to 2^31."""
    return damaged_directory(17, b"\x08")


@rule
def bitmap_directory_reserved_flags() -> Rule:
    """Flags beyond those that are known."""
    return damaged_directory(12, b"\x80\0\0\0")


@rule
def bitmap_directory_type() -> Rule:
    """Only dirty tracking bitmaps are known."""
    return damaged_directory(16, b"\x02")


@rule
def bitmap_directory_table_size() -> Rule:
    """A bitmap table that does not fit the disk."""
    return damaged_directory(8, b"\0\0\0\x03")


@rule
def bitmap_directory_table_nowhere() -> Rule:
    """A bitmap table at 0."""
    return damaged_directory(0, bytes(8))


@rule
def bitmap_directory_count() -> Rule:
    """A directory that lists fewer bitmaps than the header extension says."""
    image = with_bitmap()
    table = image.bitmaps[0].bitmap_table_offset
    data = image.word(table)
    at = bitmap_extension(image)
    image.data[at : at + 4] = (2).to_bytes(4, "big")
    return lost_bitmap(image, table, data)


@rule
def bitmaps_stale() -> Rule:
    """Bitmaps without their autoclear bit are not followed: their clusters are leaked."""
    image = with_bitmap()
    table, first = image.bitmaps[0].bitmap_table_offset, directory(image)
    data = image.word(table)
    features = image.header.autoclear_features & ~Autoclear.BITMAPS
    image.change_header(autoclear_features=features)
    assert [table, first] == [data + SIZE, data + 2 * SIZE]
    return Rule(
        image,
        [
            leak(data // SIZE, 3),
            finding(Kind.STALE_BITMAPS, structure=Structure.HEADER, found=1),
        ],
        leaks=3,
    )


@rule
def autoclear_unknown() -> Rule:
    """Bits for a program that knows them; 1 << 0 vouches for bitmaps, of which there are none."""
    image = plain()
    image.change_header(autoclear_features=1 << 63 | 1 << 17 | Autoclear.BITMAPS)
    bits = 1 << 63 | 1 << 17
    return Rule(image, [finding(Kind.UNKNOWN_AUTOCLEAR, structure=Structure.HEADER, found=bits)])
