"""The image under inspection: which file its path names now, what that is, and who looked at it.

Everything about a file that is written to, or replaced under its path, while it is inspected lives
here. All of it is for the event loop, and waits for nobody: where the image does not answer it
raises `ImageSilent`, or tells what was last known; `attend` waits. What is computed from it is the
inspector's business.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio

from instarfs.errors import ImageNotFollowed, ImageReplaced, InstarfsError
from instarfs.image import locks
from instarfs.image.file import FileSource, Generation, Image, Signature, WouldBlock
from instarfs.image.rwlock import Sharing
from instarfs.image.surroundings import Gone, Surroundings
from instarfs.inspect.asking import Asker
from instarfs.repair.interrupted import pending
from instarfs.repair.looking import look_around
from planner.qcow2.geometry import SECTOR
from planner.qcow2.header import SIGNED_MAX, bare_header

if TYPE_CHECKING:
    from instarfs.repair.journal import Summary
    from instarfs.repair.outcome import Pending

T = TypeVar("T")

log = logging.getLogger(__name__)


class Subject:
    """One image by its path. ``image``: the file that was there when it was last looked at.

    ``sharing``: who of this process has it.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self.sharing = Sharing()
        self._asker = Asker(image.path, at_once=image.answers_at_once)
        image.close_aside()
        self._generation = image.generation()
        self._seen: tuple[Signature | None, Generation] | None = None
        # The image itself, not its inode number: that of a file which is gone goes to another.
        self._reviewed = weakref.ref(image)
        self._let_go: list[Callable[[], None]] = []
        self._told = ""
        self._size: tuple[Generation | None, int] = (None, 0)
        # One that waits for a disk that does not answer is enough.
        self._reading_header = trio.CapacityLimiter(1)

    @property
    def path(self) -> str:
        """The image's path, absolute."""
        return self.image.path

    def when_replaced(self, let_go: Callable[[], None]) -> None:
        """Have *let_go* called when another file has taken the path."""
        self._let_go.append(let_go)

    # ---- what it is now ----

    async def attend(self) -> None:
        """Wait, as long as it takes, until the image answers."""
        await self._asker.wait(self.image.is_replaced)

    def ask(self, question: Callable[[], T]) -> T:
        """What *question*, which is about the image, gives. Raises `ImageSilent`."""
        return self._asker.ask(question)

    def look(self) -> tuple[Image, Hashable]:
        """The file that the path names now, and what changes when its bytes do.

        See `Generation.state`. Raises a domain error where there is no image.
        """
        generation = self._look()
        return self.image, generation.state()

    def state(self) -> Hashable:
        """What changes when any byte of the image might. Never raises."""
        try:
            return self.look()[1]
        except InstarfsError:
            return object()

    def checked_state(self) -> Hashable:
        """What a check depends on: also on whether somebody writes, as it then is no verdict.

        Raises a domain error where there is no image.
        """
        _, state = self.look()
        return state, self.is_written(), self.pending(), self.gone()

    def generation(self) -> Generation:
        """What the image is now, or was when it last could be looked at."""
        with contextlib.suppress(InstarfsError):
            self._generation = self._look()
        return self._generation

    def moment(self) -> Hashable:
        """The file and whether it is written.

        What takes a check and looks again may see two images. It is of one if this is the same
        before the first and after the last look; ``image`` is the one that it tells of. Never
        raises: while the image does not answer, each moment is another.
        """
        try:
            return self.generation(), self.is_written()
        except InstarfsError:
            return object()

    def is_written(self) -> bool:
        """Whether somebody, here or elsewhere, writes to it, or may."""
        return self.sharing.has_writer or self.ask(
            partial(locks.is_written, self.image.fileno(), self.path)
        )

    def gone(self) -> Gone | None:
        """As `Image.gone`."""
        return self.ask(self.image.gone)

    def source(self) -> FileSource:
        """The image's bytes, as many as there are now."""
        return self.ask(self.image.source)

    def surroundings(self) -> Surroundings:
        """What is around the image, to make files there."""
        return self.ask(partial(look_around, self.image))

    def _look(self) -> Generation:
        # For every answer that a mount gives: mostly it is as it was.
        signature = self.ask(self.image.signature)
        if self._seen is not None and signature == self._seen[0]:
            return self._seen[1]
        generation = self._look_closely()
        # Unless the image has changed in between.
        self._seen = (signature, generation) if signature == generation.signature() else None
        return generation

    def _look_closely(self) -> Generation:
        if self.ask(self.image.is_replaced):
            # The old one is closed, and its disk space free, when the last thread that reads it
            # lets go of it.
            self.image = self._reopened()
            for let_go in self._let_go:
                let_go()
        generation = self.ask(self.image.generation)
        self._told = ""
        return generation

    def _reopened(self) -> Image:
        try:
            # Takes its time, wherever that is.
            return self._asker.ask(self.image.reopen, at_once=False)
        except ImageNotFollowed as error:
            # Whoever reads gets an errno; and everything that is read asks anew.
            if self._told != str(error):
                self._told = str(error)
                log.warning("%s", self._told)
            raise

    # ---- the length of the guest's disk ----

    def disk_size(self) -> int:
        """Bytes of the guest's disk, from the header alone; 0 where there is none.

        Waits for no disk: until `learn_disk_size` has, those that there were.
        """
        generation = self.generation()
        if self._size[0] != generation:
            with contextlib.suppress(WouldBlock, InstarfsError):
                size = self.ask(partial(_disk_size, self.image, wait=False))
                self._size = generation, size
        return self._size[1]

    async def learn_disk_size(self) -> None:
        """Read the header, in a thread where a disk has to be waited for.

        Raises an `InstarfsError` where it cannot be read: nobody is to take that for no disk.
        """
        generation, image = self.generation(), self.image
        self.disk_size()
        if self._size[0] != generation:
            size = await trio.to_thread.run_sync(
                partial(_disk_size, image, wait=True),
                abandon_on_cancel=True,
                limiter=self._reading_header,
            )
            self._size = generation, size

    # ---- its repairs ----

    def reviewed(self, image: Image) -> None:
        """That somebody has had *image* checked, and may have it repaired."""
        self._reviewed = weakref.ref(image)

    def to_repair(self) -> Image:
        """The image, to be repaired. Raises `ImageReplaced` for one that nobody has looked at."""
        self._look()
        if self._reviewed() is not self.image:
            raise ImageReplaced(self.path)
        return self.image

    def pending(self) -> Pending | None:
        """The repair of the image that was interrupted, if there is one."""
        return self.ask(partial(pending, self.image))

    def last_repair(self) -> Summary | Exception | None:
        """What its undo file says of itself, or why that cannot be known; None where none is."""
        from instarfs.inspect.repair_queue import last_repair  # noqa: PLC0415

        return self.ask(partial(last_repair, self.image))

    def is_touched(self, last: Summary) -> bool:
        """Whether others may have written to the image after the *last* repair, by its times."""
        from instarfs.repair.journal import State  # noqa: PLC0415

        if self.image.is_device or last.status.state is not State.APPLIED:
            return False
        return last.status.mtime_ns != self.generation().mtime_ns


def _disk_size(image: Image, *, wait: bool) -> int:
    """As the header says. Raises `WouldBlock` unless *wait*, and an `InstarfsError`."""
    header = bare_header(image.source(wait=wait))
    size = header.size // SECTOR * SECTOR if header else 0
    return size if size <= SIGNED_MAX else 0
