"""Builds qcow2 images in memory, without QEMU.

`ImageBuilder` lays an image out, `Image` is its bytes with the places of its tables. All structures
are encoded by `planner.qcow2`. Nothing here judges an image.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from planner.arrays import Counts
from planner.qcow2 import entries, extensions
from planner.qcow2.bitmaps import TYPE_DIRTY, Bitmap, encode_bitmap, read_bitmaps
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import (
    CRYPT_NONE,
    MAGIC,
    V2_LENGTH,
    Autoclear,
    Compatible,
    Header,
    Incompatible,
    decode_header,
    encode_header,
)
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import pack_refcounts, unpack_refcounts
from planner.qcow2.snapshots import Snapshot, encode_snapshot, read_snapshots
from planner.source import Bytes

MIB = 1 << 20
GIB = 1 << 30

HEADER_LENGTH = 112
"""Version 3 with the compression type and its padding, as QEMU writes it."""

FEATURES = {
    (0, 0): b"dirty bit",
    (0, 1): b"corrupt bit",
    (0, 2): b"external data file",
    (0, 3): b"compression type",
    (0, 4): b"extended L2 entries",
    (1, 0): b"lazy refcounts",
    (2, 0): b"bitmaps",
    (2, 1): b"raw external data",
}


def feature_name_table() -> tuple[int, bytes]:
    """The header extension that names every known feature bit."""
    rows = [
        extensions.FEATURE_NAME.build({"type": kind, "bit": bit, "name": name.ljust(46, b"\0")})
        for (kind, bit), name in FEATURES.items()
    ]
    return extensions.FEATURE_NAMES, b"".join(rows)


def zlib_compress(data: bytes) -> bytes:
    """Raw deflate in a 4 KiB window, as the specification wants it."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -12)
    return deflate.compress(data) + deflate.flush()


def zstd_compress(data: bytes) -> bytes:
    """A valid Zstandard frame (RFC 8878) that only knows runs of one byte: needs no library."""
    blocks: list[tuple[int, int, bytes]] = []  # type (0 raw, 1 run), size, content
    for match in re.finditer(rb"(?s)(.)\1{15,}|(?:(?!(.)\2{15}).)+", data):
        piece, is_run = match.group(), match.group(1) is not None
        for start in range(0, len(piece), 1 << 16):
            part = piece[start : start + (1 << 16)]
            blocks.append((int(is_run), len(part), part[:1] if is_run else part))
    frame = [b"\x28\xb5\x2f\xfd\xa0", len(data).to_bytes(4, "little")]
    for number, (kind, size, content) in enumerate(blocks, 1):
        block_header = size << 3 | kind << 1 | (number == len(blocks))
        frame += [block_header.to_bytes(3, "little"), content]
    return b"".join(frame)


@dataclass(frozen=True, slots=True)
class Slot:
    """An L2 entry without its COPIED flag, and the host bytes that it refers to."""

    word: int
    subclusters: int = 0
    start: int = 0
    length: int = 0


@dataclass(slots=True)
class L2Table:
    """An L2 table at *offset*; *slots* by index."""

    offset: int
    slots: dict[int, Slot] = field(default_factory=dict)


L1 = dict[int, L2Table]


