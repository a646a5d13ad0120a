"""instarfs.mount.operations, on a tree of ten lines and without a kernel."""

import errno
import logging
import os
import stat
from collections.abc import Awaitable
from itertools import pairwise
from typing import Any

import pyfuse3
import pytest
import trio
from pyfuse3 import EntryAttributes, FileNameT, FUSEError, InodeT

from instarfs.errors import ImageReadFailed, RepairCancelled, RepairNotOffered, RepairRunning
from instarfs.inspect.shared_value import Edition
from instarfs.mount import operations as module
from instarfs.mount.nodes import (
    BriefContent,
    ControlFile,
    DataFile,
    DeferredDirectory,
    Directory,
    FixedDirectory,
    GeneratedFile,
    LiveFile,
    MadeDirectory,
    Node,
)
from instarfs.mount.operations import Facts, Operations, Ownership
from tests.instarfs.mount.kernel import caller, fields

ROOT = pyfuse3.ROOT_INODE
DEADLINE = 10


class Value:
    """What a generated file shows: raises, or waits, where a test says so."""

    def __init__(self, error: BaseException | None = None, *, waits: bool = False) -> None:
        self.error = error
        self.waits = waits
        self.edition = Edition(b"content")

    def peek(self) -> Edition[bytes] | None:
        return None

    async def get(self) -> Edition[bytes]:
        if self.waits:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error
        return self.edition


async def refuse(command: bytes) -> None:
    raise RepairNotOffered


def make_tree(value: Value) -> Directory:
    return FixedDirectory(
        {
            "README.txt": LiveFile(lambda: b"read me\n"),
            "check": FixedDirectory({"leaks": GeneratedFile(value, bytes)}),
            "repair": FixedDirectory({"tier": ControlFile(lambda: b"[none]\n", refuse)}),
        }
    )


def make_operations(value: Value | None = None, *, for_others: bool = False) -> Operations:
    return Operations(
        make_tree(value or Value()),
        lambda: Facts(size=10_000, mtime_ns=1_234_567_890_123_456_789),
        Ownership(uid=1000, gid=100, for_others=for_others),
        {b"user.instarfs.daemon": b"1 2"},
    )


async def walk(operations: Operations, path: str) -> EntryAttributes:
    entry = await operations.getattr(ROOT, caller())
    for name in path.split("/"):
        entry = await operations.lookup(entry.st_ino, name.encode(), caller())
    return entry


async def open_file(operations: Operations, path: str, flags: int = os.O_RDONLY) -> int:
    inode = (await walk(operations, path)).st_ino
    info = await operations.open(inode, flags, caller())
    assert info.direct_io
    return info.fh


async def errno_of(answer: Awaitable[object]) -> int:
    with pytest.raises(FUSEError) as caught:
        await answer
    return caught.value.errno


# ---- attributes ----


async def test_attributes_of_the_owners_mount() -> None:
    operations = make_operations()
    root = await operations.getattr(ROOT, caller())
    assert (root.st_mode, root.st_nlink) == (stat.S_IFDIR | 0o700, 4)
    assert (root.st_uid, root.st_gid) == (1000, 100)
    assert root.st_mtime_ns == root.st_ctime_ns == 1_234_567_890_123_456_789
    assert root.attr_timeout == 0
    assert (await walk(operations, "check")).st_nlink == 2
    assert (await walk(operations, "check/leaks")).st_mode == stat.S_IFREG | 0o600
    tier = await walk(operations, "repair/tier")
    assert (tier.st_mode, tier.st_size, tier.st_blocks) == (stat.S_IFREG | 0o600, 7, 1)


async def test_attributes_of_a_mount_for_others() -> None:
    operations = make_operations(for_others=True)
    assert (await walk(operations, "check")).st_mode == stat.S_IFDIR | 0o755
    assert (await walk(operations, "check/leaks")).st_mode == stat.S_IFREG | 0o644
    assert (await walk(operations, "repair/tier")).st_mode == stat.S_IFREG | 0o600


