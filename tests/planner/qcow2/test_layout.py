"""What stops a check from opening an image, rule by rule, and what does not."""

import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import ImageError, NotQcow2
from planner.qcow2 import extensions
from planner.qcow2.extensions import BITMAPS, BITMAPS_POINTER, CRYPTO_HEADER, CRYPTO_POINTER
from planner.qcow2.geometry import Geometry
from planner.qcow2.header import Autoclear, Incompatible
from planner.qcow2.layout import Layout, sector_end
from planner.source import Bytes
from tests.images.builder import Image, ImageBuilder, feature_name_table
from tests.planner.answers import refusal

MIB = 1 << 20


def plain(**options: object) -> Image:
    return ImageBuilder(**{"size": 8 * MIB, **options}).build()  # type: ignore[arg-type]


def changed(*, options: dict[str, object] | None = None, **fields: int | bytes) -> Image:
    image = plain(**(options or {}))
    image.change_header(**fields)
    return image


def extended(*pairs: tuple[int, bytes], **fields: int) -> Image:
    return changed(options={"more_extensions": pairs}, **fields)


def crypto(offset: int = 1 << 16, length: int = 4096) -> bytes:
    raw: bytes = CRYPTO_POINTER.build({"offset": offset, "length": length})
    return raw


def bitmaps(count: int = 1, reserved: int = 0, size: int = 32, offset: int = 1 << 16) -> bytes:
    raw: bytes = BITMAPS_POINTER.build(
        {
            "nb_bitmaps": count,
            "reserved": reserved,
            "bitmap_directory_size": size,
            "bitmap_directory_offset": offset,
        }
    )
    return raw


def with_bitmaps(data: bytes) -> Image:
    return extended((BITMAPS, data), autoclear_features=Autoclear.BITMAPS)


def with_backing_name(length: int, **options: object) -> Image:
    image = plain(backing_file=b"b", **options)
    image.change_header(backing_file_size=length)
    return image


def with_extension_length(length: int) -> Image:
    image = extended((0x1234, b"12345678"))
    at = image.header.header_length + 4
    image.data[at : at + 4] = length.to_bytes(4, "big")
    return image


