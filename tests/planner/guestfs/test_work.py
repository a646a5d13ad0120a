"""A search that has no more work to do: what it says by then holds, and that it is not all."""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from planner.guestfs.files import HitFiles
from planner.guestfs.protocol import What
from planner.guestfs.search import find_files
from planner.guestfs.work import FOR_A_BYTE, FOR_ANY, Work, WorkSpent
from planner.source import Bytes, Source
from tests.images.guest_files import EXT_VARIANTS, make_ext, make_tree
from tests.planner.guestfs.test_search import damage, some_damage

SIZE = 32 << 20


class Paid:
    """A source whose reads are taken from some work."""

    def __init__(self, source: Source, work: Work) -> None:
        self._source, self._work = source, work

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._work.read(len(buffer))
        self._source.read_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        self._work.ask()
        return self._source.data_extents(offset, length)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> bytes:
    root: Path = tmp_path_factory.mktemp("work")
    make_tree(root / "tree", 3)
    make_ext(root / "ext4", root / "tree", EXT_VARIANTS["ext4"], SIZE)
    return (root / "ext4").read_bytes()


def pieces(found: HitFiles) -> set[tuple[int, int, int | None, bytes | None]]:
    return {(row.start, row.length, row.inode, row.path) for row in found.rows()}


def test_whatever_is_left_undone_each_damaged_byte_is_accounted_for(data) -> None:
    ranges = some_damage(random.Random(2), SIZE, 40)
    whole = find_files(Bytes(data), damage(*ranges))
    total = sum(end - start for start, end, _ in ranges)
    spent = 0
    for share in range(12):
        work = Work(0)
        work.take(FOR_ANY - 2.0**share * 100)
        found = find_files(Paid(Bytes(data), work), damage(*ranges), work=work)
        spent += found.notes != whole.notes
        covered = {at for row in found.rows() for at in range(row.start, row.start + row.length)}
        assert len(covered) == total
        # Whose it is is said only where it is so; a name may be missing.
        owners = {(start, length, inode) for start, length, inode, _ in pieces(whole)}
        for row in found.rows():
            is_left = row.what in (What.UNKNOWN, What.INODE_TABLE)
            assert is_left or row.inode is None or (row.start, row.length, row.inode) in owners
        if found.notes == whole.notes:
            assert pieces(found) == pieces(whole)
        else:
            assert any(str(WorkSpent()) in note for note in found.notes)
    assert 3 < spent < 12


def test_there_is_more_to_be_done_where_there_is_more_of_an_image() -> None:
    work = Work(1 << 30)
    work.take(FOR_ANY + FOR_A_BYTE * (1 << 30))
    for _ in range(2):
        with pytest.raises(WorkSpent):
            work.take(1)
    Work().take(1e18)