async def test_a_node_keeps_its_inode_number_also_after_it_was_forgotten() -> None:
    operations = make_operations()
    first = (await walk(operations, "check/leaks")).st_ino
    again = (await walk(operations, "check/leaks")).st_ino
    assert first == again
    assert first not in (ROOT, (await walk(operations, "check")).st_ino)
    await operations.forget([(first, 1)])
    await operations.getattr(first, caller())
    await operations.forget([(first, 1)])
    assert await errno_of(operations.getattr(first, caller())) == errno.ESTALE
    assert (await walk(operations, "check/leaks")).st_ino == first


async def test_forgetting_is_never_an_error() -> None:
    operations = make_operations()
    await operations.forget([(ROOT, 1), (4711, 3)])
    await operations.getattr(ROOT, caller())


async def test_what_is_not_there_and_what_is_no_directory() -> None:
    operations = make_operations()
    assert await errno_of(operations.lookup(ROOT, b"nothing", caller())) == errno.ENOENT
    assert await errno_of(operations.lookup(ROOT, b"\xff", caller())) == errno.ENOENT
    longest, longer = b"x" * 255, b"x" * 256
    assert await errno_of(operations.lookup(ROOT, longest, caller())) == errno.ENOENT
    assert await errno_of(operations.lookup(ROOT, longer, caller())) == errno.ENAMETOOLONG
    readme = (await walk(operations, "README.txt")).st_ino
    assert await errno_of(operations.lookup(readme, b"x", caller())) == errno.ENOTDIR
    assert await errno_of(operations.opendir(readme, caller())) == errno.ENOTDIR
    assert await errno_of(operations.open(ROOT, os.O_RDONLY, caller())) == errno.EISDIR


async def test_the_filesystem_is_as_large_as_its_image_and_full() -> None:
    statistics = await make_operations().statfs(caller())
    assert (statistics.f_frsize, statistics.f_blocks, statistics.f_bfree) == (4096, 3, 0)
    assert (statistics.f_files, statistics.f_ffree) == (6, 0)


