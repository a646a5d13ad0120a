"""An undo file's life, in any order: of a repair that stands, or died, or whose undoing died; then
flipped, cut, grown, its parts swapped, another one in its place; beside an image of another moment.

A hypothesis state machine whose model says at each moment what undo gives: the bytes of before, or
nothing, and then not one byte of the image changes. `--cases 6000`: 400 lives.
"""

import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from examples.make_image import DAMAGES
from instarfs.image import Image
from instarfs.interrupted import pending
from instarfs.journal import BODY_AT, DIGEST_LENGTH, HEADER, SLOTS_AT, State, StateWord, encode_slot
from instarfs.names import NEW, OLD, SUFFIX
from instarfs.outcome import RepairOutcome, Status
from instarfs.repairer import Repairer
from planner.errors import RepairError
from planner.plan import Plan, RepairTier
from planner.source import SECTOR
from tests.cached import cached_check, cached_propose, check_bytes, propose_bytes
from tests.devices import EIO, Fail, Failure, WatchedDevice, from_then_on, never, once
from tests.lives import SHAPES, damaged, lives, made, open_below

CASES_A_LIFE = 15

HEADER_END = HEADER.sizeof() + DIGEST_LENGTH
SLOT = struct.Struct("<QIQI")
"""Sequence, state, bytes trimmed, and the checksum of those: the one part that ever changes."""

A_SECTOR = Failure(EIO.code, kept=SECTOR)
"""A write of which one sector arrives: a disk tears none."""

fails = st.one_of(
    st.just(never),
    st.builds(once, st.integers(0, 12), st.sampled_from((EIO, A_SECTOR))),
    st.builds(from_then_on, st.integers(1, 12), st.sampled_from((EIO, A_SECTOR))),
)
tiers = st.sampled_from(RepairTier)
MENDED = ("leaked-clusters", "low-refcount", "missing-refcount", "wrong-copied", "lost-refblock")
names = st.sampled_from(MENDED) | st.sampled_from(sorted(DAMAGES))
seeds = st.integers(0, 1 << 16)
places = st.integers(0, BODY_AT) | st.integers(0, 1 << 16)
suffixes = st.sampled_from((SUFFIX, SUFFIX, OLD, NEW))


@dataclass(frozen=True)
class Repair:
    """A repair of *before*, of which there was an undo file."""

    before: bytes
    plan: Plan

    def taken_back(self, content: bytes, state: State) -> bytes | None:
        """What undo must make of an image with *content*; None where it must refuse."""
        plan = self.plan
        sizes = {plan.size_after} | ({plan.size_before} if state is State.APPLYING else set())
        if len(content) not in sizes or not self._knows(content, state):
            return None
        back = bytearray(content[: plan.size_before].ljust(plan.size_before, b"\0"))
        for stage in plan.stages:
            for number in stage.sectors.tolist():
                part = slice(number * SECTOR, (number + 1) * SECTOR)
                back[part] = self.before[part]
        undone = bytes(back)
        is_it = undone[:SECTOR] == self.before[:SECTOR]
        is_it &= check_bytes(undone).counters == check_bytes(self.before).counters
        return undone if is_it else None

    def _knows(self, content: bytes, state: State) -> bool:
        """Whether every sector of the plan is as the repair, or a crash during it, left it."""
        left: dict[int, list[bytes]] = {}
        for stage in self.plan.stages:
            for number, row in zip(stage.sectors.tolist(), stage.after, strict=True):
                start = self.before[number * SECTOR :][:SECTOR].ljust(SECTOR, b"\0")
                left.setdefault(number, [start]).append(row.tobytes())
        for number, rows in left.items():
            room = max(0, len(content) - number * SECTOR)
            known = [row[:room] for row in (rows if state is State.APPLYING else rows[-1:])]
            if content[number * SECTOR :][:SECTOR] not in known:
                return False
        return True


def constant(raw: bytes) -> bytes:
    """The parts of an undo file that never change, and that are looked at."""
    return raw[:HEADER_END] + raw[BODY_AT:]


def last_slot(raw: bytes) -> StateWord | None:
    """The later of the slots that are whole."""
    found = []
    for at in range(SLOTS_AT, BODY_AT, SECTOR):
        sequence, state, trimmed, checksum = SLOT.unpack(raw[at : at + SLOT.size])
        if zlib.crc32(raw[at : at + SLOT.size - 4]) == checksum:
            found.append(StateWord(State(state), trimmed, sequence))
    return max(found, key=lambda slot: slot.sequence) if found else None


