"""Where an undo file is: beside the image or where its user says, and who may have made it.

What is in it is `instarfs.repair.journal`'s business.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from instarfs.errors import (
    ImageNameless,
    UndoFileAmbiguous,
    UndoFileDamaged,
    UndoFileForbidden,
    UndoFileForeign,
    UndoFileUnreachable,
    reason_of,
)
from instarfs.image.directory import NO_FILE, SUFFIX, Change, HandsGone, Opening, Spot, exists
from instarfs.image.file import Image, close_all, mount_id
from instarfs.text import shell_path

_NO_UNDO_FILE = "this is no undo file"
_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Identity(NamedTuple):
    """Which file an image is. Both numbers may be others after a restart, or for a copy."""

    device: int
    inode: int


class UndoPlace:
    """Where an image's undo file is: a directory, and the name in it.

    Looks for itself; whatever else is done there it lets the image's hands do.
    """

    def __init__(self, image: Image, spot: Spot, *, is_named: bool) -> None:
        """Takes the directory of *spot* over. *is_named*: by whoever gave the command.

        *image* must not be closed before the place is.
        """
        self._hands = image.hands
        self._image_path, self._image_fd = image.path, image.fileno()
        self._spot = spot
        self._status = os.fstat(image.fileno())
        self._owners = frozenset({0, os.geteuid(), self._status.st_uid})
        self._is_named = is_named

    @classmethod
    def of(cls, image: Image) -> Self | None:
        """Where *image* has its undo file; None for a device, unless somebody named a place.

        Raises `OSError`.
        """
        if image.undo is not None:
            spot = Spot(os.dup(image.undo.directory), image.undo.name)
            return cls(image, spot, is_named=True)
        return None if image.is_device else cls.beside(image)

    @classmethod
    def beside(cls, image: Image) -> Self:
        """Beside *image*; a link led beside the file that it meant. Raises `OSError`."""
        spot = Spot(os.dup(image.spot.directory), image.spot.name + SUFFIX)
        return cls(image, spot, is_named=False)

    @property
    def file(self) -> str:
        """The undo file's path, for messages."""
        try:
            directory = Path(f"/proc/self/fd/{self._spot.directory}").readlink()
        except OSError:
            return self._spot.name
        return str(directory / self._spot.name)

    @property
    def option(self) -> str:
        """What a command needs to find it, with a blank before it; empty where it is beside."""
        return f" --undo-file {shell_path(self.file)}" if self._is_named else ""

    @property
    def identity(self) -> Identity:
        """Which file the image is."""
        is_device = stat.S_ISBLK(self._status.st_mode)
        return Identity(
            self._status.st_rdev if is_device else self._status.st_dev, self._status.st_ino
        )

    def close(self) -> None:
        os.close(self._spot.directory)

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
        `UndoFileForbidden` and `UndoFileUnreachable` where that cannot be known.
        """
        try:
            fd = self._hands.open(what, *self._place())
        except FileNotFoundError:
            return None
        except HandsGone as error:
            raise UndoFileUnreachable(self.file, reason_of(error)) from error
        except PermissionError as error:
            raise UndoFileForbidden(self.file, reason_of(error)) from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            problem = _NO_UNDO_FILE if error.errno == NO_FILE else _unopened(error)
            raise UndoFileDamaged(self.file, problem) from error
        try:
            self._require_trust(fd)
        except BaseException:
            close_all(fd)
            raise
        return fd

    def make(self) -> int:
        """A descriptor of a new, empty undo file. Raises `OSError`, `UndoFileAmbiguous`."""
        if not self._is_named:
            self._require_one_name()
        return self._hands.open(Opening.NEW_UNDO, *self._place())

    def remove(self) -> None:
        """Remove the undo file, if there is one. Raises `OSError`."""
        with suppress(FileNotFoundError):
            self._hands.change(Change.REMOVE_UNDO, *self._place())

    def sync(self) -> None:
        """Return once the name is durable. Raises `OSError`."""
        self._hands.change(Change.SYNC, *self._place())

    def is_taken(self) -> bool:
        """Whether there is something under the undo file's name."""
        return exists(self._spot.directory, self._spot.name)

    def is_same(self, other: UndoPlace) -> bool:
        """Whether both are one name in one directory."""
        ours, its = os.fstat(self._spot.directory), os.fstat(other._spot.directory)
        names = self._spot.name, other._spot.name
        return os.path.samestat(ours, its) and names[0] == names[1]

    def require_image_here(self) -> None:
        """Raise `ImageNameless` where the image's name leads to another file, or to none.

        So it is with descriptors in /proc: what is beside them is nowhere.
        """
        image_name = self._spot.name.removesuffix(SUFFIX)
        if self._is_named:
            return
        try:
            named = os.stat(image_name, dir_fd=self._spot.directory, follow_symlinks=False)
        except OSError:
            named = None
        if named is None or not os.path.samestat(named, self._status):
            raise ImageNameless(self._image_path)

    def require_own(self, identity: Identity) -> None:
        """Raise `UndoFileForeign` where an undo file of the image *identity* may be a planted one.

        That is in a folder where others can put files: they need not have made this one.
        """
        if self._is_named or identity == self.identity:
            return
        status = os.fstat(self._spot.directory)
        if status.st_uid not in self._owners or status.st_mode & _OF_OTHERS:
            raise UndoFileForeign(
                self.file, "it was made for another file, and others may put files into this folder"
            )

    def other_names(self) -> str:
        """What makes the image reachable under other names too, in words; empty where nothing."""
        if self._status.st_nlink > 1 and not stat.S_ISBLK(self._status.st_mode):
            return f"the image has {self._status.st_nlink} names (hard links)"
        mounts = {mount_id(self._image_fd), mount_id(self._spot.directory)}
        if len(mounts) > 1 and None not in mounts:
            return "the image is a mount of its own here (a bind mount)"
        return ""

    def _require_one_name(self) -> None:
        names = self.other_names()
        if names:
            raise UndoFileAmbiguous(
                self.file, f"{names}, and what lies beside one is not found from another"
            )

    def _place(self) -> tuple[int, str]:
        return self._spot.directory, self._spot.name

    def _require_trust(self, fd: int) -> None:
        """Refuse what somebody made who may not write to the image: its bytes go in there."""
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise UndoFileDamaged(self.file, _unopened(error)) from error
        if not stat.S_ISREG(status.st_mode):
            raise UndoFileDamaged(self.file, _NO_UNDO_FILE)
        writers = status.st_mode & ~self._status.st_mode & _OF_OTHERS
        if status.st_uid not in self._owners or writers:
            raise UndoFileDamaged(self.file, "others than the image's owner may write to it")


def _unopened(error: OSError) -> str:
    return f"the undo file cannot be opened: {reason_of(error)}"
