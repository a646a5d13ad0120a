"""planner.rescue.headers: headers that are gone or make no sense, found by their tables."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest

from planner.qcow2.header import Header, decode_header, encode_header
from planner.rescue.headers import find_headers, with_fields
from planner.source import Bytes
from tests.images.builder import MIB, ImageBuilder
from tests.instarfs.repair.test_run import healthy

TABLES = (
    "cluster_bits",
    "l1_table_offset",
    "refcount_table_offset",
    "refcount_order",
    "nb_snapshots",
    "snapshots_offset",
)


@cache
def image() -> bytes:
    return healthy()


def header_of(data: bytes) -> Header:
    return decode_header(data[:104])


def without_header(data: bytes) -> bytes:
    size = 1 << header_of(data).cluster_bits
    return bytes(size) + data[size:]


def agrees(found: Header, true: Header) -> bool:
    return all(getattr(found, name) == getattr(true, name) for name in TABLES)


def test_a_header_that_is_gone_is_found() -> None:
    data = image()
    best = find_headers(Bytes(without_header(data))).best
    assert best is not None
    assert agrees(best.header, header_of(data))
    # Its bitmaps stood behind the fields of the header: what they had is nobody's now.
    assert best.score == (0, 0, 3)


@pytest.mark.parametrize("garbage", [b"\xff", b"random"])
def test_it_does_not_matter_what_lies_there_instead(garbage: bytes) -> None:
    data = image()
    size = 1 << header_of(data).cluster_bits
    filled = random.Random(1).randbytes(size) if garbage == b"random" else garbage * size
    best = find_headers(Bytes(filled + data[size:])).best
    assert best is not None
    assert agrees(best.header, header_of(data))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("magic", 0),
        ("version", 7),
        ("cluster_bits", 3),
        ("cluster_bits", 13),
        ("crypt_method", 9),
        ("header_length", 3),
        ("refcount_order", 60),
        ("incompatible_features", 1 << 40),
        ("l1_table_offset", 0),
        ("l1_table_offset", 12345),
        ("l1_size", 0),
        ("refcount_table_offset", 0),
        ("refcount_table_offset", 1 << 62),
        ("refcount_table_clusters", 0),
        ("snapshots_offset", 1 << 40),
        ("size", 1 << 63),
    ],
)
def test_of_one_field_that_makes_no_sense_only_that_changes(name: str, value: int) -> None:
    data = image()
    true = header_of(data)
    broken = encode_header(with_fields(true, {name: value}))
    source = Bytes(broken + data[len(broken) :])
    best = find_headers(source).best
    assert best is not None
    assert best.changed == (name,)
    # What follows the fields stays as it is.
    assert len(best.content) <= 112
    assert not any(best.score)


def test_what_somebody_knows_is_taken() -> None:
    data = image()
    best = find_headers(Bytes(without_header(data)), assumed={"size": 5 * MIB}).best
    assert best is not None
    assert best.header.size == 5 * MIB


def test_the_header_of_a_like_image_is_enough_where_it_fits() -> None:
    data = image()
    found = find_headers(Bytes(without_header(data)), like=header_of(data))
    assert found.best is not None
    assert found.best.header == header_of(data)


@pytest.mark.parametrize("data", [b"", bytes(1 << 20), random.Random(2).randbytes(1 << 20)])
def test_where_there_are_no_tables_nothing_is_found(data: bytes) -> None:
    assert find_headers(Bytes(data)).best is None


def test_a_header_under_which_nothing_is_wrong_is_sound() -> None:
    best = find_headers(Bytes(image())).best
    assert best is not None
    assert (best.changed, any(best.score)) == ((), False)
    lost = find_headers(Bytes(without_header(image()))).best
    assert lost is not None
    assert lost.changed


def test_a_header_that_is_there_stands_where_no_other_leaves_less_wrong() -> None:
    # Without the snapshots that share it nothing contradicts its refcount; but much else leaks.
    data = bytearray(image())
    header = header_of(image())
    block = int.from_bytes(data[header.refcount_table_offset :][:8], "big")
    counts = np.frombuffer(data, dtype=">u2", count=1 << (header.cluster_bits - 1), offset=block)
    shared = int(np.flatnonzero(counts == 2)[0])
    del counts
    data[block + 2 * shared : block + 2 * shared + 2] = (1).to_bytes(2, "big")
    found = find_headers(Bytes(bytes(data))).best
    assert found is not None
    assert found.changed == ()


def test_tables_that_lead_to_themselves_end() -> None:
    words = (65536).to_bytes(8, "big") * 8192
    best = find_headers(Bytes(bytes(65536) + words * 4)).best
    assert best is None or any(best.score)


def test_an_empty_disk_has_a_header_too() -> None:
    data = bytes(ImageBuilder().build().data)
    found = find_headers(Bytes(without_header(data)))
    assert found.best is None or not any(found.best.score)
