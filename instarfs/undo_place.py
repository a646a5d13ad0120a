"""Where an undo file is: its names beside the image, and who may have made it.

What is in it is `instarfs.journal`'s business.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from instarfs.errors import UndoFileDamaged, UndoFileUnreachable, reason_of
from instarfs.image import Image
from instarfs.names import OLD, SUFFIX, Change, Hands, HandsGone, Opening, behind_links, exists


class UndoPlace:
    """Where an image's undo file is: the directory of the file itself, and the names in it.

    Looks for itself; whatever else is done there it lets the image's hands do.
    """

    def __init__(
        self, hands: Hands, directory: int, image_name: str, owner: os.stat_result
    ) -> None:
        """Takes *directory* over. *owner*: whose the image is, and who may write to it."""
        self._hands = hands
        self._directory = directory
        self._image_name = image_name
        self._owners = frozenset({0, os.geteuid(), owner.st_uid})
        self._image_mode = owner.st_mode

    @classmethod
    def beside(cls, image: Image) -> Self:
        """The place for *image*; a link leads beside the file that it means. Raises `OSError`."""
        status = os.fstat(image.fileno())
        directory, name = behind_links(image.directory, image.name)
        return cls(image.hands, directory, name, status)

    @property
    def file(self) -> str:
        """The undo file's path, for messages."""
        try:
            directory = Path(f"/proc/self/fd/{self._directory}").readlink()
        except OSError:
            return self._image_name + SUFFIX
        return str(directory / (self._image_name + SUFFIX))

    def close(self) -> None:
        os.close(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self, what: Opening) -> int | None:
        """A descriptor of the undo file, to read or to write it; None where there is none.

        Raises `UndoFileDamaged` for what cannot be one, or may have been made by somebody else;
        `UndoFileUnreachable` where that cannot be known.
        """
        try:
            fd = self._hands.open(what, self._directory, self._image_name)
        except FileNotFoundError:
            return None
        except HandsGone as error:
            raise UndoFileUnreachable(self.file, reason_of(error)) from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            problem = f"the undo file cannot be opened: {reason_of(error)}"
            raise UndoFileDamaged(self.file, problem) from error
        try:
            self._require_trust(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def make(self) -> int:
        """A descriptor of a new, empty file, still without the undo file's name."""
        self.discard_new()  # what a crash left; the image's locks exclude a rival
        return self._hands.open(Opening.NEW_UNDO, self._directory, self._image_name)

    def discard_new(self) -> None:
        """Remove what `make` made, if it has not been put in place."""
        self._remove(Change.DISCARD_NEW)

    def put_in_place(self) -> None:
        """Give the file of `make` its name; the undo file that had it is kept aside."""
        with suppress(FileNotFoundError):
            self._change(Change.KEEP_ASIDE)
        try:
            self._change(Change.PUT_IN_PLACE)
            self._change(Change.SYNC)
        except OSError:
            with suppress(OSError):
                self._bring_back()
            raise

    def drop_old(self) -> None:
        """Remove the undo file that was kept aside."""
        self._remove(Change.DROP_OLD)

    def drop_current(self) -> None:
        """Remove the undo file; the one that was kept aside, if any, takes its place."""
        self._bring_back()
        self._change(Change.SYNC)

    def is_taken(self) -> bool:
        """Whether there is something under the undo file's name."""
        return exists(self._directory, self._image_name + SUFFIX)

    def restore_old(self) -> None:
        """Bring back the undo file that was kept aside, where a crash left no other."""
        if self.has_old() and not self.is_taken():
            self.drop_current()

    def has_old(self) -> bool:
        """Whether an undo file is kept aside."""
        return exists(self._directory, self._image_name + OLD)

    def _bring_back(self) -> None:
        try:
            self._change(Change.BRING_BACK)
        except FileNotFoundError:
            self._remove(Change.DROP_UNDO)

    def _remove(self, change: Change) -> None:
        with suppress(FileNotFoundError):
            self._change(change)

    def _change(self, change: Change) -> None:
        self._hands.change(change, self._directory, self._image_name)

    def _require_trust(self, status: os.stat_result) -> None:
        """Refuse what somebody made who may not write to the image: its bytes go in there."""
        if not stat.S_ISREG(status.st_mode):
            raise UndoFileDamaged(self.file, "this is no undo file")
        writers = status.st_mode & ~self._image_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid not in self._owners or writers:
            raise UndoFileDamaged(self.file, "others than the image's owner may write to it")
