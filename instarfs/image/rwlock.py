"""Who of this process has the image at a moment: any number of readers, or one writer alone.

QEMU's locks exclude other processes. They belong to a descriptor, not to a thread: of two readers
on one descriptor the first to end would drop those of the other, and the descriptor of a writer
conflicts with that of a reader, though both are ours. What is read or written is not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from instarfs.errors import ImageInUse
from instarfs.image import locks
from instarfs.image.file import Image
from planner.progress import Progress

_POLL_SECONDS = 0.05


class Sharing:
    """Keeps the threads of one process off each other. Every method blocks its thread only."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers: dict[Image, int] = {}
        self._locks: dict[Image, ExitStack] = {}
        self._has_writer = False

    @property
    def has_writer(self) -> bool:
        """Whether a writer of this process is at work, or about to be: then nobody reads alone."""
        return self._has_writer

    @contextmanager
    def reading(self, image: Image) -> Iterator[bool]:
        """Keep writers away from *image*, where that is possible: yields whether it was.

        Never waits. Not possible while somebody writes to it, here or in another process.
        """
        is_kept = self._begin_reading(image)
        try:
            yield is_kept
        finally:
            if is_kept:
                self._end_reading(image)

    @contextmanager
    def writing(self, progress: Progress) -> Iterator[None]:
        """Be the only one: readers that have begun are waited for, as *progress* is told.

        Takes no lock of QEMU's; nor does any reader meanwhile, so that the writer can.
        """
        with self._changed:
            self._has_writer = True
        try:
            with self._changed:
                while self._readers:
                    progress("waiting", 0, 0)
                    self._changed.wait(_POLL_SECONDS)
            yield
        finally:
            with self._changed:
                self._has_writer = False

    def _begin_reading(self, image: Image) -> bool:
        with self._changed:
            if self._has_writer:
                return False
            if image not in self._readers:
                stack = ExitStack()
                try:
                    stack.enter_context(locks.held(image.fileno(), image.path))
                except ImageInUse:
                    return False
                self._locks[image] = stack
            self._readers[image] = self._readers.get(image, 0) + 1
            return True

    def _end_reading(self, image: Image) -> None:
        with self._changed:
            self._readers[image] -= 1
            if not self._readers[image]:
                del self._readers[image]
                self._locks.pop(image).close()
                self._changed.notify_all()
