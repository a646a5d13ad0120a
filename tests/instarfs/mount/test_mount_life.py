"""A mount's life, in any order and without a kernel: looked up and forgotten, listed, opened, read
at any offset, commanded, by its owner and by others, while the image beneath it is another.

A hypothesis state machine over the real tree of a small damaged image. Its model knows which errno
each call may end with, that a handle shows one moment, what a command makes of the image, and that
nothing is left behind once all is released and forgotten. `--cases 6000`: 400 lives.
"""

import errno
import gc
import itertools
import json
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pyfuse3
import trio
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pyfuse3 import EntryAttributes, FUSEError

from instarfs.errors import DOMAIN_ERRORS
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.inspect.inspector import Inspector
from instarfs.inspect.shared_value import room_for_values
from instarfs.mount import tree
from instarfs.mount.nodes import Directory, FixedDirectory
from instarfs.mount.operations import Operations, Ownership
from instarfs.render.check import counters_value
from instarfs.repair.run import Repairer
from planner.errors import PlannerError
from planner.repair.overlay import Overlay
from planner.repair.plan import RepairTier
from planner.source import Bytes, read_bytes
from tests.cached import cached_check, cached_propose, check_bytes, propose_bytes
from tests.fuzz.mutations import mutate_words
from tests.images.damage import DAMAGES
from tests.instarfs.mount.kernel import caller, fields
from tests.lives import SHAPES, damaged, lives, made, open_below

T = TypeVar("T")

CASES_A_LIFE = 15
DEADLINE = 60

OWNER, OTHER = 1000, 1001
ROOT = pyfuse3.ROOT_INODE

CONTROLS = ("repair/tier", "repair/undo", "repair/trim")
CHECKED = (
    "check/result.json",
    "check/result.bin",
    "check/report.txt",
    "check/leaks",
    "check/corruptions",
    "check/refcounts",
    "check/findings.jsonl",
    "image/map.svg",
    "tables/clusters.tsv",
    "lost/triage.json",
    "repair/plan/leaks.json",
    "repair/plan/all.json",
)
"""What needs a check: once one of them is open, the image has been looked at."""

GENERATED = (
    *CHECKED,
    "image/info.json",
    "image/header.json",
    "image/chain.json",
    "image/map.json",
    "image/bitmaps.json",
    "tables/l1.tsv",
)
ALWAYS = (
    "README.txt",
    "disk.raw",
    "check/progress",
    "repair/result.json",
    "repair/progress",
    *CONTROLS,
    *GENERATED,
)
SOMETIMES = (
    "snapshots/0/info.json",
    "snapshots/0/disk.raw",
    "snapshots/1/disk.raw",
    "tables/l2/0.tsv",
    "tables/l2/1.tsv",
    "explain/host/0",
    "explain/host/0x200",
    "explain/guest/1024",
    "explain/guest/18446744073709551615",
    "lost/512",
)
DIRECTORIES = (
    "image",
    "tables",
    "tables/l2",
    "snapshots",
    "explain/host",
    "check",
    "lost",
    "repair",
)
NAMES = sorted({name for path in (*ALWAYS, *SOMETIMES) for name in path.split("/")})
ODD_NAMES = ("", ".", "..", "nothing", "00.tsv", "-1", "0x", "1" * 300, "\udcff", "a/b", "٣", "²")

ONE_MOMENT = (*GENERATED, "snapshots/0/info.json", "tables/l2/0.tsv", "tables/l2/1.tsv")
"""What a handle shows is one moment, whatever becomes of the image."""

GONE = {errno.EACCES, errno.ENOENT, errno.ESTALE}
"""What may be said of an image in whose place something else is, or nothing."""

DAMAGED = {errno.EIO, errno.EUCLEAN, errno.EMEDIUMTYPE, errno.EACCES, errno.ESTALE}
"""What may be said of bytes that cannot be found, for the part that was asked for."""