Change = Callable[[bytearray, int, int], None]
"""Changes bytes of an undo file, at one or two places."""


def flip(raw: bytearray, at: int, bit: int) -> None:
    raw[at % len(raw)] ^= 1 << bit % 8


def cut(raw: bytearray, at: int, _other: int) -> None:
    del raw[at % len(raw) :]


def append(raw: bytearray, length: int, value: int) -> None:
    raw += bytes([value % 256]) * (length % SECTOR + 1)


def insert(raw: bytearray, one: int, other: int) -> None:
    """Repeat a sector elsewhere."""
    part, at = sector(raw, one), sector(raw, other).start
    raw[at:at] = raw[part]


def overwrite(raw: bytearray, one: int, other: int) -> None:
    """Repeat a sector over another one."""
    raw[sector(raw, other)] = raw[sector(raw, one)]


def swap(raw: bytearray, one: int, other: int) -> None:
    parts = sector(raw, one), sector(raw, other)
    if parts[0] != parts[1]:
        raw[parts[0]], raw[parts[1]] = raw[parts[1]], raw[parts[0]]


def sector(raw: bytearray, at: int) -> slice:
    """The whole sector around a place, but for the last one, which may be a part of one."""
    number = at % len(raw) // SECTOR
    return slice(number * SECTOR, (number + 1) * SECTOR)


CHANGES: tuple[Change, ...] = (flip, flip, cut, append, insert, overwrite, swap)


