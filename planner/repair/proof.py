"""What a plan must show before it may be written: better in some way, worse in none.

The overlay's own check is compared with the check before, the plan's bytes with what may be
touched at all. A plan that fails is a defect of a planner, or an image stranger than
foreseen: it is refused, either way.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from planner.arrays import I64, U64, Mask, distinct, is_among, is_any_of, without_repeats
from planner.check.report import Report
from planner.errors import AmbiguousCorruption
from planner.findings.kinds import FindingKind, Structure
from planner.metadata.regions import Regions, join_regions
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import Autoclear, Header, read_header
from planner.qcow2.snapshots import Snapshots
from planner.repair.overlay import Overlay
from planner.repair.plan import (
    COMPARED_SECTORS,
    Plan,
    PlanTier,
    RepairTier,
    Stage,
    StageKind,
)
from planner.repair.readings import differing_entry
from planner.repair.split import contested_but_for_refcounts
from planner.source import SECTOR, Source

_MAY_CHANGE = {
    "refcount_table_offset",
    "refcount_table_clusters",
    "nb_snapshots",
    "snapshots_offset",
    "incompatible_features",
}

_MAY_CHANGE_TOO: dict[PlanTier, set[str]] = {
    RepairTier.SPLIT: {"l1_table_offset"},
}
"""Header fields that a tier is chosen for."""


def require_proof(
    source: Source, plan: Plan, before: Report, after: Report, *, kept: int = 0
) -> None:
    """Raise `AmbiguousCorruption` unless *after*, the check of the overlay, bears the plan out.

    *kept*: so many clusters nothing refers to any more, or are counted again though nothing does:
    they then are leaks. Where entries are pointed elsewhere, it is the bytes behind them that must
    be the same.
    """
    _require_nothing_worse(before, after, kept)
    _require_same_header(source, plan)
    _require_same_snapshots(plan, before, after)
    geometry, moves = before.geometry, plan.tier is RepairTier.SPLIT
    # Of an entry that reads as zeros the repair drops the reference: that owner has nothing there.
    # In tables alike, what is right for one owner is it for the other.
    contested, still = (_contested(report) for report in (before, after))
    still = contested[is_any_of(contested, still)]
    shared = _shared_until(contested, still, before) if moves else {}
    tables = _L2Words(_tables_of(before, after), geometry)
    touched = [np.zeros(0, dtype=np.int64)]
    for stage in plan.stages:
        cluster = stage.sectors * SECTOR >> geometry.cluster_bits
        if is_any_of(distinct(cluster), shared.get(stage.kind, still)).any():
            raise _Unproven("it would write to a cluster with two owners")
        _require_metadata(cluster, before, after, plan)
        touched.append(distinct(cluster))
        if not moves:
            tables.require_same_mapping(stage, cluster)
    if moves:
        _require_same_readings(source, plan, (before, after), distinct(np.concatenate(touched)))


def _shared_until(contested: I64, still: I64, before: Report) -> dict[StageKind, I64]:
    """In which clusters there are two owners up to a stage.

    New refcounts are what counts before entries are pointed elsewhere; what these led to has moved
    away when others are corrected.
    """
    but_for_refcounts = contested_but_for_refcounts(before)
    others = contested[np.isin(contested, np.concatenate((but_for_refcounts, still)))]
    return {
        StageKind.PREPARE: contested,
        StageKind.SWITCH: contested,
        StageKind.REPOINT: others,
    }


def _require_same_readings(
    source: Source, plan: Plan, reports: tuple[Report, Report], touched: I64
) -> None:
    if plan.changes_nothing:
        return
    what = differing_entry((source, Overlay(source, plan)), reports, touched)
    if what is not None:
        raise _Unproven(f"{what} would read other bytes")


def _contested(report: Report) -> I64:
    """Clusters with owners of different kinds, which are not written to."""
    found = report.findings.of(FindingKind.MULTIPLE_OWNERS).host_offset
    clusters = found >> report.geometry.cluster_bits
    return clusters[~is_any_of(clusters, report.owners.of_tables_alike())]


def _tables_of(before: Report, after: Report) -> Regions:
    """What the image has of tables; those of snapshots whose table would be the header are none."""
    header = before.layout.header if before.layout else None
    if header and header.nb_snapshots and not header.snapshots_offset:
        return after.regions
    return join_regions(before.regions, after.regions)


_HIDDEN = {
    FindingKind.REFCOUNT_UNREADABLE: (
        "behind refcounts that cannot be looked up lies more damage, in clusters with two"
        " owners or tables that were overwritten, which are not written to: with the refcounts"
        " mended,"
    ),
    FindingKind.CHECK_STOPPED: (
        "the check stopped before it had seen all of the image, and gets further once it is"
        " repaired:"
    ),
}
"""Of each kind of finding that may hide others: where these come from."""


class _MoreComesToLight(AmbiguousCorruption):
    """The plan is as it should be, and shows damage that it may not mend."""

    def __init__(self, hiding: FindingKind, what: str) -> None:
        super().__init__(
            f"{_HIDDEN[hiding]} {what}", "nothing was written; export the disk", hiding.label
        )


class _Unproven(AmbiguousCorruption):
    """The proof fails."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the repair was planned and then not proven: {what}",
            "nothing was written; export the disk, and report the image",
        )


