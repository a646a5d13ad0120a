"""instarfs.inspect.shared_value: once for all readers, again when the key changed, never for
nobody.
"""

import logging
import threading
from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from instarfs.errors import ImageReadFailed, ReadCancelled
from instarfs.inspect.shared_value import Computed, Edition
from planner.errors import Cancelled

DEADLINE = 10


class Work:
    """A computation that a test holds up, counts, and lets fail; its value is its number."""

    def __init__(self) -> None:
        self.key: object = "first"
        self.count = 0
        self.stopped = 0
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.computed = Computed(lambda: self.key, self.run)

    def run(self, cancelled: Callable[[], bool]) -> int:
        self.count += 1
        self.started.set()
        while not self.gate.wait(0.001):
            if cancelled():
                self.stopped += 1
                raise Cancelled
        if self.error is not None:
            raise self.error
        return self.count


async def until_started(work: Work) -> None:
    with trio.fail_after(DEADLINE):
        await trio.to_thread.run_sync(work.started.wait)


async def test_computes_when_asked_and_only_then() -> None:
    work = Work()
    assert work.computed.peek() is None
    assert work.count == 0
    edition = await work.computed.get()
    assert edition.value == 1
    assert work.computed.peek() is edition
    assert await work.computed.get() is edition
    assert work.count == 1


async def test_once_for_all_who_ask_at_the_same_time() -> None:
    work = Work()
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


async def test_again_when_the_key_has_changed() -> None:
    work = Work()
    await work.computed.get()
    work.key = "second"
    assert work.computed.peek() is None
    assert (await work.computed.get()).value == 2


async def test_a_value_whose_key_changed_meanwhile_is_given_but_not_kept() -> None:
    work = Work()
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


async def test_who_comes_while_the_key_changes_gets_what_is_computed_later() -> None:
    work = Work()
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
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = Work()
    work.error = ImageReadFailed("image", 512, "Input/output error")
    with pytest.raises(ImageReadFailed, match="offset 512"):
        await work.computed.get()
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, str(work.error))
    ]
    work.error = None
    assert (await work.computed.get()).value == 2


async def test_a_bug_reaches_its_readers_too() -> None:
    work = Work()
    work.error = ZeroDivisionError()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await work.computed.get()


async def test_a_key_that_cannot_be_had_is_an_error_of_the_reader() -> None:
    error = ImageReadFailed("image", 0, "Stale file handle")

    def fail() -> object:
        raise error

    work = Work()
    computed = Computed(fail, work.run)
    assert computed.peek() is None
    with pytest.raises(ImageReadFailed):
        await computed.get()
    assert work.count == 0


async def test_the_work_ends_with_its_last_reader() -> None:
    work = Work()
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


async def test_cancelling_tells_the_readers() -> None:
    work = Work()
    work.gate.clear()
    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(ReadCancelled):
                    await work.computed.get()

            nursery.start_soon(read)
            nursery.start_soon(read)
            await until_started(work)
            work.computed.cancel()
    assert work.stopped == 1


async def test_cancelling_nothing_is_nothing() -> None:
    Work().computed.cancel()


def test_the_end_of_the_event_loop_ends_the_work() -> None:
    work = Work()
    work.gate.clear()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work.computed.get)
            await until_started(work)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert work.stopped == 1
