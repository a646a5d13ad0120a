"""instarfs.repair.execute: order, what is written and what is not, and putting it back."""

import errno
import itertools
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instarfs.errors import (
    ImageChanged,
    InstarfsError,
    PutBackFailed,
    RepairCancelled,
    RepairNoSpace,
    RepairUnproven,
    RepairWriteFailed,
    TrimCancelled,
    TrimFailed,
    TrimUnsupported,
    UndoFileFailed,
    UndoFileFull,
)
from instarfs.repair.execute import (
    MAX_WRITE_SECTORS,
    FileDevice,
    execute,
    punch,
    put_back,
    require_remnant,
    take_back,
)
from planner.errors import Cancelled
from planner.progress import unless
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, RepairTier, StageKind
from planner.source import SECTOR, Bytes, read_bytes
from tests.devices import (
    EIO,
    ENOSPC,
    SHORT,
    Fail,
    Failure,
    Flush,
    MemoryDevice,
    Operation,
    Truncate,
    Write,
    from_then_on,
    once,
)

Edits = dict[StageKind, list[tuple[int, bytes]]]

CONTENT = random.Random(1).randbytes(40 * SECTOR)
"""No sector of it is zeros, and none is like another."""

GROWN = 48 * SECTOR


def make_plan(content: bytes, edits: Edits, size: int | None = None) -> Plan:
    draft = Draft(Bytes(content))
    draft.size = len(content) if size is None else size
    for kind, writes in edits.items():
        for offset, data in writes:
            draft.write(kind, offset, data)
    return draft.plan(RepairTier.ALL)


def every_stage() -> Plan:
    """A repair with all stages, which grows the file and changes the first sector three times."""
    edits: Edits = {
        StageKind.GUARD: [(72, b"guard")],
        StageKind.PREPARE: [(41 * SECTOR, b"new" * 400), (5 * SECTOR + 100, b"raised")],
        StageKind.SWITCH: [(48, b"switched")],
        StageKind.CORRECT: [(5 * SECTOR + 300, b"lowered"), (20 * SECTOR, bytes(3 * SECTOR))],
        StageKind.RELEASE: [(72, CONTENT[72:77])],
    }
    return make_plan(CONTENT, edits, GROWN)


def outcome_of(content: bytes, plan: Plan) -> bytes:
    return read_bytes(Overlay(Bytes(content), plan), 0, plan.size_after)


def run(
    plan: Plan, content: bytes = CONTENT, fail: Fail | None = None
) -> tuple[MemoryDevice, InstarfsError | None]:
    device = MemoryDevice(bytearray(content))
    if fail:
        device.fail = fail
    try:
        execute(device, plan)
    except InstarfsError as error:
        return device, error
    return device, None


def writes_of(device: MemoryDevice) -> list[Write]:
    return [each for each in device.log if isinstance(each, Write)]


# ---- what is written, and in which order ----


def test_stages_come_in_order_each_with_its_flush_and_growth_under_the_guard() -> None:
    device, error = run(every_stage())
    assert error is None
    assert bytes(device.content) == outcome_of(CONTENT, every_stage())
    shape = [
        each.offset // SECTOR if isinstance(each, Write) else type(each).__name__
        for each in device.log
    ]
    assert shape == [
        *(0, "Flush"),
        *("Truncate", "Flush"),
        *(5, 41, "Flush"),
        *(0, "Flush"),
        *(5, 20, "Flush"),
        *(0, "Flush"),
    ]


def test_undoing_goes_back_in_reverse_and_shrinks_under_the_guard() -> None:
    plan = every_stage()
    device, error = run(plan.inverse(), outcome_of(CONTENT, plan))
    assert error is None
    assert bytes(device.content) == CONTENT
    assert device.log[-4:-2] == [Truncate(len(CONTENT)), Flush()]
    guard = device.log[-2]
    assert isinstance(guard, Write)
    assert guard.offset == 0
    # What is cut off in the end is not written before.
    assert all(write.end <= len(CONTENT) for write in writes_of(device))


