"""Header extensions: the list as it stands, and the known ones decoded.

Unknown extensions are kept as bytes. Source: docs/interop/qcow2.txt, "Header extensions", and
qcow2_read_extensions for what QEMU refuses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from construct import Bytes, GreedyRange, Int8ub, Int32ub, Int64ub, Padded, Struct

from planner.errors import ImageError
from planner.qcow2.fixed import Fixed
from planner.qcow2.header import CRYPT_LUKS, Autoclear, Header
from planner.qcow2.names import decode_name
from planner.source import Source, read_present

END = 0
BACKING_FORMAT = 0xE279_2ACA
FEATURE_NAMES = 0x6803_F857
CRYPTO_HEADER = 0x0537_BE77
BITMAPS = 0x2385_2875
DATA_FILE = 0x4441_5441

EXTENSION_NAMES = {
    BACKING_FORMAT: "backing format",
    FEATURE_NAMES: "feature name table",
    CRYPTO_HEADER: "full disk encryption header",
    BITMAPS: "bitmaps",
    DATA_FILE: "external data file name",
}

MAX_BACKING_FORMAT = 15
MAX_FEATURE_NAMES = 3 * 64
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY = MAX_BITMAPS * 1024

EXTENSION = Struct("magic" / Int32ub, "length" / Int32ub)
EXTENSION_BYTES = EXTENSION.sizeof()
_FIXED = Fixed(EXTENSION)
CRYPTO_POINTER = Struct("offset" / Int64ub, "length" / Int64ub)
BITMAPS_POINTER = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Int32ub,
    "bitmap_directory_size" / Int64ub,
    "bitmap_directory_offset" / Int64ub,
)
_CRYPTO, _BITMAPS = Fixed(CRYPTO_POINTER), Fixed(BITMAPS_POINTER)
FEATURE_NAME = Struct("type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))
FEATURE_NAME_TABLE = GreedyRange(FEATURE_NAME)


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension: its type, where its data stands in the file, and the data."""

    magic: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CryptoPointer:
    """Where the LUKS header is, in bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class BitmapsPointer:
    """Where the bitmap directory is, in bytes, and how many bitmaps it lists."""

    nb_bitmaps: int
    bitmap_directory_size: int
    bitmap_directory_offset: int


@dataclass(frozen=True, slots=True)
class Extensions:
    """The extensions of an image; ``bitmaps`` only where their autoclear bit vouches for them.

    ``stale_bitmaps`` says that the extension is there and the bit is not.
    """

    all: tuple[Extension, ...] = ()
    backing_format: bytes | None = None
    data_file: bytes | None = None
    feature_names: tuple[tuple[int, int, bytes], ...] = ()
    crypto: CryptoPointer | None = None
    bitmaps: BitmapsPointer | None = None
    stale_bitmaps: bool = False

    def names_of_features(self) -> dict[tuple[int, int], str]:
        """(type, bit) → name, from the feature name table, as report_unsupported reads it.

        An entry without a name ends the table, and the first of several for a bit counts.
        """
        found: dict[tuple[int, int], str] = {}
        for kind, bit, name in self.feature_names:
            text = decode_name(name)
            if not text:
                break
            found.setdefault((kind, bit), text)
        return found


def encode_extensions(extensions: list[tuple[int, bytes]]) -> bytes:
    """The extension area for (magic, data) pairs, its end marker included."""
    parts = []
    for magic, data in [*extensions, (END, b"")]:
        padded = Padded(-(-len(data) // 8) * 8, Bytes(len(data)))
        parts.append(EXTENSION.build({"magic": magic, "length": len(data)}) + padded.build(data))
    return b"".join(parts)


@lru_cache(maxsize=1)  # Of a quarter of a million, each check of an image would hold its own.
def decode_extensions(raw: bytes, start: int, room: int) -> tuple[Extension, ...]:
    """The extensions in the area that begins at file offset *start* and is *room* bytes long.

    *raw* holds what of the area lies in the file; the rest is zeros and ends the list. Raises
    `ImageError` for one that runs past the area.
    """
    found = []
    for position, magic, length in _walk(raw, room):
        if length > room - position:
            raise ImageError(
                "header extension", f"{magic:#010x}", f"{length} bytes run past the header's area"
            )
        if magic != END:
            data = raw[position : position + length].ljust(length, b"\0")
            found.append(Extension(magic, start + position, data))
    return tuple(found)


def refusable(raw: bytes, room: int) -> tuple[list[int], int]:
    """Where in an area the extensions begin that `read_extensions` may refuse, ascending; and how
    many there are in all."""
    found, count = list[int](), 0
    for position, magic, length in _walk(raw, room):
        count += 1
        if magic in (BACKING_FORMAT, CRYPTO_HEADER, BITMAPS) or length > room - position:
            found.append(position - EXTENSION_BYTES)
    return found, count


def _walk(raw: bytes, room: int) -> Iterator[tuple[int, int, int]]:
    """(where its data begins, type, length), up to the end marker or one that does not fit."""
    position, magic, end = 0, -1, len(raw)
    padded = raw + bytes(EXTENSION_BYTES)
    while position < room and magic != END:
        magic, length = _FIXED.values(padded, position) if position < end else (END, 0)
        position += EXTENSION_BYTES
        yield position, magic, length
        position += (length + 7) & ~7


def read_extensions(source: Source, header: Header) -> Extensions:
    """Read and decode the extension area. Raises `ImageError` where QEMU refuses to go on."""
    start = header.header_length
    room = (header.backing_file_offset or 1 << header.cluster_bits) - start
    extensions = decode_extensions(read_present(source, start, max(0, room)), start, room)
    last = {extension.magic: extension for extension in extensions}
    bitmaps = last.get(BITMAPS)
    vouched = bool(header.autoclear_features & Autoclear.BITMAPS)
    for extension in extensions:
        if extension.magic == BACKING_FORMAT and len(extension.data) > MAX_BACKING_FORMAT:
            raise ImageError("backing format", len(extension.data), "a name has at most 15 bytes")
        if extension.magic == CRYPTO_HEADER:
            decode_crypto(extension.data, header)
        if extension.magic == BITMAPS:
            decode_bitmaps(extension.data, header)
    return Extensions(
        all=extensions,
        backing_format=last[BACKING_FORMAT].data if BACKING_FORMAT in last else None,
        data_file=last[DATA_FILE].data if DATA_FILE in last else None,
        feature_names=_decode_feature_names(last.get(FEATURE_NAMES)),
        crypto=decode_crypto(last[CRYPTO_HEADER].data, header) if CRYPTO_HEADER in last else None,
        bitmaps=decode_bitmaps(bitmaps.data, header) if bitmaps and vouched else None,
        stale_bitmaps=bitmaps is not None and not vouched,
    )


def _decode_feature_names(extension: Extension | None) -> tuple[tuple[int, int, bytes], ...]:
    """The entries; one that the end of the table cuts goes on in zeros, as in QEMU's memory."""
    if extension is None:
        return ()
    size = FEATURE_NAME.sizeof()
    data = extension.data[: MAX_FEATURE_NAMES * size]
    names = FEATURE_NAME_TABLE.parse(data.ljust(-(-len(data) // size) * size, b"\0"))
    return tuple((entry.type, entry.bit, entry.name) for entry in names)


def decode_crypto(data: bytes, header: Header) -> CryptoPointer:
    """The pointer to the LUKS header. Raises `ImageError`."""
    if header.crypt_method != CRYPT_LUKS:
        raise ImageError("crypto header extension", "present", "the image does not use LUKS")
    if len(data) != _CRYPTO.dtype.itemsize:
        raise ImageError("crypto header extension", len(data), "its length must be 16")
    entry = _CRYPTO.parse(data)
    if entry.offset % (1 << header.cluster_bits):
        raise ImageError("crypto header offset", entry.offset, "not a multiple of the cluster size")
    return CryptoPointer(entry.offset, entry.length)


def decode_bitmaps(data: bytes, header: Header) -> BitmapsPointer:
    """The pointer to the bitmap directory.

    Raises `ImageError`; beyond the length, QEMU judges it only where the autoclear bit is set.
    """
    if len(data) != _BITMAPS.dtype.itemsize:
        raise ImageError("bitmaps extension", len(data), "its length must be 24")
    entry = _BITMAPS.parse(data)
    pointer = BitmapsPointer(
        entry.nb_bitmaps, entry.bitmap_directory_size, entry.bitmap_directory_offset
    )
    if not header.autoclear_features & Autoclear.BITMAPS:
        return pointer
    if entry.reserved:
        raise ImageError("bitmaps extension", entry.reserved, "its reserved field must be zero")
    if not 0 < pointer.nb_bitmaps <= MAX_BITMAPS:
        raise ImageError("nb_bitmaps", pointer.nb_bitmaps, f"must be 1 to {MAX_BITMAPS}")
    if pointer.bitmap_directory_offset % (1 << header.cluster_bits):
        raise ImageError(
            "bitmap_directory_offset", pointer.bitmap_directory_offset, "not cluster aligned"
        )
    if pointer.bitmap_directory_size > MAX_BITMAP_DIRECTORY:
        raise ImageError(
            "bitmap_directory_size", pointer.bitmap_directory_size, f"over {MAX_BITMAP_DIRECTORY}"
        )
    return pointer
