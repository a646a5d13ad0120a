"""instarfs.repair.run and instarfs.repair.writing: a whole repair on a real file, and all that can
go wrong.

Images are small and made here; every test looks at the bytes.
"""

import errno
import fcntl
import itertools
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import pytest

from instarfs.errors import (
    ImageDeleted,
    ImageInUse,
    ImageNameless,
    ImageReadFailed,
    ImageReadOnly,
    ImageReplaced,
    InstarfsError,
    NotEnoughMemory,
    PlanStale,
    PutBackFailed,
    RepairCancelled,
    RepairIncomplete,
    RepairInterrupted,
    RepairNoSpace,
    RepairUnproven,
    RepairWriteFailed,
    TrimCancelled,
    TrimFailed,
    TrimRefused,
    TrimUnsupported,
    TrimWouldBury,
    UndoEmpty,
    UndoFileAmbiguous,
    UndoFileDamaged,
    UndoFileElsewhere,
    UndoFileFailed,
    UndoFileFull,
    UndoFileImpossible,
    UndoFileMissing,
    UndoFileTaken,
    UndoSealed,
    UndoStale,
)
from instarfs.image import locks
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.image.locks import Access, Permission
from instarfs.repair.execute import FileDevice
from instarfs.repair.interrupted import pending
from instarfs.repair.journal import BODY_AT, Journal, State, read_summary
from instarfs.repair.outcome import RepairOutcome, Status
from instarfs.repair.run import Repairer
from instarfs.repair.undo_place import UndoPlace
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, Cancelled, NotQcow2
from planner.progress import unless
from planner.repair.overlay import Overlay
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose
from planner.source import Bytes, Source, read_bytes
from tests.cached import cached_check, cached_propose, propose_bytes
from tests.devices import (
    EIO,
    ENOMEM,
    ENOSPC,
    SHORT,
    Fail,
    Failure,
    WatchedDevice,
    from_then_on,
    once,
)
from tests.images.builder import MIB, ImageBuilder
from tests.images.builder import Image as Made
from tests.images.damage import DAMAGES

LEAKS, ALL = RepairTier.LEAKS, RepairTier.ALL
OLD_TIME = 10**18
UNDOABLE = [
    (LEAKS, "leaked-clusters"),
    (ALL, "leaked-clusters"),
    (ALL, "missing-refcount"),
    (ALL, "wrong-copied"),
    (ALL, "lost-refblock"),
    (ALL, "dirty-bit"),
]


SIZE = 4096


@cache
def healthy() -> bytes:
    """A snapshot, writes after it, a bitmap, two L2 tables, and free clusters behind them."""
    builder, rng = ImageBuilder(cluster_bits=12, size=3 * MIB), random.Random(1)
    builder.write(0, rng.randbytes(8 * SIZE))
    builder.write_compressed(9, b"x" * SIZE)
    builder.take_snapshot("before")
    builder.write(2, rng.randbytes(4 * SIZE))
    builder.write(builder.geometry.l2_entries, rng.randbytes(2 * SIZE))
    builder.skip(3)
    builder.write(builder.geometry.l2_entries + 2, rng.randbytes(SIZE))
    builder.skip(2)
    builder.add_bitmap("monday", {3, 4})
    builder.skip(4)
    return bytes(builder.build().data)


@cache
def damaged(*names: str, content: bytes | None = None) -> bytes:
    made, rng = Made(bytearray(content or healthy())), random.Random(1)
    for name in names:
        DAMAGES[name](made, rng)
    return bytes(made.data)


@cache
def repaired(tier: RepairTier, content: bytes) -> bytes:
    plan = propose_bytes(content, tier).plan
    return read_bytes(Overlay(Bytes(content), plan), 0, plan.size_after)


