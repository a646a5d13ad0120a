"""The snapshot table: entries there and back, their accessors, and where reading must stop."""

import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ImageError
from planner.qcow2 import snapshots as snapshots_module
from planner.qcow2.snapshots import (
    ENTRY_BYTES,
    MAX_SNAPSHOTS,
    MAX_TABLE_BYTES,
    Snapshot,
    Snapshots,
    SnapshotTable,
    decode_snapshot,
    encode_snapshot,
    read_reachable_snapshots,
    read_snapshots,
)
from planner.source import Bytes
from tests.images.builder import ImageBuilder
from tests.planner.answers import refusal

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
snapshots = st.builds(
    Snapshot,
    offset=st.just(0),
    l1_table_offset=u64,
    l1_size=u32,
    date_sec=u32,
    date_nsec=u32,
    vm_clock_nsec=u64,
    vm_state_size_32=u32,
    extra_data=st.binary(max_size=32),
    id_str=st.binary(max_size=12),
    name=st.binary(max_size=12),
)
EMPTY = Snapshot(0, 0, 0, 0, 0, 0, 0, b"", b"", b"")


def image_with(*names: str):
    builder = ImageBuilder(cluster_bits=9, size=1 << 15)
    for name in names:
        builder.take_snapshot(name)
    return builder.build()


def table_of(image) -> SnapshotTable:
    return read_snapshots(image.source, image.header, image.geometry)


def test_entry_is_40_bytes() -> None:
    assert ENTRY_BYTES == 40


@given(snapshot=snapshots, before=st.integers(0, 9).map(lambda n: n * 8))
def test_entry_comes_back_the_same(snapshot, before) -> None:
    raw = encode_snapshot(snapshot)
    assert len(raw) % 8 == 0
    source = Bytes(bytes(before) + raw)
    assert decode_snapshot(source, before) == replace(snapshot, offset=before)


@given(listed=st.lists(snapshots | st.just(EMPTY), max_size=6))
def test_columns_say_what_each_snapshot_says(listed) -> None:
    raw = [encode_snapshot(snapshot) for snapshot in listed]
    start = np.cumsum([0, *map(len, raw)])[:-1]
    table = Snapshots(b"".join(raw), start, start)
    assert table.vm_state_sizes().tolist() == [each.vm_state_size for each in listed]
    assert table.names() == [each.id_str + each.name for each in listed]
    there = [each for each in table if each != replace(EMPTY, offset=each.offset)]
    assert list(table.without_zeros()) == table.there() == there


@given(raw=st.binary(max_size=80))
def test_any_bytes_decode_and_come_back_the_same_or_are_refused(raw) -> None:
    error = refusal(decode_snapshot, Bytes(raw), 0)
    if error is not None:
        assert error.field == "extra_data_size"
        return
    snapshot = decode_snapshot(Bytes(raw), 0)
    end = ENTRY_BYTES + len(snapshot.extra_data) + len(snapshot.id_str) + len(snapshot.name)
    assert encode_snapshot(snapshot)[: min(end, len(raw))] == raw[:end]


@pytest.mark.parametrize(
    ("extra", "vm_state", "disk", "icount"),
    [
        (b"", 7, None, None),
        (bytes(7), 7, None, None),
        ((1 << 33).to_bytes(8, "big"), 1 << 33, None, None),
        (bytes(8) + (1 << 40).to_bytes(8, "big"), 0, 1 << 40, None),
        (bytes(16) + (5).to_bytes(8, "big"), 0, 0, 5),
        (bytes(16) + b"\xff" * 8, 0, 0, None),
        (bytes(16) + (5).to_bytes(8, "big") + b"unknown more", 0, 0, 5),
    ],
)
def test_extra_data_says_as_much_as_it_has(extra, vm_state, disk, icount) -> None:
    snapshot = replace(EMPTY, vm_state_size_32=7, extra_data=extra)
    assert (snapshot.vm_state_size, snapshot.disk_size, snapshot.icount) == (
        vm_state, disk, icount,
    )  # fmt: skip