FEATURE = Incompatible
STOPS: dict[str, tuple[Callable[[], Image], str]] = {
    "version 4": (lambda: changed(version=4), "version"),
    "version of all ones": (lambda: changed(version=0xFFFF_FFFF), "version"),
    "cluster bits 8": (lambda: changed(cluster_bits=8), "cluster_bits"),
    "cluster bits 22": (lambda: changed(cluster_bits=22), "cluster_bits"),
    "cluster bits of all ones": (lambda: changed(cluster_bits=0xFFFF_FFFF), "cluster_bits"),
    "header below 104 bytes": (lambda: changed(header_length=103), "header_length"),
    "header over one cluster": (lambda: changed(header_length=65537), "header_length"),
    "backing name past the first cluster": (
        lambda: changed(backing_file_offset=65537, backing_file_size=1),
        "backing_file_offset",
    ),
    "backing name of 1024 bytes": (lambda: with_backing_name(1024), "backing_file_size"),
    "backing name past its cluster": (
        lambda: with_backing_name(512, cluster_bits=9),
        "backing_file_size",
    ),
    "compression type unknown": (
        lambda: changed(additional=b"\2" + bytes(7), incompatible_features=FEATURE.COMPRESSION),
        "compression_type",
    ),
    "zstd without its feature bit": (
        lambda: changed(additional=b"\1" + bytes(7)),
        "compression_type",
    ),
    "zlib with the feature bit of zstd": (
        lambda: changed(incompatible_features=FEATURE.COMPRESSION),
        "compression_type",
    ),
    "incompatible bit unknown": (
        lambda: changed(incompatible_features=1 << 5),
        "incompatible_features",
    ),
    "highest incompatible bit": (
        lambda: changed(incompatible_features=1 << 63),
        "incompatible_features",
    ),
    "subclusters below 512 bytes": (
        lambda: changed(options={"cluster_bits": 13}, incompatible_features=FEATURE.EXTENDED_L2),
        "cluster_bits",
    ),
    "refcount order 7": (lambda: changed(refcount_order=7), "refcount_order"),
    "refcount order of all ones": (
        lambda: changed(refcount_order=0xFFFF_FFFF),
        "refcount_order",
    ),
    "refcount table misaligned": (
        lambda: changed(refcount_table_offset=512),
        "refcount_table_offset",
    ),
    "refcount table past 2^63": (
        lambda: changed(refcount_table_offset=1 << 63),
        "refcount_table_offset",
    ),
    "refcount table over 8 MiB": (
        lambda: changed(refcount_table_clusters=129),
        "refcount_table size",
    ),
    "refcount table of 2^48 bytes": (
        lambda: changed(refcount_table_clusters=0xFFFF_FFFF),
        "refcount_table size",
    ),
    "L1 table misaligned": (lambda: changed(l1_table_offset=65536 + 8), "l1_table_offset"),
    "L1 table past 2^63": (lambda: changed(l1_table_offset=1 << 63), "l1_table_offset"),
    "L1 table over 32 MiB": (lambda: changed(l1_size=(4 << 20) + 1), "l1_table size"),
    "L1 table of 2^35 bytes": (lambda: changed(l1_size=0xFFFF_FFFF), "l1_table size"),
    "L1 table too small for the disk": (lambda: changed(size=1 << 30), "l1_size"),
    "disk over 2^63 bytes": (lambda: changed(size=1 << 63), "size"),
    "encryption unknown": (lambda: changed(crypt_method=3), "crypt_method"),
    "LUKS without its extension": (lambda: changed(crypt_method=2), "crypt_method"),
    "extension past the header's area": (
        lambda: with_extension_length(65536),
        "header extension",
    ),
    "extension of 4 GiB": (lambda: with_extension_length(0xFFFF_FFFF), "header extension"),
    "extension into the backing name": (
        lambda: changed(
            options={"more_extensions": ((0x1234, b"12345678"),)},
            backing_file_offset=124,
            backing_file_size=1,
        ),
        "header extension",
    ),
    "backing format of 16 bytes": (
        lambda: extended((extensions.BACKING_FORMAT, b"f" * 16)),
        "backing format",
    ),
    "crypto header of 15 bytes": (
        lambda: extended((CRYPTO_HEADER, crypto()[:15]), crypt_method=2),
        "crypto header extension",
    ),
    "crypto header without LUKS": (
        lambda: extended((CRYPTO_HEADER, crypto())),
        "crypto header extension",
    ),
    "crypto header misaligned": (
        lambda: extended((CRYPTO_HEADER, crypto(offset=512)), crypt_method=2),
        "crypto header offset",
    ),
    "bitmaps extension of 23 bytes": (
        lambda: with_bitmaps(bitmaps()[:23]),
        "bitmaps extension",
    ),
    "bitmaps extension with its reserved field set": (
        lambda: with_bitmaps(bitmaps(reserved=1)),
        "bitmaps extension",
    ),
    "no bitmaps": (lambda: with_bitmaps(bitmaps(count=0)), "nb_bitmaps"),
    "65536 bitmaps": (lambda: with_bitmaps(bitmaps(count=65536)), "nb_bitmaps"),
    "bitmap directory misaligned": (
        lambda: with_bitmaps(bitmaps(offset=512)),
        "bitmap_directory_offset",
    ),
    "bitmap directory over 1 KiB a bitmap": (
        lambda: with_bitmaps(bitmaps(size=65535 * 1024 + 1)),
        "bitmap_directory_size",
    ),
    "raw external data without a data file": (
        lambda: changed(autoclear_features=Autoclear.DATA_FILE_RAW),
        "autoclear_features",
    ),
}


