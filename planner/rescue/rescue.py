"""What a rescue brings back, as one value: what was found, the plan, and the proof of it.

What is lost is found elsewhere in `planner.rescue`; here it is put together step by step, each on
the image as those before leave it: the header first, if that is gone; then the tables that no entry
leads to; then refcounts that are lost, too, by the census of what was put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from planner.arrays import I64, U64, distinct, is_among
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, HeaderUnknown, RepairError
from planner.findings.kinds import FindingKind, Structure
from planner.guestfs.work import Work
from planner.progress import Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.header import Header
from planner.qcow2.snapshots import Snapshot
from planner.repair.autoclear import draft_known_autoclear
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import MAX_EDITS, Edit, Plan, RepairTier, RescueTier, StageKind
from planner.repair.refcounts import DAMAGED_STRUCTURE
from planner.repair.tiers import propose
from planner.rescue.bare import Bare, find_bare
from planner.rescue.disk_size import DiskSize, disk_size
from planner.rescue.headers import find_headers, find_moved_l1, mapping_all
from planner.rescue.hypotheses import Found, Hypothesis
from planner.rescue.leaked_l1 import may_have_lost_l1
from planner.rescue.opening import has_no_table, leave_out, why_refused
from planner.rescue.order import draft_header, in_order, then
from planner.rescue.placing.place import Placed, find_placements, with_candidates
from planner.rescue.placing.placements import Placements
from planner.rescue.scan import Scan, scan_once
from planner.rescue.scanned import Scanned
from planner.rescue.snapshots import lost_l1_tables, plan_snapshots
from planner.source import SECTOR, Source, present_bytes, read_tables
from planner.triage.triage import Triage, triage_leaks

_LOST_REFCOUNTS = (
    FindingKind.REFCOUNT_MISSING,
    FindingKind.REFCOUNT_LOW,
    FindingKind.REFCOUNT_UNREADABLE,
    FindingKind.L1_COPIED,
    FindingKind.L2_COPIED,
)


@dataclass(frozen=True, slots=True, eq=False)
class Rescue:
    """What was found of an image, and what puts it back.

    ``headers``: what was found of the header. ``placements``: every table that no entry leads to,
    by its place in the file. ``holes``: L1 indices that such a table may belong to, and that cannot
    be read until somebody knows. ``snapshots``: those that are listed again. ``left_out``: what
    would have stopped QEMU and is not in the image any more, a sentence each. ``larger``: the disk
    that is mapped, where that is more than its header says. ``before``, ``after``: the checks
    without and with the ``plan``. ``note``: why not all that may say where tables belong was read.
    """

    plan: Plan
    headers: Found
    before: Report
    after: Report
    placements: Placements = field(default_factory=Placements.none)
    holes: tuple[int, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    left_out: tuple[str, ...] = ()
    larger: DiskSize | None = None
    note: str = ""

    @property
    def placed(self) -> int:
        """How many tables have a place now."""
        return int(np.count_nonzero(self.placements.placed))

    @property
    def count(self) -> int:
        """How many things it is about: a header, tables that were placed, snapshots, and that
        something stopped QEMU.
        """
        return self.changes_header + self.placed + len(self.snapshots) + bool(self.left_out)

    @property
    def refused(self) -> str | None:
        """Why QEMU would not open the image as it would be; None where it would."""
        return why_refused(self.after)

    @property
    def changes_header(self) -> bool:
        """Whether another header was found."""
        best = self.headers.best
        return best is not None and bool(best.changed)


def rescue(
    source: Source,
    *,
    assumed: Mapping[str, int] | None = None,
    like: Header | None = None,
    free: bool = False,
    can_grow: bool = True,
    progress: Progress = tell_nobody,
    scanned: Scanned | None = None,
) -> Rescue:
    """What *source* lost, and the plan that puts it back; changes nothing.

    *assumed*, *like*: as `find_headers` takes them. *free*: whether tables are looked for in free
    clusters too, as they are left where refcounts were made anew. *can_grow*: whether the image may
    become longer. *scanned*: how far scans of the same file had come before, and are by now.
    Raises `HeaderUnknown` where no header is believed, another `RepairError` where what was found
    does not bear a plan.
    """
    before = check_image(source, progress=progress)
    scanned = scanned or Scanned()

    def find(image: Source, report: Report) -> Rescue:
        scan = scan_once(image, progress, scanned)
        means = _Means(assumed or {}, like, free, can_grow, progress, scan, scanned)
        return _rescue(image, report, means)

    header = before.layout.header if before.layout is not None else None
    if header is None or not header.unknown_autoclear:
        return find(source, before)
    # They go before all else is written, if anything is: all that follows is made without them.
    draft = Draft(source)
    draft_known_autoclear(draft, header)
    cleared = draft.overlay()
    result = find(cleared, check_image(cleared, progress=progress))
    if result.plan.changes_nothing:
        return replace(result, before=before, after=before)
    plan = then(draft.plan(RescueTier.RESCUE), result.plan)
    return replace(result, plan=in_order(source, plan, before), before=before)


def _rescue(source: Source, before: Report, means: _Means) -> Rescue:
    """What *source*, whose check is *before*, lost."""
    result, is_bare = _with_tables(source, before, means)
    if is_bare and not result.placed:
        # The L1 table that was made stays empty: the old one is there to be found, or nothing is.
        return _with_tables(source, before, replace(means, may_be_bare=False))[0]
    if result.changes_header or result.snapshots:
        return result
    return replace(result, larger=_larger(source, before))


def _larger(source: Source, report: Report) -> DiskSize | None:
    if report.layout is None or FindingKind.BEYOND_DISK_END not in report.counts():
        return None
    work = Work(present_bytes(source))
    return disk_size(source, mapping_all(report.layout.header), work)


@dataclass(frozen=True, slots=True)
class _Means:
    """What is known of it, how it is looked for: in free clusters too, whether the image may grow,
    whom to tell how far that is, the scan of the file, how far scans had come before, whether the
    L1 table may be gone with the header.
    """

    assumed: Mapping[str, int]
    like: Header | None
    free: bool
    can_grow: bool
    progress: Progress
    scan: Scan
    scanned: Scanned
    may_be_bare: bool = True

    @property
    def know_something(self) -> bool:
        """Whether somebody said what the header is to be like."""
        return bool(self.assumed) or self.like is not None


@dataclass(frozen=True, slots=True, eq=False)
class _Ground:
    """What tables are placed on: an image with a header that is believed, and with the snapshots
    that its table lost.

    ``before``: the check of the file as it is. ``plan``: what leads from there to ``image``, of
    which ``report`` is the check. ``tables``: those without a place. ``is_bare``: whether the L1
    table is a new one.
    """

    before: Report
    plan: Plan
    image: Source
    report: Report
    headers: Found
    snapshots: tuple[Snapshot, ...] = ()
    tables: Placed | None = None
    is_bare: bool = False


def _ground(source: Source, before: Report, means: _Means) -> _Ground:
    nothing = Draft(source, can_grow=means.can_grow).plan(RescueTier.RESCUE)
    moved = None
    if before.layout is not None and not means.know_something:
        header, triage = before.layout.header, _leaks_of(source, before, means)
        moved = _moved_l1(source, before, triage)
        # With a header under which something is found there is nothing wrong but that.
        headers = Found(header, [Hypothesis(header, b"", before.counters, ())])
        as_it_is = _Ground(before, nothing, source, before, headers)
        ground = as_it_is if moved else _with_snapshots(source, as_it_is, means, triage)
        del triage  # Of millions of leaks it takes as much as the tables that are looked for.
        ground = ground if moved else _placing(ground, means)
        found = ground.snapshots or ground.tables is not None
        is_stopped = set(before.counts()) - {FindingKind.LEAK} <= _STOPS and before.stopped
        if found or (is_stopped and not moved):
            return ground
    bare = None
    if means.may_be_bare and before.error is not None and not means.know_something:
        bare = find_bare(source, means.scan, means.progress, means.scanned)
    is_bare = bare is not None and not bare.has_l1
    headers, size = (moved, source.size) if moved else _find_headers(source, bare, means)
    best = headers.best
    if best is None and before.error is None and set(before.counts()) <= _NOT_OF_HEADER:
        # With refcounts that are gone everything is wrong, and less where less is led to.
        return _Ground(before, nothing, source, before, headers)
    if best is None or (size > source.size and not means.can_grow):
        raise _unknown(headers)
    if not best.changed:
        ground = _Ground(before, nothing, source, before, headers)
        return _listing(source, ground, means) if means.know_something else ground
    draft = Draft(source, can_grow=means.can_grow)
    draft.size = max(size, source.size)
    draft_header(draft, best, before)
    plan, image = draft.plan(RescueTier.RESCUE), draft.overlay()
    report = check_image(image, progress=means.progress)
    ground = _Ground(before, plan, image, report, headers, is_bare=is_bare)
    return _listing(source, ground, means)


_STOPS = {
    FindingKind.CHECK_STOPPED,
    FindingKind.BITMAP_DIRECTORY_INVALID,
    FindingKind.BITMAP_ENTRY_INVALID,
}
_NOT_OF_HEADER = {*_STOPS, *_LOST_REFCOUNTS, *DAMAGED_STRUCTURE}
"""What a header is not to blame for: tables that QEMU would not load, refcounts that are gone."""


def _moved_l1(source: Source, before: Report, triage: Triage | None) -> Found | None:
    """The header under which one of the lost L1 tables is the disk's, and nothing is wrong."""
    if triage is None:
        return None
    lost = lost_l1_tables(before.geometry, triage)
    return find_moved_l1(source, before, [each.offset for each in lost])


