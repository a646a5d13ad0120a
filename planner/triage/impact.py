"""What the findings of a check mean for a guest: which of its bytes are lost, suspect, at risk.

Ranges of guest offsets, so that millions of findings come to a few numbers. What lies in none of
them reads as it was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from planner.arrays import I64, Mask, distinct, is_among, is_any_of, join_bounds, without_ranges
from planner.check.report import Report
from planner.findings.kinds import ACTIVE, NONE, FindingKind, Structure
from planner.qcow2.header import SIGNED_MAX
from planner.triage.losses import Losses


class Harm(IntEnum):
    """What happens to guest bytes, the worst first."""

    LOST = 0
    SUSPECT = 1
    AT_RISK = 2


_HARM = {
    Harm.LOST: (
        FindingKind.PAST_END,
        FindingKind.TABLE_OVERWRITTEN,
        FindingKind.CUT_OFF,
        FindingKind.COMPRESSED_UNREADABLE,
        FindingKind.L2_TABLE_MISALIGNED,
        FindingKind.DATA_MISALIGNED,
        FindingKind.ZERO_MISALIGNED,  # zeros, and still QEMU reads none of them
        FindingKind.ZERO_IN_VERSION_2,
        FindingKind.COMPRESSED_WITH_DATA_FILE,
    ),
    Harm.SUSPECT: (
        FindingKind.L1_ENTRY_RESERVED,
        FindingKind.L2_ENTRY_RESERVED,
        FindingKind.COMPRESSED_COPIED,
        FindingKind.COMPRESSED_SUBCLUSTERS,
        FindingKind.SUBCLUSTER_CONFLICT,
        FindingKind.UNALLOCATED_SUBCLUSTERS,
    ),
    Harm.AT_RISK: (
        FindingKind.L1_COPIED,
        FindingKind.L2_COPIED,
    ),
}
"""By the guest range that a finding touches; by the owners of a cluster see `_of_owners`."""

_SNAPSHOT_UNREADABLE = (FindingKind.SNAPSHOT_L1_MISALIGNED, FindingKind.SNAPSHOT_L1_TOO_LARGE)

_OF_CLUSTERS = (FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING)


@dataclass(frozen=True, slots=True)
class Ranges:
    """Disjoint ranges of guest bytes, ascending: ``start`` and ``end`` (exclusive), int64."""

    start: I64
    end: I64

    def __len__(self) -> int:
        return len(self.start)

    @property
    def size(self) -> int:
        """How many bytes they are."""
        return int((self.end - self.start).sum())

    def first(self, limit: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the first *limit*."""
        start, length = self.start[:limit], (self.end - self.start)[:limit]
        return zip(start.tolist(), length.tolist(), strict=True)

    def without(self, part: Ranges) -> Ranges:
        """The same without *part*, which lies inside; no two of either touch."""
        return Ranges(*without_ranges((self.start, self.end), (part.start, part.end)))


@dataclass(frozen=True, slots=True)
class Impact:
    """What became of the ``size`` bytes of a disk.

    ``ranges``: by harm; a byte is in the worst one that befalls it. ``is_whole``: whether nothing
    else can be wrong: every table was read, every owner looked up, and the data is in this file.
    """

    size: int
    ranges: dict[Harm, Ranges]
    is_whole: bool

    @property
    def safe(self) -> int:
        """Bytes that nothing has happened to."""
        return self.size - sum(ranges.size for ranges in self.ranges.values())

    def with_more(self, more: dict[Harm, list[Ranges]]) -> Impact:
        """The same with *more* ranges, in any order, that may overlap."""
        worse = _merged(np.zeros((2, 0), dtype=np.int64), self.size)
        ranges = {}
        for harm in Harm:
            parts = [worse, self.ranges[harm], *more.get(harm, [])]
            bounds = np.concatenate([np.stack((part.start, part.end)) for part in parts], axis=1)
            upto = _merged(bounds, self.size)
            ranges[harm] = upto.without(worse)
            worse = upto
        return Impact(self.size, ranges, self.is_whole)


def guest_impact(report: Report, snapshot: int = ACTIVE, losses: Losses | None = None) -> Impact:
    """What the findings mean for the active disk, or for a snapshot's.

    Damage in a table that both share is told of the active disk alone. *losses*: what leaked
    clusters may have been, where that is known: it casts doubt on what leads elsewhere now.
    """
    losses = losses or Losses()
    size = report.geometry.virtual_size
    if snapshot != ACTIVE and report.snapshots[snapshot].disk_size is not None:
        size = min(report.snapshots[snapshot].disk_size or 0, SIGNED_MAX)
    none = np.zeros((2, 0), dtype=np.int64)
    worse = _merged(none, size)
    ranges, low = {}, _low(report)
    for harm in Harm:
        upto = _merged(
            np.concatenate(
                [
                    *_of_findings(report, harm, snapshot),
                    _of_owners(report, harm, snapshot, losses.astray, low),
                    losses.strays if harm is Harm.SUSPECT and snapshot == ACTIVE else none,
                    _of_l1_table(report, harm, snapshot, size),
                    _of_whole_disk(report, harm, size, misread=losses.misread),
                    np.stack((worse.start, worse.end)),
                ],
                axis=1,
            ),
            size,
        )
        ranges[harm] = upto.without(worse)
        worse = upto
    all_low = sum(report.totals.get(kind, 0) for kind in _OF_CLUSTERS)
    is_whole = report.complete and not report.owners.truncated and len(low) == all_low
    is_whole &= not report.geometry.external_data
    return Impact(size, ranges, is_whole)


