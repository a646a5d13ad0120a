"""What stands in a mounted tree: directories, and three kinds of file.

A generated file is rendered from a computed value when it is first read; a live file shows what
is true at the moment; a control file is a live file that may be written to. A node knows neither
its name nor its inode number, and nothing here knows of FUSE or of images.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import trio

from instarfs.computed import Edition

T = TypeVar("T")


class Value(Protocol[T]):
    """What a generated file shows: see `instarfs.computed.Computed`."""

    def peek(self) -> Edition[T] | None:
        """The value if it is known and still good; never computes."""

    async def get(self) -> Edition[T]:
        """The value, computed first where need be."""


class Handle(Protocol):
    """A file opened once, for reading."""

    async def read(self, offset: int, size: int) -> bytes:
        """Up to *size* bytes from *offset*; fewer only at the end."""


class File(ABC):
    """What all kinds of file have in common."""

    @abstractmethod
    def size(self) -> int:
        """Bytes to be read, as far as that is known without computing anything."""

    @abstractmethod
    def open(self) -> Handle:
        """Open it; does not compute anything either."""


@dataclass(frozen=True, eq=False)
class Directory:
    """Names and what they stand for, in the order of listing."""

    children: Mapping[str, Node]

    @property
    def subdirectories(self) -> int:
        return sum(isinstance(node, Directory) for node in self.children.values())


Node = Directory | File


class GeneratedFile(File, Generic[T]):
    """A value, rendered. Every handle is one snapshot, shared by all handles of one edition.

    *render* runs in a worker thread, for it may take seconds where there are millions of findings.
    """

    def __init__(self, value: Value[T], render: Callable[[T], bytes]) -> None:
        self._value = value
        self._render = render
        self._lock = trio.Lock()
        # Weak, both: the edition so as not to outlive its image, the content so that megabytes
        # of text are there only while somebody has the file open.
        self._edition: weakref.ref[Edition[T]] | None = None
        self._snapshot: weakref.ref[_Snapshot] | None = None
        self._size = 0

    def size(self) -> int:
        edition = self._value.peek()
        return self._size if edition is not None and self._is_rendered(edition) else 0

    def open(self) -> Handle:
        return _GeneratedHandle(self._take_snapshot)

    async def _take_snapshot(self) -> _Snapshot:
        edition = await self._value.get()
        async with self._lock:
            snapshot = self._snapshot() if self._snapshot and self._is_rendered(edition) else None
            if snapshot is None:
                content = await trio.to_thread.run_sync(
                    self._render, edition.value, abandon_on_cancel=True
                )
                # bytes(): whatever else a renderer returned must fail here, where it is caught.
                snapshot = _Snapshot(bytes(content))
                self._edition, self._snapshot = weakref.ref(edition), weakref.ref(snapshot)
                self._size = len(snapshot.content)
        return snapshot

    def _is_rendered(self, edition: Edition[T]) -> bool:
        return self._edition is not None and self._edition() is edition


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Snapshot:
    content: bytes


class _GeneratedHandle:
    def __init__(self, take_snapshot: Callable[[], Awaitable[_Snapshot]]) -> None:
        self._take_snapshot = take_snapshot
        self._lock = trio.Lock()
        self._snapshot: _Snapshot | None = None

    async def read(self, offset: int, size: int) -> bytes:
        if self._snapshot is None:
            async with self._lock:
                if self._snapshot is None:
                    self._snapshot = await self._take_snapshot()
        return self._snapshot.content[offset : offset + size]


class LiveFile(File):
    """What *show* returns, fresh at each open and at each read from the beginning."""

    def __init__(self, show: Callable[[], bytes]) -> None:
        self._show = show

    def size(self) -> int:
        return len(self._show())

    def open(self) -> Handle:
        return _LiveHandle(self._show)


class _LiveHandle:
    def __init__(self, show: Callable[[], bytes]) -> None:
        self._show = show
        self._content = b""

    async def read(self, offset: int, size: int) -> bytes:
        if offset == 0 or not self._content:
            self._content = bytes(self._show())
        return self._content[offset : offset + size]


class ControlFile(LiveFile):
    """A live file that the owner of the mount may write to.

    ``act`` is handed what one write brought, whatever its offset: a command, as in sysfs.
    ``begin_writing`` is called when it is opened for writing and raises a domain error where that
    is of no use: the kernel makes writers of one file wait for each other, and the second is to be
    told at once.
    """

    def __init__(
        self,
        show: Callable[[], bytes],
        act: Callable[[bytes], Awaitable[None]],
        begin_writing: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(show)
        self.act = act
        self.begin_writing = begin_writing