def test_table_lists_snapshots_in_order() -> None:
    table = table_of(image_with("one", "second", "third one"))
    assert [snapshot.name for snapshot in table.snapshots] == [b"one", b"second", b"third one"]
    assert [snapshot.id_str for snapshot in table.snapshots] == [b"1", b"2", b"3"]
    offsets = [snapshot.offset - table.offset for snapshot in table.snapshots]
    assert offsets == [0, 64, 128]  # 40 + 16 of extra data + id + name, padded to 8


def test_length_of_the_table_leaves_out_the_last_padding() -> None:
    assert table_of(image_with("one")).length == 40 + 16 + 1 + 3


def test_no_snapshots_is_an_empty_table() -> None:
    table = table_of(image_with())
    assert (table.length, len(table.snapshots)) == (0, 0)


def test_entries_past_the_end_of_the_file_are_snapshots_of_nothing() -> None:
    image = image_with("one")
    image.change_header(nb_snapshots=3, snapshots_offset=len(image.data))
    table = table_of(image)
    assert [snapshot.l1_size for snapshot in table.snapshots] == [0, 0, 0]
    assert table.length == 3 * ENTRY_BYTES


def with_snapshots_offset(offset: int):
    image = image_with("one")
    image.change_header(snapshots_offset=offset)
    return image


def with_count(count: int):
    image = image_with("one")
    image.change_header(nb_snapshots=count)
    return image


def with_extra_data_size(size: int):
    image = image_with("one", "two")
    at = image.snapshots[1].offset + 36
    image.data[at : at + 4] = size.to_bytes(4, "big")
    return image


def test_table_over_its_limit_is_refused(monkeypatch) -> None:
    assert snapshots_module.MAX_TABLE_BYTES == 64 << 20
    monkeypatch.setattr(snapshots_module, "MAX_TABLE_BYTES", 200)
    assert len(table_of(image_with("one", "two", "three")).snapshots) == 3  # 189 bytes
    with pytest.raises(ImageError, match="over 64 MiB") as caught:
        table_of(image_with("one", "two", "three", "four"))
    assert caught.value.field == "snapshot table"


STOPS = {
    "one snapshot too many": (lambda: with_count(MAX_SNAPSHOTS + 1), "nb_snapshots"),
    "as many as the field holds": (lambda: with_count((1 << 32) - 1), "nb_snapshots"),
    "table misaligned": (lambda: with_snapshots_offset(520), "snapshots_offset"),
    "table past 2^63": (lambda: with_snapshots_offset(1 << 63), "snapshots_offset"),
    "table at the end of any file": (
        lambda: with_snapshots_offset((1 << 63) - 512),
        "snapshots_offset",
    ),
    "extra data over 1024 bytes": (lambda: with_extra_data_size(1025), "extra_data_size"),
    "extra data of 4 GiB": (lambda: with_extra_data_size((1 << 32) - 1), "extra_data_size"),
}


@pytest.mark.parametrize(("make", "field"), STOPS.values(), ids=STOPS)
def test_table_that_cannot_be_read_is_refused(make, field) -> None:
    with pytest.raises(ImageError) as caught:
        table_of(make())
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_extra_data_of_1024_bytes_is_read() -> None:
    builder = ImageBuilder(cluster_bits=9, size=1 << 15)
    builder.take_snapshot("x", extra_data=b"e" * 1024)
    assert table_of(builder.build()).snapshots[0].extra_data == b"e" * 1024


# ---- what can be reached of a table that cannot be read ----


def reached(image, data: bytes | None = None) -> list[bytes]:
    source = Bytes(data or bytes(image.data))
    table, error = read_reachable_snapshots(source, image.header, image.geometry)
    assert error is not None
    return [snapshot.name for snapshot in table.snapshots]


def with_field(image, index: int, at: int, width: int, value: int):
    place = table_of(image).snapshots[index].offset + at
    image.data[place : place + width] = value.to_bytes(width, "big")
    return image


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_is_in_front_of_garbage_and_behind_it_can_be_reached(index) -> None:
    image = image_with("one", "two", "three")
    at = table_of(image).snapshots[index].offset
    image.data[at : at + 40] = b"\xff" * 40
    names = [b"one", b"two", b"three"]
    del names[index]
    assert reached(image) == names


