"""Holes and windows: what a file system is read through."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ReadFailed
from planner.guestfs.reading import Holes, Window, read_blocks
from planner.source import SECTOR, Bytes, read_bytes

DATA = bytes(range(1, 256)) * 20


class Failing(Bytes):
    """Of which the sectors *bad* cannot be read."""

    def __init__(self, data: bytes, bad: set[int]) -> None:
        super().__init__(data)
        object.__setattr__(self, "bad", bad)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        last = (offset + len(buffer) - 1) // SECTOR
        if any(offset // SECTOR <= sector <= last for sector in self.bad):  # type: ignore[attr-defined]
            raise ReadFailed
        super().read_into(offset, buffer)


ranges = st.lists(st.tuples(st.integers(0, 5200), st.integers(1, 600)), max_size=5)


def holed(known: list[tuple[int, int]], bad: set[int] = frozenset()) -> Holes:  # type: ignore[assignment]
    start = np.array([at for at, _ in known], dtype=np.int64)
    return Holes(Failing(DATA, bad), start, start + np.array([n for _, n in known], np.int64))


@given(known=ranges, bad=st.sets(st.integers(0, 9), max_size=3), at=st.integers(0, 5000))
def test_holes_read_as_zeros_and_are_told(known, bad, at) -> None:
    source = holed(known, bad)
    gone = {byte for start, length in known for byte in range(start, start + length)}
    gone |= {byte for sector in bad for byte in range(sector * SECTOR, (sector + 1) * SECTOR)}
    expected = bytes(0 if place in gone else value for place, value in enumerate(DATA))
    assert read_bytes(source, 0, len(DATA)) == expected
    assert read_bytes(source, at, 900) == (expected + bytes(900))[at : at + 900]
    inside = range(at, min(at + 40, len(DATA)))
    assert source.is_hole(at, 40) == (bool(gone & set(inside)) or at + 40 > len(DATA))


def test_a_known_hole_is_not_read() -> None:
    source = Holes(Failing(DATA, {2}), np.array([2 * SECTOR]), np.array([3 * SECTOR]))
    source._fill = None  # type: ignore[assignment,method-assign]
    assert read_bytes(source, 2 * SECTOR, SECTOR) == bytes(SECTOR)


def test_ranges_are_asked_for_together() -> None:
    source = holed([(100, 50)])
    asked = source.are_holes(np.array([0, 90, 149, 150, len(DATA)]), 20)
    assert asked.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("offset", [0, 7, 5000, 9000])
def test_a_window_reads_and_ends_where_it_is(offset) -> None:
    window = Window(Bytes(DATA), offset, 300)
    expected = (DATA + bytes(9000))[offset : offset + 300]
    assert read_bytes(window, 0, 400) == expected + bytes(100)
    assert read_bytes(window, 250, 100) == expected[250:] + bytes(50)
    assert read_bytes(window, 700, 10) == bytes(10)
    extents = list(window.data_extents(0, 1000))
    assert extents == ([(0, min(300, len(DATA) - offset))] if offset < len(DATA) else [])


def test_blocks_are_read_in_the_order_asked_for() -> None:
    blocks = read_blocks(Bytes(DATA), np.array([512, 0, 1024]), 512)
    assert [row.tobytes() for row in blocks] == [DATA[512:1024], DATA[:512], DATA[1024:1536]]
