"""planner.check.held: metadata held still, and whether it was."""

import numpy as np
import pytest

from planner.arrays import I64
from planner.check import held as held_module
from planner.check.held import Held
from planner.source import read_bytes
from tests.planner.changing import Changing
from tests.planner.sources import Sparse

KIB = 1024


def ranges(*pairs: tuple[int, int]) -> tuple[I64, I64]:
    start, end = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return start, end


@pytest.fixture
def image() -> Changing:
    return Changing(bytearray(bytes(range(256)) * 64))


@pytest.fixture(params=[True, False], ids=["whole", "digests"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(held_module, "WHOLE_BYTES", 0)
    return bool(request.param)


def test_two_looks_with_nothing_between(image: Changing, whole: bool) -> None:
    held = Held(image.look)
    assert held.add(*ranges((1024, 2048), (4096, 8192)))
    assert held.look_again()
    assert held.look_again() == 0
    assert held.is_whole is whole


def test_each_word_that_differs_counts(image: Changing) -> None:
    held = Held(image.look)
    held.add(*ranges((1024, 2048), (4096, 8192)))
    held.look_again()
    image.data[1024] ^= 1
    image.data[1031] ^= 1
    image.data[8184] ^= 1
    image.data[8192] ^= 1  # not held
    assert held.look_again() == 2
    assert held.look_again() == 0


def test_a_change_shows_in_digests_too(image: Changing, whole: bool) -> None:
    held = Held(image.look)
    held.add(*ranges((1024, 2048)))
    held.look_again()
    image.data[1500] ^= 1
    assert held.look_again() > 0
    assert held.look_again() == 0


def test_what_is_held_reads_as_it_was_and_the_rest_as_it_is(image: Changing) -> None:
    held = Held(image.look)
    held.add(*ranges((1024, 2048), (4096, 8192)))
    held.look_again()
    before = bytes(image.data)
    image.data[:] = bytes(len(before))
    expected = bytearray(len(before))
    for start, end in ((1024, 2048), (4096, 8192)):
        expected[start:end] = before[start:end]
    for offset, length in ((1024, 1024), (1030, 7), (0, 8 * KIB), (2000, 3000), (5000, 9000)):
        assert read_bytes(held, offset, length) == bytes(expected[offset : offset + length])


def test_digests_hold_no_bytes(image: Changing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "WHOLE_BYTES", 0)
    held = Held(image.look)
    held.add(*ranges((1024, 2048)))
    held.look_again()
    image.data[1024] ^= 0xFF
    assert read_bytes(held, 1024, 1)[0] == image.data[1024]


def test_adding_what_is_held_already_is_nothing_new(image: Changing) -> None:
    held = Held(image.look)
    assert held.add(*ranges((1024, 2048)))
    assert not held.add(*ranges((1024, 1100), (1536, 2040)))
    assert held.add(*ranges((2048, 2049)))
    assert held.look_again() > 0


def test_what_lies_past_the_end_is_not_held_and_a_file_may_grow(image: Changing) -> None:
    held = Held(image.look)
    size = held.size
    held.add(*ranges((size - 512, size + 4096), (size + 8192, size + 9000)))
    held.look_again()
    image.data += bytes(4096)
    assert held.look_again() == 0
    assert held.size == size + 4096
    del image.data[size:]
    assert held.look_again() > 0


def test_holes_of_long_ranges_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "READ_ANYWAY_BYTES", 4096)
    source = Sparse({0: b"a" * 512, 1 << 20: b"b" * 512}, 1 << 40)
    held = Held(lambda: source)
    held.add(*ranges((0, 1 << 40)))
    held.look_again()
    assert source.bytes_read == 1024
    source.blocks[2000] = b"c" * 512
    assert held.look_again() > 0
    assert held.look_again() == 0


def test_what_is_held_may_be_data_where_there_is_a_hole_by_now() -> None:
    source = Sparse({8: b"a" * 512}, 1 << 20)
    held = Held(lambda: source)
    held.add(*ranges((4096, 4608), (8192, 8704)))
    held.look_again()
    source.blocks.clear()
    assert list(held.data_extents(0, 1 << 20)) == [(4096, 4608), (8192, 8704)]
    assert list(held.data_extents(4100, 4200)) == [(4100, 4608), (8192, 8300)]
