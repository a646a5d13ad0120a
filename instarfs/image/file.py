"""An opened image: its descriptor, its bytes as a `Source`, and when it became another.

Opened read-only, always: nothing here can write. What the bytes mean is the planner's business,
who else has the image open that of `instarfs.image.locks`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from instarfs.errors import (
    ImageDeleted,
    ImageForbidden,
    ImageIsDirectory,
    ImageIsNoFile,
    ImageMissing,
    ImageMoved,
    ImageNotFollowed,
    ImageOpenFailed,
    ImageReadFailed,
    InstarfsError,
    UndoFileImpossible,
)
from instarfs.image.directory import (
    Hands,
    Opening,
    Origin,
    OwnHands,
    Spot,
    behind_links,
    lasting_name,
)
from instarfs.image.linux import identity_at, look_at, open_looked_at
from instarfs.image.mount_table import MOUNT_TABLE, mounts_in
from instarfs.image.surroundings import Gone

if TYPE_CHECKING:
    from concurrent.futures import Executor

_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def block_statistics(device: int) -> Path:
    """Where the kernel counts what is written to a block device: its mtime says nothing."""
    return Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")


_SECTORS_WRITTEN = 6


# RWF_NOWAIT, which would tell for each read, they do not offer.
_IN_MEMORY = ("tmpfs", "ramfs")

# Of what is open these know size and times without asking anybody, and names as fast as a disk is.
_ON_THIS_MACHINE = (
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "bcachefs", "f2fs", "zfs", "jfs", "nilfs2"),
    *("vfat", "exfat", "ntfs3", "iso9660", "udf", *_IN_MEMORY),
)

_SECOND_NS = 10**9

# A second write within one tick of the file system's clock leaves no trace in the times. The
# kernel's ticks 100 times a second or more often; where a file system keeps no fractions of a
# second (ext3, ext4 with small inodes, SSH and NFS servers on these), it is whole seconds, or every
# other one (FAT).
_TICK_NS = 20_000_000
_COARSE_TICK_NS = 2 * _SECOND_NS + _TICK_NS

READERS = 8
"""Requests under way at a time: a disk that is far away answers them together."""


Signature = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Generation:
    """What changes when an image does. Equal generations: the same file, not written to since.

    ``written`` counts the sectors that went to a block device; it is 0 for a file.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    written: int = 0

    def state(self) -> Hashable:
        """What is equal for as long as the bytes are: this, or while it is young something new."""
        return self if self.is_settled(time.time_ns()) else object()

    def signature(self) -> Signature:
        """What `Image.signature` gives of a file that is this."""
        return self.device, self.inode, self.size, self.mtime_ns, self.ctime_ns

    def is_settled(self, now_ns: int) -> bool:
        """Whether a write after *now_ns*, by the system's clock, gives another generation.

        From a time that is still to come, by whatever clock that is, nothing follows.
        """
        newest, tick = self.mtime_ns, _TICK_NS
        if self.mtime_ns % _SECOND_NS == self.ctime_ns % _SECOND_NS == 0:
            # The other can be put back after a write.
            newest, tick = max(newest, self.ctime_ns), _COARSE_TICK_NS
        return now_ns - newest >= tick


class WouldBlock(Exception):
    """What was asked for is not in memory; never leaves the code that asked not to wait."""


