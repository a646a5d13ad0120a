"""Disks in qcow2 files as machines leave them: a kernel writes through QEMU, files come and go.

So the clusters lie in the order in which they were first written, which is not that of the disk.
"""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
READY_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Made:
    """How a disk is made: ``table`` is none, mbr or gpt; ``files`` come in each of four rounds."""

    filesystem: str = "ext4"
    table: str = "gpt"
    cluster_bits: int = 14
    size: int = 2048 * MIB
    files: int = 250
    snapshot: bool = False

    def __str__(self) -> str:
        with_one = " snapshot" if self.snapshot else ""
        return f"{self.filesystem} {self.table} {1 << self.cluster_bits >> 10}K{with_one}"


MAKE = {
    "ext4": ["mke2fs", "-q", "-F", "-t", "ext4"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "ntfs": ["mkntfs", "-q", "-F", "-f", "-p", "2048", "-H", "16", "-S", "63"],
    "vfat": ["mkfs.fat", "-F", "32"],
}


def run(*command: str | Path, feed: str | None = None) -> str:
    """What a command prints that is to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, input=feed)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return str(done.stdout)


def make_disk(image: Path, how: Made, seed: int) -> None:
    """A qcow2 file at *image* with one file system on it, aged."""
    rng = random.Random(f"disk {how} {seed}")
    options = f"cluster_size={1 << how.cluster_bits}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(how.size))
    with exported(image) as disk:
        start = _partition(disk, how)
        with partition(disk, start, how.size) as device:
            run(*MAKE[how.filesystem], device)
            _fill(device, how, rng, range(2))
    if how.snapshot:
        run("qemu-img", "snapshot", "-c", "before", image)
    with exported(image) as disk, partition(disk, start, how.size) as device:
        _fill(device, how, rng, range(2, 4))


def _partition(disk: Path, how: Made) -> int:
    if how.table == "none":
        return 0
    label = {"mbr": "dos", "gpt": "gpt"}[how.table]
    run("sfdisk", "--quiet", disk, feed=f"label: {label}\nstart=2048\n")
    return MIB


@contextlib.contextmanager
def exported(image: Path) -> Iterator[Path]:
    """The disk in *image* as a file, through QEMU."""
    disk = image.with_suffix(".disk")
    disk.touch()
    command = ["qemu-storage-daemon",
        "--blockdev", f"driver=file,node-name=file,filename={image}",
        "--blockdev", "driver=qcow2,node-name=disk,file=file",
        "--export", f"type=fuse,id=disk,node-name=disk,mountpoint={disk},writable=on",
    ]  # fmt: skip
    daemon = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while not os.path.ismount(disk):
            assert daemon.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield disk
    finally:
        daemon.terminate()
        daemon.wait()
        disk.unlink()


@contextlib.contextmanager
def partition(disk: Path, start: int, size: int) -> Iterator[Path]:
    """The block device of the only partition of *disk*."""
    length = size - start - (MIB if start else 0)
    find = ["losetup", "--find", "--show", "-o", str(start), "--sizelimit", str(length)]
    device = run(*find, disk).strip()
    try:
        yield Path(device)
    finally:
        run("losetup", "--detach", device)


def _fill(device: Path, how: Made, rng: random.Random, rounds: range) -> None:
    folder = Path(tempfile.mkdtemp(prefix="filled-"))
    command = ["ntfs-3g"] if how.filesystem == "ntfs" else ["mount"]
    run(*command, device, folder)
    try:
        for number in rounds:
            _one_round(folder, how, rng, number)
    finally:
        for _ in range(100):
            if subprocess.run(["umount", folder], check=False).returncode == 0:
                break
            time.sleep(0.1)
        folder.rmdir()
    if how.filesystem == "ntfs":
        # Its process goes on for a moment.
        run("sync")


def _one_round(folder: Path, how: Made, rng: random.Random, number: int) -> None:
    for file in range(how.files):
        inside = folder / f"folder {rng.randrange(40)}"
        inside.mkdir(exist_ok=True)
        size = rng.choice([0, 100, 3000, 9000, 20_000, 70_000, 200_000])
        (inside / f"file {number} {file}.bin").write_bytes(
            rng.randbytes(rng.randint(size // 2, size))
        )
    for file in range(6):
        size = min(how.size // 100, 64 * MIB)
        size = rng.randint(size // 4, size)
        (folder / f"large {number} {file}.img").write_bytes(rng.randbytes(size))
    old = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in rng.sample(old, len(old) // 3):
        path.unlink()
    run("sync", "-f", folder)
