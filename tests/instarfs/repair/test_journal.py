"""instarfs.repair.journal and instarfs.repair.undo_place: the undo file's bytes, its states, and
its names.
"""

import errno
import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instarfs.errors import (
    NO_SPACE,
    UndoFileAmbiguous,
    UndoFileDamaged,
    UndoFileFailed,
    UndoFileForbidden,
    UndoFileForeign,
    UndoFileFull,
    UndoFileImpossible,
    UndoFileNoSpace,
)
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair import journal as journal_module
from instarfs.repair.journal import (
    BODY_AT,
    HEADER,
    NEXT,
    SLOTS_AT,
    Journal,
    Record,
    State,
    StateWord,
    decode_summary,
    digest_of,
    encode_front,
    encode_slot,
    read_summary,
)
from instarfs.repair.undo_place import Identity, UndoPlace
from planner.check.report import CheckCounters
from planner.repair.draft import Draft
from planner.repair.plan import Plan, RepairTier, StageKind
from planner.source import SECTOR, Bytes
from tests.undo_files import decode, encoded, stack_of

CONTENT = random.Random(2).randbytes(20 * SECTOR)


HERE = Identity(8, 4711)


def reader_of(raw: bytes) -> Callable[[int, int], bytes]:
    return lambda at, length: raw[at : at + length]


def make_plan(data: bytes = b"changed", size: int = 24 * SECTOR) -> Plan:
    draft = Draft(Bytes(CONTENT))
    draft.size = size
    draft.write(StageKind.GUARD, 72, data)
    draft.write(StageKind.PREPARE, 21 * SECTOR, data * 100)
    draft.write(StageKind.CORRECT, 3 * SECTOR, data)
    return draft.plan(RepairTier.ALL)


def make_record(plan: Plan | None = None) -> Record:
    head = digest_of(CONTENT[:SECTOR])
    return Record(plan or make_plan(), head, CheckCounters(leaks=3, total_clusters=9), HERE)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def place(image: Path) -> Iterator[UndoPlace]:
    with Image.open(str(image)) as opened, UndoPlace.beside(opened) as place:
        yield place


def push(place: UndoPlace, record: Record, state: State = State.APPLIED) -> None:
    """As a session does: one more repair that stands, or that died."""
    journal = Journal.open(place) or Journal.make(place)
    journal.begin(record)
    if state is State.APPLIED:
        journal.advance(State.APPLIED, 77)
    journal.close()


def names(image: Path) -> set[str]:
    return {path.name for path in image.parent.iterdir()} - {image.name}


def state_at(place: UndoPlace) -> tuple[State, str] | None:
    """The state and the plan on top as somebody who comes later finds them."""
    found = Journal.open(place)
    if found is None:
        return None
    try:
        return found.status.state, found.record.plan.id if found.record else ""
    finally:
        found.close()


# ---- bytes ----


def test_what_is_written_is_what_is_read() -> None:
    record, other = make_record(), make_record(make_plan(b"other"))
    for records in ((record,), (other, record)):
        raw = encoded(*records, state=State.APPLIED)
        again, read = decode(raw)
        assert read == stack_of(*records, state=State.APPLIED)[-1]
        assert again == record
        assert [stage.kind for stage in record.plan.stages] == [
            stage.kind for stage in (again.plan.stages if again else ())
        ]
        summary = decode_summary(reader_of(raw), len(raw), "it")
        assert summary
        assert (summary[0].plan_id, summary[1]) == (record.plan.id, HERE)
    assert decode(encode_front(StateWord())) == (None, StateWord())


counts = st.integers(0, (1 << 64) - 1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(StageKind)),
            st.integers(0, 30 * SECTOR),
            st.binary(min_size=1, max_size=600),
        ),
        max_size=6,
    ),
    st.sampled_from(list(RepairTier)),
    st.lists(counts, min_size=8, max_size=8),
    st.sampled_from((State.APPLYING, State.APPLIED)),
)
def test_any_record_comes_back(
    writes: list[tuple[StageKind, int, bytes]],
    tier: RepairTier,
    counters: list[int],
    state: State,
) -> None:
    draft = Draft(Bytes(CONTENT))
    draft.size = 40 * SECTOR
    for kind, offset, data in writes:
        draft.write(kind, offset, data)
    record = Record(draft.plan(tier), bytes(32), CheckCounters(*counters), Identity(1, 2))
    assert decode(encoded(record, state=state))[0] == record


