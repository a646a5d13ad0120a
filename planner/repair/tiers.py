"""A tier's planners joined into one proposal, and the proof that it keeps its promise.

Each planner sees the image as the ones before it leave it, checked anew. Nothing is proposed that
the proof does not bear out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.arrays import I64, distinct, is_among
from planner.check.check import check_image
from planner.check.classify import Look
from planner.check.report import RepairCounters, Report
from planner.errors import AmbiguousCorruption, ParseFailed, UnsupportedRepair
from planner.findings.kinds import KINDS, FindingKind, Severity, Structure
from planner.progress import Progress, tell_nobody
from planner.qcow2.header import FEATURES_AT, Header, Incompatible
from planner.repair.autoclear import clear_unknown_autoclear
from planner.repair.copied import unfollowed_targets, update_copied_flags_for_l1
from planner.repair.draft import Draft
from planner.repair.entries import clear_reserved_bits, correct_entries
from planner.repair.plan import Plan, RepairTier, StageKind
from planner.repair.proof import require_proof
from planner.repair.rebuild import rebuild_refcount_structure
from planner.repair.refcounts import (
    DAMAGED_STRUCTURE,
    correct_refcounts_in_refblocks,
    must_rebuild,
    reclaim_leaks_in_refblocks,
)
from planner.repair.scope import Scope
from planner.repair.snapshot_table import has_no_snapshots, rewrite_snapshot_table
from planner.source import Source, read_bytes
from planner.triage.triage import Suspect, Triage, triage_leaks

TABLES_NAMED = 3
"""Tables that look lost that a refusal names."""

MAX_DRAFTS = 4
"""Drafts of a plan: what one shows not to work, the next leaves alone."""


@dataclass(frozen=True, slots=True)
class Left:
    """Findings that stay after a repair, and why."""

    kind: FindingKind
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A plan with its reason and its proof.

    ``before``: the check that it was made from. ``after``: the check of the image with the plan
    laid on it. ``triage``: what the leaked clusters look like. ``kept``: clusters whose refcounts
    are lost, that are counted again since they may be evidence.
    """

    tier: RepairTier
    plan: Plan
    before: Report
    after: Report
    triage: Triage
    left: tuple[Left, ...]
    kept: int = 0

    @property
    def suspects(self) -> tuple[Suspect, ...]:
        """Leaked clusters that look like something lost."""
        return self.triage.suspects

    @property
    def found(self) -> int:
        """How many things there are to mend or to keep: what the check finds, and what is kept."""
        return total(self.before) + self.kept

    @property
    def left_count(self) -> int:
        """How many of them stay."""
        return total(self.after)

    @property
    def planned(self) -> int:
        """How many of them the plan mends."""
        return self.found - self.left_count

    @property
    def complete(self) -> bool:
        """Whether the tier's promise is kept in full: no leaks, or nothing at all left."""
        if self.tier is RepairTier.LEAKS:
            return not self.after.counters.leaks
        return not self.left_count

    @property
    def needs_quote(self) -> bool:
        """Whether its id must be quoted: something may be lost, and who repairs must know.

        `all` frees nothing of that; a cluster that an entry has lost it leaves, and names.
        """
        if self.tier is RepairTier.ALL:
            return self.triage.is_table_lost
        return self.triage.is_evidence and not self.plan.changes_nothing

    @property
    def warnings(self) -> list[str]:
        """Why the id must be quoted, a line each; empty where it need not be."""
        return self.triage.warnings(TABLES_NAMED) if self.needs_quote else []

    @property
    def counters(self) -> RepairCounters:
        """What it mends, by sort."""
        before, after = self.before.counts(), self.after.counts()
        refcounts = (FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING)
        mended = {kind: max(0, before[kind] - after.get(kind, 0)) for kind in before}
        leaks = mended.get(FindingKind.LEAK, 0)
        wrong = sum(mended.get(kind, 0) for kind in refcounts)
        return RepairCounters(leaks, wrong, self.planned - leaks - wrong, not self.complete)


_Drafted = tuple[Scope, Triage]