def _of_findings(report: Report, harm: Harm, snapshot: int) -> Iterator[I64]:
    """Starts and ends of the ranges that findings name, (2, n), some at a time."""
    for batch in report.batches(*_HARM[harm]):
        mine: Mask = (batch.guest_offset != NONE) & (batch.snapshot == snapshot)
        # A COPIED flag that is missing costs a copy at the next write, and harms nothing.
        copied = np.isin(batch.kind, (FindingKind.L1_COPIED, FindingKind.L2_COPIED))
        mine &= ~copied | (batch.found != 0)
        if mine.any():
            start = batch.guest_offset[mine]
            yield np.stack((start, start + batch.guest_length[mine]))


def _of_l1_table(report: Report, harm: Harm, snapshot: int, size: int) -> I64:
    """What an L1 table maps that is not in the file, or shares a cluster: all behind its loss."""
    findings = report.findings
    start: list[int] = []
    if harm is Harm.LOST:
        beyond = findings.of(FindingKind.PAST_END, Structure.L1_TABLE)
        beyond = beyond.select(beyond.snapshot == snapshot)
        end = report.layout.file_size if report.layout else 0
        kept = np.maximum(end - beyond.host_offset, 0) // 8
        start = (kept * report.geometry.l2_coverage).tolist() if len(kept) else []
        unreadable = any(
            (findings.of(kind).index == snapshot).any() for kind in _SNAPSHOT_UNREADABLE
        )
        start += [0] if snapshot != ACTIVE and unreadable else []
    elif harm is Harm.SUSPECT:
        owners = report.owners
        mine = (owners.structure == Structure.L1_TABLE) & (owners.snapshot == snapshot)
        contested = findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
        places = owners.cluster[mine] << report.geometry.cluster_bits
        shared = is_any_of(places, contested).any()
        start = [0] if mine.any() and shared else []
    return np.array([start, [size] * len(start)], dtype=np.int64).reshape(2, -1)


def _of_whole_disk(report: Report, harm: Harm, size: int, *, misread: bool) -> I64:
    """All of it, where nothing can be decrypted, or everything is taken for something else."""
    is_sealed = FindingKind.LUKS_HEADER_INVALID in report.counts()
    everything = is_sealed if harm is Harm.LOST else misread and harm is Harm.SUSPECT
    return np.array([[0], [size]] if everything else [[], []], dtype=np.int64)


def _of_owners(report: Report, harm: Harm, snapshot: int, astray: I64, low: I64) -> I64:
    """Owners of clusters that are used twice, or are *astray*, or are counted too *low*."""
    none = np.zeros((2, 0), dtype=np.int64)
    if report.layout is None or harm is Harm.LOST:
        return none
    owners, geometry = report.owners, report.geometry
    contested = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    doubtful = np.concatenate((contested >> geometry.cluster_bits, astray))
    clusters = doubtful if harm is Harm.SUSPECT else low
    mine: Mask = is_any_of(owners.cluster, clusters) & (owners.snapshot == snapshot)
    guest = mine & np.isin(owners.structure, (Structure.DATA, Structure.COMPRESSED))
    tables = mine & (owners.structure == Structure.L2_TABLE)
    width, size = geometry.l2_entries, geometry.cluster_size
    position = owners.l1_index[guest] * width + owners.l2_index[guest]
    start = np.concatenate((position * size, owners.l1_index[tables] * geometry.l2_coverage))
    length = np.repeat((size, geometry.l2_coverage), (len(position), int(tables.sum())))
    return np.stack((start, start + length))


def _low(report: Report) -> I64:
    """Clusters with too low a refcount whose owners were looked up."""
    if report.mismatches is None:
        return np.zeros(0, dtype=np.int64)
    known = distinct(report.owners.cluster)
    found = [
        report.mismatches.clusters(kind, report.totals[kind])
        for kind in _OF_CLUSTERS
        if report.totals.get(kind)
    ]
    low = np.concatenate([*found, np.zeros(0, dtype=np.int64)])
    return low[is_among(low, known)]


def _merged(bounds: I64, size: int) -> Ranges:
    """Ranges that may overlap, as disjoint ones within a disk of *size* bytes.

    Works in *bounds*: of millions of findings there may be as many ranges.
    """
    np.clip(bounds, 0, size, out=bounds)
    is_empty = bounds[0] >= bounds[1]
    if is_empty.any():
        bounds = bounds[:, ~is_empty]
    bounds.sort(axis=1, kind="stable")
    return Ranges(*join_bounds(*bounds))
