"""QEMU's byte-range image locks: those of a reader, and those of a repair.

The protocol is that of QEMU's ``file`` driver (raw_check_lock_bytes): read locks of the open file
description on single bytes, byte 100 + i for using permission i, byte 200 + i for denying it to
others; tested with write locks that are never taken. Nothing here reads or writes the image.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import IntEnum

from instarfs.errors import ImageInUse, ImageNotLocked, reason_of

_USED = 100
_DENIED = 200

# struct flock: l_type, l_whence, l_start, l_len, l_pid, padded to whole words.
_FLOCK = struct.Struct("@hhqqi0q")

# Seen where a file system, or what it stands on, has no such locks: there is nothing to respect.
UNSUPPORTED = frozenset({errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
HELD_BY_OTHERS = frozenset({errno.EAGAIN, errno.EACCES})


class Permission(IntEnum):
    """What a user of an image may do, numbered as QEMU's BLK_PERM_* bits; `label` is its name."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Access:
    """The permissions that a user uses, and those that it denies to others meanwhile.

    ``wayout``: what is to be done where others have it otherwise.
    """

    uses: tuple[Permission, ...]
    denies: tuple[Permission, ...]
    wayout: str = "stop it first"

    @property
    def bytes(self) -> tuple[int, ...]:
        """The bytes to hold."""
        return (*(_USED + p for p in self.uses), *(_DENIED + p for p in self.denies))


READ_ONLY = Access((Permission.CONSISTENT_READ,), (Permission.WRITE, Permission.RESIZE))
"""A qcow2 opened read-only, as by `qemu-img check`: nobody may write meanwhile."""

READ_UNLESS_SHARED = replace(READ_ONLY, wayout="stop it, or look at it all the same with -U")
"""The same, by a command that could be told to open it with force-share."""

READ_WRITE = Access(
    (Permission.CONSISTENT_READ, Permission.WRITE, Permission.RESIZE),
    (Permission.WRITE, Permission.RESIZE),
)
"""A qcow2 opened read/write, as by a VM and by a repair: nobody else may write, or check."""

FORCE_SHARE = Access((Permission.CONSISTENT_READ,), ())
"""Opened with force-share (`-U`): whoever writes may go on."""


@contextmanager
def held(fd: int, path: str, access: Access = READ_ONLY) -> Iterator[None]:
    """Hold QEMU's locks for *access* on the open image; *path* is for the message.

    Raises `ImageInUse`, with nothing held, where another process excludes it, and `ImageNotLocked`
    where that cannot be known. Does nothing on a file that cannot be locked.
    """
    try:
        with _explained(path):
            _acquire(fd, path, access)
        yield
    finally:
        for byte in access.bytes:
            # A server that fails by then changes nothing of what was done, and closing lets go too.
            with suppress(OSError):
                _set(fd, fcntl.F_UNLCK, byte)


def is_written(fd: int, path: str) -> bool:
    """Whether another process has the image open for writing, by its locks.

    *path* is for the message of `ImageNotLocked`, where that cannot be known.
    """
    with _explained(path):
        return any(_is_held(fd, _USED + p) for p in (Permission.WRITE, Permission.RESIZE))


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raise what a server of locks fails by as an error that says so."""
    try:
        yield
    except OSError as error:
        raise ImageNotLocked(path, reason_of(error)) from error


def _acquire(fd: int, path: str, access: Access) -> None:
    """Claim first and look afterwards, so that of two that come at once at most one succeeds."""
    for byte in access.bytes:
        try:
            _set(fd, fcntl.F_RDLCK, byte)
        except OSError as error:
            if error.errno in HELD_BY_OTHERS:
                raise _in_use(path, access, f"byte {byte}") from error
            raise
    _refuse_conflict(fd, path, access)


def _refuse_conflict(fd: int, path: str, access: Access) -> None:
    for permission in access.uses:
        if _is_held(fd, _DENIED + permission):
            raise _in_use(path, access, f'"{permission.label}"')
    for permission in access.denies:
        if _is_held(fd, _USED + permission):
            raise _in_use(path, access, f'shared "{permission.label}"')


def _in_use(path: str, access: Access, lock: str) -> ImageInUse:
    return ImageInUse(path, lock, access.wayout)


def _is_held(fd: int, byte: int) -> bool:
    """Whether another open file description holds the byte, in any way."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _set(fd: int, kind: int, byte: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(kind, byte))
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
