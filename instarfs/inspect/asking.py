"""Questions about an image that nobody may answer, asked in an event loop that is not to wait.

Whoever serves the file system of an image, a server over the network or a process like ours, may
hang, and a call that asks it for the size of a file hangs with it. Such calls are made in a thread,
one after the other, and waited for a moment; while one is late, whoever asks is told so at once.
Where files are on disks of this machine a thread would cost more than the call: there is none.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import trio

from instarfs.errors import ImageSilent

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that the event loop waits, once for each time that an image stops answering."""

_Asked = tuple[Future[Any], Callable[[], Any]]


class Asker:
    """Asks about the image at *path*; *at_once*: whether it answers without being waited for."""

    def __init__(self, path: str, *, at_once: bool) -> None:
        self._path, self._at_once = path, at_once
        self._worker: _Worker | None = None
        self._probe: Future[Any] | None = None

    def ask(self, question: Callable[[], T], *, at_once: bool = True) -> T:
        """What *question* returns or raises; `ImageSilent` where that takes too long.

        What it returns too late is let go of. Not *at_once*: this one takes its time, wherever the
        image is.
        """
        if self._at_once and at_once:
            return question()
        worker = self._its_worker()
        if worker.is_late():
            raise ImageSilent(self._path)
        try:
            answer: T = worker.put(question).result(PATIENCE)
        except TimeoutError:
            raise ImageSilent(self._path) from None
        return answer

    async def wait(self, question: Callable[[], object]) -> None:
        """Return when *question* has been answered, whatever the answer, and however late."""
        if self._at_once:
            return
        if self._probe is None or self._probe.done():
            self._probe = self._its_worker().put(question)
        answered, token = trio.Event(), trio.lowlevel.current_trio_token()

        def tell(_: object) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(answered.set)

        self._probe.add_done_callback(tell)
        await answered.wait()

    def _its_worker(self) -> _Worker:
        if self._worker is None:
            self._worker = _Worker()
            # The thread knows the queue alone, and ends with whoever asks.
            weakref.finalize(self, self._worker.end).atexit = False
        return self._worker


class _Worker:
    """A thread that answers questions in turn. It holds up no process that ends."""

    def __init__(self) -> None:
        self._questions: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._begun: float | None = None
        threading.Thread(target=self._run, name="instarfs-asker", daemon=True).start()

    def put(self, question: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._questions.put((future, question))
        return future

    def is_late(self) -> bool:
        """Whether a question has been waited for too long already."""
        begun = self._begun
        return begun is not None and time.monotonic() > begun + PATIENCE

    def end(self) -> None:
        """After what has been asked."""
        self._questions.put(None)

    def _run(self) -> None:
        while (asked := self._questions.get()) is not None:
            future, question = asked
            del asked
            self._begun = time.monotonic()
            # What was asked about, an image that was replaced, is let go of before the answer is
            # there; so is an answer that nobody waits for.
            try:
                answer = question()
            except BaseException as error:  # noqa: BLE001 - it is raised where it was asked
                del question
                self._begun = None
                future.set_exception(error)
            else:
                del question
                self._begun = None
                future.set_result(answer)
                del answer
            del future