@dataclass(frozen=True, slots=True)
class _Means:
    """How an image is looked at while a repair of it is drafted, and whether it may grow."""

    check: Callable[[Source], Report]
    triage: Callable[[Scope, I64], Triage]
    can_grow: bool


def total(report: Report) -> int:
    """How many things a repair could be about: all findings but notices that none mends."""
    return sum(
        number
        for kind, number in report.counts().items()
        if KINDS[kind].tier or KINDS[kind].severity > Severity.NOTICE
    )


def is_repairable(report: Report) -> bool:
    """Whether there is anything that a plan could be about, and the check bears one."""
    return report.error is None and not report.torn and bool(total(report))


def same_outcome(one: Report, other: Report) -> bool:
    """Whether two checks say the same: every counter, and how often each kind occurs."""
    return one.counters == other.counters and one.counts() == other.counts()


def plan_repair(source: Source, report: Report, tier: RepairTier) -> Plan:
    """The plan of `propose` alone."""
    return propose(source, report, tier).plan


def propose(
    source: Source,
    report: Report,
    tier: RepairTier,
    *,
    can_grow: bool = True,
    triage: Triage | None = None,
    progress: Progress = tell_nobody,
) -> Proposal:
    """What a repair would do to an image whose check gave *report*, proven on an overlay.

    *can_grow*: whether the image may become longer. *triage*: of it as it is, where that is known.
    *progress*: of each check, and of that. Raises a `RepairError` where the tier refuses.
    """
    known = triage

    def check(image: Source) -> Report:
        return check_image(image, progress=progress)

    def look(scope: Scope, ignored: I64) -> Triage:
        nonlocal known
        if scope.report is report and known is not None:
            return known
        found = triage_leaks(scope.source, scope.report, ignored=ignored, progress=progress)
        known = found if scope.report is report else known
        return found

    _require_sound_basis(report)
    means = _Means(check, look, can_grow)
    scope, triage = _draft_tier(source, report, tier, means)
    if tier is RepairTier.ALL:
        _settle_flags(scope, report)
    clear_unknown_autoclear(scope)
    plan, after = scope.draft.plan(tier), _checked_anew(scope, means).report
    kept = int(is_among(_leaked(after), triage.uncounted).sum())
    require_proof(source, plan, report, after, kept=kept)
    return Proposal(tier, plan, report, after, triage, _left(tier, after, triage), kept)


def _require_sound_basis(report: Report) -> None:
    if report.error is not None:
        raise ParseFailed(
            f"the header cannot be interpreted: {report.error}",
            "everything follows from the header: restore it from another copy of the image",
        )
    if report.torn:
        raise AmbiguousCorruption("the image changed while it was checked", "stop its writer first")


@dataclass(frozen=True, slots=True)
class _Begun:
    """What all drafts of a plan have in common. ``stay``: clusters that keep their refcounts."""

    scope: Scope
    triage: Triage
    stay: I64

    def forked(self) -> Scope:
        """The scope, with a draft to go on with."""
        return replace(self.scope, draft=self.scope.draft.fork())


def _draft_tier(source: Source, report: Report, tier: RepairTier, means: _Means) -> _Drafted:
    """A tier's draft, repeated without the refcounts that COPIED flags could not follow.

    What only clears reserved bits makes no flag wrong, and comes when the others are settled.
    """
    begin, settle, finish = _STEPS[tier]
    first = Scope(Draft(source, can_grow=means.can_grow), source, report)
    begun, stay = begin(first, means), np.zeros(0, dtype=np.int64)
    del first
    for _ in range(MAX_DRAFTS - 1):
        scope = settle(begun, report, means, stay)
        more = distinct(np.concatenate((stay, unfollowed_targets(report, scope))))
        if len(more) == len(stay):
            return finish(scope, means), begun.triage
        stay = more
        del scope  # The draft may be large, and the next is as large.
    return finish(settle(begun, report, means, stay), means), begun.triage


