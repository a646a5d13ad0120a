"""A plan in the making: writes by stage, in any order of stages, on top of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from planner.arrays import I64, U8, Mask, distinct, is_among, is_any_of
from planner.repair.overlay import Layer, Layered
from planner.repair.plan import (
    COMPARED_SECTORS,
    MAX_EDITS,
    Edit,
    LazyEdits,
    Plan,
    PlanTier,
    Stage,
    StageKind,
)
from planner.source import SECTOR, Source, read_tables


class Draft:
    """A plan in the making: writes by stage, in any order of stages, on top of a source.

    ``can_grow``: whether the source may become longer; a block device does not.
    """

    def __init__(self, source: Source, *, can_grow: bool = True) -> None:
        self._source = source
        self.can_grow = can_grow
        self._writes: dict[StageKind, list[_Write]] = {}
        # As far as they still hold.
        self._layers: dict[StageKind, list[Layer]] = {}
        # Stages whose first write is another draft's too, all that it had: not joined to others.
        self._forked: set[StageKind] = set()
        self._stages: dict[StageKind, Stage] = {}
        self._reasons: list[tuple[Callable[[], Iterable[Edit]], int]] = []
        self._listed = self._edit_count = 0
        self._size = source.size
        self.revision = 0
        """Grows with each change of what is drafted."""

    def fork(self) -> Draft:
        """The same, to be gone on with on its own. What is drafted is shared, not copied."""
        twin = Draft(self._source, can_grow=self.can_grow)
        twin._writes = {kind: list(writes) for kind, writes in self._writes.items()}
        twin._layers, twin._stages = dict(self._layers), dict(self._stages)
        joined = {kind for kind in self._layers if _is_joined(self._writes[kind])}
        twin._forked = self._forked | joined
        twin._reasons = list(self._reasons)
        twin._listed, twin._edit_count = self._listed, self._edit_count
        twin._size, twin.revision = self._size, self.revision
        return twin

    @property
    def source(self) -> Source:
        """What is drafted upon, as it is."""
        return self._source

    @property
    def size(self) -> int:
        """Length of the file when all is written, bytes."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if size != self._size:
            self._size = size
            self._layers.clear()
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
        if not self._layers:
            return
        sectors = distinct(sectors)
        for kind in list(self._layers):
            if kind == first or (kind > first and self._touches(kind, sectors)):
                del self._layers[kind]
                self._stages.pop(kind, None)

    def _touches(self, kind: StageKind, sectors: I64) -> bool:
        return any(is_among(write.sectors, sectors).any() for write in self._writes[kind])

    def withdraw(self, kind: StageKind) -> None:
        """Take back what was drafted for a stage."""
        self._forked.discard(kind)
        for write in self._writes.pop(kind, []):
            self._forget_stages(kind, write.sectors)

    def explain(self, edits: Callable[[], Iterable[Edit]], count: int) -> None:
        """Say why *count* things change; *edits* is asked when a plan is made, as far as it lists
        them: most drafts never are one.
        """
        self._edit_count += count
        if self.edits_left:
            self._reasons.append((edits, min(count, self.edits_left)))
            self._listed += self._reasons[-1][1]

    @property
    def edits_left(self) -> int:
        """How many more edits are listed one by one."""
        return MAX_EDITS - self._listed

    @property
    def is_empty(self) -> bool:
        """Whether nothing is drafted."""
        return not self._writes

    @property
    def writes_anything(self) -> bool:
        """Whether anything would be otherwise than in the source."""
        is_longer = self._source.size != self._size
        return is_longer or any(self._all_differences())

    def touches(self, kind: StageKind, sectors: I64) -> Mask:
        """Which of *sectors* something is drafted in for a stage."""
        touched = np.zeros(len(sectors), dtype=np.bool_)
        for write in self._writes.get(kind, []):
            touched |= is_any_of(sectors, write.sectors)
        return touched

    def has(self, kind: StageKind) -> bool:
        """Whether something is drafted for a stage."""
        return kind in self._writes

    def overlay(self) -> Layered:
        """The source as it would be after everything drafted so far."""
        return Layered(self._source, self._size, list(chain(*self._all_layers())))

    def plan(self, tier: PlanTier) -> Plan:
        """What was drafted, as a plan; sectors that would stay as they are are dropped."""
        stages = self._all_stages()
        some = tuple(stage for stage in stages if len(stage.sectors))
        edits = LazyEdits(self._reasons)
        return Plan(tier, some, self._source.size, self._size, edits, self._edit_count)

    def _all_differences(self) -> Iterator[bool]:
        """Of each stage whether it changes anything; one after the other."""
        layers = self._joined_layers()
        for number, (sectors, content) in enumerate(layers):
            base = Layered(self._source, self._size, layers[:number])
            for part, rows in read_tables(base, sectors * SECTOR, SECTOR):
                yield not np.array_equal(rows, content[part])

    def _all_stages(self) -> list[Stage]:
        """What each stage changes, in their order; some of them may change nothing."""
        layers = self._joined_layers()
        for number, kind in enumerate(sorted(self._writes)):
            if kind not in self._stages:
                base = Layered(self._source, self._size, layers[:number])
                self._stages[kind] = _stage(kind, base, layers[number])
        return [self._stages[kind] for kind in sorted(self._writes)]

    def _joined_layers(self) -> list[Layer]:
        """As `_all_layers`, one of each stage."""
        for kind in self._forked:
            if len(self._layers.get(kind, ())) > 1:
                del self._layers[kind]
        self._forked.clear()
        return list(chain(*self._all_layers()))

    def _all_layers(self) -> list[list[Layer]]:
        """What each stage leaves in the sectors that it writes to, in the order of stages: one
        layer, or another draft's and one over it.

        For an overlay that will do: what is there now, of as many bytes, only a plan tells.
        """
        layers: list[list[Layer]] = []
        for kind in sorted(self._writes):
            if kind not in self._layers:
                base = Layered(self._source, self._size, list(chain(*layers)))
                self._layers[kind] = self._layers_of(kind, base)
            layers.append(self._layers[kind])
        return layers

    def _layers_of(self, kind: StageKind, base: Source) -> list[Layer]:
        writes = self._writes[kind]
        if kind not in self._forked or len(writes) == 1:
            return [_layer(base, writes)]
        first, own = writes[:1], writes[1:]
        beneath = _layer(base, first)
        over = _layer(Layered(base, self._size, [beneath]), own)
        self._writes[kind] = first + own  # which may be joined by now
        return [beneath, over]


