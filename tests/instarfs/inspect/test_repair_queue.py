"""The queue of repairs, and the inspector, around a repairer that is not one."""

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from instarfs.errors import (
    ImageReadFailed,
    ImageReplaced,
    NoSuchCommand,
    RepairCancelled,
    RepairIncomplete,
    RepairRunning,
    UndoFileMissing,
)
from instarfs.image.file import Image
from instarfs.inspect.inspector import Inspector
from instarfs.inspect.stages import IDLE
from instarfs.repair.outcome import RepairOutcome, Status
from planner.arrays import HostOffset
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import AmbiguousCorruption, Cancelled, ParseFailed
from planner.progress import Progress
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal
from planner.source import Source
from tests.instarfs.repair.test_run import healthy

DEADLINE = 10
LEAKS, ALL = RepairTier.LEAKS, RepairTier.ALL
OLD = 10**18


class FakeRepairer:
    """Stands in for `Repairer`: says what a test wants, waits at a gate, changes the file."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.outcome = RepairOutcome(Status.REPAIRED, LEAKS, "abc")
        self.changes = True
        self.hook: Callable[[], None] = lambda: None
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()

    def make(self, image: Image, *, progress: Progress) -> Any:
        self.image, self.progress = image, progress
        return self

    def repair(self, tier: RepairTier, quote: str) -> RepairOutcome:
        return self._act(tier, quote)

    def _act(self, *asked: object) -> RepairOutcome:
        self.asked.append(asked)
        self.progress("writing", 43, 100)
        self.started.set()
        self.hook()
        while not self.gate.wait(0.001):
            try:
                self.progress("writing", 43, 100)
            except Cancelled:
                error = RepairCancelled(self.image.path)
                return RepairOutcome(Status.ROLLED_BACK, LEAKS, error=error)
        if self.changes:
            os.utime(self.image.path, ns=(OLD, OLD + len(self.asked) * 10**9))
        return self.outcome


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 1000)
    os.utime(path, ns=(OLD, OLD))
    return path


@pytest.fixture
def repairer() -> FakeRepairer:
    return FakeRepairer()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a check waits for; open, unless a test closes it."""
    gate = threading.Event()
    gate.set()
    yield gate
    gate.set()


@pytest.fixture
async def inspector(
    path: Path, repairer: FakeRepairer, gate: threading.Event, nursery: trio.Nursery
) -> Inspector:
    def check(source: Source, *, progress: Progress) -> Report:
        progress("census", 1, 2)
        while not gate.wait(0.001):
            progress("census", 1, 2)
        return Report(layout=None)

    image = Image.open(str(path))
    return Inspector(image, nursery, check=check, make_repairer=repairer.make)


def is_running(inspector: Inspector) -> bool:
    """Asked anew each time, which a type checker does not know of a property."""
    return inspector.repairs.is_running


async def until_started(repairer: FakeRepairer) -> None:
    with trio.fail_after(DEADLINE):
        await trio.to_thread.run_sync(repairer.started.wait)


async def checkup(inspector: Inspector):
    with trio.fail_after(DEADLINE):
        return (await inspector.checkup.get()).value


async def test_an_outcome_stays_with_the_state_that_it_led_to(
    inspector: Inspector, repairer: FakeRepairer, path: Path
) -> None:
    repairs = inspector.repairs
    assert (repairs.outcome, repairs.applied, repairs.progress()) == (None, None, IDLE)
    assert (await checkup(inspector)).repaired is None
    outcome = await repairs.repair(LEAKS, "3f9a2c")
    assert repairer.asked == [(LEAKS, "3f9a2c")]
    assert repairs.outcome is outcome is (await checkup(inspector)).repaired
    assert repairs.applied is LEAKS
    # Refused or rolled back, the state is still what the repair before made of it.
    repairer.outcome = RepairOutcome(Status.REFUSED, ALL, error=UndoFileMissing("image", "undo"))
    await repairs.repair(ALL)
    assert repairs.outcome is repairer.outcome
    assert repairs.applied is LEAKS
    assert (await checkup(inspector)).repaired is outcome
    # Written to by somebody else, it is not.
    os.utime(path, ns=(OLD + 5, OLD + 5))
    assert (await checkup(inspector)).repaired is None
    assert repairs.outcome is repairer.outcome


async def test_what_was_done_is_told_also_where_the_file_system_fails_then(
    inspector: Inspector, repairer: FakeRepairer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: Image) -> None:
        raise ImageReadFailed(image.path, 0, "Stale file handle")

    await checkup(inspector)
    with monkeypatch.context() as patch:
        repairer.hook = lambda: patch.setattr(Image, "generation", fail)
        assert await inspector.repairs.repair(LEAKS) is repairer.outcome
    assert inspector.repairs.outcome is repairer.outcome
    assert inspector.repairs.applied is LEAKS