def test_a_header_fits_its_sector_and_so_does_a_slot() -> None:
    assert HEADER.sizeof() + 32 <= SECTOR
    assert len(encode_slot(StateWord())) == SECTOR
    assert len(encode_front(StateWord())) == BODY_AT
    assert len(fields(CheckCounters)) == 8


def damaged(raw: bytes) -> str:
    with pytest.raises(UndoFileDamaged) as caught:
        decode(raw, "/where/it.is")
    message = str(caught.value)
    assert message.startswith("/where/it.is: ")
    assert message.endswith("move it away if it is of no use to you")
    assert "\n" not in message
    assert caught.value.errno == errno.EUCLEAN
    return message


@given(st.binary(min_size=1, max_size=4000))
def test_any_bytes_are_refused_in_a_sentence(raw: bytes) -> None:
    damaged(raw)


@given(st.binary(max_size=4000))
def test_any_bytes_behind_the_magic_are_refused_in_a_sentence(raw: bytes) -> None:
    damaged(journal_module.MAGIC + journal_module.VERSION + raw)


def test_wherever_it_is_cut_off_it_is_refused() -> None:
    raw = encoded(make_record(), make_record(make_plan(b"other")))
    for length in [*range(1, BODY_AT + 40), *range(BODY_AT, len(raw), 97), len(raw) - 1]:
        if length == SECTOR:  # as a crash leaves one in which there never was a record
            assert decode(raw[:length]) == (None, StateWord())
        else:
            damaged(raw[:length])
    assert "cut off" in damaged(raw[:-1])
    assert "cut off" in damaged(raw[:100])


def test_what_lies_behind_the_last_record_means_nothing() -> None:
    raw = encoded(make_record())
    assert decode(raw + b"x" * 999) == decode(raw)


def test_what_a_crash_leaves_of_one_without_a_record_is_empty() -> None:
    whole = encode_front(StateWord())
    for kept in itertools.product((False, True), repeat=3):
        sectors = [whole[at * SECTOR :][:SECTOR] if kept[at] else bytes(SECTOR) for at in range(3)]
        for length in range(0, BODY_AT + 1, SECTOR):
            assert decode(b"".join(sectors)[:length]) == (None, StateWord())
    damaged(bytes(BODY_AT + 1))  # such a one had a record


def test_wherever_a_bit_flips_it_is_noticed_or_means_nothing() -> None:
    """In a slot of the word it means nothing, for there are two; nor does it in padding."""
    record = make_record()
    raw, rng = bytearray(encoded(record)), random.Random(3)
    body = sum(len(stage.sectors) for stage in record.plan.stages) * (8 + 2 * SECTOR)
    header = range(BODY_AT, BODY_AT + HEADER.sizeof() + 32)
    read = range(BODY_AT + SECTOR, BODY_AT + SECTOR + body)
    places = [*range(BODY_AT + SECTOR), *(rng.randrange(BODY_AT, len(raw)) for _ in range(300))]
    for at in places:
        bit = 1 << rng.randrange(8)
        raw[at] ^= bit
        if at < 16 or at in header or at in read:
            damaged(bytes(raw))
        else:
            assert decode(bytes(raw))[0] == record
        raw[at] ^= bit


def test_another_version_is_told_from_damage() -> None:
    magic = journal_module.MAGIC
    raw = encoded(make_record()).replace(magic + journal_module.VERSION, magic + b"\x02\0")
    assert "another version of instarfs" in damaged(raw)
    assert "no undo file" in damaged(b"#!/bin/sh\n" * 100)


def forged(**changes: object) -> bytes:
    """An undo file whose checksums are right and whose header is not."""
    raw = encoded(make_record())
    header = dict(HEADER.parse(raw[BODY_AT:])) | changes
    built: bytes = HEADER.build(header)
    sealed = (built + digest_of(built)).ljust(SECTOR, b"\0")
    return raw[:BODY_AT] + sealed + raw[BODY_AT + SECTOR :]


