"""A repair as a value: stages of patches, its inverse, its identity.

Nothing here decides what to repair, and nothing writes. Bytes are held by sector, before and after:
a disk writes whole sectors, so a crash leaves each as it was or as it will be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, overload

import numpy as np

from planner.arrays import I64, U8
from planner.source import SECTOR

if TYPE_CHECKING:  # a mount that answers has seen none of them
    from planner.findings.kinds import FindingKind, Structure

MAX_EDITS = 1 << 16
"""Edits that a plan lists one by one; it counts all of them."""

COMPARED_SECTORS = 1 << 12
"""Sectors that are compared at a time."""

ID_LENGTH = 12
SHORTEST_QUOTE = 6


class RepairTier(StrEnum):
    """How far a repair may go.

    The first two are the words of ``qemu-img check -r``. The others do what the image does not
    determine: a person chooses them, and always quotes a plan.
    """

    LEAKS = "leaks"
    ALL = "all"
    SPLIT = "split"
    BITMAPS = "bitmaps"
    SNAPSHOTS = "snapshots"

    @property
    def is_chosen(self) -> bool:
        """Whether only a person can know that it is right."""
        return self not in DETERMINED


DETERMINED = (RepairTier.LEAKS, RepairTier.ALL)
"""The tiers that do what the image itself determines; QEMU has them too."""


class RescueTier(StrEnum):
    """Plans of `planner.rescue`, which follow from more than a check."""

    RESCUE = "rescue"


PlanTier = RepairTier | RescueTier


def tier_of(word: str) -> PlanTier:
    """What a plan is of, by its name. Raises `ValueError`."""
    return RescueTier(word) if word in tuple(RescueTier) else RepairTier(word)


class StageKind(IntEnum):
    """The stages of a repair, in their order. Between two of them the disk is flushed."""

    GUARD = 0
    PREPARE = 1
    SWITCH = 2
    REPOINT = 3
    CORRECT = 4
    RELEASE = 5

    @property
    def meaning(self) -> str:
        """What the stage does, in a sentence."""
        return _STAGES[self]


_STAGES = {
    StageKind.GUARD: "the header is marked, so that no one trusts a half-repaired image",
    StageKind.PREPARE: "new structures are written where nothing points; refcounts are raised",
    StageKind.SWITCH: "the header is pointed at the new structures",
    StageKind.REPOINT: "entries are pointed at the copies of what they led to",
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


class LazyEdits(Sequence[Edit]):
    """Edits that are made when somebody asks for them: most plans are never listed.

    *makers*: functions that give them, and how many of each.
    """

    def __init__(self, makers: Iterable[tuple[Callable[[], Iterable[Edit]], int]]) -> None:
        self._makers = tuple(makers)

    @cached_property
    def _made(self) -> tuple[Edit, ...]:
        return tuple(edit for make, most in self._makers for edit in islice(make(), most))

    def __len__(self) -> int:
        return len(self._made)

    @overload
    def __getitem__(self, at: int) -> Edit: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Edit, ...]: ...
    def __getitem__(self, at: int | slice) -> Edit | tuple[Edit, ...]:
        return self._made[at]


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

    tier: PlanTier
    stages: tuple[Stage, ...]
    size_before: int
    size_after: int
    edits: Sequence[Edit] = ()
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