def _layer(base: Source, writes: list[_Write]) -> Layer:
    """What *writes* leave on *base*."""
    if all(isinstance(write.data, np.ndarray) for write in writes):
        _join(writes)
    (first, *others) = writes
    if isinstance(first.data, np.ndarray) and not others:
        return first.sectors, first.data
    sectors = distinct(np.concatenate([write.sectors for write in writes]))
    return sectors, _content_after(_content(base, sectors), sectors, writes)


def _stage(kind: StageKind, base: Source, layer: Layer) -> Stage:
    """The stage that lays *layer* on *base*."""
    sectors, after = layer
    before = np.empty((len(sectors), SECTOR), dtype=np.uint8)
    differs, end = np.empty(len(sectors), dtype=np.bool_), 0
    for part, rows in read_tables(base, sectors * SECTOR, SECTOR):
        differs[part] = ~equal_rows(rows, after[part])
        start, end = end, end + int(np.count_nonzero(differs[part]))
        before[start:end] = rows[differs[part]]
    if end == len(sectors):
        return Stage(kind, sectors, before, after)
    return Stage(kind, sectors[differs], before[:end], after[differs])


def _content(base: Source, sectors: I64) -> U8:
    """What *sectors* hold, (n, 512)."""
    content = np.empty((len(sectors), SECTOR), dtype=np.uint8)
    for part, rows in read_tables(base, sectors * SECTOR, SECTOR):
        content[part] = rows
    return content


@dataclass(frozen=True, slots=True)
class _Write:
    """``data``: whole sectors, uint8 (n, 512), or any bytes from byte ``skip`` of the first on.

    ``sectors``: those that it touches, int64, in the order of its bytes.
    """

    sectors: I64
    data: U8 | bytes
    skip: int = 0


def _is_joined(writes: list[_Write]) -> bool:
    """Whether a stage takes what was written as it is."""
    return len(writes) == 1 and isinstance(writes[0].data, np.ndarray)


def _join(writes: list[_Write]) -> None:
    """Make one write, its sectors ascending, of many of whole sectors.

    A stage then takes it as it is, so that what is drafted is held once.
    """
    if len(writes) == 1 and (np.diff(writes[0].sectors) > 0).all():
        return
    sectors = distinct(np.concatenate([write.sectors for write in writes]))
    rows = np.empty((len(sectors), SECTOR), dtype=np.uint8)
    while writes:
        write = writes.pop(0)  # One after the other, so that little is there twice.
        rows[np.searchsorted(sectors, write.sectors)] = write.data
    writes.append(_Write(sectors, rows))


def _content_after(before: U8, sectors: I64, writes: list[_Write]) -> U8:
    """What *sectors* hold after *writes*; *before*, which they hold before, is changed to it."""
    flat = before.reshape(-1)
    for write in writes:
        if isinstance(write.data, bytes):
            # The sectors of one write are neighbours in *sectors* too: none lies between them.
            start = int(np.searchsorted(sectors, write.sectors[0])) * SECTOR + write.skip
            flat[start : start + len(write.data)] = np.frombuffer(write.data, dtype=np.uint8)
        else:
            before[np.searchsorted(sectors, write.sectors)] = write.data
    return before


def equal_rows(one: U8, other: U8) -> Mask:
    """Which sectors, uint8 (n, 512), are alike."""
    equal: Mask = np.empty(len(one), dtype=np.bool_)
    for start in range(0, len(one), COMPARED_SECTORS):
        part = slice(start, start + COMPARED_SECTORS)
        equal[part] = (one[part].view(np.uint64) == other[part].view(np.uint64)).all(axis=1)
    return equal