BELOW = {
    "sequence": 0,
    "state": State.APPLIED,
    "depth": 1,
    "top": BODY_AT,
    "end": BODY_AT,
    "trimmed": 0,
    "mtime_ns": 0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"tier": b"none".ljust(16, b"\0")},
        {"tier": b"\xff" * 16},
        {"plan_id": b"\xff" * 12},
        {"plan_id": b"\x1b]0;PWN\x07\nXXX"},
        {"plan_id": b"0123456789AB"},
        {"plan_id": b"0123456789ab"},
        {"size_before": 0},
        {"size_after": (1 << 64) - 1},
        {"sectors": [1, 1, 0, 0, 1, 0]},
        {"sectors": [(1 << 64) - 1, 1, 0, 0, 1, 0]},
        {"body_digest": bytes(32)},
        {"below": BELOW},
        {"below": BELOW | {"state": State.APPLYING, "end": BODY_AT + SECTOR}},
        {"below": BELOW | {"state": 9}},
    ],
)
def test_a_header_that_contradicts_the_rest_is_refused(changes: dict[str, object]) -> None:
    damaged(forged(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"state": State.EMPTY},
        {"depth": 0},
        {"state": State.SEALED},
        {"top": 0},
        {"top": BODY_AT + 1},
        {"top": 1 << 62},
        {"end": BODY_AT},
        {"end": 1 << 62},
        {"end": BODY_AT + 2 * SECTOR},
    ],
)
def test_a_word_that_nothing_ever_writes_is_refused(changes: dict[str, Any]) -> None:
    raw = encoded(make_record())
    slot = encode_slot(replace(stack_of(make_record())[-1], **changes))
    damaged(raw[:SLOTS_AT] + slot * 2 + raw[BODY_AT:])


@pytest.mark.parametrize("sectors", [[5, 5], [6, 5], [-1, 5], [5, 24], [5, 1 << 60]])
def test_sectors_that_no_plan_has_are_refused(sectors: list[int]) -> None:
    draft = Draft(Bytes(CONTENT))
    draft.write(StageKind.CORRECT, 5 * SECTOR, b"x" * 2 * SECTOR)
    plan = draft.plan(RepairTier.LEAKS)
    stage = replace(plan.stages[0], sectors=plan.stages[0].sectors * 0 + sectors)
    assert "contradicts itself" in damaged(encoded(make_record(replace(plan, stages=(stage,)))))


# ---- the state ----


def test_a_torn_word_leaves_the_one_before() -> None:
    raw, first = encoded(make_record()), stack_of(make_record())[-1]
    applied = replace(first, state=State.APPLIED, sequence=1)
    second = encode_slot(applied)
    for length in range(0, 60, 3):
        torn = second[:length] + raw[SLOTS_AT + SECTOR + length : SLOTS_AT + 2 * SECTOR]
        mixed = raw[: SLOTS_AT + SECTOR] + torn + raw[BODY_AT:]
        assert decode(mixed)[1] == (applied if torn == second else first)
    whole = raw[: SLOTS_AT + SECTOR] + second + raw[BODY_AT:]
    assert decode(whole)[1] == applied


def test_without_any_word_it_is_refused() -> None:
    raw = encoded(make_record())
    assert "how far" in damaged(raw[:SLOTS_AT] + bytes(2 * SECTOR) + raw[BODY_AT:])


def test_a_word_is_there_twice_so_that_one_may_go_bad(image: Path, place: UndoPlace) -> None:
    push(place, make_record())
    push(place, make_record(make_plan(b"other")), State.APPLYING)
    file = image.with_name(image.name + SUFFIX)
    whole = file.read_bytes()
    for at in (SLOTS_AT, SLOTS_AT + SECTOR):
        file.write_bytes(whole[:at] + bytes(SECTOR) + whole[at + SECTOR :])
        assert state_at(place) == (State.APPLYING, make_plan(b"other").id)


def test_every_state_says_what_follows_it() -> None:
    assert set(NEXT) == set(State)
    assert {after for follows in NEXT.values() for after in follows} == set(State)


def test_states_are_durable_one_after_the_other(image: Path, place: UndoPlace) -> None:
    journal = Journal.make(place)
    journal.begin(make_record())
    plan_id = journal.plan.id
    assert state_at(place) == (State.APPLYING, plan_id)
    for state in (State.APPLIED, State.APPLYING, State.APPLIED, State.APPLYING):
        journal.advance(state)
        assert state_at(place) == (state, plan_id)
        summary = read_summary(place)
        assert summary is not None
        assert (summary.status.state, summary.plan_id) == (state, plan_id)
    journal.drop()
    with pytest.raises(ValueError, match="EMPTY is not followed by APPLIED"):
        journal.advance(State.APPLIED)
    journal.close()
    assert names(image) == set()


