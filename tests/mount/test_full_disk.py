"""Repairs on a real file system that is full: refused in one line, and nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from instarfs.image.file import Image
from instarfs.repair.outcome import Status
from instarfs.repair.run import Repairer
from planner.repair.plan import RepairTier
from tests.images.builder import MIB, ImageBuilder
from tests.images.damage import DAMAGES
from tests.mount.mounts import settle
from tests.mount.small_disk import SmallDisk, small_disk

PAGE = 4096
NO_SPACE = "No space left on device"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "small", 32 * MIB) as it:
        yield it


@cache
def content(damage: str) -> bytes:
    """4 MiB of data in clusters of 512 bytes, so that there are refcounts to write, and damage."""
    builder = ImageBuilder(size=8 * MIB, cluster_bits=9)
    builder.write(0, random.Random(1).randbytes(4 * MIB))
    builder.skip(2000)
    builder.write(builder.geometry.guest_clusters - 1, b"the end")
    image = builder.build()
    DAMAGES[damage](image, random.Random(1))
    return bytes(image.data)


def write_image(path: Path, damage: str) -> Path:
    path.write_bytes(content(damage))
    settle(path)
    return path


def needed(tmp_path: Path, damage: str, tier: RepairTier) -> tuple[int, int]:
    """Bytes that a repair needs elsewhere: for its undo file, and for the image to grow."""
    path = write_image(tmp_path / "roomy", damage)
    before = path.stat().st_size
    with Image.open(str(path)) as image:
        outcome = Repairer(image).repair(tier)
    assert outcome.status is Status.REPAIRED
    return Path(outcome.undo_file).stat().st_size, path.stat().st_size - before


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


Refused = Callable[[SmallDisk, RepairTier], tuple[str, str]]
"""Tries a repair that must fail for want of space: the errno's words, and the reason."""


def by_command(disk: SmallDisk, tier: RepairTier) -> tuple[str, str]:
    done = disk.instarfs("check", "-q", "-r", tier, disk.path / "image")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return NO_SPACE, line


def by_mount(disk: SmallDisk, tier: RepairTier) -> tuple[str, str]:
    directory = disk.path.with_name("mnt")
    directory.mkdir()
    mounted = disk.instarfs("mount", disk.path / "image", directory)
    assert (mounted.returncode, mounted.stderr) == (0, "")
    try:
        wrote = disk.run("bash", "-c", f"echo {tier} > {directory}/repair/tier")
        assert wrote.returncode != 0
        result = json.loads(disk.run("cat", directory / "repair/result.json").stdout)
        assert result["errno"] == "ENOSPC"
        assert result["repaired"] == 0
    finally:
        assert disk.instarfs("umount", directory).returncode == 0
    return wrote.stderr.strip().rpartition("write error: ")[2], result["reason"]


WAYS = pytest.mark.parametrize("refused", [by_command, by_mount])


@WAYS
def test_no_space_for_the_undo_file(disk: SmallDisk, refused: Refused) -> None:
    image = write_image(disk.outside / "image", "leaked-clusters")
    before = digest(image)
    disk.fill(left=PAGE)
    errno, reason = refused(disk, RepairTier.LEAKS)
    assert errno == NO_SPACE
    assert "there is no space for the undo file: No space left on device" in reason
    assert "nothing was written; make space (df, df -i), name another place" in reason
    assert digest(image) == before
    assert disk.names() == {"image"}


@WAYS
def test_no_space_for_the_image_to_grow(disk: SmallDisk, refused: Refused, tmp_path: Path) -> None:
    undo, growth = needed(tmp_path, "lost-refblock", RepairTier.ALL)
    image = write_image(disk.outside / "image", "lost-refblock")
    before, size = digest(image), image.stat().st_size
    disk.fill(left=(undo // PAGE + 1 + growth // PAGE // 2) * PAGE)
    errno, reason = refused(disk, RepairTier.ALL)
    assert errno == NO_SPACE
    assert "writing failed: No space left on device" in reason
    assert "the image has been put back as it was; make space, then try again" in reason
    assert (digest(image), image.stat().st_size) == (before, size)
    assert disk.names() == {"image"}


def test_the_way_out_of_a_full_disk_is_one(disk: SmallDisk) -> None:
    write_image(disk.outside / "image", "leaked-clusters")
    disk.fill(left=PAGE)
    assert disk.instarfs("check", "-q", "-r", "leaks", disk.path / "image").returncode == 1
    done = disk.instarfs("check", "-q", "-r", "leaks", "--no-undo", disk.path / "image")
    assert (done.returncode, done.stderr) == (0, "")
    (disk.outside / "filler").unlink()
    assert disk.run("qemu-img", "check", "-q", disk.path / "image").returncode == 0
    assert disk.names() == {"image"}


def test_with_space_again_the_repair_goes_through(disk: SmallDisk) -> None:
    image = write_image(disk.outside / "image", "lost-refblock")
    before = digest(image)
    disk.fill(left=PAGE)
    path = disk.path / "image"
    assert disk.instarfs("check", "-q", "-r", "all", path).returncode == 1
    (disk.outside / "filler").unlink()
    done = disk.instarfs("check", "-q", "-r", "all", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert disk.names() == {"image", "image.instarfs-undo"}
    assert disk.instarfs("undo", path).returncode == 0
    assert digest(image) == before