async def test_beside_a_repair_nothing_is_held_that_follows_from_the_check_before(
    inspector: Inspector, repairer: FakeRepairer
) -> None:
    repairer.changes = False
    with trio.fail_after(DEADLINE):
        looked = inspector.host_byte(HostOffset(0))
        values = (inspector.bitmaps, inspector.leaks, inspector.proposals[LEAKS], looked)
        held = [weakref.ref(await value.get()) for value in values]
        before = weakref.ref(await inspector.checkup.get())
    await inspector.repairs.repair(LEAKS)
    gc.collect()
    assert [each() for each in held] == [None] * len(held)
    # The image is as it was, and the check as good.
    assert before() is inspector.checkup.peek() is not None
    repairer.changes = True
    await inspector.repairs.repair(LEAKS)
    gc.collect()
    assert before() is None


@pytest.mark.parametrize("status", [Status.UNDONE, Status.INTERRUPTED])
async def test_what_was_taken_back_is_no_longer_applied(
    inspector: Inspector, repairer: FakeRepairer, status: Status
) -> None:
    await inspector.repairs.repair(LEAKS)
    repairer.outcome = RepairOutcome(status, LEAKS)
    await inspector.repairs.repair(LEAKS)
    assert inspector.repairs.applied is None
    assert (await checkup(inspector)).repaired is None


async def test_a_second_one_is_told_at_once(inspector: Inspector, repairer: FakeRepairer) -> None:
    repairer.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inspector.repairs.repair, LEAKS)
            await until_started(repairer)
            assert is_running(inspector)
            assert inspector.repair_progress() == "writing 43%"
            for again in (inspector.repairs.repair(ALL), inspector.repairs.undo()):
                with pytest.raises(RepairRunning) as caught:
                    await again
                assert caught.value.errno == errno.EBUSY
            repairer.gate.set()
    assert not is_running(inspector)
    assert inspector.repair_progress() == IDLE
    assert len(repairer.asked) == 1


async def test_whoever_leaves_takes_the_repair_along_and_the_outcome_is_known(
    inspector: Inspector, repairer: FakeRepairer
) -> None:
    repairer.gate.clear()
    outcomes: list[RepairOutcome] = []

    async def repair() -> None:
        outcomes.append(await inspector.repairs.repair(LEAKS))

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(repair)
            await until_started(repairer)
            nursery.cancel_scope.cancel()
    # Not cut off: it has told what it did, although nobody may wait for it any more.
    assert [outcome.status for outcome in outcomes] == [Status.ROLLED_BACK]
    assert inspector.repairs.outcome is outcomes[0]
    assert not is_running(inspector)


async def test_cancelling_everything_cancels_the_repair(
    inspector: Inspector, repairer: FakeRepairer
) -> None:
    inspector.cancel()
    repairer.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inspector.repairs.repair, LEAKS)
            await until_started(repairer)
            inspector.cancel()
    outcome = inspector.repairs.outcome
    assert outcome is not None
    assert isinstance(outcome.error, RepairCancelled)


async def test_a_bug_is_no_outcome_and_holds_nothing_up(
    inspector: Inspector, repairer: FakeRepairer
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    repairer.hook = fail
    with pytest.raises(ZeroDivisionError):
        await inspector.repairs.repair(LEAKS)
    assert inspector.repairs.outcome is None
    assert not is_running(inspector)
    repairer.hook = lambda: None
    assert (await inspector.repairs.repair(LEAKS)).status is Status.REPAIRED


async def test_it_waits_for_a_check_and_can_be_cancelled_then(
    inspector: Inspector, repairer: FakeRepairer, gate: threading.Event
) -> None:
    gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inspector.checkup.get)
            while inspector.progress() == IDLE:
                await trio.sleep(0.001)

            async def repair() -> None:
                with pytest.raises(RepairCancelled):
                    await inspector.repairs.repair(LEAKS)

            nursery.start_soon(repair)
            while inspector.repair_progress() != "waiting for a check to end":
                await trio.sleep(0.001)
            inspector.repairs.cancel()
            while is_running(inspector):
                await trio.sleep(0.001)
            assert repairer.asked == []
            nursery.start_soon(inspector.repairs.repair, LEAKS)
            while not is_running(inspector):
                await trio.sleep(0.001)
            gate.set()
    assert repairer.asked == [(LEAKS, "")]


async def test_a_check_meanwhile_is_not_kept_from_reading_and_is_torn(
    inspector: Inspector, repairer: FakeRepairer
) -> None:
    repairer.gate.clear()
    repairer.changes = False
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inspector.repairs.repair, LEAKS)
            await until_started(repairer)
            assert (await checkup(inspector)).report.in_use
            proposal = (await inspector.proposals[LEAKS].get()).value
            assert isinstance(proposal, AmbiguousCorruption)
            repairer.gate.set()


