"""Which findings hold when they are looked at again: what is left of a torn check.

Of an image that a program writes, words are read at different moments, and together may say what
the image never was. A finding follows from a few of them: the header, the L1 entry that leads to a
table, the entry in it, the refcount table's entry and the refcount. `confirm` reads those again, as
often as `ROUNDS` says, by the same check narrowed to the tables that findings are about, so that
what is wrong is stated once. Each round opens with the header, the L1 tables and the refcount
table, goes on with the refcounts, and then with the entries, whose owners it reads once more; the
next round begins at the header again. So the whole path to an entry is read before and after it,
a refcount before and after the references that it is held against, and the end of the file after
what may reach past it. What is the same in every round, place, value and owners, held from the
first reading to the last, and so all of it held at once, in the middle.

Why that is no moment between two writes of QEMU's. What it writes it orders so that a crash leaves
leaks and nothing worse, and a moment is what a crash would leave (docs/interop/qcow2.txt has the
rules; block/qcow2-cache.c keeps them: a cache with a dependency, qcow2_cache_set_dependency, writes
nothing of its own before qcow2_cache_flush has written the other).

- *Allocation.* qcow2_alloc_clusters raises refcounts in their cache; qcow2_alloc_cluster_link_l2
  has the L2 cache depend on that one before an entry changes. A new L2 table (l2_allocate) is
  flushed, refcounts first, before qcow2_write_l1_entry; a new refcount block (alloc_refcount_block)
  before its entry in the refcount table; a new refcount table (qcow2_refcount_area) before the
  header's pointer. A compressed cluster (qcow2_alloc_bytes) sets the same dependency. Data is
  written, and the file as long as it needs to be, before the entry that leads there.
- *Discard, and copy on write.* discard_in_l2_slice and zero_in_l2_slice change the entry, and
  update_refcount, which lowers, has the refcount cache depend on the L2 cache. A cluster that is
  used again at once is written as free of its old entry first: of two caches that would depend on
  each other the one is flushed when the other's dependency is set.
- *Snapshots.* qcow2_snapshot_create raises all refcounts (qcow2_update_snapshot_refcount, which
  ends with a flush) before qcow2_write_snapshots names the snapshot in a new table and moves the
  header there; qcow2_snapshot_delete does the same backwards. In between there are leaks, and
  COPIED flags that follow the refcounts, which `planner.check.in_flight` tells from damage.
- *Resizing.* qcow2_grow_l1_table writes the new table, then the header's pointer and length in one
  write, then frees the old one; the disk's size comes last. Shrinking, qcow2_shrink_l1_table
  empties L1 entries before it frees tables, qcow2_shrink_reftable unhooks blocks before it frees
  them. But the file is cut off before the entries of what was discarded are written (seen on QEMU
  7.2): `planner.check.in_flight` again.
- *Bitmaps.* update_ext_header_and_dir writes a new directory before the header's extension names
  it. In place (update_ext_header_and_dir_in_place) the autoclear bit is gone meanwhile, so that for
  a check there are no bitmaps, and their clusters are leaks.
- *lazy_refcounts.* While the dirty bit is set refcounts wait for nothing (use_lazy_refcounts), and
  no finding that follows from one means anything: `without_refcounts`.

`python -m tests.live --exhaustive` reads it all from a program that writes in that order, in every
way in which the two can go on, word by word. What remains is chance: words that went away and came
back, each to the same value, in step with every round. A cluster that is freed goes to another
entry than before, all but always; a table that moved is another place. Leaks are not confirmed:
that nothing refers to a cluster cannot be told from some of the tables, and what is in a program's
caches leaks until it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.arrays import I64, U64, Counts, Mask, distinct
from planner.check.check import check_image, concluded
from planner.check.entry_findings import EntryFindings
from planner.check.held import Look
from planner.check.in_flight import COPIED, are_believed
from planner.check.refcount_comparison import Mismatches
from planner.check.report import Live, Report
from planner.findings.grouped import GroupedFindings
from planner.findings.kinds import (
    KINDS,
    FindingKind,
    Findings,
    Owners,
    Severity,
    Structure,
)
from planner.metadata.work_limits import LIMITS
from planner.source import Source

ROUNDS = 8
"""So often, and all the same each time."""

OF_REFCOUNTS = (
    FindingKind.LEAK,
    FindingKind.REFCOUNT_LOW,
    FindingKind.REFCOUNT_MISSING,
    FindingKind.L1_COPIED,
    FindingKind.L2_COPIED,
)
"""What follows from a stored refcount."""

_BY_ALL_TABLES = frozenset({FindingKind.REFCOUNT_OVERFLOW, *COPIED})
"""What shows only where the references of all tables are counted."""

Recheck = Callable[..., Report]
"""`check_image`, or what does more: of a source, with ``only`` some tables."""

_Key = tuple[FindingKind, Structure]
_PLACE = ("host_offset", "length", "snapshot", "l1_index", "l2_index", "index", "found", "expected")


def confirm(
    look: Look,
    report: Report,
    check: Recheck = check_image,
    *,
    rounds: int = ROUNDS,
) -> Report:
    """*report* with those of its corruptions and check errors that hold; leaks and notices as told.

    ``live`` of it says how many held, and how many did not. Each of *rounds* costs no more than
    *check* does of all.
    """
    suspects = _Suspects.of(report)
    only = suspects.tables(report)
    for _ in range(rounds):
        if not suspects.any():
            break
        source = look()
        suspects.hold_against(check(source, only=only), source)
    return suspects.conclude(report)


def has_suspects(report: Report) -> bool:
    """Whether a check found what `confirm` looks at."""
    return any(_is_grave(kind) for kind in report.counts())


def without_refcounts(report: Report) -> Report:
    """*report* without all that follows from refcounts, which are out of date."""
    return _Suspects.of(report, among=OF_REFCOUNTS).conclude(report, told=False)


def _is_grave(kind: FindingKind) -> bool:
    return KINDS[kind].severity >= Severity.CORRUPTION


@dataclass(slots=True)
class _Suspects:
    """Findings that are looked at again, and which of them have held so far, in masks.

    ``rows``: by group, of `Report.findings`. ``entries``: of `Report.entries`, host offset, guest
    offset and what was found of each. ``clusters``: those whose stored refcount, ``stored``, is too
    low. ``owners``: a row for each owner of a cluster, ``owned``.
    """

    rows: dict[_Key, tuple[Findings, Mask]]
    entries: dict[_Key, tuple[tuple[I64, I64, U64], Mask]]
    clusters: I64
    stored: Counts
    is_low: Mask
    owners: npt.NDArray[Any]
    owners_held: Mask
    owned: I64
    drops_leaks: bool

    @classmethod
    def of(cls, report: Report, *, among: tuple[FindingKind, ...] = ()) -> _Suspects:
        """What is looked at of a report; or what is dropped of it: all findings of *among*."""

        def is_wanted(key: _Key) -> bool:
            return key[0] in among if among else _is_grave(key[0])

        def mask(length: int) -> Mask:
            return np.full(length, not among, dtype=np.bool_)

        groups, found = report.findings.groups, report.entries
        rows = {key: (group, mask(len(group))) for key, group in groups.items() if is_wanted(key)}
        entries = {}
        for key in found.groups() if found else ():
            if found and is_wanted(key):
                singles = found.singles(*key)
                entries[key] = singles, mask(len(singles[0]))
        clusters, stored = _low(report.mismatches)
        owners = _owner_rows(report.owners)
        held = np.ones(len(owners), dtype=np.bool_)
        return cls(
            rows=rows,
            entries=entries,
            clusters=clusters,
            stored=stored,
            is_low=mask(len(clusters)),
            owners=owners,
            owners_held=held,
            owned=report.owners.cluster,
            drops_leaks=FindingKind.LEAK in among,
        )

    def any(self) -> bool:
        """Whether one has held."""
        masks = [mask for _, mask in (*self.rows.values(), *self.entries.values())]
        return any(mask.any() for mask in (*masks, self.is_low))

    def tables(self, report: Report) -> I64 | None:
        """Host offsets of the L2 tables that the findings are about; None: of all."""
        found = report.entries
        is_unbounded = len(self.clusters) > LIMITS.owned_low_clusters or report.owners.truncated
        if found is None or is_unbounded or not _BY_ALL_TABLES.isdisjoint(report.counts()):
            return None
        parts = [found.tables_with(kind) for kind in {key[0] for key in self.entries}]
        lost = self.rows.get((FindingKind.TABLE_OVERWRITTEN, Structure.L2_TABLE))
        parts += [lost[0].host_offset] if lost else []
        owners, tables = report.owners, found.tables
        guest = np.isin(owners.structure, (Structure.DATA, Structure.COMPRESSED))
        through = np.stack((owners.snapshot.astype(np.int64), owners.l1_index))[:, guest]
        leading = np.stack((tables.snapshot.astype(np.int64), tables.l1_index))
        parts.append(tables.offset[np.isin(_rows(leading), _rows(through))])
        return distinct(np.concatenate(parts))

    def hold_against(self, fresh: Report, source: Source) -> None:
        """Give up what *fresh*, another look, which was at *source*, does not say too."""
        if fresh.layout is not None and fresh.layout.header.dirty:
            fresh = without_refcounts(fresh)
        for key, (group, mask) in self.rows.items():
            np.logical_and(mask, _are_told(group, fresh.findings.groups.get(key)), out=mask)
            at, value = group.host_offset[mask], group.found[mask]
            mask[mask] = are_believed(fresh, source, key, at, value)
        for key, ((host, guest, found), mask) in self.entries.items():
            np.logical_and(mask, _are_among(fresh.entries, key, host, guest, found), out=mask)
            mask[mask] = are_believed(fresh, source, key, host[mask], found[mask])
        self.owners_held &= np.isin(self.owners, _owner_rows(fresh.owners))
        strangers = distinct(self.owned[~self.owners_held])
        contested = self.rows.get((FindingKind.MULTIPLE_OWNERS, Structure.CLUSTER))
        if contested is not None and fresh.layout is not None:
            clusters = contested[0].host_offset >> fresh.geometry.cluster_bits
            contested[1][np.isin(clusters, strangers)] = False
        self.is_low &= ~np.isin(self.clusters, strangers)
        self.is_low &= _are_low(fresh.mismatches, self.clusters, self.stored)

    def conclude(self, report: Report, *, told: bool = True) -> Report:
        """*report* with those that have held. *told*: ``live`` says how many, and not."""
        before = _number(report)
        groups = dict(report.findings.groups)
        for key, (group, mask) in self.rows.items():
            groups[key] = group.select(mask)
        groups = {key: group for key, group in groups.items() if len(group)}
        found = report.entries
        kept = {key: mask for key, (_, mask) in self.entries.items()}
        mismatches = self._mismatches(report.mismatches)
        left = replace(
            report,
            findings=GroupedFindings(groups),
            entries=found.keeping(kept) if found else None,
            mismatches=mismatches,
            totals=mismatches.totals() if mismatches else {},
        )
        left = concluded(_without_reasons(left))
        if not told:
            return left
        held = _number(left)
        return replace(left, live=Live(None, confirmed=held, in_motion=before - held))

    def _mismatches(self, mismatches: Mismatches | None) -> Mismatches | None:
        """With as many references as refcounts where they did not hold."""
        if mismatches is None or (self.is_low.all() and not self.drops_leaks):
            return mismatches
        counted = mismatches.counted.copy()
        if self.drops_leaks:
            counted = np.maximum(counted, mismatches.stored[:])
        slots = mismatches.index.slots_of(self.clusters[~self.is_low])
        counted[slots] = mismatches.stored[slots]
        return replace(mismatches, counted=counted)


def _without_reasons(report: Report) -> Report:
    """*report* without what was said with findings that it has no more."""
    kinds = report.counts()
    ends = (FindingKind.PAST_END, FindingKind.CUT_OFF, FindingKind.REFBLOCK_PAST_END)
    return replace(
        report,
        stopped=report.stopped if FindingKind.CHECK_STOPPED in kinds else (),
        luks_error=report.luks_error if FindingKind.LUKS_HEADER_INVALID in kinds else None,
        cut_off=report.cut_off if any(kind in kinds for kind in ends) else None,
    )


def _number(report: Report) -> int:
    return sum(number for kind, number in report.counts().items() if _is_grave(kind))


def _rows(columns: I64) -> npt.NDArray[Any]:
    """Columns of numbers, shape (columns, rows), as one value a row that can be compared."""
    table = np.ascontiguousarray(columns.T.astype(np.int64))
    row = np.dtype((np.void, table.dtype.itemsize * table.shape[1]))
    found: npt.NDArray[Any] = table.view(row).reshape(-1)
    return found


def _places(findings: Findings) -> npt.NDArray[Any]:
    """Where each finding is, and what was found there."""
    columns = [np.ascontiguousarray(getattr(findings, name)) for name in _PLACE]
    return _rows(np.stack([column.astype(np.int64, copy=False) for column in columns]))


def _are_told(findings: Findings, again: Findings | None) -> Mask:
    """Which of *findings* stand among those that were found *again*."""
    if again is None:
        return np.zeros(len(findings), dtype=np.bool_)
    told: Mask = np.isin(_places(findings), _places(again))
    return told


def _owner_rows(owners: Owners) -> npt.NDArray[Any]:
    names = ("cluster", "structure", "snapshot", "l1_index", "l2_index", "index")
    return _rows(np.stack([getattr(owners, name).astype(np.int64) for name in names]))


def _low(mismatches: Mismatches | None) -> tuple[I64, Counts]:
    """The clusters with a refcount that is too low, and those refcounts."""
    if mismatches is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
    kinds = (FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING)
    every = [mismatches.clusters(kind, mismatches.index.slots) for kind in kinds]
    clusters = distinct(np.concatenate(every))
    slots, _ = mismatches.index.find(clusters)
    stored = mismatches.stored[slots] if len(slots) else np.zeros(0, dtype=np.uint8)
    return clusters, stored


def _are_low(mismatches: Mismatches | None, clusters: I64, stored: Counts) -> Mask:
    """Which of *clusters* have that stored refcount there too, and it is too low."""
    if mismatches is None or not mismatches.index.slots:
        return np.zeros(len(clusters), dtype=np.bool_)
    slots, known = mismatches.index.find(clusters)
    again, counted = mismatches.stored[slots], mismatches.counted[slots]
    low: Mask = known & (again == stored) & (again < counted)
    return low & ~mismatches.agree(clusters)


def _are_among(
    found: EntryFindings | None, key: _Key, offset: I64, guest_offset: I64, value: U64
) -> Mask:
    """Which entries *found* has too, in the same place with the same found in them."""
    if found is None or key not in found.groups():
        return np.zeros(len(offset), dtype=np.bool_)
    again, guest, there = found.singles(*key)
    at = np.minimum(np.searchsorted(again, offset), len(again) - 1)
    same: Mask = (again[at] == offset) & (guest[at] == guest_offset) & (there[at] == value)
    return same