@pytest.mark.parametrize("is_settled", [True, False])
async def test_the_kernel_keeps_nothing_whose_time_says_nothing(is_settled: bool) -> None:
    async def read(offset: int, size: int) -> bytes:
        return b""

    files = {"disk.raw": DataFile(lambda: 0, read, lambda: 0), "README.txt": LiveFile(lambda: b"")}
    facts = Facts(0, 10**18, is_settled=is_settled)
    operations = Operations(FixedDirectory(files), lambda: facts, Ownership(1000, 100))

    async def times(name: str) -> list[int]:
        return [(await walk(operations, name)).st_mtime_ns for _ in range(3000)]

    assert set(await times("README.txt")) == {10**18}
    shown = await times("disk.raw")
    if is_settled:
        assert set(shown) == {10**18}
    else:
        assert all(one != other for one, other in pairwise(shown))
        assert 10**18 not in shown
        assert {time // 10**9 for time in shown} == {10**9}


# ---- directories ----


async def list_directory(
    operations: Operations, inode: int, monkeypatch: pytest.MonkeyPatch, room: int
) -> list[tuple[bytes, int]]:
    """All entries and their inodes, *room* entries a reply."""
    found: list[tuple[bytes, int]] = []
    replies: list[tuple[bytes, EntryAttributes, int]] = []

    def reply(token: object, name: bytes, entry: EntryAttributes, next_id: int) -> bool:
        if len(replies) == room:
            return False
        replies.append((name, entry, next_id))
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    token: Any = None
    handle = await operations.opendir(inode, caller())
    start = 0
    while True:
        replies.clear()
        await operations.readdir(handle, start, token)
        if not replies:
            break
        found += [(name, entry.st_ino) for name, entry, _ in replies]
        start = replies[-1][2]
    await operations.releasedir(handle)
    return found


@pytest.mark.parametrize("room", [1, 2, 100])
async def test_a_listing_is_whole_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    operations = make_operations()
    names = [name for name, _ in await list_directory(operations, ROOT, monkeypatch, room)]
    assert names == [b".", b"..", b"README.txt", b"check", b"repair"]


async def test_a_listing_is_a_lookup_of_each_name_but_the_dots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operations = make_operations()
    listed = dict(await list_directory(operations, ROOT, monkeypatch, 2))
    assert listed[b"."] == ROOT
    check = listed[b"check"]
    assert (await walk(operations, "check")).st_ino == check
    await operations.forget([(check, 1)])
    await operations.getattr(check, caller())
    await operations.forget([(check, 1)])
    assert await errno_of(operations.getattr(check, caller())) == errno.ESTALE


# ---- files ----


async def test_reading() -> None:
    operations = make_operations()
    handle = await open_file(operations, "check/leaks")
    assert (await walk(operations, "check/leaks")).st_size == 7
    assert await operations.read(handle, 3, 100) == b"tent"
    assert await errno_of(operations.flush(handle)) == errno.ENOSYS  # asked once, and no more
    await operations.fsync(handle, datasync=False)
    await operations.release(handle)
    assert await errno_of(operations.read(handle, 0, 1)) == errno.EIO
    # This value is good for nobody but those who have it open, as of an image that is written to.
    assert (await walk(operations, "check/leaks")).st_size == 0


async def test_the_size_of_a_file_is_that_of_what_one_has_opened() -> None:
    content = [b"1"]
    root = FixedDirectory({"progress": LiveFile(lambda: content[0])})
    operations = Operations(root, lambda: Facts(0, 0), Ownership(1000, 100))
    inode = (await walk(operations, "progress")).st_ino

    async def open_as(pid: int) -> int:
        return (await operations.open(inode, os.O_RDONLY | os.O_NONBLOCK, caller(pid=pid))).fh

    async def size_as(pid: int) -> int:
        return (await operations.getattr(inode, caller(pid=pid))).st_size

    first = await open_as(1)
    content[0] = b"22"
    second = await open_as(2)
    content[0] = b"333"
    third = await open_as(2)
    content[0] = b"4444"
    assert [await size_as(pid) for pid in (1, 2, 3)] == [1, 3, 3]
    await operations.release(third)
    assert [await size_as(pid) for pid in (1, 2, 3)] == [1, 2, 2]
    await operations.release(second)
    await operations.release(first)
    assert [await size_as(pid) for pid in (1, 2, 3)] == [4, 4, 4]
    assert not operations._open


async def test_many_handles_and_none_left_behind() -> None:
    operations = make_operations()
    handles = [await open_file(operations, "check/leaks") for _ in range(1000)]
    assert len(set(handles)) == 1000
    for handle in handles:
        assert await operations.read(handle, 0, 3) == b"con"
    for handle in handles:
        await operations.release(handle)
    assert not operations._files
    assert not operations._open
    assert not operations._waiting


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_TRUNC, os.O_WRONLY | os.O_APPEND])
async def test_only_control_files_are_opened_for_writing(flags: int) -> None:
    operations = make_operations()
    for path in ("README.txt", "check/leaks"):
        assert await errno_of(open_file(operations, path, flags)) == errno.EROFS
    await open_file(operations, "repair/tier", flags)


async def test_what_a_control_file_refuses_comes_from_write() -> None:
    operations = make_operations()
    handle = await open_file(operations, "repair/tier", os.O_WRONLY | os.O_TRUNC)
    assert await errno_of(operations.write(handle, 0, b"leaks\n")) == errno.EROFS
    assert await errno_of(operations.flush(handle)) == errno.ENOSYS  # asked once, and no more
    await operations.release(handle)


async def test_what_a_control_file_takes_it_takes_whole() -> None:
    commands: list[bytes] = []

    async def act(command: bytes) -> None:
        commands.append(command)

    root = FixedDirectory({"tier": ControlFile(lambda: b"", act)})
    operations = Operations(root, lambda: Facts(0, 0), Ownership(1000, 100))
    handle = await open_file(operations, "tier", os.O_WRONLY)
    assert await operations.write(handle, 0, b"leaks 3f9a2c\n") == 13
    assert commands == [b"leaks 3f9a2c\n"]


async def test_who_opens_a_control_file_to_write_may_be_told_no_at_once() -> None:
    def refuse_to_begin() -> None:
        raise RepairRunning("image")

    root = FixedDirectory({"tier": ControlFile(lambda: b"busy\n", refuse, refuse_to_begin)})
    operations = Operations(root, lambda: Facts(0, 0), Ownership(1000, 100))
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert await errno_of(open_file(operations, "tier", flags)) == errno.EBUSY
    assert not operations._files
    handle = await open_file(operations, "tier", os.O_RDONLY)
    assert await operations.read(handle, 0, 100) == b"busy\n"