def _require_nothing_worse(before: Report, after: Report, kept: int) -> None:
    if after.error is not None:
        raise _Unproven(f"the image could not be opened afterwards: {after.error}")
    counts, hiding = before.counts(), _hiding(before, after)
    error = _Unproven if hiding is None else partial(_MoreComesToLight, hiding)
    for name in ("check_errors", "corruptions", "leaks"):
        was, would_be = getattr(before.counters, name), getattr(after.counters, name)
        if would_be > was + (kept if name == "leaks" else 0):
            raise error(f"{name} would go from {was} to {would_be}")
    for kind, number in after.counts().items():
        if kind is FindingKind.LEAK_PAST_END:
            continue  # Refcounts alone tell of it, and only those that can be looked up.
        if number > counts.get(kind, 0) + (kept if kind is FindingKind.LEAK else 0):
            raise error(f"{kind.label} would go from {counts.get(kind, 0)} to {number}")


def _hiding(before: Report, after: Report) -> FindingKind | None:
    """What was in the way of seeing all damage that there was before."""
    if {error.args for error in before.stopped} - {error.args for error in after.stopped}:
        return FindingKind.CHECK_STOPPED
    # What is wrong with a cluster, and the flags about it, is found only where its refcount is
    # known; in a cluster with two owners, or a table that is somebody's data, it stays.
    kinds = before.counts().keys()
    stays = {FindingKind.MULTIPLE_OWNERS, FindingKind.TABLE_OVERWRITTEN} & kinds
    hides = FindingKind.REFCOUNT_UNREADABLE in kinds
    return FindingKind.REFCOUNT_UNREADABLE if hides and stays else None


def _require_same_header(source: Source, plan: Plan) -> None:
    was, would_be = read_header(source), read_header(Overlay(source, plan))
    if not plan.changes_nothing:
        was = replace(was, autoclear_features=was.known_autoclear)
    if plan.tier is RepairTier.BITMAPS:
        was, would_be = (_without_bitmaps(header) for header in (was, would_be))
    may_change = _MAY_CHANGE | _MAY_CHANGE_TOO.get(plan.tier, set())
    for name in Header.__slots__:
        if name not in may_change and getattr(was, name) != getattr(would_be, name):
            raise _Unproven(f"the header field {name} would change")


def _without_bitmaps(header: Header) -> Header:
    """*header* but for the bit that vouches for bitmaps."""
    bits = header.autoclear_features & ~int(Autoclear.BITMAPS)
    return replace(header, autoclear_features=bits)


def _require_same_snapshots(plan: Plan, before: Report, after: Report) -> None:
    was, would_be = _snapshots(before), _snapshots(after)
    if was == would_be:
        return
    is_moved = plan.tier is RepairTier.SPLIT
    (columns, names), (new_columns, new_names) = (
        _told(snapshots.without_zeros(), moved=is_moved) for snapshots in (was, would_be)
    )
    # What the header had left out may come back: behind what it had not.
    more = len(names) if plan.tier is RepairTier.SNAPSHOTS else None
    if names != new_names[:more] or not np.array_equal(columns, new_columns[:more]):
        raise _Unproven("the list of snapshots would change")


def _snapshots(report: Report) -> Snapshots:
    """Those that can be reached: what else the table has may be cut off. The header is none."""
    has_table = report.layout is not None and report.layout.header.snapshots_offset
    return report.snapshots if has_table else Snapshots()


def _told(snapshots: Snapshots, *, moved: bool) -> tuple[U64, list[bytes]]:
    """What the snapshot table says of each snapshot, but for its extra data: numbers, and names.

    *moved*: nor where its L1 table is. There may be 65,536, and no object is made of any.
    """
    fields = snapshots.fields()
    names = ("l1_table_offset", "l1_size", "id_str_size", "date_sec", "date_nsec")
    columns = [fields[name].astype(np.uint64) for name in names[moved:]]
    return np.stack((*columns, snapshots.vm_state_sizes()), axis=1), snapshots.names()