@pytest.mark.parametrize(
    "error", [AmbiguousCorruption("two outcomes"), RepairIncomplete("image", 2, 1)]
)
async def test_what_cannot_be_done_is_not_tried_again_on_the_same_image(
    inspector: Inspector, repairer: FakeRepairer, path: Path, error: Any
) -> None:
    repairer.changes = False
    repairer.outcome = RepairOutcome(Status.INCOMPLETE, LEAKS, error=error)
    first = await inspector.repairs.repair(LEAKS)
    assert await inspector.repairs.repair(LEAKS) is first
    assert len(repairer.asked) == 1
    await inspector.repairs.repair(LEAKS, "3f9a2c")
    await inspector.repairs.repair(ALL)
    await inspector.repairs.repair(LEAKS)
    assert len(repairer.asked) == 4
    os.utime(path, ns=(OLD + 5, OLD + 5))
    await inspector.repairs.repair(LEAKS)
    assert len(repairer.asked) == 5


async def test_the_outcome_is_that_of_what_was_asked_for_last(
    inspector: Inspector, repairer: FakeRepairer
) -> None:
    repairer.changes = False
    repairer.outcome = RepairOutcome(Status.REFUSED, LEAKS, error=AmbiguousCorruption("two"))
    failed = await inspector.repairs.repair(LEAKS)
    inspector.repairs.refuse(NoSuchCommand("repair", "`leaks`"))
    outcome = inspector.repairs.outcome
    assert outcome is not None
    assert (outcome.status, outcome.tier) == (Status.REFUSED, None)
    assert isinstance(outcome.error, NoSuchCommand)
    assert "`leaks`" in outcome.reason
    assert await inspector.repairs.repair(LEAKS) is failed
    assert inspector.repairs.outcome is failed
    assert len(repairer.asked) == 1


async def test_what_may_work_a_moment_later_is_tried_again(
    inspector: Inspector, repairer: FakeRepairer
) -> None:
    repairer.changes = False
    repairer.outcome = RepairOutcome(Status.REFUSED, LEAKS, error=UndoFileMissing("image", "undo"))
    for _ in range(2):
        await inspector.repairs.repair(LEAKS)
    assert len(repairer.asked) == 2


async def test_an_image_that_nobody_has_looked_at_is_not_repaired(
    inspector: Inspector, repairer: FakeRepairer, path: Path
) -> None:
    other = path.with_name("other")
    other.write_bytes(b"y" * 7)
    other.rename(path)
    assert inspector.subject.generation().size == 7
    with pytest.raises(ImageReplaced):
        await inspector.repairs.repair(LEAKS)
    assert repairer.asked == []
    await checkup(inspector)
    await inspector.repairs.repair(LEAKS)
    assert repairer.image.generation().size == 7


async def test_nor_is_one_with_the_inode_number_of_an_image_that_was_looked_at(
    inspector: Inspector, repairer: FakeRepairer, path: Path
) -> None:
    first = path.with_name("first")
    first.hardlink_to(path)
    other = path.with_name("other")
    other.write_bytes(b"y" * 7)
    other.rename(path)
    assert inspector.subject.generation().size == 7
    # As the file system may give it to a new file: its own is gone as soon as nobody has it open.
    first.write_bytes(b"z" * 8)
    first.rename(path)
    with pytest.raises(ImageReplaced):
        await inspector.repairs.repair(LEAKS)
    assert repairer.asked == []


async def test_both_plans_come_from_one_check_and_stay_while_nothing_changes(
    path: Path, nursery: trio.Nursery
) -> None:
    path.write_bytes(healthy())
    os.utime(path, ns=(OLD, OLD))
    checks: list[int] = []

    def check(source: Source, *, progress: Progress) -> Report:
        checks.append(source.size)
        return check_image(source, progress=progress)

    inspector = Inspector(Image.open(str(path)), nursery, check=check)
    editions = {}

    async def plan(tier: RepairTier) -> None:
        editions[tier] = await inspector.proposals[tier].get()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as tasks:
            for tier in RepairTier:
                tasks.start_soon(plan, tier)
    assert len(checks) == 1
    for tier in RepairTier:
        proposal = editions[tier].value
        assert isinstance(proposal, Proposal)
        assert (proposal.tier, proposal.plan.changes_nothing) == (tier, True)
        assert await inspector.proposals[tier].get() is editions[tier]
    assert inspector.repair_progress() == IDLE
    os.utime(path, ns=(OLD + 5, OLD + 5))
    assert inspector.proposals[ALL].peek() is None
    await plan(ALL)
    assert len(checks) == 2


async def test_an_image_that_cannot_be_opened_has_a_refusal_for_a_plan(
    path: Path, nursery: trio.Nursery
) -> None:
    inspector = Inspector(Image.open(str(path)), nursery)
    proposal = (await inspector.proposals[ALL].get()).value
    assert isinstance(proposal, ParseFailed)
