"""info.json, header.json and the human text, where no QEMU is needed to know what is right."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from instarfs.render.info import (
    ImageFacts,
    header_error_json,
    header_json,
    info_error_json,
    info_human,
    info_json,
    size_text,
)
from planner.errors import ImageError
from planner.qcow2.contents import Contents
from planner.qcow2.header import CRYPT_LUKS, Incompatible, bare_header
from planner.qcow2.luks import encode_luks
from tests.images.builder import Image, ImageBuilder
from tests.images.luks_headers import REFUSED, luks_header

FACTS = ImageFacts("dir/some.qcow2", 1 << 20, 4096)


def _info(image: Image) -> dict[str, Any]:
    value = json.loads(b"".join(info_json(Contents.read(image.source), FACTS)))
    assert isinstance(value, dict)
    return value


def _human(image: Image) -> list[str]:
    return b"".join(info_human(Contents.read(image.source), FACTS)).decode().splitlines()


def _header(image: Image) -> dict[str, Any]:
    value = json.loads(header_json(Contents.read(image.source).layout))
    assert isinstance(value, dict)
    return value


# ---- info ----


def test_nothing_named_in_the_image_is_opened_to_name_it() -> None:
    info = _info(ImageBuilder(backing_file=b"no/such", backing_format=b"qcow2").build())
    assert info["backing-filename"] == "no/such"
    assert info["full-backing-filename"] == "dir/no/such"
    assert info["backing-filename-format"] == "qcow2"


@pytest.mark.parametrize(
    ("stored", "full"),
    [
        (b"/abs", "/abs"),
        (b"nbd://host/x", "nbd://host/x"),
        (b'json:{"driver":"raw"}', 'json:{"driver":"raw"}'),
        (b"./a:b", "dir/./a:b"),
    ],
)
def test_full_backing_filename(stored: bytes, full: str) -> None:
    assert _info(ImageBuilder(backing_file=stored).build())["full-backing-filename"] == full


def test_the_flags_of_a_bitmap() -> None:
    builder = ImageBuilder()
    for name in ("none", "used", "both"):
        builder.add_bitmap(name, set())
    flags = {"none": 0, "used": 1, "both": 3}
    builder.bitmaps = [(replace(b, flags=flags[b.name.decode()]), t) for b, t in builder.bitmaps]
    shown = _info(builder.build())["format-specific"]["data"]["bitmaps"]
    assert [b["flags"] for b in shown] == [[], ["in-use"], ["in-use", "auto"]]


def test_a_broken_part_is_named_and_the_rest_is_shown() -> None:
    builder = ImageBuilder(
        crypt_method=CRYPT_LUKS, luks_header=encode_luks(REFUSED["slot-stripes"])
    )
    builder.take_snapshot("s")
    image = builder.build()
    info = _info(image)
    assert info["format-specific"]["data"]["encrypt"] == {"format": "luks"}
    assert info["errors"] == {"encrypt": "stripes of LUKS key slot 2 is 3999: must be 4000"}
    assert [s["name"] for s in info["snapshots"]] == ["s"]
    assert _human(image)[-2:] == [
        "Not readable:",
        "    encrypt: stripes of LUKS key slot 2 is 3999: must be 4000",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"\x1b[2J\n" + b"x" * 300, "\x1b[2J\n" + "x" * 300),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"nul\0nul", "nul"),
    ],
    ids=["long", "not-utf8", "nul"],
)
def test_names_come_whole_and_obey_nobody(name: bytes, text: str) -> None:
    builder = ImageBuilder(backing_file=name)
    builder.take_snapshot("s")
    snapshot, l1 = builder.snapshots[0]
    builder.snapshots = [(replace(snapshot, name=name, id_str=name), l1)]
    builder.add_bitmap("b", set())
    bitmap, table = builder.bitmaps[0]
    builder.bitmaps = [(replace(bitmap, name=name), table)]
    image = builder.build()
    info = _info(image)
    shown = [info["backing-filename"], info["snapshots"][0]["name"], info["snapshots"][0]["id"]]
    shown.append(info["format-specific"]["data"]["bitmaps"][0]["name"])
    # Of snapshots as much as QEMU lists; a bitmap's name has at most 1023 bytes.
    assert shown == [text, text[:255], text[:127], text]
    assert all(line.isprintable() for line in _human(image))


def test_a_machine_state_of_2_63_bytes_is_not_negative() -> None:
    builder = ImageBuilder()
    builder.take_snapshot("s", extra_data=(1 << 63).to_bytes(8, "big") + bytes(8))
    assert _info(builder.build())["snapshots"][0]["vm-state-size"] == 1 << 63


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023, "0.999 KiB"),
        (196 << 10, "196 KiB"),
        (1 << 30, "1 GiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text


# ---- header.json ----


def test_every_field_feature_and_extension() -> None:
    image = ImageBuilder(
        cluster_bits=16,
        lazy_refcounts=True,
        zstd=True,
        backing_file=b"base",
        backing_format=b"raw",
        more_extensions=((0x1234_5678, b"\x01\xff"),),
    ).build()
    image.change_header(autoclear_features=1 << 40)
    shown = _header(image)
    assert shown["header"]["magic"] == "0x514649fb"
    assert shown["header"]["cluster_bits"] == 16
    assert shown["header"]["compression_type_name"] == "zstd"
    assert shown["features"]["incompatible"] == [{"bit": 3, "known": True, "name": "compression"}]
    assert shown["features"]["compatible"] == [{"bit": 0, "known": True, "name": "lazy-refcounts"}]
    assert shown["features"]["autoclear"] == [{"bit": 40, "known": False, "name": None}]
    assert shown["backing_file"] == "base"
    by_type = {e["type"]: e for e in shown["extensions"]}
    assert by_type["0xe2792aca"]["value"] == "raw"
    unknown = by_type["0x12345678"]
    assert (unknown["name"], unknown["length"], unknown["data"]) == ("unknown", 2, "01ff")


def test_extensions_that_point_somewhere() -> None:
    luks = encode_luks(luks_header())
    builder = ImageBuilder(crypt_method=CRYPT_LUKS, luks_header=luks, data_file=b"data")
    builder.add_bitmap("b", {1})
    image = builder.build()
    by_name = {e["name"]: e for e in _header(image)["extensions"]}
    assert by_name["external data file name"]["value"] == "data"
    assert by_name["bitmaps"]["value"]["nb_bitmaps"] == 1
    pointer = by_name["full disk encryption header"]["value"]
    assert pointer["length"] == len(luks)
    assert image.data[pointer["offset"] :][: len(luks)] == luks


# ---- without a layout ----


def test_an_unreadable_image_says_why_and_what_stands_there() -> None:
    image = ImageBuilder().build()
    image.change_header(cluster_bits=40, incompatible_features=int(Incompatible.DIRTY) | 1 << 63)
    with pytest.raises(ImageError) as raised:
        Contents.read(image.source)
    info = json.loads(info_error_json(raised.value, FACTS))
    assert (info["field"], info["value"]) == ("cluster_bits", 40)
    assert info["error"].startswith("cluster_bits is 40")
    assert (info["filename"], info["file-size"]) == ("dir/some.qcow2", 1 << 20)
    header = json.loads(header_error_json(raised.value, bare_header(image.source)))
    assert header["header"]["cluster_bits"] == 40
    assert [f["name"] for f in header["features"]["incompatible"]] == ["dirty", None]
    assert json.loads(header_error_json(raised.value, None)).keys() == {"error", "field", "value"}