async def test_others_keep_out_of_control_files() -> None:
    operations = make_operations(for_others=True)
    tier = (await walk(operations, "repair/tier")).st_ino
    leaks = (await walk(operations, "check/leaks")).st_ino
    for flags in (os.O_RDONLY, os.O_WRONLY):
        assert await errno_of(operations.open(tier, flags, caller(uid=1001))) == errno.EACCES
        await operations.open(tier, flags, caller(uid=1000))
        await operations.open(tier, flags, caller(uid=0))
    await operations.open(leaks, os.O_RDONLY, caller(uid=1001))
    assert not await operations.access(tier, os.R_OK, caller(uid=1001))
    assert await operations.access(tier, os.R_OK | os.W_OK, caller(uid=1000))
    assert await operations.access(leaks, os.R_OK, caller(uid=1001))
    assert not await operations.access(leaks, os.X_OK, caller())
    assert await operations.access(ROOT, os.R_OK | os.X_OK, caller())
    assert await errno_of(operations.access(leaks, os.W_OK, caller())) == errno.EROFS


async def test_truncating_means_nothing_to_a_control_file_and_is_refused_elsewhere() -> None:
    operations = make_operations()
    tier = (await walk(operations, "repair/tier")).st_ino
    new = EntryAttributes()

    async def set_attributes(inode: int, *names: str, uid: int = 1000) -> EntryAttributes:
        return await operations.setattr(inode, new, fields(*names), None, caller(uid=uid))

    assert (await set_attributes(tier, "update_size")).st_size == 7
    assert await errno_of(set_attributes(tier, "update_size", uid=1001)) == errno.EACCES
    assert await errno_of(set_attributes(tier, "update_mode")) == errno.EROFS
    assert await errno_of(set_attributes(tier, "update_size", "update_mode")) == errno.EROFS
    assert await errno_of(set_attributes(ROOT, "update_uid")) == errno.EROFS
    readme = (await walk(operations, "README.txt")).st_ino
    assert await errno_of(set_attributes(readme, "update_size")) == errno.EROFS


