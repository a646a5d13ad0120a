"""openat2(2), which the standard library does not have: a look at a name that nobody is asked for.

What stands under a name is looked at without being opened (O_PATH), no link is followed, and where
something is mounted on the name that is not entered: whoever serves it need not answer, and may be
the one who looks.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os

NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH = 0x01, 0x02, 0x04, 0x08
"""RESOLVE_* of linux/openat2.h."""

LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

_NUMBER = 437  # on every architecture but alpha
# An older kernel, and what some containers say in its place.
_NOT_THERE = (errno.ENOSYS, errno.EPERM)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(_OpenHow),
    ctypes.c_size_t,
)
_syscall.restype = ctypes.c_long


@functools.cache
def _how(flags: int, resolve: int) -> _OpenHow:
    """There are few of them, and a mount looks at its image for every answer."""
    return _OpenHow(flags, 0, resolve)


def openat2(directory: int, name: str, flags: int, resolve: int) -> int:
    """A new descriptor. Raises OSError; EXDEV is what *resolve* rules out."""
    how = _how(flags, resolve)
    fd: int = _syscall(_NUMBER, directory, os.fsencode(name), how, ctypes.sizeof(how))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def look(directory: int, name: str, *, across: bool = False) -> int:
    """An O_PATH descriptor of what stands under *name* in *directory*, be it a link.

    Raises OSError, with EXDEV where something is mounted there, unless *across* is said. Kernels
    without openat2 enter that.
    """
    if not across:
        try:
            return openat2(directory, name, LOOK, NO_XDEV)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
    return os.open(name, LOOK, dir_fd=directory)


def look_at(directory: int, name: str, *, across: bool = False) -> os.stat_result:
    """What it is. Raises as `look` does."""
    fd = look(directory, name, across=across)
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def open_looked_at(looked_at: int, flags: int, name: str, directory: int | None = None) -> int:
    """Open what was looked at under *name*: the same file, whatever its name leads to by now.

    Raises OSError, as opening its name would. Without /proc it is opened by name, and ESTALE where
    that is another by now.
    """
    try:
        return os.open(f"/proc/self/fd/{looked_at}", (flags & ~os.O_NOFOLLOW) | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        fd = os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    if not os.path.sameopenfile(fd, looked_at):
        os.close(fd)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return fd
