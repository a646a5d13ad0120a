"""instarfs.render.guest_map: how long the map is, told without making it."""

from itertools import pairwise

import numpy as np
import pytest

from instarfs.render.guest_map import ROWS_A_PART, map_json, map_json_length
from planner.guest.chain import Member, Named, Role
from planner.guest.extents import UNKNOWN, Extents
from planner.guest.mapping import Flaw
from planner.qcow2.entries import NO_HOST

BACKING = Member(0, Named(Role.BACKING, b'base \xff"', b"raw"), None, "it is not there: \u00e9")


def rows(count: int, rng: np.random.Generator) -> Extents:
    """So many, with numbers of any length."""
    numbers = np.sort(10 ** rng.integers(0, 18, (3, count)) - rng.integers(0, 2, (3, count)))
    flags = rng.integers(0, 2, (4, count)).astype(np.bool_)
    flaws = rng.choice([*map(int, Flaw), UNKNOWN], count).astype(np.uint8)
    offset = np.where(rng.integers(0, 3, count) == 0, NO_HOST, numbers[2])
    depth = rng.integers(0, 65, count).astype(np.int32)
    present, zero, data, compressed = flags
    return Extents(numbers[0], numbers[1], depth, present, zero, data, compressed, offset, flaws)


@pytest.mark.parametrize("members", [(), (BACKING,)], ids=["alone", "with a backing file"])
@pytest.mark.parametrize("counts", [(), (0,), (1,), (5, 0, 7), (ROWS_A_PART, 2 * ROWS_A_PART + 1)])
def test_the_length_of_the_map_is_that_of_what_is_made(counts, members) -> None:
    rng = np.random.default_rng(sum(counts))
    batches = [rows(count, rng) for count in counts]
    assert map_json_length(batches, members) == sum(map(len, map_json(batches, members)))


def test_powers_of_ten_have_a_digit_more_than_what_is_below() -> None:
    lengths = []
    for number in (0, 9, 10, 99, 100, 10**17 - 1, 10**17, 10**18 - 1, 10**18):
        row = rows(1, np.random.default_rng(1))
        row.start[0] = number
        lengths.append(map_json_length([row], ()))
    steps = [later - earlier for earlier, later in pairwise(lengths)]
    assert steps == [0, 1, 0, 1, 14, 1, 0, 1]
