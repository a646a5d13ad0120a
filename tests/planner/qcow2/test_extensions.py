"""Header extensions: the list there and back, unknown ones kept, known ones decoded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ImageError
from planner.qcow2 import extensions
from planner.qcow2.extensions import (
    Extensions,
    decode_extensions,
    encode_extensions,
    read_extensions,
)
from planner.qcow2.header import Autoclear
from tests.images.builder import FEATURES, Image, ImageBuilder, feature_name_table
from tests.planner.answers import refusal

magics = st.integers(1, (1 << 32) - 1)
lists = st.lists(st.tuples(magics, st.binary(max_size=30)), max_size=6)


def extensions_of(image: Image) -> Extensions:
    return read_extensions(image.source, image.header)


@given(pairs=lists)
def test_extensions_come_back_the_same(pairs) -> None:
    raw = encode_extensions(pairs)
    found = decode_extensions(raw, 112, len(raw))
    assert [(extension.magic, extension.data) for extension in found] == pairs
    for extension in found:
        at = extension.offset - 112
        assert raw[at : at + len(extension.data)] == extension.data
        assert at % 8 == 0


@given(pairs=lists, behind=st.binary(max_size=40))
def test_bytes_come_back_the_same_and_what_follows_the_end_is_ignored(pairs, behind) -> None:
    raw = encode_extensions(pairs)
    found = decode_extensions(raw + behind, 0, len(raw) + len(behind))
    assert encode_extensions([(each.magic, each.data) for each in found]) == raw


@given(raw=st.binary(max_size=80), room=st.integers(-8, 120))
def test_any_area_is_decoded_or_refused(raw, room) -> None:
    error = refusal(decode_extensions, raw, 0, room)
    if error is None:
        found = decode_extensions(raw, 0, room)
        assert sum(len(extension.data) for extension in found) <= max(0, room)
    else:
        assert error.field == "header extension"


def test_length_that_claims_more_than_the_area_allocates_nothing() -> None:
    raw = (0x1234).to_bytes(4, "big") + (0xFFFF_FFFF).to_bytes(4, "big")
    with pytest.raises(ImageError, match="4294967295 bytes run past"):
        decode_extensions(raw, 104, 1 << 21)


def test_however_often_a_header_is_read_its_extensions_are_held_once() -> None:
    image = ImageBuilder(size=1 << 20, more_extensions=((0xABCD_0123, b"vendor data"),)).build()
    assert extensions_of(image).all is extensions_of(image).all


def test_area_without_an_end_marker_ends_with_the_area() -> None:
    raw = encode_extensions([(7, b"12345678")])[:-8]
    found = decode_extensions(raw, 0, len(raw))
    assert [extension.magic for extension in found] == [7]


def test_unknown_extension_is_kept() -> None:
    image = ImageBuilder(size=1 << 20, more_extensions=((0xABCD_0123, b"vendor data"),)).build()
    found = extensions_of(image)
    assert [(each.magic, each.data) for each in found.all] == [(0xABCD_0123, b"vendor data")]
    assert found.bitmaps is None
    assert found.crypto is None


def test_names_of_features_come_from_the_feature_name_table() -> None:
    image = ImageBuilder(size=1 << 20, more_extensions=(feature_name_table(),)).build()
    names = extensions_of(image).names_of_features()
    assert names == {key: name.decode() for key, name in FEATURES.items()}


def test_feature_name_that_is_not_text_is_still_told() -> None:
    row = extensions.FEATURE_NAME.build({"type": 0, "bit": 9, "name": b"\xff".ljust(46, b"\0")})
    image = ImageBuilder(size=1 << 20, more_extensions=((extensions.FEATURE_NAMES, row),)).build()
    assert extensions_of(image).names_of_features() == {(0, 9): "\udcff"}


def _named(table: bytes) -> dict[tuple[int, int], str]:
    image = ImageBuilder(size=1 << 20, more_extensions=((extensions.FEATURE_NAMES, table),)).build()
    return extensions_of(image).names_of_features()


def test_feature_name_table_that_ends_inside_a_row_goes_on_in_zeros() -> None:
    _, rows = feature_name_table()
    assert _named(rows[:-1]) == {key: name.decode() for key, name in FEATURES.items()}
    assert _named(b"\0\x3fTest feature") == {(0, 63): "Test feature"}
    assert _named(b"\0\x3f") == _named(b"\0") == {}


def test_feature_name_ends_at_its_first_nul_and_an_empty_one_ends_the_table() -> None:
    row = b"\0\x3f" + b"test3\0and more".ljust(46, b"\0")
    assert _named(row + bytes(48) + b"\0\x3efar") == {(0, 63): "test3"}


def test_of_two_names_of_a_feature_the_first_counts() -> None:
    row = b"\0\x3f" + b"first".ljust(46, b"\0")
    assert _named(row + b"\0\x3fsecond") == {(0, 63): "first"}


def test_backing_format_and_data_file_name() -> None:
    builder = ImageBuilder(
        size=1 << 20, backing_file=b"base.raw", backing_format=b"raw", data_file=b"data.raw"
    )
    found = extensions_of(builder.build())
    assert (found.backing_format, found.data_file) == (b"raw", b"data.raw")


def test_pointer_to_the_luks_header() -> None:
    image = ImageBuilder(size=1 << 20, crypt_method=2, luks_header=b"LUKS" * 300).build()
    pointer = extensions_of(image).crypto
    assert pointer is not None
    assert image.data[pointer.offset : pointer.offset + pointer.length] == b"LUKS" * 300


def test_pointer_to_the_bitmap_directory() -> None:
    builder = ImageBuilder(size=1 << 20)
    builder.add_bitmap("a", {1})
    builder.add_bitmap("b", set())
    pointer = extensions_of(builder.build()).bitmaps
    assert pointer is not None
    assert pointer.nb_bitmaps == 2
    assert pointer.bitmap_directory_size == 2 * (24 + 8)


def test_bitmaps_without_their_autoclear_bit_are_stale_and_not_followed() -> None:
    builder = ImageBuilder(size=1 << 20)
    builder.add_bitmap("a", {1})
    image = builder.build()
    assert not extensions_of(image).stale_bitmaps
    image.change_header(autoclear_features=image.header.autoclear_features & ~Autoclear.BITMAPS)
    assert extensions_of(image).stale_bitmaps
    assert extensions_of(image).bitmaps is None
