"""Which files are hit, beside debugfs asked for the same blocks: a million files in an ext4.

debugfs is given the raw disk, and the blocks that are damaged; here the image is checked first.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from instarfs.image.file import Image
from planner.guestfs.ext.filesystem import recognise
from planner.guestfs.protocol import NO_INODE, What
from planner.guestfs.reading import Holes
from planner.qcow2.entries import COPIED, L1_OFFSET
from planner.qcow2.layout import Layout
from planner.source import read_bytes
from tests.bench.checks import DISK
from tests.bench.race import Race, Row, Side, Unavailable
from tests.bench.samples import Samples
from tests.images.guest_filled import mounted
from tests.mount.mounts import INSTARFS
from tests.oracle.scene import FileSource

OURS, DEBUGFS = "instarfs files", "debugfs icheck, ncheck"

FOLDERS, FILES_EACH = 1000, 1000
DAMAGED = 100_000
BLOCK = 4096
SIZE = 6 << 30

ARGUMENT_BYTES = 120_000
"""Of one command of debugfs: the kernel passes no longer argument."""


def make_disk(disk: Path, folders: int = FOLDERS, files: int = FILES_EACH) -> None:
    """An ext4 with that many files of a block each, of which nothing is written."""
    with disk.open("wb") as file:
        file.truncate(SIZE)
    inodes = str(folders * (files + 1) + 1000)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-N", inodes, disk],
                   check=True)  # fmt: skip
    with mounted(disk) as root:
        for number in range(folders):
            folder = root / f"folder {number}"
            folder.mkdir()
            for each in range(files):
                fd = os.open(folder / f"file {each}", os.O_CREAT | os.O_WRONLY)
                os.posix_fallocate(fd, 0, BLOCK)
                os.close(fd)


def damage(disk: Path, image: Path, count: int = DAMAGED) -> list[int]:
    """Make *image* of *disk*, with the entries of *count* blocks of files behind its end."""
    with disk.open("rb") as file:
        filesystem = recognise(Holes(FileSource(file.fileno())))
        assert filesystem is not None
        blocks = np.concatenate(
            [
                extents.start[(extents.inode != NO_INODE) & (extents.what == What.DATA)] // BLOCK
                for extents in filesystem.extents()
            ]
        )
    chosen = sorted(random.Random(1).sample(blocks.tolist(), min(count, len(blocks))))
    options = f"cluster_size={BLOCK},preallocation=metadata"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-o", options, disk, image], check=True)
    with Image.open(str(image)) as opened:
        source = opened.source()
        header = Layout.read(source).header
        raw = read_bytes(source, header.l1_table_offset, 8 * header.l1_size)
        l1 = np.frombuffer(raw, dtype=">u8").astype(np.uint64) & np.uint64(L1_OFFSET)
    end = -(-image.stat().st_size // BLOCK) * BLOCK
    with image.open("r+b") as file:
        for number, block in enumerate(chosen):
            table, entry = divmod(block, BLOCK // 8)
            word = COPIED | end + number * BLOCK
            os.pwrite(file.fileno(), word.to_bytes(8, "big"), int(l1[table]) + 8 * entry)
    return chosen


def ask_debugfs(disk: Path, blocks: Sequence[int]) -> None:
    """The inodes that have the blocks, and their names."""
    inodes = [line.split("\t")[1] for line in _asked(disk, "icheck", map(str, blocks))]
    assert len(inodes) == len(blocks)
    names = _asked(disk, "ncheck", inodes)
    assert len(names) == len(blocks)


def _asked(disk: Path, question: str, about: Iterator[str] | Sequence[str]) -> list[str]:
    words, answers = list(about), list[str]()
    at = 0
    while at < len(words):
        request, length = [question], len(question)
        while at < len(words) and length + len(words[at]) < ARGUMENT_BYTES:
            request.append(words[at])
            length += len(words[at]) + 1
            at += 1
        command: list[str | Path] = ["debugfs", "-R", " ".join(request), disk]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        answers += done.stdout.splitlines()[1:]
    return answers


@contextmanager
def enter(_samples: Samples) -> Iterator[Mapping[str, Side]]:
    """Both, of the same blocks."""
    if os.geteuid():
        raise Unavailable("only root can mount a disk to fill it")
    with tempfile.TemporaryDirectory("-instarfs-files", dir=DISK) as name:
        disk, image = Path(name) / "disk", Path(name) / "image.qcow2"
        make_disk(disk)
        blocks = damage(disk, image)

        def files() -> None:
            with (Path(name) / "files.tsv").open("wb") as out:
                subprocess.run([*INSTARFS, "files", image], stdout=out, stderr=out, check=False)
            text = (Path(name) / "files.tsv").read_text()
            assert text.count("\tdata\n") == len(blocks)

        yield {
            OURS: Side(files),
            DEBUGFS: Side(partial(ask_debugfs, disk, blocks)),
        }


RACES = (
    Race(
        "files-1m",
        enter,
        (Row("files of a million that 100,000 clusters hit", OURS, DEBUGFS, 1),),
        warm=False,
    ),
)
