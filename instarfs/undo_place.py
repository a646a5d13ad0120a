"""Where an undo file is: its names beside the image, and who may have made it.

What is in it is `instarfs.journal`'s business.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from instarfs.errors import UndoFileDamaged, reason_of
from instarfs.image import Image

SUFFIX = ".instarfs-undo"
_NEW, _OLD = SUFFIX + ".new", SUFFIX + ".old"

MAX_LINKS = 40
"""As the kernel follows."""

_O_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class UndoPlace:
    """Where an image's undo file is: the directory of the file itself, and the names in it.

    Everything goes through the directory as it was opened, never by path again.
    """

    def __init__(self, directory: int, image_name: str, owners: frozenset[int], mode: int) -> None:
        """Takes *directory* over. *owners* and *mode*: whom, beside root, the image belongs to."""
        self._directory = directory
        self._image_name = image_name
        self._owners = owners | {0, os.geteuid()}
        self._image_mode = mode

    @classmethod
    def beside(cls, image: Image) -> Self:
        """The place for *image*; a link leads beside the file that it means. Raises `OSError`."""
        directory, name = os.dup(image.directory), image.name
        try:
            for _ in range(MAX_LINKS):
                try:
                    target = Path(os.readlink(name, dir_fd=directory))
                except OSError as error:
                    if error.errno == errno.EINVAL:  # not a link
                        break
                    raise
                following = os.open(target.parent, _O_DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory, name = following, target.name
            status = os.fstat(image.fileno())
            return cls(directory, name, frozenset({status.st_uid}), status.st_mode)
        except BaseException:
            os.close(directory)
            raise

    @property
    def file(self) -> str:
        """The undo file's path, for messages."""
        try:
            directory = Path(f"/proc/self/fd/{self._directory}").readlink()
        except OSError:
            return self._image_name + SUFFIX
        return str(directory / (self._image_name + SUFFIX))

    def close(self) -> None:
        os.close(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self, flags: int) -> int | None:
        """A descriptor of the undo file; None where there is none.

        Raises `UndoFileDamaged` for what cannot be one, or may have been made by somebody else.
        """
        try:
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self._image_name + SUFFIX, flags, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            problem = f"the undo file cannot be opened: {reason_of(error)}"
            raise UndoFileDamaged(self.file, problem) from error
        try:
            self._require_trust(os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def make(self) -> int:
        """A descriptor of a new, empty file, still without the undo file's name."""
        name = self._image_name + _NEW
        with suppress(FileNotFoundError):  # what a crash left; the image's locks exclude a rival
            os.unlink(name, dir_fd=self._directory)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self._directory)

    def discard_new(self) -> None:
        """Remove what `make` made, if it has not been put in place."""
        self._unlink(_NEW)

    def put_in_place(self) -> None:
        """Give the file of `make` its name; the undo file that had it is kept aside."""
        with suppress(FileNotFoundError):
            self._rename(SUFFIX, _OLD)
        try:
            self._rename(_NEW, SUFFIX)
            self._sync()
        except OSError:
            with suppress(OSError):
                self._bring_back()
            raise

    def drop_old(self) -> None:
        """Remove the undo file that was kept aside."""
        self._unlink(_OLD)

    def drop_current(self) -> None:
        """Remove the undo file; the one that was kept aside, if any, takes its place."""
        self._bring_back()
        self._sync()

    def is_taken(self) -> bool:
        """Whether there is something under the undo file's name."""
        return self._exists(SUFFIX)

    def restore_old(self) -> None:
        """Bring back the undo file that was kept aside, where a crash left no other."""
        if self.has_old() and not self.is_taken():
            self.drop_current()

    def has_old(self) -> bool:
        """Whether an undo file is kept aside."""
        return self._exists(_OLD)

    def _exists(self, suffix: str) -> bool:
        try:
            name = self._image_name + suffix
            os.stat(name, dir_fd=self._directory, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _bring_back(self) -> None:
        try:
            self._rename(_OLD, SUFFIX)
        except FileNotFoundError:
            self._unlink(SUFFIX)

    def _rename(self, old: str, new: str) -> None:
        names = self._image_name + old, self._image_name + new
        os.rename(*names, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _unlink(self, suffix: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._image_name + suffix, dir_fd=self._directory)

    def _sync(self) -> None:
        """Make the names durable."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            os.fsync(fd)
        except OSError as error:
            if (
                error.errno != errno.EINVAL
            ):  # seen on network file systems: they keep no such promise
                raise
        finally:
            os.close(fd)

    def _require_trust(self, status: os.stat_result) -> None:
        """Refuse what somebody made who may not write to the image: its bytes go in there."""
        if not stat.S_ISREG(status.st_mode):
            raise UndoFileDamaged(self.file, "this is no undo file")
        writers = status.st_mode & ~self._image_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid not in self._owners or writers:
            raise UndoFileDamaged(self.file, "others than the image's owner may write to it")
