"""Volumes: as sfdisk and LVM make them, and with the first copies of what describes them gone."""

import struct
import subprocess
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.guestfs.reading import Holes
from planner.guestfs.volumes.find import ENCRYPTED, Layout, find_volumes
from planner.guestfs.volumes.lvm import (
    AREA_MAGIC,
    MAX_TEXT,
    SEARCHED,
    TEXT_MARK,
    parse,
    read_physical,
)
from planner.guestfs.volumes.space import Segment, Space, linear
from planner.guestfs.work import Work, WorkSpent
from planner.source import Bytes, read_bytes
from tests.block_devices import attached, require_loop_devices
from tests.images.guest_files import make_disk, make_ext

MIB = 1 << 20
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
GPT = f"""label: gpt
start=2048, size=16384, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, name="EFI System"
start=20480, size=32768, type={LINUX}, name="root"
"""
MBR = """label: dos
start=2048, size=16384, type=c
start=20480, size=32768, type=83
start=55296, type=5
start=57344, size=16384, type=82
start=75776, size=8192, type=83
"""


@pytest.fixture(scope="module")
def filesystem(tmp_path_factory):
    """A small ext4."""
    root = tmp_path_factory.mktemp("volume")
    (root / "tree").mkdir()
    (root / "tree" / "file").write_bytes(bytes(range(256)) * 100)
    make_ext(root / "image", root / "tree", ["-t", "ext4", "-b", "1024"], 16 * MIB)
    return root / "image"


def disk_with(tmp_path: Path, script: str, filesystem: Path) -> bytes:
    make_disk(tmp_path / "disk", script, {10 * MIB: filesystem})
    return (tmp_path / "disk").read_bytes()


def shown(layout: Layout) -> list[tuple[str, str, int, int]]:
    return [
        (each.name, each.holds, each.space.segments[0].legs[0], each.space.size)
        for each in layout.volumes
    ]


def test_a_whole_disk_is_one_volume(filesystem) -> None:
    layout = find_volumes(Bytes(filesystem.read_bytes()))
    assert shown(layout) == [("whole disk (a label)", "ext4", 0, 16 * MIB)]
    assert not layout.notes


def test_gpt(tmp_path, filesystem) -> None:
    layout = find_volumes(Bytes(disk_with(tmp_path, GPT, filesystem)))
    assert shown(layout) == [
        ("partition 1 (EFI System)", "", MIB, 8 * MIB),
        ("partition 2 (root)", "ext4", 10 * MIB, 16 * MIB),
    ]
    assert not layout.notes
    own = sorted(layout.own)
    assert own[:3] == [(0, 512), (512, 512), (1024, 16384)]
    assert own[3:] == [(48 * MIB - 33 * 512, 16384), (48 * MIB - 512, 512)]


@pytest.mark.parametrize("gone", [(0, 512), (0, 34 * 512), (1024, 16384), (512, 512)])
def test_of_gpt_the_first_copy_may_be_gone(tmp_path, filesystem, gone) -> None:
    data = bytearray(disk_with(tmp_path, GPT, filesystem))
    whole = find_volumes(Bytes(bytes(data)))
    data[gone[0] : sum(gone)] = bytes(gone[1])
    layout = find_volumes(Bytes(bytes(data)))
    assert shown(layout) == shown(whole)
    assert bool(layout.notes) == (gone != (0, 512))


def test_of_gpt_the_backup_may_be_gone(tmp_path, filesystem) -> None:
    data = disk_with(tmp_path, GPT, filesystem)
    layout = find_volumes(Bytes(data[: 40 * MIB] + bytes(8 * MIB)))
    assert shown(layout) == shown(find_volumes(Bytes(data)))


def test_a_backup_is_found_where_the_disk_was_grown_later(tmp_path, filesystem) -> None:
    data = disk_with(tmp_path, GPT, filesystem)
    damaged = data[:1024] + bytes(16384) + data[1024 + 16384 :] + bytes(8 * MIB)
    assert shown(find_volumes(Bytes(damaged))) == shown(find_volumes(Bytes(data)))


def test_mbr_with_logical_partitions(tmp_path, filesystem) -> None:
    data = disk_with(tmp_path, MBR, filesystem)
    layout = find_volumes(Bytes(data))
    assert shown(layout) == [
        ("partition 1", "", MIB, 8 * MIB),
        ("partition 2 (a label)", "ext4", 10 * MIB, 16 * MIB),
        ("partition 5", "", 57344 * 512, 8 * MIB),
        ("partition 6", "", 75776 * 512, 4 * MIB),
    ]
    gone = bytearray(data)
    gone[55296 * 512 : 55296 * 512 + 512] = bytes(512)
    layout = find_volumes(Bytes(bytes(gone)))
    assert len(layout.volumes) == 2
    assert "logical partitions" in layout.notes[0]


