"""Entries of the snapshot table that are none go; the count is that of the entries there are.

None is what holds nothing but zeros, and what QEMU cannot load and nothing whole can be made out
of. What such an entry may have held on to is not freed by that. An entry that the count leaves out
comes back where its L1 table is still counted for it.
"""

from __future__ import annotations

import struct

import numpy as np

from planner.arrays import I64, is_among
from planner.errors import ImageError, UnsupportedRepair
from planner.findings.kinds import FindingKind, Structure
from planner.findings.wording import plural
from planner.qcow2.snapshots import (
    ENTRY_BYTES,
    MAX_SNAPSHOTS,
    Snapshot,
    Snapshots,
    SnapshotTable,
    decode_snapshot,
    encode_snapshot,
    is_named_as_by_qemu,
    read_reachable_snapshots,
)
from planner.repair.plan import StageKind
from planner.repair.scope import Scope
from planner.repair.snapshot_table import NB_SNAPSHOTS_AT, place_table

_KIND = FindingKind.CHECK_STOPPED


def drop_snapshot_entries(scope: Scope) -> list[str]:
    """Draft a table of the snapshots that there are: what goes, a sentence each; or nothing.

    Raises `UnsupportedRepair` where it has to be a new one, and there is no room for that.
    """
    header = scope.layout.header
    table, error = read_reachable_snapshots(scope.source, header, scope.geometry)
    if not header.nb_snapshots and error is None:
        return []
    # A table that is said to lie where the header is, is none.
    found = table.snapshots if header.snapshots_offset else Snapshots()
    there = found.there()
    gone = header.nb_snapshots - len(there)
    if not gone and error is None:
        return []
    _draft_table(scope, there)
    return [*_sentences(header.nb_snapshots, gone, error)]


def _sentences(count: int, gone: int, error: ImageError | None) -> list[str]:
    why = f"QEMU cannot load the snapshot table ({error})" if error else ""
    what = f"{gone} of {plural(count, 'entry', 'entries')} of the snapshot table"
    lines = [why] if why else []
    if gone:
        lines.append(
            f"{what} {'is' if gone == 1 else 'are'} cut off: nothing of a snapshot can be made out"
            " there; what they may have held on to stays counted, as leaked clusters"
        )
    return lines or [why]


def _draft_table(scope: Scope, there: list[Snapshot]) -> None:
    offset = place_table(scope, there, _KIND) if there else 0
    if offset is None:
        raise UnsupportedRepair(
            "a new snapshot table would make the file grow over offsets past its end that the image"
            " refers to, or has no room",
            "export the disk",
            _KIND.label,
        )
    pointer = struct.pack(">IQ", len(there), offset)
    scope.draft.write(StageKind.SWITCH, NB_SNAPSHOTS_AT, pointer)
    places = [(NB_SNAPSHOTS_AT, len(pointer), 1)]
    scope.explain(StageKind.SWITCH, Structure.HEADER, _KIND, places)


def count_entries_behind(scope: Scope, leaked: I64) -> int:
    """How many entries stand behind those that the header counts, as QEMU wrote them.

    Each has an L1 table of *leaked* clusters, in order: counted for it, and for nothing else.
    """
    header = scope.layout.header
    table, error = read_reachable_snapshots(scope.source, header, scope.geometry)
    if error is not None or not header.snapshots_offset:
        return 0
    most, found = MAX_SNAPSHOTS - header.nb_snapshots, 0
    position = _behind(table)
    while found < most:
        entry = _entry_at(scope, position, leaked)
        if entry is None:
            break
        found += 1
        position += len(encode_snapshot(entry))
    return found


def draft_count(scope: Scope, count: int) -> None:
    """Draft the number of snapshots alone."""
    scope.draft.write(StageKind.SWITCH, NB_SNAPSHOTS_AT, struct.pack(">I", count))


def explain_count(scope: Scope) -> None:
    """Say why that number changes."""
    scope.explain(StageKind.SWITCH, Structure.HEADER, _KIND, [(NB_SNAPSHOTS_AT, 4, 1)])


def _behind(table: SnapshotTable) -> int:
    return table.offset + (table.length + 7 & ~7)


def _entry_at(scope: Scope, position: int, leaked: I64) -> Snapshot | None:
    """The snapshot that stands there; None where none does."""
    size = scope.geometry.cluster_size
    if position + ENTRY_BYTES > scope.source.size:
        return None
    try:
        entry = decode_snapshot(scope.source, position)
    except ImageError:
        return None
    offset, length = entry.l1_table_offset, entry.l1_size * 8
    is_place = offset and length and offset % size == 0
    if not is_place or offset + length > scope.source.size or not is_named_as_by_qemu(entry):
        return None
    l1 = np.arange(offset // size, -(-(offset + length) // size))
    return entry if is_among(l1, leaked).all() else None
