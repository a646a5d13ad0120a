"""A check and a program that writes, each going on for some words and then the other.

`Interleaving` is a source: while it is read, `tests.live.model.Program` writes, by a seeded
schedule. Between any two words that the check reads anything may have been written, down to a
single word, but for one thing: a write that has begun ends within a few words of reading
(`TORN_WORDS`), as a copy within memory does. Between two writes the program may stand still for as
long as the check takes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

from planner.check.check import check_image
from planner.check.live import Clock, check_live
from planner.check.report import Report
from planner.qcow2 import entries
from planner.source import Bytes, Source
from tests.images.builder import Image, ImageBuilder
from tests.images.damage import DAMAGES, CannotDamageError
from tests.live.model import ACTIONS, WORD, Program, Truncate, Write, act, apply

TORN_WORDS = 32
"""A write is at its end when so many words have been read since it began, at the latest."""

NOT_QUIET = ("missing-refcount", "data-past-end")
"""Damage that writing elsewhere undoes: a cluster that counts as free is taken, and the file grows
past what lay behind its end."""

HEALTHY = ("clean", "leaks", "dirty", "unsettled")
"""What may be said of an image that is not damaged."""


# ---- images --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """An image and its program. ``lazy``: lazy_refcounts."""

    cluster_bits: int = 9
    refcount_order: int = 4
    extended_l2: bool = False
    lazy: bool = False


KINDS = (
    *(Kind(refcount_order=order) for order in (4, 4, 0, 1, 2, 3, 5, 6)),
    Kind(lazy=True),
    Kind(cluster_bits=12),
    Kind(cluster_bits=14, extended_l2=True),
)

WRITTEN = 80
"""So many clusters of the guest are written to; behind them the disk is quiet."""


def build(kind: Kind, used: int = 6) -> Image:
    """Tables that are written to, tables that are not, a snapshot and a bitmap.

    *used*: clusters that are in use of each part; a multiple of 3, or 2.
    """
    return Image(bytearray(_built(kind, used)))


@cache
def _built(kind: Kind, used: int) -> bytes:
    geometry = ImageBuilder(
        cluster_bits=kind.cluster_bits,
        refcount_order=kind.refcount_order,
        extended_l2=kind.extended_l2,
    ).geometry
    per_table, one = geometry.l2_entries, geometry.cluster_size
    builder = ImageBuilder(
        cluster_bits=kind.cluster_bits,
        refcount_order=kind.refcount_order,
        extended_l2=kind.extended_l2,
        lazy_refcounts=kind.lazy,
        size=4 * per_table * one,
    )
    builder.write(0, b"a" * used * one)
    builder.write(3 * per_table, b"b" * used * one)
    if geometry.refcount_max > 1:
        builder.take_snapshot("first")
    moved = 2 * used // 3
    builder.write(3 * per_table + moved, b"c" * moved * one)
    builder.skip(2)
    builder.add_bitmap("one", {0, 1}, granularity_bits=max(9, kind.cluster_bits))
    return bytes(builder.build().data)


def quiet_parts(image: Image) -> tuple[set[int], set[int]]:
    """What no program changes that writes only to the first tables: words, by their host offsets,
    and refcounts, by their clusters.
    """
    return _quiet_parts(bytes(image.data))


@lru_cache(maxsize=len(KINDS))
def _quiet_parts(data: bytes) -> tuple[set[int], set[int]]:
    image = Image(bytearray(data))
    geometry = image.geometry
    words = {image.l1_at(3), image.bitmaps[0].bitmap_table_offset}
    wide = geometry.l2_entry_size
    clusters = set()
    for guest in range(3 * geometry.l2_entries, 4 * geometry.l2_entries):
        at = image.l2_at(guest)
        words |= set(range(at, at + wide, WORD))
        if image.word(at) & entries.L2_OFFSET:
            clusters.add((image.word(at) & entries.L2_OFFSET) // geometry.cluster_size)
    if image.snapshots:
        words |= {image.snapshots[0].offset, image.l1_at(3, snapshot=0)}
    return words, clusters


def damaged(image: Image, rng: random.Random) -> str | None:
    """Damage a quiet part of *image*, so that it is corrupt; by which kind. None: it did not go."""
    before, counts = bytes(image.data), image.refcounts()
    words, clusters = quiet_parts(image)
    block = image.refblock(0)
    for _ in range(20):
        name = rng.choice([name for name in DAMAGES if name not in NOT_QUIET])
        image.data[:] = before
        try:
            DAMAGES[name](image, rng)
        except (CannotDamageError, IndexError):
            continue
        after = bytes(image.data)
        if len(after) != len(before):
            continue
        spans = range(0, len(before), WORD)
        changed = {at for at in spans if before[at : at + WORD] != after[at : at + WORD]}
        if image.refblock(0) != block:
            continue
        changed -= set(range(block, block + image.cluster_size, WORD))
        counted = enumerate(zip(counts, image.refcounts(), strict=True))
        recounted = {cluster for cluster, (old, new) in counted if old != new}
        is_quiet = changed <= words and recounted <= clusters
        if is_quiet and check_image(Bytes(after)).exit_code == 2:
            return name
    image.data[:] = before
    return None


# ---- schedules -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long either goes on: words that are read, and words that are written, on average.

    ``acts``: what the program does in all, and then no more; ``guests``: in how many clusters.
    """

    reading: int
    writing: int
    acts: int
    guests: int
    actions: tuple[str, ...]
    settle: float


