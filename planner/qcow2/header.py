"""The header: fixed fields of versions 2 and 3, feature bits, additional fields.

Decoding takes any bytes; `check_header` judges them. Source: docs/interop/qcow2.txt, "Header".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntFlag

from construct import Int32ub, Int64ub, Struct

from planner.errors import HeaderCutOff, ImageError, NotQcow2
from planner.qcow2.geometry import SUBCLUSTERS_PER_CLUSTER, Geometry
from planner.source import Source, read_bytes

MAGIC = 0x514649FB

HEADER_V2 = Struct(
    "magic" / Int32ub,
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
HEADER_V3 = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
V2_LENGTH = HEADER_V2.sizeof()
V3_LENGTH = V2_LENGTH + HEADER_V3.sizeof()

AUTOCLEAR_AT = 88
"""Where the header of version 3 holds autoclear_features, 8 bytes."""

CLUSTER_BITS = range(9, 22)
MAX_REFCOUNT_ORDER = 6
MAX_BACKING_NAME = 1023
SIGNED_MAX = (1 << 63) - 1

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = 0, 1, 2
CRYPT_NAMES = {CRYPT_NONE: "none", CRYPT_AES: "aes", CRYPT_LUKS: "luks"}
COMPRESSION_ZLIB, COMPRESSION_ZSTD = 0, 1
COMPRESSION_NAMES = {COMPRESSION_ZLIB: "zlib", COMPRESSION_ZSTD: "zstd"}


FEATURES_AT = 72
"""Where the header holds incompatible_features, 8 bytes."""


class Incompatible(IntFlag):
    """Bits that a reader must understand."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Bits that a reader may ignore."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Bits that a writer which does not know them clears."""

    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1


KNOWN_AUTOCLEAR = int(Autoclear.BITMAPS | Autoclear.DATA_FILE_RAW)
KNOWN_INCOMPATIBLE = int(
    Incompatible.DIRTY
    | Incompatible.CORRUPT
    | Incompatible.DATA_FILE
    | Incompatible.COMPRESSION
    | Incompatible.EXTENDED_L2
)


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields under the specification's names.

    ``additional`` is what follows byte 104 up to ``header_length``, as it stands: the compression
    type is its first byte. A version 2 header has the values that version 3 has as its defaults.
    """

    magic: int
    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_LENGTH
    additional: bytes = b""

    @property
    def compression_type(self) -> int:
        return self.additional[0] if self.additional else COMPRESSION_ZLIB

    @property
    def dirty(self) -> bool:
        return bool(self.incompatible_features & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        return bool(self.incompatible_features & Incompatible.CORRUPT)

    @property
    def unknown_autoclear(self) -> int:
        """The autoclear bits that only a program that knows them may leave when it writes."""
        return self.autoclear_features & ~KNOWN_AUTOCLEAR

    @property
    def known_autoclear(self) -> int:
        """The autoclear bits that are left when this program writes."""
        return self.autoclear_features & KNOWN_AUTOCLEAR

    @property
    def external_data(self) -> bool:
        return bool(self.incompatible_features & Incompatible.DATA_FILE)

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & Incompatible.EXTENDED_L2)

    @property
    def geometry(self) -> Geometry:
        return Geometry(
            version=self.version,
            cluster_bits=self.cluster_bits,
            refcount_order=self.refcount_order,
            virtual_size=self.size,
            extended_l2=self.extended_l2,
            external_data=self.external_data,
        )


_V2_FIELDS = [sub.name for sub in HEADER_V2.subcons]
_V3_FIELDS = [sub.name for sub in HEADER_V3.subcons]


def decode_header(raw: bytes) -> Header:
    """Decode a header from its first bytes (at least 104; 72 will do for version 2).

    ``additional`` is cut to what *raw* holds.
    """
    values = {name: value for name, value in HEADER_V2.parse(raw).items() if name in _V2_FIELDS}
    if values["version"] < 3:
        return Header(**values)
    more = HEADER_V3.parse(raw[V2_LENGTH:])
    values |= {name: value for name, value in more.items() if name in _V3_FIELDS}
    return Header(**values, additional=raw[V3_LENGTH : max(V3_LENGTH, values["header_length"])])


def bare_header(source: Source) -> Header | None:
    """The fixed fields of a qcow2 header, sensible or not, zeros where the file ends before them.

    For showing what stands where no layout could be read; None where not even the magic is there.
    """
    header = decode_header(read_bytes(source, 0, V3_LENGTH))
    return header if header.magic == MAGIC else None