def _begin_leaks(scope: Scope, means: _Means) -> _Begun:
    nothing = np.zeros(0, dtype=np.int64)
    triage = means.triage(scope, nothing)
    if scope.report.counters.leaks:
        _require_known_leaks(scope.report)
    return _Begun(scope, triage, nothing)


def _settle_leaks(begun: _Begun, before: Report, means: _Means, stay: I64) -> Scope:
    scope = begun.forked()
    if before.counters.leaks:
        reclaim_leaks_in_refblocks(scope, stay)
        scope = _checked_anew(scope, means)
        # Lowered to one reference, an entry gets its COPIED flag back.
        update_copied_flags_for_l1(scope, known=before)
        scope = _checked_anew(scope, means)
    if _only_flags_are_wrong(scope.report):
        update_copied_flags_for_l1(scope)
    return _checked_anew(scope, means)


def _only_flags_are_wrong(report: Report) -> bool:
    """Whether refcounts and all else are right, so that they say what COPIED flags must be."""
    wrong = {kind for kind in report.counts() if KINDS[kind].severity > Severity.NOTICE}
    return bool(wrong) and wrong <= {FindingKind.L1_COPIED, FindingKind.L2_COPIED}


def _require_known_leaks(report: Report) -> None:
    """Raise where a cluster may be in use that seems leaked, or its refcount cannot be lowered."""
    if not report.complete:
        raise AmbiguousCorruption(
            "a table that could refer to the leaked clusters cannot be read, so that they are not"
            " proven to be free",
            "the report of the check names it",
            report.hidden[0].label,
        )
    counts = report.counts()
    damaged = [kind.label for kind in DAMAGED_STRUCTURE if kind in counts]
    if damaged:
        raise UnsupportedRepair(
            "the refcount structure itself is damaged", "the tier `all` rebuilds it", damaged[0]
        )


def _begin_all(scope: Scope, means: _Means) -> _Begun:
    before = scope.report
    _require_plain_header(scope)
    if has_no_snapshots(scope):  # what seems to be their table lies over all that follows
        rewrite_snapshot_table(scope)
        scope = _checked_anew(scope, means)
    correct_entries(scope)
    scope = _checked_anew(scope, means)
    if scope.may_write_header:
        rewrite_snapshot_table(scope)
        scope = _checked_anew(scope, means)
    # Leaks are lowered only where that buries nothing: `leaks`, its plan id quoted, does the rest.
    # What the repair itself ceased to refer to is no such leak: that reference was known.
    triage = means.triage(scope, _leaked_since(scope, before))
    if _is_cut(scope, before):
        _require_shown_loss(triage)
    stay = np.zeros(0, dtype=np.int64)
    if triage.is_buried or not scope.report.complete:
        stay = _leaked(before)
        if scope.report is not before:
            stay = stay[is_among(stay, _leaked(scope.report))]
    return _Begun(scope, triage, stay)


def _leaked_since(scope: Scope, before: Report) -> I64:
    """What leaks by now, and did not."""
    if scope.report is before:  # of millions, to list them takes a quarter of all memory
        return np.zeros(0, dtype=np.int64)
    leaked = _leaked(scope.report)
    return leaked[~is_among(leaked, _leaked(before))]


def _settle_all(begun: _Begun, before: Report, means: _Means, stay: I64) -> Scope:
    scope = begun.forked()
    if len(begun.stay):
        stay = distinct(np.concatenate((stay, begun.stay)))
    _draft_refcounts(scope, stay, _kept(scope.report, begun.triage))
    if not scope.draft.is_empty:
        # Often the next check is the proof then: nothing is left, or what nothing mends.
        _draft_flags(scope, before, clean=not _stays_damaged(scope.report))
    scope = _checked_anew(scope, means)
    update_copied_flags_for_l1(scope)
    return _checked_anew(scope, means)


def _finish_all(scope: Scope, means: _Means) -> Scope:
    clear_reserved_bits(scope)
    return _checked_anew(scope, means)


def _stays_damaged(report: Report) -> bool:
    """Whether something is wrong that no tier mends."""
    wrong = (KINDS[kind] for kind in report.counts())
    return any(info.severity > Severity.LEAK and not info.tier for info in wrong)


