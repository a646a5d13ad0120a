"""An undo file's life, in any order: of repairs on repairs, that stand, or died, or whose undoing
died, or of which nothing was kept; then flipped, cut, grown, its parts swapped, another one in its
place; beside an image of another moment.

A hypothesis state machine whose model says at each moment what undo gives, and the undo after it,
and so on: the bytes of before, or nothing, and then not one byte of the image changes.
`--cases 6000`: 400 lives.
"""

import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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

from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair.interrupted import pending
from instarfs.repair.journal import (
    BODY_AT,
    DIGEST_LENGTH,
    HEADER,
    SLOTS_AT,
    State,
    StateWord,
    encode_front,
    encode_slot,
)
from instarfs.repair.outcome import RepairOutcome, Status
from instarfs.repair.run import Repairer
from planner.errors import RepairError
from planner.repair.plan import Plan, RepairTier
from planner.source import SECTOR
from tests.cached import cached_check, cached_propose, check_bytes, propose_bytes
from tests.devices import EIO, Fail, Failure, WatchedDevice, from_then_on, never, once
from tests.images.damage import DAMAGES
from tests.lives import SHAPES, damaged, lives, made, open_below

CASES_A_LIFE = 15

HEADER_END = HEADER.sizeof() + DIGEST_LENGTH
SLOT = struct.Struct("<QIIQQQqI")
"""Sequence, state, depth, where the record on top begins and ends, bytes trimmed, the image's time,
and the checksum of those: the one part that ever changes."""

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


@dataclass(frozen=True)
class Repair:
    """A repair of *before*, whose record was ``raw``, and began at ``top`` of an undo file."""

    before: bytes
    plan: Plan
    top: int
    raw: bytes

    def is_whole(self, raw: bytes, word: StateWord) -> bool:
        """Whether the record is all there, on top of an undo file that is now *raw*."""
        body = sum(len(stage.sectors) for stage in self.plan.stages) * (8 + 2 * SECTOR)
        parts = (slice(0, HEADER_END), slice(SECTOR, SECTOR + body))
        there = raw[self.top : self.top + len(self.raw)]
        is_same = len(there) == len(self.raw) and all(there[p] == self.raw[p] for p in parts)
        return is_same and (word.top, word.end) == (self.top, self.top + len(self.raw))

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


EMPTY = encode_front(StateWord())


def word_of(raw: bytes) -> StateWord | None:
    """What an undo file says of itself; None for one that is damaged."""
    sectors = [(raw[at : at + SECTOR], EMPTY[at : at + SECTOR]) for at in range(0, BODY_AT, SECTOR)]
    is_begun = all(not any(part) or part == whole for part, whole in sectors)
    if len(raw) <= BODY_AT and len(raw) % SECTOR == 0 and is_begun:
        return StateWord()
    if len(raw) < BODY_AT or raw[:16] != EMPTY[:16]:
        return None
    found = last_slot(raw)
    return found if found and found.end <= len(raw) else None


