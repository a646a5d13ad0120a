"""How the event loop takes the kernel's requests from /dev/fuse, one after the other.

pyfuse3 has several tasks take turns: each waits for its turn, then for a request, hands the turn on
and answers. With trio's own means that costs a round of epoll and two changes of task for every
request, more than most answers take. `take_turns_fast` gives pyfuse3 others in their place, as its
own asyncio mode does: a turn that is not handed on but left for whoever comes first, mostly the
task that has just answered; and a wait that looks before it sleeps, since one who reads asks again
as soon as he has an answer.

That is the inside of pyfuse3, which promises none of it: this module relies on it, and no other
does. Where it is not what the tests have seen, pyfuse3 takes turns in its own way, which is slower.
"""

from __future__ import annotations

import logging
import os
import select
import time
from types import SimpleNamespace

import pyfuse3
import trio

KNOWN_RELEASES = ("3.4.", "3.5.")
"""Of pyfuse3, those whose tasks take turns as it is told here."""

LOOKS_NS = 40_000
"""So long the device is looked at before the loop sleeps; waking it takes longer."""

IN_A_ROW = 32
"""Requests that may be taken before the other tasks of the loop have their turn."""

log = logging.getLogger(__name__)


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

    def __init__(self, *, looks_ns: int = LOOKS_NS, most_in_a_row: int = IN_A_ROW) -> None:
        self._poll: select.poll | None = None
        self._in_a_row, self._most_in_a_row = 0, most_in_a_row
        # A single processor is the one that whoever asks next needs.
        self._looks_ns = looks_ns if len(os.sched_getaffinity(0)) > 1 else 0

    async def wait_readable(self, fd: int) -> None:
        """As `trio.lowlevel.wait_readable`, but a checkpoint only now and then."""
        if self._poll is None:
            self._poll = select.poll()
            self._poll.register(fd, select.POLLIN)
        if self._in_a_row < self._most_in_a_row and self._is_readable(self._poll):
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


def is_as_known() -> bool:
    """Whether this pyfuse3 waits for requests as `take_turns_fast` relies on.

    By ``trio.lowlevel.wait_readable``, under a ``trio.Lock`` that is entered and left, both looked
    up in a ``trio`` among its own globals.
    """
    names = vars(pyfuse3)
    return (
        names["__version__"].startswith(KNOWN_RELEASES)
        and names.get("trio") is trio
        and {"_wait_fuse_readable", "_session_loop"} <= names.keys()
    )


def take_turns_fast() -> None:
    """Have pyfuse3 wait as described above, from its next `main` on, if it is as known."""
    if not is_as_known():
        log.info("pyfuse3 %s waits for requests in its own way", vars(pyfuse3)["__version__"])
        return
    lowlevel = {**vars(trio.lowlevel), "wait_readable": Device().wait_readable}
    replaced = {"Lock": Turn, "lowlevel": SimpleNamespace(**lowlevel)}
    vars(pyfuse3)["trio"] = SimpleNamespace(**{**vars(trio), **replaced})
