"""Reads of the guest's bytes while the image may change: which state they see, and who waits.

What is in memory is read in the event loop, where a hand-over to a thread would take longer than
the read (50 to 100 µs); everything else in worker threads, so that nobody waits for a slow disk
but the one who reads from it. Of the files that are followed not even the times are asked for in
the event loop: they may be served by a process that does not answer, or waits for this one.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from instarfs.errors import InstarfsError
from instarfs.guest.follow import Follow
from instarfs.guest.place import Place
from instarfs.image.file import Image, Signature, WouldBlock

if TYPE_CHECKING:  # what a mount loads once it answers
    from instarfs.guest.guest import Guest

FRESH_SECONDS = 0.001
"""So long it is believed that the image is what it was: the kernel's clock ticks no faster."""

MAX_THREADS = 16
"""Reads that may wait for disks at a time."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A guest, the image's state that it was opened in, and that of the files beneath."""

    guest: Guest
    state: Hashable
    beneath: Hashable


class GuestReader:
    """The guest's bytes as they are now."""

    def __init__(
        self,
        look: Callable[[], tuple[Image, Hashable]],
        follow: Follow,
        *,
        attend: Callable[[], Awaitable[None]] | None = None,
        ask: Callable[[Callable[[], Any]], Any] = lambda question: question(),
    ) -> None:
        """*look* gives the image and what changes when it does; it may raise a domain error.

        *attend* waits until the image answers; *ask* asks it something, and does not wait long.
        """
        self._look, self._follow, self._attend, self._ask = look, follow, attend, ask
        self._kept: _Kept | None = None
        self._signature: Signature | None = None
        self._looked_at = 0.0
        self._beneath: Hashable = ()
        self._looked_beneath_at = 0.0
        self._opening = trio.Lock()
        self._limiter = trio.CapacityLimiter(MAX_THREADS)
        # One that waits for a file that nobody serves is enough.
        self._looking = trio.CapacityLimiter(1)

    def state(self) -> Hashable:
        """What changes when any byte might: equal states, equal bytes.

        Of the files beneath as they were when `refresh` looked at them last.
        """
        try:
            return self._look()[1], self._beneath if self._kept else ()
        except InstarfsError:
            return object()

    def forget(self) -> None:
        """Let go of the guest that was opened last, in any thread; reads under way hold it."""
        self._kept = None

    async def refresh(self) -> None:
        """Wait for the image, and look at the files beneath the guest, if any, in a thread."""
        if self._attend is not None:
            await self._attend()
        kept = self._kept
        if kept is None or self._is_fresh(kept):
            return
        before = time.monotonic()
        beneath = await trio.to_thread.run_sync(
            kept.guest.state_beneath, abandon_on_cancel=True, limiter=self._looking
        )
        if self._kept is kept:
            self._beneath, self._looked_beneath_at = beneath, before

    async def guest(self) -> Guest:
        """The guest of the image as it is now. Raises as `Guest` does."""
        await self.refresh()
        guest = self._current()
        if guest is None:
            async with self._opening:
                await self.refresh()
                guest = self._current() or await self._open()
        return guest

    def ready(self, place: Place, offset: int, size: int) -> memoryview | None:
        """*size* bytes from *offset* of what is at *place*, fewer only at its end.

        None where something has to be waited for. Raises what `Guest.find` and `Disk.read` raise,
        for this part alone.
        """
        guest = self._fresh()
        return _at_hand(guest, place, offset, size) if guest is not None else None

    async def read(self, place: Place, offset: int, size: int) -> memoryview:
        """The same, waiting for what has to be waited for; to be called where `ready` gave None."""
        guest = self._fresh()
        if guest is None:
            guest = await self.guest()
            content = _at_hand(guest, place, offset, size)
            if content is not None:
                return content
        return await trio.to_thread.run_sync(
            lambda: guest.find(place).read(offset, size),
            abandon_on_cancel=True,
            limiter=self._limiter,
        )

    def _fresh(self) -> Guest | None:
        """The guest as it is now, where nothing has to be waited for to know that."""
        kept = self._kept
        if kept is None or not self._is_fresh(kept):
            return None
        fresh_until = self._looked_at + FRESH_SECONDS
        if not kept.guest.answers_at_once and time.monotonic() >= fresh_until:
            return None
        return self._current()

    def _is_fresh(self, kept: _Kept) -> bool:
        """Whether nothing beneath has to be looked at."""
        fresh_until = self._looked_beneath_at + FRESH_SECONDS
        return not kept.guest.follows or time.monotonic() < fresh_until

    def _current(self) -> Guest | None:
        """The guest that was opened last, if it is still good; asked before every read.

        As far as the files beneath are concerned, it is what `refresh` found.
        """
        kept = self._kept
        if kept is None or kept.beneath != self._beneath:
            return None
        guest = kept.guest
        if self._signature is not None:
            now = time.monotonic()
            if now < self._looked_at + FRESH_SECONDS:
                return guest
            if self._ask(guest.signature) == self._signature:
                self._looked_at = now
                return guest
        # Taken before the state is looked at: should the image change in between, it will differ.
        signature = self._ask(guest.signature)
        if self._look()[1] != kept.state:
            return None
        self._signature = signature
        return guest

    async def _open(self) -> Guest:
        image, state = self._look()
        before = time.monotonic()
        guest, beneath = await trio.to_thread.run_sync(
            self._open_now, image, abandon_on_cancel=True, limiter=self._limiter
        )
        # The state from before: should the image have changed meanwhile, the next read notices.
        self._kept, self._signature = _Kept(guest, state, beneath), None
        self._beneath, self._looked_beneath_at = beneath, before
        return guest

    def _open_now(self, image: Image) -> tuple[Guest, Hashable]:
        from instarfs.guest.guest import Guest  # noqa: PLC0415

        guest = Guest(image, self._follow)
        return guest, guest.state_beneath()


def _at_hand(guest: Guest, place: Place, offset: int, size: int) -> memoryview | None:
    """What is read from memory, without waiting for anything; None where that is not enough."""
    disk = guest.known(place)
    if disk is None:
        return None
    try:
        return disk.read(offset, size, wait=False)
    except WouldBlock:
        return None
