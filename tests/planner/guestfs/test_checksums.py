"""planner.guestfs.checksums: sums of many rows at once, and what a sum had begun with."""

from __future__ import annotations

import numpy as np
import pytest

from planner.guestfs.checksums import crc, crc_before


@pytest.mark.parametrize("size", [0, 1, 4, 255, 256, 1012, 1020, 4084, 4096])
def test_what_a_sum_began_with_comes_back_from_it(size: int) -> None:
    rng = np.random.default_rng(size)
    rows = rng.integers(0, 256, (70, size), dtype=np.uint8)
    begun = rng.integers(0, 1 << 32, len(rows), dtype=np.uint64).astype(np.uint32)
    value = crc(rows, begun)
    was = value.copy()
    assert crc_before(value, rows).tolist() == begun.tolist()
    assert value.tolist() == was.tolist()


def test_of_no_rows_there_are_no_sums() -> None:
    none = np.zeros(0, dtype=np.uint32)
    assert len(crc_before(none, np.zeros((0, 256), dtype=np.uint8))) == 0
