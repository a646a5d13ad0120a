"""What stands in a mounted tree: directories, and five kinds of file.

A directory's names are fixed, or follow from a computed value, or are made as they are asked for. A
generated file is rendered from a computed value when it is opened: programs that copy files take no
byte more than the size that an open one has. A fixed file is one that was rendered when its name
was looked up, and another content is another file. A live file shows what is true at the moment; a
control file is a live file that may be written to; a data file is read at any offset, and the
kernel keeps what it has read, as of a fixed file. A node knows neither its name nor its inode
number, and nothing here knows of FUSE or of images.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import trio

from instarfs.errors import FileOutdated
from instarfs.inspect.shared_value import Edition

T = TypeVar("T")

Data = bytes | memoryview

SHARED_BYTES = 4 << 20
"""Of a generated file: so much is held once for all who have it open. The rest is streamed."""

KEPT_BYTES = 64 << 10
"""Of a generated file that is no longer than this: held while its edition is the current one."""

FIXED_BYTES = 4 << 10
"""Of a fixed file: so much is held for as long as the kernel knows its name. It is one page."""

BEHIND_BYTES = 1 << 20
"""Of a streamed file: so much is held behind where it was read last."""


class Value(Protocol[T]):
    """What a generated file shows: see `instarfs.inspect.shared_value.Value`."""

    def peek(self) -> Edition[T] | None:
        """The value if it is known and still good; never computes."""

    async def get(self) -> Edition[T]:
        """The value, computed first where need be."""


class Handle(Protocol):
    """A file opened once, for reading."""

    def size(self) -> int:
        """Bytes that there are to read."""

    def ready(self, offset: int, size: int, /) -> Data | None:
        """What `read` gives, where nothing has to be waited for; else None."""

    def read(self, offset: int, size: int, /) -> Awaitable[Data]:
        """Up to *size* bytes from *offset*; fewer only at the end."""


class File(ABC):
    """What all kinds of file have in common."""

    __slots__ = ()

    @abstractmethod
    def size(self) -> int:
        """Bytes to be read, as far as that is known without computing anything."""

    def allocated(self) -> int | None:
        """Bytes that are more than zeros, or a bound for them; None where all may be.

        Computes nothing.
        """
        return None

    def opened(self) -> Handle | None:
        """What `open` gives, where nothing has to be waited for; else None."""
        return None

    @abstractmethod
    async def open(self) -> Handle:
        """Open it, and first compute what it shows. May raise a domain error."""


class Directory(ABC):
    """Names and what they stand for."""

    __slots__ = ()

    subdirectories = 0
    """How many of the names are directories, as far as that is known without looking."""

    is_fixed = False
    """Whether a name, once it stands for a node, always does, unless that is a fixed file."""

    name_seconds = 0.0
    """Where it is not: so long the kernel may go by what a name stood for, and not ask."""

    @abstractmethod
    async def names(self) -> Sequence[str]:
        """All names that a listing shows, in its order. May look them up, in a thread."""

    @abstractmethod
    async def child(self, name: str) -> Node | None:
        """What *name* stands for; the same node for as long as anybody holds it."""

    async def listed_child(self, name: str) -> Node | None:
        """The same of a name that was listed a moment ago, of which there may be very many."""
        return await self.child(name)


Node = Directory | File


class FixedDirectory(Directory):
    """The same children always. *unlisted*: those that a listing does not show."""

    is_fixed = True

    def __init__(
        self, children: Mapping[str, Node], unlisted: Mapping[str, Node] | None = None
    ) -> None:
        self.children, self._unlisted = children, unlisted or {}
        self.subdirectories = sum(isinstance(node, Directory) for node in children.values())

    async def names(self) -> Sequence[str]:
        return list(self.children)

    async def child(self, name: str) -> Node | None:
        return self.children.get(name) or self._unlisted.get(name)


class DeferredDirectory(Directory, Generic[T]):
    """The same children always, files all of them, each made when somebody looks at it.

    *makers*: what makes each, by name, of *what* the directory is of; asked for when somebody first
    looks into it. What is brief stands for one file after another. *name_seconds*: as of any
    directory.
    """

    # Of these there may be tens of thousands, most of which nobody looks into.
    __slots__ = ("__weakref__", "_find_makers", "_made", "_makers", "_what", "name_seconds")

    is_fixed = True

    def __init__(
        self,
        makers: Callable[[T], Mapping[str, Callable[[], File | Brief]]],
        what: T,
        *,
        name_seconds: float = 0.0,
    ) -> None:
        self._find_makers, self._what = makers, what
        self.name_seconds = name_seconds
        self._makers: Mapping[str, Callable[[], File | Brief]] | None = None
        self._made: dict[str, File | Brief] | None = None

    async def names(self) -> Sequence[str]:
        return list(self._look_into())

    async def child(self, name: str) -> Node | None:
        make = self._look_into().get(name)
        if make is None:
            return None
        if self._made is None:
            self._made = {}
        if name not in self._made:
            self._made[name] = make()
        made = self._made[name]
        return made if isinstance(made, File) else await made.file()

    def _look_into(self) -> Mapping[str, Callable[[], File | Brief]]:
        if self._makers is None:
            self._makers = self._find_makers(self._what)
        return self._makers


class MadeDirectory(Directory):
    """Children that *make* makes when they are asked for: None for a name that stands for nothing.

    *listed*: the names that a listing shows, which may be fewer than there are. *fixed*: children
    that are always there, before the others. *make_listed*: as *make*, without asking whether the
    name still stands for anything. *name_seconds*: as of any directory.
    """

    def __init__(
        self,
        make: Callable[[str], Awaitable[Node | None]],
        listed: Callable[[], Awaitable[Sequence[str]]] | None = None,
        fixed: Mapping[str, Node] | None = None,
        *,
        make_listed: Callable[[str], Node | None] | None = None,
        name_seconds: float = 0.0,
    ) -> None:
        self._make, self._listed, self._make_listed = make, listed, make_listed
        self.name_seconds = name_seconds
        self._fixed = dict(fixed or {})
        self._made: weakref.WeakValueDictionary[str, Node] = weakref.WeakValueDictionary()

    async def names(self) -> Sequence[str]:
        return [*self._fixed, *(await self._listed() if self._listed else ())]

    async def child(self, name: str) -> Node | None:
        known = self._fixed.get(name) or self._made.get(name)
        node = await self._make(name) if known is None else known
        if node is None:
            return None
        return node if name in self._fixed else self._made.setdefault(name, node)

    async def listed_child(self, name: str) -> Node | None:
        if self._make_listed is None or name in self._fixed:
            return await self.child(name)
        node = self._made.get(name) or self._make_listed(name)
        return None if node is None else self._made.setdefault(name, node)


class GeneratedFile(File, Generic[T]):
    """A value, rendered. Every handle is one snapshot of it.

    *render* runs in a worker thread, for it may take seconds where there are millions of findings.
    It returns the content, or its parts one after the other: then only the first `SHARED_BYTES` are
    kept, once for all handles of one edition; what follows is counted, and made anew as it is read.
    *measure*, where there is one, counts all of it in less time than it takes to make.
    """

    def __init__(
        self,
        value: Value[T],
        render: Callable[[T], bytes | Iterable[bytes]],
        measure: Callable[[T], int] | None = None,
    ) -> None:
        self._value = value
        self._render = render
        self._measure = measure
        self._lock = trio.Lock()
        # Weak, both: the edition so as not to outlive its image, the content so that megabytes
        # of text are there only while somebody has the file open.
        self._edition: weakref.ref[Edition[T]] | None = None
        self._snapshot: weakref.ref[_Snapshot] | None = None
        # A short one, which holds no edition: no thread is asked for it again.
        self._kept: _Snapshot | None = None
        self._size = 0

    def size(self) -> int:
        edition = self._value.peek()
        return self._size if edition is not None and self._is_rendered(edition) else 0

    async def open(self) -> Handle:
        edition = await self._value.get()
        async with self._lock:
            snapshot = self._known_snapshot(edition)
            if snapshot is None:
                content, size = await self._made_of(edition)
                # Made here, not in the thread, which would hold it a while longer.
                parts = partial(self._parts, edition) if len(content) < size else None
                snapshot = _Snapshot(content, size, parts)
                self._edition, self._snapshot = weakref.ref(edition), weakref.ref(snapshot)
                self._kept = snapshot if len(content) == size <= KEPT_BYTES else None
                self._size = size
        return _GeneratedHandle(snapshot)

    async def _made_of(self, edition: Edition[T]) -> tuple[bytes, int]:
        known = self._size if self._is_rendered(edition) else None
        return await trio.to_thread.run_sync(self._begin, edition, known, abandon_on_cancel=True)

    def _known_snapshot(self, edition: Edition[T]) -> _Snapshot | None:
        if not self._is_rendered(edition):
            return None
        return self._kept or (self._snapshot() if self._snapshot else None)

    def _parts(self, edition: Edition[T]) -> Iterator[bytes]:
        content = self._render(edition.value)
        return iter((content,) if isinstance(content, bytes | str) else content)

    def _begin(self, edition: Edition[T], known: int | None) -> tuple[bytes, int]:
        """Render the part that is shared, and count the rest, unless the size is *known*.

        In a worker thread, which ends early when nobody waits for it any more.
        """
        head, size = bytearray(), 0
        if known is None and self._measure is not None:
            known = self._measure(edition.value)
        for part in self._parts(edition):
            if len(head) < SHARED_BYTES:
                head += part
            size += len(part)
            if known is not None and len(head) >= SHARED_BYTES:
                return bytes(head), known
            trio.from_thread.check_cancelled()
        return bytes(head), size

    def _is_rendered(self, edition: Edition[T]) -> bool:
        return self._edition is not None and self._edition() is edition


class Brief(Protocol):
    """What stands for one file after another: see `BriefContent`."""

    async def file(self) -> File:
        """The one that it stands for now. May raise a domain error."""


class BriefContent(Generic[T]):
    """A value, rendered by *render* in less time than it takes to ask a thread for it.

    It stands for a `FixedFile`, and for another one where the value gives another content; but what
    is longer than `FIXED_BYTES` is generated each time that it is opened.
    """

    __slots__ = ("_edition", "_file", "_render", "_value")

    def __init__(self, value: Value[T], render: Callable[[T], bytes]) -> None:
        self._value, self._render = value, render
        self._edition: weakref.ref[Edition[T]] | None = None
        self._file: File | None = None

    async def file(self) -> File:
        """The one that it stands for now. May raise a domain error."""
        edition = await self._value.get()
        if self._file is None or not self._shows(edition):
            self._file = self._file_of(self._render(edition.value))
            self._edition = weakref.ref(edition)
        return self._file

    def peek(self) -> File | None:
        """The same, where nothing has to be waited for; else None."""
        edition = self._value.peek()
        return self._file if edition is not None and self._shows(edition) else None

    def _shows(self, edition: Edition[T]) -> bool:
        return self._edition is not None and self._edition() is edition

    def _file_of(self, content: bytes) -> File:
        known = self._file
        if len(content) > FIXED_BYTES:
            is_long = isinstance(known, GeneratedFile)
            return known if known and is_long else GeneratedFile(self._value, self._render)
        # As it was before it was looked at again: an image that is young is for each that asks.
        if isinstance(known, FixedFile) and known.content == content:
            return known
        return FixedFile(content, self)


class FixedFile(File):
    """The same bytes always, for as long as *brief* stands for it, or somebody has it open."""

    __slots__ = ("__weakref__", "_brief", "content")

    def __init__(self, content: bytes, brief: BriefContent[Any]) -> None:
        self.content, self._brief = content, brief

    def size(self) -> int:
        return len(self.content)

    def opened(self) -> Handle | None:
        return _FixedHandle(self.content) if self._brief.peek() is self else None

    async def open(self) -> Handle:
        """Raises `FileOutdated` where its name stands for another by now."""
        if await self._brief.file() is not self:
            raise FileOutdated
        return _FixedHandle(self.content)


@dataclass(frozen=True, slots=True)
class _FixedHandle:
    content: bytes

    def size(self) -> int:
        return len(self.content)

    def ready(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size]

    async def read(self, offset: int, size: int) -> bytes:
        return self.ready(offset, size)


class DeferredFile(File):
    """What *make* makes when somebody opens it: a listing of very many costs little each."""

    __slots__ = ("__weakref__", "_file", "_make")

    def __init__(self, make: Callable[[], File]) -> None:
        self._make = make
        self._file: File | None = None

    def size(self) -> int:
        return self._file.size() if self._file is not None else 0

    async def open(self) -> Handle:
        if self._file is None:
            self._file = self._make()
        return await self._file.open()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Snapshot:
    """A rendering of ``size`` bytes: all of them, or the first, and ``parts`` make it anew."""

    content: bytes
    size: int
    parts: Callable[[], Iterator[bytes]] | None


class _GeneratedHandle:
    def __init__(self, snapshot: _Snapshot) -> None:
        self._snapshot = snapshot
        self._lock = trio.Lock()
        self._stream: _Stream | None = None

    def size(self) -> int:
        return self._snapshot.size

    def ready(self, offset: int, size: int) -> bytes | None:
        content = self._snapshot.content
        if self._snapshot.parts is None or offset + size <= len(content):
            return content[offset : offset + size]
        return None

    async def read(self, offset: int, size: int) -> bytes:
        known, parts = self.ready(offset, size), self._snapshot.parts
        if known is not None or parts is None:
            return known or b""
        async with self._lock:
            stream, self._stream = self._stream, None
            if stream is None or offset < stream.start:
                stream = _Stream(parts())
            # Who leaves leaves it to its thread, which may wait for a file that nobody serves.
            part = await trio.to_thread.run_sync(stream.read, offset, size, abandon_on_cancel=True)
            self._stream = stream
            return part


class _Stream:
    """A rendering that is made while it is read: a window that only moves forward."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._window = bytearray()
        self._ended = False
        self.start = 0
        """Offset of the first byte that can still be read."""

    def read(self, offset: int, size: int) -> bytes:
        while not self._ended and self.start + len(self._window) < offset + size:
            part = next(self._parts, None)
            if part is None:
                self._ended = True
                break
            self._window += part
            surplus = min(offset - self.start, len(self._window)) - BEHIND_BYTES
            if surplus > BEHIND_BYTES:
                del self._window[:surplus]
                self.start += surplus
        at = offset - self.start
        return bytes(self._window[at : at + size])


