"""The names that are an image's own in its directory, and all that is ever done under them.

Its own name, and those of its undo file. Everything goes through a directory as it was opened,
never by path again. A process that must not reach into that directory lets another one do the
same: see `instarfs.mount.broker`. What is in the files is not known here.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from pathlib import Path
from typing import Protocol

SUFFIX = ".instarfs-undo"
"""What the undo file's name has after the image's."""

NEW, OLD = SUFFIX + ".new", SUFFIX + ".old"
"""Of one that is not complete yet, and of the one before it, which is kept aside meanwhile."""

MAX_LINKS = 40
"""As the kernel follows."""

_O_PATH_OF_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: should a FIFO take a file's place after it was looked at, opening must not wait.
_O_ANY = os.O_NONBLOCK | os.O_CLOEXEC


class Opening(IntEnum):
    """What can be opened. An image may be behind a link, an undo file may not."""

    IMAGE = 1
    IMAGE_TO_WRITE = 2
    UNDO = 3
    UNDO_TO_WRITE = 4
    NEW_UNDO = 5


class Change(IntEnum):
    """What can be done to the names of an undo file, and the flush that makes it durable.

    Each but the flush is one system call, whole or not at all.
    """

    DISCARD_NEW = 16
    DROP_OLD = 17
    DROP_UNDO = 18
    KEEP_ASIDE = 19
    PUT_IN_PLACE = 20
    BRING_BACK = 21
    SYNC = 22


OF_IMAGE = frozenset({Opening.IMAGE, Opening.IMAGE_TO_WRITE})
"""What is done under the name that the image was opened by; all else beside the file itself."""

OF_READERS = frozenset({Opening.IMAGE, Opening.UNDO})
"""What changes nothing, nor lets anything be changed."""

_OPENED = {
    Opening.IMAGE: ("", os.O_RDONLY),
    Opening.IMAGE_TO_WRITE: ("", os.O_RDWR),
    Opening.UNDO: (SUFFIX, os.O_RDONLY | os.O_NOFOLLOW),
    Opening.UNDO_TO_WRITE: (SUFFIX, os.O_RDWR | os.O_NOFOLLOW),
    Opening.NEW_UNDO: (NEW, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW),
}
_REMOVED = {Change.DISCARD_NEW: NEW, Change.DROP_OLD: OLD, Change.DROP_UNDO: SUFFIX}
_RENAMED = {
    Change.KEEP_ASIDE: (SUFFIX, OLD),
    Change.PUT_IN_PLACE: (NEW, SUFFIX),
    Change.BRING_BACK: (OLD, SUFFIX),
}


class Hands(Protocol):
    """What reaches into the directory of an image: this process, or another that it asks.

    *directory* is a descriptor, *name* the image's name there. What fails raises `OSError`.
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
        suffix, flags = _OPENED[what]
        return os.open(name + suffix, flags | _O_ANY, 0o600, dir_fd=directory)

    def change(self, change: Change, directory: int, name: str) -> None:
        if change in _REMOVED:
            os.unlink(name + _REMOVED[change], dir_fd=directory)
        elif change in _RENAMED:
            old, new = _RENAMED[change]
            os.rename(name + old, name + new, src_dir_fd=directory, dst_dir_fd=directory)
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
