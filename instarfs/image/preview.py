"""An image as it would be after a plan: its bytes with the plan laid over them, in memory.

Whoever reads it sees no difference to one that was repaired. It is of one moment: once the file
has been written to, the plan is for something that is no more, and nothing is read of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Never

from instarfs.errors import PreviewOutdated
from instarfs.image.directory import Spot
from instarfs.image.file import FileSource, Generation, Image
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan


class PreviewSource(FileSource):
    """The bytes of *image* with *plan* laid over them."""

    def __init__(self, image: Image, plan: Plan, *, wait: bool) -> None:
        super().__init__(image, plan.size_after, wait=wait)
        self._overlay = Overlay(FileSource(image, plan.size_before, wait=wait), plan)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._overlay.read_into(offset, buffer.cast("B"))

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield from self._overlay.data_extents(offset, length)


class PreviewImage(Image):
    """*image*, as it was ``before``, with ``plan`` laid over it. Nothing writes to it."""

    def __init__(self, image: Image, plan: Plan, before: Generation) -> None:
        """Has descriptors of its own."""
        spot = image.spot
        super().__init__(
            image.path,
            os.dup(image.fileno()),
            os.dup(image.directory),
            is_device=image.is_device,
            spot=Spot(os.dup(spot.directory), spot.name),
            origin=image.origin,
            hands=image.hands,
        )
        self.plan, self._before = plan, before

    @property
    def edition(self) -> str:
        """Of the plan that is laid over it."""
        return f" after {self.plan.tier} {self.plan.id}"

    def source(self, *, wait: bool = True) -> FileSource:
        """Raises `PreviewOutdated`."""
        self.generation()
        return PreviewSource(self, self.plan, wait=wait)

    def generation(self) -> Generation:
        """Raises `PreviewOutdated`."""
        now = super().generation()
        if now != self._before:
            raise PreviewOutdated(self.path)
        return replace(now, size=self.plan.size_after)

    def is_replaced(self) -> bool:
        """What has taken its place is no preview of anything."""
        return False

    def open_to_write(self) -> Never:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
