"""Opening what an image names, but only beneath the directories that the user named.

Everything about how such a file is found and opened lives here: no link is followed, nothing
outside a followed directory is touched, and nothing but a regular file is opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path

from instarfs.errors import FollowImpossible, reason_of
from instarfs.image import Image

_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC

_SYS_OPENAT2 = 437  # on every architecture but alpha
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_RESOLVE = _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH

_SENTENCES = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.ELOOP: "there is a symbolic link in its path",
    errno.EXDEV: "its path leads out of the followed directory",
    errno.EACCES: "there is no permission to read it",
}


class NotOpened(Exception):
    """A file that is not opened; its message says why."""


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


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
    """The directories of ``--follow``: opened once, by the user's word, and held."""

    def __init__(self, directories: Sequence[str] = ()) -> None:
        """Raises `FollowImpossible` for what is no directory."""
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
                return _open_beneath(fd, path.removeprefix(prefix), path)
        if not self._roots:
            raise NotOpened("no directory is followed; see --follow")
        raise NotOpened("it is in none of the followed directories")


def _open_beneath(root: int, name: str, path: str) -> Image:
    try:
        # Looked at before it is opened: opening a FIFO or a device has effects.
        looked_at = _openat2(root, name, _LOOK)
        try:
            _require_regular(looked_at)
            directory = _openat2(root, str(Path(name).parent), _LOOK | os.O_DIRECTORY)
            try:
                fd = _openat2(root, name, _OPEN)
            except OSError:
                os.close(directory)
                raise
            # There was no link in it, so `..` meant what it seems to.
            image = Image(os.path.normpath(path), fd, directory, is_device=False)
            if not os.path.sameopenfile(fd, looked_at):
                raise NotOpened("it was replaced while it was opened")
            return image
        finally:
            os.close(looked_at)
    except OSError as error:
        sentence = _SENTENCES.get(error.errno or 0, f"it cannot be opened: {reason_of(error)}")
        raise NotOpened(sentence) from error


def _require_regular(fd: int) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISLNK(mode):
        raise NotOpened(_SENTENCES[errno.ELOOP])
    if not stat.S_ISREG(mode):
        raise NotOpened("it is not a regular file")


def _openat2(directory: int, name: str, flags: int) -> int:
    """openat2(2), which the standard library does not have. Raises OSError."""
    how = _OpenHow(flags, 0, _RESOLVE)
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(directory),
        ctypes.c_char_p(os.fsencode(name)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def _close_all(roots: list[tuple[str, int]]) -> None:
    for _, fd in roots:
        os.close(fd)
