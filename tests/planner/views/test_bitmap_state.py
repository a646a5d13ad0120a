"""What is dirty in a bitmap, bit by bit, and what is wrong with one beside the others."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from planner.errors import Cancelled, ImageError
from planner.metadata import work_limits
from planner.metadata.work_limits import Limits
from planner.progress import unless
from planner.qcow2.bitmaps import ENTRY_BYTES, IN_USE, encode_bitmap
from planner.qcow2.layout import Layout
from planner.source import Bytes, Source
from planner.views.bitmap_state import BitmapState, BitmapStates, read_bitmap_states
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import SIZE, builder, fill, plain
from tests.planner.sources import Sparse


def states(source: Source) -> BitmapStates:
    return read_bitmap_states(source)


def only(source: Source) -> BitmapState:
    (state,) = states(source).bitmaps
    return state


def with_bitmaps(*dirty: set[int], size: int = 1 << 26, granularity_bits: int = 9) -> Image:
    made = builder(size=size)
    for number, bits in enumerate(dirty):
        made.add_bitmap(f"bitmap {number}", bits, granularity_bits=granularity_bits)
    return made.build()


def dirty_bytes(bits: set[int], size: int, granularity: int) -> int:
    """The answer, one bit after the other."""
    return sum(
        max(0, min(granularity, size - bit * granularity))
        for bit in bits
        if bit * granularity < size
    )


@pytest.mark.parametrize("granularity_bits", [9, 12, 16, 20])
@pytest.mark.parametrize("size", [512, 1 << 16, (1 << 26) - 512, 1 << 26, 300 * 512])
def test_dirty_bytes(size: int, granularity_bits: int) -> None:
    rng = random.Random(size + granularity_bits)
    number = -(-size >> granularity_bits)
    for share in (0.01, 0.5, 1.0):
        bits = {bit for bit in range(number) if rng.random() < share} | {number - 1}
        image = with_bitmaps(bits, size=size, granularity_bits=granularity_bits)
        assert only(image.source).dirty == dirty_bytes(bits, size, 1 << granularity_bits)


def test_bits_behind_the_disk_are_not_dirty() -> None:
    image = with_bitmaps({0, 5}, size=3000 * 512)
    table = image.bitmaps[0].bitmap_table_offset
    data = image.word(table)
    image.data[data : data + SIZE] = b"\xff" * SIZE
    assert only(image.source).dirty == 3000 * 512


@pytest.mark.parametrize("size", [1 << 26, (1 << 26) - 512, (1 << 24) + 512])
def test_an_entry_of_all_ones_needs_no_bits(size: int) -> None:
    image = with_bitmaps({1}, size=size)
    table, span = image.bitmaps[0].bitmap_table_offset, SIZE * 8 * 512
    entries = image.bitmaps[0].bitmap_table_size
    for index in range(entries):
        image.set_word(table + 8 * index, 1)
    state = only(image.source)
    assert (state.dirty, state.data_clusters, state.errors) == (size, 0, ())
    image.set_word(table + 8 * (entries - 1), 0)
    assert only(image.source).dirty == (entries - 1) * span


def test_several_bitmaps_each_have_their_own() -> None:
    image = with_bitmaps({1}, {1, 2}, set())
    found = states(image.source)
    assert [state.dirty for state in found.bitmaps] == [512, 1024, 0]
    assert [state.data_clusters for state in found.bitmaps] == [1, 1, 0]
    assert [state.bitmap.name for state in found.bitmaps] == [b"bitmap 0", b"bitmap 1", b"bitmap 2"]
    assert (found.error, found.stale) == (None, False)


def test_an_invalid_entry_is_named_and_the_rest_is_counted() -> None:
    image = with_bitmaps({1, 1 << 16}, {7})
    table = image.bitmaps[0].bitmap_table_offset
    image.set_bits(table, 1 << 60)
    first, second = states(image.source).bitmaps
    assert first.dirty == 512
    assert "1 invalid entries" in str(first.errors[0])
    assert (second.dirty, second.errors) == (512, ())


def test_data_past_the_end_is_named_and_reads_as_zeros() -> None:
    image = with_bitmaps({1, 1 << 16}, {7})
    image.set_word(image.bitmaps[0].bitmap_table_offset, len(image.data) + 9 * SIZE)
    first, second = states(image.source).bitmaps
    assert first.dirty == 512
    assert "1 data clusters lie past the end" in str(first.errors[0])
    assert not second.errors


def change_entry(image: Image, number: int, **fields: int) -> None:
    """Give a directory entry other fields; what follows it stays where it is."""
    bitmap = image.bitmaps[number]
    changed = {name: getattr(bitmap, name) for name in bitmap.__slots__} | fields
    image.data[bitmap.offset : bitmap.offset + ENTRY_BYTES] = encode_bitmap(
        type(bitmap)(**changed)
    )[:ENTRY_BYTES]


def test_a_directory_entry_that_makes_no_sense_hides_no_other() -> None:
    image = with_bitmaps({1}, {2}, {3})
    change_entry(image, 1, granularity_bits=99)
    found = states(image.source)
    assert [state.dirty for state in found.bitmaps] == [512, None, 512]
    assert "granularity_bits" in str(found.bitmaps[1].errors[0])
    assert found.error is None


def test_a_directory_that_breaks_off_shows_what_comes_before() -> None:
    image = with_bitmaps({1}, {2}, {3})
    size = len(encode_bitmap(image.bitmaps[0])) * 2 + 8
    pointer = Layout.read(image.source).extensions.bitmaps
    assert pointer is not None
    at = image.data.index(pointer.bitmap_directory_size.to_bytes(8, "big"))
    image.data[at : at + 8] = size.to_bytes(8, "big")
    found = states(image.source)
    assert [state.dirty for state in found.bitmaps] == [512, 512]
    assert found.error is not None


def test_a_bitmap_in_use_keeps_its_flag() -> None:
    image = with_bitmaps({1})
    change_entry(image, 0, flags=IN_USE)
    assert only(image.source).bitmap.flags & IN_USE


def test_stale_bitmaps_are_none() -> None:
    image = RULES["bitmaps_stale"]().image
    assert states(image.source) == BitmapStates(stale=True)


def test_what_all_of_them_take_to_read_is_bounded() -> None:
    image = with_bitmaps({1}, {2}, {3})
    limits = Limits(bitmap_bytes=2 * SIZE, bitmap_cost=0)
    found = read_bitmap_states(image.source, limits=limits).bitmaps
    assert [state.dirty for state in found] == [512, 0, 0]
    assert "not counted" in str(found[1].errors[0])
    found = read_bitmap_states(image.source, limits=replace(limits, bitmap_cost=SIZE)).bitmaps
    assert [state.dirty for state in found] == [512, None, None]


def test_of_tables_that_lie_over_each_other_only_so_much_is_followed(monkeypatch) -> None:
    """Hundreds of bitmaps that have one table of 900 KiB took over 4 seconds of a processor."""
    monkeypatch.setattr(work_limits, "MAX_SHARED_BYTES", 1)
    image = with_bitmaps({1}, {2}, {3}, {4, 5})
    for number in (1, 2):
        change_entry(image, number, bitmap_table_offset=image.bitmaps[0].bitmap_table_offset)
    found = states(image.source).bitmaps
    assert [state.dirty for state in found] == [512, 512, None, 1024]
    (error,) = found[2].errors
    assert "not counted: it lies over others" in str(error)


def test_what_several_entries_lead_to_is_read_once_and_of_holes_nothing() -> None:
    image = with_bitmaps({1, 3})
    table, entries = image.bitmaps[0].bitmap_table_offset, image.bitmaps[0].bitmap_table_size
    hole = -(-len(image.data) // SIZE) * SIZE

    def looked_at() -> tuple[BitmapState, int]:
        source = Sparse.of(bytes(image.data), hole + SIZE)
        return only(source), source.bytes_read

    state, length = looked_at()
    assert (state.dirty, state.data_clusters) == (1024, 1)
    for index in range(1, entries - 1):
        image.set_word(table + 8 * index, image.word(table))
    image.set_word(table + 8 * (entries - 1), hole)
    state, again = looked_at()
    assert (state.dirty, state.data_clusters, state.errors) == (1024 * (entries - 1), entries, ())
    assert again == length


@pytest.mark.parametrize("name", RULES)
def test_any_image_is_answered(name: str) -> None:
    source = RULES[name]().image.source
    try:
        Layout.read(source)
    except ImageError:
        return
    for state in states(source).bitmaps:
        assert state.dirty is not None or state.errors


def test_it_stops_when_it_is_told_to() -> None:
    with pytest.raises(Cancelled):
        read_bitmap_states(with_bitmaps({1}).source, unless(lambda: True))


def test_an_image_without_bitmaps_and_a_file_without_a_layout() -> None:
    assert states(fill(builder()).build().source) == states(plain().source) == BitmapStates()
    with pytest.raises(ImageError):
        states(Bytes(b"QFI\xfb" + bytes(200)))
