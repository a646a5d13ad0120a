"""Which LUKS headers open no disk: what the real QEMU refuses, whatever the password, is found."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from instarfs.render.check import check_messages
from planner.check.check import check_image
from planner.check.report import Report
from planner.findings.kinds import FindingKind
from planner.qcow2.header import CRYPT_LUKS
from planner.qcow2.layout import Layout
from planner.qcow2.luks import SLOT_BYTES, SLOTS_AT, LuksHeader, encode_luks
from planner.source import Bytes
from tests.images.builder import ImageBuilder
from tests.images.luks_headers import ACCEPTED, LOCKED, REFUSED
from tests.images.matrix import KEY, Row, build
from tests.oracle.scene import FileSource

NO_KEY_FITS = "Invalid password, cannot unlock any keyslot"
OPENED_BY_NONE = ("no-keys", "digest-of-zeros", "digest-salt-of-ones")
SECTOR = 512


def qemu_refuses(image: Path) -> str:
    """Why QEMU does not open the disk; empty where it does, or only the password is wrong."""
    options = f"driver=qcow2,file.filename={image},encrypt.key-secret=s0"
    done = subprocess.run(
        ["qemu-io", "-r", "--object", f"secret,{KEY}", "--image-opts", options, "-c", "quit"],
        check=False,
        capture_output=True,
        text=True,
    )
    return "" if NO_KEY_FITS in done.stderr else done.stderr


def checked(image: Path) -> Report:
    with image.open("rb") as file:
        return check_image(FileSource(file.fileno()))


def with_header(path: Path, header: LuksHeader) -> Path:
    raw = encode_luks(header)
    more = max(0, min(header.payload_offset, 1 << 14) * SECTOR - len(raw))
    area = raw + random.Random(1).randbytes(more)
    path.write_bytes(ImageBuilder(crypt_method=CRYPT_LUKS, luks_header=area).build().data)
    return path


@pytest.mark.parametrize("name", sorted(REFUSED | LOCKED))
def test_refused(name: str, tmp_path: Path) -> None:
    header = (REFUSED | LOCKED)[name]
    image = with_header(tmp_path / "image", header)
    # One that no key opens gets the answer that a wrong password gets.
    assert qemu_refuses(image) or name in OPENED_BY_NONE
    report = checked(image)
    assert FindingKind.LUKS_HEADER_INVALID in report.counts()
    assert report.verdict == "corrupt"
    assert any(str(report.luks_error) in line for line in check_messages(report))


@pytest.mark.parametrize("name", sorted(ACCEPTED.keys() - LOCKED.keys()))
def test_accepted(name: str, tmp_path: Path) -> None:
    header = ACCEPTED[name]
    image = with_header(tmp_path / "image", header)
    if header.key_bytes % 32:
        # QEMU aborts on 192-bit keys, whose material is no whole number of sectors: others do not.
        assert "QEMU_IS_ALIGNED" in qemu_refuses(image) or header.key_bytes == 16
    else:
        assert not qemu_refuses(image)
    assert FindingKind.LUKS_HEADER_INVALID not in checked(image).counts()


DAMAGE = {
    "magic": (0, b"L"),
    **{f"version-{n}": (6, n.to_bytes(2, "big")) for n in (0, 2, 257)},
    "cipher": (8, b"b"),
    "cipher-twofish": (8, b"twofish\0"),
    "cipher-endless": (8, b"a" * 32),
    "mode": (40, b"y"),
    "mode-cbc": (40, b"cbc-plain64\0"),
    "mode-without-iv": (43, b"\0"),
    "hash": (72, b"z"),
    "hash-sha1": (72, b"sha1\0\0\0"),
    **{f"payload-{n}": (104, n.to_bytes(4, "big")) for n in (0, 7, 8, 4039, 4041, 1 << 31)},
    **{f"key-bytes-{n}": (108, n.to_bytes(4, "big")) for n in (0, 32, 48, 63, 65, 128, 1 << 30)},
    "digest": (112, b"?" * 20),
    "digest-salt": (132, b"?" * 32),
    "digest-iterations-0": (164, bytes(4)),
    "uuid": (168, b"\xff" * 40),
}
SLOT_DAMAGE = {
    **{f"active-{n:#x}": (0, n.to_bytes(4, "big")) for n in (0, 1, 0xDEAD, 0xAC71F3)},
    **{f"iterations-{n}": (4, n.to_bytes(4, "big")) for n in (0, 1)},
    "salt": (8, b"?" * 32),
    **{f"place-{n}": (40, n.to_bytes(4, "big")) for n in (0, 7, 9, 600, 4000, 1 << 31)},
    **{f"stripes-{n}": (44, n.to_bytes(4, "big")) for n in (0, 3999, 4001)},
}


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with a real LUKS header, which the password opens."""
    image = build(Row(cluster_bits=12, encryption="luks"), tmp_path_factory.mktemp("luks"), "luks")
    assert not qemu_refuses(image)
    return image.read_bytes()


