"""instarfs.journal and instarfs.undo_place: the undo file's bytes, its states, and its names."""

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instarfs import journal as journal_module
from instarfs.errors import (
    UndoFileDamaged,
    UndoFileFailed,
    UndoFileImpossible,
    UndoFileNoSpace,
)
from instarfs.image import Image
from instarfs.journal import (
    BODY_AT,
    HEADER,
    NEXT,
    SLOTS_AT,
    Journal,
    Record,
    State,
    StateWord,
    decode,
    decode_summary,
    digest_of,
    encode,
    encode_slot,
    read_summary,
)
from instarfs.names import OLD, SUFFIX
from instarfs.undo_place import UndoPlace
from planner.plan import Draft, Plan, RepairTier, StageKind
from planner.report import CheckCounters
from planner.source import SECTOR, Bytes

CONTENT = random.Random(2).randbytes(20 * SECTOR)


def make_plan(data: bytes = b"changed", size: int = 24 * SECTOR) -> Plan:
    draft = Draft(Bytes(CONTENT))
    draft.size = size
    draft.write(StageKind.GUARD, 72, data)
    draft.write(StageKind.PREPARE, 21 * SECTOR, data * 100)
    draft.write(StageKind.CORRECT, 3 * SECTOR, data)
    return draft.plan(RepairTier.ALL)


def make_record(plan: Plan | None = None) -> Record:
    head = digest_of(CONTENT[:SECTOR])
    return Record(plan or make_plan(), head, CheckCounters(leaks=3, total_clusters=9), 8, 4711)


def encoded(record: Record | None = None, status: StateWord | None = None) -> bytes:
    return b"".join(encode(record or make_record(), status or StateWord()))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def place(image: Path) -> Iterator[UndoPlace]:
    with Image.open(str(image)) as opened, UndoPlace.beside(opened) as place:
        yield place


def names(image: Path) -> set[str]:
    return {path.name for path in image.parent.iterdir()} - {image.name}


def state_at(place: UndoPlace) -> tuple[State, str] | None:
    """The state and the plan of the undo file as somebody who comes later finds it."""
    found = Journal.open(place)
    if found is None:
        return None
    try:
        return found.status.state, found.plan.id
    finally:
        found.close()


# ---- bytes ----


def test_what_is_written_is_what_is_read() -> None:
    record, status = make_record(), StateWord(State.APPLIED, trimmed=512, sequence=7)
    again, read = decode(encoded(record, status), "it")
    assert read == status
    assert again == record
    assert again.plan.id == record.plan.id
    assert [stage.kind for stage in again.plan.stages] == [
        stage.kind for stage in record.plan.stages
    ]
    assert decode_summary(encoded(record, status)[:BODY_AT], "it").plan_id == record.plan.id


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
    st.builds(StateWord, st.sampled_from(list(State)), counts, counts),
    st.lists(counts, min_size=8, max_size=8),
)
def test_any_record_comes_back(
    writes: list[tuple[StageKind, int, bytes]],
    tier: RepairTier,
    status: StateWord,
    counters: list[int],
) -> None:
    draft = Draft(Bytes(CONTENT))
    draft.size = 40 * SECTOR
    for kind, offset, data in writes:
        draft.write(kind, offset, data)
    record = Record(draft.plan(tier), bytes(32), CheckCounters(*counters), 1, 2)
    assert decode(encoded(record, status), "it") == (record, status)


def test_the_header_fits_its_sector_and_so_does_a_slot() -> None:
    assert HEADER.sizeof() + 32 <= SECTOR
    assert len(encode_slot(StateWord())) == SECTOR
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


@given(st.binary(max_size=4000))
def test_any_bytes_are_refused_in_a_sentence(raw: bytes) -> None:
    damaged(raw)


@given(st.binary(max_size=4000))
def test_any_bytes_behind_the_magic_are_refused_in_a_sentence(raw: bytes) -> None:
    damaged(journal_module.MAGIC + journal_module.VERSION + raw)


def test_wherever_it_is_cut_off_it_is_refused() -> None:
    raw = encoded()
    for length in [*range(BODY_AT + 40), *range(BODY_AT, len(raw), 97), len(raw) - 1]:
        damaged(raw[:length])
    assert "cut off" in damaged(raw[:-1])
    assert "cut off" in damaged(raw[:100])
    damaged(raw + b"\0")


