"""Writes disks with all their metadata and no data, in shapes that no command of QEMU gives.

Their host clusters may lie in random order, and they may have snapshots that share most of them.
Every check of them is clean.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.arrays import I64, U64
from planner.qcow2 import entries
from planner.qcow2.header import MAGIC, V3_LENGTH, Header, encode_header
from planner.qcow2.snapshots import Snapshot, encode_snapshot

GIB = 1 << 30
TIB = 1 << 40

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER // 8
REFCOUNTS = CLUSTER // 2
"""In a refcount block, of 16 bits each."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of *size* bytes, every guest cluster mapped.

    ``shuffled``: host clusters in random order. ``snapshots``: internal ones; between two of them
    one guest cluster of every L2 table was written, so that each has L2 tables of its own, and
    shares all but a few host clusters with the others. Positions are cluster numbers.
    """

    size: int
    shuffled: bool = False
    snapshots: int = 0

    @property
    def tables(self) -> int:
        """L2 tables of one L1 table."""
        return self.size // CLUSTER // L2_ENTRIES

    @property
    def versions(self) -> int:
        """Of the disk: its snapshots, oldest first, and the active one."""
        return self.snapshots + 1

    @property
    def l1_clusters(self) -> int:
        """Clusters of one L1 table."""
        return -(-self.tables * 8 // CLUSTER)

    @property
    def reftable_clusters(self) -> int:
        """A table with room for a little more than there is."""
        clusters = self.versions * self.size // CLUSTER * 2
        return -(-clusters // REFCOUNTS * 8 // CLUSTER) + 1

    def l1(self, version: int) -> int:
        """Where an L1 table begins: behind the header and the refcount table."""
        return 1 + self.reftable_clusters + version * self.l1_clusters

    @property
    def snapshot_table(self) -> int:
        """One cluster, behind all L1 tables."""
        return self.l1(self.versions)

    def l2(self, version: int) -> int:
        """Where the L2 tables of an L1 table begin."""
        return self.snapshot_table + 1 + version * self.tables

    @property
    def data(self) -> int:
        """Where the clusters of the guest begin."""
        return self.l2(self.versions)

    @property
    def data_of_table(self) -> int:
        """Host clusters that the versions of one L2 table map."""
        return L2_ENTRIES + self.snapshots

    @property
    def refblocks(self) -> int:
        """Where the refcount blocks begin: behind everything else."""
        return self.data + self.tables * self.data_of_table

    @property
    def end(self) -> int:
        """Clusters in all."""
        return self.refblocks + -(-self.refblocks // (REFCOUNTS - 1))


def write_disk(path: Path, disk: Disk) -> None:
    """Write *disk* as a sparse file at *path*."""
    refcounts = np.ones(-(-disk.end // REFCOUNTS) * REFCOUNTS, dtype=">u2")
    refcounts[disk.end :] = 0
    # Of the reftable's cluster and of a last snapshot table that is not there.
    refcounts[disk.snapshot_table] = 1 if disk.snapshots else 0
    with path.open("wb") as file:
        fd = file.fileno()
        os.truncate(fd, disk.end * CLUSTER)
        for at, words in _l2_tables(disk, refcounts):
            _write(fd, at, words)
        for version in range(disk.versions):
            tables = np.arange(disk.l2(version), disk.l2(version) + disk.tables)
            _write(fd, disk.l1(version), _pointers(tables) | np.uint64(entries.COPIED))
        _write(fd, 1, _pointers(np.arange(disk.refblocks, disk.end)))
        os.pwrite(fd, refcounts.tobytes(), disk.refblocks * CLUSTER)
        os.pwrite(fd, _snapshot_table(disk), disk.snapshot_table * CLUSTER)
        os.pwrite(fd, encode_header(_header(disk)), 0)


def _l2_tables(disk: Disk, refcounts: np.ndarray) -> Iterator[tuple[int, U64]]:
    """Each L2 table, by its cluster; sets the *refcounts* of what it maps."""
    data = np.arange(disk.data, disk.refblocks)
    if disk.shuffled:
        np.random.default_rng(1).shuffle(data)
    for number, mine in enumerate(data.reshape(disk.tables, disk.data_of_table)):
        mapped, users = mine[:L2_ENTRIES].copy(), np.full(L2_ENTRIES, disk.versions)
        for version in range(disk.versions):
            if version:  # one guest cluster is written, and moves
                refcounts[mapped[version]] = version
                mapped[version] = mine[L2_ENTRIES + version - 1]
                users[version] = disk.versions - version
            words = _pointers(mapped)
            if version == disk.snapshots:
                words[users == 1] |= np.uint64(entries.COPIED)
            yield disk.l2(version) + number, words
        refcounts[mapped] = users


def _pointers(clusters: I64) -> U64:
    return clusters.astype(np.uint64) << np.uint64(CLUSTER_BITS)


def _write(fd: int, cluster: int, words: U64) -> None:
    os.pwrite(fd, words.astype(">u8").tobytes(), cluster * CLUSTER)


def _snapshot_table(disk: Disk) -> bytes:
    return b"".join(
        encode_snapshot(
            Snapshot(
                offset=0,
                l1_table_offset=disk.l1(version) * CLUSTER,
                l1_size=disk.tables,
                date_sec=1_700_000_000 + 86_400 * version,
                date_nsec=0,
                vm_clock_nsec=0,
                vm_state_size_32=0,
                extra_data=bytes(8) + disk.size.to_bytes(8, "big"),
                id_str=str(version + 1).encode(),
                name=f"day {version + 1}".encode(),
            )
        )
        for version in range(disk.snapshots)
    )


def _header(disk: Disk) -> Header:
    return Header(
        magic=MAGIC,
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=CLUSTER_BITS,
        size=disk.size,
        crypt_method=0,
        l1_size=disk.tables,
        l1_table_offset=disk.l1(disk.snapshots) * CLUSTER,
        refcount_table_offset=CLUSTER,
        refcount_table_clusters=disk.reftable_clusters,
        nb_snapshots=disk.snapshots,
        snapshots_offset=disk.snapshot_table * CLUSTER if disk.snapshots else 0,
        header_length=V3_LENGTH,
    )