def encode_header(header: Header) -> bytes:
    """The inverse of `decode_header`."""
    values = asdict(header)
    raw: bytes = HEADER_V2.build(values)
    if header.version >= 3:
        raw += HEADER_V3.build(values) + header.additional
    return raw


def read_header(source: Source) -> Header:
    """The header, with its additional fields.

    Raises `NotQcow2`, `HeaderCutOff`, and `ImageError` for a version or length that says that the
    rest cannot be read.
    """
    raw = read_bytes(source, 0, V3_LENGTH)
    _require_qcow2(source, raw)
    header = decode_header(raw)
    if header.version > 3:
        raise ImageError("version", header.version, "only versions 2 and 3 are known")
    if header.cluster_bits not in CLUSTER_BITS:
        raise ImageError(
            "cluster_bits",
            header.cluster_bits,
            f"cluster sizes go from 2^{CLUSTER_BITS[0]} to 2^{CLUSTER_BITS[-1]} bytes",
        )
    if header.version == 2:
        return header
    if header.header_length < V3_LENGTH:
        raise ImageError("header_length", header.header_length, f"version 3 has {V3_LENGTH} bytes")
    if header.header_length > 1 << header.cluster_bits:
        raise ImageError("header_length", header.header_length, "more than one cluster")
    return decode_header(read_bytes(source, 0, header.header_length))


def _require_qcow2(source: Source, raw: bytes) -> None:
    magic, version = int.from_bytes(raw[:4], "big"), int.from_bytes(raw[4:8], "big")
    if source.size == 0:
        raise NotQcow2("magic", "missing", "the file is empty")
    if magic != MAGIC:
        raise NotQcow2(
            "magic", f"{magic:#010x}", f"it begins with {magic:#010x}, not {MAGIC:#010x}"
        )
    length = V2_LENGTH if version <= 2 else V3_LENGTH
    if source.size < length:
        raise HeaderCutOff("header", source.size, f"{source.size} of {length} bytes are there")
    if version < 2:
        raise NotQcow2("version", version, f"version {version} is the older qcow format")


def check_header(header: Header) -> None:
    """Judge the fields that decide whether the image can be interpreted at all (qcow2_do_open).

    Raises `ImageError`. Features are judged by `check_features`, tables by the layout.
    """
    cluster_size = 1 << header.cluster_bits
    if header.backing_file_offset > cluster_size:
        raise ImageError(
            "backing_file_offset", header.backing_file_offset, "past the first cluster"
        )
    if header.size > SIGNED_MAX:
        raise ImageError("size", header.size, "larger than any file can be")
    name_room = min(MAX_BACKING_NAME, cluster_size - header.backing_file_offset)
    if header.backing_file_offset and header.backing_file_size > name_room:
        raise ImageError(
            "backing_file_size",
            header.backing_file_size,
            f"a name of at most {name_room} fits there",
        )
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise ImageError("refcount_order", header.refcount_order, "refcounts have at most 64 bits")
    if header.crypt_method not in CRYPT_NAMES:
        raise ImageError("crypt_method", header.crypt_method, "only 0, 1 (AES), 2 (LUKS) are known")


def check_features(header: Header, feature_names: dict[tuple[int, int], str]) -> None:
    """Judge the feature bits and what they promise. Raises `ImageError`.

    *feature_names* maps (type, bit) to a name, from the feature name table.
    """
    compression = header.compression_type
    if compression not in COMPRESSION_NAMES:
        raise ImageError("compression_type", compression, "only 0 (zlib) and 1 (zstd) are known")
    flagged = bool(header.incompatible_features & Incompatible.COMPRESSION)
    if flagged != (compression != COMPRESSION_ZLIB):
        raise ImageError(
            "compression_type", compression, "contradicts the incompatible feature bit 3"
        )
    unknown = header.incompatible_features & ~KNOWN_INCOMPATIBLE
    if unknown:
        bits = [bit for bit in range(64) if unknown >> bit & 1]
        names = [feature_names.get((0, bit), f"bit {bit}") for bit in bits]
        raise ImageError("incompatible_features", f"{unknown:#x}", f"unknown: {', '.join(names)}")
    if header.extended_l2 and 1 << header.cluster_bits < SUBCLUSTERS_PER_CLUSTER * 512:
        raise ImageError(
            "cluster_bits", header.cluster_bits, "subclusters would be below 512 bytes"
        )
    if header.autoclear_features & Autoclear.DATA_FILE_RAW and not header.external_data:
        raise ImageError("autoclear_features", 2, "raw external data without an external data file")