def test_a_file_that_grows_without_a_guard_grows_first() -> None:
    plan = make_plan(CONTENT, {StageKind.CORRECT: [(0, b"x")]}, GROWN)
    device, _ = run(plan)
    assert device.log[:2] == [Truncate(GROWN), Flush()]
    device, _ = run(plan.inverse(), outcome_of(CONTENT, plan))
    assert device.log[-2:] == [Truncate(len(CONTENT)), Flush()]


def test_growing_alone_is_a_repair_too() -> None:
    plan = make_plan(CONTENT, {}, GROWN)
    device, _ = run(plan)
    assert device.log == [Truncate(GROWN), Flush()]


def test_a_plan_that_changes_nothing_touches_nothing() -> None:
    device, error = run(make_plan(CONTENT, {StageKind.CORRECT: [(3, CONTENT[3:9])]}))
    assert error is None
    assert device.done == 0


def test_adjacent_sectors_are_one_write_and_no_other_sector_is_written() -> None:
    wanted = [1, 2, 3, 9, 11, 12]
    plan = make_plan(CONTENT, {StageKind.CORRECT: [(at * SECTOR, b"other") for at in wanted]})
    device, _ = run(plan)
    places = [(write.offset // SECTOR, len(write.data) // SECTOR) for write in writes_of(device)]
    assert places == [(1, 3), (9, 1), (11, 2)]


def test_long_runs_are_several_writes() -> None:
    content = bytes(SECTOR * (MAX_WRITE_SECTORS + 3))
    plan = make_plan(content, {StageKind.CORRECT: [(0, b"\1" * len(content))]})
    device, _ = run(plan, content)
    lengths = [len(write.data) for write in writes_of(device)]
    assert lengths == [MAX_WRITE_SECTORS * SECTOR, 3 * SECTOR]


@pytest.mark.parametrize("cut", [1, 511])
def test_a_last_sector_that_is_cut_off_does_not_make_the_file_longer(cut: int) -> None:
    content = CONTENT[: 8 * SECTOR + cut]
    plan = make_plan(content, {StageKind.CORRECT: [(7 * SECTOR, b"\1" * 2 * SECTOR)]})
    device, error = run(plan, content)
    assert error is None
    assert bytes(device.content) == outcome_of(content, plan)
    assert device.size == len(content)
    device, _ = run(plan.inverse(), bytes(device.content))
    assert bytes(device.content) == content


@pytest.mark.parametrize("cut", [1, 511])
def test_a_cut_off_last_sector_can_be_grown_over_and_put_back(cut: int) -> None:
    content = CONTENT[: 8 * SECTOR + cut]
    edits: Edits = {StageKind.PREPARE: [(8 * SECTOR, b"\1" * SECTOR)]}
    plan = make_plan(content, edits, 10 * SECTOR)
    device, _ = run(plan, content)
    assert bytes(device.content) == outcome_of(content, plan)
    take_back(device, plan)
    assert bytes(device.content) == content


# ---- what must be there before ----


@pytest.mark.parametrize("sector", [0, 5, 20, 22])
def test_nothing_is_written_over_what_the_plan_does_not_start_from(sector: int) -> None:
    content = bytearray(CONTENT)
    content[sector * SECTOR + 17] ^= 1
    device, error = run(every_stage(), bytes(content))
    assert isinstance(error, ImageChanged)
    assert error.errno == errno.ESTALE
    assert f"offset {sector * SECTOR} was changed" in str(error)
    assert device.done == 0


def test_what_the_plan_does_not_touch_may_be_anything() -> None:
    content = bytearray(CONTENT)
    content[30 * SECTOR] ^= 1
    device, error = run(every_stage(), bytes(content))
    assert error is None
    assert bytes(device.content) == outcome_of(bytes(content), every_stage())


@pytest.mark.parametrize("size", [39 * SECTOR, 41 * SECTOR, GROWN])
def test_a_file_of_another_length_is_not_written_to(size: int) -> None:
    device, error = run(every_stage(), CONTENT.ljust(size, b"\0")[:size])
    assert isinstance(error, ImageChanged)
    assert device.done == 0


# ---- failing ----

OPERATIONS = 14


@pytest.mark.parametrize("number", range(OPERATIONS))
@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        (EIO, RepairWriteFailed, errno.EIO),
        (SHORT, RepairWriteFailed, errno.EIO),
        (ENOSPC, RepairNoSpace, errno.ENOSPC),
        (Failure(errno.EDQUOT), RepairNoSpace, errno.ENOSPC),
    ],
)
@pytest.mark.parametrize("undo", [False, True])
def test_whatever_fails_everything_is_put_back(
    number: int, failure: Failure, kind: type[InstarfsError], code: int, undo: bool
) -> None:
    plan, content = every_stage(), CONTENT
    if undo:
        plan, content = plan.inverse(), outcome_of(CONTENT, plan)
    device, error = run(plan, content, once(number, failure))
    assert device.done > number or error is None
    assert number >= len(run(plan, content)[0].log) or isinstance(error, kind)
    if error is not None:
        assert error.errno == code
        assert "put back" in str(error)
        assert bytes(device.content) == content
        # Durable, unless the page cache alone had seen the change.
        assert device.log[-1:] in ([], [Flush()])


