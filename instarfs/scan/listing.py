"""What is in a folder, as a process that may be killed sees it: it may not answer, or never end.

Nothing is opened but the folder itself, and no link is followed.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from instarfs.errors import reason_of
from instarfs.scan.values import Candidate, Skipped, Stamp

Identity = tuple[int, int]
"""Device and inode."""

PART = 500
"""Entries that are told of at a time."""

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in another. It is listed if it is still what it was then."""

    path: bytes
    identity: Identity


@dataclass(frozen=True, slots=True)
class Named:
    """A file that has ``names`` of them; where it is a file at all."""

    file: Candidate
    names: int


Entry = Folder | Named | Skipped


def look(path: bytes, directory: int | None = None) -> Entry:
    """What stands at *path*; *directory* is the folder that it is in, if that is open."""
    name = path if directory is None else os.path.basename(path)  # noqa: PTH119 - of bytes
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return Skipped(path, "it is not there any more", is_failure=False)
    except OSError as error:
        return Skipped(path, reason_of(error), is_failure=True)
    mode, identity = status.st_mode, (status.st_dev, status.st_ino)
    if stat.S_ISDIR(mode):
        return Folder(path, identity)
    # A device that is named is taken for what it holds; one that lies about is not opened.
    if stat.S_ISREG(mode) or (directory is None and stat.S_ISBLK(mode)):
        stamp = Stamp(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        stored = status.st_blocks * 512
        return Named(Candidate(path, status.st_dev, stamp, stored), status.st_nlink)
    what = "a link" if stat.S_ISLNK(mode) else "no file"
    return Skipped(path, f"it is {what}", is_failure=False)


def list_folder(folder: Folder) -> Iterator[list[Entry]]:
    """What is in *folder*, by name, in parts: the same to everybody who asks."""
    try:
        fd = os.open(folder.path, _FLAGS)
    except FileNotFoundError:
        yield [Skipped(folder.path, "it is not there any more", is_failure=False)]
        return
    except OSError as error:
        yield [Skipped(folder.path, reason_of(error), is_failure=True)]
        return
    try:
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != folder.identity:
            yield [Skipped(folder.path, "another has taken its place", is_failure=True)]
            return
        try:
            names = sorted(map(os.fsencode, os.listdir(fd)))  # noqa: PTH208 - of a descriptor
        except OSError as error:
            yield [Skipped(folder.path, reason_of(error), is_failure=True)]
            return
        for at in range(0, len(names), PART):
            part = names[at : at + PART]
            yield [look(os.path.join(folder.path, name), fd) for name in part]  # noqa: PTH118
    finally:
        os.close(fd)