@pytest.mark.parametrize(("make", "field"), STOPS.values(), ids=STOPS)
def test_image_that_cannot_be_opened_is_refused(make, field) -> None:
    with pytest.raises(ImageError) as caught:
        Layout.read(make().source)
    assert caught.value.field == field
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert field in str(caught.value)


NOT_QCOW2 = {
    "empty file": b"",
    "other magic": b"QFI\xfa" + bytes(200),
    "zeros": bytes(65536),
    "version 1": b"QFI\xfb\0\0\0\1" + bytes(200),
}


@pytest.mark.parametrize("data", NOT_QCOW2.values(), ids=NOT_QCOW2)
def test_what_is_not_qcow2_is_told_apart(data) -> None:
    with pytest.raises(NotQcow2) as caught:
        Layout.read(Bytes(data))
    assert caught.value.exit_code == 63
    assert str(caught.value).startswith("not a qcow2 image: ")


ALLOWED: dict[str, Callable[[], Image]] = {
    "version 2": lambda: plain(version=2),
    "dirty bit": lambda: changed(incompatible_features=FEATURE.DIRTY),
    "corrupt bit": lambda: changed(incompatible_features=FEATURE.CORRUPT),
    "unknown compatible bit": lambda: changed(compatible_features=1 << 63),
    "unknown autoclear bit": lambda: changed(autoclear_features=1 << 63),
    "no refcount table": lambda: changed(refcount_table_clusters=0),
    "header of 104 bytes": lambda: changed(header_length=104, additional=b""),
    "header of one cluster": lambda: changed(header_length=65536),
    "L1 table larger than needed": lambda: changed(l1_size=4 << 20),
    "refcount table of 8 MiB": lambda: changed(refcount_table_clusters=128),
    "disk of no bytes": lambda: changed(size=0, l1_size=0),
    "backing name of 1023 bytes": lambda: with_backing_name(1023),
    "backing format of 15 bytes": lambda: extended((extensions.BACKING_FORMAT, b"f" * 15)),
    "65535 bitmaps": lambda: with_bitmaps(bitmaps(count=65535)),
    "largest bitmap directory": lambda: with_bitmaps(bitmaps(size=65535 * 1024)),
    "stale bitmaps that make no sense": lambda: extended((BITMAPS, bitmaps(0, 1, 0, 7))),
    "unknown extension": lambda: extended((0x1234, b"vendor")),
    "AES": lambda: changed(crypt_method=1),
    "LUKS": lambda: plain(crypt_method=2, luks_header=bytes(4096)),
    "data file": lambda: plain(data_file=b"data.raw", data_file_raw=True),
    "subclusters of 512 bytes": lambda: plain(cluster_bits=14, extended_l2=True),
    "zstd": lambda: plain(zstd=True),
}


@pytest.mark.parametrize("make", ALLOWED.values(), ids=ALLOWED)
def test_image_that_can_be_opened_is_opened(make) -> None:
    image = make()
    layout = Layout.read(image.source)
    assert layout.header == image.header
    assert layout.file_size == len(image.data)


def test_unknown_feature_has_its_name_from_the_feature_name_table() -> None:
    magic, rows = feature_name_table()
    rows += extensions.FEATURE_NAME.build(
        {"type": 0, "bit": 40, "name": b"time travel".ljust(46, b"\0")}
    )
    image = extended((magic, rows), incompatible_features=1 << 40 | 1 << 41)
    with pytest.raises(ImageError, match=r"unknown: time travel, bit 41$"):
        Layout.read(image.source)


def test_unknown_feature_is_told_though_the_extensions_are_broken_too() -> None:
    image = with_extension_length(0xFFFF_FFFF)
    image.change_header(incompatible_features=1 << 40)
    with pytest.raises(ImageError, match="unknown: bit 40"):
        Layout.read(image.source)


