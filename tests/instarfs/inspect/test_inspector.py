"""instarfs.inspect.inspector: locks, generations and progress around a check that is not one."""

import contextlib
import errno
import gc
import itertools
import os
import random
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from instarfs.errors import ImageNotFollowed, ImageReadFailed, ReadCancelled
from instarfs.guest.place import Part, Place
from instarfs.image import locks
from instarfs.image.file import FileSource, Image
from instarfs.image.locks import Access, Permission, held
from instarfs.inspect import shared_value
from instarfs.inspect.inspector import KEPT_LOOKS, MAX_LOOKING, Inspector, inspecting
from instarfs.inspect.shared_value import Changed, Value, room_for_values
from instarfs.inspect.stages import IDLE
from instarfs.inspect.values import Leaks
from instarfs.repair.outcome import RepairOutcome, Status
from planner.check.report import Report
from planner.errors import NotQcow2, RepairError
from planner.progress import Progress
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal
from planner.source import Source
from tests.images.damage import DAMAGES
from tests.images.sample import sample

T = TypeVar("T")

DEADLINE = 10
KEPT = ("description", "checkup", "leaks", "briefing", "atlas", "bitmaps", "l1_page")
WRITER = Access((Permission.CONSISTENT_READ, Permission.WRITE), ())


def backdate(path: Path) -> None:
    """A file just written may be written again within the same tick of the clock; this one not."""
    os.utime(path, ns=(10**18, 10**18))


class FakeCheck:
    """Stands in for `check_image`: counts, waits at a gate, runs a hook in the middle."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.hook: Callable[[], None] = lambda: None
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, source: Source, *, progress: Progress) -> Report:
        self.sizes.append(source.size)
        progress("census", 43, 100)
        while not self.gate.wait(0.001):
            progress("census", 43, 100)
        self.hook()
        return Report(layout=None, error=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 1000)
    backdate(path)
    return path


@pytest.fixture
def check() -> FakeCheck:
    return FakeCheck()


@pytest.fixture
async def inspector(path: Path, check: FakeCheck, nursery: trio.Nursery) -> Inspector:
    return Inspector(Image.open(str(path)), nursery, check=check)


@pytest.fixture
def stranger(path: Path) -> Iterator[int]:
    """Somebody else's open file description of the image."""
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


async def report(inspector: Inspector) -> Report:
    with trio.fail_after(DEADLINE):
        return (await inspector.checkup.get()).value.report


async def test_checks_once_while_nothing_changes(inspector: Inspector, check: FakeCheck) -> None:
    first = await report(inspector)
    assert await report(inspector) is first
    assert (first.in_use, first.changed) == (False, False)
    assert check.sizes == [1000]


async def test_checks_again_after_writing_in_place(
    inspector: Inspector, check: FakeCheck, path: Path
) -> None:
    first = await report(inspector)
    with path.open("ab") as file:
        file.write(b"more")
    assert inspector.checkup.peek() is None
    second = await report(inspector)
    assert second is not first
    assert not second.changed
    assert check.sizes == [1000, 1004]


async def test_checks_the_file_that_took_the_path(
    inspector: Inspector, check: FakeCheck, path: Path
) -> None:
    await report(inspector)
    other = path.with_name("other")
    other.write_bytes(b"y" * 7)
    backdate(other)
    other.rename(path)
    assert inspector.subject.generation().size == 7
    assert not (await report(inspector)).changed
    await report(inspector)
    assert check.sizes == [1000, 7]