def test_the_number_of_operations_that_fail_above_is_all_of_them() -> None:
    assert len(run(every_stage())[0].log) == OPERATIONS


@pytest.mark.parametrize("number", range(OPERATIONS))
def test_where_putting_back_fails_the_error_says_so_and_the_plan_can_be_taken_back_later(
    number: int,
) -> None:
    plan = every_stage()
    device, error = run(plan, fail=from_then_on(number, EIO))
    assert isinstance(error, PutBackFailed | RepairWriteFailed)
    if bytes(device.content) != CONTENT:
        assert isinstance(error, PutBackFailed)
        assert error.errno == errno.EIO
        assert "half-repaired" in str(error)
        assert "instarfs undo" in str(error)
    device.fail = once(-1, EIO)
    take_back(device, plan)
    assert bytes(device.content) == CONTENT


def test_where_there_is_no_space_to_put_it_back_that_is_the_way_out() -> None:
    plan = every_stage()
    device, error = run(plan, fail=from_then_on(OPERATIONS - 2, ENOSPC))
    for failed in (error, taken_back(device, plan)):
        assert isinstance(failed, PutBackFailed)
        assert failed.errno == errno.ENOSPC
        assert str(failed).endswith(
            "its undo file is kept: make space (df), then run instarfs undo"
        )
    device.fail = once(-1, EIO)
    take_back(device, plan)
    assert bytes(device.content) == CONTENT


def taken_back(device: MemoryDevice, plan: Plan) -> BaseException | None:
    """What taking *plan* back failed by."""
    try:
        take_back(device, plan)
    except PutBackFailed as error:
        return error
    return None


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (UndoFileFull("u", "No space left on device"), "its undo file: No space left on device"),
        (UndoFileFailed("u", "Stale file handle"), "its undo file: Stale file handle"),
        (RepairCancelled("i"), "it was cancelled"),
        (Cancelled(), "cancelled"),
        (RepairUnproven("i"), "the image was not what had been proven"),
        (MemoryError(), "too little memory"),
        (KeyboardInterrupt(), "a signal"),
        (SystemExit(), "a signal"),
    ],
    ids=lambda it: type(it).__name__,
)
def test_what_a_repair_ended_by_is_said_in_words(cause: BaseException, words: str) -> None:
    plan = every_stage()
    device = MemoryDevice(bytearray(outcome_of(CONTENT, plan)), fail=from_then_on(0, EIO))
    with pytest.raises(PutBackFailed) as caught:
        put_back(device, plan, cause)
    assert f"ended early ({words}), and putting" in str(caught.value)