def schedule(rng: random.Random, *, allows_snapshots: bool) -> Schedule:
    """Any: from word by word to long rests, from one cluster back and forth to all at once."""
    actions = tuple(ACTIONS)
    if rng.random() < 0.3:
        actions = (*rng.sample(actions, 3), "write", "discard", "flush")
    if not allows_snapshots:
        actions = tuple(name for name in actions if "snapshot" not in name)
    return Schedule(
        reading=rng.choice((1, 10, 30, 100, 100, 300, 300, 1000)),
        writing=rng.choice((1, 3, 10, 30, 100, 300, 1000)),
        acts=rng.choice((1, 3, 10, 1000, 1000, 1000)),
        guests=rng.choice((1, 2, 4, WRITTEN, WRITTEN)),
        actions=actions,
        settle=rng.choice((0.0, 0.01, 0.01, 0.1, 0.3, 6.0)),
    )


# ---- the two of them -----------------------------------------------------------------------------


class Stretch:
    """How many words until the other goes on, from any source of randomness."""

    def __init__(self, rng: random.Random, plan: Schedule) -> None:
        self._rng, self._plan = rng, plan

    def reading(self) -> int:
        """At least one."""
        return 1 + int(self._rng.expovariate(1 / self._plan.reading))

    def writing(self) -> int:
        """At least one."""
        return 1 + int(self._rng.expovariate(1 / self._plan.writing))