def test_wherever_a_bit_flips_it_is_noticed_or_means_nothing() -> None:
    """But in one of the two slots of the state, which stand in for each other, and in padding."""
    raw, rng = bytearray(encoded()), random.Random(3)
    for at in [*range(SECTOR), *(rng.randrange(BODY_AT, len(raw)) for _ in range(300))]:
        bit = 1 << rng.randrange(8)
        raw[at] ^= bit
        if at < HEADER.sizeof() + 32 or at >= BODY_AT:
            damaged(bytes(raw))
        else:
            decode(bytes(raw), "it")
        raw[at] ^= bit


def test_another_version_is_told_from_damage() -> None:
    raw = encoded().replace(journal_module.MAGIC + b"\x01\0", journal_module.MAGIC + b"\x02\0")
    assert "another version of instarfs" in damaged(raw)
    assert "no undo file" in damaged(b"#!/bin/sh\n" * 100)


def forged(**changes: object) -> bytes:
    """An undo file whose checksums are right and whose header is not."""
    raw = encoded()
    header = dict(HEADER.parse(raw)) | changes
    built: bytes = HEADER.build(header)
    return (built + digest_of(built)).ljust(SECTOR, b"\0") + raw[SECTOR:]


@pytest.mark.parametrize(
    "changes",
    [
        {"tier": b"none\0\0\0\0"},
        {"tier": b"\xff" * 8},
        {"plan_id": b"\xff" * 12},
        {"plan_id": b"0123456789ab"},
        {"size_before": 0},
        {"size_after": (1 << 64) - 1},
        {"sectors": [1, 1, 0, 1, 0]},
        {"sectors": [(1 << 64) - 1, 1, 0, 1, 0]},
        {"body_digest": bytes(32)},
    ],
)
def test_a_header_that_contradicts_the_rest_is_refused(changes: dict[str, object]) -> None:
    damaged(forged(**changes))


@pytest.mark.parametrize("sectors", [[5, 5], [6, 5], [-1, 5], [5, 24], [5, 1 << 60]])
def test_sectors_that_no_plan_has_are_refused(sectors: list[int]) -> None:
    draft = Draft(Bytes(CONTENT))
    draft.write(StageKind.CORRECT, 5 * SECTOR, b"x" * 2 * SECTOR)
    plan = draft.plan(RepairTier.LEAKS)
    stage = replace(plan.stages[0], sectors=plan.stages[0].sectors * 0 + sectors)
    assert "contradicts itself" in damaged(encoded(make_record(replace(plan, stages=(stage,)))))


# ---- the state ----


def test_a_torn_state_leaves_the_one_before() -> None:
    raw = encoded()
    second = encode_slot(StateWord(State.APPLIED, 0, 1))
    for length in (1, 8, 9, 12, 20, 23):
        torn = second[:length] + raw[SLOTS_AT + SECTOR + length : SLOTS_AT + 2 * SECTOR]
        mixed = raw[: SLOTS_AT + SECTOR] + torn + raw[BODY_AT:]
        assert decode(mixed, "it")[1].state in (State.APPLYING, State.APPLIED)
        if torn != second:
            assert decode(mixed, "it")[1] == StateWord()
    whole = raw[: SLOTS_AT + SECTOR] + second + raw[BODY_AT:]
    assert decode(whole, "it")[1] == StateWord(State.APPLIED, 0, 1)


def test_without_any_state_it_is_refused() -> None:
    raw = encoded()
    assert "how far" in damaged(raw[:SLOTS_AT] + bytes(2 * SECTOR) + raw[BODY_AT:])


def test_every_state_says_what_follows_it() -> None:
    assert set(NEXT) == set(State)
    assert {after for follows in NEXT.values() for after in follows} == set(State)


def test_states_are_durable_one_after_the_other(image: Path, place: UndoPlace) -> None:
    journal = Journal.create(place, make_record())
    plan_id = journal.plan.id
    assert state_at(place) == (State.APPLYING, plan_id)
    for state in (State.APPLIED, State.APPLYING, State.APPLIED, State.APPLYING, State.UNDONE):
        journal.advance(state)
        assert state_at(place) == (state, plan_id)
        summary = read_summary(place)
        assert summary is not None
        assert (summary.status.state, summary.plan_id) == (state, plan_id)
    for state in State:
        with pytest.raises(ValueError, match="UNDONE is not followed by"):
            journal.advance(state)
    journal.close()


def test_trimmed_bytes_add_up_and_stay(place: UndoPlace) -> None:
    journal = Journal.create(place, make_record())
    journal.advance(State.APPLIED)
    journal.note_trim(1000)
    journal.note_trim(24)
    journal.close()
    again = Journal.open(place)
    assert again is not None
    assert (again.status.state, again.status.trimmed) == (State.APPLIED, 1024)
    again.close()


