"""A copy in the making: OUT, and beside it OUT.map, the list of what it holds.

The one module that writes them. What they hold is decided elsewhere; here stands that nothing is
written over that was not begun here, that the list never says more than what would be found after
a crash, and that a copy is gone on with only from what it was begun from.

The list is a mapfile of ddrescue's; its first comment says of what it is a list. Blocks count as
read as long as the machine runs in which they were written; up to ``flushed`` they are on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from instarfs.errors import (
    NO_SPACE,
    OutBusy,
    OutFailed,
    OutMissing,
    OutOccupied,
    OutOfSomethingElse,
    reason_of,
)
from instarfs.image.directory import MODE, kept_readable
from instarfs.image.file import close_all
from instarfs.image.locks import HELD_BY_OTHERS, UNSUPPORTED
from instarfs.text import json_text
from planner.errors import NotAMapfile
from planner.guest.mapfile import BAD, READ, UNTRIED, Mapfile, parse_mapfile

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_TITLE = "Mapfile. Created by instarfs export"
_MARK = "instarfs-export: "
_NEW = ".instarfs-new"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a copy is made from: ``image``, for people; ``disk``, which of its disks, of ``size``
    bytes; and by their roles the ``files`` that are read, each with what changes when it does.
    """

    image: str
    disk: str
    size: int
    files: Mapping[str, str]


class OutFile:
    """OUT, open for writing and locked, and what its list says. Use `OutFile.open`."""

    def __init__(self, path: str, fd: int, origin: Origin, mapfile: Mapfile, flushed: int) -> None:
        self.path, self.map_path = path, map_path(path)
        self.mapfile = mapfile
        self._fd, self._origin = fd, origin
        self._flushed, self._boot = flushed, _boot()

    @classmethod
    def open(cls, path: str, origin: Origin) -> OutFile:
        """Begin a copy at *path*, or go on with it.

        Raises an error where something is there that was not begun from *origin*.
        """
        known = _read_list(path)
        if known is None:
            fd = _create(path)
            made = cls(path, fd, origin, Mapfile.untried(origin.size), 0)
        else:
            fd = _reopen(path)
            made = cls(path, fd, origin, *_checked(path, fd, origin, known))
        try:
            made._lock()
            made._enlarge()
            made.save(made.mapfile, made.mapfile.position)
        except (OutBusy, OutFailed) as error:
            # Without a list of it, it would be nobody's.
            if known is None and isinstance(error, OutFailed):
                with contextlib.suppress(OSError):
                    Path(path).unlink()
            close_all(fd)
            raise
        return made

    def _lock(self) -> None:
        """Where files cannot be locked, nobody is kept out."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD_BY_OTHERS:
                raise OutBusy(self.path) from error
            if error.errno not in UNSUPPORTED:
                raise self.failed("locking it", error) from error

    def _enlarge(self) -> None:
        try:
            if os.fstat(self._fd).st_size < self._origin.size:
                os.ftruncate(self._fd, self._origin.size)
        except OSError as error:
            raise self.failed("making it as large as the disk", error) from error

    def write(self, offset: int, content: memoryview) -> None:
        """Write all of *content*. Raises `OutFailed`."""
        done = 0
        while done < len(content):
            try:
                done += os.pwrite(self._fd, content[done:], offset + done)
            except OSError as error:
                raise self.failed("writing", error) from error

    def flush(self) -> None:
        """Have what was written on the disk. Raises `OutFailed`."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self.failed("writing", error) from error

    def forget_unflushed(self) -> None:
        """Not all that was written is on the disk, and nobody knows what of it: list none of it."""
        mapfile = _without(self.mapfile, self._flushed)
        with contextlib.suppress(OutFailed):
            self.save(mapfile, mapfile.position)

    def save(self, mapfile: Mapfile, position: int, flushed: int | None = None) -> None:
        """Make *mapfile* the list, up to *position* of what was tried by now.

        *flushed*: up to where what it says has been flushed, if that has become more.

        Raises `OutFailed`, and then the list is what it was.
        """
        if flushed is not None:
            self._flushed = flushed
        new = self.map_path + _NEW
        try:
            head = {
                "image": self._origin.image,
                "disk": self._origin.disk,
                "files": dict(self._origin.files),
                "out": os.fstat(self._fd).st_ino,
                "boot": self._boot,
                "flushed": self._flushed,
            }
            listed = replace(mapfile, position=position, remarks=(_TITLE, _MARK + json_text(head)))
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(kept_readable(os.open(new, flags, MODE)), "wb") as file:
                file.writelines(listed.render())
            Path(new).replace(self.map_path)
        except OSError as error:
            with contextlib.suppress(OSError):
                Path(new).unlink()
            raise self.failed(f"writing {self.map_path}", error) from error
        self.mapfile = mapfile

    def failed(self, what: str, error: OSError) -> OutFailed:
        """The error that says so."""
        if error.errno in NO_SPACE:
            return OutFailed(self.path, what, reason_of(error), "make space")
        return OutFailed(self.path, what, reason_of(error))

    def close(self) -> None:
        """Let go of it, and of its lock.

        Raises `OutFailed` where a server says only now that it has not all that was written.
        """
        try:
            os.close(os.dup(self._fd))
        except OSError as error:
            self.forget_unflushed()
            raise self.failed("writing", error) from error
        finally:
            close_all(self._fd)