def _leaks_of(source: Source, report: Report, means: _Means) -> Triage | None:
    if not report.counters.leaks:
        return None
    return triage_leaks(source, report, progress=means.progress)


def _listing(source: Source, ground: _Ground, means: _Means) -> _Ground:
    """*ground* with the snapshots that its table lost, and the tables without a place."""
    return _placing(_with_snapshots(source, ground, means), means)


def _placing(ground: _Ground, means: _Means) -> _Ground:
    return replace(ground, tables=_tables_under(ground.image, ground.report, means))


def _with_snapshots(
    source: Source, ground: _Ground, means: _Means, triage: Triage | None = None
) -> _Ground:
    """*ground* with the snapshots that its table lost. *triage*: of its leaks, if it is known."""
    listed = _listed_again(ground.image, ground.report, means, triage)
    if listed is None:
        return ground
    ground = _followed(source, ground, listed.plan, listed.after)
    return replace(ground, snapshots=listed.snapshots)


def _followed(source: Source, ground: _Ground, plan: Plan, after: Report) -> _Ground:
    """*ground* and then *plan*, of which *after* is the check."""
    plan = then(ground.plan, plan)
    return replace(ground, plan=plan, image=Overlay(source, plan), report=after)


@dataclass(frozen=True, slots=True)
class _Listed:
    """What lists lost snapshots again, refcounts included, and the check of it."""

    plan: Plan
    after: Report
    snapshots: tuple[Snapshot, ...]


