"""One image under inspection: what it says of itself and its check, computed when first read.

Everything about when an image is read, under which locks, and what still holds after it changed
lives here. How the results look is `instarfs.render`'s business, where they appear the tree's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Protocol

from instarfs import locks
from instarfs.computed import Computed
from instarfs.errors import ImageInUse, InstarfsError
from instarfs.image import FileSource, Generation, Image
from planner.check import check_image
from planner.errors import ImageError
from planner.qcow2.contents import Contents, bare_header
from planner.qcow2.header import Header
from planner.report import Report

IDLE = "idle"

# A second write within one tick of the file system's clock (10 ms at 100 Hz) leaves no trace in
# the times: what was read of a file that young is not kept.
_CLOCK_TICK_NS = 20_000_000


@dataclass(frozen=True, slots=True)
class Description:
    """What an image says of itself; where that makes no sense, why, and the header as it stands.

    Sizes in bytes, from the file system.
    """

    contents: Contents | ImageError
    header: Header | None
    file_size: int
    allocated_size: int


class Check(Protocol):
    """`planner.check.check_image`, or what stands in for it in a test."""

    def __call__(
        self,
        source: FileSource,
        *,
        progress: Callable[[str, int, int], None],
        cancelled: Callable[[], bool],
    ) -> Report: ...


class Inspector:
    """One image: its `report` and its `description`, computed in worker threads.

    A report stays good until the image is written to, replaced under its path, or opened or
    closed by a writer; a description until one of the first two.
    """

    def __init__(self, image: Image, *, check: Check = check_image) -> None:
        self._image = image
        self._check = check
        self._generation = image.generation()
        self._progress = IDLE
        self.report = Computed(self._state, self._run_check)
        self.description = Computed(self._settled_generation, self._describe)

    @property
    def path(self) -> str:
        """The image's path, absolute."""
        return self._image.path

    def generation(self) -> Generation:
        """What the image is now, or was when it last could be looked at."""
        with contextlib.suppress(InstarfsError):
            self._generation = self._look()
        return self._generation

    def progress(self) -> str:
        """What the check is doing: `IDLE`, or its stage and percentage."""
        return self._progress

    def cancel(self) -> None:
        """End whatever is being computed; those who wait for it get an error."""
        self.report.cancel()
        self.description.cancel()

    def _look(self) -> Generation:
        """The generation of the file that the path names now."""
        if self._image.is_replaced():
            # The old one is closed when the last thread that reads it lets go of it.
            self._image = self._image.reopen()
        return self._image.generation()

    def _settled_generation(self) -> Hashable:
        generation = self._look()
        age = time.time_ns() - generation.mtime_ns
        return object() if 0 <= age < _CLOCK_TICK_NS else generation

    def _state(self) -> Hashable:
        """What a report depends on: also on whether somebody writes, as it then is no verdict."""
        generation = self._settled_generation()
        return generation, locks.is_written(self._image.fileno())

    def _describe(self, _cancelled: Callable[[], bool]) -> Description:
        image = self._image
        source = image.source()
        contents: Contents | ImageError
        try:
            contents = Contents.read(source)
        except ImageError as error:
            contents = error
        return Description(contents, bare_header(source), source.size, image.allocated_size())

    def _run_check(self, cancelled: Callable[[], bool]) -> Report:
        image = self._image
        before = image.generation()
        self._set_progress("opening", 0, 0)
        try:
            with contextlib.ExitStack() as stack:
                in_use = False
                try:
                    stack.enter_context(locks.held(image.fileno(), image.path))
                except ImageInUse:
                    in_use = True
                report = self._check(
                    image.source(), progress=self._set_progress, cancelled=cancelled
                )
        finally:
            self._progress = IDLE
        return replace(report, in_use=in_use, changed=image.generation() != before)

    def _set_progress(self, stage: str, done: int, total: int) -> None:
        self._progress = f"{stage} {100 * done // total if total else 0}%"