class UndoFileLife(RuleBasedStateMachine):
    """``repairs``: by the part of their undo files that never changes. ``files``, ``images``: what
    was there at some moment, and may come back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "disk.qcow2"
        self.repairs: dict[bytes, Repair] = {}
        self.files: list[bytes] = []
        self.images: list[bytes] = []

    def teardown(self) -> None:
        self.directory.cleanup()

    # ---- the files ----

    def read(self) -> bytes:
        return self.path.read_bytes()

    def beside(self, suffix: str = SUFFIX) -> Path:
        return self.path.with_name(self.path.name + suffix)

    def undo_file(self, suffix: str = SUFFIX) -> bytes | None:
        path = self.beside(suffix)
        return path.read_bytes() if path.exists() else None

    def put(self, raw: bytes, suffix: str = SUFFIX) -> None:
        self.beside(suffix).write_bytes(raw)
        self.beside(suffix).chmod(0o600)

    def remember(self) -> None:
        self.images.append(self.read())
        raw = self.undo_file()
        if raw is not None:
            self.files.append(raw)

    def run(self, job: Callable[[Repairer], RepairOutcome], fail: Fail = never) -> RepairOutcome:
        device = lambda fd, name: WatchedDevice(fd, name, fail)  # noqa: E731
        with Image.open(str(self.path)) as image:
            before = open_below(self.directory.name)
            outcome = job(
                Repairer(image, check=cached_check, propose=cached_propose, device=device)
            )
            assert open_below(self.directory.name) == before
        self.remember()
        return outcome

    # ---- the model ----

    def in_force(self) -> bytes | None:
        """The undo file that counts: the one kept aside where the other has served, or is gone."""
        current, old = self.undo_file(), self.undo_file(OLD)
        if old is not None and (current is None or self.state(current) is State.UNDONE):
            return old
        return current

    def state(self, raw: bytes) -> State | None:
        """None for one that is damaged."""
        slot = last_slot(raw) if constant(raw) in self.repairs else None
        return slot.state if slot else None

    def undone(self) -> bytes | None:
        """What undo must give now; None where it must refuse."""
        raw = self.in_force()
        state = self.state(raw) if raw is not None else None
        if raw is None or state in (None, State.UNDONE):
            return None
        return self.repairs[constant(raw)].taken_back(self.read(), state)

    def is_interrupted(self) -> bool:
        raw = self.in_force()
        return raw is not None and self.state(raw) is State.APPLYING

    @invariant()
    def what_is_pending_is_what_was_interrupted_or_cannot_be_read(self) -> None:
        if not self.path.exists():
            return
        raw = self.undo_file()
        is_readable = raw is not None and raw[:HEADER_END] in {c[:HEADER_END] for c in self.repairs}
        slot = last_slot(raw) if raw is not None and is_readable and len(raw) >= BODY_AT else None
        expected = raw is not None and (slot is None or slot.state is State.APPLYING)
        with Image.open(str(self.path)) as image:
            assert (pending(image) is not None) == expected

    @invariant()
    def undo_gives_what_the_model_says(self) -> None:
        """Undo, and have everything be as it was."""
        if not self.path.exists():
            return
        before, back = self.read(), self.undone()
        kept = {suffix: self.undo_file(suffix) for suffix in (SUFFIX, OLD)}
        with Image.open(str(self.path)) as image:
            outcome = Repairer(image, check=cached_check).undo()
        assert (outcome.status is Status.UNDONE) == (back is not None), outcome.reason
        assert self.read() == (before if back is None else back)
        self.path.write_bytes(before)
        for suffix, raw in kept.items():
            self.beside(suffix).unlink(missing_ok=True)
            if raw is not None:
                self.put(raw, suffix)

    # ---- what happens to the image ----

    @initialize(shape=st.sampled_from(SHAPES), name=names, seed=seeds, tier=tiers)
    def begin(self, shape: Mapping[str, int], name: str, seed: int, tier: RepairTier) -> None:
        self.path.write_bytes(made(shape))
        self.images.append(self.read())
        self.repair(tier, name, seed, never)

    @rule(tier=tiers, name=names, seed=seeds, fail=fails)
    def repair_another(self, tier: RepairTier, name: str, seed: int, fail: Fail) -> None:
        """A healthy image in the place of this one, with nothing in the way."""
        self.path.write_bytes(self.images[0])
        if self.state(self.undo_file() or b"") in (None, State.APPLYING):
            self.beside().unlink(missing_ok=True)
        self.repair(tier, name, seed, fail)

    @rule(tier=tiers, name=names, seed=seeds, fail=fails)
    def repair(self, tier: RepairTier, name: str, seed: int, fail: Fail) -> None:
        is_interrupted, back = self.is_interrupted(), self.undone()
        if not is_interrupted:
            self.path.write_bytes(damaged(self.read(), name, seed))  # or there is nothing to do
        before = self.read()
        quote = plan_id((back if is_interrupted else None) or before, tier)
        outcome = self.run(lambda it: it.repair(tier, quote), fail)
        now = self.read()
        assert not outcome.recovered or is_interrupted
        start = back if outcome.recovered else before
        assert start is not None, "taken back, and nobody knows what"
        if outcome.status is Status.INTERRUPTED and is_interrupted and not outcome.recovered:
            assert self.undone() == back
        elif (outcome.stands and now != start) or outcome.status is Status.INTERRUPTED:
            raw = self.undo_file()
            assert raw is not None
            self.repairs[constant(raw)] = Repair(start, propose_bytes(start, tier).plan)
            assert self.undone() == start
        else:
            assert now == start, outcome.reason

    @rule(number=seeds)
    def bring_an_image_of_before_back(self, number: int) -> None:
        self.path.write_bytes(self.images[number % len(self.images)])

    @rule(at=places, bit=st.integers(0, 7))
    def flip_a_bit_of_the_image(self, at: int, bit: int) -> None:
        content = bytearray(self.read())
        content[at % len(content)] ^= 1 << bit
        self.path.write_bytes(content)

    @rule(sectors=st.integers(-20, 20))
    def cut_the_image_or_grow_it(self, sectors: int) -> None:
        os.truncate(self.path, max(SECTOR, self.path.stat().st_size + sectors * SECTOR))

    # ---- what happens to the undo file ----

    @precondition(lambda self: self.undo_file())
    @rule(
        changes=st.lists(
            st.tuples(st.sampled_from(CHANGES), places, places), min_size=1, max_size=3
        ),
        is_kept=st.booleans(),
    )
    def change_the_undo_file(self, changes: list[tuple[Change, int, int]], is_kept: bool) -> None:
        before = self.undo_file()
        assert before
        raw = bytearray(before)
        for change, one, other in changes:
            change(raw or bytearray(1), one, other)
        self.put(bytes(raw))
        self.undo_gives_what_the_model_says()
        if not is_kept:
            self.put(before)

    @precondition(lambda self: self.undo_file())
    @rule(at=places, number=seeds)
    def end_as_another_one(self, at: int, number: int) -> None:
        raw, other = self.undo_file() or b"", self.files[number % len(self.files)]
        self.put(raw[: at % len(raw)] + other[at % len(raw) :])

    @precondition(lambda self: self.state(self.undo_file() or b""))
    @rule(state=st.sampled_from(State), arrived=st.integers(0, SLOT.size))
    def write_half_a_state(self, state: State, arrived: int) -> None:
        """As a crash would: what was durable before still holds, until the last byte is there."""
        raw, before = self.undo_file(), self.undone()
        assert raw is not None
        last = last_slot(raw)
        assert last is not None
        sequence = last.sequence + 1
        at = SLOTS_AT + sequence % 2 * SECTOR
        slot = encode_slot(StateWord(state, last.trimmed, sequence))
        self.put(raw[:at] + slot[:arrived] + raw[at + arrived :])
        if arrived < SLOT.size and last_slot(raw[:at] + bytes(SECTOR) + raw[at + SECTOR :]) == last:
            assert self.undone() == before

    @precondition(lambda self: self.files)
    @rule(number=seeds, suffix=suffixes)
    def bring_an_undo_file_of_before_back(self, number: int, suffix: str) -> None:
        self.put(self.files[number % len(self.files)], suffix)

    @rule(suffix=suffixes)
    def delete_it(self, suffix: str) -> None:
        self.beside(suffix).unlink(missing_ok=True)

    @rule(suffix=suffixes, kind=st.sampled_from(("directory", "FIFO", "link", "open to all")))
    def put_something_else_in_its_place(self, suffix: str, kind: str) -> None:
        """Undo refuses, or gives what the other one gives; and goes on when it is gone again."""
        path, kept, before = self.beside(suffix), self.undo_file(suffix), self.read()
        others = [self.undone()]
        path.unlink(missing_ok=True)
        others.append(self.undone())
        match kind:
            case "directory":
                path.mkdir()
                (path / "file").touch()
            case "FIFO":
                os.mkfifo(path)
            case "link":
                path.symlink_to("elsewhere")
                path.with_name("elsewhere").write_bytes(kept or b"")
            case _:
                path.write_bytes(kept or b"")
                path.chmod(0o666)
        with Image.open(str(self.path)) as image:
            pending(image)
            descriptors = open_below(self.directory.name)
            outcome = Repairer(image, check=cached_check).undo()
            assert open_below(self.directory.name) == descriptors
        assert self.read() == before or (outcome.status is Status.UNDONE and self.read() in others)
        for left in (self.beside(each) for each in (SUFFIX, OLD, NEW)):
            if left.is_dir():
                shutil.rmtree(left)
            elif (
                left.is_symlink() or left.is_fifo() or (left.exists() and left.stat().st_mode & 0o2)
            ):
                left.unlink()

    # ---- using it ----

    @rule(fail=fails | st.just(never))
    def undo(self, fail: Fail) -> None:
        before, back = self.read(), self.undone()
        outcome = self.run(Repairer.undo, fail)
        match outcome.status:
            case Status.UNDONE:
                assert self.read() == back
            case Status.INTERRUPTED | Status.ROLLED_BACK:
                assert back is not None
                assert self.undone() == back
            case _:
                assert outcome.error is not None
                assert back is None or fail is not never, outcome.reason
        assert outcome.status in (Status.UNDONE, Status.INTERRUPTED) or self.read() == before

    @precondition(lambda self: self.undone() is not None)
    @rule()
    def trim(self) -> None:
        before, is_interrupted, back = self.read(), self.is_interrupted(), self.undone()
        outcome = self.run(Repairer.trim)
        assert not is_interrupted or outcome.error is not None
        assert outcome.status is Status.TRIMMED or self.read() == before
        assert (self.undone() is None) == (back is None)


def plan_id(content: bytes, tier: RepairTier) -> str:
    """The id of that tier's plan, or nothing where it refuses."""
    try:
        return propose_bytes(content, tier).plan.id
    except RepairError:
        return ""


def test_an_undo_files_life_in_any_order(cases: int) -> None:
    run_state_machine_as_test(UndoFileLife, settings=lives(cases // CASES_A_LIFE))