class FileSource:
    """The bytes of an open image as a `planner.source.Source`, *size* of them.

    The size is that of the moment it was made: a source does not grow while it is read. Usable
    from any thread, also from several at a time. One that may not *wait* for the disk raises
    `WouldBlock` instead.
    """

    def __init__(self, image: Image, size: int, *, wait: bool = True) -> None:
        # Holds the image, not the bare descriptor: it must not be closed while something reads.
        self._image = image
        self._size = size
        self._meter = image.meter
        self._flags = 0 if wait or image.is_in_memory else os.RWF_NOWAIT

    @property
    def size(self) -> int:
        return self._size

    @property
    def executor(self) -> Executor:
        """Threads that read ahead; the same for all sources."""
        return _readers()

    def stored_bytes(self) -> int:
        """How many of them there really are: a file has holes, a device has none."""
        return self._size if self._image.is_device else self._image.allocated_size()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* from *offset* on; zeros past the end. Raises `ImageReadFailed`."""
        view = buffer.cast("B")
        wanted = max(0, min(len(view), self._size - offset))
        filled = 0
        while filled < wanted:
            try:
                count = os.preadv(
                    self._image.fileno(), [view[filled:wanted]], offset + filled, self._flags
                )
            except OSError as error:
                if self._flags and error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                    raise WouldBlock from error
                raise self._failed(offset + filled, error) from error
            if not count:  # cut off since the size was taken
                break
            filled += count
        if self._meter is not None:
            self._meter(filled)
        if filled < len(view):
            view[filled:] = bytes(len(view) - filled)

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(start, end) of what may hold data, from the file system. Raises `ImageReadFailed`."""
        end = min(offset + length, self._size)
        while offset < end:
            try:
                start = os.lseek(self._image.fileno(), offset, os.SEEK_DATA)
                hole = os.lseek(self._image.fileno(), start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # a hole up to the end
                    return
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise self._failed(offset, error) from error
                start, hole = offset, end  # the file system keeps no account of holes
            if start >= end:
                return
            yield start, min(hole, end)
            offset = hole

    def _failed(self, offset: int, error: OSError) -> ImageReadFailed:
        return ImageReadFailed(self._image.path, offset, _reason(error))


@functools.cache
def _readers() -> Executor:
    # Not at the top: a small image is checked in less time than loading it takes.
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    return ThreadPoolExecutor(READERS, thread_name_prefix="instarfs-reader")


def end_readers() -> None:
    """End the threads that read ahead, when nothing is read; who reads next has others."""
    if _readers.cache_info().currsize:
        _readers().shutdown()
        _readers.cache_clear()


class Image:
    """An image file or block device, open for reading. Use `Image.open`.

    ``hands``: what opens it anew, and whatever lies beside it. ``undo``: where its undo file is to
    be, if somebody said so. ``spot``: where the file itself is, no link, as far as its path led to
    one when it was opened; what stands there later is looked at, and a link is not followed.
    ``meter``: called with the bytes of each read of a source that is made after it was set. The
    descriptors are closed by `close`, and otherwise with the last reference to the image, so that
    replacing an image never takes the descriptor from a thread that still reads it.
    """

    def __init__(
        self,
        path: str,
        fd: int,
        directory: int,
        *,
        is_device: bool,
        spot: Spot | None = None,
        origin: Origin | None = None,
        is_named: bool = True,
        closes_aside: bool = False,
        hands: Hands | None = None,
        undo: Spot | None = None,
    ) -> None:
        """Takes all descriptors over. Without *spot* it is its own name in *directory*.

        *is_named*: whether that leads to it. Otherwise, as of a descriptor in /proc, there is none.
        *closes_aside*: in a thread, for closing a file waits for whoever serves it.
        """
        self.path = path
        self._name = Path(path).name
        self.spot = spot or Spot(directory, self._name)
        self.origin = origin or Origin.of(os.fstat(fd))
        self.hands = hands or OwnHands(self.origin)
        self.undo = undo
        self.meter: Callable[[int], None] | None = None
        self._is_named = is_named
        self._fd = fd
        self._directory = directory
        self._is_device = is_device
        also = [each.directory for each in (spot, undo) if each]
        close = _close_aside if closes_aside else close_all
        self._close = weakref.finalize(self, close, fd, directory, *also)
        self._close.atexit = not closes_aside  # then there are no threads any more

    @classmethod
    def open(cls, path: str, undo_file: str | None = None) -> Image:
        """Open the regular file or block device at *path*; its undo file is to be at *undo_file*.

        Links are followed here, and never again. Raises an error for whatever else is there, and
        for what cannot be read.
        """
        undo = _spot_of(undo_file) if undo_file is not None else None
        try:
            absolute = Path(lasting_name(path)).absolute()
            fd = _open_file(path)
        except OSError as error:
            raise _open_error(path, error) from error
        with contextlib.ExitStack() as opened:
            opened.callback(close_all, fd)
            try:
                status = os.fstat(fd)
                directory = os.open(absolute.parent, os.O_PATH | os.O_CLOEXEC)
            except OSError as error:
                raise _open_error(path, error) from error
            opened.callback(os.close, directory)
            spot = _real_spot(directory, absolute.name)
            opened.pop_all()
        origin = Origin.of(status, is_mount=_is_mounted_on(fd, spot.directory))
        return cls(
            str(absolute),
            fd,
            directory,
            is_device=stat.S_ISBLK(status.st_mode),
            spot=spot,
            origin=origin,
            is_named=_leads_to(spot, origin, status),
            undo=undo,
        )

    @property
    def edition(self) -> str:
        """What is laid over its bytes, in words; of the file as it is nothing."""
        return ""

    def fileno(self) -> int:
        """The descriptor, open for reading only."""
        return self._fd

    @property
    def name(self) -> str:
        """Its name in `directory`; may be that of a link to it."""
        return self._name

    @property
    def directory(self) -> int:
        """The directory that its path leads to: an O_PATH descriptor, closed with the image."""
        return self._directory

    @property
    def is_device(self) -> bool:
        """Whether it is a block device rather than a file."""
        return self._is_device

    @functools.cached_property
    def is_in_memory(self) -> bool:
        """Whether its file system keeps files in memory, so that no read waits for a disk."""
        return self._filesystem in _IN_MEMORY

    @functools.cached_property
    def answers_at_once(self) -> bool:
        """Whether nobody but this machine's kernel is asked what the file is now.

        Of anything else, a network or a process, an answer may never come.
        """
        return self._is_device or self._filesystem in _ON_THIS_MACHINE

    @functools.cached_property
    def _filesystem(self) -> str:
        """The type of the one that it is on; empty where that is not told."""
        number = mount_id(self._fd)
        with contextlib.suppress(OSError):
            for mount in mounts_in(MOUNT_TABLE.read_bytes()):
                if mount.number == number:
                    return mount.filesystem
        return ""

    def close_aside(self) -> None:
        """From now on let a thread close it, where whoever serves it has to be waited for."""
        closing = None if self.answers_at_once else self._close.detach()
        if closing is None:
            return
        _, _, descriptors, _ = closing
        self._close = weakref.finalize(self, _close_aside, *descriptors)
        self._close.atexit = False  # then there are no threads any more

    def source(self, *, wait: bool = True) -> FileSource:
        """Its bytes, as many as there are now; see `FileSource` for *wait*."""
        return FileSource(self, self.generation().size, wait=wait)

    def generation(self) -> Generation:
        """What it is now; to be compared with what it was. Raises `ImageReadFailed`."""
        status = self.status()
        try:
            size = os.lseek(self._fd, 0, os.SEEK_END) if self._is_device else status.st_size
        except OSError as error:
            raise ImageReadFailed(self.path, 0, _reason(error)) from error
        return Generation(
            device=status.st_rdev if self._is_device else status.st_dev,
            inode=status.st_ino,
            size=size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            written=_sectors_written(status.st_rdev) if self._is_device else 0,
        )

    def status(self) -> os.stat_result:
        """What fstat(2) says of it. Raises `ImageReadFailed`."""
        try:
            return os.fstat(self._fd)
        except OSError as error:  # of a file system that somebody else serves
            raise ImageReadFailed(self.path, 0, _reason(error)) from error

    def allocated_size(self) -> int:
        """Bytes that the file system has set aside for it; holes take none.

        Raises `ImageReadFailed`.
        """
        return self.status().st_blocks * 512

    def is_replaced(self) -> bool:
        """Whether something else stands in its place by now; where there is nothing it does not.

        Of a device that is never said: it was named, not what its name leads to.
        """
        if self._is_device or not self._is_named:
            return False
        try:
            named, opened = self._look(), os.fstat(self._fd)
        except OSError as error:
            return error.errno == errno.EXDEV
        return not os.path.samestat(named, opened)

    def gone(self) -> Gone | None:
        """Whether there is no file any more in its place, nor another, as far as can be told."""
        if not self._is_named:
            return None
        descriptor = f"/proc/{os.getpid()}/fd/{self._fd}"
        try:
            self._look()
        except FileNotFoundError:
            return Gone(os.fstat(self._fd).st_nlink == 0, descriptor)
        except OSError:
            return None
        return None

    def signature(self) -> Signature | None:
        """What stands in its place now, as one look tells; None where that does not.

        Equal signatures mean equal generations, and no other file in its place. For a device only
        its generation tells.
        """
        if self._is_device:
            return None
        try:
            if self._is_named and self.answers_at_once:
                across, spot = self.origin.is_mount, self.spot
                identity = identity_at(spot.directory, spot.name, across=across)
                if identity is not None:
                    return identity
            status = self._look() if self._is_named else os.fstat(self._fd)
        except OSError:
            return None
        times = status.st_mtime_ns, status.st_ctime_ns
        return status.st_dev, status.st_ino, status.st_size, *times

    def reopen(self) -> Image:
        """The file that stands in its place now.

        Raises as `open` does, and `ImageNotFollowed` for what is not opened any more.
        """
        try:
            self._require_origin()
            fd = self.hands.open(Opening.IMAGE, self.spot.directory, self.spot.name)
        except OSError as error:
            raise _open_error(self.path, error) from error
        return Image(
            self.path,
            fd,
            os.dup(self._directory),
            is_device=self._is_device,
            spot=_again(self.spot),
            origin=self.origin,
            is_named=self._is_named,
            closes_aside=not self.answers_at_once,
            hands=self.hands,
            undo=_again(self.undo) if self.undo else None,
        )

    def open_to_write(self) -> int:
        """A second descriptor, of what stands in its place now. Raises OSError."""
        if not self._is_named:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
        return self.hands.open(Opening.IMAGE_TO_WRITE, self.spot.directory, self.spot.name)

    def _look(self) -> os.stat_result:
        # Through the directory as it was opened, entering no mount and following no link: a process
        # that asks what it serves itself waits for itself.
        return look_at(self.spot.directory, self.spot.name, across=self.origin.is_mount)

    def _require_origin(self) -> None:
        """Say what is wrong with what stands there; whoever opens it looks once more."""
        try:
            status = self._look()
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            raise ImageNotFollowed(self.path, "a mount of its own") from error
        if not self.origin.admits(status):
            raise ImageNotFollowed(self.path, _kind_of(status))

    def close(self) -> None:
        """Close it now; nothing may read from it any more."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def missing(image: Image) -> InstarfsError:
    """Why there is no file under the path of *image*, which was opened under it."""
    gone = image.gone()
    if gone is None:
        return ImageMissing(image.path)
    return ImageDeleted(image.path) if gone.is_deleted else ImageMoved(image.path)


def close_all(*descriptors: int) -> None:
    """Close them. What is to be kept of what was written through them has been flushed."""
    for fd in descriptors:
        with contextlib.suppress(OSError):  # of a file that nobody serves any more: it is closed
            os.close(fd)


def _close_aside(*descriptors: int) -> None:
    threading.Thread(target=close_all, args=descriptors, daemon=True).start()


def _open_file(path: str) -> int:
    """The regular file or block device at *path*, which is looked at first.

    Opening some devices, or a FIFO, has effects. Raises OSError, and an error for whatever else.
    """
    looked_at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(path, os.fstat(looked_at).st_mode)
        return open_looked_at(looked_at, _OPEN_FLAGS, path)
    finally:
        os.close(looked_at)


def _real_spot(directory: int, name: str) -> Spot:
    """Where the file itself is that *name* leads to; where that is not told, there."""
    try:
        return Spot(*behind_links(directory, name))
    except OSError:
        return Spot(os.dup(directory), name)


def _leads_to(spot: Spot, origin: Origin, status: os.stat_result) -> bool:
    try:
        found = look_at(spot.directory, spot.name, across=origin.is_mount)
    except OSError:
        return False
    return os.path.samestat(found, status)


def _again(spot: Spot) -> Spot:
    return Spot(os.dup(spot.directory), spot.name)


def _is_mounted_on(fd: int, directory: int) -> bool:
    """Whether the open file was mounted on its own name in *directory* (a bind mount)."""
    mounts = {mount_id(fd), mount_id(directory)}
    return len(mounts) > 1 and None not in mounts


def mount_id(fd: int) -> int | None:
    """Which mount an open file was found on; None where that is not told. Asks nobody for it."""
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), None)


def _spot_of(undo_file: str) -> Spot:
    path = Path(undo_file)
    try:
        return Spot(os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), path.name)
    except OSError as error:
        raise UndoFileImpossible(undo_file, _reason(error)) from error


def _sectors_written(device: int) -> int:
    """Sectors written to a block device since it appeared; 0 where the kernel does not count."""
    try:
        return int(block_statistics(device).read_text().split()[_SECTORS_WRITTEN])
    except (OSError, IndexError, ValueError):
        return 0


_KINDS = {
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
}


def _kind_of(status: os.stat_result) -> str:
    """What stands in the place of an image that was not opened, in words."""
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFREG:
        return "a file of another owner"
    names = {stat.S_IFLNK: "symbolic link", stat.S_IFDIR: "directory", stat.S_IFBLK: "block device"}
    return f"a {(_KINDS | names).get(kind, 'special file')}"


def _refuse_other_kinds(path: str, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        raise ImageIsDirectory(path)
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        raise ImageIsNoFile(path, _KINDS.get(kind, "special file"))


def _open_error(path: str, error: OSError) -> InstarfsError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return ImageMissing(path)
        case errno.EACCES | errno.EPERM:
            return ImageForbidden(path)
        case _:
            return ImageOpenFailed(path, _reason(error))


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
