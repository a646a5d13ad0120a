"""The tiers that a person chooses: what the image does not determine, done as somebody wants it.

`split` gives each owner of a cluster one of its own; `bitmaps` drops persistent bitmaps that stop
QEMU or a backup; `snapshots` drops entries of the snapshot table that are none. Each says in
sentences what it comes to, and is done only where its plan's id is quoted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from planner.arrays import I64, is_among, union
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, UnsupportedRepair
from planner.findings.kinds import FindingKind, Structure
from planner.findings.wording import plural
from planner.qcow2.names import quoted
from planner.repair.bitmaps import NAMED, STRUCTURES, drop_bitmaps
from planner.repair.copied import update_copied_flags_for_l1
from planner.repair.flags import COPIED, foresee_flags
from planner.repair.plan import RepairTier, StageKind
from planner.repair.rebuild import rebuild_refcount_structure
from planner.repair.refcounts import (
    correct_refcounts_in_refblocks,
    must_rebuild,
    reclaim_leaks_in_refblocks,
)
from planner.repair.scope import Scope
from planner.repair.snapshot_entries import (
    count_entries_behind,
    draft_count,
    drop_snapshot_entries,
    explain_count,
)
from planner.repair.split import (
    Shares,
    are_refcounts_shared,
    part_owners,
    room_for_copies,
    shared_by,
)
from planner.repair.steps import (
    Basis,
    Drafted,
    Means,
    checked_anew,
    draft_refcounts,
    leaked_clusters,
    require_writable_header,
    to_check_anew,
    to_check_for_flags,
    uncounted_to_keep,
)
from planner.triage.triage import Triage

Settle = Callable[[I64], Drafted]
"""The rest of a draft, which may be asked for several times: given clusters that keep their
refcounts.
"""

_BITMAP_KINDS = {
    FindingKind.BITMAP_DIRECTORY_INVALID,
    FindingKind.BITMAP_ENTRY_INVALID,
    FindingKind.STALE_BITMAPS,
}


def choices_for(report: Report) -> tuple[RepairTier, ...]:
    """The tiers that may have something to do in an image with this report."""
    if report.layout is None:
        return ()
    header, extensions = report.layout.header, report.layout.extensions
    stopped = any(error.field == "snapshots_offset" for error in report.stopped)
    has = {
        RepairTier.SPLIT: FindingKind.MULTIPLE_OWNERS in report.counts(),
        RepairTier.BITMAPS: extensions.bitmaps is not None or extensions.stale_bitmaps,
        RepairTier.SNAPSHOTS: bool(header.nb_snapshots) or stopped,
    }
    return tuple(tier for tier, applies in has.items() if applies)


def is_promise_kept(tier: RepairTier, after: Report) -> bool:
    """Whether nothing is left of what a tier is for."""
    if tier is RepairTier.SPLIT:
        return FindingKind.MULTIPLE_OWNERS not in after.counts()
    stopped = after.findings.of(FindingKind.CHECK_STOPPED)
    if tier is RepairTier.SNAPSHOTS:
        return not (stopped.structure == Structure.SNAPSHOT_TABLE).any()
    of_bitmaps = any((stopped.structure == structure).any() for structure in STRUCTURES)
    return not of_bitmaps and not _BITMAP_KINDS & after.counts().keys()


# ---- split ----


def begin_split(scope: Scope, means: Means) -> Settle:
    """A cluster of its own for each owner; then refcounts and flags that say so."""
    before, shares = scope.report, shared_by(scope.report).joined()
    if not len(shares.clusters):
        drafted = Drafted(scope, means.triage(scope, np.zeros(0, dtype=np.int64)))
        return lambda _: drafted
    _require_all_owners(before)
    _require_header_without_refcounts(before)
    room = room_for_copies(scope.source)
    for structure in (Structure.L1_TABLE, Structure.L2_TABLE, Structure.DATA):
        size, revision = scope.draft.size, scope.draft.revision
        parted = part_owners(scope, structure, room)
        if scope.report is not before or scope.draft.revision != revision:
            shares = shares.joined(parted)  # or else they are all there, and where they were
        del parted
        room -= max(0, scope.draft.size - size)
        check = to_check_anew(scope, means)
        del scope
        scope = check()
    was, leaked = leaked_clusters(before), leaked_clusters(scope.report)
    triage = means.triage(scope, leaked[~is_among(leaked, was)])
    return partial(_settle_split, before, Basis(scope, means), triage, shares)


def _settle_split(
    before: Report, parted: Basis, triage: Triage, shares: Shares, stay: I64
) -> Drafted:
    scope, means = parted.forked(), parted.means
    kept = uncounted_to_keep(scope.report, triage)
    _draft_parted_refcounts(scope, union(stay, leaked_clusters(before)), kept)
    check = to_check_for_flags(replace(scope, refcounts_alone=True), means)
    del scope
    scope = check()
    if not scope.draft.is_empty:
        revision = scope.draft.revision
        update_copied_flags_for_l1(scope)
        mends_any = scope.draft.revision != revision
        foresee_flags(scope, before, COPIED if mends_any else frozenset())
        check = to_check_anew(scope, means)
        del scope
        scope = check()
    shares = shares.without(shared_by(scope.report).clusters).with_refcounts_anew()
    return Drafted(scope, triage, shares, _of_split(shares, triage))


def _require_all_owners(report: Report) -> None:
    if report.owners.truncated:
        raise AmbiguousCorruption(
            "more clusters have two owners than can be listed",
            "export the disk",
            FindingKind.MULTIPLE_OWNERS.label,
        )


def _require_header_without_refcounts(report: Report) -> None:
    """What claims that the header holds refcounts is wrong; there is nothing to choose."""
    owners = {owner.structure for owner in report.owners.of(0)}
    if owners & {Structure.REFTABLE, Structure.REFBLOCK}:
        raise UnsupportedRepair(
            "refcounts are said to lie in the header's cluster",
            "the tier `all` makes them anew",
            FindingKind.MULTIPLE_OWNERS.label,
        )


def _draft_parted_refcounts(scope: Scope, stay: I64, kept: I64) -> None:
    """As `draft_refcounts`; where refcounts share a cluster they are what moves away."""
    is_shared = are_refcounts_shared(scope)
    if scope.draft.is_empty and not is_shared:
        return
    if is_shared or must_rebuild(scope, stay):
        require_writable_header(scope)
        rebuild_refcount_structure(scope, stay, kept)
    else:
        correct_refcounts_in_refblocks(scope, stay, kept)


def _of_split(shares: Shares, triage: Triage) -> tuple[str, ...]:
    number = plural(len(shares.clusters), "cluster")
    what = (
        f"{number} with two owners or more: each owner gets one of its own, with the bytes that all"
        " of them read by now; which of them reads wrong bytes is not known, and nothing will show"
        " it any more"
    )
    lost = (
        "leaked clusters hold data that one of them may have lost: nothing will show that either,"
        " so save them before they are freed"
    )
    notes = (what, lost) if triage.losses.data else (what,)
    return notes if len(shares.clusters) else ()


# ---- bitmaps ----


def begin_bitmaps(scope: Scope, means: Means) -> Settle:
    """Without the bitmaps that stop QEMU or a backup; then what only they referred to is freed."""
    before, triage = scope.report, means.triage(scope, np.zeros(0, dtype=np.int64))
    notes = drop_bitmaps(scope)
    drafted = Drafted(scope, triage, notes=tuple(notes))
    if not notes:
        return lambda _: drafted
    foresee_flags(scope, before, COPIED | _BITMAP_KINDS | {FindingKind.CHECK_STOPPED})
    scope = checked_anew(scope, means)
    require_writable_header(scope)
    return partial(_settle_bitmaps, before, replace(drafted, scope=scope), means)


def _settle_bitmaps(before: Report, dropped: Drafted, means: Means, stay: I64) -> Drafted:
    scope = dropped.scope.forked()
    # Where a table could not be read, it may refer to what nothing else does.
    if scope.report.complete:
        reclaim_leaks_in_refblocks(scope, union(stay, leaked_clusters(before)))
        scope = checked_anew(scope, means)
        update_copied_flags_for_l1(scope, settled=True)
        scope = checked_anew(scope, means)
    return _dropped(before, replace(dropped, scope=scope))


def _dropped(before: Report, drafted: Drafted) -> Drafted:
    """With the clusters that leak by it, and with those that have one owner now."""
    after = drafted.scope.report
    leaked = leaked_clusters(after)
    kept = leaked[~is_among(leaked, leaked_clusters(before))]
    shares = shared_by(before).without(shared_by(after).clusters)
    owners = shares.owners
    is_gone = np.isin(owners.structure, (*STRUCTURES, Structure.SNAPSHOT_TABLE))
    is_gone |= (owners.snapshot >= 0) & (not len(after.snapshots))
    return replace(drafted, shares=shares.gone(is_gone), kept=kept)


# ---- snapshots ----


def begin_snapshots(scope: Scope, means: Means) -> Settle:
    """A snapshot table of the entries that there are; nothing is freed."""
    before, triage = scope.report, means.triage(scope, np.zeros(0, dtype=np.int64))
    notes = drop_snapshot_entries(scope)
    if not notes:
        drafted = _with_entries_behind(scope, means) or Drafted(scope, triage)
        return lambda _: drafted
    foresee_flags(scope, before, frozenset({FindingKind.CHECK_STOPPED}))
    scope = checked_anew(scope, means)
    require_writable_header(scope)
    cut = Drafted(scope, triage, notes=tuple(notes))
    return partial(_settle_snapshots, before, cut, means)


def _settle_snapshots(before: Report, cut: Drafted, means: Means, stay: I64) -> Drafted:
    scope = cut.scope.forked()
    if scope.draft.size != scope.draft.source.size:  # the new table has to be counted
        leaked = union(stay, leaked_clusters(scope.report))
        draft_refcounts(scope, leaked, cut.triage.uncounted)
        scope = checked_anew(scope, means)
    return _dropped(before, replace(cut, scope=scope))


def _with_entries_behind(scope: Scope, means: Means) -> Drafted | None:
    """With snapshots that the header does not count, where the check bears that out."""
    before = scope.report
    number = scope.layout.header.nb_snapshots
    more = count_entries_behind(scope, leaked_clusters(before))
    if not more:
        return None
    draft_count(scope, number + more)
    after = checked_anew(scope, means)
    was, would_be = before.counts(), after.report.counts()
    is_worse = any(count > was.get(kind, 0) for kind, count in would_be.items())
    if is_worse or after.report.counters.leaks == before.counters.leaks:
        scope.draft.withdraw(StageKind.SWITCH)
        return None
    explain_count(after)
    names = [quoted(each.name) for each in after.report.snapshots[number:]]
    what = f"the header leaves out {plural(more, 'snapshot')} that {'is' if more == 1 else 'are'}"
    notes = (f"{what} in the table and still counted: {', '.join(names[:NAMED])}",)
    return Drafted(after, means.triage(scope, leaked_clusters(before)[:0]), notes=notes)


CHOICES = {
    RepairTier.SPLIT: begin_split,
    RepairTier.BITMAPS: begin_bitmaps,
    RepairTier.SNAPSHOTS: begin_snapshots,
}
"""How the draft of each of them begins, once, however often the rest of it is asked for."""
