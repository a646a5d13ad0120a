"""The LUKS header: codec, judgement, and what its names stand for."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ImageError
from planner.qcow2.extensions import CryptoPointer
from planner.qcow2.luks import (
    LUKS_BYTES,
    SECTOR,
    STRIPES,
    Cipher,
    LuksHeader,
    check_luks,
    check_unlocking,
    cipher_of,
    decode_luks,
    encode_luks,
    luks_length,
    read_luks,
)
from planner.source import Bytes
from tests.images.luks_headers import ACCEPTED, LOCKED, REFUSED, luks_header, with_slot


def test_header_is_as_long_as_the_specification_says() -> None:
    assert LUKS_BYTES == 592


@given(st.binary(min_size=LUKS_BYTES, max_size=LUKS_BYTES))
def test_any_bytes_decode_and_encode_to_themselves(raw: bytes) -> None:
    assert encode_luks(decode_luks(raw)) == raw


@given(st.binary(min_size=LUKS_BYTES, max_size=LUKS_BYTES), st.integers(0, LUKS_BYTES))
def test_judging_raises_one_kind_of_error(raw: bytes, kept: int) -> None:
    spoiled = encode_luks(luks_header())[:kept] + raw[kept:]
    with contextlib.suppress(ImageError):
        check_luks(decode_luks(spoiled))


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    check_luks(ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(ImageError, match="LUKS"):
        check_luks(REFUSED[name])


@pytest.mark.parametrize("name", sorted(ACCEPTED.keys() - LOCKED.keys()))
def test_a_password_may_open_it(name: str) -> None:
    check_unlocking(ACCEPTED[name], 1 << 40)


@pytest.mark.parametrize("name", LOCKED)
def test_no_password_opens_it(name: str) -> None:
    check_luks(LOCKED[name])
    with pytest.raises(ImageError, match="LUKS"):
        check_unlocking(LOCKED[name], 1 << 40)


def test_the_first_key_must_lie_where_the_image_has_the_header() -> None:
    header = luks_header()
    end = header.key_slots[0].key_material_offset * SECTOR + header.key_bytes * STRIPES
    check_unlocking(header, end)
    with pytest.raises(ImageError, match=f"LUKS key slot 0 is 8: reaches past the {end - 1} bytes"):
        check_unlocking(header, end - 1)


def test_how_long_a_header_is_said_to_be() -> None:
    header = encode_luks(luks_header())
    here = CryptoPointer(0, LUKS_BYTES)
    assert luks_length(Bytes(header), here) == (8 + 8 * 504) * SECTOR
    assert luks_length(Bytes(bytes(6) + header[6:]), here) == LUKS_BYTES


@pytest.mark.parametrize(
    ("header", "cipher"),
    [
        (ACCEPTED["plain"], Cipher("aes", 256, "xts", "plain64", None)),
        (ACCEPTED["cbc-essiv"], Cipher("aes", 256, "cbc", "essiv", "sha256")),
        (ACCEPTED["cast5"], Cipher("cast5", 128, "cbc", "plain", None)),
    ],
)
def test_cipher(header: LuksHeader, cipher: Cipher) -> None:
    assert cipher_of(header) == cipher


def test_the_error_names_slot_and_value() -> None:
    with pytest.raises(ImageError, match="stripes of LUKS key slot 2 is 17: must be 4000"):
        check_luks(with_slot(2, stripes=17))


def test_read_finds_it_where_the_extension_points() -> None:
    source = Bytes(bytes(4096) + encode_luks(luks_header()))
    assert read_luks(source, CryptoPointer(4096, LUKS_BYTES)) == luks_header()


def test_a_region_too_short_for_a_header_is_refused() -> None:
    source = Bytes(encode_luks(luks_header()))
    with pytest.raises(ImageError, match="crypto header length is 591"):
        read_luks(source, CryptoPointer(0, LUKS_BYTES - 1))


def test_past_the_end_there_is_no_luks() -> None:
    with pytest.raises(ImageError, match="LUKS magic"):
        read_luks(Bytes(b""), CryptoPointer(1 << 60, 1 << 40))
