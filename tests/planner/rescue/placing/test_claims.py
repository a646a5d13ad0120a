"""planner.rescue.placing.claims: where magics are in the bytes of clusters, and where data ends."""

from __future__ import annotations

import random

import numpy as np
import pytest

from planner.rescue.placing import content
from planner.rescue.placing.claims import Piece, Sort
from planner.source import SECTOR

MAGICS = (b"IN", b"XFSB", b"\0\0\0\0\x0c\0\0\xde", b"\x0c\0\x01", b"\x3b\xee\0\0", b"EFI PART")


@pytest.mark.parametrize("magic", MAGICS)
@pytest.mark.parametrize(("offset", "step"), [(0, 512), (40, 256), (56, 512), (1012, 1024)])
def test_a_magic_is_found_wherever_it_stands(magic: bytes, offset: int, step: int) -> None:
    rng = random.Random(1)
    data = bytearray(rng.randbytes(64 << 10))
    wanted = sorted(rng.sample(range(0, len(data), step), 9))
    for at in wanted:
        data[at + offset : at + offset + len(magic)] = magic
    almost = wanted[4] + offset + len(magic) - 1
    data[almost] ^= 1
    piece = Piece(np.frombuffer(bytes(data), dtype=np.uint8), 4096)
    assert piece.marked(magic, offset, step).tolist() == [*wanted[:4], *wanted[5:]]


def test_no_magic_is_looked_for_in_pieces_that_are_larger_than_a_cluster() -> None:
    piece = Piece(np.frombuffer(b"FILE" * 1024, dtype=np.uint8), 512)
    assert len(piece.marked(b"FILE", 0)) == 8
    assert not len(piece.marked(b"FILE", 0, 1024))


def test_of_each_sector_that_ends_in_zeros_it_is_told_how_much_is_filled() -> None:
    rng = random.Random(1)
    lengths = [rng.randrange(1, SECTOR + 1) for _ in range(500)] + [*range(500, SECTOR + 1)]
    # Each begins a kilobyte, and nothing follows in it.
    data = b"".join(bytes(n - 1) + b"\x07" + bytes(2 * SECTOR - n) for n in lengths)
    found = list(content.spot(Piece(np.frombuffer(data, dtype=np.uint8), 1024)))
    ((sort, at, filled, _),) = found
    told = [(number, n) for number, n in enumerate(lengths) if n <= content.LONGEST]
    assert sort is Sort.END
    assert list(zip((at // SECTOR // 2).tolist(), filled.tolist(), strict=True)) == told


def test_what_goes_on_in_its_kilobyte_does_not_end_there() -> None:
    data = b"\x01" + bytes(SECTOR - 1) + b"\x02" + bytes(SECTOR - 1)
    ((_, at, filled, _),) = content.spot(Piece(np.frombuffer(data, dtype=np.uint8), 1024))
    assert (at.tolist(), filled.tolist()) == ([SECTOR], [1])
