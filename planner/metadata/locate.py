"""Where everything in an image lies, and what is wrong with the places themselves.

Reads the tables that lead to others (snapshot table, L1 tables, refcount table, bitmap directory
and tables) and no L2 table and no refcount block: those are the business of
`planner.check.refcount_walk` and `planner.metadata.refcounts`. What cannot be read is a finding,
and the rest goes on: one broken structure hides only what it leads to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

import numpy as np

from planner.arrays import I64, U64, Mask, is_any_of
from planner.errors import ImageError, as_value
from planner.findings.grouped import FindingsBuilder
from planner.findings.kinds import ACTIVE, NONE, FindingKind, Structure, Where
from planner.metadata.mapping_tables import (
    L1Entries,
    L1Tables,
    L2Tables,
    distinct_l2_tables,
    read_l1_tables,
)
from planner.metadata.refcounts import Reftable, StoredRefcounts
from planner.metadata.regions import Regions, RegionsBuilder, join_regions, make_regions
from planner.metadata.work_limits import MAX_LUKS_BYTES, followed, followed_tables
from planner.qcow2 import entries
from planner.qcow2.bitmaps import read_bitmaps
from planner.qcow2.extensions import CryptoPointer
from planner.qcow2.header import AUTOCLEAR_AT, SIGNED_MAX
from planner.qcow2.layout import MAX_L1_BYTES, Layout, sector_end
from planner.qcow2.luks import gone_key_slots, luks_error, luks_length
from planner.qcow2.snapshots import (
    REQUIRED_EXTRA_DATA,
    Snapshots,
    SnapshotTable,
    read_reachable_snapshots,
)
from planner.source import READABLE_END, Source, present_tables, words_of_tables


@dataclass(frozen=True, slots=True)
class Survey:
    """What was located.

    ``l1``: the entries of all L1 tables that can be read; ``tables``: the L2 tables that they lead
    to; ``present``: positions of those of them that may hold anything but zeros. ``regions``: all
    metadata inside the file but the refcount blocks, which are ``refblocks``. ``stopped``: tables
    that could not be read. ``luks_error``: why QEMU would refuse the LUKS header.
    """

    layout: Layout
    snapshots: SnapshotTable
    reftable: Reftable
    l1: L1Entries
    tables: L2Tables
    present: I64
    regions: Regions
    refblocks: Regions
    stopped: tuple[ImageError, ...]
    luks_error: ImageError | None

    @property
    def every_region(self) -> Regions:
        """All metadata inside the file."""
        return join_regions(self.regions, self.refblocks)

    @property
    def repeats(self) -> Mask:
        """L2 tables that stand at more than one index of the L1 tables, shape of ``tables``."""
        tables, l1 = self.tables, self.l1
        result: Mask = np.zeros(len(tables), dtype=np.bool_)
        result[tables.l1_position[tables.l1_index[tables.l1_position] != l1.l1_index]] = True
        return result


def take_survey(source: Source, layout: Layout, findings: FindingsBuilder) -> Survey:
    """Locate everything. What is wrong with it is added to *findings*."""
    surveyor = _Surveyor(source, layout, findings)
    surveyor.judge_header()
    snapshots = surveyor.read_snapshots()
    reftable = Reftable(source, layout)
    l1, tables, present = surveyor.read_guest(snapshots, reftable)
    surveyor.locate(snapshots, tables)
    surveyor.judge_reftable(reftable)
    return Survey(
        layout=layout,
        snapshots=snapshots,
        reftable=reftable,
        l1=l1,
        tables=tables,
        present=present,
        regions=surveyor.regions.build(),
        refblocks=surveyor.refblock_regions(reftable),
        stopped=tuple(surveyor.stopped),
        luks_error=surveyor.luks_error,
    )


class _Surveyor:
    """One survey; `take_survey` is the order of its steps."""

    def __init__(self, source: Source, layout: Layout, findings: FindingsBuilder) -> None:
        self._source, self._layout = source, layout
        self._geometry = layout.geometry
        self._findings = findings
        self.regions = RegionsBuilder(layout, findings)
        self.stopped: list[ImageError] = []
        self.luks_error: ImageError | None = None

    def _stop(self, error: ImageError, **where: Unpack[Where]) -> None:
        """QEMU ends its check here; what follows is still worth knowing."""
        self.stopped.append(as_value(error))
        found = error.value if isinstance(error.value, int) else 0
        self._findings.add(
            FindingKind.CHECK_STOPPED, found=np.uint64(found & ((1 << 64) - 1)), **where
        )

    def judge_header(self) -> None:
        header, extensions = self._layout.header, self._layout.extensions
        for kind, there in (
            (FindingKind.CORRUPT_BIT, header.corrupt),
            (FindingKind.DIRTY_BIT, header.dirty),
            (FindingKind.STALE_BITMAPS, extensions.stale_bitmaps),
        ):
            if there:
                self._findings.add(kind, structure=Structure.HEADER, host_offset=72, found=1)
        if header.unknown_autoclear:
            self._findings.add(
                FindingKind.UNKNOWN_AUTOCLEAR,
                structure=Structure.HEADER,
                host_offset=AUTOCLEAR_AT,
                found=np.uint64(header.unknown_autoclear),
            )

    def read_snapshots(self) -> SnapshotTable:
        header = self._layout.header
        table, error = read_reachable_snapshots(self._source, header, self._geometry)
        if error is not None:
            place = min(header.snapshots_offset, READABLE_END)
            self._stop(error, structure=Structure.SNAPSHOT_TABLE, host_offset=place)
        extra = table.snapshots.fields()["extra_data_size"].astype(np.int64)
        lacking = np.flatnonzero(extra < REQUIRED_EXTRA_DATA)
        if self._geometry.version >= 3 and len(lacking):
            self._findings.add(
                FindingKind.SNAPSHOT_EXTRA_DATA,
                structure=Structure.SNAPSHOT_TABLE,
                host_offset=table.snapshots.offset[lacking],
                length=40,
                index=lacking,
                found=extra[lacking],
                expected=REQUIRED_EXTRA_DATA,
            )
        if table.snapshots and self._geometry.external_data:
            self._findings.add(
                FindingKind.SNAPSHOTS_WITH_DATA_FILE,
                structure=Structure.SNAPSHOT_TABLE,
                host_offset=table.offset,
                length=table.length,
                found=len(table.snapshots),
            )
        return table

    def read_guest(
        self, snapshots: SnapshotTable, reftable: Reftable
    ) -> tuple[L1Entries, L2Tables, I64]:
        """L1 entries, their L2 tables, and the positions of those of these that are to be read."""
        header = self._layout.header
        active = L1Tables.of_disk(header.l1_table_offset, header.l1_size)
        l1_tables = active.joined(self._readable_l1(snapshots.snapshots))
        l1_tables = self._without_aliases(l1_tables, snapshots.snapshots)
        l1_tables = l1_tables.select(l1_tables.size > 0)
        number = l1_tables.snapshot
        self.regions.add_many(
            Structure.L1_TABLE,
            l1_tables.offset,
            l1_tables.size * 8,
            snapshot=number,
            index=np.where(number == ACTIVE, NONE, number),
        )
        l1 = read_l1_tables(self._source, l1_tables)
        copied = l1.active & (l1.offset != 0)
        stored = StoredRefcounts(self._source, self._layout, reftable)
        unreadable = stored.unreadable(l1.offset >> self._geometry.cluster_bits)
        if unreadable is not None:
            copied &= ~unreadable
        tables = distinct_l2_tables(l1, copied)
        present = present_tables(self._source, tables.offset, self._geometry.cluster_size)
        return l1, tables, np.flatnonzero(present & self._l2_without_aliases(tables))

    def _without_aliases(self, l1_tables: L1Tables, snapshots: Snapshots) -> L1Tables:
        """The L1 tables that are read: not too many in one place."""
        kept = followed_tables(l1_tables.offset, l1_tables.size, self._layout.file_size)
        kept[0] = True  # the active one, whatever lies over it
        if not kept.all():
            first, count = np.argmin(kept), np.count_nonzero(~kept)
            number, offset = int(l1_tables.snapshot[first]), int(l1_tables.offset[first])
            problem = f"the L1 tables of {count} more snapshots lie over others, or fill over 1 GiB"
            self._stop(
                ImageError(f"l1_table_offset of snapshot {number}", offset, problem),
                structure=Structure.SNAPSHOT_TABLE,
                host_offset=int(snapshots.offset[number]),
                length=40,
                index=number,
            )
        return l1_tables.select(kept)

    def _l2_without_aliases(self, tables: L2Tables) -> Mask:
        """Which L2 tables are walked: not too many misaligned ones in one place."""
        end = np.minimum(tables.offset + self._geometry.cluster_size, self._layout.file_size)
        kept = followed(tables.offset, end)
        if not kept.all():
            first, count = int(tables.offset[np.argmin(kept)]), np.count_nonzero(~kept)
            problem = f"{count} more L2 tables lie over others"
            self._stop(ImageError("L2 table offset", first, problem), structure=Structure.L2_TABLE)
        return kept

    def _readable_l1(self, snapshots: Snapshots) -> L1Tables:
        """The L1 tables of the snapshots that have one to be read; why others are not."""
        fields = snapshots.fields()
        offset = fields["l1_table_offset"].astype(np.uint64)
        size = fields["l1_size"].astype(np.int64)
        is_misaligned = (offset & np.uint64(self._geometry.cluster_size - 1)) != 0
        is_too_large = ~is_misaligned & (size > MAX_L1_BYTES // 8)
        is_refused = is_misaligned | is_too_large
        is_too_far = ~is_refused & (size > 0) & ~_can_be_read(offset, size)
        for kind, refused, found, expected in (
            (FindingKind.SNAPSHOT_L1_MISALIGNED, is_misaligned, offset, 0),
            (FindingKind.SNAPSHOT_L1_TOO_LARGE, is_too_large, size, MAX_L1_BYTES // 8),
        ):
            at = np.flatnonzero(refused)
            self._findings.add(
                kind, found=found[at], expected=expected, **_snapshot_entries(snapshots, at)
            )
        for number in np.flatnonzero(is_too_far).tolist():
            field, problem = f"l1_table_offset of snapshot {number}", "past the end of any file"
            self._stop(
                ImageError(field, int(offset[number]), problem),
                **_snapshot_entries(snapshots, number),
            )
        return L1Tables.of_snapshots(snapshots, (size > 0) & ~is_refused & ~is_too_far)

    def locate(self, snapshots: SnapshotTable, tables: L2Tables) -> None:
        """Where all structures lie, but for the L1 tables."""
        header, size = self._layout.header, self._geometry.cluster_size
        add = self.regions.add
        add(Structure.HEADER, 0, size)
        self.regions.add_many(
            Structure.L2_TABLE,
            tables.offset,
            size,
            weight=tables.weight,
            snapshot=tables.snapshot,
            l1_index=tables.l1_index,
        )
        add(Structure.SNAPSHOT_TABLE, snapshots.offset, snapshots.length)
        add(Structure.REFTABLE, header.refcount_table_offset, self._layout.reftable_entries * 8)
        self._locate_luks()
        self._locate_bitmaps()

    def _locate_luks(self) -> None:
        """The LUKS header: whether it opens the disk, and whether it is as long as it says."""
        crypto = self._layout.extensions.crypto
        if crypto is None:
            return
        where: Where = {
            "structure": Structure.LUKS,
            "host_offset": min(crypto.offset, SIGNED_MAX),
            "length": self._geometry.cluster_size,
        }
        # QEMU takes the length as signed, and counts nothing for one that comes out negative.
        if crypto.length <= SIGNED_MAX:
            self.regions.add(Structure.LUKS, crypto.offset, self._followed_luks(crypto, where))
        length = np.uint64(crypto.length)
        self.luks_error = luks_error(self._source, crypto)
        if self.luks_error is not None:
            self._findings.add(FindingKind.LUKS_HEADER_INVALID, found=length, **where)
        else:
            for slot, sector in gone_key_slots(self._source, crypto).items():
                self._findings.add(
                    FindingKind.LUKS_KEY_SLOT_GONE,
                    structure=Structure.LUKS,
                    host_offset=where["host_offset"],
                    length=where["length"],
                    index=slot,
                    found=sector,
                )
        needed = luks_length(self._source, crypto)
        if not needed <= crypto.length <= SIGNED_MAX:
            self._findings.add(
                FindingKind.LUKS_HEADER_LENGTH, found=length, expected=needed, **where
            )

    def _followed_luks(self, crypto: CryptoPointer, where: Where) -> int:
        """How much of what the LUKS header claims is counted, in bytes: not terabytes of holes.

        A claim that reaches past the end of the file stays whole: it is told, and nothing counted.
        """
        reach = sector_end(self._layout.file_size) + self._geometry.cluster_size
        if crypto.length <= MAX_LUKS_BYTES or crypto.offset + crypto.length >= reach:
            return crypto.length
        problem = f"over {MAX_LUKS_BYTES >> 20} MiB: the rest is not counted"
        self._stop(ImageError("crypto header length", crypto.length, problem), **where)
        return MAX_LUKS_BYTES

    def _locate_bitmaps(self) -> None:
        pointer = self._layout.extensions.bitmaps
        if pointer is None:
            return
        offset, size = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
        self.regions.add(Structure.BITMAP_DIRECTORY, offset, size)
        try:
            bitmaps = read_bitmaps(self._source, pointer, self._geometry)
        except ImageError as error:
            where: Where = {
                "structure": Structure.BITMAP_DIRECTORY,
                "host_offset": min(offset, READABLE_END),
            }
            self._findings.add(FindingKind.BITMAP_DIRECTORY_INVALID, **where)
            self._stop(error, **where)
            return
        tables, sizes = bitmaps.tables()
        kept = followed_tables(tables, sizes, self._layout.file_size)
        self._locate_tables(np.flatnonzero(kept), tables[kept], sizes[kept])
        if not kept.all():
            number, count = int(np.argmin(kept)), np.count_nonzero(~kept)
            table_at = int(tables[number])
            problem = f"the tables of {count} more bitmaps lie over others, or fill over 1 GiB"
            self._stop(
                ImageError(f"table of bitmap {number}", table_at, problem),
                structure=Structure.BITMAP_TABLE,
                host_offset=offset,
                index=number,
            )

    def _locate_tables(self, number: I64, offset: U64, size: I64) -> None:
        """Locate the tables of bitmaps, so many entries of each, and the clusters with their bits.

        There may be 65,535, all of them one: each place is read once.
        """
        can_be_read = _can_be_read(offset, size)
        for at in np.flatnonzero(~can_be_read).tolist():
            self.regions.add(
                Structure.BITMAP_TABLE, int(offset[at]), int(size[at]) * 8, index=int(number[at])
            )
        there = can_be_read & (size > 0)
        which, start, count = number[there], offset[there].astype(np.int64), size[there]
        self.regions.add_many(Structure.BITMAP_TABLE, start, count * 8, index=which)
        table, position, word = words_of_tables(self._source, start, count)
        owner, place = which[table], start[table] + position * 8
        bad = entries.bad_bitmap_entries(word, self._geometry)
        self._findings.add(
            FindingKind.BITMAP_ENTRY_INVALID,
            structure=Structure.BITMAP_TABLE,
            host_offset=place[bad],
            index=owner[bad],
            found=word[bad],
        )
        # Of each table that has one the first.
        pairs = zip(owner[bad][::-1].tolist(), word[bad][::-1].tolist(), strict=True)
        invalid = dict(pairs)
        for at in np.flatnonzero(~can_be_read | is_any_of(number, owner[bad])).tolist():
            bitmap, table_at = int(number[at]), int(offset[at])
            where: Where = {"structure": Structure.BITMAP_TABLE, "index": bitmap}
            field = f"table of bitmap {bitmap}"
            if can_be_read[at]:
                error = ImageError(field, f"{invalid[bitmap]:#x}", "an invalid entry")
                where["host_offset"] = table_at
            else:
                error = ImageError(field, table_at, "past the end of any file")
            self._stop(error, **where)
        data = (word & np.uint64(entries.BITMAP_OFFSET)).astype(np.int64)
        some = ~bad & (data != 0)
        if some.any():
            length = self._geometry.cluster_size
            self.regions.add_many(Structure.BITMAP_DATA, data[some], length, index=owner[some])

    def judge_reftable(self, reftable: Reftable) -> None:
        """What is wrong with refcount table entries in themselves."""
        base = self._layout.header.refcount_table_offset
        reserved = np.uint64(entries.REFTABLE_RESERVED)
        misaligned = reftable.misaligned & ~reftable.reserved
        for kind, mask, expected in (
            (FindingKind.REFTABLE_ENTRY_RESERVED, reftable.reserved, reftable.word & ~reserved),
            (FindingKind.REFBLOCK_MISALIGNED, misaligned, np.zeros_like(reftable.word)),
        ):
            self._findings.add(
                kind,
                structure=Structure.REFTABLE,
                host_offset=base + reftable.index[mask] * 8,
                index=reftable.index[mask],
                found=reftable.word[mask],
                expected=expected[mask],
            )

    def refblock_regions(self, reftable: Reftable) -> Regions:
        """The refcount blocks inside the file; they are counted last, so not with the others."""
        bits = self._geometry.cluster_bits
        at = reftable.blocks()
        at = at[~reftable.reserved[at] & (reftable.offset[at] >> bits < self._layout.host_clusters)]
        return make_regions(
            Structure.REFBLOCK, reftable.offset[at], 1 << bits, index=reftable.index[at]
        )


def _can_be_read(offset: U64, entries: I64) -> Mask:
    """Which tables of so many *entries* of 8 bytes end where a file can."""
    return offset <= np.uint64(READABLE_END) - (entries * 8).astype(np.uint64)


def _snapshot_entries(snapshots: Snapshots, at: I64 | int) -> Where:
    """Where the entries of these numbers stand."""
    return {
        "structure": Structure.SNAPSHOT_TABLE,
        "host_offset": snapshots.offset[at],
        "length": 40,
        "index": at,
    }
