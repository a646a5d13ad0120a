"""instarfs.inspect.shared_value: once for all readers, again when the key changed, never for
nobody.
"""

import logging
import threading

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from instarfs.errors import ImageReadFailed, ReadCancelled
from instarfs.inspect.shared_value import (
    Changed,
    Edition,
    Value,
    Workshop,
    room_for_values,
    while_wanted,
)
from planner.errors import Cancelled

DEADLINE = 10


class Work:
    """A computation that a test holds up, counts, and lets fail; its value is its number."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.key: object = "first"
        self.moment: object = "first"
        self.count = 0
        self.stopped = 0
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.workshop = Workshop(nursery, lambda: self.moment)
        self.computed = Value(self.workshop, lambda: self.key, self.compute)

    async def compute(self, _changed: Changed) -> int:
        return await trio.to_thread.run_sync(self.run)

    def run(self) -> int:
        self.count += 1
        self.started.set()
        while not self.gate.wait(0.001):
            try:
                while_wanted()("working", 0, 1)
            except Cancelled:
                self.stopped += 1
                raise
        if self.error is not None:
            raise self.error
        return self.count


@pytest.fixture
async def work(nursery: trio.Nursery) -> Work:
    return Work(nursery)


async def refused(value: Value[int]) -> None:
    with pytest.raises(ReadCancelled):
        await value.get()


async def until_started(work: Work) -> None:
    with trio.fail_after(DEADLINE):
        await trio.to_thread.run_sync(work.started.wait)


async def test_computes_when_asked_and_only_then(work: Work) -> None:
    assert work.computed.peek() is None
    assert work.count == 0
    edition = await work.computed.get()
    assert edition.value == 1
    assert work.computed.peek() is edition
    assert await work.computed.get() is edition
    assert work.count == 1


async def test_once_for_all_who_ask_at_the_same_time(work: Work) -> None:
    work.gate.clear()
    editions: list[Edition[int]] = []

    async def read() -> None:
        editions.append(await work.computed.get())

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(read)
            await until_started(work)
            await wait_all_tasks_blocked()
            work.gate.set()
    assert work.count == 1
    assert len(set(map(id, editions))) == 1
    assert len(editions) == 50


async def test_again_when_the_key_has_changed(work: Work) -> None:
    await work.computed.get()
    work.key = "second"
    assert work.computed.peek() is None
    assert (await work.computed.get()).value == 2


async def test_a_value_whose_key_changed_meanwhile_is_given_but_not_kept(work: Work) -> None:
    work.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.computed.get)
            await until_started(work)
            work.key = "second"
            work.gate.set()
    assert work.computed.peek() is None
    assert (await work.computed.get()).value == 2
    assert work.computed.peek() is not None


async def test_who_comes_while_the_key_changes_gets_what_is_computed_later(work: Work) -> None:
    work.gate.clear()
    values: dict[str, int] = {}

    async def read(name: str) -> None:
        values[name] = (await work.computed.get()).value

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, "first")
            await until_started(work)
            work.key = "second"
            nursery.start_soon(read, "late")
            await wait_all_tasks_blocked()
            work.gate.set()
    assert values == {"first": 1, "late": 2}
    assert (await work.computed.get()).value == 2


async def test_an_error_reaches_its_readers_and_is_not_kept(
    work: Work,
    caplog: pytest.LogCaptureFixture,
) -> None:
    work.error = ImageReadFailed("image", 512, "Input/output error")
    with pytest.raises(ImageReadFailed, match="offset 512"):
        await work.computed.get()
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, str(work.error))
    ]
    work.error = None
    assert (await work.computed.get()).value == 2


async def test_a_bug_reaches_its_readers_too(work: Work) -> None:
    work.error = ZeroDivisionError()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await work.computed.get()


async def test_a_key_that_cannot_be_had_is_an_error_of_the_reader(nursery: trio.Nursery) -> None:
    error = ImageReadFailed("image", 0, "Stale file handle")

    def fail() -> object:
        raise error

    work = Work(nursery)
    computed = Value(work.workshop, fail, work.compute)
    assert computed.peek() is None
    with pytest.raises(ImageReadFailed):
        await computed.get()
    assert work.count == 0


async def test_the_work_ends_with_its_last_reader(work: Work) -> None:
    work.gate.clear()
    scopes = [trio.CancelScope() for _ in range(3)]

    async def read(scope: trio.CancelScope) -> None:
        with scope:
            await work.computed.get()

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            for scope in scopes:
                nursery.start_soon(read, scope)
            await until_started(work)
            await wait_all_tasks_blocked()
            scopes[0].cancel()
            scopes[1].cancel()
            await wait_all_tasks_blocked()
            assert work.stopped == 0
            scopes[2].cancel()
        while not work.stopped:
            await trio.sleep(0.001)
    work.gate.set()
    # Whoever comes while the cancelled work still winds down gets work of his own.
    assert (await work.computed.get()).value == 2


async def test_cancelling_tells_the_readers(work: Work) -> None:
    work.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(ReadCancelled):
                    await work.computed.get()

            nursery.start_soon(read)
            nursery.start_soon(read)
            await until_started(work)
            work.workshop.cancel()
    assert work.stopped == 1


async def test_cancelling_nothing_is_nothing(work: Work) -> None:
    work.workshop.cancel()
    assert (await work.computed.get()).value == 1


async def test_the_work_ends_with_its_room() -> None:
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as tasks:
            async with room_for_values() as nursery:
                work = Work(nursery)
                work.gate.clear()
                tasks.start_soon(refused, work.computed)
                await until_started(work)
            assert work.stopped == 1


@pytest.mark.parametrize(
    "error", [ImageReadFailed("image", 0, "Input/output error"), KeyboardInterrupt()]
)
async def test_what_a_block_raises_comes_out_of_the_room_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        async with room_for_values():
            raise error
    assert caught.value is error


async def test_a_value_that_waits_for_another_keeps_no_thread(nursery: trio.Nursery) -> None:
    """As many as there are threads, one upon the other, and a thread is left for the first."""
    work = Work(nursery)
    work.gate.clear()
    values = [work.computed]

    def above(below: Value[int]) -> Value[int]:
        async def compute(_changed: Changed) -> int:
            return (await below.get()).value + 1

        return Value(work.workshop, lambda: work.key, compute)

    limiter = trio.to_thread.current_default_thread_limiter()
    for _ in range(int(limiter.total_tokens)):
        values.append(above(values[-1]))
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as tasks:
            tasks.start_soon(values[-1].get)
            await until_started(work)
            await wait_all_tasks_blocked()
            assert limiter.borrowed_tokens == 1
            work.gate.set()
    edition = values[-1].peek()
    assert edition is not None
    assert edition.value == len(values)


async def test_cancelling_ends_all_that_wait_for_each_other(work: Work) -> None:
    async def compute(_changed: Changed) -> int:
        return (await work.computed.get()).value

    above = Value(work.workshop, lambda: work.key, compute)
    work.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as tasks:
            tasks.start_soon(refused, above)
            tasks.start_soon(refused, work.computed)
            await until_started(work)
            work.workshop.cancel()
    assert work.stopped == 1
    work.gate.set()
    assert (await above.get()).value == 2


@pytest.mark.parametrize("moment", ["first", "second"])
async def test_a_computation_hears_that_the_moment_is_another(work: Work, moment: str) -> None:
    async def compute(changed: Changed) -> tuple[bool, bool]:
        before = changed()
        work.moment = moment
        return before, changed()

    value = Value(work.workshop, lambda: work.key, compute)
    assert (await value.get()).value == (False, moment != "first")
