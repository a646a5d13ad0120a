"""instarfs.mount.controls: the grammar of commands, and who is told no before anything begins."""

import contextlib
import errno
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instarfs.daemon.logs import Lines
from instarfs.errors import (
    ImageReplaced,
    NoSuchCommand,
    RepairNotOffered,
    RepairRunning,
    UndoFileDamaged,
)
from instarfs.mount.controls import Controls, parse_tier, parse_word
from instarfs.repair.journal import State, StateWord, Summary
from instarfs.repair.outcome import RepairOutcome, Status
from planner.errors import AmbiguousCorruption
from planner.repair.plan import RepairTier

LEAKS, ALL = RepairTier.LEAKS, RepairTier.ALL


class FakeRepairs:
    """Stands in for `Repairs`."""

    is_running = False
    applied: RepairTier | None = None

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.refused: list[Exception] = []
        self.outcome: RepairOutcome | Exception = RepairOutcome(
            Status.REPAIRED, ALL, "3f9a2c", 5, 4, 4, 1
        )

    async def repair(self, *asked: object) -> RepairOutcome:
        self.asked.append(asked)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def refuse(self, error: Exception) -> None:
        self.refused.append(error)

    async def undo(self) -> RepairOutcome:
        return await self.repair("undo")

    async def trim(self) -> RepairOutcome:
        return await self.repair("trim")


class FakeSubject:
    """Stands in for `Subject`."""

    path = "image"
    last: Summary | Exception | None = None
    touched = False

    def last_repair(self) -> Summary | Exception | None:
        return self.last

    def is_touched(self, last: Summary) -> bool:
        assert last is self.last
        return self.touched


class FakeInspector:
    """Stands in for `Inspector`."""

    def __init__(self) -> None:
        self.repairs = FakeRepairs()
        self.subject = FakeSubject()


@pytest.fixture
def inspector() -> FakeInspector:
    return FakeInspector()


def controls(inspector: Any, *, read_only: bool = False) -> Controls:
    return Controls(inspector, read_only=read_only)


@pytest.mark.parametrize(
    ("command", "tier", "quote"),
    [
        (b"leaks", LEAKS, ""),
        (b"leaks\n", LEAKS, ""),
        (b" \tall \t\n", ALL, ""),
        (b"all 3f9a2c", ALL, "3f9a2c"),
        (b"leaks\t \t3F9A2C0123aF \n", LEAKS, "3F9A2C0123aF"),
    ],
)
def test_a_tier_and_a_quote(command: bytes, tier: RepairTier, quote: str) -> None:
    assert parse_tier(command) == (tier, quote)


@given(st.binary() | st.text("alekns 0123\n\t").map(str.encode))
def test_anything_else_is_no_command(command: bytes) -> None:
    line = command.removesuffix(b"\n")
    words = line.replace(b"\t", b" ").strip(b" ").split(b" ")
    if words in ([b"leaks"], [b"all"]):
        parse_tier(command)
    elif len(words) == 1:
        with pytest.raises(NoSuchCommand) as caught:
            parse_tier(command)
        assert caught.value.errno == errno.EINVAL
    else:
        with contextlib.suppress(NoSuchCommand):
            tier, quote = parse_tier(command)
            assert [word for word in words if word] == [tier.encode(), quote.encode()]


@pytest.mark.parametrize("command", [b"undo", b"undo\n", b" undo\t\n"])
def test_a_word(command: bytes) -> None:
    parse_word(command, "undo")


@pytest.mark.parametrize("command", [b"", b"\n", b"undo undo", b"undo\n\n", b"UNDO", b"trim"])
def test_another_word(command: bytes) -> None:
    with pytest.raises(NoSuchCommand, match="means nothing here; write `undo`"):
        parse_word(command, "undo")


