"""Between the kernel and the nodes: inode numbers and attributes in, bytes and errnos out.

Everything that pyfuse3 wants lives here; this file does not know what an image is, nor what
stands in the tree. pyfuse3 survives no exception but FUSEError: `_guarded` sees to that.
"""

# The arguments of a handler are what pyfuse3 passes.
# ruff: noqa: ARG002

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import stat
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from instarfs.errors import DOMAIN_ERRORS, is_shortage
from instarfs.mount.interrupts import is_interrupted
from instarfs.mount.nodes import (
    ControlFile,
    ControlHandle,
    DataFile,
    Directory,
    File,
    FixedDirectory,
    FixedFile,
    Handle,
    Node,
)

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)

BLOCK_SIZE = 4096

# Fixed names never change what they stand for; sizes and times may at any moment.
_ENTRY_TIMEOUT = 60.0
_ATTR_TIMEOUT = 0.0

KEPT_NAMES = 4096
"""Of the names that are made when they are asked for: so many the kernel may hold on to."""

_DROPPED_TOGETHER = 256
"""What is dropped takes a thread, and to wake one takes longer than to drop a name."""

# The kernel asks for the attributes before each read that it answers from its cache, and drops the
# cache where size or time are others. As often as a file system's clock ticks will do.
_DATA_ATTR_TIMEOUT = 0.01

# Its size never changes: of its times the last ones may be shown for so long.
_FIXED_ATTR_TIMEOUT = 1.0

# Times in nanoseconds that a file may be shown with while its own says nothing; no two in a row are
# the same, and it stays the same second.
_SHOWN_UNSETTLED = 1000

_DOTS = (".", "..")

_NAME_MAX = 255
"""Bytes of a name: limits.h(0P)."""

_SOON_SECONDS = 0.2

INTERRUPT_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Facts:
    """What the whole mount shares at a moment: the size and the time of what it shows.

    ``is_settled``: whether another content would have another time.
    """

    size: int
    mtime_ns: int
    is_settled: bool = True


@dataclass(frozen=True, slots=True)
class Ownership:
    """Whom the mount belongs to, and whether others may read it."""

    uid: int
    gid: int
    for_others: bool = False

    def mode(self, node: Node) -> int:
        """Type and permissions of *node*.

        Nothing but a control file can be written to, and EROFS says so, as on any file system that
        is read-only. What is copied out of the mount keeps these permissions, and whoever made the
        copy is to be able to change and to remove it.
        """
        if isinstance(node, ControlFile):
            return stat.S_IFREG | 0o600
        if isinstance(node, Directory):
            return stat.S_IFDIR | (0o755 if self.for_others else 0o700)
        return stat.S_IFREG | (0o644 if self.for_others else 0o600)

    def may_open(self, node: Node, uid: int) -> bool:
        """Whether *uid*, whom the kernel has let in, may open *node*."""
        return not isinstance(node, ControlFile) or uid in (self.uid, 0)