@pytest.mark.parametrize("size", [1025, 1 << 16, (1 << 32) - 1])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_an_entry_whose_length_of_extra_data_alone_is_wrong_is_read_as_it_was(size, index) -> None:
    image = image_with("one", "two", "three")
    before = list(table_of(image).snapshots)
    with_field(image, index, 36, 4, size)
    table, _ = read_reachable_snapshots(image.source, image.header, image.geometry)
    assert list(table.snapshots) == before


def test_extra_data_that_is_there_is_cut_to_what_has_a_meaning() -> None:
    image = image_with("one")
    l1 = table_of(image).snapshots[0].l1_table_offset
    long = replace(
        EMPTY, l1_table_offset=l1, l1_size=1, extra_data=bytes(range(200)) * 6, id_str=b"1"
    )
    data = bytearray(image.data).ljust(1 << 15, b"\0")
    at = image.header.snapshots_offset
    entry = encode_snapshot(long)
    data[at : at + len(entry)] = entry
    table, _ = read_reachable_snapshots(Bytes(bytes(data)), image.header, image.geometry)
    assert list(table.snapshots) == [replace(long, offset=at, extra_data=bytes(range(24)))]


@pytest.mark.parametrize("value", [0, 1, 512 * 1000], ids=["none", "misaligned", "past the end"])
def test_an_entry_without_an_l1_table_cannot_be_reached(value) -> None:
    image = image_with("one", "two", "three")
    with_field(image, 0, 36, 4, 1025)
    at = image.header.snapshots_offset + table_of(image_with("one", "two")).length + 7 & ~7
    image.data[at : at + 8] = value.to_bytes(8, "big")
    assert reached(image) == [b"one", b"two"]


def test_an_entry_whose_names_cannot_be_found_is_reached_without_them() -> None:
    image = image_with("one", "two")
    with_field(image, 1, 12, 4, 0xFFFF_FFFF)
    with_field(image, 1, 36, 4, 1 << 20)
    assert reached(image) == [b"one", b""]


def test_of_more_snapshots_than_there_can_be_those_in_the_file_can_be_reached() -> None:
    image = image_with("one", "two")
    image.change_header(nb_snapshots=(1 << 32) - 1)
    assert reached(image) == [b"one", b"two"]


def test_of_a_misplaced_table_nothing_can_be_reached() -> None:
    image = image_with("one")
    image.change_header(snapshots_offset=image.header.snapshots_offset + 8)
    assert reached(image) == []


# ---- the table as a whole, against its entries one by one ----


def one_by_one(source, header, geometry):
    """What `read_snapshots` must find, an entry at a time, each read on its own."""
    found, position = [], header.snapshots_offset
    for _ in range(header.nb_snapshots):
        position = (position + 7) & ~7
        snapshot = decode_snapshot(source, position)
        found.append(snapshot)
        position += ENTRY_BYTES + len(snapshot.extra_data)
        position += len(snapshot.id_str) + len(snapshot.name)
        if position - header.snapshots_offset > MAX_TABLE_BYTES:
            raise ImageError("snapshot table", position - header.snapshots_offset, "over 64 MiB")
    return position - header.snapshots_offset, found


def answer_of(read):
    try:
        return read()
    except ImageError as error:
        return str(error)


def assert_read_the_same(source, count) -> None:
    image = image_with()
    header = replace(image.header, snapshots_offset=512, nb_snapshots=count)

    def whole():
        table = read_snapshots(source, header, image.geometry)
        assert len(table.snapshots) == count
        assert [table.snapshots[at] for at in range(count)] == list(table.snapshots)
        return table.length, list(table.snapshots)

    slow = answer_of(lambda: one_by_one(source, header, image.geometry))
    assert answer_of(whole) == slow


