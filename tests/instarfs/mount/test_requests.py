"""Who waits for the kernel's next request, and who else has a turn meanwhile."""

import os
import threading

import pyfuse3
import pytest
import trio
import trio.testing

from instarfs.mount.requests import Device, Turn, is_as_known, take_turns_fast


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


async def test_what_is_readable_is_taken_at_once_but_not_for_ever(pipe) -> None:
    os.write(pipe[1], b"request")
    device, taken, seen = Device(most_in_a_row=3), 0, []

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


async def test_what_comes_a_moment_later_is_waited_for_awake(pipe) -> None:
    slept = False

    async def another() -> None:
        nonlocal slept
        slept = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(another)
        threading.Timer(0.005, os.write, (pipe[1], b"request")).start()
        await Device(looks_ns=10**10).wait_readable(pipe[0])
        assert not slept


async def test_a_single_processor_is_left_to_whoever_asks(pipe, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0})
    with trio.move_on_after(0.01) as scope:
        await Device(looks_ns=10**12).wait_readable(pipe[0])
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


def test_the_pyfuse3_that_is_installed_is_known() -> None:
    assert is_as_known()


@pytest.mark.parametrize(
    ("name", "value"),
    [("__version__", "4.0.0"), ("trio", None), ("_wait_fuse_readable", None)],
)
def test_one_that_is_not_is_left_alone(name: str, value: object, monkeypatch) -> None:
    inside = vars(pyfuse3)
    if value is None:
        monkeypatch.delitem(inside, name)
    else:
        monkeypatch.setitem(inside, name, value)
    before = dict(inside)
    take_turns_fast()
    assert inside == before


def test_what_is_known_is_replaced_and_all_else_of_trio_stays(monkeypatch) -> None:
    monkeypatch.setitem(vars(pyfuse3), "trio", trio)  # put back afterwards
    take_turns_fast()
    replaced = vars(pyfuse3)["trio"]
    assert replaced.Lock is Turn
    assert replaced.lowlevel.wait_readable.__func__ is Device.wait_readable
    assert replaced.open_nursery is trio.open_nursery
    assert trio.Lock is not Turn