def test_on_a_full_disk_nothing_is_put_back_into_holes() -> None:
    """A hole that could not be written to needs no zeros, and could not take them."""
    content = CONTENT[: 20 * SECTOR] + bytes(20 * SECTOR)
    edits: Edits = {
        StageKind.PREPARE: [(2 * SECTOR, b"raised"), (30 * SECTOR, b"\1" * SECTOR)],
    }

    def full(_number: int, operation: Operation) -> Failure | None:
        in_hole = isinstance(operation, Write) and operation.end > 20 * SECTOR
        return ENOSPC if in_hole else None

    device, error = run(make_plan(content, edits), content, full)
    assert isinstance(error, RepairNoSpace)
    assert bytes(device.content) == content


def test_sectors_that_cannot_be_read_back_are_put_back_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = MemoryDevice(bytearray(CONTENT))
    whole = MemoryDevice.pread

    def unreadable(self: MemoryDevice, offset: int, length: int) -> bytes:
        if self.log:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(self, offset, length)

    monkeypatch.setattr(MemoryDevice, "pread", unreadable)
    device.fail = once(6, EIO)
    with pytest.raises(RepairWriteFailed):
        execute(device, every_stage())
    assert bytes(device.content) == CONTENT


def test_a_bug_on_the_way_puts_back_too() -> None:
    def explode(stage: str, done: int, total: int) -> None:
        if done == total:
            raise ZeroDivisionError

    device = MemoryDevice(bytearray(CONTENT))
    with pytest.raises(ZeroDivisionError):
        execute(device, every_stage(), progress=explode)
    assert device.log
    assert bytes(device.content) == CONTENT


def test_written_bytes_that_changed_underneath_are_put_back_without_a_question() -> None:
    plan = every_stage()
    device, _ = run(plan)
    device.content[5 * SECTOR] ^= 255
    put_back(device, plan, ZeroDivisionError())
    assert bytes(device.content) == CONTENT


# ---- progress and cancelling ----


def test_progress_is_told_of_every_sector() -> None:
    told: list[tuple[str, int, int]] = []
    plan = every_stage()
    device = MemoryDevice(bytearray(CONTENT))
    execute(device, plan, progress=lambda *step: told.append(step))
    count = sum(len(stage.sectors) for stage in plan.stages)
    assert told[0] == ("writing", 0, count)
    assert told[-1] == ("writing", count, count)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_cancelling_at_any_point_puts_everything_back() -> None:
    plan = every_stage()
    answers: Iterator[bool] = iter([False] * 100)
    execute(MemoryDevice(bytearray(CONTENT)), plan, progress=unless(answers.__next__))
    calls = 100 - len(list(answers))
    assert calls > len(plan.stages)
    for number in range(calls):
        answers = itertools.chain([False] * number, itertools.repeat(True))
        device = MemoryDevice(bytearray(CONTENT))
        with pytest.raises(RepairCancelled, match="is as it was before"):
            execute(device, plan, progress=unless(answers.__next__))
        assert bytes(device.content) == CONTENT


# ---- taking back what a crash left ----


def stages_of(plan: Plan, content: bytes) -> list[bytes]:
    """What the device holds after every operation, the first and last included."""
    device = MemoryDevice(bytearray(content))
    seen = [content]
    device.fail = lambda *_: seen.append(bytes(device.content))
    execute(device, plan)
    return [*seen, bytes(device.content)]


def test_from_every_moment_there_is_a_way_back() -> None:
    plan = every_stage()
    for content in stages_of(plan, CONTENT):
        device = MemoryDevice(bytearray(content))
        take_back(device, plan)
        assert bytes(device.content) == CONTENT
        assert content != CONTENT or not device.log


