"""A running machine without the machine: `qemu-storage-daemon` with an image open for writing.

The image is exported by FUSE as a file, through which its guest writes, discards, flushes and
resizes; QMP takes snapshots and adds bitmaps. What runs is ended by its id, and with this process.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mount.mounts import DEADLINE, mounted_type, run, until

SLICE = 4096
"""QEMU caches L2 tables in slices of so many bytes, or whole where they are smaller."""


@dataclass(frozen=True, slots=True)
class Shape:
    """An image as `qemu-img create` makes it, and how large the caches of its program are."""

    cluster_size: int = 65536
    size: int = 1 << 30
    refcount_bits: int = 16
    extended_l2: bool = False
    lazy_refcounts: bool = False
    small_caches: bool = False
    flushes: bool = False
    """Whether flushes wait for the disk. Their order among writes is the same without, and a disk
    that others use does not slow the guest."""

    def __str__(self) -> str:
        words = [f"{self.cluster_size} B", f"{self.refcount_bits}-bit refcounts"]
        words += ["extended L2"] * self.extended_l2 + ["lazy refcounts"] * self.lazy_refcounts
        words += ["flushes wait"] * self.flushes
        words += ["small caches" if self.small_caches else "default caches"]
        return ", ".join(words)

    def create(self, path: Path) -> None:
        """An image every cluster of which is in use, so that all of its tables are there."""
        options = {
            "cluster_size": self.cluster_size,
            "refcount_bits": self.refcount_bits,
            "extended_l2": "on" if self.extended_l2 else "off",
            "lazy_refcounts": "on" if self.lazy_refcounts else "off",
            "preallocation": "metadata",
        }
        words = ",".join(f"{name}={value}" for name, value in options.items())
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, path, str(self.size))

    def node(self, path: Path) -> dict[str, object]:
        """What opens it."""
        file: dict[str, object] = {"driver": "file", "filename": str(path), "discard": "unmap"}
        file["cache"] = {"no-flush": not self.flushes}
        node: dict[str, object] = {
            "driver": "qcow2",
            "node-name": "disk",
            "discard": "unmap",
            "file": file,
        }
        if self.small_caches:
            node["l2-cache-size"] = 4 * min(self.cluster_size, SLICE)
            node["refcount-cache-size"] = 4 * self.cluster_size
            node["cache-clean-interval"] = 1
        return node


class QmpError(Exception):
    """What the daemon was asked to do it would not."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The daemon, and the disk as a file."""

    process: subprocess.Popen[str]
    disk: Path

    def ask(self, command: str, /, **arguments: object) -> object:
        """Have a QMP command done; what it returns. Raises `QmpError`."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"execute": command, "arguments": names}) + "\n")
        self.process.stdin.flush()
        while True:
            answer = self._line()
            if "error" in answer:
                raise QmpError(answer["error"])
            if "return" in answer:
                return answer["return"]

    def _line(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise QmpError("it has ended")
        found: dict[str, object] = json.loads(line)
        return found


@contextmanager
def running(path: Path, shape: Shape) -> Iterator[Machine]:
    """*path* opened as by a machine that starts: with QEMU's locks, which must be had."""
    disk = path.with_name(f"{path.name}.disk")
    disk.touch()
    export = {"type": "fuse", "id": "disk", "node-name": "disk", "writable": True}
    command = [
        *("setpriv", "--pdeathsig", "TERM", "qemu-storage-daemon"),
        *("--chardev", "stdio,id=qmp", "--monitor", "qmp"),
        *("--blockdev", json.dumps(shape.node(path))),
        *("--export", json.dumps({**export, "mountpoint": str(disk)})),
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    machine = Machine(process, disk)
    try:
        until(lambda: mounted_type(disk) or process.poll() is not None, "the disk was exported")
        if process.poll() is not None:
            raise QmpError(process.communicate()[1].strip())
        machine._line()
        machine.ask("qmp_capabilities")
        yield machine
    finally:
        end(process)
        if mounted_type(disk):
            subprocess.run(["fusermount3", "-u", "-z", disk], check=True)
        disk.unlink()


def end(process: subprocess.Popen[str]) -> None:
    """Ask it to close its image and go; where it does not, make it."""
    process.terminate()
    try:
        process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def size_of(disk: Path) -> int:
    """Of a disk that is exported."""
    return os.stat(disk).st_size  # noqa: PTH116 (one call, and no cache of it)