class Sandbox:
    """An image file in a directory of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.undo_path = path.with_name(path.name + SUFFIX)
        self.is_named = False

    def put(self, content: bytes) -> bytes:
        self.path.write_bytes(content)
        os.utime(self.path, ns=(OLD_TIME, OLD_TIME))
        return content

    def open(self) -> Image:
        return Image.open(str(self.path), str(self.undo_path) if self.is_named else None)

    def repair(self, tier: RepairTier = ALL, quote: str = "", **options: object) -> RepairOutcome:
        with self.open() as image:
            return self._repairer(image, options).repair(tier, quote)

    def undo(self, **options: object) -> RepairOutcome:
        with self.open() as image:
            return self._repairer(image, options).undo()

    def trim(self, quote: str = "", **options: object) -> RepairOutcome:
        with self.open() as image:
            return self._repairer(image, options).trim(quote)

    def _repairer(self, image: Image, options: dict[str, object]) -> Repairer:
        quick = {"check": cached_check, "propose": cached_propose}
        return Repairer(image, **(quick | options))  # type: ignore[arg-type]

    def read(self) -> bytes:
        return self.path.read_bytes()

    def times(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_ctime_ns

    def names(self) -> set[str]:
        return {each.name for each in self.path.parent.iterdir()}

    def undo_state(self) -> State | None:
        with self.open() as image, UndoPlace.beside(image) as place:
            journal = Journal.open(place)
            if journal is None:
                return None
            journal.close()
            return journal.status.state


@pytest.fixture
def box(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "disk.qcow2")


@pytest.fixture
def untouched(box: Sandbox) -> Callable[[bytes], None]:
    """Asserts that the image is as `put` left it: its bytes, and the time of its last change."""

    def assert_untouched(content: bytes) -> None:
        assert box.read() == content
        assert box.times()[0] == OLD_TIME

    return assert_untouched


def failing(fail: Fail) -> Callable[[int, str], WatchedDevice]:
    return lambda fd, name: WatchedDevice(fd, name, fail)


def qemu_check(path: Path) -> int:
    return subprocess.run(["qemu-img", "check", "-q", path], check=False).returncode


# ---- a repair and back ----


@pytest.mark.parametrize(("tier", "name"), UNDOABLE)
def test_a_repair_does_what_was_proven_and_undo_takes_it_back(
    box: Sandbox, tier: RepairTier, name: str
) -> None:
    content = box.put(damaged(name))
    outcome = box.repair(tier)
    assert outcome.error is None
    assert outcome.status is Status.REPAIRED
    assert outcome.found == outcome.planned == outcome.repaired > 0
    assert outcome.left_count == 0
    assert outcome.undo_file == str(box.undo_path)
    assert box.read() == repaired(tier, content)
    assert qemu_check(box.path) == 0
    assert box.undo_state() is State.APPLIED
    taken_back = box.undo()
    assert taken_back.error is None
    assert taken_back.status is Status.UNDONE
    assert (taken_back.tier, taken_back.plan_id) == (tier, outcome.plan_id)
    assert taken_back.left_count == outcome.found
    assert box.read() == content
    assert taken_back.undoable == 0
    assert box.names() == {box.path.name}


@pytest.mark.parametrize("tier", list(RepairTier))
def test_a_clean_image_is_not_touched(
    box: Sandbox, untouched: Callable[[bytes], None], tier: RepairTier
) -> None:
    content = box.put(damaged())
    before = box.times()
    outcome = box.repair(tier)
    assert outcome.status is Status.NOTHING_TO_DO
    assert outcome.error is None
    assert box.times() == before
    untouched(content)
    assert box.names() == {box.path.name}


@pytest.mark.parametrize(("tier", "name"), UNDOABLE)
def test_repairing_twice_changes_no_byte_and_no_timestamp_and_keeps_the_way_back(
    box: Sandbox, tier: RepairTier, name: str
) -> None:
    content = box.put(damaged(name))
    box.repair(tier)
    image, undo_file = box.times(), box.undo_path.stat()
    after = box.read()
    outcome = box.repair(tier)
    assert outcome.status is Status.NOTHING_TO_DO
    assert box.times() == image
    assert box.read() == after
    again = box.undo_path.stat()
    assert (again.st_mtime_ns, again.st_ctime_ns, again.st_ino) == (
        undo_file.st_mtime_ns,
        undo_file.st_ctime_ns,
        undo_file.st_ino,
    )
    box.undo()
    assert box.read() == content


def test_what_cannot_be_mended_is_left_and_named(
    box: Sandbox, untouched: Callable[[bytes], None]
) -> None:
    content = box.put(damaged("lost-snapshot"))
    outcome = box.repair(ALL)
    assert outcome.status is Status.INCOMPLETE
    assert isinstance(outcome.error, RepairIncomplete)
    assert outcome.error.errno == errno.EUCLEAN
    assert outcome.found == outcome.left_count > 0
    assert outcome.repaired == 0
    assert sum(left.count for left in outcome.left) == outcome.left_count
    untouched(content)
    assert box.names() == {box.path.name}


def test_whoever_quotes_a_plan_gets_success_when_exactly_that_was_done(box: Sandbox) -> None:
    content = box.put(damaged("shared-cluster", "leaked-clusters"))
    outcome = box.repair(ALL, propose_bytes(content, ALL).plan.id)
    assert (outcome.status, outcome.error) == (Status.INCOMPLETE, None)
    assert 0 < outcome.left_count == sum(left.count for left in outcome.left)
    assert "findings that are left" in outcome.reason


def test_a_part_of_it_can_be_mended(box: Sandbox) -> None:
    content = box.put(damaged("shared-cluster", "leaked-clusters"))
    outcome = box.repair(ALL)
    assert outcome.status is Status.INCOMPLETE
    assert 0 < outcome.repaired == outcome.planned < outcome.found
    assert outcome.found == outcome.planned + outcome.left_count
    assert box.undo().status is Status.UNDONE
    assert box.read() == content


@pytest.mark.parametrize("content", [b"", b"not an image", damaged()[:50]])
def test_what_is_no_image_is_refused(
    box: Sandbox, untouched: Callable[[bytes], None], content: bytes
) -> None:
    box.put(content)
    outcome = box.repair()
    assert outcome.status is Status.REFUSED
    assert outcome.error is not None
    assert outcome.reason == str(outcome.error)
    assert isinstance(outcome.error, NotQcow2) is (len(content) < 50)
    untouched(content)


# ---- quoting a plan ----


@pytest.mark.parametrize("name", ["lost-l2-table", "lost-snapshot"])
def test_what_looks_lost_is_not_buried_unless_the_plan_is_quoted(
    box: Sandbox, untouched: Callable[[bytes], None], name: str
) -> None:
    content = box.put(damaged(name))
    outcome = box.repair(LEAKS)
    assert outcome.status is Status.REFUSED
    assert isinstance(outcome.error, AmbiguousCorruption)
    assert outcome.error.errno == errno.EUCLEAN
    assert "looks like" in outcome.reason
    assert f"quote the plan: leaks {outcome.plan_id}" in outcome.reason
    assert outcome.left_count == outcome.found > 0
    untouched(content)
    again = box.repair(LEAKS, outcome.plan_id[:6])
    assert again.status is Status.REPAIRED
    assert box.read() == repaired(LEAKS, content)


def test_a_plan_that_is_not_the_one_quoted_is_refused(
    box: Sandbox, untouched: Callable[[bytes], None]
) -> None:
    content = box.put(damaged("leaked-clusters"))
    for quote in ("000000", "x" * 12):
        outcome = box.repair(LEAKS, quote)
        assert isinstance(outcome.error, PlanStale)
        assert outcome.error.errno == errno.ESTALE
        assert outcome.plan_id in outcome.reason
    untouched(content)
    quote = outcome.plan_id
    assert box.repair(LEAKS, quote).status is Status.REPAIRED
    # What was reviewed has been done: now it is another plan, which does nothing.
    assert isinstance(box.repair(LEAKS, quote).error, PlanStale)


# ---- who else has the image ----

STRANGERS = [
    locks.READ_ONLY,
    locks.READ_WRITE,
    Access((Permission.CONSISTENT_READ, Permission.WRITE), ()),
    Access((), (Permission.CONSISTENT_READ,)),
]


@pytest.mark.parametrize("access", STRANGERS)
@pytest.mark.parametrize("work", [Sandbox.repair, Sandbox.undo, Sandbox.trim])
def test_an_image_in_use_is_not_written_to(
    box: Sandbox,
    untouched: Callable[[bytes], None],
    access: Access,
    work: Callable[[Sandbox], RepairOutcome],
) -> None:
    content = box.put(damaged("leaked-clusters"))
    stranger = os.open(box.path, os.O_RDWR)
    try:
        with locks.held(stranger, "image", access):
            outcome = work(box)
    finally:
        os.close(stranger)
    assert outcome.status is Status.REFUSED
    assert isinstance(outcome.error, ImageInUse)
    assert outcome.error.errno == errno.EBUSY
    untouched(content)
    assert box.names() == {box.path.name}


def test_a_reader_that_shares_everything_is_no_obstacle(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    stranger = os.open(box.path, os.O_RDONLY)
    try:
        with locks.held(stranger, "image", locks.FORCE_SHARE):
            assert box.repair(LEAKS).status is Status.REPAIRED
    finally:
        os.close(stranger)


def test_while_a_repair_runs_qemu_refuses_the_image(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    answers: dict[str, str] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in answers:
            command = ["qemu-img", "check", str(box.path)]
            done_by_qemu = subprocess.run(command, capture_output=True, text=True, check=False)
            answers[stage] = done_by_qemu.stderr

    box.repair(LEAKS, progress=progress)
    assert "writing" in answers
    assert all('Failed to get shared "write" lock' in answer for answer in answers.values())
    assert qemu_check(box.path) == 0


def test_the_locks_are_held_from_the_first_check_to_the_last(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    stranger = os.open(box.path, os.O_RDONLY)
    refused: list[bool] = []

    def check(source: Source, **_options: object) -> Report:
        try:
            with locks.held(stranger, "image"):
                refused.append(False)
        except ImageInUse:
            refused.append(True)
        return cached_check(source)

    try:
        assert box.repair(LEAKS, check=check).status is Status.REPAIRED
        assert refused == [True, True]
        with locks.held(stranger, "image"):
            pass
    finally:
        os.close(stranger)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ETXTBSY])
def test_an_image_that_cannot_be_opened_for_writing(
    box: Sandbox, untouched: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    content = box.put(damaged("leaked-clusters"))
    whole = os.open

    def refuse(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(code, os.strerror(code))
        return whole(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    outcome = box.repair(LEAKS)
    assert isinstance(outcome.error, ImageReadOnly)
    assert outcome.error.errno == errno.EROFS
    assert os.strerror(code) in outcome.reason
    untouched(content)


def test_an_image_that_was_replaced_or_deleted(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    other = box.path.with_name("other")
    with box.open() as image:
        other.write_bytes(damaged("leaked-clusters"))
        other.rename(box.path)
        outcome = Repairer(image).repair(LEAKS)
        assert isinstance(outcome.error, ImageReplaced)
        assert outcome.error.errno == errno.ESTALE
        box.path.unlink()
        outcome = Repairer(image).repair(LEAKS)
        assert isinstance(outcome.error, ImageDeleted)


def test_an_image_behind_a_link_has_its_undo_file_beside_the_file(
    box: Sandbox, tmp_path: Path
) -> None:
    content = box.put(damaged("leaked-clusters"))
    links = tmp_path / "links"
    links.mkdir()
    (links / "image").symlink_to("../disk.qcow2")
    linked = Sandbox(links / "image")
    outcome = linked.repair(LEAKS)
    assert outcome.undo_file == str(box.undo_path)
    assert linked.names() == {"image"}
    assert box.undo().status is Status.UNDONE
    assert box.read() == content


# ---- the undo file ----


def test_where_no_undo_file_can_be_made_nothing_is_written(
    box: Sandbox, untouched: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = box.put(damaged("leaked-clusters"))

    def refuse(place: UndoPlace) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(UndoPlace, "make", refuse)
    outcome = box.repair(LEAKS)
    assert outcome.status is Status.REFUSED
    assert isinstance(outcome.error, UndoFileImpossible)
    assert outcome.error.errno == errno.EUCLEAN
    untouched(content)
    # Without one it can be repaired, and what fails is put back all the same.
    for number in range(2):
        outcome = box.repair(LEAKS, keep_undo=False, device=failing(once(number, EIO)))
        assert outcome.status is Status.ROLLED_BACK
        assert box.read() == content
    outcome = box.repair(LEAKS, keep_undo=False, device=failing(from_then_on(1, EIO)))
    assert isinstance(outcome.error, PutBackFailed)
    assert "no undo file was kept" in outcome.reason
    box.put(content)
    outcome = box.repair(LEAKS, keep_undo=False)
    assert outcome.status is Status.REPAIRED
    assert outcome.undo_file == ""
    assert box.names() == {box.path.name}


def test_without_undo_none_is_kept(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    outcome = box.repair(LEAKS, keep_undo=False)
    assert outcome.status is Status.REPAIRED
    assert outcome.undo_file == ""
    assert box.names() == {box.path.name}
    assert isinstance(box.undo().error, UndoFileMissing)


def test_after_a_repair_without_undo_nothing_before_it_is_taken_back(
    box: Sandbox, untouched: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there was no space to keep its way back while it ran."""
    for has_space in (True, False):
        box.put(damaged("leaked-clusters", "dirty-bit"))
        box.undo_path.unlink(missing_ok=True)
        assert box.repair(LEAKS).status is Status.REPAIRED
        record = box.undo_path.read_bytes()[BODY_AT:]
        with monkeypatch.context() as patch:
            if not has_space:
                patch.setattr(Journal, "_append", no_space)
            assert box.repair(ALL, keep_undo=False, device=failing(once(1, EIO))).error
            assert box.undo_state() is State.APPLIED, "that one was put back"
            outcome = box.repair(ALL, keep_undo=False)
        assert (outcome.status, outcome.undo_file) == (Status.REPAIRED, "")
        content = box.put(box.read())
        for _ in range(2):
            outcome = box.undo()
            assert isinstance(outcome.error, UndoSealed)
            assert outcome.error.errno == errno.ESTALE
        untouched(content)
        assert box.undo_path.read_bytes()[BODY_AT:] == record, "what was kept is not thrown away"
        box.put(damaged("leaked-clusters", content=content))
        assert box.repair(LEAKS).undoable == 1
        outcome = box.undo()
        assert outcome.status is Status.UNDONE
        assert "--no-undo: it cannot be taken back" in outcome.reason
        assert isinstance(box.undo().error, UndoSealed)