def test_from_every_moment_of_undoing_there_is_a_way_back() -> None:
    plan = every_stage()
    for content in stages_of(plan.inverse(), outcome_of(CONTENT, plan)):
        device = MemoryDevice(bytearray(content))
        take_back(device, plan)
        assert bytes(device.content) == CONTENT


def test_taking_back_twice_changes_nothing_more() -> None:
    """Also where the second crash comes while the first is being taken back."""
    plan = every_stage()
    for content in stages_of(plan, CONTENT):
        for number in range(OPERATIONS):
            device = MemoryDevice(bytearray(content), fail=from_then_on(number, SHORT))
            try:
                take_back(device, plan)
            except PutBackFailed as error:
                assert "half-repaired" in str(error)  # noqa: PT017
            # A torn write leaves whole sectors, each as before or as after.
            torn = bytearray(device.content)
            for sector in range(0, len(torn), SECTOR):
                now = bytes(torn[sector : sector + SECTOR])
                if now not in allowed(plan, sector // SECTOR, content):
                    torn[sector : sector + SECTOR] = content[sector : sector + SECTOR]
            again = MemoryDevice(torn)
            take_back(again, plan)
            assert bytes(again.content) == CONTENT


def allowed(plan: Plan, sector: int, content: bytes) -> list[bytes]:
    found = [content[sector * SECTOR : (sector + 1) * SECTOR], bytes(SECTOR)]
    for stage in plan.stages:
        for at in np.flatnonzero(stage.sectors == sector).tolist():
            found += [stage.before[at].tobytes(), stage.after[at].tobytes()]
    return found


@pytest.mark.parametrize("sector", [0, 5, 20])
def test_what_somebody_else_wrote_since_is_not_taken_back(sector: int) -> None:
    plan = every_stage()
    device, _ = run(plan)
    device.log.clear()
    device.content[sector * SECTOR + 400] ^= 255
    with pytest.raises(ImageChanged, match=f"offset {sector * SECTOR} was changed"):
        take_back(device, plan)
    assert not device.log


def test_a_file_of_a_third_length_is_not_taken_back() -> None:
    plan = every_stage()
    device, _ = run(plan)
    device.content += b"more"
    with pytest.raises(ImageChanged, match="neither"):
        require_remnant(device, plan)


# ---- any plan ----


@st.composite
def plans(draw: st.DrawFn) -> tuple[bytes, Plan]:
    """A content of a few sectors, and any writes to it in any stages."""
    size = draw(st.integers(1, 12 * SECTOR))
    content = draw(st.randoms(use_true_random=False)).randbytes(size)
    grown = size + draw(st.sampled_from([0, 0, 1, 511, 512, 3000]))
    edits: Edits = {}
    for kind in draw(st.sets(st.sampled_from(list(StageKind)))):
        end = size if kind is StageKind.GUARD else grown  # the guard comes before the growth
        for _ in range(draw(st.integers(1, 3))):
            offset = draw(st.integers(0, end - 1))
            data = draw(st.binary(min_size=1, max_size=1500))[: end - offset]
            edits.setdefault(kind, []).append((offset, data))
    return content, make_plan(content, edits, grown)


@given(plans())
def test_writing_gives_what_the_overlay_shows(made: tuple[bytes, Plan]) -> None:
    content, plan = made
    device, error = run(plan, content)
    assert error is None
    assert bytes(device.content) == outcome_of(content, plan)
    again = MemoryDevice(device.content)
    execute(again, plan.inverse())
    assert bytes(again.content) == content


@given(plans(), st.integers(0, 15), st.sampled_from([EIO, ENOSPC, SHORT]))
def test_no_failure_leaves_a_trace(made: tuple[bytes, Plan], number: int, failure: Failure) -> None:
    content, plan = made
    device, error = run(plan, content, once(number, failure))
    assert bytes(device.content) == (content if error else outcome_of(content, plan))


# ---- punching ----


def test_runs_are_punched_and_flushed() -> None:
    device = MemoryDevice(bytearray(CONTENT))
    told: list[tuple[str, int, int]] = []
    runs = [(SECTOR, SECTOR), (4 * SECTOR, 3 * SECTOR)]
    punch(device, runs, 4 * SECTOR, progress=lambda *step: told.append(step))
    assert device.log[-1] == Flush()
    assert told == [("trimming", done * SECTOR, 4 * SECTOR) for done in (0, 1, 4)]
    zeros = {at for at in range(40) if not any(device.content[at * SECTOR : (at + 1) * SECTOR])}
    assert zeros == {1, 4, 5, 6}


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.EOPNOTSUPP, TrimUnsupported), (errno.ENOSYS, TrimUnsupported), (errno.EIO, TrimFailed)],
)
def test_punching_that_fails(code: int, kind: type[InstarfsError]) -> None:
    device = MemoryDevice(bytearray(CONTENT), fail=once(0, Failure(code)))
    with pytest.raises(kind, match=os.strerror(code)):
        punch(device, [(0, SECTOR)], SECTOR)


