"""A program that writes an image, simulated: what QEMU writes to the file, in QEMU's order.

`Program` keeps tables in memory as QEMU does, an L2 cache and a refcount cache of which each may
have to wait for the other (block/qcow2-cache.c, qcow2_cache_set_dependency). What reaches the file
is put into ``pending``, in order; whoever drives it moves that into ``file``, as slow as it likes.
Where QEMU chooses, which entry of a cache is evicted, which free cluster is taken, this chooses at
random, so that its orders are among these. Of each method the docstring names QEMU's function.
Nothing here checks an image.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.qcow2.bitmaps import TYPE_DIRTY, Bitmap, encode_bitmap, read_bitmaps
from planner.qcow2.entries import (
    BITMAP_OFFSET,
    COPIED,
    L1_OFFSET,
    L2_OFFSET,
    REFTABLE_OFFSET,
    SUBCLUSTERS_ALLOCATED,
    SUBCLUSTERS_ZERO,
    ZERO,
)
from planner.qcow2.extensions import BITMAPS
from planner.qcow2.header import Incompatible
from planner.qcow2.layout import Layout
from planner.qcow2.refcounts import pack_refcounts, unpack_refcounts
from planner.qcow2.snapshots import Snapshot, read_snapshots
from planner.source import Bytes

WORD = 8
SIZE_AT, L1_SIZE_AT, REFTABLE_AT, SNAPSHOTS_AT, INCOMPATIBLE_AT = 24, 36, 48, 60, 72
"""Fields of the header that are written alone; behind each of the middle ones a second field."""

DATA = b"data."
"""What a guest writes, the last byte over and over."""


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that go into the file in one call, of the page cache one word after the other."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    size: int


Step = Write | Truncate


@dataclass
class SnapshotOf:
    """A snapshot: where its L1 table is, and what stands in it."""

    name: bytes
    l1_offset: int
    l1: list[int]
    disk_size: int


@dataclass
class BitmapOf:
    name: bytes
    table_offset: int
    table_words: list[int]


@dataclass
class Cache:
    """The tables that are not yet written, of one sort; ``waits``: for the other cache first."""

    dirty: dict[int, None] = field(default_factory=dict)
    waits: bool = False


class Program:
    """One that has *image* open for writing. ``limit``: tables that a cache holds unwritten."""

    def __init__(
        self,
        image: bytes,
        rng: random.Random,
        *,
        limit: int = 4,
        lazy: bool = False,
        data: bytes = DATA,
    ) -> None:
        self.file, self.pending = bytearray(image), deque[Step]()
        self.lazy, self.limit, self._rng, self._data = lazy, limit, rng, data
        source = Bytes(image)
        layout = Layout.read(source)
        header, self.geometry = layout.header, layout.geometry
        self.cluster = self.geometry.cluster_size
        self._wide = self.geometry.l2_entry_size // WORD
        self.size, self._is_dirty = header.size, False
        self.least = header.size
        self._header = bytearray(image[: self.cluster])
        self.l1_offset = header.l1_table_offset
        self.l1 = self._words_at(header.l1_table_offset, header.l1_size)
        self._reftable_offset = header.refcount_table_offset
        self._reftable = self._words_at(header.refcount_table_offset, layout.reftable_entries)
        table = read_snapshots(source, header, self.geometry)
        self.snapshots = [
            SnapshotOf(it.name, it.l1_table_offset, self._l1_at(it), self.size)
            for it in table.snapshots
        ]
        self._kept = len(self.snapshots)
        self._snapshots_offset = header.snapshots_offset
        self._snapshots_bytes = len(self._snapshot_table())
        self._tables: dict[int, list[int]] = {}
        for words in (self.l1, *(it.l1 for it in self.snapshots)):
            for word in words:
                if word & L1_OFFSET:
                    self._tables[word & L1_OFFSET] = self._read_l2(word & L1_OFFSET)
        self.counts = self._read_counts()
        self._l2, self._blocks = Cache(), Cache()
        self._end = len(image)
        self._freed: list[int] = []
        self._load_bitmaps(source, layout)

    # -- the file ------------------------------------------------------------------------------

    def _words_at(self, offset: int, count: int) -> list[int]:
        raw = bytes(self.file[offset : offset + WORD * count])
        return [int(word) for word in np.frombuffer(raw, dtype=">u8")]

    def _read_l2(self, offset: int) -> list[int]:
        return self._words_at(offset, self.geometry.l2_entries * self._wide)

    def _l1_at(self, snapshot: Snapshot) -> list[int]:
        return self._words_at(snapshot.l1_table_offset, snapshot.l1_size)

    def _read_counts(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for index, word in enumerate(self._reftable):
            if word & REFTABLE_OFFSET:
                raw = np.frombuffer(bytes(self.file[word : word + self.cluster]), dtype=np.uint8)
                found = unpack_refcounts(raw, self.geometry.refcount_order)
                first = index * self.geometry.refblock_entries
                counts.update({first + int(at): int(found[at]) for at in np.flatnonzero(found)})
        return counts

    def _put(self, offset: int, data: bytes) -> None:
        self.pending.append(Write(offset, data))
        self._end = max(self._end, offset + len(data))

    def _put_header(self, offset: int, data: bytes) -> None:
        self._header[offset : offset + len(data)] = data
        self._put(offset, data)

    def _put_words(self, offset: int, words: Sequence[int]) -> None:
        self._put(offset, np.array(words, dtype=">u8").tobytes())

    def run_to_end(self) -> None:
        """Have all that is pending written."""
        while self.pending:
            apply(self.file, self.pending.popleft())

    # -- the caches ----------------------------------------------------------------------------

    def _touch_l2(self, table: int) -> None:
        self._l2.dirty[table] = None
        if len(self._l2.dirty) > self.limit:
            self._write_l2(self._rng.choice(list(self._l2.dirty)))

    def _touch_block(self, index: int) -> None:
        self._blocks.dirty[index] = None
        if len(self._blocks.dirty) > self.limit:
            self._write_block(self._rng.choice(list(self._blocks.dirty)))

    def _write_l2(self, table: int) -> None:
        """qcow2_cache_entry_flush, of an L2 table."""
        if self._l2.waits:
            self._l2.waits = False
            self.flush_blocks()
        if table in self._l2.dirty:
            del self._l2.dirty[table]
            self._put_words(table, self._tables[table])

    def _write_block(self, index: int) -> None:
        """qcow2_cache_entry_flush, of a refcount block."""
        if self._blocks.waits:
            self._blocks.waits = False
            self.flush_l2()
        if index in self._blocks.dirty:
            del self._blocks.dirty[index]
            self._put(self._reftable[index] & REFTABLE_OFFSET, self._block_bytes(index))

    def _block_bytes(self, index: int) -> bytes:
        per_block = self.geometry.refblock_entries
        counts = np.zeros(per_block, dtype=np.uint64)
        for cluster, count in self.counts.items():
            if cluster // per_block == index:
                counts[cluster % per_block] = count
        return pack_refcounts(counts, self.geometry.refcount_order).tobytes()

    def flush_l2(self) -> None:
        """qcow2_cache_flush, of the L2 tables, in any order."""
        for table in self._shuffled(self._l2.dirty):
            self._write_l2(table)

    def flush_blocks(self) -> None:
        """qcow2_cache_flush, of the refcount blocks, in any order."""
        for index in self._shuffled(self._blocks.dirty):
            self._write_block(index)

    def _shuffled(self, some: Iterable[int]) -> list[int]:
        found = list(some)
        self._rng.shuffle(found)
        return found

    def flush(self) -> None:
        """qcow2_write_caches: what a guest's flush, or bdrv_flush, does."""
        self.flush_l2()
        if not self._is_dirty:
            self.flush_blocks()

    def evict(self) -> None:
        """A cache needs room, or cleans up (qcow2_cache_do_get)."""
        if self._l2.dirty and (not self._blocks.dirty or self._rng.random() < 0.5):
            self._write_l2(self._rng.choice(list(self._l2.dirty)))
        elif self._blocks.dirty:
            self._write_block(self._rng.choice(list(self._blocks.dirty)))

    def close(self) -> None:
        """qcow2_inactivate, qcow2_mark_clean."""
        self.flush_l2()
        self.flush_blocks()
        if self._is_dirty:
            self._set_dirty(is_dirty=False)

    def _l2_waits(self) -> None:
        """The L2 cache depends on the refcount cache (qcow2_cache_set_dependency)."""
        if self._blocks.waits:
            self._blocks.waits = False
            self.flush_l2()
        self._l2.waits = True

    def _blocks_wait(self) -> None:
        """The other way round."""
        if self._l2.waits:
            self._l2.waits = False
            self.flush_blocks()
        self._blocks.waits = True

    def _set_dirty(self, *, is_dirty: bool) -> None:
        """qcow2_mark_dirty, qcow2_mark_clean."""
        self._is_dirty = is_dirty
        at = INCOMPATIBLE_AT
        bits = int.from_bytes(self._header[at : at + WORD], "big") & ~Incompatible.DIRTY
        bits |= Incompatible.DIRTY if is_dirty else 0
        self._put_header(at, bits.to_bytes(WORD, "big"))

    # -- refcounts -----------------------------------------------------------------------------

    def _raise(self, cluster: int) -> None:
        """update_refcount by 1."""
        self._need_block(cluster // self.geometry.refblock_entries)
        self.counts[cluster] += 1
        assert self.counts[cluster] <= self.geometry.refcount_max
        self._touch_block(cluster // self.geometry.refblock_entries)

    def _lower(self, cluster: int, *, punch: bool) -> None:
        """update_refcount by -1; what is free then is punched at once, where that is passed on."""
        self._blocks_wait()
        assert self.counts[cluster], cluster
        self.counts[cluster] -= 1
        self._touch_block(cluster // self.geometry.refblock_entries)
        if self.counts[cluster]:
            return
        offset = cluster * self.cluster
        self._l2.dirty.pop(offset, None)
        self._tables.pop(offset, None)
        self._freed.append(cluster)
        if punch:
            self._put(offset, bytes(self.cluster))

    def _need_block(self, index: int) -> None:
        """alloc_refcount_block."""
        if index < len(self._reftable) and self._reftable[index] & REFTABLE_OFFSET:
            return
        self.flush_l2()
        if index >= len(self._reftable):
            self._grow_reftable(index)
        at = self._free_cluster()
        if at // self.geometry.refblock_entries != index:
            self._raise(at)
            self.flush_blocks()
            if self._reftable[index] & REFTABLE_OFFSET:
                self._lower(at, punch=False)
                return
        else:
            self.counts[at] += 1
        self._put(at * self.cluster, self._block_bytes(index))
        self._reftable[index] = at * self.cluster
        self._put_words(self._reftable_offset + WORD * index, [at * self.cluster])

    def _grow_reftable(self, index: int) -> None:
        """qcow2_refcount_area: a longer table elsewhere, then the header, then the old one."""
        old, old_length = self._reftable_offset, len(self._reftable)
        length = -(-(index + 1) * WORD // self.cluster) * self.cluster // WORD
        new = self._take_clusters(length * WORD // self.cluster)
        self.flush_blocks()
        self._reftable += [0] * (length - len(self._reftable))
        self._put_words(new, self._reftable)
        self._reftable_offset = new
        clusters = length * WORD // self.cluster
        self._put_header(REFTABLE_AT, new.to_bytes(8, "big") + clusters.to_bytes(4, "big"))
        self._give_back(old, old_length * WORD, punch=False)

    def move_reftable(self) -> None:
        """As it does when it grows, which with small files it hardly would."""
        if len(self._reftable) * WORD < 2 * self.cluster:
            self._grow_reftable(len(self._reftable))

    # -- free clusters -------------------------------------------------------------------------

    def _free_cluster(self) -> int:
        """alloc_clusters_noref: here any, often the one that was freed last."""
        if self._freed and self._rng.random() < 0.6:
            cluster = self._freed.pop(self._rng.choice((-1, 0)))
            if not self.counts[cluster]:
                return cluster
        top = max(self.counts, default=0) + 1
        while not self.counts[top - 1]:
            top -= 1
        if self._rng.random() < 0.5:
            free = [cluster for cluster in range(top) if not self.counts[cluster]]
            if free:
                return self._rng.choice(free[:2] + free[-1:])
        return top

    def _take_cluster(self) -> int:
        """qcow2_alloc_clusters, of one; its offset."""
        while True:
            cluster = self._free_cluster()
            self._need_block(cluster // self.geometry.refblock_entries)
            if not self.counts[cluster]:
                break
        self._raise(cluster)
        return cluster * self.cluster

    def _take_clusters(self, count: int) -> int:
        """qcow2_alloc_clusters, of several in a row; the offset of the first."""
        if count == 1:
            return self._take_cluster()
        while True:
            first = 1 + max(cluster for cluster, used in self.counts.items() if used)
            for cluster in range(first, first + count):
                self._need_block(cluster // self.geometry.refblock_entries)
            if not any(self.counts[cluster] for cluster in range(first, first + count)):
                break
        for cluster in range(first, first + count):
            self._raise(cluster)
        return first * self.cluster

    def _give_back(self, offset: int, length: int, *, punch: bool) -> None:
        """qcow2_free_clusters."""
        for at in range(offset, offset + length, self.cluster):
            self._lower(at // self.cluster, punch=punch)

    # -- the guest -----------------------------------------------------------------------------

    def _table_for(self, l1_index: int) -> int:
        """get_cluster_table, l2_allocate: the L2 table to change, a copy where it is shared."""
        old = self.l1[l1_index]
        if old & L1_OFFSET and old & COPIED:
            return old & L1_OFFSET
        new = self._take_cluster()
        self.flush_blocks()
        empty = [0] * self.geometry.l2_entries * self._wide
        self._tables[new] = list(self._tables[old & L1_OFFSET]) if old & L1_OFFSET else empty
        self._l2.dirty[new] = None
        self.flush_l2()
        self.l1[l1_index] = new | COPIED
        self._put_words(self.l1_offset + WORD * l1_index, [new | COPIED])
        if old & L1_OFFSET:
            self._lower((old & L1_OFFSET) // self.cluster, punch=False)
        return new

    def _slot(self, guest: int) -> tuple[int, int] | None:
        l1_index, l2_index = divmod(guest, self.geometry.l2_entries)
        if l1_index >= len(self.l1) or guest * self.cluster >= self.size:
            return None
        return self._table_for(l1_index), l2_index * self._wide

    def write(self, guest: int) -> None:
        """A guest's write: qcow2_alloc_host_offset, qcow2_alloc_cluster_link_l2."""
        slot = self._slot(guest)
        if slot is None:
            return
        table, at = slot
        words = self._tables[table]
        old = words[at]
        if old & L2_OFFSET and old & COPIED:
            if old & ZERO or (self._wide > 1 and words[at + 1] != SUBCLUSTERS_ALLOCATED):
                self._link(table, at, old & ~ZERO)
            return
        new = self._take_cluster()
        self._put(new, self._data.ljust(self.cluster, self._data[-1:]))
        self._link(table, at, new | COPIED)
        if old & L2_OFFSET:
            self._lower((old & L2_OFFSET) // self.cluster, punch=False)

    def _link(self, table: int, at: int, word: int) -> None:
        if self.lazy and not self._is_dirty:
            self._set_dirty(is_dirty=True)
        if not self.lazy:
            self._l2_waits()
        self._tables[table][at] = word
        if self._wide > 1:
            self._tables[table][at + 1] = SUBCLUSTERS_ALLOCATED
        self._touch_l2(table)

    def discard(self, guest: int, *, full: bool = False) -> None:
        """discard_in_l2_slice."""
        self._drop(guest, 0 if full or self._rng.random() < 0.5 else ZERO)

    def write_zeros(self, guest: int) -> None:
        """zero_in_l2_slice: with the cluster kept, or given up."""
        slot = self._slot(guest)
        if slot is None:
            return
        table, at = slot
        word = self._tables[table][at]
        if self._wide == 1 and word & L2_OFFSET and word & COPIED and self._rng.random() < 0.5:
            self._tables[table][at] = word | ZERO
            self._touch_l2(table)
            return
        self._drop(guest, ZERO)

    def _drop(self, guest: int, left: int) -> None:
        slot = self._slot(guest)
        if slot is None:
            return
        table, at = slot
        words = self._tables[table]
        old = words[at]
        words[at] = left if self._wide == 1 else 0
        if self._wide > 1:
            words[at + 1] = SUBCLUSTERS_ZERO if left else 0
        self._touch_l2(table)
        if old & L2_OFFSET:
            self._lower((old & L2_OFFSET) // self.cluster, punch=self._rng.random() < 0.7)

    # -- snapshots -----------------------------------------------------------------------------

    def _count_entries(self, words: list[int], change: int, *, active: bool) -> None:
        """qcow2_update_snapshot_refcount; of the *active* table the COPIED flags in it too."""
        is_changed = False
        for index, word in enumerate(words):
            table = word & L1_OFFSET
            if not table:
                continue
            self._count_in_table(table, change)
            is_shared = self._change_count(table, change)
            flag = 0 if is_shared else COPIED
            if active and words[index] != table | flag:
                words[index] = table | flag
                is_changed = True
        self.flush()
        if is_changed:
            self._put_words(self.l1_offset, words)

    def _count_in_table(self, table: int, change: int) -> None:
        words = self._tables[table]
        for at in range(0, len(words), self._wide):
            offset = words[at] & L2_OFFSET
            if not offset:
                continue
            shared = self._change_count(offset, change)
            word = words[at] & ~COPIED | (0 if shared else COPIED)
            if self.counts[offset // self.cluster] and word != words[at]:
                if change > 0:
                    self._l2_waits()
                words[at] = word
                self._touch_l2(table)

    def _change_count(self, offset: int, change: int) -> bool:
        """Change the refcount of a cluster by so much; whether it is not 1 then."""
        cluster = offset // self.cluster
        if change > 0:
            self._raise(cluster)
        elif change < 0:
            self._lower(cluster, punch=True)
        return self.counts[cluster] != 1

    def can_snapshot(self) -> bool:
        most = max((count for count in self.counts.values()), default=0)
        return most < self.geometry.refcount_max and len(self.snapshots) < 3

    def snapshot(self) -> None:
        """qcow2_snapshot_create."""
        if not self.can_snapshot():
            return
        length = len(self.l1) * WORD
        offset = self._take_clusters(-(-length // self.cluster))
        kept = list(self.l1)
        self._put_words(offset, kept)
        self._count_entries(self.l1, 1, active=True)
        name = b"s%d" % self._rng.randrange(1000)
        self.snapshots.append(SnapshotOf(name, offset, kept, self.size))
        self._write_snapshots()

    def delete_snapshot(self) -> None:
        """qcow2_snapshot_delete; those that were there at first stay."""
        if len(self.snapshots) <= self._kept:
            return
        gone = self.snapshots.pop(self._rng.randrange(self._kept, len(self.snapshots)))
        self._write_snapshots()
        self._count_entries(gone.l1, -1, active=False)
        length = -(-len(gone.l1) * WORD // self.cluster) * self.cluster
        self._give_back(gone.l1_offset, length, punch=True)
        self._count_entries(self.l1, 0, active=True)

    def _snapshot_table(self) -> bytes:
        table = b""
        for number, it in enumerate(self.snapshots):
            record = it.l1_offset.to_bytes(8, "big") + len(it.l1).to_bytes(4, "big")
            record += (1).to_bytes(2, "big") + len(it.name).to_bytes(2, "big")
            record += bytes(20) + (16).to_bytes(4, "big")
            record += bytes(8) + it.disk_size.to_bytes(8, "big") + b"%d" % (number % 10) + it.name
            table += record.ljust(-(-len(record) // WORD) * WORD, b"\0")
        return table

    def _write_snapshots(self) -> None:
        """qcow2_write_snapshots."""
        old, old_bytes = self._snapshots_offset, self._snapshots_bytes
        table = self._snapshot_table()
        new = self._take_clusters(-(-len(table) // self.cluster)) if table else 0
        self.flush()
        if table:
            self._put(new, table)
        self._snapshots_offset, self._snapshots_bytes = new, len(table)
        self._put_header(
            SNAPSHOTS_AT, len(self.snapshots).to_bytes(4, "big") + new.to_bytes(8, "big")
        )
        if old_bytes:
            self._give_back(old, -(-old_bytes // self.cluster) * self.cluster, punch=True)

    # -- the disk's size -----------------------------------------------------------------------

    def grow(self, clusters: int) -> None:
        """qcow2_co_truncate, qcow2_grow_l1_table."""
        size = self.size + clusters * self.cluster
        entries = -(-size // self.geometry.l2_coverage)
        if entries > len(self.l1):
            old, old_length = self.l1_offset, len(self.l1) * WORD
            new = self._take_clusters(-(-entries * WORD // self.cluster))
            self.flush_blocks()
            self.l1 += [0] * (entries - len(self.l1))
            self._put_words(new, self.l1)
            self.l1_offset = new
            self._put_header(L1_SIZE_AT, entries.to_bytes(4, "big") + new.to_bytes(8, "big"))
            self._give_back(old, old_length, punch=False)
        self.size = size
        self._put_header(SIZE_AT, size.to_bytes(WORD, "big"))

    def shrink(self, clusters: int) -> None:
        """qcow2_co_truncate, qcow2_shrink_l1_table; the file is cut before caches are written.

        Never shorter than it was at first.
        """
        size = max(self.least, self.size - clusters * self.cluster)
        for guest in range(size // self.cluster, -(-self.size // self.cluster)):
            self.discard(guest, full=True)
        kept = -(-size // self.geometry.l2_coverage)
        if any(word & L1_OFFSET for word in self.l1[kept:]):
            self._put_words(self.l1_offset + WORD * kept, [0] * (len(self.l1) - kept))
            gone = [word & L1_OFFSET for word in self.l1[kept:] if word & L1_OFFSET]
            self.l1[kept:] = [0] * (len(self.l1) - kept)
            for table in gone:
                self._lower(table // self.cluster, punch=True)
        used = (1 + max(cluster for cluster, count in self.counts.items() if count)) * self.cluster
        if used < self._end:
            self.pending.append(Truncate(used))
            self._end = used
        self.size = size
        self._put_header(SIZE_AT, size.to_bytes(WORD, "big"))

    # -- bitmaps -------------------------------------------------------------------------------

    def _load_bitmaps(self, source: Bytes, layout: Layout) -> None:
        pointer = layout.extensions.bitmaps
        self.bitmaps: list[BitmapOf] = []
        self._directory = 0, 0
        self._bitmaps_at: int | None = None
        if pointer is None:
            return
        areas = [it.offset for it in layout.extensions.all if it.magic == BITMAPS]
        self._bitmaps_at = areas[0]
        self._directory = pointer.bitmap_directory_offset, pointer.bitmap_directory_size
        for it in read_bitmaps(source, pointer, self.geometry):
            words = self._words_at(it.bitmap_table_offset, it.bitmap_table_size)
            self.bitmaps.append(BitmapOf(it.name, it.bitmap_table_offset, words))

    def add_bitmap(self) -> None:
        """qcow2_store_persistent_dirty_bitmaps, of one more."""
        if self._bitmaps_at is None or len(self.bitmaps) > 3:
            return
        words = [self._take_cluster() if self._rng.random() < 0.7 else self._rng.choice((0, 1))]
        if words[0] > 1:
            self._put(words[0], b"\xff" * self.cluster)
        table = self._take_cluster()
        self._put_words(table, words)
        self.bitmaps.append(BitmapOf(b"b%d" % self._rng.randrange(10**6), table, words))
        self._write_directory()

    def remove_bitmap(self) -> None:
        """qcow2_co_remove_persistent_dirty_bitmap; the first one stays."""
        if self._bitmaps_at is None or len(self.bitmaps) < 2:
            return
        gone = self.bitmaps.pop(self._rng.randrange(1, len(self.bitmaps)))
        self._write_directory()
        for word in gone.table_words:
            if word & BITMAP_OFFSET:
                self._give_back(word & BITMAP_OFFSET, self.cluster, punch=False)
        self._give_back(gone.table_offset, self.cluster, punch=False)

    def _write_directory(self) -> None:
        """update_ext_header_and_dir; qcow2_update_header writes the whole cluster."""
        old = self._directory
        directory = b""
        for it in self.bitmaps:
            length = len(it.table_words)
            record = Bitmap(0, it.table_offset, length, 0, TYPE_DIRTY, 31, 0, it.name)
            directory += encode_bitmap(record)
        new = self._take_clusters(-(-len(directory) // self.cluster))
        self._put(new, directory)
        self.flush_l2()
        self.flush_blocks()
        self._directory = new, len(directory)
        pointer = len(self.bitmaps).to_bytes(4, "big") + bytes(4)
        pointer += len(directory).to_bytes(8, "big") + new.to_bytes(8, "big")
        assert self._bitmaps_at is not None
        self._header[self._bitmaps_at : self._bitmaps_at + len(pointer)] = pointer
        self._put(0, bytes(self._header))
        self._give_back(old[0], -(-old[1] // self.cluster) * self.cluster, punch=False)


def apply(file: bytearray, step: Step) -> None:
    """What one call does to the file."""
    if isinstance(step, Truncate):
        del file[step.size :]
        return
    file += bytes(max(0, step.offset + len(step.data) - len(file)))
    file[step.offset : step.offset + len(step.data)] = step.data


ACTIONS: dict[str, int] = {
    "write": 40,
    "discard": 25,
    "write_zeros": 6,
    "evict": 15,
    "flush": 8,
    "snapshot": 3,
    "delete_snapshot": 3,
    "grow": 2,
    "shrink": 2,
    "add_bitmap": 2,
    "remove_bitmap": 2,
    "move_reftable": 1,
}
"""The methods that do something, and how often each."""

OF_A_GUEST = ("write", "discard", "write_zeros")


def act(program: Program, rng: random.Random, guests: Sequence[int], names: Sequence[str]) -> str:
    """Have it do one of *names*, if to the guest's disk in one of *guests* or behind; what."""
    (name,) = rng.choices(names, [ACTIONS[name] for name in names])
    method = getattr(program, name)
    if name in OF_A_GUEST:
        behind = (program.size - program.least) // program.cluster
        is_behind = behind and rng.random() < 0.2
        first = program.least // program.cluster
        method(first + rng.randrange(behind) if is_behind else rng.choice(guests))
    elif name in ("grow", "shrink"):
        method(rng.choice((1, 8, program.geometry.l2_entries)))
    else:
        method()
    return name