def test_a_state_that_cannot_be_written_is_an_error_and_the_old_one_holds(
    place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.create(place, make_record())

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UndoFileFailed, match="Input/output error") as caught:
            journal.advance(State.APPLIED)
    assert caught.value.errno == errno.EIO
    assert journal.status.state is State.APPLYING
    journal.advance(State.UNDONE)
    assert state_at(place) == (State.UNDONE, journal.plan.id)
    journal.close()


# ---- the file ----


def test_it_lies_beside_the_image_and_belongs_to_its_owner_alone(
    image: Path, place: UndoPlace
) -> None:
    Journal.create(place, make_record()).close()
    assert names(image) == {"disk.qcow2" + SUFFIX}
    file = image.with_name("disk.qcow2" + SUFFIX)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert place.file == str(file)
    assert file.read_bytes() == encoded()


def test_a_link_leads_beside_the_file_that_it_means(image: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "first").symlink_to("deep/second")
    (elsewhere / "deep" / "second").symlink_to(image)
    with Image.open(str(elsewhere / "first")) as opened, UndoPlace.beside(opened) as place:
        Journal.create(place, make_record()).close()
    assert names(image) == {"disk.qcow2" + SUFFIX, "elsewhere"}


def test_a_link_that_leads_nowhere_by_now(image: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image.name)
    with Image.open(str(link)) as opened:
        link.unlink()
        link.symlink_to("gone/away")
        with pytest.raises(OSError, match="No such file"):
            UndoPlace.beside(opened)


def test_the_one_before_is_kept_until_the_new_repair_stands(image: Path, place: UndoPlace) -> None:
    first, second = make_record(), make_record(make_plan(b"other"))
    journal = Journal.create(place, first)
    journal.advance(State.APPLIED)
    journal.settle()
    journal.close()
    journal = Journal.create(place, second)
    assert len(names(image)) == 2
    assert state_at(place) == (State.APPLYING, second.plan.id)
    journal.advance(State.APPLIED)
    journal.settle()
    journal.close()
    assert len(names(image)) == 1
    assert state_at(place) == (State.APPLIED, second.plan.id)


def test_the_one_before_comes_back_where_the_new_repair_does_not_stand(
    image: Path, place: UndoPlace
) -> None:
    first, second = make_record(), make_record(make_plan(b"other"))
    journal = Journal.create(place, first)
    journal.advance(State.APPLIED)
    journal.close()
    journal = Journal.create(place, second)
    journal.advance(State.UNDONE)
    journal.remove()
    journal.close()
    assert len(names(image)) == 1
    assert state_at(place) == (State.APPLIED, first.plan.id)


def test_without_one_before_removing_leaves_nothing(image: Path, place: UndoPlace) -> None:
    journal = Journal.create(place, make_record())
    journal.advance(State.UNDONE)
    journal.remove()
    journal.close()
    assert names(image) == set()
    assert state_at(place) is None
    assert read_summary(place) is None


