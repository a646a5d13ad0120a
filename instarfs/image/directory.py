"""The names that are an image's own, and all that is ever done under them.

Its own name, and that of its undo file, beside it or where its user says. Everything goes through
a directory as it was opened, never by path again. A process that must not reach into those
directories lets another one do the same: see `instarfs.daemon.broker`. What is in the files is not
known here.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol, Self

from instarfs.image.linux import look, open_looked_at

SUFFIX = ".instarfs-undo"
"""What the undo file's name has after the image's."""

MAX_LINKS = 40
"""As the kernel follows."""

NO_FILE = errno.ENXIO
"""The errno of what stands in an undo file's place and is neither a regular file nor a link."""

_O_PATH_OF_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK: should a FIFO take a file's place after it was looked at, opening must not wait.
_O_ANY = os.O_NONBLOCK | os.O_CLOEXEC
MODE = 0o600
"""Of what is made: a disk, and what is known of it, is its owner's secret, whatever the umask."""


class Opening(IntEnum):
    """What can be opened, nothing behind a link. `NEW_UNDO` makes what is not there yet."""

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


@dataclass(frozen=True, slots=True)
class Origin:
    """What an image was when its user named it: what may be opened under its name afterwards.

    A regular file of the same ``owner``, or the very ``device`` (st_rdev). ``is_mount``: whether it
    was mounted on its name (a bind mount); no other is entered there.
    """

    owner: int
    device: int | None = None
    is_mount: bool = False

    @classmethod
    def of(cls, status: os.stat_result, *, is_mount: bool = False) -> Self:
        """Of an image that is open."""
        device = status.st_rdev if stat.S_ISBLK(status.st_mode) else None
        return cls(status.st_uid, device, is_mount)

    def admits(self, status: os.stat_result) -> bool:
        """Whether it may be opened."""
        if self.device is not None:
            return stat.S_ISBLK(status.st_mode) and status.st_rdev == self.device
        return stat.S_ISREG(status.st_mode) and status.st_uid == self.owner

    def open(self, directory: int, name: str, flags: int) -> int:
        """What stands there, which is looked at first. Raises OSError: ESTALE for anything else."""
        looked_at = look(directory, name, across=self.is_mount)
        try:
            status = os.fstat(looked_at)
            if not self.admits(status):
                raise OSError(errno.ESTALE, "it is not what was named: not opened")
            return open_looked_at(looked_at, flags | os.O_NOFOLLOW, name, directory)
        finally:
            os.close(looked_at)


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

    def __init__(self, origin: Origin) -> None:
        """*origin*: of the image that it opens."""
        self._origin = origin

    def open(self, what: Opening, directory: int, name: str) -> int:
        if what in OF_IMAGE:
            return self._origin.open(directory, name, _FLAGS[what] | _O_ANY)
        if what is not Opening.NEW_UNDO:
            return _open_regular(directory, name, _FLAGS[what] | _O_ANY)
        return kept_readable(os.open(name, _FLAGS[what] | _O_ANY, MODE, dir_fd=directory))

    def change(self, change: Change, directory: int, name: str) -> None:
        if change is Change.REMOVE_UNDO:
            os.unlink(name, dir_fd=directory)
        else:
            _sync(directory)


def kept_readable(fd: int) -> int:
    """*fd*, of a file that was made with `MODE`: its owner can read it, whatever the umask."""
    with suppress(OSError):  # some file systems keep no modes
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        if mode & MODE != MODE:
            os.fchmod(fd, mode | MODE)
    return fd


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


def lasting_name(path: str) -> str:
    """A name of the file at *path* that any process can use: not that of a descriptor of this one.

    What is named otherwise, has no other name, or cannot be reached by it, stays as it is.
    """
    named = Path(path)
    try:
        for _ in range(MAX_LINKS):
            folder = named.parent.resolve()
            if folder.is_relative_to("/proc"):
                real = named.resolve()
                return str(real) if real.samefile(path) else path
            named = folder / named.readlink()
    except OSError:  # not a link, or one that leads nowhere
        pass
    return path


def exists(directory: int, name: str) -> bool:
    """Whether there is anything under *name*, be it a link that leads nowhere."""
    try:
        # No more than that: what is mounted there may be what the calling process serves.
        os.close(look(directory, name, across=True))
    except OSError:
        return False
    return True


def _open_regular(directory: int, name: str, flags: int) -> int:
    """Looked at first, for others may have put it there. Raises OSError; `NO_FILE`: it is none."""
    looked_at = look(directory, name, across=True)
    try:
        mode = os.fstat(looked_at).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if not stat.S_ISREG(mode):
            raise OSError(NO_FILE, os.strerror(NO_FILE))
        return open_looked_at(looked_at, flags, name, directory)
    finally:
        os.close(looked_at)


def _sync(directory: int) -> None:
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # seen on network file systems: they keep no such promise
            raise
    finally:
        os.close(fd)