def test_a_chain_of_logical_partitions_that_bites_its_tail_ends(tmp_path, filesystem) -> None:
    data = bytearray(disk_with(tmp_path, MBR, filesystem))
    at = 55296 * 512
    data[at + 446 + 16 + 8 : at + 446 + 16 + 12] = bytes(4)
    data[at + 446 + 16 + 8] = 1  # the next table a sector on, which is a copy of this one
    data[at + 512 : at + 1024] = data[at : at + 512]
    assert len(find_volumes(Bytes(bytes(data))).volumes) <= 4


def test_without_any_table_file_systems_are_looked_for(tmp_path, filesystem) -> None:
    data = bytearray(disk_with(tmp_path, MBR, filesystem))
    data[:512] = bytes(512)
    layout = find_volumes(Bytes(bytes(data)))
    assert [(each.name, each.holds) for each in layout.volumes] == [
        (f"at offset {10 * MIB} (a label)", "ext4")
    ]
    assert "no partition table" in layout.notes[0]
    # With a copy of the superblock it is where it was, not where the copy is.
    data[10 * MIB + 1024 : 10 * MIB + 2048] = bytes(1024)
    [volume] = find_volumes(Bytes(bytes(data))).volumes
    assert volume.name == f"at offset {10 * MIB} (a label)"
    assert volume.filesystem is not None
    assert "the copy at 8389632 was used" in volume.filesystem.notes[0]


@pytest.mark.parametrize(
    ("offset", "mark", "word"),
    [
        (0, b"LUKS\xba\xbe\0\2", "crypto_LUKS"),
        (3, b"-FVE-FS-", "BitLocker"),
        (4086, b"SWAPSPACE2", "swap"),
        (0, b"nothing known", ""),
    ],
)
def test_what_is_no_file_system_is_named_as_such(filesystem, offset, mark, word) -> None:
    """What is encrypted too, whatever an earlier file system left behind."""
    data = bytearray(filesystem.read_bytes() if word in ENCRYPTED else 8 * MIB)
    data[offset : offset + len(mark)] = mark
    volume = find_volumes(Bytes(bytes(data))).volumes[0]
    assert volume.filesystem is None
    assert volume.holds == word


# ---- LVM ----

CONFIG = """devices {{ dir="/dev" scan=["/dev"] use_devicesfile=0 obtain_device_list_from_udev=0
  filter=["a|^{device}$|","r|.*|"] }}
activation {{ udev_sync=0 udev_rules=0 monitoring=0 }}
backup {{ backup=0 archive=0 }}
"""


@pytest.fixture(scope="module")
def physical(tmp_path_factory, filesystem):
    """A physical volume by the real LVM, without device-mapper: two volumes, one in two pieces."""
    root = tmp_path_factory.mktemp("lvm")
    file = root / "pv"
    with file.open("wb") as made:
        made.truncate(40 * MIB)
    require_loop_devices()
    with attached(file) as device:
        (root / "lvm.conf").write_text(CONFIG.format(device=device))

        def lvm(*words: str) -> None:
            command = ["lvm", words[0], "--driverloaded", "n", "-y", *words[1:]]
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                env={"LVM_SYSTEM_DIR": str(root), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            )
            assert done.returncode == 0, done.stderr

        new = ("lvcreate", "-an", "-Zn", "-Wn")
        lvm("pvcreate", str(device))
        lvm("vgcreate", "the-group", str(device))
        lvm(*new, "-L", "8M", "-n", "root", "the-group")
        lvm(*new, "-L", "8M", "-n", "swap_1", "the-group")
        lvm("lvextend", "-L", "16M", "the-group/root")
    volumes = find_volumes(Bytes(file.read_bytes())).volumes
    data = filesystem.read_bytes()
    with file.open("r+b") as written:
        for each in volumes[0].space.segments:
            written.seek(each.legs[0])
            written.write(data[each.start : each.start + each.length])
    return file.read_bytes()


def test_logical_volumes_are_found_on_a_disk_and_in_a_partition(physical) -> None:
    layout = find_volumes(Bytes(physical))
    found = [(each.name, each.holds, each.space.size) for each in layout.volumes]
    assert found == [
        ("the-group/root (a label)", "ext4", 16 * MIB),
        ("the-group/swap_1", "", 8 * MIB),
    ]
    assert len(layout.volumes[0].space.segments) == 2
    assert layout.own == [(0, MIB)]
    assert not layout.notes


@pytest.mark.parametrize("gone", [(512, 512), (4096, 512), (0, 4608)])
def test_of_lvm_label_and_header_may_be_gone(physical, gone) -> None:
    data = bytearray(physical)
    data[gone[0] : sum(gone)] = bytes(gone[1])
    layout = find_volumes(Bytes(bytes(data)))
    assert [each.holds for each in layout.volumes] == ["ext4", ""]


