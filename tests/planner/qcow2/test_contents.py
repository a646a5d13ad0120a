"""Contents: each part on its own, and what stopped the others."""

from __future__ import annotations

import pytest

from planner.errors import ImageError
from planner.qcow2.contents import Contents
from planner.qcow2.header import CRYPT_LUKS, MAGIC, bare_header
from planner.qcow2.luks import encode_luks
from planner.source import Bytes
from tests.images.builder import Image, ImageBuilder
from tests.images.luks_headers import luks_header


def _image() -> Image:
    builder = ImageBuilder(
        cluster_bits=12, crypt_method=CRYPT_LUKS, luks_header=encode_luks(luks_header())
    )
    builder.write(0, b"x")
    builder.take_snapshot("before")
    builder.add_bitmap("b", {0})
    return builder.build()


def test_all_parts() -> None:
    contents = Contents.read(_image().source)
    assert [s.name for s in contents.snapshots] == [b"before"]
    assert [b.name for b in contents.bitmaps] == [b"b"]
    assert contents.luks == luks_header()
    assert contents.errors == ()


def test_a_part_that_cannot_be_read_leaves_the_others() -> None:
    image = _image()
    image.data[image.bitmaps[0].offset + 20] = 0xFF
    image.change_header(snapshots_offset=image.header.snapshots_offset + 8)
    contents = Contents.read(image.source)
    assert [part for part, _ in contents.errors] == ["snapshots", "bitmaps"]
    assert (tuple(contents.snapshots), contents.bitmaps) == ((), ())
    assert contents.luks == luks_header()


def test_without_a_layout_there_are_no_contents() -> None:
    image = _image()
    image.change_header(l1_size=0)
    with pytest.raises(ImageError, match="l1_size"):
        Contents.read(image.source)


def test_the_bare_header_of_an_image_without_layout() -> None:
    image = _image()
    image.change_header(cluster_bits=77)
    header = bare_header(image.source)
    assert header is not None
    assert (header.magic, header.cluster_bits) == (MAGIC, 77)


@pytest.mark.parametrize(
    ("raw", "version"),
    [
        (b"QFI\xfb", 0),
        (b"QFI\xfb\0\0\0\3", 3),
        (b"QFI\xfb\xff\xff\xff\xff" + b"\xff" * 96, 2**32 - 1),
    ],
    ids=["magic", "version", "ones"],
)
def test_the_bare_header_of_what_is_there(raw: bytes, version: int) -> None:
    header = bare_header(Bytes(raw))
    assert header is not None
    assert header.version == version


@pytest.mark.parametrize("raw", [b"", b"QFI", b"QCOW" * 100], ids=["empty", "short", "other"])
def test_no_bare_header_without_the_magic(raw: bytes) -> None:
    assert bare_header(Bytes(raw)) is None
