"""An image on a file system that keeps whole seconds: what is written in the second in which it was
read leaves no trace in its times.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.block_devices import require_loop_devices
from tests.images.builder import MIB
from tests.mount.mounts import MakeMount, run, until

SECOND_NS = 10**9
ENTRY_OFFSET = (1 << 56) - 512
ATTEMPTS = 10


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 with the small inodes that old ones have."""
    require_loop_devices()
    file, path = tmp_path / "ext4", tmp_path / "disk"
    with file.open("wb") as it:
        it.truncate(16 * MIB)
    run("mkfs.ext4", "-q", "-I", "128", file)
    path.mkdir()
    run("mount", "-o", "loop", file, path)
    try:
        yield path
    finally:
        run("umount", path)


@pytest.fixture
def image(disk: Path) -> Path:
    """One cluster of guest data, which begins with an `a`."""
    image = disk / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 0x61 0 64k", image)
    return image


def write_l2_entry(image: Path, word: bytes) -> bytes:
    """Put *word* into the first L2 entry, in place; returns what was there."""
    with image.open("r+b", buffering=0) as file:
        l1_table = int.from_bytes(os.pread(file.fileno(), 8, 40), "big")
        l2_table = int.from_bytes(os.pread(file.fileno(), 8, l1_table), "big") & ENTRY_OFFSET
        before = os.pread(file.fileno(), 8, l2_table)
        os.pwrite(file.fileno(), word, l2_table)
    return before


def times(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns


def test_what_is_written_in_the_second_of_a_read_is_shown(image: Path, mount: MakeMount) -> None:
    mounted, entry = mount(image), write_l2_entry(image, bytes(8))
    with (mounted / "disk.raw").open("rb", buffering=0) as held:

        def shown() -> tuple[int, bytes, bytes]:
            leaks = json.loads(mounted.read("check/result.json"))["leaks"]
            return leaks, os.pread(held.fileno(), 1, 0), (mounted / "disk.raw").read_bytes()[:1]

        for _ in range(ATTEMPTS):
            until(lambda: time.time_ns() % SECOND_NS < SECOND_NS // 20, "a second began")
            write_l2_entry(image, entry)
            before = times(image)
            until(lambda: shown() == (0, b"a", b"a"), "it was shown as it is")
            write_l2_entry(image, bytes(8))
            if times(image) == before:
                break
        assert times(image) == before, "no two writes within a second"
        assert before[0] % SECOND_NS == before[1] % SECOND_NS == 0
        # Who has it open alone: opening it anew has the kernel drop all that it kept.
        until(lambda: os.pread(held.fileno(), 1, 0) == b"\0", "the kernel asked anew")
        assert shown() == (1, b"\0", b"\0")
        until(lambda: time.time_ns() > before[0] + 3 * SECOND_NS, "the times had settled")
        assert shown() == (1, b"\0", b"\0")
