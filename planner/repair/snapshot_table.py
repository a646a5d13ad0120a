"""The snapshot table made such as QEMU loads: cut to what is there, with the extra data it wants.

A new table goes past the end of the file, where nothing can be lost, and the header is switched to
it; the old one is left as it is and becomes free. Where entries are only cut off, no table is new.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np

from planner.errors import UnsupportedRepair
from planner.findings.kinds import FindingKind, Structure
from planner.qcow2.snapshots import (
    REQUIRED_EXTRA_DATA,
    Snapshot,
    encode_snapshot,
    read_reachable_snapshots,
)
from planner.repair.plan import StageKind
from planner.repair.refcounts import must_rebuild
from planner.repair.scope import Scope
from planner.source import read_bytes
from planner.triage.uncounted import uncounted_clusters

NB_SNAPSHOTS_AT, SNAPSHOTS_OFFSET_AT = 60, 64
"""Where the header holds nb_snapshots, and after it snapshots_offset."""


def rewrite_snapshot_table(scope: Scope) -> None:
    """Draft a table that QEMU loads, of the snapshots that are there: cut off is what is none.

    An entry of zeros is no snapshot; nor is, in a table that QEMU does not load, what comes from
    the first entry on without a whole L1 table. Clusters that only that referred to leak. The place
    of a table without entries, where it is none that a table can have, becomes 0.
    """
    if _place_is_meaningless(scope):
        scope.draft.write(StageKind.SWITCH, SNAPSHOTS_OFFSET_AT, bytes(8))
        places = [(SNAPSHOTS_OFFSET_AT, 8, 1)]
        scope.explain(StageKind.SWITCH, Structure.HEADER, FindingKind.CHECK_STOPPED, places)
        return
    header = scope.layout.header
    if has_no_snapshots(scope):
        scope.draft.write(StageKind.SWITCH, NB_SNAPSHOTS_AT, bytes(4))
        places = [(NB_SNAPSHOTS_AT, 4, 1)]
        scope.explain(StageKind.SWITCH, Structure.HEADER, FindingKind.MULTIPLE_OWNERS, places)
        return
    table, error = read_reachable_snapshots(scope.source, header, scope.geometry)
    lacking = FindingKind.SNAPSHOT_EXTRA_DATA in scope.report.counts()
    if error.field == "snapshots_offset" if error else not lacking:
        return
    snapshots = table.snapshots.there()
    if len(snapshots) < header.nb_snapshots:
        _require_refcounts(scope)
    kind = FindingKind.CHECK_STOPPED if error else FindingKind.SNAPSHOT_EXTRA_DATA
    virtual_size = header.size // 512 * 512
    complete = [complete_extra_data(each, virtual_size) for each in snapshots]
    offset = place_table(scope, complete, kind)
    if offset is None:
        return
    pointer = struct.pack(">IQ", len(snapshots), offset)
    scope.draft.write(StageKind.SWITCH, NB_SNAPSHOTS_AT, pointer)
    places = [(NB_SNAPSHOTS_AT, len(pointer), 1)]
    scope.explain(StageKind.SWITCH, Structure.HEADER, kind, places)


def has_no_snapshots(scope: Scope) -> bool:
    """Whether snapshots are counted that are none: their table would be the header itself.

    Of a table whose place was lost, at least the L1 tables would leak, or be somewhere among what
    no refcount tells of.
    """
    header = scope.layout.header
    if not header.nb_snapshots or header.snapshots_offset or scope.report.counters.leaks:
        return False
    # What seems to be a table there lies over others: whether those are damaged is not known yet.
    counts = scope.report.counts()
    if FindingKind.REFCOUNT_UNREADABLE in counts:
        return False
    is_counted = FindingKind.REFCOUNT_MISSING not in counts
    return is_counted or not len(uncounted_clusters(scope.source, scope.report))


def _place_is_meaningless(scope: Scope) -> bool:
    """Whether snapshots_offset, of no snapshots, stops a check; a lost table would have leaked."""
    stopped = any(error.field == "snapshots_offset" for error in scope.report.stopped)
    return stopped and not scope.layout.header.nb_snapshots and not scope.report.counters.leaks


def _require_refcounts(scope: Scope) -> None:
    """Raise where refcounts, which say what a snapshot had that is cut off, are lost too."""
    if must_rebuild(scope, np.zeros(0, dtype=np.int64)):
        raise UnsupportedRepair(
            "the snapshot table lists what is none, and the refcounts are damaged that would show"
            " what it listed",
            "export the disk",
            FindingKind.SNAPSHOT_EXTRA_DATA.label,
        )


def place_table(scope: Scope, snapshots: list[Snapshot], kind: FindingKind) -> int | None:
    """Draft a table of *snapshots*: its offset, or None where there is no room for it.

    No table is new where one that begins like that is there.
    """
    header = scope.layout.header
    wanted = b"".join(map(encode_snapshot, snapshots))
    if read_bytes(scope.source, header.snapshots_offset, len(wanted)) == wanted:
        return header.snapshots_offset
    if not scope.may_grow or scope.refcounts_are_shared:
        return None
    offset = scope.place_for(len(wanted))
    if offset is None:
        return None
    scope.draft.write(StageKind.PREPARE, offset, wanted)
    places = [(offset, len(wanted), len(snapshots))]
    scope.explain(StageKind.PREPARE, Structure.SNAPSHOT_TABLE, kind, places)
    return offset


def complete_extra_data(snapshot: Snapshot, virtual_size: int) -> Snapshot:
    """The entry with the fields that its extra data lacks, at the values that QEMU assumes."""
    if len(snapshot.extra_data) >= REQUIRED_EXTRA_DATA:
        return snapshot
    extra = struct.pack(">QQ", snapshot.vm_state_size, virtual_size)
    return replace(snapshot, extra_data=extra)
