"""Opening what an image names, but only beneath the directories that the user named.

Everything about how such a file is found and opened lives here: no link is followed, nothing
outside a followed directory is touched, and nothing but a regular file is opened. A process that
serves a mount enters no mount of instarfs on the way, its own least of all: it would wait for
itself, or for one that waits for it.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from instarfs.errors import FollowImpossible, reason_of
from instarfs.image.file import Image, mount_id
from instarfs.image.linux import LOOK, is_mounted, open_looked_at
from instarfs.image.mount_table import MOUNT_TABLE, mounts_in

FILESYSTEM_TYPE = "fuse.instarfs"
"""What the kernel calls a mount of ours, whoever serves it."""

_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC

_SENTENCES = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.ELOOP: "there is a symbolic link in its path",
    errno.EXDEV: "its path leads out of the followed directory",
    errno.EACCES: "there is no permission to read it",
}


class NotOpened(Exception):
    """A file that is not opened; its message says why."""


def beside(image: str, name: str) -> str:
    """The absolute path that *name* leads to from the member at *image*, as stored but for its
    beginning. The directory of *image* has no links in it, so leading ``..`` can be resolved.
    """
    if name.startswith("/"):
        return name
    directory, parts = Path(image).parent, name.split("/")
    while len(parts) > 1 and parts[0] in ("", ".", ".."):
        directory = directory.parent if parts[0] == ".." else directory
        del parts[0]
    return str(directory.joinpath(*parts))


class Follow:
    """The directories of ``--follow``: opened once, by the user's word, and held.

    *serving*: whether it is for a process that serves a mount. That opens no file in a mount of
    instarfs, and has files closed by threads, for closing too may wait for whoever serves them.
    """

    def __init__(self, directories: Sequence[str] = (), *, serving: bool = False) -> None:
        """Raises `FollowImpossible` for what is no directory."""
        self._serving = serving
        self._roots: list[tuple[str, int]] = []
        self._close = weakref.finalize(self, _close_all, self._roots)
        for directory in directories:
            try:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
                path = os.path.realpath(directory)
                fd = os.open(directory, flags)
            except OSError as error:
                raise FollowImpossible(directory, reason_of(error)) from error
            self._roots.append((path, fd))

    @property
    def directories(self) -> tuple[str, ...]:
        """Their paths, absolute and without links."""
        return tuple(path for path, _ in self._roots)

    def open(self, path: str) -> Image:
        """The regular file at *path*, which is absolute. Raises `NotOpened`.

        Every step of the path below the followed directory is the kernel's to judge: it is taken
        as it stands.
        """
        for root, fd in self._roots:
            prefix = root.rstrip("/") + "/"
            if path.startswith(prefix) and path != prefix:
                return self._open_beneath(fd, path.removeprefix(prefix), path)
        if not self._roots:
            raise NotOpened("no directory is followed; see --follow")
        raise NotOpened("it is in none of the followed directories")

    def _open_beneath(self, root: int, name: str, path: str) -> Image:
        try:
            with _Walk(root, enters_mounts=not self._serving) as walk:
                for step in name.split("/"):
                    walk.take(step)
                # Looked at before it is opened: opening a FIFO or a device has effects.
                _require_regular(walk.fd)
                fd = open_looked_at(walk.fd, _OPEN, Path(name).name, walk.parent)
                # There was no link in it, so `..` meant what it seems to.
                return Image(
                    os.path.normpath(path),
                    fd,
                    os.dup(walk.parent),
                    is_device=False,
                    closes_aside=self._serving,
                )
        except OSError as error:
            sentence = _SENTENCES.get(error.errno or 0, f"it cannot be opened: {reason_of(error)}")
            raise NotOpened(sentence) from error


class _Walk:
    """A way down from a directory, a step at a time: nothing is asked of what must not be entered.

    Everything on the way is held, so that ``..`` is where it came from.
    """

    def __init__(self, root: int, *, enters_mounts: bool) -> None:
        """*root* stays the caller's."""
        self._enters_mounts = enters_mounts
        self._way = [os.dup(root)]

    @property
    def fd(self) -> int:
        """Where it has come to: an O_PATH descriptor."""
        return self._way[-1]

    @property
    def parent(self) -> int:
        """The directory that the last step was taken in."""
        return self._way[-2]

    def take(self, step: str) -> None:
        """Raises `OSError`, and `NotOpened`."""
        if step in ("", "."):
            # As a directory: what is no such thing has no inside.
            os.close(os.open(".", LOOK | os.O_DIRECTORY, dir_fd=self.fd))
        elif step == "..":
            if len(self._way) < 2:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            self.take(".")
            os.close(self._way.pop())
        else:
            self._way.append(self._next(step))

    def _next(self, step: str) -> int:
        fd = os.open(step, LOOK, dir_fd=self.fd)
        try:
            self._require_enterable(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _require_enterable(self, fd: int) -> None:
        # A look at the root of a mount asks nobody yet. Where it is not told whether this is one,
        # it may be.
        if not self._enters_mounts and is_mounted(fd) is not False and _is_ours(fd):
            raise NotOpened("it is in a mount of instarfs, which a mount does not follow")
        if stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._way:
            os.close(fd)


def _is_ours(fd: int) -> bool:
    """Whether this is in a mount of instarfs; where that is not told, too."""
    number = mount_id(fd)
    try:
        table = MOUNT_TABLE.read_bytes()
    except OSError:
        return True
    for mount in mounts_in(table):
        if mount.number == number:
            return mount.filesystem == FILESYSTEM_TYPE
    return True


def _require_regular(fd: int) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise NotOpened("it is not a regular file")


def _close_all(roots: list[tuple[str, int]]) -> None:
    for _, fd in roots:
        os.close(fd)