def _listed_again(
    source: Source, report: Report, means: _Means, triage: Triage | None
) -> _Listed | None:
    """The snapshots that the table lost; None where none are, or not without new damage."""
    can_grow, progress = means.can_grow, means.progress
    if report.layout is None or not report.counters.leaks:
        return None
    if triage is None and not may_have_lost_l1(source, report, means.scanned):
        return None
    step = plan_snapshots(source, report, triage=triage, can_grow=can_grow, progress=progress)
    if step is None:
        return None
    plan, snapshots = step
    after = check_image(Overlay(source, plan), progress=progress)
    plan, after = _with_refcounts(source, plan, after, can_grow=can_grow, progress=progress)
    was = report.counts()
    more = [kind for kind, number in after.counts().items() if number > was.get(kind, 0)]
    return None if more else _Listed(plan, after, snapshots)


def _with_tables(source: Source, before: Report, means: _Means) -> tuple[Rescue, bool]:
    """What is put back of *source*, whose check is *before*: what tables are placed on, those whose
    place is proven, and nothing that stops QEMU. And whether the L1 table was a new one.
    """
    ground = _ground(source, before, means)
    found, first, is_bare = _proven_tables(source, ground, means), ground.report, ground.is_bare
    # All windows of a disk of millions, and its L1 table: the checks that follow do without.
    ground = replace(ground, tables=None)
    if found.plan is not None:
        ground = _settled(source, ground, found.plan, means)
        if has_no_table(ground.report):
            # Its garbage may have stood in the way of listing them.
            ground = _with_snapshots(source, ground, means)
    ground, left_out = _without_stops(source, ground, means)
    if len(found.candidates):
        # What one of several tables may map is not known to be zeros.
        plan = _unreadable(ground.image, found.l1_offset, found.candidates)
        ground = _followed(source, ground, plan, ground.report)
        ground = replace(ground, report=check_image(ground.image, progress=means.progress))
    result = Rescue(
        in_order(source, ground.plan, ground.before),
        ground.headers,
        ground.before,
        ground.report,
        found.placements,
        holes=tuple(found.candidates.tolist()),
        snapshots=ground.snapshots,
        left_out=left_out,
        note=found.note,
    )
    _require_proof(result, first)
    return result, is_bare


