"""Reads of the guest's bytes while the image may change: which state they see, and who waits.

What is in memory is read in the event loop, where a hand-over to a thread would take longer than
the read (50 to 100 µs); everything else in worker threads, so that nobody waits for a slow disk
but the one who reads from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import trio

from instarfs.errors import InstarfsError
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest, Place
from instarfs.image import Image, Signature, WouldBlock

FRESH_SECONDS = 0.001
"""So long it is believed that the image is what it was: the kernel's clock ticks no faster."""

MAX_THREADS = 16
"""Reads that may wait for disks at a time."""


class GuestReader:
    """The guest's bytes as they are now."""

    def __init__(self, look: Callable[[], tuple[Image, Hashable]], follow: Follow) -> None:
        """*look* gives the image and what changes when it does; it may raise a domain error."""
        self._look, self._follow = look, follow
        self._kept: tuple[Hashable, Guest] | None = None
        self._signature: tuple[Signature, ...] | None = None
        self._looked_at = 0.0
        self._opening = trio.Lock()
        self._limiter = trio.CapacityLimiter(MAX_THREADS)

    def state(self) -> Hashable:
        """What changes when any byte might: equal states, equal bytes."""
        try:
            state, kept = self._look()[1], self._kept
            return state, kept[1].state() if kept else ()
        except InstarfsError:
            return object()

    def forget(self) -> None:
        """Let go of the guest that was opened last, in any thread; reads under way hold it."""
        self._kept = None

    async def guest(self) -> Guest:
        """The guest of the image as it is now. Raises as `Guest` does."""
        guest = self._current()
        if guest is None:
            async with self._opening:
                guest = self._current() or await self._open()
        return guest

    def ready(self, place: Place, offset: int, size: int) -> memoryview | None:
        """As `read`, where nothing has to be waited for; else None."""
        guest = self._current()
        disk = guest.known(place) if guest is not None else None
        if disk is None:
            return None
        try:
            return disk.read(offset, size, wait=False)
        except WouldBlock:
            return None

    async def read(self, place: Place, offset: int, size: int) -> memoryview:
        """*size* bytes from *offset* of what is at *place*, fewer only at its end.

        Raises what `Guest.find` and `Disk.read` raise, for this part alone.
        """
        content = self.ready(place, offset, size)
        if content is not None:
            return content
        guest = await self.guest()
        return await trio.to_thread.run_sync(
            lambda: guest.find(place).read(offset, size),
            abandon_on_cancel=True,
            limiter=self._limiter,
        )

    def _current(self) -> Guest | None:
        """The guest that was opened last, if it is still good; asked before every read."""
        kept = self._kept
        if kept is None:
            return None
        state, guest = kept
        if self._signature is not None:
            now = time.monotonic()
            if now < self._looked_at + FRESH_SECONDS:
                return guest
            if guest.signature() == self._signature:
                self._looked_at = now
                return guest
        # Taken before the state is looked at: should the image change in between, it will differ.
        signature = guest.signature()
        if (self._look()[1], guest.state()) != state:
            return None
        self._signature = signature
        return guest

    async def _open(self) -> Guest:
        image, state = self._look()
        guest = await trio.to_thread.run_sync(Guest, image, self._follow, limiter=self._limiter)
        # The state from before: should the image have changed meanwhile, the next read notices.
        self._kept, self._signature = ((state, guest.state()), guest), None
        return guest