def _require_metadata(cluster: I64, before: Report, after: Report, plan: Plan) -> None:
    """Every sector lies in a known metadata structure, or past what the file was.

    One that only the check *after* knows, as those of a snapshot whose table could not be read
    before, must have been in nobody else's use.
    """
    bits = before.geometry.cluster_bits
    new = cluster << bits >= plan.size_before
    if plan.tier is RepairTier.SPLIT and before.mismatches is not None:
        new |= cluster >= before.mismatches.first_unused()  # copies on a device, which cannot grow
    other = cluster[~new & ~_in_regions(cluster, before.regions, bits)]
    known = _in_regions(other, after.regions, bits)
    guest = before.mismatches
    if not known.all() or (guest is not None and guest.count_references(other).any()):
        raise _Unproven("it would write where no metadata is")
    if guest is not None and (cluster[new] < guest.first_unused()).any():
        raise _Unproven("it would write where something is in use")


def _in_regions(cluster: I64, regions: Regions, bits: int) -> Mask:
    """Which clusters a structure touches."""
    order = np.argsort(regions.first(bits), kind="stable")
    first, last = regions.first(bits)[order], np.maximum.accumulate(regions.last(bits)[order])
    at = np.searchsorted(first, cluster, side="right") - 1
    inside: Mask = at >= 0
    inside[inside] = last[at[inside]] >= cluster[inside]
    return inside


class _L2Words:
    """The L1 and L2 tables of an image, to compare what entries map before and after."""

    def __init__(self, regions: Regions, geometry: Geometry) -> None:
        bits = geometry.cluster_bits
        self._geometry = geometry
        l2 = regions.select(regions.structure == Structure.L2_TABLE)
        l1 = regions.select(regions.structure == Structure.L1_TABLE)
        self._l2 = distinct(np.concatenate((l2.first(bits), l2.last(bits))))
        spans = zip(l1.first(bits).tolist(), l1.last(bits).tolist(), strict=True)
        ranges = [np.arange(first, last + 1) for first, last in spans]
        self._l1 = distinct(np.concatenate([*ranges, np.zeros(0, dtype=np.int64)]))

    def require_same_mapping(self, stage: Stage, cluster: I64) -> None:
        """Raise unless every entry that changes maps what it mapped."""
        of_l2 = self._geometry.l2_entry_size // 8
        for tables, words, meaning in (
            (self._l2, of_l2, self._l2_meaning),
            (self._l1, 1, _l1_meaning),
        ):
            inside = np.flatnonzero(is_among(cluster, tables))
            for start in range(0, len(inside), COMPARED_SECTORS):
                part = inside[start : start + COMPARED_SECTORS]
                both = [
                    rows[part].view(">u8").reshape(-1, words)
                    for rows in (stage.before, stage.after)
                ]
                changed = without_repeats(np.flatnonzero(both[0] != both[1]) // words)
                before, after = (
                    meaning(each[changed].astype(np.uint64).reshape(-1)) for each in both
                )
                if not np.array_equal(before, after):
                    raise _Unproven("an entry would map something else")

    def _l2_meaning(self, words: U64) -> U64:
        """Words of standard and extended L2 entries without what a repair may change."""
        misaligned = np.uint64((self._geometry.cluster_size - 1) & entries.L2_OFFSET)
        if self._geometry.extended_l2:
            return _extended_meaning(words, misaligned)
        packed = (words & np.uint64(entries.COMPRESSED)) != 0
        meaning = np.where(
            packed,
            words & ~np.uint64(entries.COPIED),
            words & ~np.uint64(entries.COPIED | entries.L2_RESERVED),
        )
        zero = ~packed & ((words & np.uint64(entries.ZERO)) != 0) & ((words & misaligned) != 0)
        return np.where(zero, np.uint64(entries.ZERO), meaning)


def _extended_meaning(words: U64, misaligned: np.uint64) -> U64:
    """The same for pairs of an entry and its subcluster bitmap."""
    pairs = words.reshape(-1, 2)
    entry, bitmap = pairs[:, 0], pairs[:, 1]
    packed = (entry & np.uint64(entries.COMPRESSED)) != 0
    meaning = np.where(
        packed,
        entry & ~np.uint64(entries.COPIED),
        entry & ~np.uint64(entries.COPIED | entries.L2_RESERVED),
    )
    allocated = bitmap & np.uint64(entries.SUBCLUSTERS_ALLOCATED)
    zero = ~packed & (allocated == 0) & ((entry & misaligned) != 0)
    return np.stack((np.where(zero, np.uint64(0), meaning), bitmap), axis=1).reshape(-1)


def _l1_meaning(words: U64) -> U64:
    kept: U64 = words & np.uint64(entries.L1_OFFSET)
    return kept
