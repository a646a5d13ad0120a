"""FAT12, FAT16, FAT32 and exFAT as file systems of the protocol."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from planner.arrays import I64, U8, Mask
from planner.guestfs.columns import little
from planner.guestfs.fat.chains import ChainRuns, Chains
from planner.guestfs.fat.entries import BITMAP, LABEL, UPCASE
from planner.guestfs.fat.volume import FIRST, Volume, find_exfat, find_fat
from planner.guestfs.fat.walk import ROOT, Found, Walk, contiguous
from planner.guestfs.protocol import NO_INODE, Extents, Names, Spans, What, own_extents
from planner.guestfs.reading import Holes, read_blocks

BITMAP_BYTES_AT_A_TIME = 1 << 17


def recognise(source: Holes) -> Fat | None:
    """A FAT12, FAT16 or FAT32 that *source* holds, by its boot sector or the copy of that."""
    volume = find_fat(source)
    return Fat(source, volume) if volume else None


def recognise_exfat(source: Holes) -> Fat | None:
    """An exFAT that *source* holds, by its boot sector or the copy of that."""
    volume = find_exfat(source)
    return Fat(source, volume) if volume else None


class Fat:
    """Any of them; see `planner.guestfs.protocol.FileSystem`."""

    root = ROOT

    def __init__(self, source: Holes, volume: Volume) -> None:
        self._source, self._volume = source, volume
        self.volume = volume
        self._broken_chains = self._lost = self._too_deep = 0
        self._from_copy = False
        self.kind = "exfat" if volume.is_exfat else "vfat"
        self.uuid = f"{volume.serial >> 16:04X}-{volume.serial & 0xFFFF:04X}"
        self.block_size, self.size = volume.cluster_size, volume.size
        self.label = volume.label or self._stored_label()

    def _stored_label(self) -> str:
        if not self._volume.is_exfat:
            return ""
        found = next(iter(Walk(self._source, self._volume, self._chains())), None)
        for entry in [] if found is None else found.own[found.own[:, 0] == LABEL]:
            raw: bytes = entry[2 : 2 + 2 * min(11, int(entry[1]))].tobytes()
            return raw.decode("utf-16-le", "replace")
        return ""

    def _chains(self) -> Chains:
        return Chains(self._source, self._volume)

    @property
    def notes(self) -> list[str]:
        volume, notes = self._volume, []
        if volume.offset:
            notes.append(f"its boot sector cannot be read; the copy at {volume.offset} was used")
        if volume.claimed_size > volume.size:
            notes.append(f"the last {volume.claimed_size - volume.size} bytes of it are not there")
        if self._from_copy:
            notes.append("parts of its first FAT cannot be read; the second was used for them")
        for count, what in (
            (self._broken_chains, "chains of clusters end where no file can"),
            (self._lost, "directories are in no other: that one was lost, and their names with it"),
            (self._too_deep, "directories lie too deep, and were not looked at"),
        ):
            if count:
                notes.append(f"{count} {what}")
        return notes

    # ---- what lies where ----

    def extents(self) -> Iterator[Extents]:
        chains = self._chains()
        self._from_copy |= chains.from_copy
        yield from self._fixed(chains)
        walk = Walk(self._source, self._volume, chains)
        for found in walk:
            if len(found.runs.row):
                yield self._extents(found.runs, found.inode, What.DIRECTORY)
            yield from self._own(found, chains)
            entries = found.entries
            is_file = ~entries.is_directory
            first, number = entries.first[is_file], found.number[is_file]
            size, is_chained = entries.size[is_file], entries.is_chained[is_file]
            for runs in chains.walk(np.where(is_chained, first, 0)):
                yield self._extents(runs, number[runs.row], What.DATA)
            runs = contiguous(self._volume, first, np.where(is_chained, 0, size))
            yield self._extents(runs, number[runs.row], What.DATA)
        self._broken_chains, self._lost = chains.broken, walk.lost
        self._too_deep = walk.too_deep

    def _extents(self, runs: ChainRuns, inode: I64, what: What) -> Extents:
        size = self._volume.cluster_size
        return Extents(
            inode,
            runs.logical * size,
            self._volume.heap + (runs.cluster - FIRST) * size,
            runs.count * size,
            np.full(len(runs.row), what, dtype=np.uint8),
        )

    def _fixed(self, chains: Chains) -> Iterator[Extents]:
        volume = self._volume
        low, high = min(volume.tables), max(volume.tables) + volume.table_size
        tables = np.array(sorted(volume.tables), dtype=np.int64)
        yield own_extents(What.BITMAP, tables, np.full(len(tables), volume.table_size))
        start, length = volume.root_region
        yield own_extents(
            What.SUPERBLOCK,
            np.array([0, high], dtype=np.int64),
            np.array([low, volume.heap - length - high], dtype=np.int64),
        )
        if length:
            one = own_extents(What.DIRECTORY, np.array([start]), np.array([length]))
            yield Extents(one.file_offset, one.file_offset, one.start, one.length, one.what)
        bad = chains.bad()
        yield own_extents(
            What.UNKNOWN,
            volume.heap + (bad - FIRST) * volume.cluster_size,
            np.full(len(bad), volume.cluster_size),
        )

    def _own(self, found: Found, chains: Chains) -> Iterator[Extents]:
        """The bitmap and the table of cases of exFAT."""
        for kind, what in ((BITMAP, What.BITMAP), (UPCASE, What.SUPERBLOCK)):
            for runs in chains.walk(_firsts(found.own, kind)):
                inode = np.full(len(runs.row), NO_INODE, dtype=np.int64)
                extents = self._extents(runs, inode, what)
                yield own_extents(what, extents.start, extents.length)

    def free(self) -> Iterator[Spans]:
        volume, chains = self._volume, self._chains()
        size = volume.cluster_size
        for first, count in self._free_in_bitmap(chains) if volume.is_exfat else chains.free():
            if len(first):
                yield Spans(volume.heap + (first - FIRST) * size, count * size)

    def _free_in_bitmap(self, chains: Chains) -> Iterator[tuple[I64, I64]]:
        volume = self._volume
        size = volume.cluster_size
        own = next((found.own for found in Walk(self._source, volume, chains)), None)
        if own is None:
            return
        for runs in chains.walk(_firsts(own, BITMAP)[:1]):
            extents = self._extents(runs, runs.row, What.BITMAP)
            for logical, start, length in zip(
                extents.file_offset.tolist(),
                extents.start.tolist(),
                extents.length.tolist(),
                strict=True,
            ):
                step = max(size, BITMAP_BYTES_AT_A_TIME)
                for at in range(0, length, step):
                    offset = np.arange(start + at, start + min(at + step, length), size)
                    raw = read_blocks(self._source, offset, size)
                    raw[self._source.are_holes(offset, size)] = 0xFF
                    base = (logical + at) * 8
                    bits = np.unpackbits(raw.reshape(-1), bitorder="little")
                    bits = bits[: max(0, volume.clusters - base)]
                    change = np.diff(np.concatenate(([0], bits == 0, [0])).astype(np.int8))
                    first = np.flatnonzero(change == 1)
                    yield first + base + FIRST, np.flatnonzero(change == -1) - first

    # ---- names ----

    def names(self) -> Iterator[Names]:
        for found in Walk(self._source, self._volume, self._chains()):
            entries = found.entries
            width = 2 * entries.name.shape[1]
            yield Names(
                found.parent,
                found.number,
                entries.is_directory,
                np.ascontiguousarray(entries.name.astype("<u2")).view(np.uint8).reshape(-1),
                np.arange(len(entries), dtype=np.int64) * width,
                entries.length * 2,
                "utf-16-le",
            )

    # ---- records ----

    def records(self, start: I64, length: I64) -> Extents:  # noqa: ARG002
        """None: what is known of a file is in its directory."""
        none = np.zeros(0, dtype=np.int64)
        return Extents(none, none, none, none, none.astype(np.uint8))

    def unlinked(self, inode: I64) -> Mask:
        return np.zeros(len(inode), dtype=np.bool_)


def _firsts(own: U8, kind: int) -> I64:
    """The first clusters that entries of a kind name."""
    some = np.ascontiguousarray(own[own[:, 0] == kind])
    return little(some.reshape(-1), np.arange(len(some), dtype=np.int64) * 32 + 20, 4)