def spoiled(path: Path, encrypted: bytes, at: int, content: bytes) -> Path:
    crypto = Layout.read(Bytes(encrypted)).extensions.crypto
    assert crypto is not None
    data = bytearray(encrypted)
    data[crypto.offset + at : crypto.offset + at + len(content)] = content
    path.write_bytes(data)
    return path


def must_agree(image: Path) -> None:
    why, report = qemu_refuses(image), checked(image)
    no_key = "no password opens the disk" in str(report.luks_error)
    assert bool(report.luks_error) == bool(why) or no_key, (why, report.luks_error)
    assert (FindingKind.LUKS_HEADER_INVALID in report.counts()) == bool(report.luks_error)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_field_of_a_real_header(name: str, encrypted: bytes, tmp_path: Path) -> None:
    must_agree(spoiled(tmp_path / "image", encrypted, *DAMAGE[name]))


def test_a_salt_of_zeros_is_lost_with_its_key(encrypted: bytes, tmp_path: Path) -> None:
    zeros = bytes(32)
    for slot in (0, 7):
        at = SLOTS_AT + slot * SLOT_BYTES + 8
        report = checked(spoiled(tmp_path / "image", encrypted, at, zeros))
        # There is no key in slot 7.
        assert ("no password opens" in str(report.luks_error)) == (slot == 0)


@pytest.mark.parametrize("slot", [0, 3, 7])
@pytest.mark.parametrize("name", SLOT_DAMAGE)
def test_a_damaged_key_slot(name: str, slot: int, encrypted: bytes, tmp_path: Path) -> None:
    at, content = SLOT_DAMAGE[name]
    start = SLOTS_AT + slot * SLOT_BYTES
    must_agree(spoiled(tmp_path / "image", encrypted, start + at, content))


@pytest.mark.parametrize("length", [0, 591, 592, 4096, 260_095, 260_096, 261_000])
def test_a_pointer_that_gives_the_header_too_little(
    length: int, encrypted: bytes, tmp_path: Path
) -> None:
    """The header's own 592 bytes, and the material of its first key, must be within."""
    extension = next(
        each for each in Layout.read(Bytes(encrypted)).extensions.all if each.magic == 0x0537_BE77
    )
    data = bytearray(encrypted)
    data[extension.offset + 8 : extension.offset + 16] = length.to_bytes(8, "big")
    image = tmp_path / "image"
    image.write_bytes(data)
    must_agree(image)
    assert FindingKind.LUKS_HEADER_LENGTH in checked(image).counts()
    assert not checked(image).complete


@pytest.mark.parametrize(
    "content", [bytes(SECTOR), b"somebody's log, line by line\n" * 40], ids=["zeros", "text"]
)
@pytest.mark.parametrize("sector", [8, 300])
def test_key_material_that_is_overwritten(
    sector: int, content: bytes, encrypted: bytes, tmp_path: Path
) -> None:
    """Of one sector: QEMU says of the right password what it says of a wrong one."""
    image = spoiled(tmp_path / "image", encrypted, sector * SECTOR, content)
    options = f"driver=qcow2,file.filename={image},encrypt.key-secret=s0"
    command = ["qemu-io", "-r", "--object", f"secret,{KEY}", "--image-opts", options, "-c", "quit"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert NO_KEY_FITS in done.stderr
    report = checked(image)
    assert f"LUKS key slot 0 is overwritten in sector {sector}" in str(report.luks_error)
    assert report.verdict == "corrupt"


def test_a_header_that_is_wiped_hides_nothing(encrypted: bytes, tmp_path: Path) -> None:
    healthy = check_image(Bytes(encrypted)).counts()
    image = spoiled(tmp_path / "image", encrypted, 0, bytes(4096))
    must_agree(image)
    report = checked(image)
    assert report.complete
    assert report.counts() == {**healthy, FindingKind.LUKS_HEADER_INVALID: 1}