def test_backing_file_name_is_as_stored() -> None:
    assert Layout.read(plain(backing_file=b"/dev/\xff").source).backing_file == b"/dev/\xff"
    assert Layout.read(plain().source).backing_file is None


@pytest.mark.parametrize(
    ("geometry", "entries", "coverage", "needed"),
    [
        (Geometry(3, 16, 4, 1 << 40), 8192, 512 * MIB, 2048),
        (Geometry(3, 16, 4, (1 << 40) + 1), 8192, 512 * MIB, 2049),
        (Geometry(3, 16, 4, 1 << 40, extended_l2=True), 4096, 256 * MIB, 4096),
        (Geometry(2, 9, 4, 1 << 20), 64, 32 << 10, 32),
        (Geometry(3, 21, 4, 1), 1 << 18, 1 << 39, 1),
        (Geometry(3, 16, 4, 0), 8192, 512 * MIB, 0),
    ],
)
def test_shape_of_the_tables(geometry, entries, coverage, needed) -> None:
    assert geometry.l2_entries == entries
    assert geometry.l2_coverage == coverage
    assert geometry.l1_entries_needed == needed


@pytest.mark.parametrize(("order", "entries"), [(0, 524288), (3, 65536), (4, 32768), (6, 8192)])
def test_shape_of_a_refcount_block(order, entries) -> None:
    geometry = Geometry(3, 16, order, 0)
    assert geometry.refblock_entries == entries
    assert geometry.refcount_bits == 1 << order
    assert geometry.refcount_max == (1 << (1 << order)) - 1


@pytest.mark.parametrize(
    ("size", "clusters"), [(0, 0), (511, 0), (512, 1), (65536, 1), (65537, 1), (66048, 2)]
)
def test_guest_clusters_count_whole_sectors(size, clusters) -> None:
    assert Geometry(3, 16, 4, size).guest_clusters == clusters


@pytest.mark.parametrize(("size", "end"), [(0, 0), (1, 512), (512, 512), (513, 1024)])
def test_file_ends_with_a_sector(size, end) -> None:
    assert sector_end(size) == end


@given(data=st.binary(max_size=300))
def test_any_bytes_give_a_layout_or_an_image_error(data) -> None:
    assert "\n" not in str(refusal(Layout.read, Bytes(data)))


rich = ImageBuilder(
    size=8 * MIB,
    backing_file=b"base.qcow2",
    backing_format=b"qcow2",
    more_extensions=(feature_name_table(), (0x1234, b"vendor")),
)
rich.add_bitmap("b", {1})
RICH = bytes(rich.build().data)


@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 800), st.sampled_from([0, 1, 2, 127, 128, 255]) | st.integers(0, 255)
        ),
        min_size=1,
        max_size=6,
    ),
    end=st.none() | st.integers(0, 1000),
)
def test_any_damaged_header_gives_a_layout_or_an_image_error(changes, end) -> None:
    data = bytearray(RICH[:end])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    assert "\n" not in str(refusal(Layout.read, Bytes(bytes(data))))


CLAIMS: dict[str, dict[str, int]] = {
    "2^60 bytes of disk": {"size": 1 << 60, "l1_size": 1 << 22},
    "tables at their limits": {"l1_size": 1 << 22, "refcount_table_clusters": 128},
    "2^32 snapshots": {"nb_snapshots": 0xFFFF_FFFF},
    "largest clusters": {"cluster_bits": 21, "header_length": 1 << 21},
    "tables at the end of any file": {
        "l1_table_offset": (1 << 63) - (1 << 21),
        "refcount_table_offset": (1 << 63) - (1 << 21),
        "snapshots_offset": (1 << 63) - (1 << 21),
    },
}


@pytest.mark.parametrize("fields", CLAIMS.values(), ids=CLAIMS)
def test_what_a_short_file_claims_costs_nothing(fields) -> None:
    image = changed(**fields)
    source = Bytes(bytes(image.data[:200]))
    tracemalloc.start()
    refusal(Layout.read, source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB
