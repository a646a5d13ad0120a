"""The snapshot table rewritten: with the extra data that version 3 wants, and no more than allowed.

The new table goes past the end of the file, where nothing can be lost, and the header is switched
to it; the old one is left as it is and becomes free.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from planner.findings import FindingKind, Structure
from planner.plan import StageKind
from planner.qcow2.snapshots import REQUIRED_EXTRA_DATA, Snapshot, encode_snapshot
from planner.repair.scope import Scope

SNAPSHOTS_OFFSET_AT = 64
"""Where the header holds snapshots_offset."""


def rewrite_snapshot_table(scope: Scope) -> None:
    """Draft a new table where entries lack extra data."""
    wrong = scope.report.findings.of(FindingKind.SNAPSHOT_EXTRA_DATA)
    if not len(wrong) or not scope.may_grow:
        return
    layout = scope.layout
    virtual_size = layout.header.size // 512 * 512
    snapshots = [complete_extra_data(each, virtual_size) for each in scope.report.snapshots]
    table = b"".join(encode_snapshot(each) for each in snapshots)
    size = scope.geometry.cluster_size
    offset = -(-scope.draft.size // size) * size
    scope.draft.size = offset + -(-len(table) // size) * size
    scope.draft.write(StageKind.PREPARE, offset, table)
    pointer = struct.pack(">Q", offset)
    scope.draft.write(StageKind.SWITCH, SNAPSHOTS_OFFSET_AT, pointer)
    kind = FindingKind.SNAPSHOT_EXTRA_DATA
    places = [(offset, len(table), len(wrong))]
    scope.explain(StageKind.PREPARE, Structure.SNAPSHOT_TABLE, kind, places)
    places = [(SNAPSHOTS_OFFSET_AT, len(pointer), 1)]
    scope.explain(StageKind.SWITCH, Structure.HEADER, kind, places)


def complete_extra_data(snapshot: Snapshot, virtual_size: int) -> Snapshot:
    """The entry with the fields that its extra data lacks, at the values that QEMU assumes."""
    if len(snapshot.extra_data) >= REQUIRED_EXTRA_DATA:
        return snapshot
    extra = struct.pack(">QQ", snapshot.vm_state_size, virtual_size)
    return replace(snapshot, extra_data=extra)