CHANGES: dict[str, tuple[object, ...]] = {
    "create": (ROOT, b"x", 0o600, os.O_RDWR),
    "mknod": (ROOT, b"x", 0o600, 0),
    "mkdir": (ROOT, b"x", 0o700),
    "symlink": (ROOT, b"x", b"y"),
    "link": (ROOT, ROOT, b"x"),
    "rename": (ROOT, b"check", ROOT, b"x", 0),
    "unlink": (ROOT, b"README.txt"),
    "rmdir": (ROOT, b"check"),
    "setxattr": (ROOT, b"user.x", b"y"),
    "removexattr": (ROOT, b"user.x"),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_every_change_is_refused_as_by_a_read_only_filesystem(change: str) -> None:
    handler = getattr(make_operations(), change)
    assert await errno_of(handler(*CHANGES[change], caller())) == errno.EROFS


async def test_extended_attributes_are_found_but_not_listed() -> None:
    operations = make_operations()
    assert await operations.getxattr(ROOT, b"user.instarfs.daemon", caller()) == b"1 2"
    assert await operations.listxattr(ROOT, caller()) == []
    for name in (b"security.capability", b"system.posix_acl_access"):
        assert await errno_of(operations.getxattr(ROOT, name, caller())) == errno.ENOSYS
    readme = (await walk(operations, "README.txt")).st_ino
    answer = operations.getxattr(readme, b"user.instarfs.daemon", caller())
    assert await errno_of(answer) == errno.ENOSYS


# ---- the guard ----


async def read_of(value: Value) -> bytes:
    operations = make_operations(value)
    return await operations.read(await open_file(operations, "check/leaks"), 0, 100)


async def test_a_domain_error_is_its_errno(caplog: pytest.LogCaptureFixture) -> None:
    error = ImageReadFailed("image", 0, "Input/output error")
    assert await errno_of(read_of(Value(error))) == errno.EIO
    assert not caplog.records


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("bug"), OSError(errno.ENOSPC, "x"), KeyError()]
)
async def test_anything_else_is_logged_and_eio(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    assert await errno_of(read_of(Value(error))) == errno.EIO
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.exc_info[1] is error


async def test_cancellation_passes_through() -> None:
    with trio.move_on_after(0) as scope:
        await read_of(Value(waits=True))
    assert scope.cancelled_caught


def test_every_handler_that_may_raise_is_guarded() -> None:
    refused = Operations._refused
    for name, handler in vars(Operations).items():
        if name in vars(pyfuse3.Operations) and not name.startswith("__") and callable(handler):
            guarded = hasattr(handler, "__wrapped__")
            assert guarded or handler is refused or name in ("forget", "init"), name


# ---- interrupted readers and writers ----


async def test_the_opening_of_a_file_ends_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERRUPT_POLL_SECONDS", 0.001)
    killed: set[int] = set()
    monkeypatch.setattr(module, "is_interrupted", killed.__contains__)
    operations = make_operations(Value(waits=True))
    inode = (await walk(operations, "check/leaks")).st_ino
    ended: list[int] = []

    async def open_as(pid: int) -> None:
        opening = operations.open(inode, os.O_RDONLY, caller(pid=pid))
        assert await errno_of(opening) == errno.ECANCELED
        ended.append(pid)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as watchers, trio.open_nursery() as readers:
            watchers.start_soon(operations.watch_callers)
            for pid in (1, 2):
                readers.start_soon(open_as, pid)
            for pid in (2, 1):
                killed.add(pid)
                while pid not in ended:
                    await trio.sleep(0.001)
            watchers.cancel_scope.cancel()
    assert ended == [2, 1]
    assert not operations._files
    assert not operations._waiting


async def test_opening_can_be_cancelled_for_all() -> None:
    operations = make_operations(Value(waits=True))
    inode = (await walk(operations, "check/leaks")).st_ino

    async def cancelled() -> None:
        opening = operations.open(inode, os.O_RDONLY, caller())
        assert await errno_of(opening) == errno.ECANCELED

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(cancelled)
            while len(operations._opening) < 3:
                await trio.sleep(0)
            operations.cancel_opening()
    assert not operations._opening
    assert not operations._files


async def test_the_write_of_a_killed_process_is_cancelled_and_answered_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "INTERRUPT_POLL_SECONDS", 0.001)
    killed: set[int] = set()
    monkeypatch.setattr(module, "is_interrupted", killed.__contains__)

    async def act(command: bytes) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            # As a repair, which is rolled back, and says so itself.
            if command == b"explain":
                raise RepairCancelled("image") from None
            raise

    root = FixedDirectory({"tier": ControlFile(lambda: b"", act)})
    operations = Operations(root, lambda: Facts(0, 0), Ownership(1000, 100))
    inode = (await walk(operations, "tier")).st_ino
    ended: list[bytes] = []

    async def write_as(pid: int, command: bytes, expected: int) -> None:
        info = await operations.open(inode, os.O_WRONLY, caller(pid=pid))
        assert await errno_of(operations.write(info.fh, 0, command)) == expected
        ended.append(command)

    with trio.fail_after(DEADLINE):
        async with trio.open_nursery() as watchers, trio.open_nursery() as writers:
            watchers.start_soon(operations.watch_callers)
            writers.start_soon(write_as, 1, b"silent", errno.EINTR)
            writers.start_soon(write_as, 2, b"explain", errno.ECANCELED)
            for pid, count in ((2, 1), (1, 2)):
                killed.add(pid)
                while len(ended) < count:
                    await trio.sleep(0.001)
            watchers.cancel_scope.cancel()
    assert ended == [b"explain", b"silent"]
    assert not operations._waiting


async def test_of_names_that_are_made_the_kernel_is_to_hold_no_more_than_so_many() -> None:
    names = [str(number) for number in range(module.KEPT_NAMES + 300)]
    dropped: list[bytes] = []

    async def make(name: str) -> Node:
        return LiveFile(name.encode)

    operations = Operations(
        MadeDirectory(make),
        lambda: Facts(size=1, mtime_ns=1),
        Ownership(uid=1000, gid=100, for_others=True),
        drop=lambda _directory, name: dropped.append(name),
    )
    # Once more what was asked for first: it is not what is let go of.
    for name in [*names[: module.KEPT_NAMES], names[0], *names[module.KEPT_NAMES :]]:
        entry = await operations.lookup(ROOT, name.encode(), caller())
        if name in {"7", "9"}:
            await operations.forget([(entry.st_ino, 1)])
    oldest_first = [name.encode() for name in names[1:] if name not in {"7", "9"}]
    assert dropped == oldest_first[: len(dropped)]
    assert module.KEPT_NAMES // 2 < len(names) - 2 - len(dropped) <= module.KEPT_NAMES


