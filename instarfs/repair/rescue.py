"""Bringing back what an image lost into a new file: the image itself is only read.

What can be brought back is found in `planner.rescue`. Here the copy is made: of the image as it is,
with the plan of the rescue written to it. In place that is `instarfs.repair.run`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os

from instarfs.errors import (
    ImageChanged,
    OutOccupied,
    RepairNoSpace,
    RepairWriteFailed,
    RescueNotWritten,
    reason_of,
)
from instarfs.image.directory import MODE, kept_readable
from instarfs.image.file import FileSource, Generation, Image, close_all
from instarfs.repair.execute import FileDevice, execute
from planner.progress import Meter, Progress, tell_nobody
from planner.repair.plan import Plan

_FICLONE = 0x40049409
_PIECE = 8 << 20


def write_copy(
    image: Image, before: Generation, plan: Plan, path: str, progress: Progress = tell_nobody
) -> None:
    """A new file at *path*: *image*, with *plan*, made of it as it was *before*, carried out.

    Shared with the image or sparse, as the disk allows.

    Raises `OutOccupied` where something is there, `RescueNotWritten`, `ImageReadFailed`; then
    nothing is left there.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = kept_readable(os.open(path, flags, MODE))
    except FileExistsError as error:
        raise OutOccupied(path, "a rescue makes a new file") from error
    except OSError as error:
        raise RescueNotWritten(path, reason_of(error)) from error
    try:
        _fill(image, image.source(), fd, progress)
        _require_unchanged(image, before, path)
        execute(FileDevice(fd, path), plan, progress=progress)
        os.fsync(fd)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)  # noqa: PTH108 - a path of bytes that are no text too
        if isinstance(error, OSError):
            raise RescueNotWritten(path, reason_of(error)) from error
        if isinstance(error, RepairNoSpace | RepairWriteFailed):
            raise RescueNotWritten(path, error.reason) from error
        if isinstance(error, ImageChanged):
            raise RescueNotWritten(path, _CHANGED) from error
        raise
    finally:
        close_all(fd)


def _require_unchanged(image: Image, before: Generation, path: str) -> None:
    if image.generation() != before:
        raise RescueNotWritten(path, _CHANGED)


def _fill(image: Image, source: FileSource, fd: int, progress: Progress) -> None:
    try:
        fcntl.ioctl(fd, _FICLONE, image.fileno())
    except OSError as error:
        if error.errno not in _NOT_SHARED:
            raise
    else:
        return
    os.ftruncate(fd, source.size)
    meter = Meter(progress, "copy", source.stored_bytes())
    buffer = memoryview(bytearray(_PIECE))
    for start, end in source.data_extents(0, source.size):
        for offset in range(start, end, _PIECE):
            piece = buffer[: min(_PIECE, end - offset)]
            source.read_into(offset, piece)
            _write(fd, offset, piece)
            meter.advance(len(piece))


def _write(fd: int, offset: int, content: memoryview) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(fd, content[done:], offset + done)


_CHANGED = "the image was written to meanwhile"
_NOT_SHARED = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM)
