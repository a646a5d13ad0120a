"""Counts references one entry at a time, with Python's own numbers: the refcount walk made simple.

Written after docs/interop/qcow2.txt, check_refcounts_l2 and check_oflag_copied, without any of the
planner's masks, rules or ways of counting: the walk must find exactly the same.
"""

import struct
from collections import Counter, defaultdict

import numpy as np
import pytest

from planner.arrays import I64, Slot
from planner.check import check as check_module
from planner.check.census import Census
from planner.check.check import check_image
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, FindingKind, Structure
from planner.metadata.refcounts import StoredRefcounts
from planner.metadata.work_limits import Limits
from planner.progress import Meter
from planner.source import Source, read_bytes

OFFSET_BITS = 0x00FFFFFFFFFFFE00
RESERVED_BITS = 0x3F000000000001FE
ANY_FILE_ENDS = (1 << 63) - (1 << 30)


def check_naively(source: Source) -> Report:
    """A check whose entries are counted here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_module, "count_references", count_references)
        return check_image(source)


def count_references(
    source: Source,
    census: Census,
    stored: StoredRefcounts,
    which: I64,
    meter: Meter,
    *,
    limits: Limits,
) -> None:
    """In the place of `planner.check.refcount_walk.count_references`."""
    walk = _NaiveWalk(source, census)
    for table in which.tolist():
        walk.count_table(table)
    walk.hand_over()


class _NaiveWalk:
    def __init__(self, source: Source, census: Census) -> None:
        self.source, self.census, self.layout = source, census, census.layout
        self.geometry = census.layout.geometry
        self.size, self.bits = self.geometry.cluster_size, self.geometry.cluster_bits
        self.file_size = self.layout.file_size
        self.end = min(-(-self.file_size // 512) * 512, ANY_FILE_ENDS)
        self.references: Counter[int] = Counter()
        self.mapped: dict[int, set[tuple[int, int]]] = defaultdict(set)
        self.compressed: set[int] = set()
        self.any_compressed = False
        self.findings: dict[tuple[FindingKind, Structure], list[tuple[int, int]]]
        self.findings = defaultdict(list)
        # The table that is looked at, the entry in it, and where its last data was.
        self.table = self.column = 0
        self.last: int | None = None

    def count_table(self, table: int) -> None:
        tables, extended = self.census.tables, self.geometry.extended_l2
        raw = read_bytes(self.source, int(tables.offset[table]), self.size)
        numbers = iter(struct.unpack(f">{self.size // 8}Q", raw))
        words = zip(numbers, numbers, strict=True) if extended else ((word, 0) for word in numbers)
        self.table, self.last = table, None
        for self.column, (word, bitmap) in enumerate(words):
            if word >> 62 & 1:
                self.count_compressed(word, bitmap)
            elif word or bitmap:
                self.count_standard(word, bitmap)

    def count_standard(self, word: int, bitmap: int) -> None:
        geometry, offset = self.geometry, word & OFFSET_BITS
        if word & RESERVED_BITS:
            self.report(FindingKind.L2_ENTRY_RESERVED, word)
        is_zero = bool(word & 1) and not geometry.extended_l2
        if is_zero and geometry.version == 2:
            self.report(FindingKind.ZERO_IN_VERSION_2, word)
        is_first_of_data_file = geometry.external_data and word >> 63 and not is_zero
        if offset or is_first_of_data_file:
            self.count_data(word, bitmap, is_zero=is_zero)
        elif not is_zero and bitmap & 0xFFFFFFFF:
            self.report(FindingKind.UNALLOCATED_SUBCLUSTERS, bitmap)

    def count_data(self, word: int, bitmap: int, *, is_zero: bool) -> None:
        geometry, offset, tables = self.geometry, word & OFFSET_BITS, self.census.tables
        allocated = bitmap & 0xFFFFFFFF
        if allocated & bitmap >> 32:
            self.report(FindingKind.SUBCLUSTER_CONFLICT, bitmap)
        holds_data = bool(allocated) if geometry.extended_l2 else not is_zero
        if offset % self.size:
            kind = FindingKind.DATA_MISALIGNED if holds_data else FindingKind.ZERO_MISALIGNED
            self.report(kind, offset)
        active = int(tables.active[self.table])
        self.census.guest.allocated += active
        if self.last is not None and self.last + self.size != offset:
            self.census.guest.fragmented += active
        self.last = offset
        refcount = 1 if geometry.external_data else self.refcount(offset >> self.bits)
        is_copied = word >> 63 == 1
        if tables.copied[self.table] and refcount is not None and is_copied != (refcount == 1):
            self.report(FindingKind.L2_COPIED, is_copied)
        if not geometry.external_data:
            self.count_in_this_file(offset, allocated if geometry.extended_l2 else None, holds_data)

    def count_in_this_file(self, offset: int, allocated: int | None, holds_data: bool) -> None:
        if offset + self.size - self.end >= self.size:
            self.report(FindingKind.PAST_END, offset, Structure.DATA)
            return
        if offset % self.size == 0:
            self.look_for_cut(offset, allocated, holds_data)
        place = int(self.census.tables.l1_index[self.table]), self.column
        for cluster in self.count(offset, self.size):
            self.mapped[cluster].add(place)

    def look_for_cut(self, offset: int, allocated: int | None, holds_data: bool) -> None:
        needed = self.size if holds_data else 0
        if allocated is not None:
            needed = allocated.bit_length() * self.size // 32
        tables = self.census.tables
        if tables.snapshot[self.table] == ACTIVE:
            table = int(tables.l1_index[self.table])
            guest = (table * self.geometry.l2_entries + self.column) * self.size
            needed = min(needed, self.geometry.virtual_size - guest)
        if offset < self.file_size < offset + needed:
            lost = offset + needed - self.file_size
            self.report(FindingKind.CUT_OFF, lost, Structure.DATA)

    def count_compressed(self, word: int, bitmap: int) -> None:
        if word >> 63:
            self.report(FindingKind.COMPRESSED_COPIED, word)
        if self.geometry.external_data:
            self.report(FindingKind.COMPRESSED_WITH_DATA_FILE, word)
            return
        self.any_compressed = True
        if bitmap:
            self.report(FindingKind.COMPRESSED_SUBCLUSTERS, bitmap)
            return
        active, guest = int(self.census.tables.active[self.table]), self.census.guest
        guest.allocated += active
        guest.fragmented += active
        guest.compressed += active
        low_bits = 62 - (self.bits - 8)
        offset = word % (1 << low_bits)
        length = (word % (1 << 62) // (1 << low_bits) + 1) * 512 - offset % 512
        if offset + length - self.end >= self.size:
            self.report(FindingKind.PAST_END, offset, Structure.COMPRESSED)
            return
        if offset + length - self.file_size >= 512:
            lost = offset + length - self.file_size
            self.report(FindingKind.CUT_OFF, lost, Structure.COMPRESSED)
        self.compressed.update(self.count(offset, length))

    def count(self, offset: int, length: int) -> range:
        clusters = range(offset // self.size, (offset + length - 1) // self.size + 1)
        for cluster in clusters:
            self.references[cluster] += int(self.census.tables.weight[self.table])
        return clusters

    def refcount(self, cluster: int) -> int | None:
        """As the image has it; None where it cannot be looked up."""
        index, inside = divmod(cluster, self.geometry.refblock_entries)
        table = self.layout.header.refcount_table_offset
        if index >= self.layout.reftable_entries:
            return 0
        word = int.from_bytes(read_bytes(self.source, table + index * 8, 8), "big")
        block, bits = word >> 9 << 9, self.geometry.refcount_bits
        if block % self.size or block > ANY_FILE_ENDS - self.size:
            return None
        if not block:
            return 0
        at = block + inside * bits // 8
        number = int.from_bytes(read_bytes(self.source, at, -(-bits // 8)), "big")
        return number >> inside * bits % 8 & (1 << bits) - 1

    def report(
        self, kind: FindingKind, found: int, structure: Structure = Structure.L2_TABLE
    ) -> None:
        position = self.table * self.geometry.l2_entries + self.column
        self.findings[kind, structure].append((position, found))

    def hand_over(self) -> None:
        """Put everything into the census."""
        census = self.census
        census.separate_mapped()
        for cluster, amount in self.references.items():
            census.references.add_run(self.slot(cluster), 1, amount)
        for cluster, places in self.mapped.items():
            census.mapped.add_run(self.slot(cluster), 1, len(places))
        if self.any_compressed:
            slots = [self.slot(cluster) for cluster in self.compressed]
            census.mark_compressed(np.array(slots, dtype=np.int64))
        for (kind, structure), rows in self.findings.items():
            position, found = zip(*rows, strict=True)
            dtype = np.bool_ if kind is FindingKind.L2_COPIED else np.uint64
            where = np.array(position, dtype=np.int64)
            census.findings.add(kind, where, np.array(found, dtype=dtype), structure)

    def slot(self, cluster: int) -> Slot:
        slots, known = self.census.index.find(np.array([cluster]))
        assert known[0]
        return Slot(int(slots[0]))
