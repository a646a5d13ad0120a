"""The bitmap directory: entries there and back, and each thing that QEMU refuses in one."""

import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ImageError
from planner.qcow2 import bitmaps
from planner.qcow2.bitmaps import IN_USE, Bitmap, encode_bitmap, list_bitmaps, read_bitmaps
from planner.qcow2.extensions import BitmapsPointer
from planner.qcow2.geometry import Geometry
from planner.source import Bytes
from tests.images.builder import ImageBuilder
from tests.planner.answers import refusal

FIELDS = [field.name for field in bitmaps.ENTRY.subcons]
GEOMETRY = Geometry(3, 16, 4, 1 << 30)
GOOD = Bitmap(
    offset=0,
    bitmap_table_offset=0x50000,
    bitmap_table_size=1,
    flags=0,
    type=1,
    granularity_bits=16,
    extra_data_size=0,
    name=b"backup",
)
names = st.binary(max_size=40)
good_bitmaps = st.builds(
    replace,
    st.just(GOOD),
    bitmap_table_offset=st.integers(1, 1 << 47).map(lambda n: n << 16),
    flags=st.integers(0, 3).map(lambda bits: bits << 1),
    granularity_bits=st.integers(11, 31),
    name=names,
)


def read(raw: bytes, count: int, *, size: int | None = None) -> tuple[Bitmap, ...]:
    pointer = BitmapsPointer(count, len(raw) if size is None else size, 0)
    return tuple(read_bitmaps(Bytes(raw), pointer, GEOMETRY))


def test_entry_is_24_bytes() -> None:
    assert bitmaps.ENTRY_BYTES == 24


@given(found=st.lists(good_bitmaps, min_size=1, max_size=5, unique_by=lambda b: b.name))
def test_directory_comes_back_the_same(found) -> None:
    found = [replace(bitmap, flags=bitmap.flags & bitmaps.AUTO) for bitmap in found]
    raw = b"".join(encode_bitmap(bitmap) for bitmap in found)
    again = read(raw, len(found))
    assert [replace(bitmap, offset=0) for bitmap in again] == found
    assert b"".join(encode_bitmap(bitmap) for bitmap in again) == raw
    for bitmap in again:
        assert bitmap.offset % 8 == 0


@given(raw=st.binary(min_size=1, max_size=120), count=st.integers(0, 4))
def test_any_directory_is_read_or_refused(raw, count) -> None:
    error = refusal(read, raw, count)
    if error is None:
        assert len(read(raw, count)) == count
    else:
        assert "\n" not in str(error)


def test_granularity_is_in_bytes() -> None:
    assert GOOD.granularity == 65536


def test_bitmaps_of_an_image() -> None:
    builder = ImageBuilder(size=1 << 28)
    builder.add_bitmap("first", {0, 4095}, granularity_bits=16)
    builder.add_bitmap("second", set(), granularity_bits=20)
    image = builder.build()
    first, second = image.bitmaps
    assert (first.name, first.granularity, first.bitmap_table_size) == (b"first", 1 << 16, 1)
    assert (second.name, second.granularity) == (b"second", 1 << 20)
    assert image.word(second.bitmap_table_offset) == 0
    data = image.word(first.bitmap_table_offset)
    assert image.data[data : data + 512] == b"\x01" + bytes(510) + b"\x80"


class Hole:
    """A directory that begins with *raw*, and goes on as a hole of 64 MiB."""

    size = 64 << 20

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def read_into(self, offset: int, buffer: memoryview) -> None:
        Bytes(self._raw).read_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return Bytes(self._raw).data_extents(offset, length)


@pytest.mark.parametrize("extra", [0, 60 << 20], ids=["many", "one with extra data"])
def test_a_directory_in_a_hole_takes_no_more_memory_than_its_entries(extra: int) -> None:
    raw = encode_bitmap(GOOD) + bitmaps.ENTRY.build(
        {**dict.fromkeys(FIELDS, 0), "extra_data_size": extra}
    )
    source, pointer = Hole(raw), BitmapsPointer(3, Hole.size, 0)
    tracemalloc.start()
    try:
        listed = list_bitmaps(source, pointer, GEOMETRY)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [bitmap.extra_data_size for bitmap, _ in listed] == [0, extra, 0]
    assert "lists more" in str(listed.error)
    assert peak < 2 << 20


any_bitmaps = st.builds(
    replace,
    st.just(GOOD),
    bitmap_table_offset=st.sampled_from([0x50000, 1, (1 << 64) - 1]),
    flags=st.sampled_from([0, 0, IN_USE, 1 << 31]),
    extra_data_size=st.sampled_from([0, 0, 0, 5, 4000]),
    name=st.sampled_from([b"", b"a", b"b", b"n" * 1023, b"n" * 1024, b"n" * 9000]),
)


@given(found=st.lists(any_bitmaps, max_size=12), window=st.sampled_from([1, 1100, 1 << 18]))
def test_every_entry_is_listed_whatever_it_says_and_wherever_windows_end(found, window) -> None:
    raw = b""
    wanted = []
    for bitmap in found:
        wanted.append(replace(bitmap, offset=len(raw)))
        raw += encode_bitmap(bitmap)
    before, bitmaps.WINDOW_BYTES = bitmaps.WINDOW_BYTES, window
    try:
        bitmaps._known.cache_clear()
        listed = list_bitmaps(Bytes(raw), BitmapsPointer(len(found), len(raw), 0), GEOMETRY)
    finally:
        bitmaps.WINDOW_BYTES = before
    assert [bitmap for bitmap, _ in listed] == wanted
    assert (listed.error is None) == bool(found)
    seen = set()
    for number, (bitmap, wrong) in enumerate(listed):
        alone = refusal(read, encode_bitmap(bitmap), 1)
        is_again = bitmap.name in seen and not bitmap.flags & IN_USE
        assert (wrong is not None) == (alone is not None or is_again)
        assert listed.is_sound[number] == (wrong is None)
        seen.add(bitmap.name)