def test_punching_can_be_cancelled() -> None:
    device = MemoryDevice(bytearray(CONTENT))
    with pytest.raises(TrimCancelled):
        punch(device, [(0, SECTOR)], SECTOR, progress=unless(lambda: True))
    assert not device.log


# ---- a real file ----


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(CONTENT)
    return path


def with_file(path: Path, work: Callable[[FileDevice], None]) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        work(FileDevice(fd, str(path)))
    finally:
        os.close(fd)


def test_a_file_is_written_as_the_memory_is(path: Path) -> None:
    plan = every_stage()
    with_file(path, lambda device: execute(device, plan))
    assert path.read_bytes() == outcome_of(CONTENT, plan)
    with_file(path, lambda device: execute(device, plan.inverse()))
    assert path.read_bytes() == CONTENT


def test_short_writes_and_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, pread = os.pwrite, os.pread
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:300], at))
    monkeypatch.setattr(os, "pread", lambda fd, length, at: pread(fd, min(length, 300), at))
    plan = every_stage()
    with_file(path, lambda device: execute(device, plan))
    assert path.read_bytes() == outcome_of(CONTENT, plan)


def test_a_write_that_writes_nothing_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(RepairWriteFailed, match="nothing was written"):
        with_file(path, lambda device: execute(device, every_stage()))


def test_the_length_is_flushed_where_it_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd, name=name: flushes.append(name))
    with_file(path, lambda device: execute(device, every_stage()))
    assert flushes == ["fdatasync", "fsync", *["fdatasync"] * 4]


def test_holes_are_punched_and_the_length_stays(path: Path) -> None:
    big = bytes([1]) * (1 << 20)
    path.write_bytes(big)
    before = path.stat().st_blocks
    with_file(path, lambda device: device.punch_hole(1 << 16, 1 << 19))
    assert path.stat().st_blocks < before
    assert path.read_bytes() == big[: 1 << 16] + bytes(1 << 19) + big[(1 << 16) + (1 << 19) :]


def test_punching_a_descriptor_that_cannot_write_fails(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            FileDevice(fd, "image").punch_hole(0, SECTOR)
    finally:
        os.close(fd)


def test_a_block_device_neither_grows_nor_is_punched(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = list(path.stat()[:10])
    status[stat.ST_MODE] = stat.S_IFBLK | 0o660
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result(status))
    with pytest.raises(RepairNoSpace, match="does not change its size"):
        with_file(path, lambda device: execute(device, every_stage()))
    assert path.read_bytes() == CONTENT
    with pytest.raises(TrimUnsupported, match="block device"):
        with_file(path, lambda device: punch(device, [(0, SECTOR)], SECTOR))
