"""Advice for an image beside which nothing can be kept: a full disk, a folder for reading only."""

from __future__ import annotations

import random
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.advice import Block, blocks_of, may_fail
from tests.images.builder import MIB
from tests.images.damage import DAMAGES
from tests.images.sample import sample
from tests.mount.mounts import DEADLINE, INSTARFS
from tests.mount.small_disk import SmallDisk, small_disk

NAME = "an image"


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    image = sample(size=64 * MIB, cluster_bits=12).build()
    DAMAGES["lost-l2-table"](image, random.Random(1))
    with small_disk(tmp_path / "small", 32 * MIB, getattr(request, "param", 1000)) as it:
        (it.outside / NAME).write_bytes(image.data)
        yield it


def follow(disk: SmallDisk) -> list[Block]:
    """Do in another folder what the report advises; all of it succeeds, but where it says else."""
    report = disk.instarfs("report", disk.path / NAME)
    blocks = blocks_of(report.stdout)
    program = f'instarfs() {{ {shlex.join(INSTARFS)} "$@"; }}\nset -e\n'
    script = program + "\n".join(map(_script, blocks))
    elsewhere = disk.path.parent  # entering the namespace has led to its root
    shell = ("bash", "-c", f'cd "$1"\n{script}', "bash", elsewhere)
    done = disk.run(*shell, timeout=len(blocks) * DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert (elsewhere / f"{NAME}.copy").stat().st_size > MIB
    assert (elsewhere / f"{NAME}.lost/triage.json").exists()
    return blocks


def _script(block: Block) -> str:
    lines = "\n".join(block.lines)
    return f"{{\n{lines}\n}} || [ $? -eq 1 ]" if may_fail(block) else lines


def test_a_full_disk(disk: SmallDisk) -> None:
    disk.fill(left=MIB)
    before = (disk.outside / NAME).read_bytes()
    first, *others = follow(disk)
    assert first.lines[0].startswith("  # There is no space for a copy beside the image: go to")
    assert "To take that repair back, byte for byte:" in [block.title for block in others]
    assert (disk.outside / NAME).read_bytes() == before


@pytest.mark.parametrize("disk", [2], indirect=True)
def test_a_file_system_that_takes_no_more_files(disk: SmallDisk) -> None:
    (first, *_) = follow(disk)
    assert first.lines[0].startswith("  # There is no space for a copy beside the image: go to")
    assert disk.names() == {NAME}


def test_a_disk_with_nothing_left(disk: SmallDisk) -> None:
    disk.fill(left=0)
    follow(disk)
    assert disk.names() == {NAME}


def test_a_file_system_for_reading_only(disk: SmallDisk) -> None:
    remounted = disk.run("mount", "-o", "remount,ro", disk.path)
    assert remounted.returncode == 0, remounted.stderr
    lines = [line for block in follow(disk) for line in block.lines]
    assert lines[0].startswith("  # No file can be made beside the image: go to a folder")
    assert "  # The image cannot be written to. Its copy can, and has the same plans." in lines
    copy = disk.path.with_name(f"{NAME}.copy")
    assert copy.read_bytes() == (disk.outside / NAME).read_bytes()