async def test_what_was_done_is_logged_and_what_went_wrong_is_raised(
    inspector: FakeInspector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    control = controls(inspector).tier_file()
    await control.act(b" all 3f9a2c\n")
    assert inspector.repairs.asked == [(ALL, "3f9a2c")]
    error = AmbiguousCorruption("two outcomes", "look")
    inspector.repairs.outcome = RepairOutcome(Status.REFUSED, reason="two\noutcomes", error=error)
    with pytest.raises(AmbiguousCorruption):
        await controls(inspector).undo_file().act(b"undo")
    assert [record.getMessage() for record in caplog.records] == [
        "all 3f9a2c: repaired: tier all, plan 3f9a2c: found 5, planned 4, repaired 4, left 1",
        "undo: refused: two\\noutcomes",
    ]


async def test_an_error_that_is_raised_again_and_again_does_not_grow(
    inspector: FakeInspector,
) -> None:
    error = AmbiguousCorruption("two outcomes", "look")
    inspector.repairs.outcome = RepairOutcome(Status.REFUSED, reason="two outcomes", error=error)
    depths = []
    for _ in range(3):
        with pytest.raises(AmbiguousCorruption) as caught:
            await controls(inspector).tier_file().act(b"all")
        depths.append(len(caught.traceback))
    assert len(set(depths)) == 1


async def test_what_nothing_came_of_is_remembered_and_logged_in_a_line(
    inspector: FakeInspector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    its = controls(inspector)
    for control, command in (
        (its.tier_file(), b"repair, please\n"),
        (its.undo_file(), b"\xff\x1b[1m\n" * 10_000),
        (its.trim_file(), b"undo"),
    ):
        with pytest.raises(NoSuchCommand):
            await control.act(command)
    inspector.repairs.outcome = ImageReplaced("image")
    with pytest.raises(ImageReplaced):
        await its.tier_file().act(b"all")
    kinds = [type(error) for error in inspector.repairs.refused]
    assert kinds == [NoSuchCommand, NoSuchCommand, NoSuchCommand, ImageReplaced]
    assert all(len(str(error)) < 500 for error in inspector.repairs.refused)
    lines = list(map(Lines("%(message)s").format, caplog.records))
    assert len(lines) == 4
    assert all(line.isprintable() and "nothing was begun" in line for line in lines)
    assert lines[0].startswith("repair, please: nothing was begun: 'repair, please\\n' means")


async def test_a_mount_that_does_not_repair(inspector: FakeInspector) -> None:
    its = controls(inspector, read_only=True)
    for control in (its.tier_file(), its.undo_file(), its.trim_file()):
        with pytest.raises(RepairNotOffered) as caught:
            control.begin_writing()
        assert caught.value.errno == errno.EROFS
        # Whatever it is: nothing here is ever a command.
        for command in (b"all", b"undo", b"trim", b"nonsense"):
            with pytest.raises(RepairNotOffered):
                await control.act(command)
    assert inspector.repairs.asked == []


async def test_while_a_repair_runs(inspector: FakeInspector) -> None:
    its = controls(inspector)
    inspector.repairs.is_running = True
    for control in (its.tier_file(), its.undo_file(), its.trim_file()):
        with pytest.raises(RepairRunning):
            control.begin_writing()
        with pytest.raises(RepairRunning) as caught:
            await control.act(b"trim")
        assert caught.value.errno == errno.EBUSY
    assert await (await its.undo_file().open()).read(0, 100) == b"a repair is running\n"
    assert inspector.repairs.asked == []


@pytest.mark.parametrize(
    ("applied", "shown"),
    [
        (None, b"[none] leaks all split bitmaps snapshots\n"),
        (LEAKS, b"none [leaks] all split bitmaps snapshots\n"),
        (ALL, b"none leaks [all] split bitmaps snapshots\n"),
    ],
)
async def test_the_tier_last_applied(
    inspector: FakeInspector, applied: RepairTier | None, shown: bytes
) -> None:
    inspector.repairs.applied = applied
    control = controls(inspector).tier_file()
    assert await (await control.open()).read(0, 100) == shown
    assert control.size() == len(shown)


PLAN = "tier all, plan 3f9a2c012345"


def summary(state: State, depth: int = 1) -> Summary:
    return Summary(ALL, "3f9a2c012345", StateWord(state, depth))


@pytest.mark.parametrize(
    ("last", "shown"),
    [
        (None, "nothing to take back"),
        (
            summary(State.APPLYING),
            f"a repair was interrupted: write `undo` to take it back ({PLAN})",
        ),
        (summary(State.APPLIED), f"write `undo` to take the last repair back ({PLAN})"),
        (
            summary(State.APPLIED, 3),
            f"write `undo` to take the last repair back ({PLAN}); 2 more before it",
        ),
        (
            summary(State.SEALED, 0),
            "nothing to take back: the last repair was made with --no-undo",
        ),
        (
            UndoFileDamaged("i\udcffmage.undo", "it is cut off"),
            "i\\xffmage.undo: it is cut off; move it away if it is of no use to you",
        ),
    ],
)
async def test_whether_there_is_something_to_take_back(
    inspector: FakeInspector, last: Summary | Exception | None, shown: str
) -> None:
    inspector.subject.last = last
    read = await (await controls(inspector).undo_file().open()).read(0, 200)
    assert read == f"{shown}\n".encode()


async def test_what_others_wrote_to_since_may_not_be_taken_back(inspector: FakeInspector) -> None:
    inspector.subject.last, inspector.subject.touched = summary(State.APPLIED), True
    read = await (await controls(inspector).undo_file().open()).read(0, 200)
    assert read.endswith(b", if it still fits: the image may have been written to after it\n")
