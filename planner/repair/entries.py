"""L1 and L2 entries whose right value the entry itself determines.

A misaligned entry that reads as zeros becomes plain zero, as QEMU makes it; COPIED goes from
compressed entries; reserved bits go where nothing else is wrong with what the entry points at: they
come last, when refcounts and flags say what they should.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from planner.arrays import Mask
from planner.findings import Finding, FindingKind, Findings
from planner.plan import StageKind
from planner.qcow2 import entries
from planner.repair.scope import Scope
from planner.source import read_bytes

_RESERVED = (FindingKind.L2_ENTRY_RESERVED, FindingKind.L1_ENTRY_RESERVED)


def correct_entries(scope: Scope) -> None:
    """Draft every entry that can be corrected; the others stay and stay named."""
    # Its cluster becomes free, which refcounts that must not be written could not say.
    if not scope.refcounts_are_shared:
        for wrong in _writable(scope, FindingKind.ZERO_MISALIGNED):
            _write(scope, wrong, _plain_zero(scope, wrong.host_offset))
    for wrong in _writable(scope, FindingKind.COMPRESSED_COPIED):
        _write(scope, wrong, struct.pack(">Q", wrong.expected))


def clear_reserved_bits(scope: Scope) -> None:
    """Draft the entries in which nothing but reserved bits is wrong, without them."""
    for kind in _RESERVED:
        wrong = scope.report.findings.of(kind)
        for each in _writable(scope, kind, _is_otherwise_right(scope, wrong)):
            _write(scope, each, struct.pack(">Q", each.expected))


def _writable(scope: Scope, kind: FindingKind, chosen: Mask | None = None) -> Iterator[Finding]:
    """The findings of *kind* (those *chosen*) that lie in no cluster with two owners."""
    wrong = scope.report.findings.of(kind)
    free = ~scope.contested(wrong.host_offset >> scope.geometry.cluster_bits)
    return wrong.select(free if chosen is None else free & chosen).rows()


def _write(scope: Scope, wrong: Finding, after: bytes) -> None:
    scope.draft.write(StageKind.CORRECT, wrong.host_offset, after)
    place = [(wrong.host_offset, len(after), 1)]
    scope.explain(StageKind.CORRECT, wrong.structure, wrong.kind, place)


def _is_otherwise_right(scope: Scope, wrong: Findings) -> Mask:
    """Whether, without its reserved bits, an entry is exactly what the census needs.

    Nothing else may be found at the entry, and the cluster it points at must be there, have as many
    users as its refcount says, and none that contradicts this one.
    """
    findings = scope.report.findings
    others = findings.select(~np.isin(findings.kind, _RESERVED))
    alone: Mask = ~np.isin(wrong.host_offset, others.host_offset)
    offset = (wrong.expected & np.uint64(entries.L2_OFFSET)).astype(np.int64)
    cluster = offset >> scope.geometry.cluster_bits
    agreed = np.array([_refcount_agrees(scope, each) for each in cluster.tolist()], dtype=np.bool_)
    alone &= (offset != 0) & (cluster < scope.layout.host_clusters)
    alone &= ~scope.contested(cluster) & agreed
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