@dataclass(frozen=True, slots=True, eq=False)
class _Proven:
    """What is kept of tables without a place: their ``placements``, the ``plan`` that puts those
    whose place is proven into the L1 table at ``l1_offset``, if there are any, and then its entries
    that others may belong to, ``candidates``.
    """

    placements: Placements = field(default_factory=Placements.none)
    plan: Plan | None = None
    l1_offset: int = 0
    candidates: I64 = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    note: str = ""


def _proven_tables(source: Source, ground: _Ground, means: _Means) -> _Proven:
    if ground.tables is None:
        return _Proven()
    tables, are_any = with_candidates(_without_contested(ground.tables))
    placements, note = tables.placements, tables.note
    if not placements.placed.any():
        return _Proven(placements, note=note)
    _require_few(int(np.count_nonzero(are_any)), source)
    draft = Draft(ground.image, can_grow=means.can_grow)
    _draft_l1(draft, tables)
    plan, candidates = draft.plan(RescueTier.RESCUE), np.flatnonzero(are_any)
    return _Proven(placements, plan, tables.l1.offset, candidates, note)


MAX_HOLES = 1 << 16
"""L1 entries that cannot be read afterwards; one more for each `BYTES_A_HOLE` of the file."""

BYTES_A_HOLE = 4096


def _require_few(candidates: int, source: Source) -> None:
    """Raise where tables may belong to more entries than are written to: an L1 table claims to
    have millions and is a hole."""
    most = MAX_HOLES + present_bytes(source) // BYTES_A_HOLE
    if candidates > most:
        raise AmbiguousCorruption(
            f"tables whose place is not proven may belong to {candidates} L1 entries, and of"
            f" no more than {most} it is told that they cannot be read",
            "nothing was written: where the disk is not so large, name its size with --assume"
            " size=BYTES",
        )


_MOST_LEFT_OUT = 2
"""The snapshot table, and the bitmaps."""