def test_trimmed_bytes_add_up_and_stay(place: UndoPlace) -> None:
    push(place, make_record())
    push(place, make_record(make_plan(b"other")))
    journal = Journal.open(place)
    assert journal is not None
    journal.note_trim(1000)
    journal.note_trim(24)
    journal.close()
    again = Journal.open(place)
    assert again is not None
    assert (again.status.state, again.status.trimmed) == (State.APPLIED, 1024)
    again.advance(State.APPLYING)
    again.drop()
    assert again.status.trimmed == 1024, "those are gone for the repair before, too"
    again.note_trim(-1000)
    again.close()
    last = Journal.open(place)
    assert last is not None
    assert last.status.trimmed == 24
    last.close()


def test_a_state_that_cannot_be_written_is_an_error_and_the_old_one_holds(
    place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.make(place)
    journal.begin(make_record())
    for code, kind in ((errno.EIO, UndoFileFailed), (errno.ENOSPC, UndoFileFull)):

        def fail(fd: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(kind, match=os.strerror(code)) as caught:
                journal.advance(State.APPLIED)
        assert state_at(place) == (State.APPLYING, journal.plan.id)
        assert caught.value.errno == code
        assert ("make space" in str(caught.value)) == (code == errno.ENOSPC)
        assert journal.status.state is State.APPLYING
    journal.advance(State.APPLIED)
    assert state_at(place) == (State.APPLIED, journal.plan.id)
    journal.close()


# ---- the file ----


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_it_lies_beside_the_image_and_belongs_to_its_owner_alone(
    image: Path, place: UndoPlace, umask: int
) -> None:
    before = os.umask(umask)
    try:
        push(place, make_record(), State.APPLYING)
    finally:
        os.umask(before)
    assert names(image) == {"disk.qcow2" + SUFFIX}
    file = image.with_name("disk.qcow2" + SUFFIX)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert place.file == str(file)
    assert decode(file.read_bytes())[0] == make_record()


def test_it_lies_where_somebody_says(image: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    chosen = tmp_path / "elsewhere" / "any name"
    with Image.open(str(image), str(chosen)) as opened, opened.reopen() as again:
        for each in (opened, again):
            place = UndoPlace.of(each)
            assert place
            with place:
                assert place.file == str(chosen)
                push(place, make_record())
    assert names(image) == {"elsewhere"}
    assert decode(chosen.read_bytes())[1].depth == 2


def test_nor_is_a_place_taken_that_is_not_there(image: Path, tmp_path: Path) -> None:
    with pytest.raises(UndoFileImpossible, match="No such file or directory"):
        Image.open(str(image), str(tmp_path / "nowhere" / "undo"))


def test_a_link_leads_beside_the_file_that_it_means(image: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "first").symlink_to("deep/second")
    (elsewhere / "deep" / "second").symlink_to(image)
    with Image.open(str(elsewhere / "first")) as opened, UndoPlace.beside(opened) as place:
        push(place, make_record())
    assert names(image) == {"disk.qcow2" + SUFFIX, "elsewhere"}


def test_a_link_is_followed_once_wherever_it_leads_by_now(image: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image.name)
    with Image.open(str(link)) as opened:
        link.unlink()
        link.symlink_to("gone/away")
        with UndoPlace.beside(opened) as place:
            push(place, make_record())
    assert names(image) == {"disk.qcow2" + SUFFIX, "link"}


def test_records_lie_on_each_other_and_go_one_by_one(image: Path, place: UndoPlace) -> None:
    records = [make_record(make_plan(b"%d" % number)) for number in range(5)]
    sizes = []
    for number, record in enumerate(records, 1):
        sizes.append(image.with_name(image.name + SUFFIX).stat().st_size if number > 1 else 0)
        push(place, record)
        summary = read_summary(place)
        assert summary
        assert (summary.status.depth, summary.plan_id) == (number, record.plan.id)
    journal = Journal.open(place)
    assert journal is not None
    assert [record for record, _ in journal.walk()] == records[::-1]
    for record, size in zip(records[::-1], sizes[::-1], strict=True):
        assert journal.top == record
        journal.advance(State.APPLYING)
        journal.drop()
        journal.load_next()
        if size:
            assert image.with_name(image.name + SUFFIX).stat().st_size == size
    journal.close()
    assert names(image) == set()
    assert state_at(place) is None
    assert read_summary(place) is None


def test_a_repair_that_does_not_stand_leaves_those_before_it(image: Path, place: UndoPlace) -> None:
    push(place, make_record())
    before = image.with_name(image.name + SUFFIX).stat().st_size
    push(place, make_record(make_plan(b"other")), State.APPLYING)
    journal = Journal.open(place)
    assert journal is not None
    journal.drop()
    journal.close()
    assert state_at(place) == (State.APPLIED, make_plan().id)
    assert image.with_name(image.name + SUFFIX).stat().st_size == before


def test_a_repair_without_a_record_seals_those_before_it(image: Path, place: UndoPlace) -> None:
    """Which are kept. What comes after it can be taken back again, down to it."""
    push(place, make_record())
    kept = image.with_name(image.name + SUFFIX).read_bytes()[BODY_AT:]
    for how in ("forgotten", "without"):
        journal = Journal.open(place)
        assert journal is not None
        if how == "forgotten":
            journal.begin(make_record(make_plan(b"other")))
            journal.advance(State.APPLIED)
            journal.forget()
        else:
            journal.seal()
        journal.close()
        assert state_at(place) == (State.SEALED, "")
        assert image.with_name(image.name + SUFFIX).read_bytes()[BODY_AT:] == kept
    push(place, make_record(make_plan(b"third")))
    journal = Journal.open(place)
    assert journal is not None
    assert [record.plan.id for record, _ in journal.walk()] == [make_plan(b"third").id]
    journal.advance(State.APPLYING)
    journal.drop()
    journal.load_next()
    assert (journal.status.state, journal.record) == (State.SEALED, None)
    journal.close()
    assert len(names(image)) == 1


def test_a_seal_comes_off_where_nothing_came_of_that_repair(place: UndoPlace) -> None:
    push(place, make_record())
    journal = Journal.open(place)
    assert journal is not None
    journal.seal()
    journal.unseal()
    journal.close()
    assert state_at(place) == (State.APPLIED, make_plan().id)


def test_with_nothing_below_forgetting_leaves_nothing(image: Path, place: UndoPlace) -> None:
    push(place, make_record())
    journal = Journal.open(place)
    assert journal is not None
    journal.forget()
    journal.close()
    assert names(image) == set()


def test_whether_others_wrote_since_is_kept_with_the_repair_below(place: UndoPlace) -> None:
    for is_touched in (False, True):
        push(place, make_record())
        journal = Journal.open(place)
        assert journal is not None
        journal.begin(make_record(make_plan(b"other")), is_touched=is_touched)
        assert journal.below.mtime_ns == (0 if is_touched else 77)
        journal.drop(99)
        assert journal.status.mtime_ns == 99
        journal.load_next()
        journal.drop()
        journal.close()


def test_its_bytes_are_durable_before_the_word_and_its_name_before_any(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, pwrite = os.fsync, os.pwrite

    def record_fsync(fd: int) -> None:
        seen.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "flush")
        fsync(fd)

    def record_pwrite(fd: int, data: bytes, offset: int) -> int:
        what = "record" if offset >= BODY_AT else "word" if offset else "front"
        if seen[-1:] != [what]:
            seen.append(what)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "pwrite", record_pwrite)
    journal = Journal.make(place)
    assert seen == ["front", "flush", "directory"]
    seen.clear()
    journal.begin(make_record())
    assert seen == ["front", "record", "flush", "word", "flush", "word"]
    seen.clear()
    journal.advance(State.APPLIED)
    journal.begin(make_record(make_plan(b"other")))
    once = ["word", "flush", "word"]
    assert seen == [*once, "record", "flush", *once]
    journal.close()


CALLS = ("open", "pwrite", "fsync", "ftruncate", "unlink")


class Crash(BaseException):
    """The process ends here: nothing is caught, nothing cleaned up."""


class Crashing:
    """Ends the process before its nth call that changes something; None: counts only."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int | None) -> None:
        self.calls = 0
        for name in CALLS:
            patch.setattr(os, name, self._wrap(getattr(os, name), number))

    def _wrap(self, function: Callable[..., object], number: int | None) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if number is not None and self.calls >= number:
                raise Crash
            self.calls += 1
            return function(*args, **kwargs)

        return call


def test_wherever_it_crashes_there_is_exactly_one_way_back(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old repair on top, or the new one on it: never none, never half a one."""
    old, new = make_record(), make_record(make_plan(b"other"))

    def kept() -> None:
        journal = Journal.open(place) or Journal.make(place)
        journal.begin(new)
        journal.advance(State.APPLIED)
        journal.close()

    def withdrawn() -> None:
        journal = Journal.open(place) or Journal.make(place)
        journal.begin(new)
        journal.drop()
        journal.close()

    for work, olds in itertools.product((kept, withdrawn), ([], [old])):
        seen: list[tuple[State, str] | None] = []
        number = 0
        while True:
            for name in names(image):
                image.with_name(name).unlink()
            for each in olds:
                push(place, each)
            with monkeypatch.context() as patch:
                crashing = Crashing(patch, number)
                try:
                    work()
                except Crash:
                    done = False
                else:
                    done = True
            seen.append(state_at(place))
            assert len(names(image)) <= 1
            number += 1
            if done:
                break
        assert crashing.calls + 1 == len(seen)
        before = (State.APPLIED, old.plan.id) if olds else None
        ways = [before, (State.APPLYING, new.plan.id)]
        last = (State.APPLIED, new.plan.id) if work is kept else before
        empty = [] if olds else [(State.EMPTY, "")]
        assert set(seen) <= {*ways, last, *empty}
        assert seen[0] == ways[0]
        assert seen[-1] == last
        assert ways[1] in seen


def test_one_that_holds_nothing_goes(image: Path, place: UndoPlace) -> None:
    for left in (b"", encode_front(StateWord())):
        file = image.with_name(image.name + SUFFIX)
        file.write_bytes(left)
        file.chmod(0o600)
        assert state_at(place) == (State.EMPTY, "")
        assert names(image) == set()
        file.write_bytes(left)
        file.chmod(0o600)
        push(place, make_record())
        assert state_at(place) == (State.APPLIED, make_plan().id)
        file.unlink()


def test_other_names_beside_the_image_are_left_alone(image: Path, place: UndoPlace) -> None:
    others = {SUFFIX + suffix for suffix in (".old", ".new", ".1", "~", ".bak")}
    for suffix in others:
        image.with_name(image.name + suffix).write_bytes(encoded(make_record()))
    for record in (make_record(), make_record(make_plan(b"other"))):
        push(place, record)
    journal = Journal.open(place)
    assert journal is not None
    for _ in range(2):
        journal.advance(State.APPLYING)
        journal.drop()
        journal.load_next()
    journal.close()
    assert names(image) == {image.name + suffix for suffix in others}


# ---- what cannot be made ----


FAILURES = [
    ("open", errno.EROFS),
    ("open", errno.EACCES),
    ("open", errno.ENOSPC),
    ("pwrite", errno.ENOSPC),
    ("pwrite", errno.EDQUOT),
    ("pwrite", errno.EIO),
    ("fsync", errno.ENOSPC),
    ("fsync", errno.EIO),
]


def only_at(number: int, code: int) -> Callable[[int], int]:
    return lambda at: code if at == number else 0


def begin_with(
    place: UndoPlace, patch: pytest.MonkeyPatch, name: str, fails: Callable[[int], int]
) -> UndoFileImpossible | None:
    """Begin a repair, the nth call of *name* failing with this code, or not. It is withdrawn."""
    whole, calls = getattr(os, name), itertools.count()

    def call(*args: object, **kwargs: object) -> object:
        code = fails(next(calls))
        if code:
            raise OSError(code, os.strerror(code))
        return whole(*args, **kwargs)

    journal = Journal.open(place)
    patch.setattr(os, name, call)
    try:
        journal = journal or Journal.make(place)
        journal.begin(make_record(make_plan(b"other")))
    except UndoFileImpossible as error:
        return error
    else:
        return None
    finally:
        patch.undo()
        if journal is not None:
            if journal.status.state is State.APPLYING:
                journal.drop()
            journal.close()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("is_first", [True, False])
def test_where_it_cannot_be_made_nothing_is_left_and_the_others_stay(
    image: Path, place: UndoPlace, failure: tuple[str, int], *, is_first: bool
) -> None:
    """Whichever call of that name it is that fails."""
    name, code = failure
    kind = UndoFileNoSpace if code in NO_SPACE else UndoFileImpossible
    if not is_first:
        push(place, make_record())
    before = {each: image.with_name(each).stat().st_size for each in names(image)}
    refused = []
    for number in range(8):
        error = begin_with(place, pytest.MonkeyPatch(), name, only_at(number, code))
        assert {each: image.with_name(each).stat().st_size for each in names(image)} == before
        assert state_at(place) == (None if is_first else (State.APPLIED, make_plan().id))
        refused += [error] if error else []
    assert refused or (name == "open" and not is_first)
    for error in refused:
        assert type(error) is kind
        assert os.strerror(code) in str(error)
        assert "nothing was written" in str(error)
        assert "--no-undo" in str(error)
        assert error.errno == (errno.ENOSPC if kind is UndoFileNoSpace else errno.EUCLEAN)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    image = tmp_path / ("x" * 250)
    image.write_bytes(CONTENT)
    with Image.open(str(image)) as opened, UndoPlace.beside(opened) as place:
        assert state_at(place) is None
        assert read_summary(place) is None
        with pytest.raises(UndoFileImpossible, match="File name too long"):
            Journal.make(place)


def test_one_that_would_be_enormous_is_not_made(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_BYTES", 4000)
    journal = Journal.make(place)
    with pytest.raises(UndoFileImpossible, match="more than 4000 bytes"):
        journal.begin(make_record())
    journal.close()
    assert names(image) == set()
    file = image.with_name(image.name + SUFFIX)
    file.write_bytes(encoded(make_record()))
    file.chmod(0o600)
    with pytest.raises(UndoFileDamaged, match="contradicts itself"):
        Journal.open(place)


@pytest.mark.parametrize("begin", [b"garbage", b"", encode_front(StateWord())], ids=len)
def test_of_one_that_is_huge_no_more_is_read_than_it_says_it_has(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    file = image.with_name(image.name + SUFFIX)
    file.write_bytes(begin)
    file.chmod(0o600)
    os.truncate(file, 1 << 40)
    pread, read = os.pread, []

    def watch(fd: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", watch)
    if len(begin) == BODY_AT:  # and what lies behind means nothing
        assert state_at(place) == (State.EMPTY, "")
    else:
        with pytest.raises(UndoFileDamaged, match="no undo file"):
            Journal.open(place)
    assert sum(read) <= 2 * BODY_AT


def test_nor_of_one_that_claims_it(image: Path, place: UndoPlace) -> None:
    huge, stages = 1 << 30, len(StageKind)
    header = dict(HEADER.parse(encoded(make_record())[BODY_AT:])) | {"sectors": [huge] * stages}
    built: bytes = HEADER.build(header)
    word = StateWord(State.APPLIED, 1, BODY_AT, BODY_AT + SECTOR + stages * huge * (8 + 2 * SECTOR))
    file = image.with_name(image.name + SUFFIX)
    file.write_bytes(encode_front(word) + built + digest_of(built))
    file.chmod(0o600)
    os.truncate(file, word.end)
    with pytest.raises(UndoFileDamaged, match="contradicts itself"):
        Journal.open(place)


def test_nor_of_one_whose_sectors_are_a_hole(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, stages = 1 << 22, [0, 0, 0, 0, 1 << 22, 0]
    header = dict(HEADER.parse(encoded(make_record())[BODY_AT:])) | {"sectors": stages}
    built: bytes = HEADER.build(header)
    word = StateWord(State.APPLIED, 1, BODY_AT, BODY_AT + SECTOR + count * (8 + 2 * SECTOR))
    file = image.with_name(image.name + SUFFIX)
    file.write_bytes(encode_front(word) + built + digest_of(built))
    file.chmod(0o600)
    os.truncate(file, word.end)
    read, pread = [], os.pread

    def watch(fd: int, length: int, offset: int) -> bytes:
        read.append(length)
        return pread(fd, min(length, 1 << 20), offset)

    monkeypatch.setattr(os, "pread", watch)
    with pytest.raises(UndoFileDamaged, match="contradicts itself"):
        Journal.open(place)
    assert sum(read) < 1 << 20


def test_a_file_system_that_cannot_flush_a_directory(
    place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    push(place, make_record())
    assert state_at(place) is not None


# ---- what is there and cannot be one ----


def put_directory(file: Path) -> None:
    file.mkdir()


def put_link(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(encoded(make_record()))
    file.symlink_to(other)


def put_writable(file: Path) -> None:
    file.write_bytes(encoded(make_record()))
    file.chmod(0o666)


def put_stranger(file: Path) -> None:
    file.write_bytes(encoded(make_record()))
    os.chown(file, 12345, 12345)


@pytest.mark.parametrize(
    ("put", "problem"),
    [
        (put_directory, "no undo file|directory"),
        (os.mkfifo, "no undo file"),
        (put_link, "symbolic links"),
        (put_writable, "others than the image's owner"),
        (
            pytest.param(
                put_stranger,
                "others than the image's owner",
                marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away"),
            )
        ),
        (lambda file: file.write_bytes(b"#"), "no undo file"),
    ],
)
def test_what_cannot_be_an_undo_file_is_refused_and_stays(
    image: Path, place: UndoPlace, put: Callable[[Path], None], problem: str
) -> None:
    put(image.with_name(image.name + SUFFIX))
    before = names(image)
    for read in (Journal.open, read_summary):
        with pytest.raises(UndoFileDamaged, match=problem):
            read(place)
    assert names(image) == before


def test_what_the_images_owner_made_is_trusted_also_where_all_may_write_to_both(
    image: Path,
) -> None:
    if os.geteuid() == 0:
        os.chown(image, 12345, 12345)
    image.chmod(0o666)
    file = image.with_name(image.name + SUFFIX)
    (put_stranger if os.geteuid() == 0 else put_writable)(file)
    file.chmod(0o666)
    with Image.open(str(image)) as opened, UndoPlace.beside(opened) as place:
        assert state_at(place) is not None


def test_one_that_cannot_be_read_is_refused(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(place, make_record())

    def fail(*args: object, **kwargs: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    for read in (read_summary, Journal.open):
        with pytest.raises(UndoFileDamaged, match="cannot be read: Input/output error"):
            read(place)


def test_one_that_may_not_be_opened_may_be_needed(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(place, make_record())

    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    for read in (read_summary, Journal.open):
        with pytest.raises(UndoFileForbidden, match="run as its owner, or as root"):
            read(place)


# ---- whose it is ----


def test_in_a_folder_of_others_one_that_was_made_for_another_file_is_not_believed(
    image: Path,
) -> None:
    """There somebody may have moved it beside this image; else images move together with it."""
    file = image.with_name(image.name + SUFFIX)
    file.write_bytes(encoded(make_record(), state=State.APPLIED))
    file.chmod(0o600)
    with Image.open(str(image)) as opened, UndoPlace.beside(opened) as place:
        assert state_at(place) == (State.APPLIED, make_plan().id)
        image.parent.chmod(0o1777)
        for read in (read_summary, Journal.open):
            with pytest.raises(UndoFileForeign, match="--undo-file"):
                read(place)
        own = replace(make_record(), identity=place.identity)
        file.write_bytes(encoded(own, state=State.APPLIED))
        assert state_at(place) == (State.APPLIED, make_plan().id)
        assert read_summary(place)
    file.write_bytes(encoded(make_record(), state=State.APPLIED))
    with Image.open(str(image), str(file)) as opened:
        named = UndoPlace.of(opened)
        assert named
        with named:
            assert state_at(named) == (State.APPLIED, make_plan().id)


def test_of_an_image_with_two_names_it_is_made_only_where_somebody_says(
    image: Path, tmp_path: Path
) -> None:
    image.with_name("other.qcow2").hardlink_to(image)
    with (
        Image.open(str(image)) as opened,
        UndoPlace.beside(opened) as place,
        pytest.raises(UndoFileAmbiguous, match=r"2 names.*--undo-file"),
    ):
        Journal.make(place)
    assert names(image) == {"other.qcow2"}
    chosen = tmp_path / "chosen"
    with Image.open(str(image), str(chosen)) as opened:
        named = UndoPlace.of(opened)
        assert named
        with named:
            push(named, make_record())
    assert chosen.exists()


def test_descriptors_are_not_leaked(image: Path, place: UndoPlace) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    push(place, make_record())
    state_at(place)
    read_summary(place)
    image.with_name(image.name + SUFFIX).write_bytes(b"damaged")
    with pytest.raises(UndoFileDamaged):
        Journal.open(place)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