@dataclass
class Interleaving:
    """A program that writes while it is read.

    ``looks``: how often the check opened the image; ``switches``: how often the program went on.
    """

    program: Program
    stretch: Stretch
    plan: Schedule
    rng: random.Random
    guests: Sequence[int]
    looks: int = 0
    switches: int = 0
    seconds: float = 0.0
    done: list[str] = field(default_factory=list)
    _left: int = 0
    _torn: tuple[Write, int] | None = None

    def look(self) -> Source:
        """The image as it is from now on."""
        self.looks += 1
        return Looked(self, len(self.program.file))

    def clock(self) -> Clock:
        """Time goes on with the words that are read, and when the check waits."""
        return Clock(self._now, self._pause)

    def _now(self) -> float:
        return self.seconds

    def _pause(self, seconds: float) -> None:
        self.seconds += seconds
        if self.rng.random() < 0.8:
            self.go_on(self.stretch.writing())

    def read(self, offset: int, buffer: memoryview) -> None:
        """Word by word, the program going on between."""
        file, view = self.program.file, buffer.cast("B")
        at = 0
        while at < len(view):
            if self._left <= 0:
                self.go_on(self.stretch.writing())
                self._left = self.stretch.reading()
                if self._torn is not None:
                    self._left = min(self._left, self.rng.randint(1, TORN_WORDS))
            end = min(len(view), at + self._left * WORD)
            part = file[offset + at : offset + end]
            view[at : at + len(part)] = part
            view[at + len(part) : end] = bytes(end - at - len(part))
            self._left -= -(-(end - at) // WORD)
            self.seconds += 1e-8 * (end - at)
            at = end

    def go_on(self, words: int) -> None:
        """The program writes so many words; what it has begun before it ends in any case."""
        self.switches += 1
        if self._torn is not None:
            write, at = self._torn
            self._torn = None
            self._copy(write, at, len(write.data))
        while words > 0:
            while not self.program.pending:
                if len(self.done) >= self.plan.acts:
                    return
                self.done.append(act(self.program, self.rng, self.guests, self.plan.actions))
            step = self.program.pending.popleft()
            if isinstance(step, Truncate):
                apply(self.program.file, step)
                words -= 1
                continue
            length = min(len(step.data), words * WORD)
            self._copy(step, 0, length)
            if length < len(step.data):
                self._torn = step, length
            words -= -(-length // WORD)

    def _copy(self, write: Write, low: int, high: int) -> None:
        apply(self.program.file, Write(write.offset + low, write.data[low:high]))


@dataclass(frozen=True, slots=True)
class Looked:
    """The image that is written meanwhile, as long as it was when it was opened."""

    behind: Interleaving
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.behind.read(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        end = min(offset + length, self.size)
        return [(offset, end)] if offset < end else []


# ---- one case ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One check of an image while it was written. ``wrong``: what it must not have said."""

    seed: int
    number: int
    kind: Kind
    damage: str | None
    plan: Schedule
    verdict: str
    looks: int
    switches: int
    wrong: str

    def __str__(self) -> str:
        return (
            f"seed {self.seed}, case {self.number}: {self.kind}, damage {self.damage}, {self.plan}:"
            f" {self.verdict}: {self.wrong}\n"
            f"  again: python -m tests.live --seed {self.seed} --only {self.number}"
        )


def run_case(seed: int, number: int) -> Case:
    """Always the same of the same numbers. Every fourth image is damaged in a quiet part."""
    rng = random.Random(f"interleaving {seed} {number}")
    kind = rng.choice(KINDS)
    image = build(kind)
    damage = damaged(image, rng) if number % 4 == 3 and not kind.lazy else None
    plan = schedule(rng, allows_snapshots=damage is None)
    report, both = run(kind, image, plan, rng)
    wrong = judge(report, damage, has_time=plan.settle > 0)
    verdict, looks, switches = report.verdict, both.looks, both.switches
    return Case(seed, number, kind, damage, plan, verdict, looks, switches, wrong)


def run(
    kind: Kind, image: Image, plan: Schedule, rng: random.Random, stretch: Stretch | None = None
) -> tuple[Report, Interleaving]:
    """Check an image while a program writes it; what that was like."""
    program = Program(bytes(image.data), rng, limit=rng.choice((1, 2, 4, 8)), lazy=kind.lazy)
    guests = rng.sample(range(WRITTEN), plan.guests)
    both = Interleaving(program, stretch or Stretch(rng, plan), plan, rng, guests)
    report = check_live(both.look, both.clock(), settle=plan.settle)
    return report, both


def judge(report: Report, damage: str | None, *, has_time: bool = True) -> str:
    """What is wrong with it; nothing where it is right.

    A check without time has one look, which may have led nowhere: it may say that it is unsettled.
    """
    if damage is None:
        found = {kind.name: number for kind, number in report.counts().items()}
        return "" if report.verdict in HEALTHY else f"a false alarm: {found}"
    if report.exit_code == 2 or (report.verdict == "unsettled" and not has_time):
        return ""
    return "damage that was not found"