def test_its_bytes_are_durable_before_its_name_and_its_name_before_it_is_made(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(fd: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        seen.append("directory" if is_directory else f"{os.fstat(fd).st_size} bytes")
        fsync(fd)

    def record_rename(*args: str, **kwargs: int) -> None:
        seen.append(f"to {args[1].removeprefix(image.name)}")
        rename(*args, **kwargs)

    Journal.create(place, make_record()).close()
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    Journal.create(place, make_record()).close()
    whole = f"{len(encoded())} bytes"
    assert seen == [whole, f"to {SUFFIX}.old", f"to {SUFFIX}", "directory"]


CALLS = ("open", "pwrite", "fsync", "rename", "unlink")


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
    """The undo file of the old repair, or of the new one: never none, never half a one."""
    old, new = make_record(), make_record(make_plan(b"other"))

    def replaced() -> None:
        journal = Journal.create(place, new)
        journal.advance(State.APPLIED)
        journal.settle()

    def withdrawn() -> None:
        journal = Journal.create(place, new)
        journal.advance(State.UNDONE)
        journal.remove()

    for work in (replaced, withdrawn):
        seen: list[tuple[State, str] | None] = []
        number = 0
        while True:
            for name in names(image):
                image.with_name(name).unlink()
            journal = Journal.create(place, old)
            journal.advance(State.APPLIED)
            journal.close()
            with monkeypatch.context() as patch:
                crashing = Crashing(patch, number)
                try:
                    work()
                except Crash:
                    done = False
                else:
                    done = True
            seen.append(state_at(place))
            if seen[-1] != (State.APPLYING, new.plan.id):
                assert len(names(image) - {image.name + SUFFIX + ".new"}) == 1
            number += 1
            if done:
                break
        assert crashing.calls + 1 == len(seen)
        ways = [(State.APPLIED, old.plan.id), (State.APPLYING, new.plan.id)]
        last = (State.APPLIED, new.plan.id) if work is replaced else (State.APPLIED, old.plan.id)
        assert set(seen) <= {*ways, last}
        assert seen[0] == ways[0]
        assert seen[-1] == last
        assert ways[1] in seen


def test_what_a_crash_left_under_the_new_name_is_no_obstacle(image: Path, place: UndoPlace) -> None:
    left = image.with_name(image.name + SUFFIX + ".new")
    left.symlink_to("/etc/hostname")
    Journal.create(place, make_record()).close()
    assert names(image) == {image.name + SUFFIX}


# ---- what cannot be made ----


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("open", errno.EROFS),
        ("open", errno.EACCES),
        ("pwrite", errno.ENOSPC),
        ("pwrite", errno.EDQUOT),
        ("pwrite", errno.EIO),
        ("fsync", errno.ENOSPC),
        ("rename", errno.EIO),
    ],
)
def test_where_it_cannot_be_made_nothing_is_left_and_the_old_one_stays(
    image: Path,
    place: UndoPlace,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    code: int,
) -> None:
    kind = UndoFileNoSpace if code in (errno.ENOSPC, errno.EDQUOT) else UndoFileImpossible
    journal = Journal.create(place, make_record())
    journal.advance(State.APPLIED)
    journal.close()
    whole = getattr(os, name)

    def fail(*args: object, **kwargs: object) -> object:
        if name == "rename" and not str(args[0]).endswith(".new"):
            return whole(*args, **kwargs)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(kind) as caught:
            Journal.create(place, make_record(make_plan(b"other")))
    assert os.strerror(code) in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert "--no-undo" in str(caught.value)
    assert caught.value.errno == (errno.ENOSPC if kind is UndoFileNoSpace else errno.EUCLEAN)
    assert names(image) == {image.name + SUFFIX}
    assert state_at(place) == (State.APPLIED, make_plan().id)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    image = tmp_path / ("x" * 250)
    image.write_bytes(CONTENT)
    with Image.open(str(image)) as opened, UndoPlace.beside(opened) as place:
        assert state_at(place) is None
        assert read_summary(place) is None
        with pytest.raises(UndoFileImpossible, match="File name too long"):
            Journal.create(place, make_record())


def test_one_that_would_be_enormous_is_not_made(
    image: Path, place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_BYTES", 4000)
    with pytest.raises(UndoFileImpossible, match="more than 4000 bytes"):
        Journal.create(place, make_record())
    assert names(image) == set()
    image.with_name(image.name + SUFFIX).write_bytes(encoded())
    with pytest.raises(UndoFileDamaged, match="no undo file"):
        Journal.open(place)


def test_a_file_system_that_cannot_flush_a_directory(
    place: UndoPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    Journal.create(place, make_record()).close()
    assert state_at(place) is not None


# ---- what is there and cannot be one ----


def put_directory(file: Path) -> None:
    file.mkdir()


def put_link(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(encoded())
    file.symlink_to(other)


def put_writable(file: Path) -> None:
    file.write_bytes(encoded())
    file.chmod(0o666)


def put_stranger(file: Path) -> None:
    file.write_bytes(encoded())
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
        (lambda file: file.write_bytes(b""), "no undo file"),
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
    Journal.create(place, make_record()).close()

    def fail(*args: object, **kwargs: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(UndoFileDamaged, match="cannot be read: Input/output error"):
            read_summary(place)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", fail)
        with pytest.raises(UndoFileDamaged, match="cannot be read: Input/output error"):
            Journal.open(place)


def test_descriptors_are_not_leaked(image: Path, place: UndoPlace) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    journal = Journal.create(place, make_record())
    state_at(place)
    read_summary(place)
    journal.close()
    image.with_name(image.name + SUFFIX).write_bytes(b"damaged")
    with pytest.raises(UndoFileDamaged):
        Journal.open(place)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("state", [State.APPLIED, State.UNDONE])
def test_nor_where_what_a_crash_cut_short_cannot_be_finished(
    image: Path, place: UndoPlace, state: State
) -> None:
    journal = Journal.create(place, make_record())
    journal.advance(state)
    journal.close()
    image.with_name(image.name + OLD).mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(UndoFileFailed):
        Journal.open(place)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
