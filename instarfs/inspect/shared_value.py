"""A value that takes long to compute, once for all who ask for it.

Everything about sharing such values lives here: one computation for any number of readers, how long
a value stays good, and ending the work when nobody waits for it, or all of it at once. A
computation is a task of the event loop: it waits there for the values that it needs, and hands to a
thread what takes long. What is computed, and what it depends on, comes from outside.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import trio

from instarfs.errors import DOMAIN_ERRORS, ImageNotFollowed, ReadCancelled
from planner.errors import Cancelled
from planner.progress import Progress, tell_nobody, unless

T = TypeVar("T")

Changed = Callable[[], bool]
"""Whether what a computation is about is no longer what it was when it began."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Edition(Generic[T]):
    """One outcome of the computation; another computation gives another edition."""

    value: T


@asynccontextmanager
async def room_for_values() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks end with the block; what the block raises comes out as it is."""
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:  # of one: no value raises anything but in its readers
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None


class Workshop:
    """Where values are computed: in *nursery*, with which all that is under way ends.

    *moment*: what stays the same while what the values are about does. Asked in the event loop, as
    each computation begins and when it wants to know; never raises.
    """

    def __init__(self, nursery: trio.Nursery, moment: Callable[[], Hashable]) -> None:
        self._nursery, self._moment = nursery, moment
        self._runs: set[_Run[Any]] = set()

    def cancel(self) -> None:
        """End whatever is being computed; those who wait for it get `ReadCancelled`."""
        for run in self._runs:
            run.scope.cancel()

    def start(self, work: Callable[[_Run[T]], Awaitable[None]], run: _Run[T]) -> None:
        """Begin *work*, a computation of a `Value`."""
        self._runs.add(run)
        self._nursery.start_soon(self._do, work, run)

    def watch(self) -> Changed:
        """Begin to look whether the moment is still the same."""
        before = self._moment()
        return lambda: self._moment() != before

    async def _do(self, work: Callable[[_Run[T]], Awaitable[None]], run: _Run[T]) -> None:
        try:
            await work(run)
        finally:
            self._runs.discard(run)


class Value(Generic[T]):
    """A value that is computed when it is first asked for, and again when its key has changed.

    *key* says what the value depends on. It is called often, in the event loop, and may raise a
    domain error, which readers get; what it takes from others *refresh* has looked at before, where
    that may have to be waited for. *compute* awaits the values that it needs, and a thread for what
    takes long, whose progress is told `while_wanted`; what it raises goes to those who wait, and is
    not kept. Neither is a value whose key changed while it was computed.
    """

    def __init__(
        self,
        workshop: Workshop,
        key: Callable[[], Hashable],
        compute: Callable[[Changed], Awaitable[T]],
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._workshop = workshop
        self._key = key
        self._refresh = refresh
        self._compute = compute
        self._run: _Run[T] | None = None
        self._kept: tuple[Hashable, Edition[T]] | None = None

    def peek(self) -> Edition[T] | None:
        """The value if it is known and still good. Never computes, never raises."""
        kept = self._kept
        if kept is None:
            return None
        key, edition = kept
        try:
            return edition if key == self._key() else None
        except DOMAIN_ERRORS:
            return None

    async def get(self) -> Edition[T]:
        """The value, computed first where need be.

        A computation ends with its last reader: one that nobody waits for is cancelled. Who comes
        while one is under way whose key then changes gets a later one: what it began with may have
        been over before the reader came.
        """
        if self._refresh is not None:
            await self._refresh()
        early = self._run
        while True:
            edition = self.peek()
            if edition is not None:
                return edition
            if self._run is None:
                self._run = _Run()
                # Not the reader's own task: the reader may leave and others still wait.
                self._workshop.start(self._execute, self._run)
            elif self._run.is_cancelled:
                # Two at a time would share the image's locks, and the first would drop them.
                await self._run.wait()
                continue
            run = self._run
            edition = await run.join()
            if run is not early or run.is_kept:
                return edition

    def forget(self) -> None:
        """Let go of what is kept; whoever asks gets it computed anew."""
        self._kept = None

    async def _execute(self, run: _Run[T]) -> None:
        try:
            with run.scope:
                key = self._key()
                edition = Edition(await self._compute(self._workshop.watch()))
                run.is_kept = key == self._key()
                self._kept = (key, edition) if run.is_kept else None
                run.edition = edition
        except Cancelled:
            pass  # run.edition stays None
        except Exception as error:  # noqa: BLE001 - it is raised again in every reader
            # What has taken the image's place is told by who has looked.
            if isinstance(error, DOMAIN_ERRORS) and not isinstance(error, ImageNotFollowed):
                log.warning("%s", str(error))  # not the error: it holds on to what it came out of
            run.error = error
        finally:
            self._run = None
            run.finish()


class _Run(Generic[T]):
    """One computation and those who wait for it."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.edition: Edition[T] | None = None
        self.is_kept = False
        self.error: Exception | None = None
        self._done = trio.Event()
        self._readers = 0

    @property
    def is_cancelled(self) -> bool:
        return self.scope.cancel_called

    def finish(self) -> None:
        self._done.set()

    async def wait(self) -> None:
        await self._done.wait()

    async def join(self) -> Edition[T]:
        self._readers += 1
        try:
            await self._done.wait()
        finally:
            self._readers -= 1
            if not self._readers:
                self.scope.cancel()
        if self.error is not None:
            try:
                raise self.error
            finally:
                # The frames that it passes refer to this run: held here, it would hold them, and
                # an image that they worked on, until the garbage collector comes by.
                if not self._readers:
                    self.error = None
        if self.edition is None:
            raise ReadCancelled
        return self.edition


def _is_unwanted() -> bool:
    """Whether whoever waits for the calling worker thread was cancelled."""
    try:
        trio.from_thread.check_cancelled()
    except trio.Cancelled:
        return True
    return False


def while_wanted(progress: Progress = tell_nobody) -> Progress:
    """*progress* of a work in a worker thread, which ends when nobody waits for it."""
    return unless(_is_unwanted, progress)
