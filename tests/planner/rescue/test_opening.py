"""planner.rescue.opening: what is made of an image whose header leads to garbage, QEMU opens."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs.render.rescue import Asked, rescue_txt
from planner.check.check import check_image
from planner.qcow2.bitmaps import read_bitmaps
from planner.qcow2.header import CRYPT_LUKS, CRYPT_NONE
from planner.qcow2.layout import Layout
from planner.repair.overlay import Overlay
from planner.rescue.rescue import Rescue, rescue
from planner.source import Bytes, read_bytes
from tests.images.builder import Image, ImageBuilder
from tests.images.matrix import run_until_calm

SIZE = 4096
Places = dict[str, list[tuple[int, int]]]
"""Of what the header leads to: where it lies, and how many bytes of it there are."""


def run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """With two snapshots and two bitmaps."""
    path = tmp_path_factory.mktemp("plain") / "image"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={SIZE}", path, "8M")
    for number, name in enumerate(("s1", "s2"), 1):
        run("qemu-io", "-c", f"write -P {number} {number}M 2M", path)
        run("qemu-img", "snapshot", "-c", name, path)
    run("qemu-img", "bitmap", "--add", path, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", path, "b1")
    run("qemu-io", "-c", "write -P 3 2M 1M", path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("encrypted") / "image"
    secret = "--object", "secret,id=s,data=word"
    luks = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size={SIZE}"
    run_until_calm("qemu-img", "create", "-q", "-f", "qcow2", *secret, "-o", luks, path, "8M")
    disk = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    run("qemu-io", *secret, "-c", "write -P 1 0 1M", "--image-opts", disk)
    return path.read_bytes()


def places_of(data: bytes) -> Places:
    layout = Layout.read(Bytes(data))
    header, extensions = layout.header, layout.extensions
    found = {
        "header": [(0, SIZE)],
        "extensions": [(header.header_length, SIZE - header.header_length)],
        "first extension": [(header.header_length, 8)],
        "L1": [(header.l1_table_offset, header.l1_size * 8)],
        "refcounts": [(header.refcount_table_offset, SIZE)],
    }
    if header.nb_snapshots:
        found["snapshots"] = [(header.snapshots_offset, SIZE)]
        found["snapshots' L1"] = [
            (each.l1_table_offset, SIZE) for each in Image(bytearray(data)).snapshots
        ]
    if extensions.bitmaps is not None:
        pointer = extensions.bitmaps
        tables = read_bitmaps(Bytes(data), pointer, layout.geometry)
        found["bitmaps"] = [(pointer.bitmap_directory_offset, pointer.bitmap_directory_size)]
        found["bitmaps' tables"] = [(each.bitmap_table_offset, 8) for each in tables]
    if extensions.crypto is not None:
        found["LUKS"] = [(extensions.crypto.offset, 512)]
        pointer_at = next(each.offset for each in extensions.all if each.magic == 0x0537BE77)
        found["LUKS extension"] = [(pointer_at, 16)]
    return found


FILLS: dict[str, Callable[[int], bytes]] = {
    "garbage": random.Random(1).randbytes,
    "ones": lambda length: b"\xff" * length,
    "text": lambda length: (b"words, and more of them. " * length)[:length],
}


def damaged(data: bytes, names: str, fill: str) -> bytes:
    image, places = bytearray(data), places_of(data)
    for offset, length in (place for name in names.split(" + ") for place in places[name]):
        image[offset : offset + length] = FILLS[fill](length)
    return bytes(image)


def rescued(data: bytes) -> tuple[Rescue, bytes]:
    found = rescue(Bytes(data))
    return found, read_bytes(Overlay(Bytes(data), found.plan), 0, found.plan.size_after)


def opens(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return (
        subprocess.run(["qemu-img", "info", path], check=False, capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(
    ("names", "fill"),
    [
        ("snapshots", "garbage"),
        ("snapshots", "ones"),
        ("snapshots", "text"),
        ("snapshots + L1", "ones"),
        ("snapshots + bitmaps", "text"),
        ("bitmaps", "ones"),
        ("bitmaps' tables", "garbage"),
        ("first extension", "ones"),
        ("refcounts + bitmaps", "text"),
        ("L1 + bitmaps' tables", "ones"),
    ],
)
def test_whatever_is_garbage_qemu_opens_what_is_made(
    plain: bytes, names: str, fill: str, tmp_path: Path
) -> None:
    data = damaged(plain, names, fill)
    found, end = rescued(data)
    assert found.refused is None
    assert opens(tmp_path / "image", end)
    assert read_bytes(Overlay(Bytes(end), found.plan.inverse()), 0, len(data)) == data
    if "bitmaps" not in names and "extension" not in names:
        assert not any("bitmap" in note for note in found.left_out)


def test_snapshots_come_back_although_the_disk_leads_to_garbage(plain: bytes) -> None:
    found, _ = rescued(damaged(plain, "snapshots + L1", "garbage"))
    assert len(found.snapshots) == 2
    assert not found.left_out


def test_of_snapshots_that_nothing_is_left_of_none_is_counted(plain: bytes) -> None:
    found, end = rescued(damaged(plain, "snapshots + snapshots' L1", "garbage"))
    assert Image(bytearray(end)).header.nb_snapshots == 0
    assert any(
        "2 of 2 entries of the snapshot table are cut off" in note for note in found.left_out
    )
    assert found.count == 1
    told = rescue_txt(found, Asked("x"), None)
    assert "is left out" in told
    assert all(note in told for note in found.left_out)


def test_no_file_grows_over_what_its_garbage_leads_to() -> None:
    """A snapshot table behind the end would be read as what an entry leads to that was cut off."""
    builder = ImageBuilder(cluster_bits=12, size=4 << 20)
    builder.write(5, b"disk")
    builder.take_snapshot("s")
    builder.write(5, b"newer")
    image = builder.build()
    table, end = image.header.snapshots_offset, -(-len(image.data) // SIZE) * SIZE
    for led in (end, 1 << 50):
        image.set_word(image.l1_at(0), led | 1 << 63)
        image.data[table : table + SIZE] = FILLS["garbage"](SIZE)
        found = rescue(Bytes(bytes(image.data)))
        assert found.refused is None
        assert found.plan.size_after <= led


@pytest.mark.parametrize(("names", "fill"), [("LUKS extension", "garbage"), ("extensions", "text")])
def test_a_luks_header_that_nothing_leads_to_is_led_to_again(
    encrypted: bytes, names: str, fill: str, tmp_path: Path
) -> None:
    found, end = rescued(damaged(encrypted, names, fill))
    assert found.after.verdict == "clean"
    assert found.after.layout is not None
    assert found.after.layout.header.crypt_method == CRYPT_LUKS
    assert found.after.layout.extensions.crypto == Layout.read(Bytes(encrypted)).extensions.crypto
    path = tmp_path / "image"
    path.write_bytes(end)
    disk = f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"
    secret = "--object", "secret,id=s,data=word"
    run("qemu-io", *secret, "-c", "read -P 1 0 1M", "--image-opts", disk)
    assert "its LUKS header was found" in rescue_txt(found, Asked("x"), None)


def test_without_a_luks_header_it_is_said_why_qemu_does_not_open_it(
    encrypted: bytes, tmp_path: Path
) -> None:
    data = damaged(encrypted, "LUKS", "garbage")
    found = rescue(Bytes(data))
    assert found.plan.changes_nothing
    assert not opens(tmp_path / "image", data)
    assert "QEMU does not open it: LUKS" in rescue_txt(found, Asked("x"), None)


def test_what_may_be_ciphertext_is_said_to_be(encrypted: bytes) -> None:
    found, end = rescued(damaged(encrypted, "LUKS + extensions", "garbage"))
    assert Image(bytearray(end)).header.crypt_method == CRYPT_NONE
    assert "no LUKS header was found" in rescue_txt(found, Asked("x"), None)


def test_a_sound_image_loses_nothing(plain: bytes) -> None:
    found, _ = rescued(plain)
    assert found.plan.changes_nothing
    assert not found.left_out
    assert check_image(Bytes(plain)).verdict == "clean"