def _is_cut(scope: Scope, before: Report) -> bool:
    """Whether entries are cut off that were no zeros: what leaks may be what they listed."""
    was = before.layout.header.nb_snapshots if before.layout else 0
    return not before.complete and scope.layout.header.nb_snapshots < was


def _require_shown_loss(triage: Triage) -> None:
    """Raise where leaked clusters hold data of snapshots that are cut off, and do not look so.

    With nothing to show that they are lost, they would be freed.
    """
    if triage.losses.data and not triage.is_evidence:
        raise AmbiguousCorruption(
            "entries of the snapshot table are none, and leaked clusters that hold data may be"
            " what they listed",
            "export the disk",
            FindingKind.CHECK_STOPPED.label,
        )


def _kept(report: Report, triage: Triage) -> I64:
    """Clusters whose refcounts are lost that stay counted: what they hold may be lost too.

    Where nothing hides references, that is not so of what refcounts were in: counted, it would be
    a leak that nothing speaks for any more.
    """
    hidden = set(report.hidden)
    # Refcounts that lie past the end hide no reference.
    past_end = {kind for kind, _ in report.findings.groups if kind is FindingKind.PAST_END}
    if past_end and set(report.findings.structures(FindingKind.PAST_END)) == {Structure.REFTABLE}:
        hidden -= past_end
    if hidden:
        return triage.uncounted
    if not triage.is_buried:
        return triage.uncounted[:0]
    look = triage.look[is_among(triage.clusters, triage.uncounted)]
    of_refcounts = np.isin(look, (Look.REFBLOCK, Look.OLD_REFBLOCK, Look.REFTABLE))
    clusters = report.layout.host_clusters if report.layout else 0
    most = 1 + clusters // report.geometry.refblock_entries
    if np.count_nonzero(of_refcounts) > most:  # as many there never were
        return triage.uncounted
    return triage.uncounted[~of_refcounts]


def _leaked(report: Report) -> I64:
    """All leaked clusters."""
    if report.mismatches is None:
        return np.zeros(0, dtype=np.int64)
    return report.mismatches.clusters(FindingKind.LEAK, report.counters.leaks)


def _checked_anew(scope: Scope, means: _Means) -> Scope:
    """The scope after what was drafted; the same where nothing was added."""
    if scope.draft.revision == scope.revision:
        return scope
    image = scope.draft.overlay()
    return scope.after(image, means.check(image))


_STEPS = {
    RepairTier.LEAKS: (_begin_leaks, _settle_leaks, _checked_anew),
    RepairTier.ALL: (_begin_all, _settle_all, _finish_all),
}
"""Of each tier: what all drafts begin with, refcounts and flags, what comes last."""


def _draft_refcounts(scope: Scope, stay: I64, kept: I64) -> None:
    """In place where every block that must change is sound, else anew; not of what must *stay*.

    The clusters in *kept* are counted once, though nothing refers to them.
    """
    # Were refcounts that share a cluster moved away, nothing would show what that did to the other.
    if must_rebuild(scope, stay) and not scope.refcounts_are_shared:
        _require_writable_header(scope)
        rebuild_refcount_structure(scope, stay, kept)
    else:
        correct_refcounts_in_refblocks(scope, stay, kept)


def _require_plain_header(scope: Scope) -> None:
    report, header = scope.report, scope.layout.header
    is_there = header.nb_snapshots and header.snapshots_offset < scope.geometry.cluster_size
    if is_there and not has_no_snapshots(scope):
        raise AmbiguousCorruption(
            "the snapshot table is said to lie in the header's cluster: that is not written to",
            "export the disk",
            FindingKind.CHECK_STOPPED.label,
        )
    if report.owners.truncated:
        raise AmbiguousCorruption(
            "more clusters have two owners than can be listed",
            "export the disk",
            FindingKind.MULTIPLE_OWNERS.label,
        )