async def test_a_file_written_a_moment_ago_is_not_trusted_to_stay(
    inspector: Inspector, check: FakeCheck, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = path.stat().st_mtime_ns
    monkeypatch.setattr("time.time_ns", lambda: now + 10**6)
    await report(inspector)
    await report(inspector)
    assert len(check.sizes) == 2
    monkeypatch.setattr("time.time_ns", lambda: now + 10**9)
    await report(inspector)
    await report(inspector)
    assert len(check.sizes) == 3


async def test_after_a_change_during_the_check_it_is_looked_at_once_more(
    inspector: Inspector, check: FakeCheck, path: Path
) -> None:
    def write() -> None:
        with path.open("ab") as file:
            file.write(b"more")
        backdate(path)

    check.hook = write
    live = await report(inspector)
    assert live.changed
    assert (live.verdict, live.live is not None) == ("clean", True)
    assert inspector.checkup.peek() is None
    check.hook = lambda: None
    assert not (await report(inspector)).changed
    assert check.sizes == [1000, 1004, 1008]


async def test_a_check_during_which_the_image_changed_tells_of_no_repair(
    inspector: Inspector, check: FakeCheck, path: Path
) -> None:
    outcome = RepairOutcome(Status.REPAIRED)
    inspector.repairs._standing = (inspector.subject.generation(), outcome)
    check.hook = lambda: os.utime(path, ns=(10**18, 10**18 + 1))
    assert (await inspector.checkup.get()).value.repaired is None
    check.hook = lambda: None
    inspector.repairs._standing = (inspector.subject.generation(), outcome)
    assert (await inspector.checkup.get()).value.repaired is outcome


async def test_holds_the_locks_of_a_reader_while_it_checks(
    inspector: Inspector, check: FakeCheck, stranger: int
) -> None:
    seen: list[set[int]] = []
    check.hook = lambda: seen.append({b for b in range(90, 260) if locks._is_held(stranger, b)})
    await report(inspector)
    check.hook()
    assert seen == [{100, 201, 203}, set()]


async def test_an_image_in_use_is_checked_and_says_so(
    inspector: Inspector, check: FakeCheck, stranger: int
) -> None:
    with locks.held(stranger, "image", WRITER):
        live = await report(inspector)
        assert live.in_use
        assert live.live is not None
        assert await report(inspector) is live
    assert not (await report(inspector)).in_use
    with locks.held(stranger, "image", WRITER):
        # The bytes are the same, but a writer may hold others back: no "clean" from before.
        assert (await report(inspector)).in_use
    assert len(check.sizes) == 3


async def test_says_how_far_it_is(inspector: Inspector, check: FakeCheck) -> None:
    assert inspector.progress() == IDLE
    check.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inspector.checkup.get)
            while inspector.progress() in (IDLE, "opening 0%"):
                await trio.sleep(0.001)
            assert inspector.progress() == "census 43%"
            check.gate.set()
    assert inspector.progress() == IDLE


async def test_a_cancelled_check_lets_everything_go(
    inspector: Inspector, check: FakeCheck, stranger: int
) -> None:
    check.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inspector.checkup.get)
            while not check.sizes:
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        while inspector.progress() != IDLE:
            await trio.sleep(0.001)
    with locks.held(stranger, "image", WRITER):
        pass