@given(
    table=st.lists(st.binary(max_size=90) | snapshots.map(encode_snapshot), max_size=8),
    more=st.integers(0, 3),
    read_bytes=st.sampled_from([ENTRY_BYTES, 100, 64 << 10]),
)
def test_a_table_read_ahead_is_the_same_as_its_entries(table, more, read_bytes) -> None:
    source = Bytes(bytes(512) + b"".join(table))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots_module, "READ_BYTES", read_bytes)
        assert_read_the_same(source, len(table) + more)


@given(
    runs=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from((0, 3, 8, 60)), st.sampled_from((0, 16))),
        max_size=6,
    ),
    more=st.integers(0, 3),
    read_bytes=st.sampled_from([ENTRY_BYTES, 100, 1000, 64 << 10]),
)
def test_a_table_of_entries_that_are_alike_is_the_same_as_each(runs, more, read_bytes) -> None:
    entries = [
        replace(EMPTY, l1_table_offset=at, extra_data=bytes(extra), name=b"n" * name)
        for count, name, extra in runs
        for at in range(count)
    ]
    source = Bytes(bytes(512) + b"".join(map(encode_snapshot, entries)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots_module, "READ_BYTES", read_bytes)
        assert_read_the_same(source, len(entries) + more)


def test_a_long_table_is_the_same_as_its_entries() -> None:
    rng = random.Random(1)
    entries = [
        replace(
            EMPTY,
            l1_table_offset=number,
            extra_data=rng.randbytes(rng.choice((0, 16, 16, 24, 1024, 8))),
            name=rng.randbytes(rng.choice((0, 3, 9, 300, 65535))),
        )
        for number in range(500)
    ]
    table = b"".join(map(encode_snapshot, entries))
    assert_read_the_same(Bytes(bytes(512) + table), 500)
    assert_read_the_same(Bytes(bytes(512) + table[:-2000]), 520)


def test_nothing_behind_the_table_is_read() -> None:
    class Watched(Bytes):
        end = 0

        def read_into(self, offset, buffer) -> None:
            type(self).end = max(self.end, offset + len(buffer))
            super().read_into(offset, buffer)

    image = image_with(*("x" * (n % 60) for n in range(3000)))
    table = read_snapshots(Watched(bytes(image.data)), image.header, image.geometry)
    assert len(table.snapshots) == 3000
    assert Watched.end == table.offset + table.length


def test_entries_as_columns_are_those_of_the_snapshots() -> None:
    table = table_of(image_with("one", "second", "third one"))
    fields = table.snapshots.fields()
    assert fields["l1_table_offset"].tolist() == [s.l1_table_offset for s in table.snapshots]
    assert fields["extra_data_size"].tolist() == [16, 16, 16]
    assert table.snapshots[-1] == table.snapshots[2]
    assert table.snapshots[1:] == (table.snapshots[1], table.snapshots[2])
    with pytest.raises(IndexError):
        table.snapshots[3]
    assert table.snapshots == table_of(image_with("one", "second", "third one")).snapshots
    assert table.snapshots != table_of(image_with("one", "second", "third two")).snapshots


def test_as_many_snapshots_as_there_can_be_cost_little_more_than_their_bytes() -> None:
    entry = encode_snapshot(replace(EMPTY, extra_data=bytes(16), id_str=b"12345", name=b"snapshot"))
    source = Bytes(bytes(512) + entry * MAX_SNAPSHOTS)
    header = replace(image_with().header, snapshots_offset=512, nb_snapshots=MAX_SNAPSHOTS)
    tracemalloc.start()
    try:
        table = read_snapshots(source, header, header.geometry)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(table.snapshots) == MAX_SNAPSHOTS
    assert held < 2 * len(source.data)
    assert peak < 6 * len(source.data)


def test_an_entry_of_zeros_is_not_there() -> None:
    header = replace(image_with().header, snapshots_offset=512, nb_snapshots=4)
    entry = encode_snapshot(replace(EMPTY, extra_data=bytes(8)))
    source = Bytes(bytes(512) + bytes(40) + entry + bytes(40))
    there = read_snapshots(source, header, header.geometry).snapshots.there()
    assert [each.offset for each in there] == [552]
    assert Snapshots().there() == []
