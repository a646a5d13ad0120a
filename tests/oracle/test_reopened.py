"""What QEMU mends of an image when it opens it for writing, and what we say of that before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from planner.check.check import check_image
from planner.check.reopened import is_mended_when_opened
from planner.qcow2.header import read_header
from planner.source import Bytes
from tests.mount.mounts import run

CLUSTER = 1 << 16
DIRTY, CORRUPT = 1, 2
FEATURES_AT = 72
REFBLOCK = 2 * CLUSTER
"""Where qemu-img puts the first one."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A megabyte, a snapshot of it, and a part of it written again."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-c", "write -q -P 65 0 1M", path)
    run("qemu-img", "snapshot", "-c", "before", path)
    run("qemu-io", "-c", "write -q -P 66 256k 256k", path)
    return path


def edit(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def mark(path: Path, bits: int) -> None:
    edit(path, FEATURES_AT, bits.to_bytes(8, "big"))


def is_said_to_be_mended(path: Path) -> bool:
    return is_mended_when_opened(check_image(Bytes(path.read_bytes())))


@pytest.mark.parametrize("seed", range(8))
def test_refcounts_that_are_out_of_date_are_mended_and_no_byte_is_lost(
    path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-O", "raw", path, raw)
    clusters = path.stat().st_size // CLUSTER
    for cluster in rng.sample(range(clusters), rng.randrange(1, clusters)):
        edit(path, REFBLOCK + 2 * cluster, rng.randrange(4).to_bytes(2, "big"))
    assert not is_said_to_be_mended(path)
    mark(path, DIRTY)
    assert is_said_to_be_mended(path)
    run("qemu-io", "-c", "read -q 0 512", path)
    assert check_image(Bytes(path.read_bytes())).verdict == "clean"
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", path, raw)


@pytest.mark.parametrize("bits", [0, CORRUPT, DIRTY | CORRUPT])
def test_only_what_is_dirty_and_not_marked_corrupt(path: Path, bits: int) -> None:
    edit(path, REFBLOCK, bytes(2))
    mark(path, bits)
    assert not is_said_to_be_mended(path)


def test_more_than_refcounts_is_not_what_a_killed_program_leaves_behind(path: Path) -> None:
    mark(path, DIRTY)
    assert is_said_to_be_mended(path)
    header = read_header(Bytes(path.read_bytes()))
    l2_table = int.from_bytes(path.read_bytes()[header.l1_table_offset :][:8], "big") & ~(1 << 63)
    for word in ((1 << 63) + 512, (1 << 63) + (1 << 40)):  # misaligned, past the end
        edit(path, l2_table, word.to_bytes(8, "big"))
        assert not is_said_to_be_mended(path)
