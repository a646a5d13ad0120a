"""Damage of an image before a machine starts with it: in a part that is quiet, or anywhere.

The kinds are those of `tests.images.random_damage`. Quiet is what a guest that writes only to the
first part of its disk leaves alone: entries of the other part, and the refcounts of what these lead
to; snapshots and bitmaps that were there before.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.arrays import I64
from planner.check.check import check_image
from planner.qcow2.entries import COMPRESSED, L1_OFFSET, L2_OFFSET
from tests.images.random_damage import KINDS
from tests.oracle.scene import Anatomy, FileSource, Scene, dissect

TRIES = 40

DAMAGED = ("corrupt", "incomplete")
"""Verdicts; the second where a check had to stop at what it found."""


class Recorded(Scene):
    """A scene that knows what was changed, and takes it back."""

    def __init__(self, path: Path, anatomy: Anatomy) -> None:
        super().__init__(path, anatomy)
        self.changes: list[tuple[int, bytes, bytes]] = []
        self.was_resized = False
        self._length = self.size

    def write(self, offset: int, data: bytes) -> None:
        before = self.read(offset, len(data))
        self.changes.append((offset, before, data))
        super().write(offset, data)

    def resize(self, size: int) -> None:
        self.was_resized = True
        super().resize(size)

    def __enter__(self) -> Recorded:
        return self

    def take_back(self) -> None:
        """As it was when this was made."""
        for offset, before, _ in reversed(self.changes):
            super().write(offset, before)
        super().resize(self._length)
        self.changes.clear()
        self.was_resized = False


@dataclass(frozen=True, slots=True)
class Quiet:
    """What a guest leaves alone that writes only to the first *written* bytes of its disk.

    ``ranges``: of the file, first byte and end; ``clusters``: of which the refcounts belong to it.
    """

    anatomy: Anatomy
    ranges: tuple[tuple[int, int], ...]
    clusters: I64

    @classmethod
    def of(cls, scene: Scene, written: int) -> Quiet:
        """Of an image that is not damaged."""
        at, geometry = scene.at, scene.at.geometry
        first = -(-written // geometry.cluster_size)
        ranges = [(table.offset, table.offset + 8 * table.count) for table in at.snapshot_l1]
        ranges += [(table.offset, table.offset + 8 * table.count) for table in at.bitmap_tables]
        ranges += [(snapshot.offset, snapshot.offset + 40) for snapshot in at.snapshots]
        clusters = []
        for index in range(at.l1.count):
            table = scene.get(at.l1.offset + 8 * index) & L1_OFFSET
            low = min(max(first - index * geometry.l2_entries, 0), geometry.l2_entries)
            if not table or low == geometry.l2_entries:
                continue
            begin = table + low * geometry.l2_entry_size
            ranges.append((begin, table + geometry.cluster_size))
            if not low:
                ranges.append((at.l1.offset + 8 * index, at.l1.offset + 8 * index + 8))
            raw = scene.read(begin, table + geometry.cluster_size - begin)
            words = np.frombuffer(raw, dtype=">u8")[:: geometry.l2_entry_size // 8].astype(
                np.uint64
            )
            used = words[(words & np.uint64(COMPRESSED) == 0) & (words & np.uint64(L2_OFFSET) != 0)]
            clusters.append((used & np.uint64(L2_OFFSET)).astype(np.int64) // geometry.cluster_size)
        found = np.unique(np.concatenate(clusters)) if clusters else np.zeros(0, dtype=np.int64)
        return cls(at, tuple(ranges), found)

    def holds(self, scene: Recorded) -> bool:
        """Whether all that was changed is quiet."""
        return not scene.was_resized and all(self._holds(*it) for it in scene.changes)

    def _holds(self, offset: int, before: bytes, after: bytes) -> bool:
        end = offset + len(after)
        if any(low <= offset and end <= high for low, high in self.ranges):
            return True
        geometry, size = self.anatomy.geometry, self.anatomy.geometry.cluster_size
        block = offset // size * size
        if block not in self.anatomy.refblocks or end > block + size:
            return False
        first = self.anatomy.refblocks.index(block) * geometry.refblock_entries
        low, high = ((at - block) * 8 // geometry.refcount_bits for at in (offset, end))
        clusters = np.arange(first + low, first + max(high, low + 1))
        # Of a byte with several refcounts one is changed. None becomes 0: that would be taken.
        wide = len(clusters) > 1 and geometry.refcount_bits < 8
        known = np.isin(clusters, self.clusters)
        return any(after) and bool(known.all() or (wide and known.any() and before != after))


def inflict(
    path: Path, written: int, rng: random.Random, name: str, *, in_quiet: bool
) -> str | None:
    """Damage *path* in this way so that it is `DAMAGED`; what was done, None where that did not go.

    *in_quiet*: in what is not written by a guest of the first *written* bytes; or anywhere.
    """
    with Recorded(path, dissect(path)) as scene:
        quiet = Quiet.of(scene, written)
        for _ in range(TRIES):
            what = KINDS[name].inflict(scene, rng)
            if what is not None and (not in_quiet or quiet.holds(scene)) and is_damaged(path):
                return f"{name}: {what}"
            scene.take_back()
    return None


def is_damaged(path: Path) -> bool:
    """Whether a check says so of *path* that nobody writes to."""
    with path.open("rb") as file:
        return check_image(FileSource(file.fileno())).verdict in DAMAGED