def _without_stops(
    source: Source, ground: _Ground, means: _Means
) -> tuple[_Ground, tuple[str, ...]]:
    """*ground* without what stops QEMU and cannot be brought back, and what that is."""
    notes: list[str] = []
    for _ in range(_MOST_LEFT_OUT):
        found = leave_out(
            ground.image, ground.report, can_grow=means.can_grow, progress=means.progress
        )
        if found is None:
            break
        ground = _followed(source, ground, found.plan, found.after)
        notes += found.notes
    return ground, tuple(notes)


def _find_headers(source: Source, bare: Bare | None, means: _Means) -> tuple[Found, int]:
    """What the header may have been, and how long the file is under it.

    Where nothing is left of the L1 table either, one is made, and a header that leads to it.
    """
    if bare is not None and not bare.has_l1:
        return bare.found, bare.end
    found = find_headers(
        source, assumed=means.assumed, like=means.like, scan=means.scan, progress=means.progress
    )
    return found, source.size


def _settled(source: Source, ground: _Ground, plan: Plan, means: _Means) -> _Ground:
    """*ground* and then *plan*, with refcounts that agree with it."""
    after = check_image(Overlay(ground.image, plan), progress=means.progress)
    plan, after = _with_refcounts(
        ground.image, plan, after, can_grow=means.can_grow, progress=means.progress
    )
    return _followed(source, ground, plan, after)


def _tables_under(source: Source, report: Report, means: _Means) -> Placed | None:
    """The tables without a place, under a header that makes sense; None where there are none."""
    if report.error is not None or report.mismatches is None:
        return None
    found = find_placements(source, report, means.progress, free=means.free, scanned=means.scanned)
    return found if found is not None and len(found.placements) else None


# ---- the header ----


_WAYOUT = (
    "nothing was written: name what you know of it with --assume FIELD=VALUE, or an image that was"
    " made in the same way with --header"
)

_TOLD_APART_BY = (
    "cluster_bits",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_order",
    "snapshots_offset",
    "incompatible_features",
)


def _unknown(found: Found) -> HeaderUnknown:
    """Why no header is believed, and how to choose one."""
    if not found.hypotheses:
        return HeaderUnknown("no header was found under which its tables make sense", _WAYOUT)
    best, rival = found.hypotheses[0], found.rival
    if rival is None or best.score[0]:
        why = "under no header that was tried its tables can all be read"
        return HeaderUnknown(why, _WAYOUT)
    one, other = best.header, rival.header
    names = [name for name in _TOLD_APART_BY if getattr(one, name) != getattr(other, name)]
    differ = ", ".join(f"{name} {getattr(one, name)} or {getattr(other, name)}" for name in names)
    chosen = " ".join(f"--assume {name}={getattr(one, name)}" for name in names)
    return HeaderUnknown(
        f"several headers are as likely: {differ}",
        f"nothing was written: look at both, {chosen}, or the other, each with -o",
    )


# ---- the L1 table ----


def _without_contested(found: Placed) -> Placed:
    """*found* without placements of tables that lead to what another leads to as its own."""
    board, known = found.board, found.placements
    placed = np.flatnonzero(known.placed)
    rows = np.searchsorted(board.tables.offset, known.offset[placed])
    own = board.tables.grid.filled(rows, own=True)
    used, count = np.unique(own.cluster, return_counts=True)
    twice = used[count > 1]
    referenced = used[found.mismatches.count_references(used) > 0]
    bad = np.isin(own.cluster, np.concatenate((twice, referenced)))
    is_placed = known.placed.copy()
    is_placed[placed[own.table[bad]]] = False
    return replace(found, placements=replace(known, placed=is_placed))


def _draft_l1(draft: Draft, found: Placed) -> None:
    """Draft the L1 table with what was placed, and without what leads nowhere."""
    l1, placements = found.l1, found.placements
    placed, unsound = placements.placed, np.flatnonzero(l1.words)
    unsound = unsound[~l1.leads[unsound]]
    offset = placements.offset[placed]
    copied = np.where(is_among(offset, found.shared), 0, entries.COPIED).astype(np.uint64)
    # Of one that led nowhere and has a table now, the latter holds.
    index = np.concatenate((placements.l1_index[placed], unsound))
    word = np.concatenate((offset.astype(np.uint64) | copied, np.zeros_like(unsound, np.uint64)))
    at, first = np.unique(index, return_index=True)
    _write_words(draft, l1.offset, at, word[first])


