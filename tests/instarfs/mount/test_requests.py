"""Who waits for the kernel's next request, and who else has a turn meanwhile."""

import os
import threading

import pytest
import trio
import trio.testing

from instarfs.mount import requests
from instarfs.mount.requests import Device, Turn


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


async def test_what_is_readable_is_taken_at_once_but_not_for_ever(pipe, monkeypatch) -> None:
    monkeypatch.setattr(requests, "IN_A_ROW", 3)
    os.write(pipe[1], b"request")
    device, taken, seen = Device(), 0, []

    async def another() -> None:
        while taken < 9:
            seen.append(taken)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(another)
        await trio.lowlevel.checkpoint()
        seen.clear()
        while taken < 9:
            await device.wait_readable(pipe[0])
            taken += 1
    assert seen
    assert set(seen) <= {3, 7}  # of two that can run trio takes either first


async def test_who_waits_long_lets_the_others_run(pipe) -> None:
    device = Device()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.wait_readable, pipe[0])
            await trio.sleep(0.01)
            os.write(pipe[1], b"request")


async def test_what_comes_a_moment_later_is_waited_for_awake(pipe, monkeypatch) -> None:
    monkeypatch.setattr(requests, "LOOKS_NS", 10**10)
    slept = False

    async def another() -> None:
        nonlocal slept
        slept = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(another)
        threading.Timer(0.005, os.write, (pipe[1], b"request")).start()
        await Device().wait_readable(pipe[0])
        assert not slept


async def test_a_single_processor_is_left_to_whoever_asks(pipe, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    monkeypatch.setattr(requests, "LOOKS_NS", 10**12)
    with trio.move_on_after(0.01) as scope:
        await Device().wait_readable(pipe[0])
    assert scope.cancelled_caught


async def test_one_at_a_time_has_the_turn_and_all_get_it() -> None:
    turn, having, had = Turn(), 0, []

    async def take(name) -> None:
        nonlocal having
        for _ in range(5):
            async with turn:
                having += 1
                assert having == 1
                await trio.lowlevel.checkpoint()
                having -= 1
            had.append(name)
            await trio.lowlevel.checkpoint()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(take, name)
    assert sorted(had) == sorted("abc" * 5)


async def test_who_had_the_turn_may_take_it_again_before_those_who_wait() -> None:
    turn, had = Turn(), []

    async def take(name) -> None:
        async with turn:
            had.append(name)

    async with trio.open_nursery() as nursery:
        async with turn:
            nursery.start_soon(take, "waiting")
            await trio.testing.wait_all_tasks_blocked()
        async with turn:
            had.append("again")
    assert had == ["again", "waiting"]


async def test_a_turn_is_not_lost_with_one_who_was_called_off() -> None:
    turn, had = Turn(), []

    async def take(name) -> None:
        async with turn:
            had.append(name)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery, trio.open_nursery() as doomed:
            async with turn:
                doomed.start_soon(take, "called off")
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(take, "next")
                await trio.testing.wait_all_tasks_blocked()
            doomed.cancel_scope.cancel()
    assert "next" in had
