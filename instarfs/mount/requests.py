"""How the event loop takes the kernel's requests from /dev/fuse, one after the other.

pyfuse3 has several tasks take turns: each waits for its turn, then for a request, hands the turn on
and answers. With trio's own means that costs a round of epoll and two changes of task for every
request, more than most answers take. `take_turns_fast` gives pyfuse3 others in their place, as its
own asyncio mode does: a turn that is not handed on but left for whoever comes first, mostly the
task that has just answered; and a wait that looks before it sleeps, since one who reads asks again
as soon as he has an answer.
"""

from __future__ import annotations

import os
import select
import time
from types import SimpleNamespace

import pyfuse3
import trio

LOOKS_NS = 40_000
"""So long the device is looked at before the loop sleeps; waking it takes longer."""

IN_A_ROW = 32
"""Requests that may be taken before the other tasks of the loop have their turn."""


class Turn:
    """A lock that is not handed on: who comes first takes it. For ``async with``."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._is_taken:
            await self._waiting.park()
        self._is_taken = True

    async def __aexit__(self, *_: object) -> None:
        self._is_taken = False
        self._waiting.unpark()


class Device:
    """The descriptor of /dev/fuse, or anything else that polls."""

    def __init__(self) -> None:
        self._poll: select.poll | None = None
        self._in_a_row = 0
        # A single processor is the one that whoever asks next needs.
        self._looks_ns = LOOKS_NS if len(os.sched_getaffinity(0)) > 1 else 0

    async def wait_readable(self, fd: int) -> None:
        """As `trio.lowlevel.wait_readable`, but a checkpoint only now and then."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        if self._in_a_row < IN_A_ROW and self._is_readable(self._poll):
            self._in_a_row += 1
            return
        self._in_a_row = 0
        await trio.lowlevel.wait_readable(fd)

    def _is_readable(self, poll: select.poll) -> bool:
        """Whether there is something to read now, or shortly."""
        until = time.monotonic_ns() + self._looks_ns
        while not poll.poll(0):
            if time.monotonic_ns() > until:
                return False
        return True


def take_turns_fast() -> None:
    """Have pyfuse3 wait as described above, from its next `main` on."""
    lowlevel = {**vars(trio.lowlevel), "wait_readable": Device().wait_readable}
    replaced = {"Lock": Turn, "lowlevel": SimpleNamespace(**lowlevel)}
    vars(pyfuse3)["trio"] = SimpleNamespace(**{**vars(trio), **replaced})