def last_slot(raw: bytes) -> StateWord | None:
    """The later of the slots that are whole."""
    found = []
    for at in range(SLOTS_AT, BODY_AT, SECTOR):
        sequence, state, *numbers, checksum = SLOT.unpack(raw[at : at + SLOT.size])
        if zlib.crc32(raw[at : at + SLOT.size - 4]) == checksum:
            found.append(StateWord(State(state), *[*numbers, sequence]))
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
    """``repairs``: by the header of their records. ``files``, ``images``: what was there at some
    moment, and may come back.
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

    @property
    def undo_path(self) -> Path:
        return self.path.with_name(self.path.name + SUFFIX)

    def undo_file(self) -> bytes | None:
        return self.undo_path.read_bytes() if self.undo_path.exists() else None

    def put(self, raw: bytes | None) -> None:
        if raw is None:
            self.undo_path.unlink(missing_ok=True)
        else:
            self.undo_path.write_bytes(raw)
            self.undo_path.chmod(0o600)

    def remember(self) -> None:
        self.images.append(self.read())
        raw = self.undo_file()
        if raw is not None:
            self.files.append(raw)

    def run(
        self,
        job: Callable[[Repairer], RepairOutcome],
        fail: Fail = never,
        *,
        keep_undo: bool = True,
    ) -> RepairOutcome:
        device = lambda fd, name: WatchedDevice(fd, name, fail)  # noqa: E731
        with Image.open(str(self.path)) as image:
            before = open_below(self.directory.name)
            outcome = job(
                Repairer(
                    image,
                    keep_undo=keep_undo,
                    check=cached_check,
                    propose=cached_propose,
                    device=device,
                )
            )
            assert open_below(self.directory.name) == before
        self.remember()
        return outcome

    # ---- the model ----

    def on_top(self, raw: bytes, word: StateWord) -> Repair | None:
        """The repair whose header is on top; None where it is damaged."""
        repair = self.repairs.get(raw[word.top : word.top + HEADER_END])
        return repair if repair and repair.top == word.top else None

    def undone(self) -> bytes | None:
        """What undo must give now; None where it must refuse."""
        raw = self.undo_file()
        word = word_of(raw) if raw is not None else None
        if raw is None or word is None or not word.depth:
            return None
        repair = self.on_top(raw, word)
        if repair is None or not repair.is_whole(raw, word):
            return None
        return repair.taken_back(self.read(), word.state)

    def state(self) -> State | None:
        """None where there is no undo file, or a damaged one."""
        raw = self.undo_file()
        word = word_of(raw) if raw is not None else None
        if raw is None or word is None:
            return None
        if not word.depth:
            return word.state
        repair = self.on_top(raw, word)
        return word.state if repair and repair.is_whole(raw, word) else None

    @invariant()
    def what_is_pending_is_what_was_interrupted_or_cannot_be_read(self) -> None:
        if not self.path.exists():
            return
        raw = self.undo_file()
        word = word_of(raw) if raw is not None else None
        is_readable = word is not None and (
            word.state is State.EMPTY or self.on_top(raw or b"", word) is not None
        )
        is_applying = word is not None and word.state is State.APPLYING
        with Image.open(str(self.path)) as image:
            expected = raw is not None and (not is_readable or is_applying)
            assert (pending(image) is not None) == expected

    @invariant()
    def undo_gives_what_the_model_says(self) -> None:
        """Undo as often as that goes, and have everything be as it was."""
        if not self.path.exists():
            return
        before, kept = self.read(), self.undo_file()
        is_more = True
        while is_more:
            now, back = self.read(), self.undone()
            with Image.open(str(self.path)) as image:
                outcome = Repairer(image, check=cached_check).undo()
            is_more = outcome.status is Status.UNDONE
            assert is_more == (back is not None), outcome.reason
            assert self.read() == (now if back is None else back)
            if is_more:
                assert (outcome.undoable > 0) == (self.undone() is not None)
        self.path.write_bytes(before)
        self.put(kept)

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
        if self.state() in (None, State.APPLYING):
            self.put(None)
        self.repair(tier, name, seed, fail)

    @rule(tier=tiers, name=names, seed=seeds, fail=fails)
    def repair(
        self, tier: RepairTier, name: str, seed: int, fail: Fail, *, is_new: bool = True
    ) -> None:
        is_interrupted, back = self.state() is State.APPLYING, self.undone()
        if not is_interrupted and is_new:
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
            self.know(start, tier)
            assert self.undone() == start
        else:
            assert now == start, outcome.reason

    @rule(tier=tiers, fail=fails)
    def repair_what_is_left(self, tier: RepairTier, fail: Fail) -> None:
        """On top of a repair, with nobody in between."""
        self.repair(tier, "", 0, fail, is_new=False)

    def know(self, start: bytes, tier: RepairTier) -> None:
        raw = self.undo_file()
        word = word_of(raw) if raw is not None else None
        assert raw is not None
        assert word is not None
        record = raw[word.top : word.end]
        plan = propose_bytes(start, tier).plan
        self.repairs[record[:HEADER_END]] = Repair(start, plan, word.top, record)

    @rule(tier=tiers, name=names, seed=seeds, fail=fails)
    def repair_without_undo(self, tier: RepairTier, name: str, seed: int, fail: Fail) -> None:
        """Then nothing is taken back, neither that nor what was before; or it died on the way."""
        is_interrupted, back = self.state() is State.APPLYING, self.undone()
        if not is_interrupted:
            self.path.write_bytes(damaged(self.read(), name, seed))
        before, state = self.read(), self.state()
        quote = plan_id((back if is_interrupted else None) or before, tier)
        outcome = self.run(lambda it: it.repair(tier, quote), fail, keep_undo=False)
        start = back if outcome.recovered else before
        assert start is not None
        if outcome.stands and self.read() != start:
            assert self.state() in (None, State.SEALED)
            assert self.undone() is None
        elif outcome.status is Status.INTERRUPTED and not (
            is_interrupted and not outcome.recovered
        ):
            self.know(start, tier)
            assert self.undone() == start
        elif outcome.status is not Status.INTERRUPTED:
            assert self.read() == start, outcome.reason
            assert outcome.recovered or self.state() in (state, None)

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

    @precondition(lambda self: self.state() in (State.APPLYING, State.APPLIED))
    @rule(
        state=st.sampled_from((State.APPLYING, State.APPLIED)),
        arrived=st.integers(0, SLOT.size),
    )
    def write_half_a_word(self, state: State, arrived: int) -> None:
        """As a crash would: what was durable before still holds, until the last byte is there."""
        raw, before = self.undo_file(), self.undone()
        assert raw is not None
        last = last_slot(raw)
        assert last is not None
        sequence = last.sequence + 1
        at = SLOTS_AT + sequence % 2 * SECTOR
        slot = encode_slot(replace(last, state=state, sequence=sequence))
        self.put(raw[:at] + slot[:arrived] + raw[at + arrived :])
        if arrived < SLOT.size and last_slot(raw[:at] + bytes(SECTOR) + raw[at + SECTOR :]) == last:
            assert self.undone() == before

    @precondition(lambda self: self.files)
    @rule(number=seeds)
    def bring_an_undo_file_of_before_back(self, number: int) -> None:
        self.put(self.files[number % len(self.files)])

    @rule()
    def delete_it(self) -> None:
        self.put(None)

    @rule(kind=st.sampled_from(("directory", "FIFO", "link", "open to all")))
    def put_something_else_in_its_place(self, kind: str) -> None:
        """Undo refuses; and goes on when it is gone again."""
        path, kept, before = self.undo_path, self.undo_file(), self.read()
        path.unlink(missing_ok=True)
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
            assert pending(image) is not None
            descriptors = open_below(self.directory.name)
            outcome = Repairer(image, check=cached_check).undo()
            assert open_below(self.directory.name) == descriptors
        assert outcome.status is Status.REFUSED
        assert self.read() == before
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()

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
        before, is_interrupted = self.read(), self.state() is State.APPLYING
        back = self.undone()
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
