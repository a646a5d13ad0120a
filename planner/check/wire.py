"""CheckConfig and CheckResult: the check's request and answer as fixed structures, bit for bit.

Little-endian, C layout. Fields are only ever appended. Counters that do not fit their field are
held at its maximum: a program that reads them learns "very many", never a wrapped number.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import IntFlag

from construct import Const, Int32ul, Int64ul, Padding, Struct

from planner.check.report import RepairCounters, Report
from planner.errors import ImageError
from planner.findings.kinds import KINDS, FindingKind, Severity

CONFIG_MAGIC = 0x4348_4543
RESULT_MAGIC = 0x4348_5253
FORMAT_QCOW2 = 1
U32_MAX = 0xFFFF_FFFF

CONFIG = Struct("magic" / Const(CONFIG_MAGIC, Int32ul), "flags" / Int32ul)
RESULT = Struct(
    "magic" / Const(RESULT_MAGIC, Int32ul),
    "format" / Int32ul,
    "total_errors" / Int32ul,
    "corruptions" / Int32ul,
    "leaks" / Int32ul,
    "refcount_errors" / Int32ul,
    "chain_errors" / Int32ul,
    "subcluster_errors" / Int32ul,
    "image_end_offset" / Int64ul,
    "clusters_checked" / Int64ul,
    "clusters_allocated" / Int64ul,
    "fragmentation" / Int32ul,
    "flags" / Int32ul,
    "repaired_leaks" / Int32ul,
    "repaired_refcounts" / Int32ul,
    "repaired_corruptions" / Int32ul,
    Padding(4),
)


class ConfigFlag(IntFlag):
    """What a check is asked to do."""

    REPAIR = 1 << 0
    QUIET = 1 << 1
    UNSAFE_QUIRKS = 1 << 2
    CHAIN = 1 << 3
    REPAIR_ALL = 1 << 4
    VERBOSE = 1 << 31


class ResultFlag(IntFlag):
    """What a check found, in a word."""

    VALID = 1 << 0
    HAS_LEAKS = 1 << 1
    HAS_CORRUPTIONS = 1 << 2
    DIRTY = 1 << 3
    CORRUPT_BIT = 1 << 4
    INCOMPLETE = 1 << 5
    NOT_SUPPORTED = 1 << 6
    CHAIN_ERRORS = 1 << 7
    REPAIR_INCOMPLETE = 1 << 8


NO_CONFIG = ConfigFlag(0)
NO_RESULT = ResultFlag(0)


@dataclass(frozen=True, slots=True)
class CheckConfig:
    """8 bytes: magic and flags."""

    flags: ConfigFlag = NO_CONFIG

    @property
    def should_repair(self) -> bool:
        return bool(self.flags & ConfigFlag.REPAIR)

    @property
    def should_repair_all(self) -> bool:
        """REPAIR_ALL widens a repair; alone it asks for none."""
        both = ConfigFlag.REPAIR | ConfigFlag.REPAIR_ALL
        return self.flags & both == both

    def to_bytes(self) -> bytes:
        raw: bytes = CONFIG.build({"flags": int(self.flags)})
        return raw

    @classmethod
    def from_bytes(cls, raw: bytes) -> CheckConfig:
        """Raises `ImageError` for a wrong length or magic."""
        _require("CheckConfig", raw, CONFIG.sizeof(), CONFIG_MAGIC)
        return cls(ConfigFlag(CONFIG.parse(raw).flags))


@dataclass(frozen=True, slots=True)
class CheckResult:
    """80 bytes. ``clusters_*`` are guest clusters; ``fragmentation`` is in percent."""

    format: int = FORMAT_QCOW2
    total_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    refcount_errors: int = 0
    chain_errors: int = 0
    subcluster_errors: int = 0
    image_end_offset: int = 0
    clusters_checked: int = 0
    clusters_allocated: int = 0
    fragmentation: int = 0
    flags: ResultFlag = NO_RESULT
    repaired_leaks: int = 0
    repaired_refcounts: int = 0
    repaired_corruptions: int = 0

    def has(self, flag: ResultFlag) -> bool:
        return bool(self.flags & flag)

    def to_bytes(self) -> bytes:
        wide = {"image_end_offset", "clusters_checked", "clusters_allocated"}
        values = {
            name: int(value) if name in wide else min(int(value), U32_MAX)
            for name, value in asdict(self).items()
        }
        raw: bytes = RESULT.build(values)
        return raw

    @classmethod
    def from_bytes(cls, raw: bytes) -> CheckResult:
        """Raises `ImageError` for a wrong length or magic."""
        _require("CheckResult", raw, RESULT.sizeof(), RESULT_MAGIC)
        parsed = RESULT.parse(raw)
        values = {name: parsed[name] for name in cls.__slots__}
        return cls(**values | {"flags": ResultFlag(parsed.flags)})

    @classmethod
    def of(cls, report: Report, mended: RepairCounters | None = None) -> CheckResult:
        """The answer that a report amounts to; with what the repair before it *mended*, if any."""
        counters, counts = report.counters, report.counts()
        refcounts = (FindingKind.REFCOUNT_LOW, FindingKind.REFCOUNT_MISSING, FindingKind.LEAK)
        subclusters = (
            FindingKind.SUBCLUSTER_CONFLICT,
            FindingKind.UNALLOCATED_SUBCLUSTERS,
            FindingKind.COMPRESSED_SUBCLUSTERS,
        )
        allocated = counters.allocated_clusters
        flags = _flags_of(report, set(counts))
        if mended is not None and mended.incomplete:
            flags |= ResultFlag.REPAIR_INCOMPLETE
        return cls(
            total_errors=counters.check_errors + counters.corruptions + counters.leaks,
            corruptions=counters.corruptions,
            leaks=counters.leaks,
            refcount_errors=sum(counts.get(kind, 0) for kind in refcounts),
            subcluster_errors=sum(counts.get(kind, 0) for kind in subclusters),
            image_end_offset=counters.image_end_offset,
            clusters_checked=counters.total_clusters,
            clusters_allocated=allocated,
            fragmentation=100 * counters.fragmented_clusters // allocated if allocated else 0,
            flags=flags,
            repaired_leaks=mended.leaks if mended else 0,
            repaired_refcounts=mended.refcounts if mended else 0,
            repaired_corruptions=mended.corruptions if mended else 0,
        )


def _flags_of(report: Report, kinds: set[FindingKind]) -> ResultFlag:
    severities = {KINDS[kind].severity for kind in kinds}
    flags = {
        ResultFlag.VALID: report.error is None and not report.torn,
        ResultFlag.HAS_LEAKS: Severity.LEAK in severities,
        ResultFlag.HAS_CORRUPTIONS: Severity.CORRUPTION in severities,
        ResultFlag.DIRTY: FindingKind.DIRTY_BIT in kinds,
        ResultFlag.CORRUPT_BIT: FindingKind.CORRUPT_BIT in kinds,
        ResultFlag.INCOMPLETE: bool(report.error is not None or report.counters.check_errors),
        ResultFlag.NOT_SUPPORTED: report.error is not None and report.error.exit_code == 63,
    }
    result = NO_RESULT
    for flag, is_set in flags.items():
        if is_set:
            result |= flag
    return result


def _require(name: str, raw: bytes, length: int, magic: int) -> None:
    if len(raw) != length:
        raise ImageError(f"{name} length", len(raw), f"must be {length}")
    found = int.from_bytes(raw[:4], "little")
    if found != magic:
        raise ImageError(f"{name} magic", f"{found:#x}", f"must be {magic:#x}")