async def test_of_a_fixed_file_the_kernel_keeps_what_it_was_told_and_has_read() -> None:
    """Of tens of thousands of them each question less counts; its name is asked for again."""
    value = Value()
    value.peek = lambda: value.edition  # type: ignore[method-assign]
    content = BriefContent(value, bytes)
    operations = Operations(
        DeferredDirectory(lambda _: {"info": lambda: content}, 1, name_seconds=1.5),
        lambda: Facts(size=1, mtime_ns=1),
        Ownership(uid=1000, gid=100),
    )
    entry = await operations.lookup(ROOT, b"info", caller())
    assert (entry.st_size, entry.entry_timeout) == (7, 1.5)
    assert entry.attr_timeout > 0
    assert (await operations.getattr(entry.st_ino, caller())).attr_timeout > 0
    info = await operations.open(entry.st_ino, os.O_RDONLY, caller())
    assert not info.direct_io
    assert info.keep_cache
    assert await operations.read(info.fh, 0, 4096) == b"content"
    assert await errno_of(operations.open(entry.st_ino, os.O_RDWR, caller())) == errno.EROFS
    # Whoever opens it by its name is led to the next one by the kernel, which asks anew then.
    value.edition = Edition(b"another one")
    assert await errno_of(operations.open(entry.st_ino, os.O_RDONLY, caller())) == errno.ESTALE
    another = await operations.lookup(ROOT, b"info", caller())
    assert another.st_ino != entry.st_ino
    assert another.st_size == 11
    assert await operations.read(info.fh, 0, 4096) == b"content"


@pytest.mark.parametrize("seconds", [0.0, 1.5])
async def test_the_kernel_asks_again_what_a_made_name_stands_for_when_it_is_told_to(
    seconds: float,
) -> None:
    folder, file = FixedDirectory({}), LiveFile(lambda: b"x")

    async def make(name: str) -> Node:
        return folder if name == "folder" else file

    operations = Operations(
        MadeDirectory(make, name_seconds=seconds),
        lambda: Facts(size=1, mtime_ns=1),
        Ownership(uid=1000, gid=100),
    )
    of_folder = await operations.lookup(ROOT, b"folder", caller())
    of_file = await operations.lookup(ROOT, b"file", caller())
    assert of_folder.entry_timeout == of_folder.attr_timeout == of_file.entry_timeout == seconds
    assert of_file.attr_timeout == 0


async def test_names_that_there_was_no_thread_to_drop_are_dropped_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[bytes] = []
    monkeypatch.setattr(pyfuse3, "invalidate_entry", lambda _, name: dropped.append(name))
    dropper, asked, run_sync = module._Dropper(), trio.Event(), trio.to_thread.run_sync

    async def refuse(*_: object, **__: object) -> None:
        asked.set()
        raise RuntimeError("can't start new thread")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(dropper.run)
        with monkeypatch.context() as patch:
            patch.setattr(trio.to_thread, "run_sync", refuse)
            dropper(ROOT, FileNameT(b"one"))
            await asked.wait()
        assert trio.to_thread.run_sync is run_sync
        dropper(ROOT, FileNameT(b"two"))
        while len(dropped) < 2:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert dropped == [b"one", b"two"]


async def test_no_name_is_dropped_once_there_is_no_mount_to_drop_it_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[bytes] = []

    def invalidate(_directory: InodeT, name: FileNameT) -> None:
        dropped.append(name)
        if name == b"unknown":
            raise FileNotFoundError

    monkeypatch.setattr(pyfuse3, "invalidate_entry", invalidate)
    dropper = module._Dropper()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dropper.run)
        for name in (b"unknown", b"one"):
            dropper(ROOT, name)
        while len(dropped) < 2:
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    dropper(ROOT, b"two")
    await trio.to_thread.run_sync(dropper._drop_all)
    assert dropped == [b"unknown", b"one"]
