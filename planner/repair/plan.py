"""A repair as a value: stages of patches, its inverse, its identity; the draft it grows from.

Nothing here decides what to repair, and nothing writes. Bytes are held by sector, before and after:
a disk writes whole sectors, so a crash leaves each as it was or as it will be.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum

import numpy as np

from planner.arrays import I64, U8, Mask, distinct
from planner.findings.kinds import FindingKind, Structure
from planner.source import SECTOR, Overlay, Source, read_tables

MAX_EDITS = 1 << 16
"""Edits that a plan lists one by one; it counts all of them."""

COMPARED_SECTORS = 1 << 14
"""Sectors that are compared at a time."""

ID_LENGTH = 12
SHORTEST_QUOTE = 6


class RepairTier(StrEnum):
    """How far a repair may go; the words of ``qemu-img check -r``."""

    LEAKS = "leaks"
    ALL = "all"


class StageKind(IntEnum):
    """The stages of a repair, in their order. Between two of them the disk is flushed."""

    GUARD = 0
    PREPARE = 1
    SWITCH = 2
    CORRECT = 3
    RELEASE = 4

    @property
    def meaning(self) -> str:
        """What the stage does, in a sentence."""
        return _STAGES[self]


_STAGES = {
    StageKind.GUARD: "the header is marked, so that no one trusts a half-repaired image",
    StageKind.PREPARE: "new structures are written where nothing points; refcounts are raised",
    StageKind.SWITCH: "the header is pointed at the new structures",
    StageKind.CORRECT: "entries and flags are corrected in place; refcounts are lowered",
    StageKind.RELEASE: "the corrupt and dirty bits are cleared",
}


@dataclass(frozen=True, slots=True)
class Patch:
    """A run of bytes that change, every one of them. ``offset`` in the file."""

    offset: int
    before: bytes
    after: bytes


@dataclass(frozen=True, slots=True)
class Edit:
    """Why bytes change: the ``count`` entries at ``offset`` answer findings of ``kind``."""

    stage: StageKind
    structure: Structure
    kind: FindingKind
    offset: int
    length: int
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Sectors that may reach the disk in any order.

    ``sectors``: ascending sector numbers, int64 (n,). ``before``, ``after``: uint8 (n, 512); in
    every sector at least one byte differs.
    """

    kind: StageKind
    sectors: I64
    before: U8
    after: U8

    def patches(self) -> Iterator[Patch]:
        """The runs of bytes that change, ascending."""
        for at in range(len(self.sectors)):
            before, after = self.before[at], self.after[at]
            changed = np.flatnonzero(before != after)
            starts = np.flatnonzero(np.diff(changed, prepend=-2) != 1)
            ends = np.append(starts[1:], len(changed)) - 1
            for low, high in zip(changed[starts].tolist(), changed[ends].tolist(), strict=True):
                offset = int(self.sectors[at]) * SECTOR + low
                part = slice(low, high + 1)
                yield Patch(offset, before[part].tobytes(), after[part].tobytes())

    def changed_bytes(self) -> int:
        """How many bytes the stage changes."""
        parts = range(0, len(self.sectors), COMPARED_SECTORS)
        compared = (slice(start, start + COMPARED_SECTORS) for start in parts)
        return sum(int(np.count_nonzero(self.before[at] != self.after[at])) for at in compared)

    def bytes_at(self, offset: int, length: int) -> tuple[bytes, bytes]:
        """The bytes of a range before and after; where no sector changes they are empty."""
        first, last = offset // SECTOR, (offset + length - 1) // SECTOR
        low, high = np.searchsorted(self.sectors, [first, last + 1])
        if high - low != last - first + 1:
            return b"", b""
        skip = offset - first * SECTOR
        part = slice(skip, skip + length)
        return self.before[low:high].tobytes()[part], self.after[low:high].tobytes()[part]

    def inverse(self) -> Stage:
        """The stage that takes this one back."""
        return replace(self, before=self.after, after=self.before)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A repair: its stages in order, and the file's length before and after.

    ``edits``: why, at most `MAX_EDITS` of ``edit_count``. Two plans are equal when they do the same
    to the same bytes.
    """

    tier: RepairTier
    stages: tuple[Stage, ...]
    size_before: int
    size_after: int
    edits: tuple[Edit, ...] = ()
    edit_count: int = 0
    _known_digest: list[str] = field(default_factory=list, init=False, repr=False)

    @property
    def id(self) -> str:
        """A short hash of everything that the plan does."""
        return self._digest()[:ID_LENGTH]

    @property
    def changes_nothing(self) -> bool:
        """Whether there is nothing to repair."""
        return not self.stages and self.size_before == self.size_after

    def is_quoted_by(self, quote: str) -> bool:
        """Whether *quote* names this plan: its id, or at least its first six digits."""
        return len(quote) >= SHORTEST_QUOTE and self.id.startswith(quote.lower())

    def patches(self) -> Iterator[tuple[StageKind, Patch]]:
        """All patches in the order of their stages."""
        for stage in self.stages:
            for patch in stage.patches():
                yield stage.kind, patch

    def inverse(self) -> Plan:
        """The plan that takes this one back: stages in reverse, before and after exchanged."""
        return replace(
            self,
            stages=tuple(stage.inverse() for stage in reversed(self.stages)),
            size_before=self.size_after,
            size_after=self.size_before,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._digest() == other._digest()

    def __hash__(self) -> int:
        return hash(self._digest())

    def _digest(self) -> str:
        """SHA-256 over all of it, taken when it is first asked for."""
        if not self._known_digest:
            self._known_digest.append(self._take_digest())
        return self._known_digest[0]

    def _take_digest(self) -> str:
        whole = hashlib.sha256()
        whole.update(f"{self.tier} {self.size_before} {self.size_after}".encode())
        for stage in self.stages:
            whole.update(f" {int(stage.kind)} {len(stage.sectors)} ".encode())
            for column in (stage.sectors.astype("<i8"), stage.before, stage.after):
                whole.update(np.ascontiguousarray(column).data)
        return whole.hexdigest()


class Draft:
    """A plan in the making: writes by stage, in any order of stages, on top of a source.

    ``can_grow``: whether the source may become longer; a block device does not.
    """

    def __init__(self, source: Source, *, can_grow: bool = True) -> None:
        self._source = source
        self.can_grow = can_grow
        self._writes: dict[StageKind, list[_Write]] = {}
        self._stages: dict[StageKind, Stage] = {}  # As far as they still hold.
        self._edits: list[Edit] = []
        self._edit_count = 0
        self._size = source.size
        self.revision = 0
        """Grows with each change of what is drafted."""

    @property
    def size(self) -> int:
        """Length of the file when all is written, bytes."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if size != self._size:
            self._size = size
            self._stages.clear()

    def write_tables(self, kind: StageKind, offsets: I64, rows: U8) -> None:
        """Whole tables: sector-aligned *offsets*, and their bytes, uint8 (tables, bytes)."""
        if len(offsets):
            step = np.arange(rows.shape[1] // SECTOR)
            sectors = (offsets[:, None] // SECTOR + step).reshape(-1)
            self._add(kind, _Write(sectors, rows.reshape(-1, SECTOR)))

    def write(self, kind: StageKind, offset: int, data: bytes) -> None:
        """Any bytes anywhere. In a stage, what is drafted later holds."""
        sectors = np.arange(offset // SECTOR, (offset + len(data) - 1) // SECTOR + 1)
        self._add(kind, _Write(sectors, data, offset % SECTOR))

    def _add(self, kind: StageKind, write: _Write) -> None:
        self._writes.setdefault(kind, []).append(write)
        self._forget_stages(kind, write.sectors)

    def _forget_stages(self, first: StageKind, sectors: I64) -> None:
        """Stage *first* is no longer what it was, nor a later one that builds on its *sectors*."""
        self.revision += 1
        for kind in list(self._stages):
            if kind == first or (kind > first and self._touches(kind, sectors)):
                del self._stages[kind]

    def _touches(self, kind: StageKind, sectors: I64) -> bool:
        return any(np.isin(write.sectors, sectors).any() for write in self._writes[kind])

    def withdraw(self, kind: StageKind) -> None:
        """Take back what was drafted for a stage."""
        for write in self._writes.pop(kind, []):
            self._forget_stages(kind, write.sectors)

    def explain(self, edits: Iterable[Edit], count: int) -> None:
        """Say why *count* things change; *edits* is read only as far as a plan lists them."""
        self._edit_count += count
        self._edits.extend(itertools.islice(edits, self.edits_left))

    @property
    def edits_left(self) -> int:
        """How many more edits are listed one by one."""
        return MAX_EDITS - len(self._edits)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is drafted."""
        return not self._writes

    @property
    def writes_anything(self) -> bool:
        """Whether anything would be otherwise than in the source."""
        return not self.plan(RepairTier.ALL).changes_nothing

    def has(self, kind: StageKind) -> bool:
        """Whether something is drafted for a stage."""
        return kind in self._writes

    def overlay(self) -> Overlay:
        """The source as it would be after everything drafted so far."""
        return Overlay(self._source, self.plan(RepairTier.ALL))

    def plan(self, tier: RepairTier) -> Plan:
        """What was drafted, as a plan; sectors that would stay as they are are dropped."""
        plan = Plan(tier, (), self._source.size, self.size, tuple(self._edits), self._edit_count)
        for kind in sorted(self._writes):
            if kind not in self._stages:
                self._stages[kind] = self._stage(kind, Overlay(self._source, plan))
            stage = self._stages[kind]
            if len(stage.sectors):
                plan = replace(plan, stages=(*plan.stages, stage))
        return plan

    def _stage(self, kind: StageKind, base: Source) -> Stage:
        writes = self._writes[kind]
        if all(isinstance(write.data, np.ndarray) for write in writes):
            _join(writes)
        sectors = distinct(np.concatenate([write.sectors for write in writes]))
        before = np.empty((len(sectors), SECTOR), dtype=np.uint8)
        for part, rows in read_tables(base, sectors * SECTOR, SECTOR):
            before[part] = rows
        after = _content_after(before, sectors, writes)
        differs = ~equal_rows(before, after)
        if differs.all():
            return Stage(kind, sectors, before, after)
        return Stage(kind, sectors[differs], before[differs], after[differs])


@dataclass(frozen=True, slots=True)
class _Write:
    """``data``: whole sectors, uint8 (n, 512), or any bytes from byte ``skip`` of the first on.

    ``sectors``: those that it touches, int64, in the order of its bytes.
    """

    sectors: I64
    data: U8 | bytes
    skip: int = 0


def _join(writes: list[_Write]) -> None:
    """Make one write, its sectors ascending, of many of whole sectors.

    A stage then takes it as it is, so that what is drafted is held once.
    """
    sectors = distinct(np.concatenate([write.sectors for write in writes]))
    rows = np.empty((len(sectors), SECTOR), dtype=np.uint8)
    while writes:
        write = writes.pop(0)  # One after the other, so that little is there twice.
        rows[np.searchsorted(sectors, write.sectors)] = write.data
    writes.append(_Write(sectors, rows))


def _content_after(before: U8, sectors: I64, writes: list[_Write]) -> U8:
    """What *sectors* hold after *writes*; shape of *before*, which they hold before."""
    if len(writes) == 1 and isinstance(writes[0].data, np.ndarray):
        return writes[0].data
    after = before.copy()
    flat = after.reshape(-1)
    for write in writes:
        if isinstance(write.data, bytes):
            # The sectors of one write are neighbours in *sectors* too: none lies between them.
            start = int(np.searchsorted(sectors, write.sectors[0])) * SECTOR + write.skip
            flat[start : start + len(write.data)] = np.frombuffer(write.data, dtype=np.uint8)
        else:
            after[np.searchsorted(sectors, write.sectors)] = write.data
    return after


def equal_rows(one: U8, other: U8) -> Mask:
    """Which sectors, uint8 (n, 512), are alike."""
    equal: Mask = np.empty(len(one), dtype=np.bool_)
    for start in range(0, len(one), COMPARED_SECTORS):
        part = slice(start, start + COMPARED_SECTORS)
        equal[part] = (one[part] == other[part]).all(axis=1)
    return equal
