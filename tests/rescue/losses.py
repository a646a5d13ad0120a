"""What an image loses: structures that something was written over, as dd or ransomware does it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.guestfs.protocol import What
from planner.guestfs.volumes.find import find_volumes
from planner.qcow2 import entries
from planner.qcow2.header import Header, read_header
from planner.rescue.disk_size import GuestBytes
from planner.source import Source, nonzero_words
from tests.oracle.scene import FileSource

METADATA = (What.DIRECTORY, What.INODE_TABLE, What.BITMAP, What.JOURNAL, What.SUPERBLOCK)


@dataclass(frozen=True, slots=True)
class Truth:
    """Of an image before: its header; of each L2 table, by its offset, the L1 index; those tables
    that lead to any data; and those indices that any metadata of a file system lies in."""

    header: Header
    tables: dict[int, int]
    with_data: frozenset[int]
    of_metadata: frozenset[int]


def truth_of(image: Path) -> Truth:
    with image.open("rb") as file:
        source = FileSource(file.fileno())
        header = read_header(source)
        index, words = nonzero_words(source, header.l1_table_offset, header.l1_size)
        inside = index < header.geometry.l1_entries_needed
        offset = entries.l1_offsets(words)
        pairs = zip(offset[inside].tolist(), index[inside].tolist(), strict=True)
        tables = dict(pairs)
        with_data = frozenset(table for table in tables if _has_data(source, header, table))
        metadata = _metadata(source, header) & set(tables.values())
    return Truth(header, tables, with_data, frozenset(metadata))


def _has_data(source: Source, header: Header, table: int) -> bool:
    _, words = nonzero_words(source, table, header.geometry.cluster_size // 8)
    return bool((entries.l2_offsets(words) != 0).any())


def _metadata(source: Source, header: Header) -> set[int]:
    """The L1 indices that lead to allocated clusters with metadata."""
    guest = GuestBytes(source, header, header.size)
    found: set[int] = set()
    mapped = np.zeros(-(-header.size >> header.cluster_bits) + 1, dtype=np.bool_)
    for low, high in guest.allocated():
        mapped[low >> header.cluster_bits : -(-high >> header.cluster_bits)] = True
    for volume in find_volumes(guest).volumes:
        if volume.filesystem is None:
            continue
        first = volume.space.segments[0].legs[0]
        for extents in volume.filesystem.extents():
            some = extents.select(np.isin(extents.what, METADATA))
            begins = (some.start + first) >> header.cluster_bits
            ends = (some.start + some.length + first - 1) >> header.cluster_bits
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                used = np.flatnonzero(mapped[begin : end + 1]) + begin
                found |= set((used // header.geometry.l2_entries).tolist())
    return found


# ---- losses ----

Overwrite = Callable[[int, int], None]


def _l1(truth: Truth, source: Source, rng: random.Random, over: Overwrite) -> None:
    over(truth.header.l1_table_offset, truth.header.l1_size * 8)


def _header(truth: Truth, source: Source, rng: random.Random, over: Overwrite) -> None:
    over(0, truth.header.geometry.cluster_size)


def _snapshots(truth: Truth, source: Source, rng: random.Random, over: Overwrite) -> None:
    """The snapshot table, which is shorter than the cluster that it begins."""
    over(truth.header.snapshots_offset, truth.header.geometry.cluster_size)


def _refcounts(truth: Truth, source: Source, rng: random.Random, over: Overwrite) -> None:
    header, size = truth.header, truth.header.geometry.cluster_size
    clusters = header.refcount_table_clusters
    _, blocks = nonzero_words(source, header.refcount_table_offset, clusters * size // 8)
    for block in blocks.tolist():
        over(block, size)
    over(header.refcount_table_offset, clusters * size)


def _some_entries(truth: Truth, source: Source, rng: random.Random, over: Overwrite) -> None:
    indices = sorted(truth.tables.values())
    for index in rng.sample(indices, max(1, len(indices) // 3)):
        over(truth.header.l1_table_offset + index * 8, 8)


LOSSES: dict[str, tuple[Callable[[Truth, Source, random.Random, Overwrite], None], ...]] = {
    "header": (_header,),
    "l1": (_l1,),
    "entries": (_some_entries,),
    "header+l1": (_l1, _header),
    "l1+refcounts": (_refcounts, _l1),
    "header+l1+refcounts": (_refcounts, _l1, _header),
    "snapshots": (_snapshots,),
    "header+snapshots": (_snapshots, _header),
    "l1+snapshots": (_snapshots, _l1),
    "header+l1+snapshots": (_snapshots, _l1, _header),
}
OF_SNAPSHOTS = tuple(name for name, parts in LOSSES.items() if _snapshots in parts)
"""Only where there is one."""


def lose(image: Path, damaged: Path, loss: str, truth: Truth, seed: str) -> None:
    """A copy of *image* that lacks what *loss* says: zeros, or garbage, in its place."""
    rng = random.Random(f"lose {seed}")
    garbage = rng.random() < 0.5
    shutil.copyfile(image, damaged)
    with damaged.open("r+b", buffering=0) as file:

        def over(offset: int, length: int) -> None:
            os.pwrite(file.fileno(), rng.randbytes(length) if garbage else bytes(length), offset)

        for each in LOSSES[loss]:
            each(truth, FileSource(file.fileno()), rng, over)
