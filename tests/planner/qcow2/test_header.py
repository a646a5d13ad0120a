"""The header's fixed fields: there and back, feature bits, and what is too short to be one."""

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import HeaderCutOff, NotQcow2
from planner.qcow2.header import (
    HEADER_V2,
    HEADER_V3,
    KNOWN_INCOMPATIBLE,
    MAGIC,
    Autoclear,
    Compatible,
    Header,
    Incompatible,
    decode_header,
    encode_header,
    read_header,
)
from planner.source import Bytes
from tests.planner.answers import refusal

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
WIDE = {"backing_file_offset", "size", "l1_table_offset", "refcount_table_offset"}
WIDE |= {"snapshots_offset", "incompatible_features", "compatible_features", "autoclear_features"}
V2_NAMES = [sub.name for sub in HEADER_V2.subcons if sub.name not in ("magic", "version")]
V3_NAMES = [sub.name for sub in HEADER_V3.subcons]


def values_of(names: list[str]) -> dict[str, st.SearchStrategy[int]]:
    return {name: u64 if name in WIDE else u32 for name in names}


def test_lengths_are_those_of_the_specification() -> None:
    assert HEADER_V2.sizeof() == 72
    assert HEADER_V2.sizeof() + HEADER_V3.sizeof() == 104


@pytest.mark.parametrize(
    ("name", "offset", "size"),
    [
        ("magic", 0, 4),
        ("version", 4, 4),
        ("backing_file_offset", 8, 8),
        ("backing_file_size", 16, 4),
        ("cluster_bits", 20, 4),
        ("size", 24, 8),
        ("crypt_method", 32, 4),
        ("l1_size", 36, 4),
        ("l1_table_offset", 40, 8),
        ("refcount_table_offset", 48, 8),
        ("refcount_table_clusters", 56, 4),
        ("nb_snapshots", 60, 4),
        ("snapshots_offset", 64, 8),
        ("incompatible_features", 72, 8),
        ("compatible_features", 80, 8),
        ("autoclear_features", 88, 8),
        ("refcount_order", 96, 4),
        ("header_length", 100, 4),
    ],
)
def test_field_is_where_the_specification_has_it(name, offset, size) -> None:
    header = bytearray(104)
    header[4:8] = (3).to_bytes(4, "big")
    header[offset : offset + size] = (3).to_bytes(size, "big")
    assert getattr(decode_header(bytes(header)), name) == 3


def test_no_field_is_left_out() -> None:
    assert {field.name for field in fields(Header)} == {
        "magic", "version", *V2_NAMES, *V3_NAMES, "additional",
    }  # fmt: skip


@given(values=st.fixed_dictionaries(values_of(V2_NAMES)))
def test_version_2_comes_back_the_same(values) -> None:
    header = Header(magic=MAGIC, version=2, **values)
    raw = encode_header(header)
    assert len(raw) == 72
    assert decode_header(raw) == header
    assert decode_header(raw.ljust(104, b"x")) == header


@given(
    values=st.fixed_dictionaries(values_of([*V2_NAMES, *V3_NAMES[:-1]])),
    additional=st.binary(max_size=40),
)
def test_version_3_comes_back_the_same(values, additional) -> None:
    length = 104 + len(additional)
    header = Header(magic=MAGIC, version=3, header_length=length, additional=additional, **values)
    raw = encode_header(header)
    assert len(raw) == length
    assert decode_header(raw + b"what follows") == header


def zeros(version: int) -> Header:
    """A header that says nothing but its version."""
    return decode_header(MAGIC.to_bytes(4, "big") + version.to_bytes(4, "big") + bytes(96))


@given(raw=st.binary(min_size=104, max_size=160))
def test_any_bytes_decode_and_come_back_the_same(raw) -> None:
    again = encode_header(decode_header(raw))
    assert again == raw[: len(again)]
    assert len(again) >= 72


def test_version_2_has_the_defaults_of_version_3() -> None:
    header = decode_header(encode_header(zeros(2)))
    assert (header.refcount_order, header.header_length, header.compression_type) == (4, 72, 0)
    assert not header.incompatible_features | header.compatible_features
    assert not header.autoclear_features


@pytest.mark.parametrize("bits", [Incompatible, Compatible, Autoclear])
def test_feature_bits_are_single_and_distinct(bits) -> None:
    assert all(bit.value.bit_count() == 1 for bit in bits)
    assert sum(bits) == (1 << len(bits)) - 1


def test_known_incompatible_bits_are_those_with_a_name() -> None:
    assert sum(Incompatible) == KNOWN_INCOMPATIBLE


@pytest.mark.parametrize(
    ("bit", "name"),
    [
        (Incompatible.DIRTY, "dirty"),
        (Incompatible.CORRUPT, "corrupt"),
        (Incompatible.DATA_FILE, "external_data"),
        (Incompatible.EXTENDED_L2, "extended_l2"),
    ],
)
def test_feature_bit_has_its_accessor(bit, name) -> None:
    names = ("dirty", "corrupt", "external_data", "extended_l2")
    plain = zeros(3)
    flagged = replace(plain, incompatible_features=bit)
    assert not any(getattr(plain, other) for other in names)
    assert [other for other in names if getattr(flagged, other)] == [name]


@given(data=st.binary(max_size=80))
def test_what_does_not_begin_with_the_magic_is_not_qcow2(data) -> None:
    if data[:4] == MAGIC.to_bytes(4, "big"):
        return
    with pytest.raises(NotQcow2):
        read_header(Bytes(data))


@pytest.mark.parametrize("version", [2, 3])
def test_header_cut_off_at_any_byte_is_refused(version) -> None:
    header = replace(zeros(version), cluster_bits=16, header_length=104)
    raw = encode_header(header)
    assert read_header(Bytes(raw)).version == version
    for length in range(4, len(raw)):
        with pytest.raises((HeaderCutOff, NotQcow2)):
            read_header(Bytes(raw[:length]))


@pytest.mark.parametrize("version", [0, 1])
def test_the_older_format_is_not_qcow2(version) -> None:
    raw = encode_header(zeros(version))
    with pytest.raises(NotQcow2) as caught:
        read_header(Bytes(raw))
    assert caught.value.field == "version"


@given(raw=st.binary(max_size=120))
def test_any_header_is_read_or_refused(raw) -> None:
    source = Bytes(MAGIC.to_bytes(4, "big") + b"\0\0\0\3" + raw)
    error = refusal(read_header, source)
    if error is None:
        assert read_header(source).version == 3
    else:
        assert "\n" not in str(error)