async def test_a_read_error_is_that_readers_only(
    inspector: Inspector, check: FakeCheck, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ImageReadFailed("image", 4096, "Input/output error")

    check.hook = fail
    with pytest.raises(ImageReadFailed) as caught:
        await report(inspector)
    assert caught.value.errno == errno.EIO
    assert "reading at offset 4096 failed" in caplog.text
    assert inspector.progress() == IDLE
    check.hook = lambda: None
    await report(inspector)


async def test_what_is_no_image_any_more_is_an_error_until_it_is_one(
    inspector: Inspector, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await report(inspector)
    before = inspector.subject.generation()
    path.rename(path.with_name("away"))
    os.mkfifo(path)
    assert inspector.checkup.peek() is None
    assert inspector.subject.generation() == before
    with pytest.raises(ImageNotFollowed):
        await report(inspector)
    assert caplog.text.count("what is there now is a FIFO") == 1
    path.unlink()
    path.with_name("away").rename(path)
    await report(inspector)


async def test_describes_what_is_there(inspector: Inspector, path: Path) -> None:
    first = await inspector.description.get()
    assert isinstance(first.value.contents, NotQcow2)
    assert first.value.header is None
    assert first.value.file_size == 1000
    assert await inspector.description.get() is first
    with path.open("ab") as file:
        file.write(b"more")
    assert (await inspector.description.get()).value.file_size == 1004


# ---- what follows from a check ----


def write_damaged(path: Path, *names: str) -> None:
    image = sample().build()
    for name in names:
        DAMAGES[name](image, random.Random(1))
    path.write_bytes(image.data)
    backdate(path)


def damaged(nursery: trio.Nursery, path: Path, *names: str) -> Inspector:
    write_damaged(path, *names)
    return Inspector(Image.open(str(path)), nursery)


async def test_a_briefing_of_a_clean_image_plans_nothing(path: Path, nursery: trio.Nursery) -> None:
    inspector = damaged(nursery, path)
    briefing = (await inspector.briefing.get()).value
    assert briefing.checkup is (await inspector.checkup.get()).value
    assert briefing.proposals == {}
    assert all(inspector.proposals[tier].peek() is None for tier in RepairTier)


async def test_a_briefing_joins_check_triage_and_plans(path: Path, nursery: trio.Nursery) -> None:
    inspector = damaged(nursery, path, "lost-l2-table")
    briefing = (await inspector.briefing.get()).value
    leaks = (await inspector.leaks.get()).value
    assert briefing.triage is leaks.triage
    assert leaks.report is briefing.checkup.report
    # What has snapshots and bitmaps may have broken ones; no cluster has two owners.
    assert set(briefing.proposals) == set(RepairTier) - {RepairTier.SPLIT}
    for tier in briefing.proposals:
        proposal = (await inspector.proposals[tier].get()).value
        assert isinstance(proposal, Proposal)
        assert briefing.proposals[tier] is proposal
        assert proposal.triage is leaks.triage


async def test_says_how_far_a_briefing_is_from_its_beginning_to_its_end(
    path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector = damaged(nursery, path, "leaked-clusters")
    shown: list[str] = []
    read_into = FileSource.read_into

    def read(source: FileSource, offset: int, buffer: memoryview) -> None:
        assert inspector.repair_progress() == inspector.progress()
        shown.append(inspector.progress())
        read_into(source, offset, buffer)

    async def watch() -> None:
        while True:
            shown.append(inspector.progress())
            await trio.sleep(0)

    monkeypatch.setattr(FileSource, "read_into", read)
    async with trio.open_nursery() as tasks:
        tasks.start_soon(inspector.briefing.get)
        while inspector.progress() == IDLE:
            await trio.sleep(0)
        tasks.start_soon(watch)
        await inspector.briefing.get()
        tasks.cancel_scope.cancel()
    assert inspector.progress() == IDLE
    while shown[-1] == IDLE:
        shown.pop()  # it had ended, and who waited for it had not heard of that yet
    assert IDLE not in shown
    stages = [stage.rpartition(" ")[0] for stage in shown]
    order = [stage for stage, _ in itertools.groupby(stages)]
    assert order.index("opening") < order.index("census") < order.index("leaks")
    assert order.index("leaks") < order.index("plan leaks census")
    assert order.index("plan leaks census") < order.index("plan all census")


async def test_a_briefing_of_an_image_in_use_plans_nothing(
    path: Path, nursery: trio.Nursery
) -> None:
    inspector = damaged(nursery, path, "leaked-clusters")
    with path.open("rb") as stranger, held(stranger.fileno(), "", WRITER):
        briefing = (await inspector.briefing.get()).value
    report = briefing.checkup.report
    assert (report.verdict, report.in_use, report.live is not None) == ("leaks", True, True)
    assert briefing.proposals == {}
    assert all(inspector.proposals[tier].peek() is None for tier in RepairTier)


async def test_a_refusal_is_a_part_of_the_briefing(path: Path, nursery: trio.Nursery) -> None:
    inspector = damaged(nursery, path, "snapshot-l1-misaligned")
    briefing = (await inspector.briefing.get()).value
    assert isinstance(briefing.proposals[RepairTier.LEAKS], RepairError)


async def test_a_briefing_that_was_cancelled_is_not_kept(path: Path, nursery: trio.Nursery) -> None:
    inspector = damaged(nursery, path, "leaked-clusters")
    propose = inspector._propose

    async def stopped(tier: RepairTier, changed: Changed) -> Proposal | RepairError:
        inspector.cancel()
        return await propose(tier, changed)

    for tier in RepairTier:
        inspector.proposals[tier]._compute = partial(stopped, tier)
    with pytest.raises(ReadCancelled):
        await inspector.briefing.get()
    assert inspector.briefing.peek() is None


def replace_first(value: Value[T], path: Path, *damages: str) -> None:
    """Have another image take the place of the one at *path* as *value* begins to be computed."""
    compute = value._compute

    async def late(changed: Changed) -> T:
        write_damaged(path.with_name("other"), *damages)
        path.with_name("other").rename(path)
        return await compute(changed)

    value._compute = late


async def test_a_briefing_of_an_image_that_is_replaced_meanwhile_is_torn(
    path: Path, nursery: trio.Nursery
) -> None:
    inspector = damaged(nursery, path, "leaked-clusters")
    replace_first(inspector.leaks, path, "lost-l2-table")
    briefing = (await inspector.briefing.get()).value
    assert briefing.checkup.report.verdict == "torn"
    assert briefing.proposals == {}
    assert inspector.briefing.peek() is None


async def test_leaks_of_an_image_that_is_replaced_meanwhile_are_torn(
    path: Path, nursery: trio.Nursery
) -> None:
    inspector = damaged(nursery, path, "leaked-clusters")
    replace_first(inspector.checkup, path, "lost-l2-table")
    assert (await inspector.leaks.get()).value.report.verdict == "torn"
    assert inspector.leaks.peek() is None


async def test_an_image_that_changes_while_it_is_planned_is_not_called_unrepairable(
    path: Path, nursery: trio.Nursery
) -> None:
    inspector = damaged(nursery, path, "wrong-copied")
    look = inspector.leaks._compute

    async def late(changed: Changed) -> Leaks:
        found = await look(changed)
        write_damaged(path, "wrong-copied", "leaked-clusters")
        return found

    inspector.leaks._compute = late
    refused = (await inspector.proposals[RepairTier.ALL].get()).value
    assert str(refused).startswith("the image changed while it was planned")


async def test_a_briefing_beside_which_somebody_begins_to_write_is_torn(
    path: Path, nursery: trio.Nursery
) -> None:
    inspector = damaged(nursery, path, "leaked-clusters")
    look = inspector.leaks._compute
    with path.open("rb") as stranger, ExitStack() as stack:

        async def late(changed: Changed) -> Leaks:
            stack.enter_context(held(stranger.fileno(), "", WRITER))
            return await look(changed)

        inspector.leaks._compute = late
        briefing = (await inspector.briefing.get()).value
    assert briefing.checkup.report.verdict == "torn"
    assert briefing.proposals == {}


async def test_an_image_that_is_replaced_just_before_it_is_planned_is_the_one_that_is_planned(
    path: Path, nursery: trio.Nursery
) -> None:
    inspector, tier = damaged(nursery, path, "leaked-clusters"), RepairTier.ALL
    look = inspector.proposals[tier]._key

    def late() -> Hashable:
        state = look()
        write_damaged(path.with_name("other"), "low-refcount")
        path.with_name("other").rename(path)
        return state

    inspector.proposals[tier]._key = late
    planned = (await inspector.proposals[tier].get()).value
    fresh = (await Inspector(Image.open(str(path)), nursery).proposals[tier].get()).value
    assert isinstance(planned, Proposal)
    assert isinstance(fresh, Proposal)
    assert planned.plan == fresh.plan
    assert not fresh.plan.changes_nothing


@pytest.mark.parametrize("is_readable", [True, False])
def test_an_image_that_was_replaced_is_let_go(
    path: Path, is_readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is kept of it, or failed meanwhile: an error holds the frames it came through."""

    async def main() -> None:
        async with room_for_values() as nursery:
            await inspect(damaged(nursery, path, "leaked-clusters"))

    async def inspect(inspector: Inspector) -> None:
        image = weakref.ref(inspector.subject.image)
        values = [getattr(inspector, name) for name in KEPT] + [*inspector.proposals.values()]
        if is_readable:
            values.append(inspector.guest)  # its errors trio itself holds a while
            assert len(await inspector.reader.read(Place(Part.DISK), 0, 512)) == 512
        else:
            path.rename(path.with_name("first"))
            path.mkdir()
        for value in values:
            with contextlib.suppress(ImageNotFollowed):
                await value.get()
                assert is_readable
        if not is_readable:
            path.rmdir()
        path.with_name("other").write_bytes(b"y" * 7)
        path.with_name("other").rename(path)
        assert inspector.subject.generation().size == 7
        with trio.fail_after(DEADLINE):
            while image():  # a thread that has answered may not have ended
                await trio.sleep(0.001)

    monkeypatch.setattr(shared_value.log, "disabled", True)  # pytest keeps what was logged
    gc.disable()
    try:
        trio.run(main)
    finally:
        gc.enable()


def test_inspecting_changes_nothing(path: Path) -> None:
    before = path.stat(), path.read_bytes()

    async def main() -> None:
        async with inspecting(Image.open(str(path))) as inspector:
            await inspector.checkup.get()
            await inspector.description.get()

    trio.run(main)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (
        before[0].st_size,
        before[0].st_mtime_ns,
        before[0].st_ctime_ns,
    )
    assert path.read_bytes() == before[1]


async def test_of_what_was_looked_at_the_last_few_are_kept(inspector: Inspector) -> None:
    looks = [inspector.look(lambda _source: bytes(1)) for _ in range(KEPT_LOOKS + 3)]
    kept = inspector.look(lambda _source: bytes(1), is_kept=True)
    for looked in [kept, *looks, looks[5]]:
        await looked.get()
    assert [looked.peek() is not None for looked in looks] == [False] * 3 + [True] * KEPT_LOOKS
    assert kept.peek() is not None
    await looks[0].get()
    assert looks[3].peek() is None
    assert looks[5].peek() is not None


async def test_looks_that_no_disk_answers_leave_threads_to_others(inspector: Inspector) -> None:
    """However often somebody looks, and gives up."""
    gate = threading.Event()
    started: list[int] = []

    def at(_source: FileSource) -> None:
        started.append(1)
        gate.wait(2 * DEADLINE)

    looked = inspector.look(at)
    default = trio.to_thread.current_default_thread_limiter()
    try:
        with trio.fail_after(DEADLINE):
            for number in range(1, 2 * MAX_LOOKING):
                async with trio.open_nursery() as tasks:
                    tasks.start_soon(looked.get)
                    while len(started) < min(number, MAX_LOOKING):
                        await trio.sleep(0.001)
                    tasks.cancel_scope.cancel()
            assert len(started) == MAX_LOOKING
            assert default.borrowed_tokens == 0
            await report(inspector)
    finally:
        gate.set()
