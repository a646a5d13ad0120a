"""L1 and L2 entries whose right value the entry itself determines.

A misaligned entry that reads as zeros becomes plain zero, as QEMU makes it; COPIED goes from
compressed entries; reserved bits go where nothing else is wrong with what the entry points at.
"""

from __future__ import annotations

import struct

import numpy as np

from planner.arrays import Mask
from planner.findings import FindingKind, Findings, Structure
from planner.plan import StageKind
from planner.qcow2 import entries
from planner.repair.scope import Scope
from planner.source import read_bytes

_ENTRY_KINDS = (
    FindingKind.ZERO_MISALIGNED,
    FindingKind.COMPRESSED_COPIED,
    FindingKind.L2_ENTRY_RESERVED,
    FindingKind.L1_ENTRY_RESERVED,
)

_RESERVED = (FindingKind.L2_ENTRY_RESERVED, FindingKind.L1_ENTRY_RESERVED)


def correct_entries(scope: Scope) -> None:
    """Draft every entry that can be corrected; the others stay and stay named."""
    for kind in _ENTRY_KINDS:
        wrong = scope.report.findings.of(kind)
        cluster = wrong.host_offset >> scope.geometry.cluster_bits
        wrong = wrong.select(~scope.contested(cluster))
        if kind in _RESERVED:
            wrong = wrong.select(_is_otherwise_right(scope, wrong))
        for at in range(len(wrong)):
            offset = int(wrong.host_offset[at])
            if kind is FindingKind.ZERO_MISALIGNED:
                after = _plain_zero(scope, offset)
            else:
                after = struct.pack(">Q", int(wrong.expected[at]))
            scope.draft.write(StageKind.CORRECT, offset, after)
            structure = Structure(int(wrong.structure[at]))
            scope.explain(StageKind.CORRECT, structure, kind, [(offset, len(after), 1)])


def _is_otherwise_right(scope: Scope, wrong: Findings) -> Mask:
    """Whether, without its reserved bits, an entry is exactly what the census needs.

    Nothing else may be found at the entry, and the cluster it points at must have as many users as
    its refcount says, and none that contradicts this one.
    """
    findings = scope.report.findings
    others = findings.select(~np.isin(findings.kind, _RESERVED))
    alone: Mask = ~np.isin(wrong.host_offset, others.host_offset)
    offset = (wrong.expected & np.uint64(entries.L2_OFFSET)).astype(np.int64)
    cluster = offset >> scope.geometry.cluster_bits
    agreed = np.array([_refcount_agrees(scope, each) for each in cluster.tolist()], dtype=np.bool_)
    alone &= (offset != 0) & ~scope.contested(cluster) & agreed
    return alone


def _refcount_agrees(scope: Scope, cluster: int) -> bool:
    return not len(scope.mismatches.between(cluster, cluster + 1)[0])


def _plain_zero(scope: Scope, offset: int) -> bytes:
    """The entry at *offset* without its cluster; fix_l2_entry_by_zero in QEMU."""
    if not scope.geometry.extended_l2:
        return struct.pack(">Q", entries.ZERO)
    _, bitmap = struct.unpack(">QQ", read_bytes(scope.source, offset, 16))
    zero = (bitmap | bitmap << 32) & entries.SUBCLUSTERS_ZERO
    return struct.pack(">QQ", 0, zero)