def test_metadata_that_ends_in_the_middle_is_read_as_far_as_it_goes() -> None:
    assert parse('g { id = "a\\"b" # c\n n = [ "x", 5, "y" ] s { t = -3 ') == {
        "g": {"id": 'a"b', "n": ["x", 5, "y"], "s": {"t": -3}}
    }
    assert parse("{" * 100) == parse("{" * 8)
    assert parse("= = [") == {"": "="}


def test_what_begins_many_comments_is_one() -> None:
    before = time.process_time()
    assert parse("a = 1 " + "#" * 26) == {"a": 1}
    assert time.process_time() - before < 1.0
    assert parse("#" * 100_000 + "\na = 1") == {"a": 1}


def test_a_text_is_held_once_however_many_marks_are_in_it() -> None:
    raw = TEXT_MARK * (SEARCHED // len(TEXT_MARK))
    tracemalloc.start()
    try:
        assert find_volumes(Bytes(raw)).notes
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * SEARCHED


def test_looking_for_texts_among_zeros_takes_what_is_looked_at() -> None:
    raw = bytearray(SEARCHED)
    for at, seqno in ((4000, 1), (8000, 2)):
        text = b"group { seqno = %d } %s" % (seqno, TEXT_MARK * 2)
        raw[at : at + len(text)] = text
    source = Holes(Bytes(bytes(raw)))
    tracemalloc.start()
    try:
        physical = read_physical(source, 0, Work())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert physical is not None
    assert peak < 4 * SEARCHED


def test_zeros_behind_a_text_are_none_of_it() -> None:
    label = b"LABELONE" + struct.pack("<QII", 1, 0, 32) + b"LVM2 001" + bytes(56)
    label += struct.pack("<QQ", 1024, 1 << 40)
    header = bytes(4) + AREA_MAGIC + struct.pack("<IQQQQ", 1, 1024, 1 << 40, 512, MAX_TEXT)
    text = TEXT_MARK + b" group { physical_volumes { } }"
    raw = bytes(512) + label.ljust(512, b"\0") + header.ljust(512, b"\0") + text
    disk = Holes(Bytes(raw.ljust(1536 + MAX_TEXT, b"\0")))
    tracemalloc.start()
    try:
        physical = read_physical(disk, 0, Work(0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert physical is not None
    assert "does not name it" in physical.notes[0]
    assert peak < 4 * MAX_TEXT


def test_a_text_of_which_reading_takes_more_than_there_is_of_the_image_is_not_read() -> None:
    raw = TEXT_MARK + b" a {}" * ((SEARCHED - 100) // 5)
    physical = read_physical(Holes(Bytes(raw)), 0, Work())
    assert physical is not None
    with pytest.raises(WorkSpent):
        read_physical(Holes(Bytes(raw)), 0, Work(0))


def test_stripes_and_what_is_on_another_disk() -> None:
    disk = bytes(at // 64 for at in range(64 * 12))
    space = Space(Bytes(disk), [Segment(0, 256, (128, 512), 64), Segment(256, 64, (-1,), 64)])
    assert read_bytes(space, 0, 320) == b"".join(bytes([each]) * 64 for each in (2, 8, 3, 9, 0))


@given(data=st.data(), legs=st.integers(1, 3), ranges=st.lists(st.integers(0, 1100), max_size=8))
def test_pieces_are_where_the_bytes_are(data, legs, ranges) -> None:
    places = data.draw(st.permutations([100, 400, 700]))[:legs]
    space = Space(
        Bytes(bytes(1200)), [Segment(10, legs * 96, tuple(places), 32 if legs > 1 else 96)]
    )
    bounds = sorted(set(ranges))[: len(set(ranges)) // 2 * 2]
    start, end = (np.array(bounds[at::2], dtype=np.int64) for at in (0, 1))
    pieces = space.pieces(start, end)
    marked = bytearray(1200)
    for low, high in zip(start.tolist(), end.tolist(), strict=True):
        marked[low:high] = b"x" * (high - low)
    found = bytearray(space.size)
    for at in range(len(pieces.start)):
        low, length, disk = (
            int(column[at]) for column in (pieces.start, pieces.length, pieces.disk)
        )
        assert start[pieces.row[at]] <= disk < disk + length <= end[pieces.row[at]]
        found[low : low + length] = marked[disk : disk + length]
    assert found == read_bytes(Space(Bytes(bytes(marked)), space.segments), 0, space.size)


def test_a_range_of_countless_stripes_is_taken_in_rows() -> None:
    space = Space(Bytes(b""), [Segment(0, 1 << 45, (0, 1 << 44), 4096)])
    pieces = space.pieces(np.array([5000]), np.array([1 << 40]))
    assert len(pieces.start) == 1
    assert pieces.start[0] <= 8192
    assert linear(5, 7)[0].on_each == 5
