"""planner.rescue.headers: headers that are gone or make no sense, found by their tables."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.report import Report
from planner.metadata.work_limits import Limits
from planner.qcow2.extensions import (
    BACKING_FORMAT,
    BITMAPS,
    CRYPTO_HEADER,
    FEATURE_NAMES,
    read_extensions,
    refusable,
)
from planner.qcow2.header import Header, Incompatible, decode_header, encode_header
from planner.rescue import headers
from planner.rescue.headers import find_headers, with_fields
from planner.source import Bytes, Patched, Source, nonzero_words, read_bytes
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


PLAIN = {
    "version": 0x83,
    "backing_file_offset": 1 << 40,
    "cluster_bits": 80,
    "size": (1 << 60) + 64 * MIB,
    "crypt_method": 64,
    "l1_size": 0x80000001,
    "l1_table_offset": 0x30001,
    "refcount_table_offset": 0x10001,
    "refcount_table_clusters": 0x10000001,
    "nb_snapshots": 0x10000000,
    "snapshots_offset": 0x1001,
    "incompatible_features": 1 << 20,
    "refcount_order": 68,
    "header_length": 0x80000068,
}


@cache
def plain() -> bytes:
    """An image that an older version of the format can say as well."""
    builder = ImageBuilder(size=64 * MIB)
    for cluster in range(5):
        builder.write(cluster, b"data")
    return bytes(builder.build().data)


@pytest.mark.parametrize(("name", "value"), PLAIN.items())
def test_a_field_gets_back_what_it_had(name: str, value: int) -> None:
    data = plain()
    true = header_of(data)
    broken = encode_header(with_fields(true, {name: value}))
    best = find_headers(Bytes(broken + data[len(broken) :])).best
    assert best is not None
    assert best.changed == (name,)
    assert getattr(best.header, name) == getattr(true, name)
    assert not any(best.score)


@pytest.mark.parametrize("bit", [Incompatible.DATA_FILE, Incompatible.EXTENDED_L2])
def test_a_bit_under_which_the_tables_lead_elsewhere_is_taken_back(bit: Incompatible) -> None:
    data = plain()
    broken = encode_header(with_fields(header_of(data), {"incompatible_features": int(bit)}))
    best = find_headers(Bytes(broken + data[len(broken) :])).best
    assert best is not None
    assert best.changed == ("incompatible_features",)
    assert best.header.incompatible_features == 0


def test_a_disk_of_no_bytes_of_which_some_are_mapped_makes_no_sense() -> None:
    data = plain()
    broken = encode_header(with_fields(header_of(data), {"size": 0}))
    found = find_headers(Bytes(broken + data[len(broken) :]))
    assert found.best is not None
    assert found.best.changed == ("size",)
    assert found.size is not None
    assert found.best.header.size == found.size.size == 5 << 16
    empty = bytes(ImageBuilder(size=0).build().data)
    nothing = find_headers(Bytes(empty)).best
    assert nothing is not None
    assert nothing.changed == ()


NAMES = (FEATURE_NAMES, bytes(48))


@pytest.mark.parametrize(
    ("extensions", "kept"),
    [
        ([NAMES, (BACKING_FORMAT, b"raw"), (0x1234, b"x")], 2),
        ([NAMES, (BACKING_FORMAT, b"far too long a name"), NAMES], 1),
        ([(BITMAPS, bytes(25)), NAMES], 0),
        ([(CRYPTO_HEADER, bytes(16))], 0),
    ],
)
def test_of_extensions_those_stay_that_make_sense(
    extensions: list[tuple[int, bytes]], kept: int
) -> None:
    builder = ImageBuilder(size=MIB, more_extensions=tuple(extensions))
    data = bytearray(builder.build().data)
    if extensions[-1][0] == 0x1234:
        at = data.index((0x1234).to_bytes(4, "big"))
        data[at + 4 : at + 8] = (1 << 30).to_bytes(4, "big")
    source = Bytes(bytes(data))
    best = find_headers(source).best
    assert best is not None
    assert best.changed == ("extensions",)
    assert best.extensions_end is not None
    left = read_extensions(best.laid_over(source), best.header).all
    assert [(each.magic, each.data) for each in left] == extensions[:kept]
    assert not any(best.score)


def test_an_area_full_of_extensions_is_not_read_for_hundreds_of_hypotheses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = ((0x1234, b""),) * 100_000
    image = ImageBuilder(cluster_bits=21, size=MIB, more_extensions=many).build()
    image.change_header(refcount_table_offset=0, refcount_table_clusters=0)
    data, reads = bytes(image.data), list[int]()

    def counted(raw: bytes, room: int) -> tuple[list[int], int]:
        found = refusable(raw, room)
        reads.append(found[1])
        return found

    monkeypatch.setattr("planner.rescue.headers.refusable", counted)
    best = find_headers(Bytes(data)).best
    assert best is not None
    assert best.changed == ()
    assert sum(reads) <= 300_000


@pytest.mark.parametrize("length", [104, 112])
def test_of_the_lengths_of_a_header_the_one_is_taken_that_loses_no_extension(length: int) -> None:
    data = bytes(ImageBuilder(size=MIB, more_extensions=(NAMES,)).build().data)
    head = data[:100] + (3).to_bytes(4, "big") + data[112 - (length - 104) : 65536 - 8]
    source = Bytes(head.ljust(65536, b"\0") + data[65536:])
    best = find_headers(source).best
    assert best is not None
    assert (best.changed, best.header.header_length) == (("header_length",), length)
    assert NAMES[0] in {
        each.magic for each in read_extensions(best.laid_over(source), best.header).all
    }


@pytest.mark.parametrize("length", [4, 50, 72, 100])
def test_a_file_that_ends_in_its_header_has_none_that_is_believed(length: int) -> None:
    assert find_headers(Bytes(image()[:length])).best is None


def test_what_somebody_knows_is_taken() -> None:
    data = image()
    best = find_headers(Bytes(without_header(data)), assumed={"size": 5 * MIB}).best
    assert best is not None
    assert best.header.size == 5 * MIB


def test_the_header_of_a_like_image_is_enough_where_it_fits() -> None:
    data = image()
    like = header_of(data)
    found = find_headers(Bytes(without_header(data)), like=like)
    assert found.best is not None
    # Nothing vouches for bitmaps that another image has.
    assert found.best.header == with_fields(like, {"autoclear_features": 0})


@cache
def with_snapshots() -> bytes:
    """A disk of which a snapshot has the most, so that its L1 table explains nearly all."""
    builder = ImageBuilder(cluster_bits=12, size=8 * MIB)
    for cluster in range(0, 1500, 3):
        builder.write(cluster, b"data")
    builder.take_snapshot("before")
    builder.write(0, b"newer")
    return bytes(builder.build().data)


def lost_of(data: bytes, *names: str) -> bytes:
    header, damaged = header_of(data), bytearray(without_header(data))
    rng = random.Random(1)
    for name in names:
        start, length = {
            "l1": (header.l1_table_offset, header.l1_size * 8),
            "snapshots": (header.snapshots_offset, 4096),
        }[name]
        damaged[start : start + length] = rng.randbytes(length)
    return bytes(damaged)


@pytest.mark.parametrize("names", [("l1",), ("snapshots",), ("l1", "snapshots")])
@pytest.mark.parametrize("of", [{}, {"nb_snapshots": 0, "snapshots_offset": 0}, {"size": 4 * MIB}])
def test_the_header_of_a_like_image_is_preferred_where_more_is_damaged(
    names: tuple[str, ...], of: dict[str, int]
) -> None:
    data = with_snapshots()
    true = header_of(data)
    best = find_headers(Bytes(lost_of(data, *names)), like=with_fields(true, of)).best
    assert best is not None
    assert best.header.l1_table_offset == true.l1_table_offset
    assert best.header.refcount_table_offset == true.refcount_table_offset
    assert best.header.snapshots_offset in {0, true.snapshots_offset}
    if "size" in of and "l1" not in names:
        assert best.header.size >= 1500 << 12


def test_the_header_of_an_image_that_is_not_like_it_is_not_believed() -> None:
    data = with_snapshots()
    for fields in ({"cluster_bits": 16}, {"refcount_order": 6}, {"l1_table_offset": 40960}):
        like = with_fields(header_of(data), fields)
        best = find_headers(Bytes(without_header(data)), like=like).best
        assert best is not None
        assert agrees(best.header, header_of(data))


def test_a_header_that_is_there_stands_where_that_of_a_like_image_is_no_better() -> None:
    data = with_snapshots()
    like = with_fields(header_of(data), {"size": 16 * MIB})
    best = find_headers(Bytes(data), like=like).best
    assert best is not None
    assert best.changed == ()


def test_the_name_of_a_backing_file_that_is_gone_is_none() -> None:
    data = with_snapshots()
    like = with_fields(header_of(data), {"backing_file_offset": 512, "backing_file_size": 20})
    best = find_headers(Bytes(lost_of(data)), like=like).best
    assert best is not None
    assert best.header.backing_file_offset == best.header.backing_file_size == 0


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


@pytest.mark.parametrize("what", ["l2-garbage", "refcounts-garbage"])
@pytest.mark.parametrize(("bits", "order"), [(9, 0), (10, 4), (12, 4)])
def test_a_header_that_is_there_stands_where_another_leads_to_less_of_the_file(
    bits: int, order: int, what: str
) -> None:
    # Of tables that lead nowhere nothing is wrong, but that all that is counted leaks.
    rng, clusters = random.Random(0), 1 << 12
    made = ImageBuilder(cluster_bits=bits, size=clusters << bits, refcount_order=order)
    for _ in range(7):
        at, length = rng.randrange(clusters - 125), rng.choice([1, 16, 32, 125])
        made.write(at, b"".join((b"%d\n" % each).ljust(1 << bits, b"x") for each in range(length)))
    image = made.build()
    tables = [offset for index in range(4 * clusters >> bits) if (offset := image.l2_table(index))]
    hit = max(tables, key=lambda at: len(nonzero_words(image.source, at, 1 << bits >> 3)[0]))
    start = hit if what == "l2-garbage" else image.refblock(0)
    image.data[start : start + (1 << bits)] = random.Random(2).randbytes(1 << bits)
    found = find_headers(Bytes(bytes(image.data))).best
    assert found is not None
    assert found.changed == ()


@pytest.mark.parametrize("lost", [("l1_size", "refcount_table_offset"), TABLES[1:3]])
def test_of_fields_that_make_no_sense_none_else_changes(lost: tuple[str, ...]) -> None:
    # No table tells of a backing file, nor how large a disk is that nothing is written to behind.
    made = ImageBuilder(cluster_bits=12, size=16 * MIB, backing_file=b"base.raw")
    made.write(5, b"text" * 1000)
    made.write(700, b"more" * 5000)
    true = bytes(made.build().data)
    wrong = with_fields(header_of(true), {"l1_size": 0, **dict.fromkeys(lost, 0)})
    fields = encode_header(wrong)
    best = find_headers(Bytes(fields + true[len(fields) :])).best
    assert best is not None
    assert (best.header, best.score) == (header_of(true), (0, 0, 0))


def test_what_is_in_the_file_is_in_no_other_though_less_would_be_wrong_then() -> None:
    # The type of compression makes no sense, and no refcount is left.
    made = ImageBuilder(cluster_bits=12, size=16 * MIB)
    made.write(5, random.Random(1).randbytes(1 << 20))
    image = made.build()
    true = image.header
    image.data[image.refblock(0) : image.refblock(0) + 4096] = bytes(4096)
    image.data[104] ^= 1
    image.change_header(header_length=112)
    best = find_headers(image.source).best
    assert best is None or best.header.incompatible_features == true.incompatible_features


def test_tables_that_lead_to_themselves_end() -> None:
    words = (65536).to_bytes(8, "big") * 8192
    best = find_headers(Bytes(bytes(65536) + words * 4)).best
    assert best is None or any(best.score)


def test_no_table_of_data_is_tried_as_one_that_leads_to_tables() -> None:
    """Each of its clusters would be read as a table, and every word of it would be wrong."""
    rng = random.Random(1)
    builder = ImageBuilder(cluster_bits=16, size=64 * MIB)
    for cluster in range(280):
        builder.write(cluster, rng.randbytes(1 << 16))
    builder.take_snapshot("before")
    builder.write(0, rng.randbytes(1 << 16))
    data = bytes(builder.build().data)
    found = find_headers(Bytes(lost_of(data, "snapshots")))
    assert found.best is not None
    assert found.best.header.l1_table_offset == header_of(data).l1_table_offset
    assert max(each.counters.corruptions for each in found.hypotheses) < 50_000


def test_what_leaks_under_a_header_is_known_of_the_check_that_tried_it(monkeypatch) -> None:
    checked: list[bytes] = []

    def noting(source: Source, *, limits: Limits) -> Report:
        checked.append(read_bytes(source, 0, 1 << 16))
        return check_image(source, limits=limits)

    monkeypatch.setattr(headers, "check_image", noting)
    best = find_headers(Bytes(without_header(image()))).best
    assert best is not None
    assert best.counters.leaks
    assert len(checked) > 2
    assert not [one for one, other in pairwise(checked) if one == other]


def test_an_empty_disk_has_a_header_too() -> None:
    data = bytes(ImageBuilder().build().data)
    found = find_headers(Bytes(without_header(data)))
    assert found.best is None or not any(found.best.score)


class Noting(Patched):
    """A source that notes where reads begin."""

    def __init__(self, data: bytes) -> None:
        super().__init__(Bytes(data), 0, b"")
        self.reads: list[int] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append(offset)
        super().read_into(offset, buffer)


def test_refcounts_of_clusters_past_the_end_are_not_read_for_a_score() -> None:
    made = ImageBuilder(size=MIB)
    made.write(0, b"guest")
    blocks = made.place(b"\0\1" * (8 << 15))
    image = made.build()
    table = image.header.refcount_table_offset
    for number in range(8):
        image.set_word(table + 8 * (1 + number), blocks + (number << 16))
        image.set_refcount((blocks >> 16) + number, 1)
    image.data[:4] = bytes(4)
    source = Noting(bytes(image.data))
    best = find_headers(source).best
    assert best is not None
    assert best.changed == ("magic",)
    assert not [at for at in source.reads if blocks <= at < blocks + (8 << 16)]