offsets = st.integers(0, 2000) | st.integers(0, 1 << 17) | st.sampled_from((1 << 40, (1 << 63) - 1))
sizes = st.sampled_from((0, 1, 80, 4096, 1 << 17, 1 << 20)) | st.integers(0, 5000)
seeds = st.integers(0, 1 << 16)
uids = st.sampled_from((OWNER, OWNER, OWNER, 0, OTHER))
paths = st.sampled_from(ALWAYS) | st.sampled_from(SOMETIMES) | st.sampled_from(CONTROLS)
commands = st.one_of(
    st.sampled_from([b"leaks\n", b"all\n", b"undo\n", b"trim\n", b"all", b" \tleaks\t\n"]),
    st.sampled_from([b"", b"\n", b"lea", b"ks\n", b"all\n\n", b"ALL\n", b"all 123\n", b"\xff\0"]),
    st.sampled_from([b"all" + b" " * 100_000, b"undo" * 50_000, b"leaks " + b"0" * 100_000]),
    st.binary(max_size=20),
)


class Loop:
    """A trio loop in a thread of its own, as the daemon has it."""

    def __init__(self) -> None:
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._wait,))
        self._thread.start()
        self._started.wait()

    async def _wait(self) -> None:
        self._end = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        async with room_for_values() as self.nursery:
            self._started.set()
            await self._end.wait()

    def run(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        async def bounded() -> T:
            with trio.fail_after(DEADLINE):
                return await function(*args)

        return trio.from_thread.run(bounded, trio_token=self._token)

    def close(self) -> None:
        trio.from_thread.run_sync(self._end.set, trio_token=self._token)
        self._thread.join()


class Unexpected(logging.Handler):
    """What the guard logs: an exception that has no errno of its own is a bug."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@dataclass
class Opened:
    """A file that is open, and has that many bytes. ``seen``: by offset, what it showed."""

    path: str
    size: int
    seen: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Listed:
    """A directory that is open, and the names that were seen at each place."""

    inode: int
    names: dict[int, bytes] = field(default_factory=dict)


def parsed(command: bytes, path: str) -> tuple[str, str] | None:
    """What a command asks for, and the plan that it quotes; None for no command."""
    word = path.removeprefix("repair/")
    words = re.split(rb"[ \t]+", command.removesuffix(b"\n").strip(b" \t"))
    if word != "tier":
        return (word, "") if words == [word.encode()] else None
    if words[0].decode(errors="replace") not in tuple(RepairTier) or len(words) > 2:
        return None
    quote = words[1] if len(words) == 2 else b""
    if quote and not re.fullmatch(rb"[0-9a-fA-F]{6,12}", quote):
        return None
    return words[0].decode(), quote.decode()


def repair_of(content: bytes, tier: str, quote: str) -> tuple[int, bytes]:
    """What a repair of an image ends with, and what it leaves there."""
    error = check_bytes(content).error
    if error is not None:
        return error.errno, content
    try:
        proposal = propose_bytes(content, RepairTier(tier))
    except PlannerError as refused:
        return refused.errno, content
    if quote and not proposal.plan.is_quoted_by(quote):
        return errno.ESTALE, content
    if proposal.needs_quote and not quote:
        return errno.EUCLEAN, content
    after = read_bytes(Overlay(Bytes(content), proposal.plan), 0, proposal.plan.size_after)
    return (0 if proposal.complete or quote else errno.EUCLEAN), after


@lru_cache(maxsize=64)
def guest_disk(content: bytes) -> tuple[bytes | int, ...]:
    """The guest's disk, sector by sector: its bytes, or why they cannot be read."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(content)
        with Image.open(str(path)) as image:
            try:
                disk = Guest(image, Follow()).find(Place(Part.DISK))
            except DOMAIN_ERRORS as error:
                return (error.errno,)
            return tuple(_sector(disk, at) for at in range(0, min(disk.size, 1 << 20), 512))


def _sector(disk: Any, at: int) -> bytes | int:
    try:
        return bytes(disk.read(at, 512))
    except DOMAIN_ERRORS as error:
        return error.errno


class MountLife(RuleBasedStateMachine):
    """``held``: how many references the kernel has to an inode. ``reviewed``: which of the files
    that were there has been checked. ``undoes_to``: what undo gives, one after the other,
    the last first, where the model knows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "disk.qcow2"
        self.loop = Loop()
        self.unexpected = Unexpected()
        logging.getLogger("instarfs").addHandler(self.unexpected)
        self.replies: list[tuple[bytes, int, int]] = []
        self.room = 0
        self.reply = mock.patch.object(pyfuse3, "readdir_reply", self.take_reply)
        self.reply.start()
        self.clock = itertools.count(10**18, 10**9)
        self.held: Counter[int] = Counter({ROOT: 1})
        self.paths: dict[int, str] = {ROOT: ""}
        self.files: dict[int, Opened] = {}
        self.listings: dict[int, Listed] = {}
        self.moments: dict[str, dict[int, bytes]] = {}
        self.file = self.reviewed = 0
        self.undoes_to: list[bytes] = []
        self.is_bottom_known = True

    def teardown(self) -> None:
        try:
            if hasattr(self, "operations"):
                self.leave()
        finally:
            self.loop.close()
            self.reply.stop()
            logging.getLogger("instarfs").removeHandler(self.unexpected)
            self.directory.cleanup()

    @initialize(
        shape=st.sampled_from(SHAPES),
        name=st.sampled_from(sorted(DAMAGES)),
        seed=seeds,
        for_others=st.booleans(),
        read_only=st.sampled_from((False, False, False, True)),
    )
    def begin(
        self, shape: Mapping[str, int], name: str, seed: int, for_others: bool, read_only: bool
    ) -> None:
        self.healthy = made(shape)
        self.put(damaged(self.healthy, name, seed))
        self.read_only = read_only
        self.loop.run(self.mount, for_others)

    async def mount(self, for_others: bool) -> None:
        repairer = partial(Repairer, check=cached_check, propose=cached_propose)
        self.inspector = Inspector(
            Image.open(str(self.path)),
            self.loop.nursery,
            check=cached_check,
            make_repairer=repairer,
        )
        self.root = tree.build_tree(self.inspector, read_only=self.read_only)
        self.operations = Operations(
            self.root,
            partial(tree.facts, self.inspector.subject),
            Ownership(OWNER, 100, for_others),
        )

    # ---- the image ----

    def read_image(self) -> bytes | None:
        return self.path.read_bytes() if self.path.is_file() else None

    def put(self, content: bytes) -> None:
        """As somebody else would, in place."""
        self.path.write_bytes(content)
        self.changed()

    def changed(self) -> None:
        moment = next(self.clock)
        os.utime(self.path, ns=(moment, moment))
        time.sleep(0.0015)  # for so long a reader believes that nothing has changed
        self.undoes_to, self.is_bottom_known = [], not self.undo_path.exists()
        self.moments.clear()

    @property
    def is_undo_known(self) -> bool:
        """Whether it is known what undo gives, or that it refuses."""
        return bool(self.undoes_to) or self.is_bottom_known

    @property
    def undo_path(self) -> Path:
        return self.path.with_name(self.path.name + SUFFIX)

    # ---- calls ----

    def call(self, handler: Callable[..., Awaitable[T]], *args: object) -> tuple[int, T | None]:
        """The errno, or 0 and what was answered. Never another exception."""
        try:
            answer: tuple[int, T | None] = 0, self.loop.run(handler, *args)
        except FUSEError as error:
            answer = error.errno, None
        assert not self.unexpected.records, self.unexpected.records[0].exc_info
        return answer

    def take_reply(self, _token: object, name: bytes, entry: EntryAttributes, next_id: int) -> bool:
        if len(self.replies) == self.room:
            return False
        self.replies.append((name, entry.st_ino, next_id))
        return True

    def hold(self, inode: int, parent: int, name: str) -> None:
        path = f"{self.paths[parent]}/{name}".removeprefix("/")
        assert self.paths.setdefault(inode, path) == path, "one inode, two files"
        self.held[inode] += 1

    def lookup_child(self, parent: int, name: str) -> tuple[int, int]:
        """The errno and the inode."""
        entry: EntryAttributes | None
        code, entry = self.call(self.operations.lookup, parent, os.fsencode(name), caller(OWNER))
        if entry is None:
            return code, 0
        self.hold(entry.st_ino, parent, name)
        assert entry.st_uid == OWNER
        return 0, entry.st_ino

    def walk(self, path: str) -> tuple[int, int]:
        code, inode = 0, ROOT
        for name in path.split("/"):
            if not code:
                code, inode = self.lookup_child(inode, name)
        is_there = path in (*ALWAYS, *DIRECTORIES)
        assert code in ({0} if is_there and self.path.is_file() else {0, errno.ENOENT, *GONE}), path
        assert not code or path not in ALWAYS, path
        return code, inode

    # ---- names and inodes ----

    @rule(path=paths | st.sampled_from(DIRECTORIES))
    def look_up(self, path: str) -> None:
        self.walk(path)

    @rule(number=seeds, name=st.sampled_from(NAMES) | st.sampled_from(ODD_NAMES) | st.text())
    def look_up_a_name(self, number: int, name: str) -> None:
        inodes = sorted(self.held)
        parent = inodes[number % len(inodes)]
        is_directory = self.paths[parent] not in (*ALWAYS, *SOMETIMES)
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            return  # no bytes, and so no name
        if not is_directory:
            name, expected = "x", {errno.ENOTDIR}
        else:
            expected = {0, errno.ENOENT} | (set() if self.path.is_file() else GONE)
        assert self.lookup_child(parent, name)[0] in expected

    @rule(number=seeds, count=st.integers(1, 3))
    def forget(self, number: int, count: int) -> None:
        inodes = sorted(set(self.held) - {ROOT})
        if not inodes:
            return
        inode = inodes[number % len(inodes)]
        count = min(count, self.held[inode])
        self.call(self.operations.forget, [(inode, count)])
        self.held[inode] -= count
        if not self.held[inode]:
            del self.held[inode]
        code, _ = self.call(self.operations.getattr, inode, caller())
        assert code == (0 if inode in self.held else errno.ESTALE)

    @rule(number=seeds, uid=uids)
    def ask_for_attributes(self, number: int, uid: int) -> None:
        inodes = sorted(self.held)
        inode = inodes[number % len(inodes)]
        is_control = self.paths[inode] in CONTROLS
        code, entry = self.call(self.operations.getattr, inode, caller(uid))
        assert (code, entry and entry.st_ino) == (0, inode)
        assert not is_control or (entry is not None and entry.st_mode & 0o077 == 0)
        code, may = self.call(self.operations.access, inode, os.R_OK, caller(uid))
        assert (code, may) == (0, not is_control or uid != OTHER)
        may_cut = is_control and uid != OTHER
        refusal = errno.EACCES if is_control else errno.EROFS
        size = fields("update_size")
        code, _ = self.call(self.operations.setattr, inode, entry, size, None, caller(uid))
        assert code == (0 if may_cut else refusal)
        assert self.call(self.operations.statfs, caller(uid))[0] == 0
        for refused in (self.operations.unlink, self.operations.mkdir, self.operations.create):
            assert self.call(refused, inode, b"x", caller(uid))[0] == errno.EROFS

    # ---- directories ----

    @rule(path=st.sampled_from(DIRECTORIES))
    def open_directory(self, path: str) -> None:
        code, inode = self.walk(path)
        if code:
            return
        code, handle = self.call(self.operations.opendir, inode, caller())
        assert code in ({0} if self.path.is_file() else {0, *GONE})
        if handle is not None:
            self.listings[handle] = Listed(inode)

    @precondition(lambda self: self.listings)
    @rule(number=seeds, start=st.integers(0, 30), room=st.integers(0, 12))
    def list_directory(self, number: int, start: int, room: int) -> None:
        handles = sorted(self.listings)
        handle = handles[number % len(handles)]
        listed = self.listings[handle]
        self.replies, self.room = [], room
        code, _ = self.call(self.operations.readdir, handle, start, None)
        assert code in ({0} if self.path.is_file() else {0, *GONE})
        cursor = start
        for name, inode, following in self.replies:
            assert following > cursor
            assert listed.names.setdefault(following, name) == name, "a listing that changes"
            cursor = following
            if name not in (b".", b".."):
                self.hold(inode, listed.inode, os.fsdecode(name))
        names = [name for _, name in sorted(listed.names.items())]
        assert len(set(names)) == len(names), "a name twice"

    @precondition(lambda self: self.listings)
    @rule(number=seeds)
    def close_directory(self, number: int) -> None:
        handles = sorted(self.listings)
        handle = handles[number % len(handles)]
        assert self.call(self.operations.releasedir, handle)[0] == 0
        del self.listings[handle]

    # ---- files ----

    @rule(
        path=paths,
        flags=st.sampled_from((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC)),
        uid=uids,
    )
    def open(self, path: str, flags: int, uid: int) -> None:
        self.open_file(path, flags, uid)

    def open_file(self, path: str, flags: int = os.O_RDONLY, uid: int = OWNER) -> int | None:
        """The handle, or None where that was refused as it should be."""
        code, inode = self.walk(path)
        if code:
            return None
        code, info = self.call(self.operations.open, inode, flags, caller(uid))
        expected = {0} if self.path.is_file() else {0, *GONE}
        if path in CONTROLS and uid == OTHER:
            expected = {errno.EACCES}
        elif flags != os.O_RDONLY and (path not in CONTROLS or self.read_only):
            expected = {errno.EROFS}
        assert code in expected, (path, code)
        if info is None:
            return None
        assert info.direct_io is not (path.endswith("disk.raw") or path == "lost/512")
        code, entry = self.call(self.operations.getattr, inode, caller(uid))
        assert entry is not None
        self.files[info.fh] = Opened(path, entry.st_size)
        if path in CHECKED and self.path.is_file():
            self.reviewed = self.file
        return int(info.fh)

    @precondition(lambda self: self.files)
    @rule(number=seeds, offset=offsets, size=sizes)
    def read(self, number: int, offset: int, size: int) -> None:
        handles = sorted(self.files)
        self.read_from(handles[number % len(handles)], offset, size)

    @rule(path=st.sampled_from(ALWAYS), offset=offsets, size=sizes)
    def open_and_read(self, path: str, offset: int, size: int) -> None:
        handle = self.open_file(path)
        if handle is not None:
            self.read_from(handle, offset, size)
            self.read_from(handle, 0, 1 << 20)

    def read_from(self, handle: int, offset: int, size: int) -> bytes | None:
        opened = self.files[handle]
        code, answer = self.call(self.operations.read, handle, offset, size)
        content = None if answer is None else bytes(answer)
        is_data = opened.path.endswith("disk.raw") or opened.path == "lost/512"
        if opened.path == "disk.raw":
            self.require_guest_bytes(code, content, offset, size)
        elif is_data:
            assert code in {0, *DAMAGED, *GONE}
        else:
            assert code == 0, (opened.path, code)
        if content is None:
            return None
        assert len(content) <= size
        if opened.path in ONE_MOMENT:
            self.require_one_moment(opened, offset, size, content)
        return content

    def require_one_moment(self, opened: Opened, offset: int, size: int, content: bytes) -> None:
        end = offset + len(content)
        assert len(content) == max(0, min(size, opened.size - offset)), f"{opened.path} has no end"
        for start, seen in opened.seen.items():
            low, high = max(start, offset), min(start + len(seen), end)
            assert seen[low - start : high - start] == content[low - offset : high - offset] or (
                low >= high
            ), f"{opened.path} shows two moments"
        opened.seen[offset] = content

    def require_guest_bytes(self, code: int, content: bytes | None, offset: int, size: int) -> None:
        image = self.read_image()
        if image is None:
            assert code in {0, *DAMAGED, *GONE}
            return
        disk = guest_disk(image)
        codes = {each for each in disk if isinstance(each, int)}
        if content is None:
            assert code in codes
        elif offset < 1 << 20:
            expected = disk[offset // 512 : -(-min(offset + size, 1 << 20) // 512)]
            whole = b"".join(each for each in expected if isinstance(each, bytes))
            at = offset % 512
            got = content[: max(0, len(whole) - at)]
            assert got == whole[at : at + size][: len(got)]
            assert not any(isinstance(each, int) for each in expected) or not size

    @precondition(lambda self: self.files)
    @rule(number=seeds)
    def close(self, number: int) -> None:
        handles = sorted(self.files)
        self.close_file(handles[number % len(handles)])

    def close_file(self, handle: int) -> None:
        assert self.call(self.operations.flush, handle)[0] == errno.ENOSYS
        assert self.call(self.operations.release, handle)[0] == 0
        del self.files[handle]

    def shown(self, path: str) -> bytes:
        """What a file shows that is opened now."""
        handle = self.open_file(path)
        assert handle is not None
        content = self.read_from(handle, 0, 1 << 20)
        self.close_file(handle)
        assert content is not None
        return content

    @precondition(lambda self: self.path.is_file())
    @rule()
    def check(self) -> None:
        result = json.loads(self.shown("check/result.json"))
        image = self.read_image()
        assert image is not None
        report = check_bytes(image)
        assert counters_value(report).items() <= result.items()
        assert result["verdict"] == report.verdict or self.undo_path.exists()

    # ---- commands ----

    @rule(
        path=st.sampled_from(CONTROLS),
        command=st.sampled_from((b"leaks\n", b"all\n")) | commands,
        offset=offsets,
        is_quoted=st.booleans(),
    )
    def command(self, path: str, command: bytes, offset: int, is_quoted: bool) -> None:
        """As `echo` does, on a handle of its own; half of the time what the file understands."""
        if path != "repair/tier" and command in (b"leaks\n", b"all\n"):
            command = path.removeprefix("repair/").encode()
        image = self.read_image()
        if is_quoted and command in (b"leaks\n", b"all\n") and image is not None:
            command = command.strip() + f" {plan_id(image, command.strip().decode())}\n".encode()
        handle = self.open_file(path, os.O_WRONLY)
        if handle is None:
            assert self.read_only
            handle = self.open_file(path)
            assert handle is not None
        self.write(handle, offset, command)
        self.close_file(handle)

    @precondition(lambda self: self.files)
    @rule(number=seeds, command=commands, offset=offsets)
    def write_to_what_is_open(self, number: int, command: bytes, offset: int) -> None:
        handles = sorted(self.files)
        self.write(handles[number % len(handles)], offset, command)

    def write(self, handle: int, offset: int, command: bytes) -> None:
        path, before = self.files[handle].path, self.read_image()
        last = self.inspector.repairs.outcome
        code, count = self.call(self.operations.write, handle, offset, command)
        assert code or count == len(command)
        asked = parsed(command, path) if path in CONTROLS else None
        if path not in CONTROLS or self.read_only:
            assert code == errno.EROFS
        elif asked is None:
            assert code == errno.EINVAL
        elif before is None:
            assert code in GONE
        elif self.file != self.reviewed:
            assert code == errno.ESTALE
        else:
            self.obeyed(asked, before, code)
            return
        assert self.read_image() == before
        if code == errno.EROFS:
            assert self.inspector.repairs.outcome is last
        else:
            result = json.loads(self.shown("repair/result.json"))
            assert result["errno"] == errno.errorcode[code]

    def obeyed(self, asked: tuple[str, str], before: bytes, code: int) -> None:
        """What was asked for has become what the image is, and what the files say of it."""
        word, quote = asked
        now = self.read_image()
        assert now is not None
        result = json.loads(self.shown("repair/result.json"))
        assert result["errno"] == (errno.errorcode[code] if code else None)
        match word:
            case "undo":
                assert code in {0, errno.ENODATA, errno.ESTALE, errno.EUCLEAN}
                assert now == before or not code
                if self.is_undo_known:
                    assert (code == 0) == bool(self.undoes_to), result
                    assert now == (self.undoes_to.pop() if self.undoes_to else before)
                assert code or result["status"] == "undone"
            case "trim":
                report = check_bytes(before)
                is_trimmed = report.error is None and report.verdict == "clean"
                refusal = errno.EUCLEAN if report.error is None else report.error.errno
                assert code in {0 if is_trimmed else refusal, errno.EUCLEAN}
                assert not is_trimmed or not code or not self.is_undo_known
                assert now == before or not code
                if self.undoes_to:
                    self.undoes_to, self.is_bottom_known = [], False
            case tier:
                expected, after = repair_of(before, tier, quote)
                is_blocked = code in {errno.EUCLEAN, errno.ESTALE} and not self.is_undo_known
                assert (code, now) == (expected, after) or (is_blocked and now == before), result
                if now != before:
                    self.undoes_to.append(before)
                tiers = self.shown("repair/tier").decode().split()
                was_applied = not code or result["status"] == "incomplete"
                assert (f"[{tier}]" in tiers) or not was_applied
        if now != before:
            time.sleep(0.0015)
            self.moments.clear()

    @precondition(lambda self: self.path.is_file() and self.is_undo_known and not self.read_only)
    @rule(one=st.sampled_from(RepairTier), other=st.sampled_from(RepairTier))
    def command_two_at_once(self, one: str, other: str) -> None:
        """One after the other in either order, or one of them is told that it is too late."""
        self.shown("check/result.json")
        before = self.read_image()
        assert before is not None
        handles = [self.open_file("repair/tier", os.O_WRONLY) for _ in range(2)]
        _, codes = self.call(self.write_both, list(zip(handles, (one, other), strict=True)))
        for handle in handles:
            assert handle is not None
            self.close_file(handle)
        expected = []
        for step, (first, second) in ((1, (one, other)), (-1, (other, one))):
            code, between = repair_of(before, first, "")
            expected.append(((code, errno.EBUSY)[::step], between))
            late, after = repair_of(between, second, "")
            expected.append(((code, late)[::step], after))
        now = self.read_image()
        assert (codes, now) in expected
        if now != before:
            self.undoes_to, self.is_bottom_known = [], False
            time.sleep(0.0015)

    async def write_both(self, commands: list[tuple[int, str]]) -> tuple[int, ...]:
        """The errno of each."""
        codes = [0] * len(commands)

        async def write(at: int, handle: int, command: str) -> None:
            try:
                await self.operations.write(handle, 0, command.encode())
            except FUSEError as error:
                codes[at] = error.errno

        async with trio.open_nursery() as nursery:
            for at, command in enumerate(commands):
                nursery.start_soon(write, at, *command)
        return tuple(codes)

    # ---- what others do to the image ----

    @precondition(lambda self: self.path.is_file())
    @rule(name=st.sampled_from(sorted(DAMAGES)), seed=seeds)
    def damage(self, name: str, seed: int) -> None:
        self.put(damaged(self.read_image() or b"", name, seed))

    @precondition(lambda self: self.path.is_file())
    @rule(seed=seeds)
    def change_words(self, seed: int) -> None:
        self.put(mutate_words(self.read_image() or b"", random.Random(seed)))

    @precondition(lambda self: self.path.is_file())
    @rule(part=st.integers(0, 8))
    def cut(self, part: int) -> None:
        os.truncate(self.path, self.path.stat().st_size * part // 8)
        self.changed()

    @rule(name=st.sampled_from(sorted(DAMAGES)), seed=seeds)
    def replace(self, name: str, seed: int) -> None:
        """Another file under the same name."""
        if self.path.is_dir():
            self.path.rmdir()
        other = self.path.with_name("other")
        other.write_bytes(damaged(self.healthy, name, seed))
        other.rename(self.path)
        self.file += 1
        self.changed()

    @precondition(lambda self: self.path.is_file())
    @rule(kind=st.sampled_from(("nothing", "directory", "FIFO")))
    def remove(self, kind: str) -> None:
        self.path.unlink()
        if kind == "directory":
            self.path.mkdir()
        elif kind == "FIFO":
            os.mkfifo(self.path)
        self.undoes_to, self.is_bottom_known = [], False

    @rule(raw=st.sampled_from((b"", b"nonsense", None)))
    def put_an_undo_file_there(self, raw: bytes | None) -> None:
        if raw is None:
            self.undo_path.unlink(missing_ok=True)
        else:
            self.undo_path.write_bytes(raw)
        self.undoes_to, self.is_bottom_known = [], raw is None

    # ---- the end ----

    def leave(self) -> None:
        """Release and forget everything: nothing of it is left."""
        for handle in list(self.files):
            self.close_file(handle)
        for handle in list(self.listings):
            assert self.call(self.operations.releasedir, handle)[0] == 0
        if self.path.is_file():
            for path in ("disk.raw", "image/map.json", "check/result.json"):
                opened = self.open_file(path)
                assert opened is not None
                self.read_from(opened, 0, 1)
                self.close_file(opened)
        del self.held[ROOT]
        self.call(self.operations.forget, list(self.held.items()))
        assert set(self.operations._known) == {ROOT}
        assert not self.operations._files
        assert not self.operations._listings
        assert not self.operations._waiting
        assert set(self.operations._numbers) <= set(lasting(self.root))
        if self.path.is_file():
            gc.collect()  # trio holds errors that came out of its threads a while
            images = [name for name in open_below(self.directory.name) if "qcow2" in name]
            assert images == [str(self.path)]


def lasting(node: Any) -> list[Any]:
    """The nodes that are always there."""
    children: list[Any] = []
    if isinstance(node, FixedDirectory):
        children = list(node.children.values())
    elif isinstance(node, Directory):
        children = list(node._fixed.values())  # type: ignore[attr-defined]
    return [node, *(each for child in children for each in lasting(child))]


def plan_id(content: bytes, tier: str) -> str:
    """The id of that tier's plan, or another one where it refuses."""
    try:
        return propose_bytes(content, RepairTier(tier)).plan.id
    except PlannerError:
        return "0123456789ab"


def test_a_mounts_life_in_any_order(cases: int) -> None:
    run_state_machine_as_test(MountLife, settings=lives(cases // CASES_A_LIFE))