def _guarded(
    handler: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Turn what *handler* raises into what pyfuse3 understands; any other exception ends a mount.

    Domain errors carry their errno, and memory or a thread that is refused is ENOMEM. Anything else
    is a bug of ours: logged, and EIO. Cancellation is neither, and passes.
    """

    @functools.wraps(handler)
    async def guard(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except DOMAIN_ERRORS as error:
            raise FUSEError(error.errno) from error
        except Exception as error:
            if is_shortage(error):
                short = "memory" if isinstance(error, MemoryError) else "room for a thread"
                log.warning("not enough %s in %s", short, handler.__name__)
                raise FUSEError(errno.ENOMEM) from error
            log.exception("unexpected error in %s", handler.__name__)
            raise FUSEError(errno.EIO) from error

    return guard


class _Dropper:
    """Has the kernel let go of names, for as long as there is a mount to drop them from.

    In a thread: the kernel waits with it for whoever looks for something in that directory. The
    thread that pyfuse3 has for it goes on when its session has been closed.
    """

    def __init__(self) -> None:
        self._names: deque[tuple[InodeT, FileNameT]] = deque()
        self._some = trio.Event()
        self._is_over = False

    def __call__(self, directory: InodeT, name: FileNameT) -> None:
        self._names.append((directory, name))
        self._some.set()

    async def run(self) -> None:
        """Drop what comes, until it is cancelled."""
        try:
            while True:
                await self._some.wait()
                self._some = trio.Event()
                # Who waits for the end of the mount need not wait for who looks in a directory.
                try:
                    await trio.to_thread.run_sync(self._drop_all, abandon_on_cancel=True)
                except (MemoryError, RuntimeError) as error:
                    if not is_shortage(error):
                        raise
                    # There is no room for a thread: they are dropped with those that come next.
        finally:
            self._is_over = True

    def _drop_all(self) -> None:
        while self._names and not self._is_over:
            with contextlib.suppress(OSError):  # the kernel has let go of it, or of the mount
                pyfuse3.invalidate_entry(*self._names.popleft())


@dataclass(slots=True)
class _Known:
    """A node that the kernel holds *lookups* references to."""

    node: Node
    lookups: int


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """An open file. ``pid`` opened it, and most probably reads it."""

    node: File
    handle: Handle
    pid: int


class Operations(pyfuse3.Operations):
    """The tree below *root*, read-only but for its control files.

    *facts* is called for every answer with attributes in it. *attributes* are extended attributes
    of the root directory, until somebody asks for others; they are not listed, so that nothing
    copies them. *drop* tells the kernel
    to let go of a name in the directory of that inode.
    """

    supports_dot_lookup = False

    def __init__(
        self,
        root: Directory,
        facts: Callable[[], Facts],
        ownership: Ownership,
        attributes: dict[bytes, bytes] | None = None,
        drop: Callable[[InodeT, FileNameT], None] | None = None,
    ) -> None:
        super().__init__()
        self._dropper = _Dropper()
        self._drop = drop or self._dropper
        self._made: dict[int, tuple[InodeT, FileNameT]] = {}
        self._root = root
        self._facts = facts
        self._ownership = ownership
        self._attributes = attributes or {}
        self._known: dict[int, _Known] = {pyfuse3.ROOT_INODE: _Known(root, 1)}
        self._numbers: weakref.WeakKeyDictionary[Node, int] = weakref.WeakKeyDictionary()
        self._numbers[root] = pyfuse3.ROOT_INODE
        self._next_inode = itertools.count(pyfuse3.ROOT_INODE + 1)
        self._next_handle = itertools.count(1)
        self._unsettled = itertools.cycle(range(1, _SHOWN_UNSETTLED))
        self._files: dict[int, _Opened] = {}
        self._open: dict[File, dict[int, _Opened]] = {}
        self._listings: dict[int, tuple[Directory, Sequence[str]]] = {}
        self._waiting: dict[trio.CancelScope, int] = {}
        self._opening: set[trio.CancelScope] = set()
        self._somebody_waits = trio.Event()
        self.answering = trio.Event()
        """Set once the kernel has begun to talk to us."""

    def init(self) -> None:
        self.answering.set()

    async def drop_names(self) -> None:
        """Have the kernel let go of names that were made; runs as long as the mount."""
        await self._dropper.run()

    async def watch_callers(self) -> None:
        """End what processes wait for that were killed meanwhile; runs as long as the mount.

        pyfuse3 does not pass the kernel's FUSE_INTERRUPT on, and without an answer the kernel
        lets nobody go: ^C on a `cat` would wait for the check to end, and on an `echo` for the
        repair.
        """
        while True:
            if not self._waiting:
                self._somebody_waits = trio.Event()
                await self._somebody_waits.wait()
            await trio.sleep(INTERRUPT_POLL_SECONDS)
            for scope, pid in self._waiting.items():
                if is_interrupted(pid):
                    scope.cancel()

    # ---- inodes and attributes ----

    def _node(self, inode: int) -> Node:
        known = self._known.get(inode)
        if known is None:
            raise FUSEError(errno.ESTALE)
        return known.node

    def _directory(self, inode: int) -> Directory:
        node = self._node(inode)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        return node

    def _number(self, node: Node) -> int:
        """The inode number of *node*: the same for as long as the node lives."""
        number = self._numbers.get(node)
        if number is None:
            number = self._numbers[node] = next(self._next_inode)
        return number

    def _remember(self, node: Node) -> None:
        """Count a reference that the kernel now holds."""
        self._known.setdefault(self._number(node), _Known(node, 0)).lookups += 1

    def _remember_made(self, directory: Directory, name: FileNameT, node: Node) -> None:
        """The same of a name that was made when it was asked for: of these not too many.

        The kernel keeps them until it is short of memory itself, and anybody may ask for another
        and another: it is told to let go of those that were asked for longest ago.
        """
        self._remember(node)
        number = self._number(node)
        self._made.pop(number, None)
        self._made[number] = InodeT(self._number(directory)), name
        if len(self._made) > KEPT_NAMES:
            for oldest in list(itertools.islice(self._made, _DROPPED_TOGETHER)):
                self._drop(*self._made.pop(oldest))

    def _size(self, file: File, pid: int) -> int:
        """Of *file* as *pid* sees it: as long as what it has opened, whatever is true by now.

        By which of several handles somebody asks the kernel does not say: it is taken for the one
        that he opened last, or anybody did.
        """
        handles = self._open.get(file)
        if not handles:
            return file.size()
        latest_first = list(reversed(handles.values()))
        own = (opened for opened in latest_first if opened.pid == pid)
        return next(own, latest_first[0]).handle.size()

    def _attributes_of(
        self,
        node: Node,
        pid: int = 0,
        *,
        within: Directory | None = None,
        facts: Facts | None = None,
    ) -> EntryAttributes:
        """*within*: the directory that *node* was looked up in."""
        facts = facts or self._facts()
        entry = EntryAttributes()
        entry.st_ino = self._number(node)
        entry.attr_timeout = _attr_timeout(node)
        if within is not None:
            is_fixed = within.is_fixed and not isinstance(node, FixedFile)
            entry.entry_timeout = _ENTRY_TIMEOUT if is_fixed else within.name_seconds
            if isinstance(node, Directory):
                entry.attr_timeout = within.name_seconds
        entry.st_mode = self._ownership.mode(node)
        entry.st_uid, entry.st_gid = self._ownership.uid, self._ownership.gid
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = facts.mtime_ns
        entry.st_blksize = BLOCK_SIZE
        if isinstance(node, DataFile) and not facts.is_settled:
            # Or the kernel would keep, for whoever has it open, what may no longer be true.
            entry.st_mtime_ns += next(self._unsettled)
        if isinstance(node, Directory):
            entry.st_nlink = 2 + node.subdirectories
        else:
            entry.st_size = self._size(node, pid)
            allocated = node.allocated()
            entry.st_blocks = -(-(entry.st_size if allocated is None else allocated) // 512)
        return entry

    @_guarded
    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        directory = self._directory(parent_inode)
        child = await directory.child(os.fsdecode(name))
        if child is None:
            raise FUSEError(errno.ENOENT if len(name) <= _NAME_MAX else errno.ENAMETOOLONG)
        is_known = await _learn_size_soon(child)
        entry = self._attributes_of(child, ctx.pid, within=directory)
        if not is_known:
            entry.attr_timeout = _ATTR_TIMEOUT
        if directory.is_fixed:
            self._remember(child)
        else:
            self._remember_made(directory, name, child)
        return entry

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            known = self._known.get(inode)
            if known is None or inode == pyfuse3.ROOT_INODE:
                continue
            known.lookups -= count
            if known.lookups <= 0:
                del self._known[inode]
                self._made.pop(inode, None)

    @_guarded
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        node = self._node(inode)
        await _learn_size(node)
        return self._attributes_of(node, ctx.pid)

    @_guarded
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        node = self._node(inode)
        # `echo > control` truncates first; there is nothing to cut, and nothing to complain about.
        only_size = fields.update_size and not (
            fields.update_mode or fields.update_uid or fields.update_gid
        )
        if not (isinstance(node, ControlFile) and only_size):
            raise _read_only()
        if not self._ownership.may_open(node, ctx.uid):
            raise FUSEError(errno.EACCES)
        return self._attributes_of(node, ctx.pid)

    @_guarded
    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        node = self._node(inode)
        if mode & os.W_OK and not isinstance(node, ControlFile):
            raise _read_only()
        if mode & os.X_OK and not isinstance(node, Directory):
            return False
        return self._ownership.may_open(node, ctx.uid)

    @_guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        statistics = StatvfsData()
        statistics.f_bsize = statistics.f_frsize = BLOCK_SIZE
        # As of a squashfs: as large as what it shows, and full.
        statistics.f_blocks = -(-self._facts().size // BLOCK_SIZE)
        statistics.f_files = _count(self._root)
        statistics.f_namemax = _NAME_MAX
        return statistics

    # ---- directories ----

    @_guarded
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        directory = self._directory(inode)
        with self._interruptible(ctx.pid):
            names = await directory.names()
            number = next(self._next_handle)
            self._listings[number] = directory, names
            return number
        raise FUSEError(errno.EINTR)

    @_guarded
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        directory, names = self._listings[fh]
        facts = self._facts()
        node: Node
        for position in range(start_id, len(names) + len(_DOTS)):
            if position < len(_DOTS):
                # Of `..` the kernel knows the node, and takes only the name from here.
                name, node = _DOTS[position], (directory, self._root)[position]
            else:
                name = names[position - len(_DOTS)]
                child = await directory.listed_child(name)
                if child is None:  # gone since it was listed
                    continue
                node = child
            is_known = await _learn_size_soon(node)
            entry = self._attributes_of(node, within=directory, facts=facts)
            if not is_known:
                entry.attr_timeout = _ATTR_TIMEOUT
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position + 1):
                return
            if position < len(_DOTS):
                continue
            if directory.is_fixed:
                self._remember(node)
            else:
                self._remember_made(directory, FileNameT(os.fsencode(name)), node)

    @_guarded
    async def releasedir(self, fh: FileHandleT) -> None:
        del self._listings[fh]

    # ---- files ----

    @_guarded
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        node = self._node(inode)
        if isinstance(node, Directory):
            raise FUSEError(errno.EISDIR)
        if not self._ownership.may_open(node, ctx.uid):
            raise FUSEError(errno.EACCES)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            if not isinstance(node, ControlFile):
                raise _read_only()
            node.begin_writing()
        # Also with O_NONBLOCK, which `tar` opens files with, and reads all of them.
        handle = node.opened() or await self._open_for(ctx.pid, node)
        number = next(self._next_handle)
        opened = _Opened(node, handle, ctx.pid)
        self._files[number] = self._open.setdefault(node, {})[number] = opened
        if isinstance(node, DataFile):
            return FileInfo(fh=number, direct_io=False, keep_cache=node.may_keep_cache())
        if isinstance(node, FixedFile):
            return FileInfo(fh=number, direct_io=False, keep_cache=True)
        # Past the page cache, which all handles share: each shows what it was opened with.
        return FileInfo(fh=number, direct_io=True, keep_cache=False)

    async def _open_for(self, pid: int, node: File) -> Handle:
        with self._interruptible(pid) as scope:
            self._opening.add(scope)
            try:
                return await node.open()
            finally:
                self._opening.discard(scope)
        raise FUSEError(errno.ECANCELED)

    def cancel_opening(self) -> None:
        """End what is made for those who are opening a file; they get ECANCELED."""
        for scope in self._opening:
            scope.cancel()

    @_guarded
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        opened = self._files[fh]
        content = opened.handle.ready(off, size)
        if content is not None:
            return cast("bytes", content)
        with self._interruptible(opened.pid):
            # Any buffer will do for pyfuse3, whatever it declares.
            return cast("bytes", await opened.handle.read(off, size))
        raise FUSEError(errno.EINTR)

    @_guarded
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        opened = self._files[fh]
        if not isinstance(opened.handle, ControlHandle):
            raise _read_only()
        with self._interruptible(opened.pid):
            await opened.handle.write(buf)
            return len(buf)
        raise FUSEError(errno.EINTR)

    @contextlib.contextmanager
    def _interruptible(self, pid: int) -> Iterator[trio.CancelScope]:
        """What is done for the process *pid*, and ends early should that be killed."""
        with trio.CancelScope() as scope:
            self._waiting[scope] = pid
            self._somebody_waits.set()
            try:
                yield scope
            finally:
                del self._waiting[scope]

    @_guarded
    async def flush(self, fh: FileHandleT) -> None:
        """Nothing is held back: `write` has said all there was to say. The kernel asks no more."""
        raise FUSEError(errno.ENOSYS)

    @_guarded
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """As `flush`."""

    @_guarded
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """As `flush`."""

    @_guarded
    async def release(self, fh: FileHandleT) -> None:
        node = self._files.pop(fh).node
        del self._open[node][fh]
        if not self._open[node]:
            del self._open[node]

    # ---- extended attributes ----

    @_guarded
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """Those of the root. Who asks for any other learns that there are none, and for good: the
        kernel asks no more then. `ls -l` asks for three of each file (of Linux 6.18, ls 9.1).
        """
        if inode == pyfuse3.ROOT_INODE and name in self._attributes:
            return self._attributes[name]
        raise FUSEError(errno.ENOSYS)

    @_guarded
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        return []

    # ---- what a read-only filesystem refuses ----

    async def _refused(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Whatever would change the tree."""
        raise _read_only()

    setxattr = removexattr = _refused
    create = mknod = mkdir = symlink = link = rename = unlink = rmdir = _refused


def _attr_timeout(node: Node) -> float:
    if isinstance(node, DataFile):
        return _DATA_ATTR_TIMEOUT
    return _FIXED_ATTR_TIMEOUT if isinstance(node, FixedFile) else _ATTR_TIMEOUT


def _read_only() -> FUSEError:
    return FUSEError(errno.EROFS)


def _count(node: Node) -> int:
    """Nodes in the tree that are always there, *node* included."""
    children = node.children.values() if isinstance(node, FixedDirectory) else ()
    return 1 + sum(map(_count, children))


async def _learn_size_soon(node: Node) -> bool:
    """Whether it is known. Who looks into a directory holds up all others who do, in the kernel: a
    disk that does not answer is waited for when the attributes are asked for, and by one alone.
    """
    if not isinstance(node, DataFile):  # what others show takes no look at a disk
        return True
    with trio.move_on_after(_SOON_SECONDS):
        await _learn_size(node)
        return True
    return False


async def _learn_size(node: Node) -> None:
    if isinstance(node, DataFile):
        await node.learn_size()
