"""A header and an L1 table made anew, where nothing is left of the old ones.

How large clusters are is what the entries of all tables are multiples of. The L1 table is empty,
and lies behind the end of the file; so does an empty refcount table where there is none. How large
the disk is its partition table or its file system says, which lie somewhere among the clusters.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.arrays import I64, distinct
from planner.check.check import check_image
from planner.findings.kinds import FindingKind
from planner.guestfs.volumes.partitions import PROTECTIVE, SECTOR_SIZES
from planner.progress import Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import (
    MAGIC,
    MAX_REFCOUNT_ORDER,
    V3_LENGTH,
    Header,
    decode_header,
    encode_header,
)
from planner.qcow2.layout import MAX_L1_BYTES
from planner.rescue.agreeing_tables import find_reftables, snapshots_at
from planner.rescue.disk_size import DiskSize
from planner.rescue.hypotheses import Found, Hypothesis
from planner.rescue.placing.anchors import find_anchors, likely_rests, mbr_entries
from planner.rescue.placing.board import Board
from planner.rescue.placing.claims import Claims, Sort
from planner.rescue.placing.place import look_around
from planner.rescue.scan import COPIED, Scan, Sectors
from planner.rescue.scanned import Scanned
from planner.source import SECTOR, Grown, Patched, Source, read_bytes, read_tables

FEW = 50
"""One in so many flags may not agree."""

ORDER = 4
"""Of refcounts, where none are left: as QEMU makes them, 16 bits."""

MAX_TRIED = 8
"""Snapshot tables, and refcount tables, that are tried."""

SAMPLE = 4096
"""Sectors of tables whose flags are held against refcounts."""


@dataclass(frozen=True, slots=True)
class Bare:
    """``found``: the header. ``end``: of the file with the new tables. ``has_l1``: whether there is
    something that looks like the L1 table of a disk, so that this one is needed not."""

    found: Found
    end: int
    has_l1: bool


def find_bare(
    source: Source,
    scan: Scan,
    progress: Progress = tell_nobody,
    scanned: Scanned | None = None,
) -> Bare | None:
    """A header for the tables that *source*, by its *scan*, has; None where it has none.

    *scanned*: how far others had come before.
    """
    sectors = scan()
    bits = sectors.cluster_bits
    if bits is None:
        return None
    first = _with_snapshots(source, sectors, _empty(source, sectors, bits))
    around = look_around(_image(source, first), progress, scanned)
    if around is None or not len(around.tables):
        return None
    board = Board(source, around.tables, 1 << 62)
    size = _disk_size(board, around.claims)
    header = _sized(first, size.size)
    image = _image(source, header)
    report = check_image(image)
    now = decode_header(read_bytes(source, 0, V3_LENGTH))
    changed = tuple(n for n in Header.__slots__ if getattr(now, n) != getattr(header, n))
    best = Hypothesis(header, _content(header), report.counters, changed)
    return Bare(Found(now, [best], size), image.size, around.has_l1)


def _empty(source: Source, sectors: Sectors, bits: int) -> Header:
    """A header with an L1 table of one entry, and the refcounts that there are."""
    clusters = np.unique(sectors.number[sectors.aligned(bits)] * SECTOR >> bits)
    once = _counted_once(source, sectors, bits)
    for offset, order in itertools.islice(find_reftables(source, clusters, bits), MAX_TRIED):
        header = _header(source, bits, offset, order)
        if _counts(source, header, once):
            return header
    size = 1 << bits
    return _header(source, bits, -(-source.size // size) * size, ORDER)


def _header(source: Source, bits: int, offset: int, order: int) -> Header:
    """One with the refcount table at *offset*, and its L1 table behind the end of the file."""
    size = 1 << bits
    end = -(-source.size // size) * size
    return Header(
        magic=MAGIC,
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=bits,
        size=Geometry(3, bits, MAX_REFCOUNT_ORDER, 0).l2_coverage,
        crypt_method=0,
        l1_size=1,
        l1_table_offset=end + (size if offset == end else 0),
        refcount_table_offset=offset,
        refcount_table_clusters=1,
        nb_snapshots=0,
        snapshots_offset=0,
        incompatible_features=0,
        refcount_order=order,
        header_length=V3_LENGTH,
    )


def _counted_once(source: Source, sectors: Sectors, bits: int) -> I64:
    """Clusters that, by the COPIED flags of some tables, have a refcount of 1; ascending."""
    number = sectors.number[sectors.aligned(bits) & (sectors.flags & COPIED != 0)]
    number = number[:: -(-len(number) // SAMPLE) or 1]
    found = [number[:0]]
    for _, rows in read_tables(source, number * SECTOR, SECTOR):
        words = entries.decode_words(rows)
        copied = words[words >= np.uint64(entries.COPIED)]
        found.append(entries.l2_offsets(copied) >> bits)
    return distinct(np.concatenate(found))


def _counts(source: Source, header: Header, once: I64) -> bool:
    """Whether the refcounts of *header* are those of an image in which *once* are counted so."""
    mismatches = check_image(_image(source, header)).mismatches
    if mismatches is None:
        return False
    # Nothing refers to any of them yet: each that is counted is one that does not agree.
    slots, known = mismatches.index.find(once)
    agree = int(np.count_nonzero(known & (mismatches.stored[slots] == 1)))
    return agree * FEW >= len(once) * (FEW - 1)


def _with_snapshots(source: Source, sectors: Sectors, header: Header) -> Header:
    """*header* with the snapshot table under which least is wrong."""
    starts = sectors.snapshots * SECTOR
    starts = starts[starts % (1 << header.cluster_bits) == 0]
    best = header, _wrong(source, header)
    for start in starts[:MAX_TRIED].tolist():
        count = snapshots_at(source, header.cluster_bits, start)
        if count:
            tried = replace(header, snapshots_offset=start, nb_snapshots=count)
            wrong = _wrong(source, tried)
            if wrong is not None and (best[1] is None or wrong <= best[1]):
                best = tried, wrong
    return best[0]


_OF_REFCOUNTS = (
    FindingKind.REFCOUNT_MISSING,
    FindingKind.REFCOUNT_UNREADABLE,
    FindingKind.L1_COPIED,
    FindingKind.L2_COPIED,
)


def _wrong(source: Source, header: Header) -> int | None:
    """How much contradicts *header*; refcounts that are gone contradict nothing."""
    report = check_image(_image(source, header))
    if report.error is not None or report.counters.check_errors:
        return None
    none_left = header.refcount_table_offset >= source.size
    ignored = _OF_REFCOUNTS if none_left else ()
    counts = report.counts()
    return sum(number for kind, number in counts.items() if kind not in ignored)


def _sized(header: Header, size: int) -> Header:
    """*header* for a disk of so many bytes."""
    whole = replace(header, size=size)
    most = MAX_L1_BYTES // 8
    needed = min(max(1, whole.geometry.l1_entries_needed), most)
    return replace(whole, l1_size=needed, size=min(size, needed * whole.geometry.l2_coverage))


def _image(source: Source, header: Header) -> Source:
    """*source* with *header*, and room for the tables that are behind its end."""
    cluster = 1 << header.cluster_bits
    end = header.l1_table_offset + -(-header.l1_size * 8 // cluster) * cluster
    return Patched(Grown(source, end), 0, _content(header))


def _content(header: Header) -> bytes:
    fields = encode_header(header)
    return fields + bytes((1 << header.cluster_bits) - len(fields))


# ---- how large the disk is ----


def _disk_size(board: Board, claims: Claims) -> DiskSize:
    for sizes, evidence, is_exact in (
        (_of_gpt(board, claims), "its partition table has its end", True),
        (_of_mbr(board, claims), "its last partition ends there", False),
        (_of_filesystems(board, claims), "the file system on it has that", True),
    ):
        found = sorted(set(sizes))
        if found:
            return DiskSize(found[-1], evidence, is_exact and len(found) == 1)
    least = len(board.tables) * board.coverage
    return DiskSize(least, "so much is mapped", False)


def _of_gpt(board: Board, claims: Claims) -> Iterator[int]:
    gpt = claims.of(Sort.GPT)
    for table, inside, here, other in _rows(gpt.table, gpt.inside, gpt.key, gpt.aux):
        raw = board.bytes_of(table, inside, SECTOR)
        size = int.from_bytes(raw[12:16], "little")
        checksum = int.from_bytes(raw[16:20], "little")
        whole = size <= SECTOR and zlib.crc32(raw[:16] + bytes(4) + raw[20:size]) == checksum
        for sector in SECTOR_SIZES:
            # The first one is where it says: that of a disk within a file is seldom.
            if whole and here == 1 and inside == sector and 0 < other < 1 << 50:
                yield (other + 1) * sector
            elif whole and other == 1 and (here * sector - inside) % board.coverage == 0:
                yield (here + 1) * sector


def _of_mbr(board: Board, claims: Claims) -> Iterator[int]:
    boot = claims.of(Sort.BOOT)
    for table in boot.table[boot.inside == 0].tolist():
        used = mbr_entries(board, table)
        if used is not None:
            plain = used[used["type"] != PROTECTIVE]
            last = (plain["start"].astype(np.int64) + plain["sectors"].astype(np.int64)).tolist()
            yield from (end * SECTOR for end in last)


def _of_filesystems(board: Board, claims: Claims) -> Iterator[int]:
    anchors = find_anchors(board, claims)
    for name in {each.name for each in anchors}:
        mine = [each for each in anchors if each.name == name]
        size = max(each.size for each in mine)
        if size:
            yield -(-(size + min(likely_rests(board, mine))) // SECTOR) * SECTOR


def _rows(*columns: I64) -> Iterator[tuple[int, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)