def _require_writable_header(scope: Scope) -> None:
    if not scope.may_write_header:
        raise AmbiguousCorruption(
            "something else refers to the header's cluster, so that it is not written to",
            "export the disk",
            FindingKind.MULTIPLE_OWNERS.label,
        )


def _settle_flags(scope: Scope, before: Report) -> None:
    """Draft the corrupt and dirty bits as the outcome has them, and say why they go."""
    if before.layout is None or not _has_flags(scope):
        return
    draft = scope.draft
    clean = not any(KINDS[kind].severity > Severity.LEAK for kind in scope.report.counts())
    final = _final_bits(before.layout.header, clean=clean)
    drafted = int.from_bytes(read_bytes(scope.drafted, FEATURES_AT, 8), "big")
    if drafted != final or not draft.has(StageKind.GUARD):  # else they were drafted, and checked
        for stage in (StageKind.GUARD, StageKind.RELEASE):
            draft.withdraw(stage)
        _draft_flags(scope, before, clean=clean)
    if not clean:
        return
    bits = before.layout.header.incompatible_features
    for kind, bit in (
        (FindingKind.CORRUPT_BIT, Incompatible.CORRUPT),
        (FindingKind.DIRTY_BIT, Incompatible.DIRTY),
    ):
        if bits & bit:
            place = [(FEATURES_AT, 8, 1)]
            scope.explain(StageKind.RELEASE, Structure.HEADER, kind, place)


def _has_flags(scope: Scope) -> bool:
    """Whether there are a corrupt and a dirty bit, where they may be written."""
    return scope.layout.header.version >= 3 and scope.may_write_header


def _draft_flags(scope: Scope, before: Report, *, clean: bool) -> None:
    """Put the corrupt bit around what is drafted; clear both bits for a *clean* outcome."""
    if before.layout is None or not _has_flags(scope):
        return
    draft, bits = scope.draft, before.layout.header.incompatible_features
    final = _final_bits(before.layout.header, clean=clean)
    if not draft.is_empty:
        guarded = bits | int(Incompatible.CORRUPT)
        draft.write(StageKind.GUARD, FEATURES_AT, guarded.to_bytes(8, "big"))
    elif final == bits:
        return
    draft.write(StageKind.RELEASE, FEATURES_AT, final.to_bytes(8, "big"))


def _final_bits(header: Header, *, clean: bool) -> int:
    """The incompatible features as a repair leaves them."""
    bits = header.incompatible_features
    return bits & ~int(Incompatible.DIRTY | Incompatible.CORRUPT) if clean else bits


def _left(tier: RepairTier, after: Report, triage: Triage) -> tuple[Left, ...]:
    """What stays, worst first, each kind with its reason."""
    left = []
    for kind, number in sorted(after.counts().items(), key=lambda item: -KINDS[item[0]].severity):
        info = KINDS[kind]
        if not info.tier and info.severity is Severity.NOTICE:
            continue
        left.append(Left(kind, number, _reason(tier, kind, after, triage)))
    return tuple(left)


def _reason(tier: RepairTier, kind: FindingKind, after: Report, triage: Triage) -> str:
    info = KINDS[kind]
    is_leak = kind is FindingKind.LEAK
    for applies, reason in (
        (bool(info.left), info.left),
        (
            tier is RepairTier.LEAKS and not is_leak,
            "the tier `leaks` only lowers refcounts; `all` looks at this",
        ),
        (
            is_leak and not after.complete,
            "a table that could refer to these clusters cannot be read",
        ),
        (
            is_leak and triage.is_buried,
            "something among them may be lost; `leaks` with its plan id reclaims them",
        ),
        (kind in (FindingKind.CORRUPT_BIT, FindingKind.DIRTY_BIT), "the image is not clean"),
        (
            FindingKind.TABLE_OVERWRITTEN in after.counts(),
            "it lies in a table that was overwritten, whose words may be somebody's data",
        ),
        (
            FindingKind.MULTIPLE_OWNERS in after.counts(),
            "it lies in, or leads to, a cluster with two owners, which is not written to",
        ),
    ):
        if applies:
            return reason
    return "what it should be is not determined by the rest of the image"
