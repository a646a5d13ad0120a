"""What a header leaves over once the snapshots that it does not know are listed again.

Where the snapshot table went with the header, the L1 table of a snapshot looks like that of the
disk, and what of the two is not taken for the disk is leaked. The COPIED flag tells them apart:
QEMU keeps those of the disk as the refcounts are, takes them from all entries of a table when a
snapshot is made of it, and writes to no table that a snapshot has (`qcow2_snapshot_create`,
`qcow2_update_snapshot_refcount`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, distinct, is_among
from planner.check.check import check_image
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, Structure
from planner.progress import Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.header import Header
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, StageKind
from planner.rescue.snapshots import plan_snapshots
from planner.source import SECTOR, Source, nonzero_words, present_tables, read_tables


@dataclass(frozen=True, slots=True)
class Left:
    """What contradicts itself of an image, and what leaks, once ``snapshots`` more are listed."""

    contradictions: int
    leaks: int
    snapshots: int

    @property
    def total(self) -> int:
        """Both."""
        return self.contradictions + self.leaks


def count_left(image: Source, progress: Progress = tell_nobody) -> Left | None:
    """What *image* leaves, its lost snapshots listed; None where not all of it can be looked at."""
    report = check_image(image, progress=progress)
    if report.error is not None or report.counters.check_errors:
        return None
    step = plan_snapshots(image, report, progress=progress)
    table, snapshots = 0, 0
    if step is not None:
        plan, listed = step
        table, snapshots = _new_clusters(plan, report.geometry.cluster_bits), len(listed)
        image = Overlay(image, plan)
        report = check_image(image, progress=progress)
    counters = report.counters
    # That nobody has counted the new table yet is no contradiction, nor what is left of the old.
    corruptions = max(0, counters.corruptions + counters.check_errors - table)
    corruptions += _written_by_the_disk(image, report)
    return Left(corruptions, max(0, counters.leaks - table), snapshots)


def _new_clusters(plan: Plan, bits: int) -> int:
    sectors = [each.sectors for each in plan.stages if each.kind is StageKind.PREPARE]
    return sum(len(distinct(each * SECTOR >> bits)) for each in sectors)


def _written_by_the_disk(image: Source, report: Report) -> int:
    """How many tables that snapshots alone have were written to by a disk since."""
    tables = report.regions.select(report.regions.structure == Structure.L2_TABLE)
    own = distinct(tables.offset[tables.snapshot == ACTIVE])
    theirs: I64 = distinct(tables.offset[tables.snapshot != ACTIVE])
    theirs = theirs[~is_among(theirs, own)]
    geometry, count = report.geometry, 0
    theirs = theirs[present_tables(image, theirs, geometry.cluster_size, anyway=0)]
    for _, rows in read_tables(image, theirs, geometry.cluster_size):
        words, _ = entries.split_entries(entries.decode_words(rows), geometry.extended_l2)
        leads = entries.has_host_cluster(entries.cluster_types(words, geometry))
        copied = leads & (words >= np.uint64(entries.COPIED))
        count += int(np.count_nonzero(copied.any(axis=1)))
    return count


def is_same_disk(source: Source, one: Header, other: Header) -> bool:
    """Whether the L1 tables of two headers lead to the same L2 tables at the same indices."""
    if (one.cluster_bits, one.extended_l2) != (other.cluster_bits, other.extended_l2):
        return False
    found = []
    for header in (one, other):
        index, words = nonzero_words(source, header.l1_table_offset, header.l1_size)
        offset = entries.l1_offsets(words)
        found.append(np.stack((index[offset > 0], offset[offset > 0])))
    return np.array_equal(found[0], found[1])