def test_what_is_listed_becomes_a_bitmap_when_it_is_asked_for(monkeypatch) -> None:
    raw = b"".join(encode_bitmap(replace(GOOD, name=b"%d" % number)) for number in range(9))
    made: list[bytes] = []

    def bitmap(**fields):
        made.append(fields["name"])
        return GOOD

    monkeypatch.setattr(bitmaps, "Bitmap", bitmap)
    found = read_bitmaps(Bytes(raw), BitmapsPointer(9, len(raw), 0), GEOMETRY)
    assert [column.tolist() for column in found.tables()] == [[0x50000] * 9, [1] * 9]
    assert not made
    assert found[8] is GOOD
    assert made == [b"8"]


def test_a_refusal_that_is_kept_holds_none_who_raised_it() -> None:
    raw = encode_bitmap(GOOD)
    pointer = BitmapsPointer(2, len(raw), 0)
    first, again = (refusal(read_bitmaps, Bytes(raw), pointer, GEOMETRY) for _ in range(2))
    assert str(first) == str(again)
    kept = list_bitmaps(Bytes(raw), pointer, GEOMETRY).error
    assert kept is not None
    assert kept.__traceback__ is None


def test_a_directory_that_was_edited_is_listed_anew() -> None:
    one, other = (encode_bitmap(replace(GOOD, name=name)) for name in (b"one", b"other"))
    for raw, name in ((one, b"one"), (other, b"other"), (one, b"one")):
        listed = list_bitmaps(Bytes(raw), BitmapsPointer(1, len(raw), 0), GEOMETRY)
        assert [bitmap.name for bitmap, _ in listed] == [name]


RULES = {
    "extra data": ({"extra_data_size": 1}, "extra_data_size"),
    "table without entries": ({"bitmap_table_size": 0}, "bitmap_table_size"),
    "table with too many entries": ({"bitmap_table_size": 0x800_0001}, "bitmap_table_size"),
    "table nowhere": ({"bitmap_table_offset": 0}, "bitmap_table_offset"),
    "table misaligned": ({"bitmap_table_offset": 0x50200}, "bitmap_table_offset"),
    "granularity below 9": ({"granularity_bits": 8}, "granularity_bits"),
    "granularity above 31": ({"granularity_bits": 32}, "granularity_bits"),
    "granularity of 2^255": ({"granularity_bits": 255}, "granularity_bits"),
    "reserved flags": ({"flags": 8}, "flags"),
    "highest flag": ({"flags": 1 << 31}, "flags"),
    "name of 1024 bytes": ({"name": b"n" * 1024}, "name_size"),
    "unknown type": ({"type": 0}, "type"),
    "over 512 MiB": ({"bitmap_table_size": 8193, "flags": IN_USE}, "bitmap_table_size"),
    "table too small for the disk": ({"granularity_bits": 9}, "bitmap_table_size"),
    "table too large for the disk": ({"bitmap_table_size": 2}, "bitmap_table_size"),
}


@pytest.mark.parametrize(("changes", "field"), RULES.values(), ids=RULES)
def test_entry_that_qemu_refuses_is_refused(changes, field) -> None:
    with pytest.raises(ImageError) as caught:
        read(encode_bitmap(replace(GOOD, **changes)), 1)
    assert caught.value.field == f"{field} of the bitmap at 0"


ACCEPTED = {
    "good": {},
    "automatic": {"flags": bitmaps.AUTO},
    "in use, of another size": {"bitmap_table_size": 2, "flags": IN_USE},
    "name of 1023 bytes": {"name": b"n" * 1023},
    "coarsest granularity": {"granularity_bits": 31},
}


@pytest.mark.parametrize("changes", ACCEPTED.values(), ids=ACCEPTED)
def test_entry_that_qemu_takes_is_taken(changes) -> None:
    assert read(encode_bitmap(replace(GOOD, **changes)), 1) == (replace(GOOD, **changes),)


def test_names_are_unique() -> None:
    other = replace(GOOD, bitmap_table_offset=0x60000)
    with pytest.raises(ImageError, match="not unique"):
        read(encode_bitmap(GOOD) + encode_bitmap(other), 2)


@pytest.mark.parametrize("count", [0, 1, 3, 65535])
def test_count_of_the_extension_must_be_that_of_the_directory(count) -> None:
    raw = encode_bitmap(GOOD) + encode_bitmap(replace(GOOD, name=b"other"))
    with pytest.raises(ImageError) as caught:
        read(raw, count)
    assert caught.value.field == "nb_bitmaps"


@pytest.mark.parametrize("cut", [1, 8, 16, 31])
def test_entry_cut_off_by_the_end_of_the_directory_is_refused(cut) -> None:
    raw = encode_bitmap(GOOD)
    with pytest.raises(ImageError, match="cut off"):
        read(raw, 1, size=len(raw) - cut)


def test_name_that_runs_past_the_directory_is_refused() -> None:
    raw = bytearray(encode_bitmap(GOOD))
    raw[18:20] = b"\xff\xff"
    with pytest.raises(ImageError, match="cut off"):
        read(bytes(raw), 1)


def test_empty_directory_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        read(b"", 0)
    assert caught.value.field == "bitmap_directory_size"


def test_directory_past_the_end_of_the_file_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        read_bitmaps(Bytes(bytes(1024)), BitmapsPointer(1, 64 << 20, 0), GEOMETRY)
    assert caught.value.field == "bitmap_directory_offset"
