"""Where the file of an image ends, and where it would have to: whether it is cut off.

QEMU writes every data cluster and every table whole, so that a file which ends in the middle of one
has lost what lay behind. That an entry leads past the end does not say so by itself: it may be
garbage. It does where the refcounts say that something was there, or are lost past the end too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.check.entry_findings import EntryFindings
from planner.findings.grouped import FindingsBuilder, GroupedFindings
from planner.findings.kinds import NONE, FindingKind, Structure
from planner.metadata.refcounts import StoredRefcounts
from planner.metadata.regions import Regions
from planner.qcow2 import entries
from planner.qcow2.layout import Layout
from planner.source import READABLE_END, Source, read_bytes

_TABLES = {Structure.L1_TABLE, Structure.L2_TABLE, Structure.SNAPSHOT_TABLE}
"""What they led to is known no more; refcounts tell how far that reached."""

_NEED_NO_END = (Structure.HEADER, Structure.REFTABLE, Structure.REFBLOCK)
"""Their zeros past the end say nothing, or are judged by what they say."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """A file that is cut off: it has ``ends_at`` bytes, and what it holds takes ``needs``."""

    ends_at: int
    needs: int


def judge_cut_regions(regions: Regions, layout: Layout, findings: FindingsBuilder) -> None:
    """Add a finding for each structure that the file ends in, with the guest bytes behind it."""
    end, geometry = layout.file_size, layout.geometry
    past = regions.offset + regions.size - end
    cut = regions.select((past > 0) & ~np.isin(regions.structure, _NEED_NO_END))
    for structure in map(Structure, sorted(set(cut.structure.tolist()))):
        mine = cut.select(cut.structure == structure)
        kept = np.maximum(end - mine.offset, 0)
        start = np.full(len(kept), NONE, dtype=np.int64)
        length = np.zeros(len(kept), dtype=np.int64)
        if structure is Structure.L2_TABLE:
            lost = kept // geometry.l2_entry_size << geometry.cluster_bits
            start = mine.l1_index * geometry.l2_coverage + lost
            length = geometry.l2_coverage - lost
        elif structure is Structure.L1_TABLE:
            start = kept // 8 * geometry.l2_coverage
            length = mine.size // 8 * geometry.l2_coverage - start
        findings.add(
            FindingKind.CUT_OFF,
            structure=structure,
            count=mine.weight,
            host_offset=mine.offset,
            length=mine.size,
            snapshot=mine.snapshot,
            l1_index=mine.l1_index,
            index=mine.index,
            guest_offset=start,
            guest_length=length,
            found=mine.offset + mine.size - end,
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What a check has found that tells where a file should end."""

    findings: GroupedFindings
    entries: EntryFindings
    stored: StoredRefcounts


def find_cut(source: Source, layout: Layout, found: Found, counted_end: int) -> CutOff | None:
    """Whether the file is cut off; None where nothing shows it.

    *counted_end*: behind the last cluster past the end that has a refcount; 0 where none has.
    """
    # Up to the clusters that are counted; and to those whose refcounts are lost with the rest.
    counted = counted_end << layout.geometry.cluster_bits
    lost = _lost_refblocks(layout, found)
    believed = max(counted, lost.covered)
    ends = [
        _end_of_cut(layout, found),
        _end_of_regions(found.findings, believed),
        _end_of_entries(source, layout, found.entries, believed),
    ]
    if max(ends) or lost.end:
        ends.append(lost.end)
        # What a table that is lost led to can only be told by the refcounts.
        lost_tables = {
            *found.findings.structures(FindingKind.PAST_END),
            *found.findings.structures(FindingKind.CUT_OFF),
        }
        ends.append(counted if lost_tables & _TABLES else 0)
    needs = max(ends)
    return CutOff(layout.file_size, needs) if needs > layout.file_size else None


@dataclass(frozen=True, slots=True)
class _LostRefblocks:
    """Refcount blocks past the end: where the last one ends, and what they count; bytes."""

    end: int
    covered: int


def _lost_refblocks(layout: Layout, found: Found) -> _LostRefblocks:
    findings, bits = found.findings, layout.geometry.cluster_bits
    if len(findings.of(FindingKind.PAST_END, Structure.REFTABLE)):
        # Its place may be what is garbled in the header: not if there is more out there.
        alone = findings.structures(FindingKind.PAST_END) == [Structure.REFTABLE]
        alone &= not found.entries.structures(FindingKind.PAST_END)
        return _LostRefblocks(0, 0 if alone else READABLE_END)
    start = layout.header.refcount_table_offset
    contested = findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    end = start + layout.reftable_entries * 8
    if ((contested >= start) & (contested < end)).any():
        return _LostRefblocks(0, 0)  # What is read there may be something else's words.
    reftable = found.stored.reftable
    at = reftable.blocks()
    at = at[~reftable.reserved[at]]
    at = at[reftable.offset[at] >= layout.file_size]
    covered = (reftable.index[at] + 1) * reftable.entries_per_block << bits
    # QEMU places a block among the clusters that it counts, or before them.
    believed = reftable.offset[at] < covered
    end = int(reftable.offset[at][believed].max(initial=-1)) + layout.geometry.cluster_size
    return _LostRefblocks(end if believed.any() else 0, int(covered[believed].max(initial=0)))


def _end_of_cut(layout: Layout, found: Found) -> int:
    """Of what the file ends in, unless its last cluster has two owners: one may be garbage."""
    last = layout.whole_clusters << layout.geometry.cluster_bits
    if (found.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset == last).any():
        return 0
    kind, size = FindingKind.CUT_OFF, layout.file_size
    past = [int(found.findings.of(kind).found.max(initial=0))]
    past += [
        int(found.entries.furthest(kind, structure, READABLE_END).found.max(initial=0))
        for structure in (Structure.DATA, Structure.COMPRESSED)
    ]
    return size + max(past) if max(past) else 0


def _end_of_regions(findings: GroupedFindings, believed: int) -> int:
    """Of metadata past the end."""
    lost = findings.of(FindingKind.PAST_END)
    inside = lost.host_offset < believed
    return int((lost.host_offset + lost.length)[inside].max(initial=0))


def _end_of_entries(
    source: Source, layout: Layout, found_entries: EntryFindings, believed: int
) -> int:
    """Of guest data past the end."""
    data = found_entries.furthest(FindingKind.PAST_END, Structure.DATA, believed)
    packed = found_entries.furthest(FindingKind.PAST_END, Structure.COMPRESSED, believed)
    end = int(data.found.max(initial=0)) + layout.geometry.cluster_size if len(data) else 0
    for at in packed.host_offset.tolist():
        word = np.frombuffer(read_bytes(source, at, 8), dtype=">u8").astype(np.uint64)
        offset, size = entries.compressed_ranges(word, layout.geometry)
        end = max(end, int(offset[0] + size[0]))
    return end