def map_path(path: str) -> str:
    """Where the list of *path* is."""
    return f"{path}.map"


def _boot() -> str:
    """What is another after a restart of the machine; nothing where that is not known."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _create(path: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return kept_readable(os.open(path, flags, MODE))
    except FileExistsError as error:
        kind = _kind(path)
        why = f"no {map_path(path)} says that it was begun by an export"
        raise OutOccupied(path, f"is a {kind}" if kind else why) from error
    except OSError as error:
        raise OutFailed(path, "making it", reason_of(error), "see to that") from error


def _kind(path: str) -> str:
    """What *path* is other than a regular file; nothing if it is one."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return ""
    kinds = {stat.S_IFBLK: "block device", stat.S_IFDIR: "directory", stat.S_IFLNK: "symbolic link"}
    return "" if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "special file")


def _reopen(path: str) -> int:
    try:
        if kind := _kind(path):
            raise OutOccupied(path, f"is a {kind}")
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise OutMissing(path, map_path(path)) from error
    except OSError as error:
        raise OutFailed(path, "opening it", reason_of(error), "see to that") from error


@dataclass(frozen=True, slots=True)
class _Known:
    """What OUT.map says: the blocks, and the comment that says of what."""

    mapfile: Mapfile
    head: dict[str, object]

    @property
    def flushed(self) -> int:
        """Up to where it has been flushed, but for what is still to be tried before that."""
        left = self.mapfile.blocks(UNTRIED, BAD)
        flushed = self.head.get("flushed")
        return min(
            flushed if isinstance(flushed, int) else 0, left[0][0] if left else self.mapfile.size
        )


def _read_list(path: str) -> _Known | None:
    """The list of the copy at *path*; None where there is none."""
    name = map_path(path)
    try:
        if kind := _kind(name):
            raise OutOccupied(name, f"is a {kind}")
        mapfile = parse_mapfile(Path(name).read_bytes())
        (text,) = [line for line in mapfile.remarks if line.startswith(_MARK)]
        head = dict(json.loads(text.removeprefix(_MARK)))
    except FileNotFoundError:
        return None
    except (NotAMapfile, ValueError, TypeError, RecursionError) as error:
        raise OutOccupied(name, "is no list of an export") from error
    except OSError as error:
        raise OutFailed(name, "reading it", reason_of(error), "see to that") from error
    return _Known(mapfile, head)


def _checked(path: str, fd: int, origin: Origin, known: _Known) -> tuple[Mapfile, int]:
    """The list, as far as it holds for the copy open at *fd*, and up to where that was flushed."""
    head, mapfile, flushed = known.head, known.mapfile, known.flushed
    files, what, status = head.get("files"), None, os.fstat(fd)
    is_it = head.get("out") == status.st_ino and status.st_size <= origin.size
    if not is_it or not isinstance(files, dict):
        what = f"is not the file that {map_path(path)} is about"
    elif head.get("disk") != origin.disk or "image" not in files:
        what = f"was begun from another disk, {head.get('disk')} of {head.get('image')}"
    elif mapfile.size != origin.size or any(
        files[role] != now for role, now in origin.files.items() if role in files
    ):
        what = f"was begun from {head.get('image')}, which is another file, or has changed since"
    if what is not None:
        os.close(fd)
        raise OutOfSomethingElse(path, what, map_path(path))
    if head.get("boot") != _boot() or not head.get("boot"):
        mapfile = _without(mapfile, flushed)
    return mapfile, flushed


def _without(mapfile: Mapfile, flushed: int) -> Mapfile:
    """*mapfile* where only what was *flushed* counts as read."""
    return mapfile.overlaid(
        [
            (max(start, flushed), end, UNTRIED)
            for start, end in mapfile.blocks(READ)
            if end > flushed
        ]
    )
