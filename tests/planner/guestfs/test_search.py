"""What is hit by damage: every byte accounted for, and to whom debugfs gives it."""

import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from planner.errors import Cancelled
from planner.guestfs import search
from planner.guestfs.files import Damage, HitFiles
from planner.guestfs.protocol import What
from planner.guestfs.search import find_files
from planner.progress import unless
from planner.source import Bytes
from tests.images.guest_files import EXT_VARIANTS, make_disk, make_ext, make_tree
from tests.planner.guestfs import debugfs

MIB = 1 << 20
SEED = 5
START = 3 * MIB


@pytest.fixture(scope="module")
def filesystem(tmp_path_factory) -> Path:
    root: Path = tmp_path_factory.mktemp("search")
    make_tree(root / "tree", SEED)
    make_ext(root / "ext4", root / "tree", EXT_VARIANTS["ext4"], 32 * MIB)
    return root / "ext4"


@pytest.fixture(scope="module")
def disk(filesystem, tmp_path_factory) -> bytes:
    """The file system in a partition."""
    path: Path = tmp_path_factory.mktemp("disk") / "disk"
    script = f"label: dos\nstart={START // 512}, size={32 * MIB // 512}, type=83\n"
    make_disk(path, script, {START: filesystem}, 40 * MIB)
    return path.read_bytes()


def damage(*ranges: tuple[int, int, int], unreadable: bool = True) -> Damage:
    """Of (start, end, harm)."""
    start, end, harm = np.array(sorted(ranges), dtype=np.int64).reshape(-1, 3).T
    none = np.zeros(len(start), dtype=np.bool_)
    return Damage(start, end, harm.astype(np.uint8), none | unreadable, none)


def some_damage(rng: random.Random, size: int, count: int) -> list[tuple[int, int, int]]:
    places = sorted(rng.sample(range(0, size, 512), 2 * count))
    return [
        (low, min(high, low + rng.choice([512, 4096, 65536])), rng.randrange(4))
        for low, high in zip(places[::2], places[1::2], strict=True)
    ]


@pytest.mark.parametrize("case", range(4))
def test_every_damaged_byte_is_accounted_for(disk, case) -> None:
    ranges = some_damage(random.Random(f"{SEED} {case}"), len(disk), 30)
    found = find_files(Bytes(disk), damage(*ranges))
    told: dict[int, int] = defaultdict(int)
    for row in found.rows():
        for byte in range(row.start, row.start + row.length):
            told[byte] = row.harm
    assert told == {byte: harm for low, high, harm in ranges for byte in range(low, high)}
    starts = found.hits.start.tolist()
    assert starts == sorted(starts)


@pytest.mark.parametrize("case", range(6))
def test_the_files_are_those_that_debugfs_names(filesystem, disk, case) -> None:
    """Nothing is unreadable: so all can be known."""
    ranges = some_damage(random.Random(f"{SEED} {case}"), len(disk), 40)
    found = find_files(Bytes(disk), damage(*ranges, unreadable=False))
    hit = {(low - START) // 4096 + at for low, high, _ in ranges
           for at in range((high - 1 - START) // 4096 - (low - START) // 4096 + 1)}  # fmt: skip
    paths = debugfs.paths_in(filesystem)
    inodes = sorted({inode for _, inode in paths} | {2})
    blocks = debugfs.blocks_of(filesystem, inodes)
    expected = {
        inode for inode, own in blocks.items() if {block for _, block in own} & hit
    } | records_hit(filesystem, inodes, ranges)
    names = {(path, inode) for path, inode in paths | {(b"/", 2)} if inode in expected}
    assert {(row.path, row.inode) for row in found.rows() if row.inode is not None} == names
    assert found.notes == []


def records_hit(
    filesystem: Path, inodes: list[int], ranges: list[tuple[int, int, int]]
) -> set[int]:
    """The inodes whose records lie in the ranges, as debugfs places them."""
    found = set()
    for inode, text in zip(
        inodes, debugfs.debugfs(filesystem, [f"imap <{inode}>" for inode in inodes]), strict=True
    ):
        block, offset = (int(word, 0) for word in debugfs.IMAP.search(text).groups())  # type: ignore[union-attr]
        at = START + block * 4096 + offset
        if any(low < at + 256 and at < high for low, high, _ in ranges):
            found.add(inode)
    return found


def rows_of(found: HitFiles) -> list[tuple[str | None, bytes | None, What, int | None]]:
    return [(row.volume.name if row.volume else None, row.path, row.what, row.behind)
            for row in found.rows()]  # fmt: skip


def test_what_lies_outside_of_all_volumes_is_told(disk) -> None:
    found = find_files(Bytes(disk), damage((0, 512, 0), (1024, 2048, 1), (39 * MIB, 40 * MIB, 2)))
    # Without the table nothing says where the partition is, but the file system itself.
    assert [row.volume.name for row in found.rows() if row.volume] == []
    found = find_files(Bytes(disk), damage((0, 512, 0), (1024, 2048, 1), unreadable=False))
    assert rows_of(found) == [(None, None, What.SUPERBLOCK, None), (None, None, What.UNKNOWN, None)]


def test_behind_a_piece_of_the_inode_table_are_its_files(filesystem) -> None:
    data = filesystem.read_bytes()
    text = debugfs.debugfs(filesystem, ["imap <20>"])[0]
    block = int(debugfs.IMAP.search(text)[1], 0)  # type: ignore[index]
    at = block * 4096
    found = find_files(Bytes(data), damage((at, at + 1024, 0)))
    rows = list(found.rows())
    assert [row.behind for row in rows if row.inode is None] == [4]
    assert {row.inode for row in rows if row.inode is not None} == {17, 18, 19, 20}
    assert all(row.path and row.path.startswith(b"/") for row in rows if row.inode is not None)


def test_free_space_is_named(filesystem) -> None:
    free = max(debugfs.free_blocks(filesystem))
    at = free * 4096
    found = find_files(Bytes(filesystem.read_bytes()), damage((at, at + 4096, 3)))
    assert [(row.what, row.harm, row.length) for row in found.rows()] == [(What.FREE, 3, 4096)]


def test_where_nothing_is_damaged_nothing_is_read() -> None:
    found = find_files(None, damage())  # type: ignore[arg-type]
    assert not list(found.rows())


def test_more_hits_than_are_kept_are_said_to_be_more(disk, monkeypatch) -> None:
    monkeypatch.setattr(search, "MAX_HITS", 5)
    found = find_files(Bytes(disk), damage((0, len(disk), 1), unreadable=False))
    assert found.more
    assert len(found.hits) == 5


def test_a_search_can_be_ended(disk) -> None:
    byte = damage((START, START + 1, 0), unreadable=False)
    with pytest.raises(Cancelled):
        find_files(Bytes(disk), byte, progress=unless(lambda: True))
