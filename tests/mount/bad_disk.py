"""A file system of one folder that fails as it is told: bad_disk.py FOLDER DIR FAULTS

Passes everything through to FOLDER but for what the file FAULTS says, a JSON list that is read anew
for each request. Each fault has an ``op`` (read, write, fsync, create) and may have ``from`` and
``to``, the bytes that it is about, and ``name``, of the file. It fails with ``errno``, waits for
``delay`` seconds, or reads only ``short`` bytes. Each request is noted in
FAULTS.count.
"""

# The arguments of a handler are what pyfuse3 passes.

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import trio
from pyfuse3 import ROOT_INODE, EntryAttributes, FileInfo, FUSEError

FOLDER, DIRECTORY, FAULTS = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

_COPIED = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blksize", "st_blocks")
_TIMES = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")


class BadDisk(pyfuse3.Operations):
    """The regular files of a folder; inode numbers stand for names, open files for descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, str] = {}
        self._next = itertools.count(ROOT_INODE + 1)

    def _path(self, inode: int) -> Path:
        return FOLDER if inode == ROOT_INODE else FOLDER / self._names[inode]

    def _inode(self, name: str) -> int:
        known = {each: inode for inode, each in self._names.items()}
        inode = known.get(name) or next(self._next)
        self._names[inode] = name
        return inode

    def _attributes(self, inode: int, path: Path) -> EntryAttributes:
        try:
            status = path.lstat()
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.entry_timeout = entry.attr_timeout = 0
        for name in (*_COPIED, *_TIMES):
            setattr(entry, name, getattr(status, name))
        return entry

    async def lookup(self, parent: int, name: bytes, ctx: Any) -> EntryAttributes:
        path = FOLDER / os.fsdecode(name)
        if not path.exists():
            raise FUSEError(errno.ENOENT)
        return self._attributes(self._inode(path.name), path)

    async def getattr(self, inode: int, ctx: Any) -> EntryAttributes:
        return self._attributes(inode, self._path(inode))

    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any
    ) -> EntryAttributes:
        if fields.update_size:
            os.truncate(self._path(inode), attr.st_size)
        return self._attributes(inode, self._path(inode))

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start: int, token: Any) -> None:
        for number, path in list(enumerate(sorted(FOLDER.iterdir()), 1))[start:]:
            entry = self._attributes(self._inode(path.name), path)
            if not pyfuse3.readdir_reply(token, os.fsencode(path.name), entry, number):
                return

    async def open(self, inode: int, flags: int, ctx: Any) -> FileInfo:
        return FileInfo(fh=os.open(self._path(inode), flags & ~os.O_CREAT), direct_io=True)

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[FileInfo, EntryAttributes]:
        path = FOLDER / os.fsdecode(name)
        await self._fault("create", path.name, 0, 0)
        fd = os.open(path, flags | os.O_CREAT, mode)
        return FileInfo(fh=fd, direct_io=True), self._attributes(self._inode(path.name), path)

    async def read(self, fh: int, offset: int, size: int) -> bytes:
        size = await self._fault("read", self._name(fh), offset, size)
        return os.pread(fh, size, offset)

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        await self._fault("write", self._name(fh), offset, len(data))
        return os.pwrite(fh, data, offset)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._fault("fsync", self._name(fh), 0, 0)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        return None

    async def flush(self, fh: int) -> None:
        return None

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def unlink(self, parent: int, name: bytes, ctx: Any) -> None:
        (FOLDER / os.fsdecode(name)).unlink()

    async def rename(  # noqa: PLR0917 - pyfuse3's signature
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: Any
    ) -> None:
        old, new = os.fsdecode(name), os.fsdecode(new_name)
        (FOLDER / old).rename(FOLDER / new)
        for inode in [inode for inode, each in self._names.items() if each == new]:
            self._names[inode] = f"{new} (gone)"
        self._names[self._inode(old)] = new

    @staticmethod
    def _name(fh: int) -> str:
        return Path(f"/proc/self/fd/{fh}").readlink().name

    async def _fault(self, op: str, name: str, offset: int, size: int) -> int:
        """Fail or wait as FAULTS says; the bytes that may be read."""
        with FAULTS.with_suffix(".count").open("a") as count:
            count.write(f"{op} {name} {offset}\n")
        for fault in self._faults(op, name, offset, size):
            await trio.sleep(fault.get("delay", 0))
            if "errno" in fault:
                raise FUSEError(fault["errno"])
            size = min(size, fault.get("short", size))
        return size

    @staticmethod
    def _faults(op: str, name: str, offset: int, size: int) -> Iterator[dict[str, Any]]:
        for fault in json.loads(FAULTS.read_text()):
            low, high = fault.get("from", 0), fault.get("to", 1 << 62)
            about = fault.get("name", name) == name and fault["op"] == op
            if about and offset < high and offset + size >= low:
                yield fault


pyfuse3.init(BadDisk(), DIRECTORY, {"fsname=bad-disk"})
try:
    trio.run(pyfuse3.main)
finally:
    pyfuse3.close()