class DataFile(File):
    """Bytes that are read where somebody wants them, as of a disk.

    *length*: bytes there are now. *ready* gives a part where nothing has to be waited for, else
    None, and then *read* does; both may raise a domain error, for that part alone.
    *content*: changes when what the kernel may have kept of it is no longer good. *allocated*: as
    of `File`; *learn* has it know more, *learn_length* the length.
    """

    def __init__(
        self,
        length: Callable[[], int],
        read: Callable[[int, int], Awaitable[Data]],
        content: Callable[[], Hashable],
        ready: Callable[[int, int], Data | None] = lambda _offset, _size: None,
        *,
        allocated: Callable[[], int | None] = lambda: None,
        learn: Callable[[], Awaitable[None]] | None = None,
        learn_length: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._length, self._read, self._content, self._ready = length, read, content, ready
        self._allocated, self._learn, self._learn_length = allocated, learn, learn_length
        self._cached: Hashable = object()

    def size(self) -> int:
        return self._length()

    async def learn_size(self) -> None:
        """Have `size` know more, where that takes no more than a look at a disk."""
        if self._learn_length is not None:
            await self._learn_length()

    def allocated(self) -> int | None:
        return self._allocated()

    async def open(self) -> Handle:
        await self.learn_size()
        if self._learn is not None:
            await self._learn()
        return DataHandle(self._length, self._read, self._ready)

    def may_keep_cache(self) -> bool:
        """Whether what the kernel has kept since the last time this was asked is still good."""
        before, self._cached = self._cached, self._content()
        return before == self._cached


@dataclass(frozen=True, slots=True)
class DataHandle:
    """A data file, opened. What it is made of is asked as it is: reading it is to cost little."""

    size: Callable[[], int]
    read: Callable[[int, int], Awaitable[Data]]
    ready: Callable[[int, int], Data | None]


class LiveFile(File):
    """What *show* returns, fresh at each open and whenever it is read from the beginning again."""

    def __init__(self, show: Callable[[], bytes]) -> None:
        self._show = show

    def size(self) -> int:
        return len(self._show())

    async def open(self) -> Handle:
        return _LiveHandle(self._show)


class _LiveHandle:
    def __init__(self, show: Callable[[], bytes]) -> None:
        self._show = show
        self._content = bytes(show())
        self._is_begun = False

    def size(self) -> int:
        return len(self._content)

    def ready(self, offset: int, size: int) -> bytes:
        if offset == 0:
            if self._is_begun:
                self._content = bytes(self._show())
            self._is_begun = True
        return self._content[offset : offset + size]

    async def read(self, offset: int, size: int) -> bytes:
        return self.ready(offset, size)


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

    async def open(self) -> ControlHandle:
        return ControlHandle(self._show, self.act)


class ControlHandle(_LiveHandle):
    """A control file, opened; after a write it shows what has become of that."""

    def __init__(self, show: Callable[[], bytes], act: Callable[[bytes], Awaitable[None]]) -> None:
        super().__init__(show)
        self._act = act

    async def write(self, command: bytes) -> None:
        """Obey *command*. Raises a domain error where that was not done."""
        self._is_begun = True
        await self._act(command)
