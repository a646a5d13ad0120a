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

_OWNERS_WEIGHED = 64
"""Owners of a cluster that are looked at; one with more is not written to."""

_RESERVED = (FindingKind.L2_ENTRY_RESERVED, FindingKind.L1_ENTRY_RESERVED)


def correct_entries(scope: Scope) -> None:
    """Draft every entry that can be corrected; the others stay and stay named."""
    # Its cluster becomes free, which refcounts that must not be written could not say.
    if not scope.refcounts_are_shared:
        zeros = scope.report.findings.of(FindingKind.ZERO_MISALIGNED)
        free = ~scope.contested(zeros.host_offset >> scope.geometry.cluster_bits)
        for wrong in zeros.select(free | _shared_with_zeros_alone(scope, zeros)).rows():
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


def _shared_with_zeros_alone(scope: Scope, zeros: Findings) -> Mask:
    """Whether all owners but one of the cluster that an entry lies in are such entries themselves.

    Those have nothing there, and their claim goes with this very repair. Where a table reaches past
    the end of the file, not every owner is known.
    """
    if not len(zeros) or FindingKind.PAST_END in scope.report.counts():
        return np.zeros(len(zeros), dtype=np.bool_)
    columns = (zeros.snapshot.tolist(), zeros.l1_index.tolist(), zeros.l2_index.tolist())
    known = frozenset(zip(*columns, strict=True))

    def is_alone(cluster: int) -> bool:
        owners = scope.report.owners.of(cluster, limit=_OWNERS_WEIGHED)
        real = [
            each for each in owners if (each.snapshot, each.l1_index, each.l2_index) not in known
        ]
        return len(owners) < _OWNERS_WEIGHED and len(real) == 1

    clusters = zeros.host_offset >> scope.geometry.cluster_bits
    alone = {cluster: is_alone(cluster) for cluster in np.unique(clusters).tolist()}
    return np.array([alone[cluster] for cluster in clusters.tolist()], dtype=np.bool_)


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
