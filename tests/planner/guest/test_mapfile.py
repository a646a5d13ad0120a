"""Mapfiles: what is written is read again, and what ddrescue writes is understood."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import NotAMapfile
from planner.guest.mapfile import BAD, READ, UNTRIED, Mapfile, parse_mapfile

OF_DDRESCUE = b"""\
# Mapfile. Created by GNU ddrescue version 1.27
# Command line: ddrescue -d -c18 /dev/fd0 fdimage mapfile
# Start time:   2015-07-21 09:37:44
# Finished
# current_pos  current_status  current_pass
0x00120000     +               1
#      pos        size  status
0x00000000  0x00117000  +
0x00117000  0x00000200  -
0x00117200  0x00001000  /
0x00118200  0x00007E00  *   # a comment of somebody's
0x00120000  0x00048000  ?
"""

STATUSES = st.sampled_from([UNTRIED, BAD, READ])


def statuses(mapfile: Mapfile) -> bytes:
    """One a byte of what it describes."""
    return np.repeat(mapfile.status, mapfile.length).tobytes()


def test_what_ddrescue_writes() -> None:
    found = parse_mapfile(OF_DDRESCUE)
    assert found.size == 0x168000
    assert found.position == 0x120000
    assert found.remarks[:2] == (
        "Mapfile. Created by GNU ddrescue version 1.27",
        "Command line: ddrescue -d -c18 /dev/fd0 fdimage mapfile",
    )
    assert found.blocks(READ) == [(0, 0x117000)]
    assert found.blocks(BAD) == [(0x117000, 0x117200)]
    assert found.blocks(UNTRIED) == [(0x117200, 0x168000)]
    assert found.blocks(BAD, UNTRIED) == [(0x117000, 0x168000)]
    assert [found.bytes_of(each) for each in (READ, BAD, UNTRIED)] == [0x117000, 0x200, 0x50E00]


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), STATUSES)))
def test_blocks_are_laid_over_each_other(size, layers) -> None:
    mapfile, truth = Mapfile.untried(size, ("one", "two")), bytearray([UNTRIED] * size)
    for low, high, status in layers:
        start, end = sorted((min(low, size), min(high, size)))
        blocks = [(start, end, status)] if start < end else []
        if end + 2 < size:
            blocks.append((end + 1, end + 2, BAD))
        mapfile = mapfile.overlaid(blocks)
        for first, last, each in blocks:
            truth[first:last] = bytes([each]) * (last - first)
        assert statuses(mapfile) == truth
        assert (mapfile.status[1:] != mapfile.status[:-1]).all()
    for each in (UNTRIED, BAD, READ):
        assert sum(end - start for start, end in mapfile.blocks(each)) == truth.count(each)
    again = parse_mapfile(b"".join(mapfile.render()))
    assert (statuses(again), again.remarks[:2]) == (truth, ("one", "two"))


def test_the_text() -> None:
    mapfile = Mapfile.untried(0x300000000).overlaid([(0, 0x10000, READ), (0x10000, 0x30000, BAD)])
    assert b"".join(mapfile.render()).decode().splitlines() == [
        "# current_pos  current_status  current_pass",
        "0x00000000     ?               1",
        "#      pos        size  status",
        "0x00000000  0x00010000  +",
        "0x00010000  0x00020000  -",
        "0x00030000  0x2FFFD0000  ?",
    ]
    done = mapfile.overlaid([(0x30000, 0x300000000, READ)])
    assert b"\n0x00000000     +               1\n" in b"".join(done.render())


def test_an_empty_disk_has_no_blocks() -> None:
    mapfile = Mapfile.untried(0)
    assert mapfile.blocks(UNTRIED, BAD, READ) == []
    assert parse_mapfile(b"".join(mapfile.render())).size == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", 1),
        (b"\0" * 100, 1),
        (b"# only a comment\n", 1),
        (b"QFI\xfb\0\0\0\3", 1),
        (b"0 ? 1\n0 16\n", 2),
        (b"0 ? 1\n0 0 +\n", 2),
        (b"0 ? 1\n\n0 16 +\n32 16 -\n", 4),
        (b"0 ? 1\n0 16 +\n8 16 -\n", 3),
        (b"0 ? 1\n0 16 x\n", 2),
        (b"0 ? 1\n0 16 +-\n", 2),
        (b"0 ? 1\n0 -16 +\n", 2),
        (b"0 ? 1\n0 0x8000000000000000 +\n", 2),
        (b"0 ? 1\n0 1e3 +\n", 2),
    ],
)
def test_what_is_no_mapfile(text, line) -> None:
    with pytest.raises(NotAMapfile) as caught:
        parse_mapfile(text)
    assert caught.value.line == line
    assert str(caught.value).startswith(f"line {line}: ")