def no_space(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_seal(journal: Journal) -> None:
    raise UndoFileFull(journal.file, "No space left on device")


def test_where_not_even_that_can_be_said_it_is_not_repaired(
    box: Sandbox, untouched: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    box.put(damaged("leaked-clusters", "dirty-bit"))
    assert box.repair(LEAKS).status is Status.REPAIRED
    content = box.put(box.read())
    monkeypatch.setattr(Journal, "_append", no_space)
    monkeypatch.setattr(Journal, "seal", no_seal)
    assert isinstance(box.repair(ALL, keep_undo=False).error, UndoFileFull)
    untouched(content)


STEPS = [
    ("leaked-clusters", LEAKS),
    ("missing-refcount", ALL),
    ("wrong-copied", ALL),
    ("lost-refblock", ALL),
    ("dirty-bit", ALL),
]


def repair_often(box: Sandbox) -> list[bytes]:
    """One repair after the other, of new damage each time; the image before each, and after all."""
    box.put(healthy())
    states = []
    for name, tier in STEPS:
        states.append(box.put(damaged(name, content=box.read())))
        outcome = box.repair(tier)
        assert outcome.status is Status.REPAIRED, outcome.reason
        # What was done to the image in between the repair below does not fit.
        assert (outcome.undoable, outcome.stale) == (1, int(len(states) > 1))
    return [*states, box.read()]


def test_repairs_are_taken_back_one_by_one_to_the_first_byte(box: Sandbox) -> None:
    """Of an image that only repairs wrote to."""
    content = box.put(damaged("leaked-clusters", "dirty-bit", "wrong-copied"))
    states = [content]
    for quote in (LEAKS, ALL):
        assert box.repair(quote).status is Status.REPAIRED
        states.append(box.read())
    assert len(set(states)) == 3
    assert box.repair(ALL).undoable == 2, "also where there was nothing to do"
    assert box.repair(ALL, "000000").undoable == 2, "or it was refused"
    for left in (1, 0):
        outcome = box.undo()
        assert outcome.status is Status.UNDONE
        assert (outcome.undoable, outcome.reason) == (left, "")
        assert box.read() == states[left]
    assert box.names() == {box.path.name}
    outcome = box.undo()
    assert isinstance(outcome.error, UndoFileMissing)
    assert outcome.error.errno == errno.ENODATA


def test_each_of_many_is_taken_back_though_others_wrote_in_between(box: Sandbox) -> None:
    """Once the image is again as a repair left it; and until then nothing is, and that is said."""
    states = repair_often(box)
    for number in range(len(STEPS) - 1, -1, -1):
        outcome = box.undo()
        assert outcome.status is Status.UNDONE
        assert box.read() == states[number]
        assert ("may hold other bytes now" in outcome.reason) == (number < len(STEPS) - 1)
        if number:
            assert (outcome.undoable, "written to" in outcome.reason) == (0, True)
            content = box.put(repaired(STEPS[number - 1][1], states[number - 1]))
            assert content != states[number]
    assert box.names() == {box.path.name}


def test_an_interrupted_repair_leaves_those_before_it(box: Sandbox) -> None:
    content = damaged("lost-refblock", content=repair_often(box)[-1])
    count = operations(box, ALL, content)
    box.undo_path.unlink(missing_ok=True)
    states = repair_often(box)
    for number in range(1, count):
        box.put(content)
        box.repair(ALL, device=failing(from_then_on(number, EIO)))
        outcome = box.undo()
        assert outcome.recovered
        assert box.read() == content
        with box.open() as image, UndoPlace.beside(image) as place:
            summary = read_summary(place)
        assert summary
        assert (summary.status.state, summary.status.depth) == (State.APPLIED, 1)
    box.put(states[-1])
    assert box.undo().status is Status.UNDONE
    assert box.read() == states[-2]


def test_a_machine_that_wrote_to_what_was_freed_is_not_hidden(box: Sandbox) -> None:
    """It discards again what it wrote, and all tables are as the repair left them."""
    content = box.put(damaged("leaked-clusters", content=filled()))
    box.repair(LEAKS)
    [first, *_] = free_clusters(box.read()) - free_clusters(content)
    with box.path.open("r+b") as file:
        file.seek(first * SIZE)
        file.write(b"\0" * SIZE)
    outcome = box.undo()
    assert outcome.status is Status.UNDONE
    assert "what the repair had changed is as it was before" in outcome.reason
    assert "may hold other bytes now" in outcome.reason
    assert box.read() != content


def test_an_undo_file_elsewhere(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "undo").mkdir()
    box.undo_path = tmp_path / "undo" / "any name"
    box.is_named = True
    content = box.put(damaged("leaked-clusters", "dirty-bit"))
    for tier in (LEAKS, ALL):
        outcome = box.repair(tier)
        assert (outcome.status, outcome.undo_file) == (Status.REPAIRED, str(box.undo_path))
    assert box.names() == {box.path.name, "undo"}
    box.is_named = False
    assert isinstance(box.undo().error, UndoFileMissing)
    box.is_named = True
    assert [box.undo().status for _ in range(2)] == [Status.UNDONE] * 2
    assert box.read() == content
    assert not box.undo_path.exists()


@pytest.mark.parametrize("work", [Sandbox.repair, Sandbox.undo, Sandbox.trim])
def test_an_image_has_one_undo_file(
    box: Sandbox,
    untouched: Callable[[bytes], None],
    tmp_path: Path,
    work: Callable[[Sandbox], RepairOutcome],
) -> None:
    box.put(damaged("leaked-clusters", "dirty-bit"))
    box.repair(LEAKS)
    content, beside = box.put(box.read()), box.undo_path
    box.is_named, box.undo_path = True, tmp_path / "another"
    outcome = work(box)
    assert isinstance(outcome.error, UndoFileElsewhere)
    assert str(beside) in outcome.reason
    untouched(content)
    beside.rename(box.undo_path)  # as that says
    assert box.repair(ALL).status is Status.REPAIRED
    assert [box.undo().status for _ in range(2)] == [Status.UNDONE] * 2


def test_an_undo_file_that_is_named_holds_the_repairs_of_one_image(
    box: Sandbox, tmp_path: Path, untouched: Callable[[bytes], None]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Sandbox(tmp_path / "elsewhere" / "other.qcow2")
    box.undo_path = other.undo_path = tmp_path / "undo"
    box.is_named = other.is_named = True
    other.put(damaged("leaked-clusters"))
    assert other.repair(LEAKS).status is Status.REPAIRED
    content = box.put(damaged("missing-refcount"))
    for keep_undo in (True, False):
        outcome = box.repair(ALL, keep_undo=keep_undo)
        assert isinstance(outcome.error, UndoFileTaken)
        assert "of another file, and do not fit this one" in outcome.reason
    untouched(content)
    assert other.undo().status is Status.UNDONE


def test_an_image_without_a_name_of_its_own_is_refused(tmp_path: Path) -> None:
    """What lies beside a descriptor lies nowhere."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(damaged("leaked-clusters"))
    with path.open("r+b") as file:
        through = Sandbox(Path(f"/proc/self/fd/{file.fileno()}"))
        assert through.repair(LEAKS).undo_file == f"{path}{SUFFIX}", "its name is known"
        assert through.undo().status is Status.UNDONE
        path.unlink()
        before = set(tmp_path.iterdir()), set(Path("/").iterdir())
        for work in (through.repair, through.undo, through.trim):
            outcome = work()
            assert isinstance(outcome.error, ImageNameless)
            assert "\n" not in outcome.reason
        assert (set(tmp_path.iterdir()), set(Path("/").iterdir())) == before
        through.is_named, through.undo_path = True, tmp_path / "undo"
        assert through.repair(LEAKS).status is Status.REPAIRED
        assert through.undo().status is Status.UNDONE
        file.seek(0)
        assert file.read() == damaged("leaked-clusters")


def test_an_image_with_two_names_is_repaired_where_it_is_said_which_undo_file(
    box: Sandbox, tmp_path: Path, untouched: Callable[[bytes], None]
) -> None:
    content = box.put(damaged("leaked-clusters", "dirty-bit"))
    other = Sandbox(tmp_path / "other.qcow2")
    other.path.hardlink_to(box.path)
    for each in (box, other):
        assert isinstance(each.repair(LEAKS).error, UndoFileAmbiguous)
        outcome = each.undo()
        assert isinstance(outcome.error, UndoFileMissing)
        assert "2 names (hard links): it may lie beside another" in outcome.reason
    untouched(content)
    for each, tier in ((box, LEAKS), (other, ALL)):
        each.is_named, each.undo_path = True, tmp_path / "undo"
        assert each.repair(tier).status is Status.REPAIRED
    assert [each.undo().status for each in (box, other)] == [Status.UNDONE] * 2
    assert box.read() == content


def test_without_an_undo_file_there_is_nothing_to_undo(
    box: Sandbox, untouched: Callable[[bytes], None]
) -> None:
    content = box.put(damaged())
    outcome = box.undo()
    assert isinstance(outcome.error, UndoFileMissing)
    assert outcome.error.errno == errno.ENODATA
    untouched(content)


@pytest.mark.parametrize("undo_file", [b"\0", b"damaged" * 1000])
@pytest.mark.parametrize("work", [Sandbox.repair, Sandbox.undo, Sandbox.trim])
def test_a_damaged_undo_file_comes_first_for_it_may_be_the_only_way_back(
    box: Sandbox,
    untouched: Callable[[bytes], None],
    undo_file: bytes,
    work: Callable[[Sandbox], RepairOutcome],
) -> None:
    content = box.put(damaged("leaked-clusters"))
    box.undo_path.write_bytes(undo_file)
    outcome = work(box)
    assert outcome.status is Status.REFUSED
    assert isinstance(outcome.error, UndoFileDamaged)
    untouched(content)
    assert box.undo_path.read_bytes() == undo_file


def test_a_cut_off_undo_file_changes_nothing(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    box.repair(LEAKS)
    after, whole = box.read(), box.undo_path.read_bytes()
    for length in range(0, len(whole), 311):
        box.undo_path.write_bytes(whole[:length])
        assert isinstance(box.undo().error, UndoFileDamaged if length else UndoEmpty)
    assert box.read() == after


def test_the_undo_file_of_another_image_changes_nothing(
    box: Sandbox, tmp_path: Path, untouched: Callable[[bytes], None]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = Sandbox(tmp_path / "elsewhere" / "other.qcow2")
    other.put(damaged("leaked-clusters"))
    other.repair(LEAKS)
    content = box.put(damaged("missing-refcount"))
    shutil.copy2(other.undo_path, box.undo_path)
    outcome = box.undo()
    assert isinstance(outcome.error, UndoStale)
    untouched(content)
    # Nor is the way back of this one put on top of that of the other.
    assert isinstance(box.repair(ALL).error, UndoFileTaken)
    untouched(content)
    box.undo_path.unlink()
    assert box.repair(ALL).status is Status.REPAIRED
    assert box.undo().status is Status.UNDONE
    assert box.read() == content


def test_an_image_that_was_copied_with_its_undo_file_can_be_undone_there(
    box: Sandbox, tmp_path: Path
) -> None:
    content = box.put(damaged("lost-refblock"))
    box.repair(ALL)
    (tmp_path / "elsewhere").mkdir()
    copy = Sandbox(tmp_path / "elsewhere" / "renamed.img")
    shutil.copy2(box.path, copy.path)
    shutil.copy2(box.undo_path, copy.undo_path)
    assert copy.undo().status is Status.UNDONE
    assert copy.read() == content


def change_sector(content: bytearray) -> None:
    block = Made(content).refblock(0)
    content[block + 1] ^= 1


def change_elsewhere(content: bytearray) -> None:
    """As a guest's write does that takes another host cluster: the repair's sectors stay."""
    made = Made(content)
    cluster = made.mapped(0)[-1]
    made.set_word(made.l2_at(cluster), 0)


def change_header(content: bytearray) -> None:
    """As the setting of lazy refcounts does, which no check counts."""
    content[87] ^= 1


def grow(content: bytearray) -> None:
    content += bytes(SIZE)


@pytest.mark.parametrize("change", [change_sector, change_elsewhere, change_header, grow])
def test_an_image_that_was_written_to_since_is_not_undone(
    box: Sandbox,
    untouched: Callable[[bytes], None],
    change: Callable[[bytearray], None],
) -> None:
    box.put(damaged("leaked-clusters"))
    box.repair(LEAKS)
    content = bytearray(box.read())
    change(content)
    box.put(bytes(content))
    outcome = box.undo()
    assert outcome.status is Status.REFUSED
    assert isinstance(outcome.error, UndoStale)
    assert outcome.error.errno == errno.ESTALE
    assert box.undo_path.name in outcome.reason
    untouched(bytes(content))


def test_what_a_guest_wrote_into_its_own_clusters_does_not_hinder_undo(box: Sandbox) -> None:
    content = bytearray(box.put(damaged("leaked-clusters")))
    box.repair(LEAKS)
    after = bytearray(box.read())
    at = Made(after).host_offset(Made(after).mapped(0)[0])
    for each in (content, after):
        each[at : at + SIZE] = b"\x77" * SIZE
    box.put(bytes(after))
    assert box.undo().status is Status.UNDONE
    assert box.read() == bytes(content)


# ---- failing ----


def operations(box: Sandbox, tier: RepairTier, content: bytes) -> int:
    made: list[WatchedDevice] = []

    def watched(fd: int, name: str) -> WatchedDevice:
        made.append(WatchedDevice(fd, name))
        return made[0]

    box.put(content)
    assert box.repair(tier, device=watched).error is None
    box.undo_path.unlink()
    return len(made[0].log)


@pytest.mark.parametrize(("tier", "name"), [(LEAKS, "leaked-clusters"), (ALL, "lost-refblock")])
@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (EIO, RepairWriteFailed),
        (ENOSPC, RepairNoSpace),
        (SHORT, RepairWriteFailed),
        (ENOMEM, NotEnoughMemory),
    ],
)
def test_whatever_write_or_flush_fails_the_image_is_put_back(
    box: Sandbox, tier: RepairTier, name: str, failure: Failure, kind: type[Exception]
) -> None:
    content = damaged(name)
    count = operations(box, tier, content)
    for number in range(count):
        box.put(content)
        outcome = box.repair(tier, device=failing(once(number, failure)))
        assert outcome.status is Status.ROLLED_BACK
        assert isinstance(outcome.error, kind)
        assert (outcome.repaired, outcome.left_count) == (0, outcome.found)
        assert outcome.planned > 0
        assert box.read() == content
        assert box.names() == {box.path.name}


def fail_at(
    number: int, module: ModuleType, name: str, folder: Path, patch: pytest.MonkeyPatch
) -> list[int]:
    """Have the nth such call fail that is about an open file in *folder*, as over a network.

    Returns what has an element for each call that was made.
    """
    real, calls = getattr(module, name), []

    def call(fd: int, *arguments: object) -> object:
        is_asked = Path(f"/proc/self/fd/{fd}").readlink().parent == folder
        done = real(fd, *arguments)
        if is_asked:
            calls.append(fd)
            if len(calls) == number:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return done

    patch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize(
    ("module", "name"), [(os, "fstat"), (os, "lseek"), (os, "close"), (fcntl, "fcntl")]
)
@pytest.mark.parametrize("work", ["repair", "undo"])
def test_whichever_question_to_the_file_system_fails_it_is_said_what_became_of_the_image(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, work: str, module: ModuleType, name: str
) -> None:
    content = damaged("leaked-clusters")
    mended = repaired(LEAKS, content)
    for number in itertools.count(1):
        box.undo_path.unlink(missing_ok=True)
        box.put(content)
        if work == "undo":
            box.repair(LEAKS)
        with monkeypatch.context() as patch:
            calls = fail_at(number, module, name, box.path.parent, patch)
            try:
                outcome = box.repair(LEAKS) if work == "repair" else box.undo()
            except InstarfsError as error:  # there is no image to open
                outcome = RepairOutcome(error=error)
        is_done = outcome.status in (Status.REPAIRED, Status.UNDONE)
        assert (outcome.error is None) == is_done
        assert box.read() == (mended if is_done == (work == "repair") else content)
        if box.read() == mended:
            assert box.undo().status is Status.UNDONE
        assert box.read() == content
        if len(calls) < number:
            break
    assert is_done
    assert number > 3


@pytest.mark.parametrize(("tier", "name"), [(LEAKS, "leaked-clusters"), (ALL, "lost-refblock")])
@pytest.mark.parametrize("finish", [Sandbox.repair, Sandbox.undo])
def test_where_putting_back_fails_the_undo_file_stays_and_the_next_one_finishes(
    box: Sandbox,
    tier: RepairTier,
    name: str,
    finish: Callable[[Sandbox], RepairOutcome],
) -> None:
    content = damaged(name)
    for number in range(1, operations(box, tier, content)):
        box.put(content)
        outcome = box.repair(tier, device=failing(from_then_on(number, EIO)))
        assert outcome.status is Status.INTERRUPTED
        assert isinstance(outcome.error, PutBackFailed)
        assert outcome.after is None
        with box.open() as image:
            found = pending(image)
        assert found is not None
        assert (found.tier, found.plan_id) == (tier, outcome.plan_id)
        assert found.undo_file == str(box.undo_path)
        assert "interrupted" in found.sentence
        assert isinstance(box.trim().error, RepairInterrupted)
        again = finish(box)
        assert again.error is None
        assert again.recovered
        undone = finish is Sandbox.undo
        assert box.read() == (content if undone else repaired(ALL, content))
        box.undo_path.unlink(missing_ok=True)


@pytest.mark.parametrize("work", [Sandbox.repair, Sandbox.undo])
def test_what_was_put_back_is_said_to_be_also_where_its_undo_file_stays(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, work: Callable[[Sandbox], RepairOutcome]
) -> None:
    content = box.put(damaged("lost-refblock"))
    box.repair(ALL, device=failing(from_then_on(6, EIO)))

    def fail(journal: Journal, _mtime_ns: int) -> None:
        raise UndoFileFailed(journal.file, "Input/output error")

    monkeypatch.setattr(Journal, "drop", fail)
    outcome = work(box)
    assert box.read() == content
    assert outcome.recovered
    assert "cannot be brought up to date" in outcome.reason
    is_undo = work is Sandbox.undo
    assert outcome.status is (Status.UNDONE if is_undo else Status.REFUSED)
    assert (outcome.error is None) == is_undo


def test_a_failed_repair_leaves_the_undo_file_of_the_one_before(box: Sandbox) -> None:
    content = box.put(damaged("leaked-clusters", "dirty-bit"))
    box.repair(LEAKS)
    between = box.read()
    assert box.repair(ALL, device=failing(once(1, EIO))).status is Status.ROLLED_BACK
    assert box.read() == between
    assert box.repair(ALL, device=failing(from_then_on(1, EIO))).status is Status.INTERRUPTED
    recovered = box.undo()
    assert recovered.recovered
    assert box.read() == between
    assert box.undo().status is Status.UNDONE
    assert box.read() == content
    assert box.names() == {box.path.name}


def test_an_interrupted_repair_of_an_image_that_was_written_to_since_is_left_alone(
    box: Sandbox, untouched: Callable[[bytes], None]
) -> None:
    box.put(damaged("lost-refblock"))
    box.repair(ALL, device=failing(from_then_on(6, EIO)))
    content = bytearray(box.read())
    content[60] ^= 1
    box.put(bytes(content))
    for work in (box.repair, box.undo):
        outcome = work()
        assert isinstance(outcome.error, UndoStale)
        assert "changed" in outcome.reason
    untouched(bytes(content))
    assert box.undo_state() is State.APPLYING


def test_an_undo_that_fails_leaves_the_repair_and_one_that_dies_is_finished(box: Sandbox) -> None:
    content = box.put(damaged("lost-refblock"))
    box.repair(ALL)
    after = box.read()
    for number in range(8):
        outcome = box.undo(device=failing(once(number, EIO)))
        assert outcome.status is Status.ROLLED_BACK
        assert isinstance(outcome.error, RepairWriteFailed)
        assert box.read() == after
        assert box.undo_state() is State.APPLIED
    assert box.undo(device=failing(from_then_on(3, EIO))).status is Status.INTERRUPTED
    assert box.undo_state() is State.APPLYING
    outcome = box.undo()
    assert outcome.status is Status.UNDONE
    assert outcome.recovered
    assert box.read() == content


def test_what_was_undone_is_said_to_be_also_where_it_cannot_be_checked_then(box: Sandbox) -> None:
    content = box.put(damaged("leaked-clusters"))
    assert box.repair(LEAKS).status is Status.REPAIRED

    def check(source: Source, **options: object) -> Report:
        if isinstance(source, Overlay):
            return cached_check(source, **options)  # type: ignore[arg-type]
        raise ImageReadFailed(str(box.path), 0, "Input/output error")

    outcome = box.undo(check=check)
    assert (outcome.status, outcome.error) == (Status.UNDONE, None)
    assert "reading at offset 0 failed: Input/output error" in outcome.reason
    assert box.read() == content
    assert box.names() == {box.path.name}


def test_an_image_that_is_not_what_was_proven_is_put_back(box: Sandbox) -> None:
    content = box.put(damaged("leaked-clusters"))
    written: list[bool] = []

    def check(source: object, **options: object) -> Report:
        report = check_image(source, **options)  # type: ignore[arg-type]
        if not written:
            return report
        return replace(report, counters=replace(report.counters, leaks=1))

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "writing":
            written.append(True)

    outcome = box.repair(LEAKS, check=check, progress=progress)
    assert outcome.status is Status.ROLLED_BACK
    assert isinstance(outcome.error, RepairUnproven)
    assert box.read() == content
    assert box.names() == {box.path.name}


def test_where_the_state_cannot_be_made_durable_the_image_is_put_back(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = box.put(damaged("leaked-clusters"))

    def fail(journal: Journal, state: State, mtime_ns: int) -> None:
        raise UndoFileFailed(journal.file, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "advance", fail)
        outcome = box.repair(LEAKS)
    assert outcome.status is Status.ROLLED_BACK
    assert isinstance(outcome.error, UndoFileFailed)
    assert outcome.reason == (
        f"{box.undo_path}: the undo file cannot be brought up to date: Input/output error; the"
        " repair was taken back, and the image is as it was before it: look at the disk beneath it"
        " (dmesg)"
    )
    assert box.read() == content
    assert box.names() == {box.path.name}
    assert box.repair(LEAKS).status is Status.REPAIRED


def _is_used_up(calls: Iterator[int]) -> bool:
    return next(calls, None) is None


def test_a_repair_can_be_cancelled_at_any_point(box: Sandbox) -> None:
    content, statuses = damaged("lost-refblock"), []
    for number in range(0, 10_000, 3):
        box.put(content)
        calls = iter(range(number))
        outcome = box.repair(
            ALL,
            progress=unless(partial(_is_used_up, calls)),
            check=check_image,
            propose=propose,
        )
        if outcome.error is None:
            break
        statuses.append(outcome.status)
        assert isinstance(outcome.error, RepairCancelled)
        assert box.read() == content
        assert box.names() == {box.path.name}
    assert set(statuses) == {Status.REFUSED, Status.ROLLED_BACK}
    assert statuses == sorted(statuses, key=[Status.REFUSED, Status.ROLLED_BACK].index)


def test_a_bug_leaves_the_image_as_it_was_and_is_not_hidden(box: Sandbox) -> None:
    content = box.put(damaged("leaked-clusters"))

    def explode(stage: str, done: int, total: int) -> None:
        if stage == "writing" and done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        box.repair(LEAKS, progress=explode)
    assert box.read() == content
    assert box.names() == {box.path.name}
    assert box.repair(LEAKS).status is Status.REPAIRED


@pytest.mark.parametrize("work", [Sandbox.repair, Sandbox.undo])
@pytest.mark.parametrize("number", range(8))
def test_an_interrupt_that_hits_the_putting_back_too_leaves_the_way_back(
    box: Sandbox, work: Callable[..., RepairOutcome], number: int
) -> None:
    """As a second Ctrl-C does: the undo file must not go before the image is what it was."""
    content = box.put(damaged("lost-refblock"))
    if work is Sandbox.undo:
        box.repair(ALL)

    def interrupt(at: int, _operation: object) -> None:
        if at >= number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(box, device=failing(interrupt))
    assert box.undo_state() in (State.APPLYING, State.APPLIED, None)
    outcome = box.undo()
    assert box.read() == content
    assert outcome.error is None or isinstance(outcome.error, UndoFileMissing)


def test_descriptors_and_locks_are_let_go(box: Sandbox) -> None:
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    box.put(damaged("leaked-clusters"))
    box.repair(LEAKS, device=failing(once(0, EIO)))
    for work in (box.repair, box.repair, box.trim, box.undo, box.undo):
        work()
    assert len(list(descriptors.iterdir())) == before
    assert qemu_check(box.path) == 3


# ---- pending ----


def test_nothing_is_pending_where_nothing_was_interrupted(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.put(damaged("leaked-clusters"))
    with box.open() as image:
        assert pending(image) is None
        box.repair(LEAKS)
        assert pending(image) is None
        box.undo()
        assert pending(image) is None


def test_a_repair_under_way_is_not_an_interrupted_one(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    seen: list[object] = []
    with box.open() as image:

        def progress(stage: str, done: int, total: int) -> None:
            if stage == "writing":
                assert box.undo_path.exists()
                seen.append(pending(image))

        Repairer(image, progress=progress).repair(LEAKS)
    assert seen
    assert set(seen) == {None}


def begun(box: Sandbox) -> None:
    """Have its undo file say what it does while a repair is under way, and when one was left so."""
    box.put(damaged("leaked-clusters"))
    failed = box.repair(LEAKS, device=failing(from_then_on(1, EIO)))
    assert failed.status is Status.INTERRUPTED


def test_a_repair_that_begins_as_its_undo_file_is_looked_at_is_no_interrupted_one(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(box)
    is_written = iter((False, True))
    monkeypatch.setattr(locks, "is_written", lambda *_: next(is_written))
    with box.open() as image:
        assert pending(image) is None


def test_nor_is_one_that_has_ended_by_then(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(box)
    asked: list[int] = []

    def is_written(fd: int, _path: str) -> bool:
        asked.append(fd)
        if len(asked) == 2:
            with monkeypatch.context() as real:
                real.setattr(locks, "is_written", whole)
                assert box.undo().error is None
        return False

    whole = locks.is_written
    monkeypatch.setattr(locks, "is_written", is_written)
    with box.open() as image:
        assert pending(image) is None
    assert len(asked) == 2


def test_a_damaged_undo_file_is_shown_and_so_is_one_that_may_not_be_read(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.put(damaged())
    box.undo_path.write_bytes(b"damaged")
    with box.open() as image:
        found = pending(image)
        assert found is not None
        assert "no undo file" in found.sentence
        assert found.tier is None
        whole = os.open

        def refuse(path: str, *args: int, **kwargs: int) -> int:
            # What was looked at is opened by its descriptor.
            if Path(path).resolve().name == box.undo_path.name and not args[0] & os.O_PATH:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return whole(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuse)
        found = pending(image)
        assert found is not None
        assert found.sentence.endswith("run as its owner, or as root")


# ---- trim ----


def free_clusters(content: bytes) -> set[int]:
    made = Made(bytearray(content))
    return {cluster for cluster, count in enumerate(made.refcounts()) if not count}


@cache
def filled() -> bytes:
    """The healthy image with something in every free cluster."""
    content = bytearray(healthy())
    for cluster in free_clusters(healthy()):
        content[cluster * SIZE : (cluster + 1) * SIZE] = b"\x55" * SIZE
    return bytes(content)


def test_trim_gives_back_what_is_free_and_nothing_else(box: Sandbox) -> None:
    content = box.put(filled())
    blocks = box.path.stat().st_blocks
    told: list[str] = []
    outcome = box.trim(progress=lambda stage, done, total: told.append(stage))
    assert outcome.status is Status.TRIMMED
    assert outcome.error is None
    assert outcome.trimmed == (blocks - box.path.stat().st_blocks) * 512 > 0
    assert outcome.reason == "what the free clusters held is gone"
    assert "trimming" in told
    after, free = box.read(), free_clusters(content)
    assert len(free) > 5
    for cluster in range(len(content) // SIZE):
        part = slice(cluster * SIZE, (cluster + 1) * SIZE)
        assert after[part] == (bytes(SIZE) if cluster in free else content[part])
    assert qemu_check(box.path) == 0
    again = box.trim()
    assert (again.status, again.trimmed) == (Status.NOTHING_TO_DO, 0)
    assert again.reason == "the free clusters took up no disk space"


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("leaked-clusters", "leaks"),
        ("missing-refcount", "corrupt"),
        ("shared-cluster", "corrupt"),
        ("dirty-bit", "dirty"),
        ("corrupt-bit", "marked-corrupt"),
        ("bad-bitmap-entry", "incomplete"),
    ],
)
def test_only_a_clean_image_is_trimmed(
    box: Sandbox, untouched: Callable[[bytes], None], name: str, verdict: str
) -> None:
    content = box.put(damaged(name))
    outcome = box.trim()
    assert outcome.status is Status.REFUSED
    assert isinstance(outcome.error, TrimRefused)
    assert outcome.error.errno == errno.EUCLEAN
    assert verdict in outcome.reason
    untouched(content)


def written_over(content: bytes) -> bytes:
    """The metadata of a new disk over that of an old one, whose tables and data are free now."""
    new = ImageBuilder(cluster_bits=12, size=MIB).build()
    old = bytearray(content)
    return bytes(new.data) + bytes(8 * SIZE - len(new.data)) + bytes(old[8 * SIZE :])


def old_disk() -> bytes:
    builder = ImageBuilder(cluster_bits=12, size=MIB)
    builder.skip(8)
    builder.write(0, b"what somebody wrote" * 900)
    return bytes(builder.build().data)


def test_what_is_left_of_a_disk_that_was_written_over_is_not_trimmed_without_its_id(
    box: Sandbox, untouched: Callable[[bytes], None]
) -> None:
    content = box.put(written_over(old_disk()))
    assert check_image(Bytes(content)).verdict == "clean"
    outcome = box.trim()
    assert isinstance(outcome.error, TrimWouldBury)
    assert "free clusters look like L2 tables of the disk" in outcome.reason
    untouched(content)
    assert isinstance(box.trim("abcdef").error, TrimWouldBury)
    assert box.trim(outcome.error.id).status is Status.TRIMMED


def test_tables_that_a_repair_has_freed_are_trimmed(box: Sandbox) -> None:
    """Its plan's id was quoted: they were looked at then."""
    builder = ImageBuilder(cluster_bits=12, size=MIB)
    builder.write(0, b"what somebody wrote" * 900)
    image = builder.build()
    image.set_word(image.l1_at(0), 0)
    content = box.put(bytes(image.data))
    plan = propose(Bytes(content), check_image(Bytes(content)), RepairTier.LEAKS).plan
    assert box.repair(RepairTier.LEAKS, plan.id).status is Status.REPAIRED
    assert box.trim().status is Status.TRIMMED


def test_an_image_without_a_free_cluster_is_not_touched(
    box: Sandbox, untouched: Callable[[bytes], None]
) -> None:
    builder = ImageBuilder(cluster_bits=12, size=MIB)
    builder.write(0, b"x" * SIZE)
    content = box.put(bytes(builder.build().data))
    outcome = box.trim()
    assert outcome.status is Status.NOTHING_TO_DO
    untouched(content)


@pytest.mark.parametrize(("tier", "name"), UNDOABLE)
def test_after_a_trim_undo_brings_the_metadata_back_and_says_what_is_gone(
    box: Sandbox, tier: RepairTier, name: str
) -> None:
    content = box.put(damaged(name, content=filled()))
    before = check_image(Bytes(content))
    box.repair(tier)
    trimmed = box.trim()
    assert trimmed.status is Status.TRIMMED
    assert "does not bring that back" in trimmed.reason
    outcome = box.undo()
    assert outcome.status is Status.UNDONE
    assert "free clusters were trimmed after the repair" in outcome.reason
    after = box.read()
    assert check_image(Bytes(after)).counters == before.counters
    changed = {at // SIZE for at in range(len(content)) if after[at] != content[at]}
    # Of what was in use before the repair, nothing has changed.
    mismatches = before.mismatches
    assert mismatches is not None
    assert changed
    assert not any(int(mismatches.counted[cluster]) for cluster in changed)


def test_trim_keeps_the_refcounts_that_undo_would_need(box: Sandbox) -> None:
    """A rebuild frees the old blocks, sound ones too; after undo the image lives by them again."""
    builder = ImageBuilder(cluster_bits=9, size=MIB)
    for cluster in range(0, 600, 2):
        builder.write(cluster, b"x" * 512)
    content = box.put(damaged("lost-refblock", content=bytes(builder.build().data)))
    block = Made(bytearray(content)).refblock(1)
    assert any(content[block : block + 512])
    assert box.repair(ALL).status is Status.REPAIRED
    assert check_image(Bytes(box.read())).verdict == "clean"
    assert Made(bytearray(box.read())).refcount(block // 512) == 0
    box.trim()
    assert box.read()[block : block + 512] == content[block : block + 512]
    assert box.undo().status is Status.UNDONE
    assert check_image(Bytes(box.read())).counters == check_image(Bytes(content)).counters


def test_trim_without_anything_to_undo_says_nothing_about_undo(box: Sandbox) -> None:
    box.put(damaged("leaked-clusters"))
    box.repair(LEAKS)
    content = bytearray(box.read())
    change_elsewhere(content)
    box.put(bytes(content))
    quote = propose_bytes(bytes(content), LEAKS).plan.id
    assert box.repair(LEAKS, quote, keep_undo=False).status is Status.REPAIRED
    assert "undo" not in box.trim().reason


@pytest.mark.parametrize("code", [errno.EIO, errno.EOPNOTSUPP])
def test_a_trim_counts_what_was_punched(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Not what it was asked to, nor twice what is gone."""
    content = box.put(damaged("leaked-clusters", content=filled()))
    box.repair(LEAKS)
    before = box.read()

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(FileDevice, "punch_hole", refuse)
        for _ in range(3):
            assert isinstance(box.trim().error, TrimFailed | TrimUnsupported)
    assert box.read() == before
    first: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "trimming" and done:
            first.append(done)
            raise Cancelled

    assert isinstance(box.trim(progress=progress).error, TrimCancelled)
    assert trimmed(box) == first[0] > 0
    for _ in range(3):
        assert box.trim().error is None
    # Every cluster that was filled and is punched reads as zeros.
    after = box.read()
    gone = [at for at in range(0, len(after), SIZE) if after[at:][:SIZE] != before[at:][:SIZE]]
    assert trimmed(box) == len(gone) * SIZE
    outcome = box.undo()
    assert f"({len(gone) * SIZE} bytes of the file)" in outcome.reason
    assert box.read() != content


def trimmed(box: Sandbox) -> int:
    with box.open() as image, UndoPlace.beside(image) as place:
        summary = read_summary(place)
    assert summary
    return summary.status.trimmed


def test_trim_keeps_what_every_repair_before_needs(box: Sandbox) -> None:
    """Not only the last one: both are taken back, and the image lives by the old tables again."""
    builder = ImageBuilder(cluster_bits=9, size=MIB)
    for cluster in range(0, 600, 2):
        builder.write(cluster, b"x" * 512)
    builder.skip(3)
    builder.write(900, b"y" * 512)
    whole = bytes(builder.build().data)
    content = box.put(damaged("lost-l2-table", "lost-refblock", content=whole))
    between = []
    for tier in (ALL, LEAKS):  # which leaves what looks lost; and frees that, too
        between.append(check_image(Bytes(box.read())).counters)
        assert box.repair(tier, propose_bytes(box.read(), tier).plan.id).stands
    block = Made(bytearray(content)).refblock(1)
    assert Made(bytearray(box.read())).refcount(block // 512) == 0
    assert box.trim().status is Status.TRIMMED
    assert box.read()[block : block + 512] == content[block : block + 512]
    for counters in reversed(between):
        outcome = box.undo()
        assert outcome.status is Status.UNDONE, outcome.reason
        assert "trimmed" in outcome.reason
        assert check_image(Bytes(box.read())).counters == counters


def test_trim_can_be_cancelled(box: Sandbox) -> None:
    content = box.put(filled())
    calls: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "trimming" and done:
            calls.append(done)
            raise Cancelled

    outcome = box.trim(progress=progress)
    assert outcome.status is Status.REFUSED
    assert "only free clusters were touched" in outcome.reason
    assert len(calls) == 1
    assert check_image(Bytes(box.read())).verdict == "clean"
    assert box.read() != content


# ---- block devices ----


def test_a_block_device_is_repaired_without_an_undo_file_only(
    box: Sandbox, untouched: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A loop device needs root and a kernel module: here the image says that it is one.
    content = box.put(damaged("leaked-clusters"))
    with box.open() as image:
        monkeypatch.setattr(Image, "is_device", True)
        outcome = Repairer(image).repair(LEAKS)
        assert isinstance(outcome.error, UndoFileImpossible)
        assert "does not outlive a restart" in outcome.reason
        assert isinstance(Repairer(image).undo().error, UndoFileMissing)
        assert isinstance(Repairer(image).trim().error, TrimUnsupported)
        assert pending(image) is None
        untouched(content)
        outcome = Repairer(image, keep_undo=False, device=FileDevice).repair(LEAKS)
        assert outcome.status is Status.REPAIRED
    assert box.read() == repaired(LEAKS, content)
    assert box.names() == {box.path.name}


def test_a_block_device_can_be_undone_where_its_undo_file_has_a_place(
    box: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box.is_named, box.undo_path = True, tmp_path / "undo"
    content = box.put(damaged("leaked-clusters", "dirty-bit"))
    monkeypatch.setattr(Image, "is_device", True)
    for tier in (LEAKS, ALL):
        assert box.repair(tier, propose=propose).status is Status.REPAIRED
    outcomes = [box.undo() for _ in range(2)]
    assert [each.status for each in outcomes] == [Status.UNDONE] * 2
    assert "may hold other bytes" in outcomes[0].reason, "of a device nobody knows"
    assert box.read() == content
    assert not box.undo_path.exists()
