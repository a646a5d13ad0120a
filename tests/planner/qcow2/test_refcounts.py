"""Refcount blocks: every width there and back, and the specification's bit order."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.qcow2.refcounts import (
    count_from,
    counts_from,
    pack_refcounts,
    read_refcount_in_block,
    unpack_refcounts,
)

ORDERS = range(7)


def blocks(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def stored_refcount(block: bytes, index: int, order: int) -> int:
    """One refcount as QEMU's get_refcount_ro0 to get_refcount_ro6 read it."""
    bits = 1 << order
    if bits < 8:
        per_byte = 8 // bits
        return block[index // per_byte] >> bits * (index % per_byte) & ((1 << bits) - 1)
    width = bits // 8
    return int.from_bytes(block[index * width : (index + 1) * width], "big")


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.binary(min_size=64, max_size=64))
def test_unpacking_follows_the_specification(order, data) -> None:
    values = unpack_refcounts(blocks(data), order)
    expected = [stored_refcount(data, index, order) for index in range(64 * 8 >> order)]
    assert values.tolist() == expected


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.binary(min_size=64, max_size=64))
def test_bytes_come_back_the_same(order, data) -> None:
    assert pack_refcounts(unpack_refcounts(blocks(data), order), order).tobytes() == data


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
def test_refcounts_come_back_the_same(order, data) -> None:
    top = (1 << (1 << order)) - 1
    values = data.draw(st.lists(st.integers(0, top), min_size=8, max_size=8))
    packed = pack_refcounts(np.array(values, dtype=np.uint64), order)
    assert packed.nbytes == 1 << order
    assert unpack_refcounts(packed, order).tolist() == values


@pytest.mark.parametrize(
    ("order", "data", "expected"),
    [
        (0, b"\x05", [1, 0, 1, 0, 0, 0, 0, 0]),
        (1, b"\xe4", [0, 1, 2, 3]),
        (2, b"\x21\x43", [1, 2, 3, 4]),
        (3, b"\x01\xff", [1, 255]),
        (4, b"\x01\x02\xff\xff", [0x102, 0xFFFF]),
        (5, b"\x01\x02\x03\x04", [0x1020304]),
        (6, b"\x01\x02\x03\x04\x05\x06\x07\x08", [0x102030405060708]),
    ],
)
def test_bit_and_byte_order(order, data, expected) -> None:
    assert unpack_refcounts(blocks(data), order).tolist() == expected
    assert pack_refcounts(np.array(expected, dtype=np.uint64), order).tobytes() == data


@pytest.mark.parametrize("order", ORDERS)
def test_many_blocks_at_once(order) -> None:
    data = bytes(range(256)) * 6
    table = unpack_refcounts(blocks(data).reshape(3, 512), order)
    assert table.shape == (3, 512 * 8 >> order)
    each = [unpack_refcounts(blocks(data[at : at + 512]), order) for at in (0, 512, 1024)]
    assert np.array_equal(table, np.stack(each))
    assert pack_refcounts(table, order).tobytes() == data


@pytest.mark.parametrize(
    ("order", "dtype"),
    [(0, "u1"), (1, "u1"), (2, "u1"), (3, "u1"), (4, "u2"), (5, "u4"), (6, "u8")],
)
def test_native_order_in_the_smallest_type(order, dtype) -> None:
    assert unpack_refcounts(blocks(bytes(64)), order).dtype == np.dtype(dtype)


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.binary(min_size=64, max_size=64), indices=st.lists(st.integers(0, 7), max_size=5))
def test_single_refcounts_of_a_block(order, data, indices) -> None:
    found = read_refcount_in_block(blocks(data), np.array(indices, dtype=np.int64), order)
    assert found.tolist() == [stored_refcount(data, index, order) for index in indices]


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
def test_whether_anything_is_counted_from_a_number_on(order, data) -> None:
    count = 64 * 8 >> order
    used = data.draw(st.integers(0, count - 1))
    first = data.draw(st.integers(max(0, used - 2), used + 2) | st.integers(0, 2 * count))
    values = np.zeros(count, dtype=np.uint64)
    values[used] = 1
    assert counts_from(pack_refcounts(values, order), first, order) == (used >= first)


@pytest.mark.parametrize("order", ORDERS)
@given(data=st.data())
def test_those_from_some_number_on_are_counted(order: int, data: st.DataObject) -> None:
    count = 512 >> order
    block = blocks(data.draw(st.binary(min_size=64, max_size=64)))
    first = data.draw(st.integers(0, count))
    assert count_from(block, first, order) == np.count_nonzero(
        unpack_refcounts(block, order)[first:]
    )


def peak_of(work: Callable[[], object]) -> int:
    """The most memory that *work* takes, in bytes."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", ORDERS)
def test_no_more_of_a_large_block_is_unpacked_than_is_asked_for(order) -> None:
    block = np.ones(2 << 20, dtype=np.uint8)
    last = (len(block) << 3 >> order) - 1
    assert peak_of(lambda: read_refcount_in_block(block, np.array([0, last]), order)) < 1 << 16
    assert peak_of(lambda: counts_from(block, last, order)) < 1 << 16


@pytest.mark.parametrize("order", ORDERS)
def test_unpacking_takes_what_its_result_does(order) -> None:
    block = np.ones(1 << 18, dtype=np.uint8)
    unpack_refcounts(block, order)
    result = unpack_refcounts(block, order).nbytes
    assert peak_of(lambda: unpack_refcounts(block, order)) < 1.5 * result
