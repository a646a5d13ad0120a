"""What leaked clusters look like: a lost L2 table, the L1 table of a lost snapshot, or just data.

A leak is waste only if nothing was lost. A cluster full of pointers to other leaked clusters is not
waste: it is the table that mapped them. Only leaked clusters are read, of very many a share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.arrays import I64, U64, Mask
from planner.census import decode_words, split_entries
from planner.findings import FindingKind, Structure
from planner.qcow2 import entries
from planner.report import Report
from planner.source import Source, present_tables, read_tables

MAX_TRIAGED_BYTES = 1 << 30
"""Bytes of leaked clusters that are looked into; of more, every nth cluster."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A leaked cluster that looks like a table.

    ``offset``: of the cluster, bytes. ``targets``: clusters that its words point at.
    ``leaked_targets``: how many of them are leaked too. ``is_l1``: whether most of them are L2
    tables themselves, as those of a lost snapshot's L1 table are.
    """

    offset: int
    targets: int
    leaked_targets: int
    is_l1: bool

    @property
    def sentence(self) -> str:
        """One line for a person who is about to reclaim it."""
        what = "the L1 table of a lost snapshot" if self.is_l1 else "a lost L2 table"
        return (
            f"the leaked cluster at {self.offset} looks like {what}: {self.leaked_targets} of"
            f" the {self.targets} clusters that it points at are leaked too"
        )


@dataclass(frozen=True, slots=True)
class Triage:
    """``suspects``, ascending; ``looked_at`` of ``leaked`` clusters were read or are all zeros."""

    suspects: tuple[Suspect, ...] = ()
    looked_at: int = 0
    leaked: int = 0


def triage_leaks(source: Source, report: Report) -> Triage:
    """Find the leaked clusters that look like tables."""
    mismatches = report.mismatches
    if mismatches is None or not report.counters.leaks:
        return Triage()
    geometry, size = report.geometry, report.geometry.cluster_size
    leaked = mismatches.clusters(FindingKind.LEAK, report.counters.leaks)
    # What is in use and only counted too high is not lost, whatever it looks like. But an L2 table
    # may have lost one of the L1 entries that shared it.
    unused = mismatches.counted[mismatches.index.slots_of(leaked)] == 0
    shared = np.isin(leaked, _known_l2_tables(report))
    offsets = leaked[unused | shared] << geometry.cluster_bits
    filled = offsets[present_tables(source, offsets, size)]
    step = max(1, -(-len(filled) * size // MAX_TRIAGED_BYTES))
    chosen = filled[::step]
    found: list[tuple[int, I64]] = []
    for part, rows in read_tables(source, chosen, size):
        words, _ = split_entries(decode_words(rows), geometry.extended_l2)
        likely = np.flatnonzero(_could_be_tables(words, report)).tolist()
        found.extend((int(chosen[part][at]), _targets(words[at], report)) for at in likely)
    suspects = _judge(found, leaked, report)
    return Triage(suspects, len(leaked) - len(filled) + len(chosen), len(leaked))


def _could_be_tables(words: U64, report: Report) -> Mask:
    """Which rows hold nothing but words that could be entries, and at least one that points."""
    geometry = report.geometry
    packed = (words & np.uint64(entries.COMPRESSED)) != 0
    start, length = entries.compressed_ranges(words, geometry)
    end = report.layout.file_size if report.layout else 0
    unusual = entries.L2_RESERVED | entries.L2_OFFSET & (geometry.cluster_size - 1)
    offset = entries.l2_offsets(words)
    whole = ((words & np.uint64(unusual)) == 0) & (offset < end)
    plausible = np.where(packed, start + length < end + geometry.cluster_size, whole)
    points = packed | (offset != 0)
    all_plausible: Mask = plausible.all(axis=1) & points.any(axis=1)
    return all_plausible


def _targets(words: U64, report: Report) -> I64:
    """The clusters that the words of a table point at, each once."""
    geometry = report.geometry
    packed = (words & np.uint64(entries.COMPRESSED)) != 0
    start, _ = entries.compressed_ranges(words, geometry)
    clusters = np.where(packed, start, entries.l2_offsets(words)) >> geometry.cluster_bits
    return np.unique(clusters[clusters > 0])


def _judge(found: list[tuple[int, I64]], leaked: I64, report: Report) -> tuple[Suspect, ...]:
    """Those of the possible tables whose targets are, for the greater part, leaked too.

    With an external data file the targets are not in this file: there, looking like one is enough.
    """
    bits, known = report.geometry.cluster_bits, _known_l2_tables(report)
    likely = np.array([offset >> bits for offset, _ in found], dtype=np.int64)
    tables = np.unique(np.concatenate((known, likely)))
    suspects = []
    for offset, targets in found:
        hit = _count_in(targets, leaked)
        if hit * 2 < len(targets) and not report.geometry.external_data:
            continue
        is_l1 = _count_in(targets, tables) * 2 > len(targets)
        suspects.append(Suspect(offset, len(targets), hit, is_l1))
    return tuple(suspects)


def _known_l2_tables(report: Report) -> I64:
    """The clusters of all L2 tables that an L1 entry leads to."""
    regions = report.regions
    tables = regions.select(regions.structure == Structure.L2_TABLE)
    return tables.first(report.geometry.cluster_bits)


def _count_in(values: I64, ascending: I64) -> int:
    """How many of *values* are in *ascending*, which may be far longer."""
    if not len(ascending):
        return 0
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return int(np.count_nonzero(ascending[at] == values))
