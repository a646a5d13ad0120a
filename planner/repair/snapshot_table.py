"""The snapshot table rewritten: with the extra data that version 3 wants, and no more than allowed.

The new table goes past the end of the file, where nothing can be lost, and the header is switched
to it; the old one is left as it is and becomes free.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from planner.errors import ImageError
from planner.findings import FindingKind, Structure
from planner.plan import StageKind
from planner.qcow2.snapshots import (
    REQUIRED_EXTRA_DATA,
    Snapshot,
    SnapshotTable,
    encode_snapshot,
    read_snapshots,
)
from planner.repair.scope import Scope

SNAPSHOTS_OFFSET_AT = 64
"""Where the header holds snapshots_offset."""


def rewrite_snapshot_table(scope: Scope) -> None:
    """Draft a new table where entries lack extra data, or have more than QEMU reads.

    The place of a table without entries, where it is none that a table can have, becomes 0.
    """
    if _place_is_meaningless(scope):
        scope.draft.write(StageKind.SWITCH, SNAPSHOTS_OFFSET_AT, bytes(8))
        places = [(SNAPSHOTS_OFFSET_AT, 8, 1)]
        scope.explain(StageKind.SWITCH, Structure.HEADER, FindingKind.CHECK_STOPPED, places)
        return
    wrong = scope.report.findings.of(FindingKind.SNAPSHOT_EXTRA_DATA)
    over_long = any(error.field == "extra_data_size" for error in scope.report.stopped)
    if not (len(wrong) or over_long) or not scope.may_grow or scope.refcounts_are_shared:
        return
    old = _readable_table(scope)
    if old is None:
        return
    virtual_size = scope.layout.header.size // 512 * 512
    snapshots = [complete_extra_data(each, virtual_size) for each in old.snapshots]
    table = b"".join(encode_snapshot(each) for each in snapshots)
    kind = FindingKind.CHECK_STOPPED if over_long else FindingKind.SNAPSHOT_EXTRA_DATA
    size = scope.geometry.cluster_size
    offset = scope.first_of_new(-(-len(table) // size)) * size
    if not scope.make_room(offset + -(-len(table) // size) * size):
        return
    scope.draft.write(StageKind.PREPARE, offset, table)
    pointer = struct.pack(">Q", offset)
    scope.draft.write(StageKind.SWITCH, SNAPSHOTS_OFFSET_AT, pointer)
    places = [(offset, len(table), len(snapshots))]
    scope.explain(StageKind.PREPARE, Structure.SNAPSHOT_TABLE, kind, places)
    places = [(SNAPSHOTS_OFFSET_AT, len(pointer), 1)]
    scope.explain(StageKind.SWITCH, Structure.HEADER, kind, places)


def _place_is_meaningless(scope: Scope) -> bool:
    """Whether snapshots_offset, of no snapshots, stops a check; a lost table would have leaked."""
    stopped = any(error.field == "snapshots_offset" for error in scope.report.stopped)
    return stopped and not scope.layout.header.nb_snapshots and not scope.report.counters.leaks


def _readable_table(scope: Scope) -> SnapshotTable | None:
    """The table, over-long extra data cut as QEMU cuts it; None where it is not to be trusted.

    Where the length of the extra data is what is damaged, the entries behind it are read from a
    wrong place, and would come out as nonsense: each must have a whole L1 table in the file.
    """
    layout = scope.layout
    try:
        table = read_snapshots(scope.source, layout.header, layout.geometry, may_cut=True)
    except ImageError:
        return None
    end, size = layout.file_size, layout.geometry.cluster_size
    if table.offset + table.length > end:
        return None
    cut = any(each.cut for each in table.snapshots)
    for each in table.snapshots:
        offset, length = each.l1_table_offset, each.l1_size * 8
        if cut and (offset % size or not offset or not length or offset + length > end):
            return None
    return table


def complete_extra_data(snapshot: Snapshot, virtual_size: int) -> Snapshot:
    """The entry with the fields that its extra data lacks, at the values that QEMU assumes."""
    if len(snapshot.extra_data) >= REQUIRED_EXTRA_DATA:
        return snapshot
    extra = struct.pack(">QQ", snapshot.vm_state_size, virtual_size)
    return replace(snapshot, extra_data=extra)
