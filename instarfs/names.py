"""The names that are an image's own, and all that is ever done under them.

Its own name, and that of its undo file, beside it or where its user says. Everything goes through
a directory as it was opened, never by path again. A process that must not reach into those
directories lets another one do the same: see `instarfs.mount.broker`. What is in the files is not
known here.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

SUFFIX = ".instarfs-undo"
"""What the undo file's name has after the image's."""

MAX_LINKS = 40
"""As the kernel follows."""

_O_PATH_OF_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: should a FIFO take a file's place after it was looked at, opening must not wait.
_O_ANY = os.O_NONBLOCK | os.O_CLOEXEC
_MODE = 0o600


class Opening(IntEnum):
    """What can be opened. An image may be behind a link, an undo file may not.

    `NEW_UNDO` makes what is not there yet.
    """

    IMAGE = 1
    IMAGE_TO_WRITE = 2
    UNDO = 3
    UNDO_TO_WRITE = 4
    NEW_UNDO = 5


class Change(IntEnum):
    """What can be done to the name of an undo file, and the flush that makes it durable."""

    REMOVE_UNDO = 16
    SYNC = 17


OF_IMAGE = frozenset({Opening.IMAGE, Opening.IMAGE_TO_WRITE})
"""What is done under the name that the image was opened by; all else where the undo file is."""

OF_READERS = frozenset({Opening.IMAGE, Opening.UNDO})
"""What changes nothing, nor lets anything be changed."""

_FLAGS = {
    Opening.IMAGE: os.O_RDONLY,
    Opening.IMAGE_TO_WRITE: os.O_RDWR,
    Opening.UNDO: os.O_RDONLY | os.O_NOFOLLOW,
    Opening.UNDO_TO_WRITE: os.O_RDWR | os.O_NOFOLLOW,
    Opening.NEW_UNDO: os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW,
}


@dataclass(frozen=True, slots=True)
class Spot:
    """A name in a directory, which is an O_PATH descriptor."""

    directory: int
    name: str


class Hands(Protocol):
    """What reaches into the directory of an image: this process, or another that it asks.

    *directory* is a descriptor, *name* that of the image there, or of its undo file. What fails
    raises `OSError`.
    """

    def open(self, what: Opening, directory: int, name: str) -> int:
        """A new descriptor."""

    def change(self, change: Change, directory: int, name: str) -> None:
        """Done when it returns."""


class HandsGone(OSError):
    """The process that was asked has ended: it says nothing of the file."""


class OwnHands:
    """This process itself."""

    def open(self, what: Opening, directory: int, name: str) -> int:
        fd = os.open(name, _FLAGS[what] | _O_ANY, _MODE, dir_fd=directory)
        if what is Opening.NEW_UNDO:
            with suppress(OSError):  # some file systems keep no modes
                os.fchmod(fd, _MODE)  # whatever the umask: its owner must be able to read it
        return fd

    def change(self, change: Change, directory: int, name: str) -> None:
        if change is Change.REMOVE_UNDO:
            os.unlink(name, dir_fd=directory)
        else:
            _sync(directory)


def behind_links(directory: int, name: str) -> tuple[int, str]:
    """Where the file is that *name* in *directory* means, a link or not: the same, of itself.

    The directory is a new O_PATH descriptor. Raises `OSError`.
    """
    directory = os.dup(directory)
    try:
        for _ in range(MAX_LINKS):
            try:
                target = Path(os.readlink(name, dir_fd=directory))
            except OSError as error:
                # Not a link; or the file was deleted, and its undo file is still where it was.
                if error.errno in (errno.EINVAL, errno.ENOENT):
                    break
                raise
            following = os.open(target.parent, _O_PATH_OF_DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory, name = following, target.name
    except BaseException:
        os.close(directory)
        raise
    return directory, name


def exists(directory: int, name: str) -> bool:
    """Whether there is anything under *name*, be it a link that leads nowhere."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return True


def _sync(directory: int) -> None:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # seen on network file systems: they keep no such promise
            raise
    finally:
        os.close(fd)
