"""What must hold of an image after a crash in the middle of a repair. Makes no images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from instarfs.repair.execute import take_back
from planner.findings.kinds import FindingKind
from planner.qcow2.header import Incompatible
from planner.qcow2.layout import Layout
from planner.repair.plan import Plan
from planner.source import Bytes
from tests.cached import check_bytes
from tests.crash.guest import Disk, disks
from tests.crash.replay import Crash
from tests.devices import MemoryDevice

IN_BETWEEN = (FindingKind.LEAK, FindingKind.L1_COPIED, FindingKind.L2_COPIED, FindingKind.DIRTY_BIT)
"""What there may be more of in between, without the corrupt bit: none of it can cost a byte.

Refcounts and COPIED flags lie in different sectors, so that one of them always comes first; which
flags may be wrong in between is judged by `_unsafe_flags`.
"""


@dataclass(frozen=True, slots=True)
class Original:
    """An image before its repair, and what the repair is."""

    content: bytes
    plan: Plan
    guest: dict[str, Disk]

    @classmethod
    def of(cls, content: bytes, plan: Plan) -> Original:
        return cls(content, plan, disks(content))


def faults(original: Original, crash: Crash) -> Iterator[str]:
    """Everything that a crash must not have done; nothing where all is well."""
    layout = Layout.read(Bytes(crash.content))
    yield from _guest_faults(original, crash)
    is_guarded = bool(layout.header.incompatible_features & Incompatible.CORRUPT)
    if not is_guarded:
        yield from _worse(original, crash)
    device = MemoryDevice(bytearray(crash.content))
    take_back(device, original.plan)
    if bytes(device.content) != original.content:
        yield "the undo file does not give the original bytes"


def _guest_faults(original: Original, crash: Crash) -> Iterator[str]:
    now = disks(crash.content)
    for name, disk in original.guest.items():
        for cluster, read in disk.items():
            if now.get(name, {}).get(cluster) != read:
                yield f"{name}: guest cluster {cluster} was {read}, is {now[name].get(cluster)}"


def _worse(original: Original, crash: Crash) -> Iterator[str]:
    before, now = check_bytes(original.content), check_bytes(crash.content)
    counts = before.counts()
    for kind, number in now.counts().items():
        if kind not in IN_BETWEEN and number > counts.get(kind, 0):
            yield f"{kind.label} went from {counts.get(kind, 0)} to {number}"
    if now.counters.check_errors > before.counters.check_errors:
        yield f"check errors went to {now.counters.check_errors}"
    new = _unsafe_flags(crash.content) - _unsafe_flags(original.content)
    if new:
        yield f"COPIED is set and allows to write to a cluster that has other users: {sorted(new)}"


def _unsafe_flags(content: bytes) -> set[int]:
    """Where COPIED is set though the cluster has several references: the guest could write to all.

    A flag that is wrong about the stored refcount alone costs at most a needless copy.
    """
    report = check_bytes(content)
    mismatches = report.mismatches
    if mismatches is None:
        return set()
    found: set[int] = set()
    bits = report.geometry.cluster_bits
    for wrong in report.rows(FindingKind.L1_COPIED, FindingKind.L2_COPIED):
        if wrong.expected:
            continue  # it is clear, and should be set
        for place in range(wrong.host_offset, wrong.host_offset + wrong.length, 8):
            word = int.from_bytes(content[place : place + 8], "big")
            cluster = (word & 0x00FF_FFFF_FFFF_FE00) >> bits
            if cluster < len(mismatches.counted) and mismatches.counted[cluster] > 1:
                found.add(place)
    return found
