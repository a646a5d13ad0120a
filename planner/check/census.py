"""What the refcount walk finds out: counters, as they grow, and findings about entries."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from planner.arrays import I64, Mask
from planner.check.entry_findings import EntryFindingsBuilder
from planner.metadata.cluster_counters import ClusterCounts, ClusterIndex, Tally
from planner.metadata.mapping_tables import Batch, L2Tables
from planner.qcow2.layout import Layout


@dataclass(slots=True)
class GuestCounters:
    """QEMU's BlockFragInfo, for the active disk."""

    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


@dataclass(slots=True)
class Census:
    """The counts, as they grow.

    ``references``: what QEMU counts, one a slot. ``mapped``: how many different guest clusters have
    their data in a cluster; as long as that comes to the same, the same object as ``references``.
    ``compressed``: clusters that hold compressed data; None while there are none.
    """

    layout: Layout
    tables: L2Tables
    index: ClusterIndex
    references: ClusterCounts
    mapped: ClusterCounts
    findings: EntryFindingsBuilder
    compressed: Mask | None = None
    guest: GuestCounters = field(default_factory=GuestCounters)

    @classmethod
    def begin(
        cls, layout: Layout, tables: L2Tables, index: ClusterIndex, *, keeps_findings: bool = True
    ) -> Census:
        """Nothing is counted yet, of clusters that have a slot in *index*."""
        references = ClusterCounts(index.slots)
        cut_at = layout.file_size % layout.geometry.cluster_size
        findings = EntryFindingsBuilder(layout.geometry, tables, cut_at, keeps=keeps_findings)
        return cls(layout, tables, index, references, references, findings)

    def targets(self, batch: Batch) -> list[tuple[ClusterCounts, int]]:
        """What an entry of a batch that maps a data cluster adds to, and how much."""
        targets = [(self.references, batch.weight)]
        if self.mapped is not self.references and not batch.sibling:
            targets.append((self.mapped, 1))
        return targets

    def count(self, batch: Batch, slots: I64) -> None:
        """Count *slots*, with repeats, that entries of a batch map data in."""
        tally = Tally.of(slots)
        for counts, amount in self.targets(batch):
            counts.add_tally(tally, amount)

    def mapped_twice(self, slots: slice) -> Mask:
        """Which of *slots* hold data of two guest clusters, other than compressed data alone."""
        twice: Mask = self.mapped.values[slots] > 1
        if self.compressed is not None:
            twice |= (self.mapped.values[slots] > 0) & self.compressed[slots]
        return twice

    def holds_data(self, slots: slice | I64) -> Mask:
        """Which of *slots* a guest cluster has data in."""
        holds: Mask = self.mapped.values[slots] > 0
        if self.compressed is not None:
            holds |= self.compressed[slots]
        return holds

    def separate_mapped(self) -> None:
        """From here on references and mapped differ."""
        if self.mapped is self.references:
            self.mapped = self.references.copy()

    def mark_compressed(self, slots: I64) -> None:
        """*slots* hold compressed data."""
        if self.compressed is None:
            self.compressed = np.zeros(self.index.slots, dtype=np.bool_)
        self.compressed[slots] = True