def _write_words(draft: Draft, l1_offset: int, index: I64, word: U64) -> None:
    """Draft entries of the L1 table at *l1_offset*, *index* ascending; no sector but theirs."""
    at = l1_offset + index * 8
    sectors = distinct(at // SECTOR)
    rows = np.empty((len(sectors), SECTOR), dtype=np.uint8)
    for part, content in read_tables(draft.source, sectors * SECTOR, SECTOR):
        rows[part] = content
    rows.view(">u8")[np.searchsorted(sectors, at // SECTOR), at % SECTOR // 8] = word
    draft.write_tables(StageKind.CORRECT, sectors * SECTOR, rows)
    _explain(draft, l1_offset, index)


def _explain(draft: Draft, l1_offset: int, index: I64) -> None:
    def edits() -> Iterator[Edit]:
        why = StageKind.CORRECT, Structure.L1_TABLE, FindingKind.LEAK
        return (Edit(*why, l1_offset + at * 8, 8, 1) for at in index[:MAX_EDITS].tolist())

    draft.explain(edits, len(index))


def _unreadable(image: Source, l1_offset: int, index: I64) -> Plan:
    """What makes entries of the L1 table at *l1_offset* lead where nothing can be read."""
    draft = Draft(image)
    _write_words(draft, l1_offset, index, np.full(len(index), entries.UNREADABLE, dtype=np.uint64))
    return draft.plan(RescueTier.RESCUE)


# ---- refcounts that are lost, too ----


def _with_refcounts(
    source: Source, plan: Plan, after: Report, *, can_grow: bool, progress: Progress
) -> tuple[Plan, Report]:
    """*plan*, and behind it what mends the refcounts by the census of what it puts back."""
    counts = after.counts()
    if not any(kind in counts for kind in _LOST_REFCOUNTS) and not after.needs_rebuild:
        return plan, after
    try:
        more = propose(
            Overlay(source, plan), after, RepairTier.ALL, can_grow=can_grow, progress=progress
        )
    except RepairError:
        return plan, after
    return then(plan, more.plan), more.after


# ---- the proof ----


def _require_proof(result: Rescue, report: Report) -> None:
    """Raise unless the check of the outcome bears it out. *report*: under the header found."""
    after = result.after
    if after.error is not None:
        raise _unproven(f"the image could not be opened afterwards: {after.error}")
    was, now = report.counts(), after.counts()
    allowed = dict.fromkeys(_OF_HOLES, len(result.holes))
    for kind in _NEVER_MORE:
        if now.get(kind, 0) > was.get(kind, 0) + allowed.get(kind, 0):
            raise _unproven(f"{kind.label} would go from {was.get(kind, 0)} to {now[kind]}")
    if after.counters.check_errors > report.counters.check_errors:
        raise _unproven("more of it could not be looked at")
    if FindingKind.UNKNOWN_AUTOCLEAR in now and not result.plan.changes_nothing:
        raise _unproven("autoclear bits that are not known would survive")


_OF_HOLES = (FindingKind.L2_TABLE_MISALIGNED, FindingKind.PAST_END)
_NEVER_MORE = (
    FindingKind.MULTIPLE_OWNERS,
    FindingKind.L1_ENTRY_RESERVED,
    FindingKind.L2_TABLE_MISALIGNED,
    FindingKind.PAST_END,
)


def _unproven(what: str) -> AmbiguousCorruption:
    return AmbiguousCorruption(
        f"the rescue was planned and then not proven: {what}",
        "nothing was written; report the image",
    )