class ImageBuilder:
    """Lays out a consistent image; `build` gives its bytes.

    Clusters are handed out in ascending order as they are written, with the refcounts counted and
    placed last. Guest clusters are numbered from 0. A cluster written twice moves: its old host
    cluster is free then, unless a snapshot holds it.
    """

    def __init__(
        self,
        *,
        version: int = 3,
        cluster_bits: int = 16,
        refcount_order: int = 4,
        size: int = 64 * MIB,
        extended_l2: bool = False,
        lazy_refcounts: bool = False,
        zstd: bool = False,
        data_file: bytes | None = None,
        data_file_raw: bool = False,
        backing_file: bytes = b"",
        backing_format: bytes | None = None,
        crypt_method: int = CRYPT_NONE,
        luks_header: bytes = b"",
        more_extensions: tuple[tuple[int, bytes], ...] = (),
    ) -> None:
        self.geometry = Geometry(
            version, cluster_bits, refcount_order, size, extended_l2, data_file is not None
        )
        self.zstd = zstd
        self.incompatible = Incompatible(0)
        self.incompatible |= Incompatible.EXTENDED_L2 if extended_l2 else 0
        self.incompatible |= Incompatible.COMPRESSION if zstd else 0
        self.incompatible |= Incompatible.DATA_FILE if data_file is not None else 0
        self.compatible = Compatible.LAZY_REFCOUNTS if lazy_refcounts else Compatible(0)
        self.autoclear = Autoclear.DATA_FILE_RAW if data_file_raw else Autoclear(0)
        self.backing_file = backing_file
        self.crypt_method = crypt_method
        self.luks_header = luks_header
        self.extensions: list[tuple[int, bytes]] = []
        if backing_format is not None:
            self.extensions.append((extensions.BACKING_FORMAT, backing_format))
        if data_file is not None:
            self.extensions.append((extensions.DATA_FILE, data_file))
        self.extensions += more_extensions
        self.data = bytearray(self.geometry.cluster_size)
        self.external = bytearray()
        self.active: L1 = {}
        self.snapshots: list[tuple[Snapshot, L1]] = []
        self.bitmaps: list[tuple[Bitmap, list[int]]] = []
        self._compressed_end = 0
        self._regions: list[tuple[int, int]] = [(0, 1)]

    # Host space

    def place(self, content: bytes) -> int:
        """Put *content* into new clusters, in one piece; returns its host offset."""
        offset = len(self.data)
        self.data += content
        self.skip(0)
        return offset

    def skip(self, clusters: int = 1) -> None:
        """Leave free clusters behind what has been placed so far."""
        size = self.geometry.cluster_size
        self.data += bytes(-len(self.data) % size + clusters * size)

    # The guest's disk

    def write(self, cluster: int, content: bytes) -> None:
        """Write *content* into the guest clusters from *cluster* on, padded with zeros."""
        size = self.geometry.cluster_size
        for index, start in enumerate(range(0, len(content), size), cluster):
            part = content[start : start + size].ljust(size, b"\0")
            self._set(index, self._placed(index, part, 0, entries.SUBCLUSTERS_ALLOCATED))

    def write_zeros(self, cluster: int, *, allocated: bool = False) -> None:
        """Make a guest cluster read as zeros, with or without a host cluster kept for it."""
        extended = self.geometry.extended_l2
        word = 0 if extended else entries.ZERO
        subclusters = entries.SUBCLUSTERS_ZERO if extended else 0
        slot = Slot(word, subclusters)
        if allocated:
            slot = self._placed(cluster, bytes(self.geometry.cluster_size), word, subclusters)
        self._set(cluster, slot)

    def write_subclusters(self, cluster: int, content: bytes, allocated: int, zero: int) -> None:
        """Write a guest cluster of which only some subclusters count (two masks of 32 bits)."""
        self._set(cluster, self._placed(cluster, content, 0, zero << 32 | allocated))

    def write_compressed(self, cluster: int, content: bytes) -> None:
        """Write one guest cluster compressed, right behind the one before where it fits."""
        content = content.ljust(self.geometry.cluster_size, b"\0")
        packed = zstd_compress(content) if self.zstd else zlib_compress(content)
        start = self._place_compressed(packed)
        more_sectors = (start + len(packed) - 1) // 512 - start // 512
        if more_sectors >= 1 << (self.geometry.cluster_bits - 8):
            raise ValueError("the content does not compress")
        word = entries.COMPRESSED | more_sectors << self.geometry.compressed_shift | start
        self._set(cluster, Slot(word, 0, start, (more_sectors + 1) * 512 - start % 512))

    def take_snapshot(self, name: str, *, extra_data: bytes | None = None) -> None:
        """Keep the disk as it is now; later writes move away from what the snapshot holds."""
        if extra_data is None:
            extra_data = bytes(8) + self.geometry.virtual_size.to_bytes(8, "big")
        snapshot = Snapshot(
            offset=0,
            l1_table_offset=0,
            l1_size=self.geometry.l1_entries_needed,
            date_sec=1_700_000_000 + 86_400 * len(self.snapshots),
            date_nsec=0,
            vm_clock_nsec=0,
            vm_state_size_32=0,
            extra_data=extra_data,
            id_str=str(len(self.snapshots) + 1).encode(),
            name=name.encode(),
        )
        self.snapshots.append((snapshot, dict(self.active)))

    def add_bitmap(self, name: str, dirty: set[int], *, granularity_bits: int = 16) -> None:
        """A persistent dirty bitmap with the bits *dirty* set, each 2^granularity_bits bytes."""
        bits = -(-self.geometry.virtual_size >> granularity_bits)
        content = bytearray(-(-bits // 8))
        for bit in dirty:
            content[bit // 8] |= 1 << bit % 8
        size = self.geometry.cluster_size
        parts = [bytes(content[at : at + size]) for at in range(0, len(content), size)]
        table = [self._keep(part) if any(part) else 0 for part in parts]
        bitmap = Bitmap(0, 0, len(table), 0, TYPE_DIRTY, granularity_bits, 0, name.encode())
        self.bitmaps.append((bitmap, table))

    def _placed(self, cluster: int, content: bytes, word: int, subclusters: int) -> Slot:
        """The entry for a host cluster with *content*, in the image or in its data file."""
        subclusters = subclusters if self.geometry.extended_l2 else 0
        size = self.geometry.cluster_size
        if not self.geometry.external_data:
            offset = self.place(content)
            return Slot(word | offset, subclusters, offset, size)
        # A data file is laid out as the guest's disk is: so it may also be declared raw.
        offset = cluster * size
        self.external += bytes(max(0, offset + size - len(self.external)))
        self.external[offset : offset + size] = content
        return Slot(word | offset | entries.COPIED, subclusters)

    def _place_compressed(self, packed: bytes) -> int:
        room = -self._compressed_end % self.geometry.cluster_size
        if room < len(packed) and self._compressed_end + room != len(self.data):
            self._compressed_end = len(self.data)
            room = 0
        start = self._compressed_end
        self._compressed_end += len(packed)
        if len(packed) > room:
            self.place(bytes(len(packed) - room))
        self.data[start : self._compressed_end] = packed
        return start

    def _set(self, cluster: int, slot: Slot) -> None:
        if not 0 <= cluster < self.geometry.guest_clusters:
            raise ValueError(f"guest cluster {cluster} is past the end of the disk")
        l1_index, l2_index = divmod(cluster, self.geometry.l2_entries)
        table = self.active.get(l1_index)
        held = any(l1.get(l1_index) is table for _, l1 in self.snapshots)
        if table is None or held:
            slots = {} if table is None else dict(table.slots)
            table = L2Table(self.place(bytes(self.geometry.cluster_size)), slots)
            self.active[l1_index] = table
        table.slots[l2_index] = slot

    # The rest of the image

    def build(self) -> Image:
        """The finished image. A builder builds once."""
        luks_offset = self._keep(self.luks_header)
        directory = self._place_bitmaps()
        directory_offset = self._keep(directory)
        snapshots_offset = self._keep(self._place_snapshots())
        l1_offset = self._keep(bytes(8 * self.geometry.l1_entries_needed))
        counts = self._count_references()
        table_offset, table_clusters = self._place_refcounts(counts)
        self._write_l2_tables(counts)
        self._put(l1_offset, self._l1_words(self.active, counts))
        if self.luks_header:
            pointer = {"offset": luks_offset, "length": len(self.luks_header)}
            self._extend(extensions.CRYPTO_HEADER, extensions.CRYPTO_POINTER.build(pointer))
        if directory:
            self.autoclear |= Autoclear.BITMAPS
            pointer = {
                "nb_bitmaps": len(self.bitmaps),
                "reserved": 0,
                "bitmap_directory_size": len(directory),
                "bitmap_directory_offset": directory_offset,
            }
            self._extend(extensions.BITMAPS, extensions.BITMAPS_POINTER.build(pointer))
        self._write_header(
            size=self.geometry.virtual_size,
            l1_size=self.geometry.l1_entries_needed,
            l1_table_offset=l1_offset,
            refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters,
            nb_snapshots=len(self.snapshots),
            snapshots_offset=snapshots_offset,
        )
        return Image(self.data, bytes(self.external))

    def _keep(self, content: bytes) -> int:
        """Place metadata that is referred to once; nothing (at 0) where there is none."""
        if not content:
            return 0
        offset = self.place(content)
        self._regions.append((offset, len(content)))
        return offset

    def _extend(self, magic: int, content: bytes) -> None:
        self.extensions.append((magic, content))

    def _put(self, offset: int, content: bytes) -> None:
        self.data[offset : offset + len(content)] = content

    def _place_bitmaps(self) -> bytes:
        """The bitmap tables; returns the directory."""
        directory = b""
        for bitmap, table in self.bitmaps:
            offset = self._keep(np.array(table, dtype=">u8").tobytes())
            directory += encode_bitmap(replace(bitmap, bitmap_table_offset=offset))
        return directory

    def _place_snapshots(self) -> bytes:
        """The L1 tables of the snapshots; returns the table that lists them."""
        table = b""
        for snapshot, l1 in self.snapshots:
            offset = self._keep(self._l1_words(l1, Counter()))
            table += encode_snapshot(replace(snapshot, l1_table_offset=offset))
        return table

    def _l1_words(self, l1: L1, counts: Counter[int]) -> bytes:
        words = np.zeros(self.geometry.l1_entries_needed, dtype=">u8")
        for index, table in l1.items():
            words[index] = table.offset | self._copied(table.offset, counts)
        return words.tobytes()

    def _copied(self, offset: int, counts: Counter[int]) -> int:
        return entries.COPIED if counts[offset >> self.geometry.cluster_bits] == 1 else 0

    def _clusters(self, start: int, length: int) -> range:
        """The host clusters that a range of bytes touches."""
        bits = self.geometry.cluster_bits
        return range(start >> bits, (start + length - 1 >> bits) + 1)

    def _count_references(self) -> Counter[int]:
        """References of every host cluster; those of the refcount structure are still missing."""
        counts: Counter[int] = Counter()
        for region in self._regions:
            counts.update(self._clusters(*region))
        for l1 in [self.active, *(l1 for _, l1 in self.snapshots)]:
            for table in l1.values():
                counts.update(self._clusters(table.offset, 1))
                for slot in table.slots.values():
                    counts.update(self._clusters(slot.start, slot.length))
        return counts

    def _write_l2_tables(self, counts: Counter[int]) -> None:
        wide = self.geometry.l2_entry_size // 8
        active = {table.offset: table for table in self.active.values()}
        tables = {table.offset: table for _, l1 in self.snapshots for table in l1.values()}
        for table in (tables | active).values():
            words = np.zeros((self.geometry.l2_entries, wide), dtype=">u8")
            for index, slot in table.slots.items():
                plain = slot.length and not slot.word & entries.COMPRESSED
                own = plain and table.offset in active
                copied = self._copied(slot.start, counts) if own else 0
                words[index] = [slot.word | copied, slot.subclusters][:wide]
            self._put(table.offset, words.tobytes())

    def _place_refcounts(self, counts: Counter[int]) -> tuple[int, int]:
        """The refcount table and its blocks; returns the table's offset and length in clusters."""
        size, per_block = self.geometry.cluster_size, self.geometry.refblock_entries
        used = len(self.data) // size
        blocks = table = 0
        while blocks * per_block < used + blocks + table or table * size < blocks * 8:
            blocks = -(-(used + blocks + table) // per_block)
            table = -(-blocks * 8 // size)
        counts.update(range(used, used + table + blocks))
        refcounts = np.zeros(blocks * per_block, dtype=np.uint64)
        for cluster, count in counts.items():
            if count > self.geometry.refcount_max:
                raise ValueError("more references than the refcount width holds")
            refcounts[cluster] = count
        words = np.arange(used + table, used + table + blocks).astype(">u8") * np.uint64(size)
        offset = self.place(words.astype(">u8").tobytes().ljust(table * size, b"\0"))
        self.place(pack_refcounts(refcounts, self.geometry.refcount_order).tobytes())
        return offset, table

    def _write_header(self, **located: int) -> None:
        """The header, its extensions and the backing file's name, in cluster 0."""
        version = self.geometry.version
        length = HEADER_LENGTH if version > 2 else V2_LENGTH
        area = extensions.encode_extensions(self.extensions)
        header = Header(
            magic=MAGIC,
            version=version,
            backing_file_offset=length + len(area) if self.backing_file else 0,
            backing_file_size=len(self.backing_file),
            cluster_bits=self.geometry.cluster_bits,
            crypt_method=self.crypt_method,
            incompatible_features=self.incompatible,
            compatible_features=self.compatible,
            autoclear_features=self.autoclear,
            refcount_order=self.geometry.refcount_order,
            header_length=length,
            additional=bytes([self.zstd]).ljust(8, b"\0"),
            **located,
        )
        content = encode_header(header) + area + self.backing_file
        if len(content) > self.geometry.cluster_size:
            raise ValueError("the header does not fit one cluster")
        self._put(0, content)


_decoded = lru_cache(maxsize=64)(decode_header)
"""The same header is asked for again and again while an image is damaged."""


class Image:
    """The bytes of an image, to be looked at and changed; places are found by reading it.

    ``data_file`` is what belongs into the external data file, if there is one.
    """

    def __init__(self, data: bytearray, data_file: bytes = b"") -> None:
        self.data = data
        self.data_file = data_file

    @property
    def source(self) -> Bytes:
        return Bytes(bytes(self.data))

    @property
    def header(self) -> Header:
        length = _decoded(bytes(self.data[:104])).header_length
        return _decoded(bytes(self.data[: max(length, 104)]))

    def change_header(self, **fields: int | bytes) -> None:
        """Give header fields new values, whether they make sense or not."""
        content = encode_header(replace(self.header, **fields))  # type: ignore[arg-type]
        self.data[: len(content)] = content

    @property
    def geometry(self) -> Geometry:
        return self.header.geometry

    @property
    def cluster_size(self) -> int:
        return self.geometry.cluster_size

    @property
    def host_clusters(self) -> int:
        return len(self.data) // self.cluster_size

    @property
    def snapshots(self) -> Sequence[Snapshot]:
        return read_snapshots(self.source, self.header, self.geometry).snapshots

    @property
    def bitmaps(self) -> tuple[Bitmap, ...]:
        pointer = Layout.read(self.source).extensions.bitmaps
        return tuple(read_bitmaps(self.source, pointer, self.geometry)) if pointer else ()

    # Words: where they stand, what they are

    def word(self, at: int) -> int:
        """The big-endian 64-bit word at a host offset."""
        return int.from_bytes(self.data[at : at + 8], "big")

    def set_word(self, at: int, value: int) -> None:
        self.data[at : at + 8] = value.to_bytes(8, "big")

    def set_bits(self, at: int, bits: int) -> None:
        self.set_word(at, self.word(at) | bits)

    def clear_bits(self, at: int, bits: int) -> None:
        self.set_word(at, self.word(at) & ~bits)

    def l1_at(self, l1_index: int, snapshot: int | None = None) -> int:
        """Where an L1 entry stands: of the active table, or of a snapshot by its table index."""
        if snapshot is None:
            return self.header.l1_table_offset + 8 * l1_index
        return self.snapshots[snapshot].l1_table_offset + 8 * l1_index

    def l2_table(self, l1_index: int, snapshot: int | None = None) -> int:
        """The host offset of an L2 table."""
        return self.word(self.l1_at(l1_index, snapshot)) & entries.L1_OFFSET

    def l2_at(self, cluster: int, snapshot: int | None = None) -> int:
        """Where the L2 entry of a guest cluster stands; its subcluster bitmap is 8 bytes on."""
        l1_index, l2_index = divmod(cluster, self.geometry.l2_entries)
        return self.l2_table(l1_index, snapshot) + self.geometry.l2_entry_size * l2_index

    def host_offset(self, cluster: int) -> int:
        """The host offset that the active disk maps a guest cluster to; 0: none."""
        return self.word(self.l2_at(cluster)) & entries.L2_OFFSET

    def reftable_at(self, index: int) -> int:
        """Where an entry of the refcount table stands."""
        return self.header.refcount_table_offset + 8 * index

    def refblock(self, index: int) -> int:
        """The host offset of a refcount block."""
        return self.word(self.reftable_at(index)) & entries.REFTABLE_OFFSET

    def refcounts(self) -> list[int]:
        """The stored refcount of every host cluster."""
        blocks = range(-(-self.host_clusters // self.geometry.refblock_entries))
        return [int(count) for index in blocks for count in self._block(index)][
            : self.host_clusters
        ]

    def refcount(self, cluster: int) -> int:
        """The stored refcount of a host cluster."""
        index, within = divmod(cluster, self.geometry.refblock_entries)
        return int(self._block(index)[within])

    def set_refcount(self, cluster: int, value: int) -> None:
        index, within = divmod(cluster, self.geometry.refblock_entries)
        refcounts = self._block(index)
        refcounts[within] = value
        packed = pack_refcounts(refcounts, self.geometry.refcount_order).tobytes()
        self.data[self.refblock(index) : self.refblock(index) + len(packed)] = packed

    def _block(self, index: int) -> Counts:
        at = self.refblock(index)
        raw = np.frombuffer(bytes(self.data[at : at + self.cluster_size]), dtype=np.uint8)
        return unpack_refcounts(raw, self.geometry.refcount_order).copy()

    def mapped(self, l1_index: int) -> list[int]:
        """The guest clusters that an active L2 table maps to whole host clusters, ascending."""
        at = self.l2_table(l1_index)
        if not at:
            return []
        wide = self.geometry.l2_entry_size // 8
        words = np.frombuffer(bytes(self.data[at : at + self.cluster_size]), ">u8")[::wide]
        plain = words & np.uint64(entries.COMPRESSED | entries.ZERO) == 0
        plain &= words & np.uint64(entries.L2_OFFSET) != 0
        return [int(index) + l1_index * len(words) for index in np.flatnonzero(plain)]
