"""Devices for tests of writing: in memory, recorded, and failing where a test wants it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from instarfs.repair.execute import Device, FileDevice


@dataclass(frozen=True, slots=True)
class Write:
    offset: int
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Truncate:
    size: int


@dataclass(frozen=True, slots=True)
class Flush:
    pass


@dataclass(frozen=True, slots=True)
class Punch:
    offset: int
    length: int


Operation = Write | Truncate | Flush | Punch


@dataclass(frozen=True, slots=True)
class Failure:
    """What an operation does instead: of a write, *kept* bytes arrive first."""

    code: int
    kept: int = 0

    def raise_it(self) -> None:
        if self.code == errno.ENOMEM:
            raise MemoryError
        raise OSError(self.code, os.strerror(self.code))


EIO, ENOSPC = Failure(errno.EIO), Failure(errno.ENOSPC)
ENOMEM = Failure(errno.ENOMEM)
"""Not of the disk: this process was refused memory in the middle of it."""
SHORT = Failure(errno.EIO, kept=700)
"""A write of which only a part arrives: a sector and a bit of the next one."""

Fail = Callable[[int, Operation], Failure | None]


def never(_number: int, _operation: Operation) -> Failure | None:
    return None


def once(number: int, failure: Failure) -> Fail:
    """The operation of that number fails, and all others work."""
    return lambda at, _operation: failure if at == number else None


def from_then_on(number: int, failure: Failure) -> Fail:
    """From the operation of that number on everything fails: the disk is gone."""
    return lambda at, _operation: failure if at >= number else None


@dataclass
class MemoryDevice:
    """A file in memory. ``log``: what was done, failures left out; ``done``: attempts."""

    content: bytearray
    fail: Fail = never
    log: list[Operation] = field(default_factory=list)
    done: int = 0
    name: str = "image"

    @property
    def size(self) -> int:
        return len(self.content)

    def pread(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def pwrite(self, offset: int, data: memoryview) -> None:
        write = Write(offset, bytes(data))
        failure = self._attempt(write)
        arrived = write.data[: failure.kept] if failure else write.data
        assert offset <= len(self.content), "a hole that no truncate has made"
        self.content[offset : offset + len(arrived)] = arrived
        self._end(write, failure)

    def flush(self) -> None:
        self._end(Flush(), self._attempt(Flush()))

    def truncate(self, size: int) -> None:
        failure = self._attempt(Truncate(size))
        if not failure:
            del self.content[size:]
            self.content += bytes(size - len(self.content))
        self._end(Truncate(size), failure)

    def punch_hole(self, offset: int, length: int) -> None:
        punch = Punch(offset, length)
        failure = self._attempt(punch)
        if not failure:
            self.content[offset : offset + length] = bytes(length)
        self._end(punch, failure)

    def _attempt(self, operation: Operation) -> Failure | None:
        self.done += 1
        return self.fail(self.done - 1, operation)

    def _end(self, operation: Operation, failure: Failure | None) -> None:
        if failure:
            failure.raise_it()
        self.log.append(operation)


class WatchedDevice:
    """A file's device, each of whose operations fails where a test wants it, and is recorded."""

    def __init__(self, fd: int, name: str, fail: Fail = never) -> None:
        self._device: Device = FileDevice(fd, name)
        self._fail = fail
        self._done = 0
        self.log: list[Operation] = []
        self.name = name

    @property
    def size(self) -> int:
        return self._device.size

    def pread(self, offset: int, length: int) -> bytes:
        return self._device.pread(offset, length)

    def pwrite(self, offset: int, data: memoryview) -> None:
        failure = self._attempt(Write(offset, bytes(data)))
        self._device.pwrite(offset, data[: failure.kept] if failure else data)
        if failure:
            failure.raise_it()

    def flush(self) -> None:
        failure = self._attempt(Flush())
        if failure:
            failure.raise_it()
        self._device.flush()

    def truncate(self, size: int) -> None:
        failure = self._attempt(Truncate(size))
        if failure:
            failure.raise_it()
        self._device.truncate(size)

    def punch_hole(self, offset: int, length: int) -> None:
        failure = self._attempt(Punch(offset, length))
        if failure:
            failure.raise_it()
        self._device.punch_hole(offset, length)

    def _attempt(self, operation: Operation) -> Failure | None:
        failure = self._fail(self._done, operation)
        self._done += 1
        if not failure:
            self.log.append(operation)
        return failure
