"""instarfs.inspect.tidying: after the answer, and not again and again."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from instarfs.image import memory
from instarfs.inspect.tidying import REST, SOON_SECONDS, Tidier

LONG = 3.0


async def test_it_is_done_once_for_all_who_ask_and_then_not_for_long(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float] = []
    give_back = memory.give_back

    def tidy() -> None:
        give_back()
        times.append(trio.from_thread.run_sync(trio.current_time))
        trio.from_thread.run(trio.sleep, LONG)
        if len(times) == 1:
            ask()

    def ask() -> None:
        trio.from_thread.run_sync(tidier.soon)

    monkeypatch.setattr(memory, "give_back", tidy)
    begin = trio.current_time()
    async with trio.open_nursery() as nursery:
        tidier = Tidier(nursery)
        for _ in range(3):
            tidier.soon()
        assert not times
    again = 2 * SOON_SECONDS + LONG + REST * LONG
    assert [time - begin for time in times] == pytest.approx([SOON_SECONDS, again])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
async def test_where_there_is_no_room_for_a_thread_it_is_left(
    error: Exception, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing ends by it: what serves a mount runs beside."""
    asked: list[object] = []

    async def run_sync(work: object) -> None:
        asked.append(work)
        if len(asked) == 1:
            raise error

    monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
    async with trio.open_nursery() as nursery:
        tidier = Tidier(nursery)
        for _ in range(2):
            tidier.soon()
            await trio.sleep(2 * SOON_SECONDS)
    assert asked == [memory.give_back] * 2
