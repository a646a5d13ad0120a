"""What is in a folder, as a process that may be killed sees it: it may not answer, or never end.

Nothing is opened but the folder itself, and no link is followed. Of a folder in it nothing is asked
before its turn: something may be mounted there that does not answer, and the others do.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import MappingProxyType

from instarfs.errors import reason_of
from instarfs.image.linux import open_without_links
from instarfs.scan.values import Candidate, Skipped, Stamp

Identity = tuple[int, int]
"""Device and inode."""

PART = 500
"""Entries that are told of at a time."""

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_VANISHED = "it is not there any more"
_ANOTHER = "another has taken its place"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder in another, by a path without links."""

    path: bytes


@dataclass(frozen=True, slots=True)
class Named:
    """A file that has ``names`` of them; where it is a file at all."""

    file: Candidate
    names: int


Entry = Folder | Named | Skipped


class Question(Enum):
    """What is asked of a path, but for what is in a folder; see `ANSWERS`."""

    REAL = auto()
    LOOK = auto()
    DEVICE_IF_LOST = auto()


def look(path: bytes, directory: int | None = None) -> Entry:
    """What stands at *path*; *directory* is the folder that it is in, if that is open."""
    name = path if directory is None else os.path.basename(path)  # noqa: PTH119 - of bytes
    try:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return Skipped(path, _VANISHED, is_failure=False)
    except OSError as error:
        return Skipped(path, reason_of(error), is_failure=True)
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        return Folder(path)
    # A device that is named is taken for what it holds; one that lies about is not opened.
    if stat.S_ISREG(mode) or (directory is None and stat.S_ISBLK(mode)):
        stamp = Stamp.of(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        stored = status.st_blocks * 512
        return Named(Candidate(path, status.st_dev, stamp, stored), status.st_nlink)
    what = "a link" if stat.S_ISLNK(mode) else "no file"
    return Skipped(path, f"it is {what}", is_failure=False)


def list_folder(path: bytes) -> Iterator[Identity | list[Entry]]:
    """Which folder stands at *path*, and what is in it, by name: in parts, the same to everybody.

    In place of all that, or of what follows, what was skipped.
    """
    try:
        fd = open_without_links(path, _FLAGS)
    except FileNotFoundError:
        yield [Skipped(path, _VANISHED, is_failure=False)]
        return
    except OSError as error:
        reason = _ANOTHER if error.errno == errno.ELOOP else reason_of(error)
        yield [Skipped(path, reason, is_failure=True)]
        return
    try:
        status = os.fstat(fd)
        yield status.st_dev, status.st_ino
        with os.scandir(fd) as found:
            entries = sorted((os.fsencode(entry.name), _is_folder(entry)) for entry in found)
        for at in range(0, len(entries), PART):
            yield [_entry(path, fd, *each) for each in entries[at : at + PART]]
    except OSError as error:
        yield [Skipped(path, reason_of(error), is_failure=True)]
    finally:
        os.close(fd)


def _entry(folder: bytes, fd: int, name: bytes, is_folder: bool) -> Entry:
    path = os.path.join(folder, name)  # noqa: PTH118 - of bytes
    return Folder(path) if is_folder else look(path, fd)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """As the folder says it is in; where that does not say, `look` does."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def device_if_lost(path: bytes) -> int | None:
    """Of the file system that *path* would be made on; None where there is something."""
    if os.path.lexists(path):
        return None
    for folder in Path(os.fsdecode(path)).parents:
        try:
            return folder.stat().st_dev
        except OSError:
            continue
    return 0


def real(path: bytes) -> bytes:
    """*path* without links; absolute, unless it is below a current folder that is gone."""
    try:
        return os.path.realpath(path)
    except FileNotFoundError:  # os.getcwd
        return path


ANSWERS: Mapping[Question, Callable[[bytes], object]] = MappingProxyType(
    {
        Question.REAL: real,
        Question.LOOK: look,
        Question.DEVICE_IF_LOST: device_if_lost,
    }
)
