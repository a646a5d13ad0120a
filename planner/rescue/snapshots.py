"""Snapshots that the snapshot table lost: their L1 tables among leaked clusters, listed again.

What the old table still shows of one, its name and date, is what it says; of another a name is
made. A snapshot more refers to what nothing else refers to: it takes nothing from anybody.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import ReadFailed
from planner.findings.kinds import FindingKind
from planner.progress import Progress, tell_nobody
from planner.qcow2 import entries
from planner.qcow2.geometry import Geometry
from planner.qcow2.layout import MAX_L1_BYTES
from planner.qcow2.snapshots import (
    MAX_SNAPSHOTS,
    Snapshot,
    encode_snapshot,
    read_reachable_snapshots,
)
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, RescueTier, StageKind
from planner.repair.scope import Scope
from planner.repair.snapshot_table import NB_SNAPSHOTS_AT, complete_extra_data
from planner.source import SECTOR, Source, nonzero_words
from planner.triage.triage import Triage, triage_leaks

MADE_NAME = "rescued"
"""How a name begins that is made: where it was lost."""


@dataclass(frozen=True, slots=True)
class LostL1:
    """An L1 table among leaked clusters. ``offset`` in the file, ``clusters`` that it takes up.

    ``snapshot``: whose it is, where a snapshot table still tells.
    """

    offset: int
    clusters: int
    snapshot: Snapshot | None


def lost_l1_tables(geometry: Geometry, triage: Triage) -> Iterator[LostL1]:
    """Those that nothing leads to, ascending, of the tables that *triage* lists.

    One that the image can do with has as many clusters as its disk needs, if they are there.
    """
    size = geometry.cluster_size
    most = max(1, -(-geometry.l1_entries_needed * 8 // size))
    found: LostL1 | None = None
    for each in triage.tables:
        if not each.is_l1 or each.in_use or not each.looks_lost:
            continue
        if found is not None and each.offset == found.offset + found.clusters * size:
            is_known = each.snapshot is not None
            if each.snapshot is found.snapshot and (is_known or found.clusters < most):
                found = replace(found, clusters=found.clusters + 1)
                continue
        if found is not None:
            yield found
        found = LostL1(each.offset, 1, each.snapshot)
    if found is not None:
        yield found


def plan_snapshots(
    source: Source,
    report: Report,
    *,
    triage: Triage | None = None,
    can_grow: bool = True,
    progress: Progress = tell_nobody,
) -> tuple[Plan, tuple[Snapshot, ...]] | None:
    """What lists the lost snapshots of *source* again, and which; None where none is lost.

    *report*: the check of *source*; *triage*: of its leaks, where somebody has asked already.
    Refcounts of what is new are not in the plan.
    """
    if report.layout is None or not report.counters.leaks:
        return None
    triage = triage or triage_leaks(source, report, progress=progress)
    lost = list(lost_l1_tables(report.geometry, triage))
    header = report.layout.header
    table, _ = read_reachable_snapshots(source, header, report.geometry)
    there = table.snapshots.there()
    back = _listed(source, report.geometry, lost, there)
    if not back or len(there) + len(back) > MAX_SNAPSHOTS:
        return None
    draft = Draft(source, can_grow=can_grow)
    if not _draft_table(Scope(draft, source, report), [*there, *back]):
        return None
    plan = draft.plan(RescueTier.RESCUE)
    return (plan, back) if _is_better(report, Overlay(source, plan), progress) else None


def _listed(
    source: Source, geometry: Geometry, lost: Sequence[LostL1], there: Sequence[Snapshot]
) -> tuple[Snapshot, ...]:
    """Entries for the *lost* tables, beside those that are *there*."""
    known = {each.l1_table_offset for each in there}
    ids = {each.id_str for each in there}
    ids |= {each.snapshot.id_str for each in lost if each.snapshot is not None}
    numbers = (b"%d" % number for number in range(1, MAX_SNAPSHOTS + len(ids) + 1))
    free = (number for number in numbers if number not in ids)
    back = []
    for each in lost:
        if each.offset in known:
            continue
        if each.snapshot is not None:
            back.append(complete_extra_data(each.snapshot, geometry.virtual_size))
            continue
        try:
            back.append(_made(source, geometry, each, next(free)))
        except ReadFailed:
            continue
    return tuple(back)


def _made(source: Source, geometry: Geometry, lost: LostL1, id_str: bytes) -> Snapshot:
    """An entry for a table of which nothing is known but what it leads to."""
    most = min(lost.clusters * geometry.cluster_size, MAX_L1_BYTES) // 8
    index, words = nonzero_words(source, lost.offset, most)
    used = int(index[entries.l1_offsets(words) != 0].max(initial=0)) + 1
    size = geometry.virtual_size // SECTOR * SECTOR
    return Snapshot(
        offset=0,
        l1_table_offset=lost.offset,
        l1_size=min(most, max(used, geometry.l1_entries_needed)),
        date_sec=0,
        date_nsec=0,
        vm_clock_nsec=0,
        vm_state_size_32=0,
        extra_data=struct.pack(">QQ", 0, size),
        id_str=id_str,
        name=f"{MADE_NAME}-{lost.offset}".encode(),
    )


def _draft_table(scope: Scope, snapshots: Sequence[Snapshot]) -> bool:
    """Draft a table of *snapshots* where nothing is, and the header that leads to it.

    False where there is no room.
    """
    content, size = b"".join(map(encode_snapshot, snapshots)), scope.geometry.cluster_size
    if not scope.may_write_header or scope.refcounts_are_shared:
        return False
    # What a table that is garbage leads to lies anywhere.
    offset = scope.place_for(len(content)) if scope.may_grow_by(len(content)) else None
    if offset is None:
        return False
    scope.draft.write(StageKind.PREPARE, offset, content + bytes(-len(content) % size))
    pointer = struct.pack(">IQ", len(snapshots), offset)
    scope.draft.write(StageKind.SWITCH, NB_SNAPSHOTS_AT, pointer)
    return True


_FOLLOWS = (
    FindingKind.REFCOUNT_LOW,
    FindingKind.REFCOUNT_MISSING,
    FindingKind.L1_COPIED,
    FindingKind.L2_COPIED,
)
"""What is mended with the refcounts."""


def _is_better(report: Report, image: Source, progress: Progress) -> bool:
    """Whether *image*, with the snapshots listed, has fewer leaks and nothing else more."""
    after = check_image(image, progress=progress)
    was, now = report.counts(), after.counts()
    more = [kind for kind, number in now.items() if number > was.get(kind, 0)]
    is_sound = after.error is None and after.counters.check_errors <= report.counters.check_errors
    return is_sound and set(more) <= set(_FOLLOWS) and after.counters.leaks < report.counters.leaks
