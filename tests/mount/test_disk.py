"""disk.raw and snapshots/N on real mounts: as a disk for a kernel, and on images that are damaged,
changing, or in need of other files."""

import hashlib
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from instarfs.image.file import Image
from planner.qcow2.entries import COMPRESSED
from planner.qcow2.layout import Layout
from planner.qcow2.snapshots import ENTRY_BYTES, read_snapshots
from tests.block_devices import require_loop_devices
from tests.images.builder import ImageBuilder
from tests.mount.mounts import MakeMount, Mount, instarfs, make_image, run, settle, until

CLUSTER = 1 << 16
MIB = 1 << 20

SIZE_KEPT = 0.03
"""Seconds after which the kernel asks for the size of a disk anew: what the mount allows, and two
ticks of a slow clock. QEMU's tools change an image in less."""


def qemu_io(image: Path, *commands: str) -> None:
    run("qemu-io", *(word for command in commands for word in ("-c", command)), image)
    settle(image)


def write_image(path: Path, builder: ImageBuilder) -> Path:
    path.write_bytes(builder.build().data)
    settle(path)
    return path


def pread(path: Path, offset: int, size: int) -> bytes:
    """Read past the page cache of the reader's own buffers."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def convert(image: Path, raw: Path, *options: str) -> bytes:
    run("qemu-img", "convert", "-O", "raw", *options, image, raw)
    return raw.read_bytes()


def chain_of(mount: Mount) -> list[dict[str, object]]:
    members = json.loads(mount.read("image/chain.json"))["members"]
    assert isinstance(members, list)
    return members


# ---- what is there ----


def test_the_size_is_known_before_anything_is_read(mount: MakeMount, image: Path) -> None:
    assert (mount(image) / "disk.raw").stat().st_size == 64 * MIB


def test_the_disk_and_its_snapshots(mount: MakeMount, image: Path, tmp_path: Path) -> None:
    qemu_io(image, "write -P 1 0 1M", "write -c -P 2 2M 64k")
    run("qemu-img", "snapshot", "-c", "before", image)
    qemu_io(image, "write -P 3 512k 1M")
    it = mount(image)
    assert (it / "disk.raw").read_bytes() == convert(image, tmp_path / "raw")
    snapshot = it / "snapshots/0"
    expected = convert(image, tmp_path / "raw", "-l", "snapshot.name=before")
    assert (snapshot / "disk.raw").read_bytes() == expected
    assert names(snapshot) == ["disk.raw", "files.tsv", "info.json"]
    info = json.loads((snapshot / "info.json").read_text())
    assert (info["name"], info["disk-size"]) == ("before", 64 * MIB)
    assert names(it / "snapshots") == ["0"]
    for name in ("1", "-1", "00", "x"):
        assert not (it / "snapshots" / name).exists()


def test_the_state_of_a_machine(mount: MakeMount, image: Path) -> None:
    """It lies behind the disk, in the L1 table of the snapshot."""
    run("qemu-img", "resize", "-q", image, "1000000000")  # not all that its last L2 table maps
    qemu_io(image, "write -P 1 0 64k", "write -b -P 2 0 100k", "write -b -P 3 150k 50k")
    run("qemu-img", "snapshot", "-c", "running", image)
    # qemu-img thinks that there is no state: only a machine says how much there is.
    with Image.open(str(image)) as opened:
        layout = Layout.read(opened.source())
        (snapshot,) = read_snapshots(opened.source(), layout.header, layout.geometry).snapshots
    with image.open("r+b") as file:
        file.seek(snapshot.offset + ENTRY_BYTES)
        file.write((199_000).to_bytes(8, "big"))
    settle(image)
    expected = (b"\2" * (100 << 10) + bytes(50 << 10) + b"\3" * (50 << 10))[:199_000]
    it = mount(image) / "snapshots/0"
    assert names(it) == ["disk.raw", "files.tsv", "info.json", "vmstate.raw"]
    assert (it / "vmstate.raw").read_bytes() == expected
    assert pread(it / "disk.raw", 0, 1) == b"\1"


@contextmanager
def loop_mounted(disk: Path, directory: Path) -> Iterator[Path]:
    directory.mkdir()
    run("mount", "-o", "loop,ro", disk, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


def test_a_filesystem_inside_can_be_mounted(mount: MakeMount, tmp_path: Path) -> None:
    """ext4, made in here, with its files compared by checksum."""
    require_loop_devices()
    files, rng = tmp_path / "files", random.Random(7)
    (files / "deep/er").mkdir(parents=True)
    for number in range(40):
        folder = rng.choice((files, files / "deep", files / "deep/er"))
        (folder / f"file {number}").write_bytes(rng.randbytes(rng.choice((0, 10, 5000, 300_000))))
    raw = tmp_path / "ext4.raw"
    run("mkfs.ext4", "-q", "-d", files, raw, "32M")
    image = tmp_path / "ext4.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, image)
    settle(image)
    it = mount(image)

    def sums(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }

    with loop_mounted(it / "disk.raw", tmp_path / "inside") as inside:
        assert sums(inside) == sums(files)


# ---- damage ----


def test_only_what_is_damaged_cannot_be_read(mount: MakeMount, tmp_path: Path) -> None:
    builder = ImageBuilder(size=4 * MIB)
    for cluster in range(8):
        builder.write(cluster, bytes([cluster + 1]) * CLUSTER)
    builder.write_compressed(9, b"packed" * 1000)
    made = builder.build()
    made.set_bits(made.l2_at(3), 512)  # misaligned
    word = made.word(made.l2_at(9))
    start = word & ((1 << made.geometry.compressed_shift) - 1)
    made.data[start : start + 4] = b"\xff\xff\xff\xff"
    image = tmp_path / "damaged.qcow2"
    image.write_bytes(made.data)
    settle(image)
    disk = mount(image) / "disk.raw"
    assert word & COMPRESSED
    good = b"".join(bytes([cluster + 1]) * CLUSTER for cluster in range(8))
    # One read over it all gives what is before, the next one the error, and behind it all is well.
    assert pread(disk, 0, MIB) == good[: 3 * CLUSTER]
    for offset in (3 * CLUSTER, 3 * CLUSTER + 70, 9 * CLUSTER, 10 * CLUSTER - 4096):
        with pytest.raises(OSError, match="Input/output error"):
            pread(disk, offset, 10)
    assert pread(disk, 4 * CLUSTER, 4 * CLUSTER) == good[4 * CLUSTER :]
    assert pread(disk, 2 * CLUSTER + 100, CLUSTER) == good[2 * CLUSTER + 100 : 3 * CLUSTER]
    assert pread(disk, 10 * CLUSTER, 4096) == bytes(4096)
    rows = json.loads((disk.parent / "image/map.json").read_text())
    assert [row["start"] for row in rows if "damaged" in row] == [3 * CLUSTER]


def test_a_changed_image_reads_as_it_is_now(mount: MakeMount, image: Path) -> None:
    qemu_io(image, "write -P 1 0 64k")
    disk = mount(image) / "disk.raw"
    assert pread(disk, 0, 4) == b"\1" * 4
    qemu_io(image, "write -P 2 0 64k")
    assert pread(disk, 0, 4) == b"\2" * 4
    run("qemu-img", "resize", "-q", image, "96M")
    time.sleep(SIZE_KEPT)
    assert disk.stat().st_size == 96 * MIB
    other = make_image(image.with_name("other"), "1M")
    qemu_io(other, "write -P 3 0 64k")
    other.replace(image)
    time.sleep(SIZE_KEPT)
    assert (disk.stat().st_size, pread(disk, 0, 4)) == (MIB, b"\3" * 4)


def test_snapshots_come_and_go(mount: MakeMount, image: Path) -> None:
    it = mount(image)
    assert names(it / "snapshots") == []
    run("qemu-img", "snapshot", "-c", "one", image)
    assert names(it / "snapshots") == ["0"]
    assert (it / "snapshots/0/disk.raw").stat().st_size == 64 * MIB
    with (it / "snapshots/0/disk.raw").open("rb", buffering=0) as held:
        run("qemu-img", "snapshot", "-d", "one", image)
        settle(image)
        assert names(it / "snapshots") == []
        with pytest.raises(OSError, match="Stale file handle"):
            held.read(10)


def test_what_is_said_of_a_snapshot_follows_the_image_at_once(
    mount: MakeMount, image: Path
) -> None:
    """Though the kernel goes by the name, the size and what it has read of it for a second."""
    run("qemu-img", "snapshot", "-c", "x", image)
    info = mount(image) / "snapshots/0/info.json"
    before, name = info.read_bytes(), "x"
    for length in (2, 9, 4, 4):
        assert info.stat().st_size == len(before)
        with info.open("rb", buffering=0) as held:
            run("qemu-img", "snapshot", "-d", name, image)
            name = "x" * length
            run("qemu-img", "snapshot", "-c", name, image)
            with info.open("rb") as opened:
                size, after = os.fstat(opened.fileno()).st_size, opened.read()
            assert size == len(after)
            assert json.loads(after)["name"] == name
            assert held.read() == before
            assert os.fstat(held.fileno()).st_size == len(before)
        before = after


def test_a_listing_knows_how_long_it_is_what_is_said_of_a_snapshot(
    mount: MakeMount, image: Path
) -> None:
    run("qemu-img", "snapshot", "-c", "one", image)
    info = mount(image) / "snapshots/0/info.json"
    assert info.stat().st_size == len(info.read_bytes()) > 0


def test_an_encrypted_disk_is_not_read(mount: MakeMount, tmp_path: Path) -> None:
    builder = ImageBuilder(size=MIB, crypt_method=1)
    builder.write(0, b"cipher text")
    disk = mount(write_image(tmp_path / "aes.qcow2", builder)) / "disk.raw"
    with pytest.raises(PermissionError):
        pread(disk, 0, 10)
    assert "encrypted" in json.loads((disk.parent / "image/info.json").read_text())["disk.raw"]


# ---- chains ----


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An overlay of a smaller overlay of a still smaller raw file, in three directories."""
    rng = random.Random(11)
    (tmp_path / "images/base").mkdir(parents=True)
    (tmp_path / "images/base/raw").write_bytes(rng.randbytes(700_000))
    middle, top = tmp_path / "images/middle", tmp_path / "images/top"
    create = ("qemu-img", "create", "-q", "-f", "qcow2")
    run(*create, "-b", "base/raw", "-F", "raw", middle, "1M")
    run(*create, "-b", "../images/middle", "-F", "qcow2", top, "4M")
    qemu_io(middle, "write -P 5 64k 64k")
    qemu_io(top, "write -P 6 640k 64k", "write -z 0 64k")
    return top


def test_a_chain_is_followed(mount: MakeMount, overlay: Path, tmp_path: Path) -> None:
    it = mount(overlay, "--follow", str(overlay.parent))
    assert (it / "disk.raw").read_bytes() == convert(overlay, tmp_path / "theirs")
    opened = [(each["name"], each["depth"], each["opened"]) for each in chain_of(it)]
    assert opened == [("../images/middle", 0, True), ("base/raw", 1, True)]


def test_a_changed_member_reads_as_it_is_now(mount: MakeMount, overlay: Path) -> None:
    disk = mount(overlay, "--follow", str(overlay.parent)) / "disk.raw"
    before = pread(disk, 300_000, 4)
    with (overlay.parent / "base/raw").open("r+b") as file:
        file.seek(300_000)
        file.write(bytes(255 - byte for byte in before))
    assert pread(disk, 300_000, 4) == bytes(255 - byte for byte in before)


def test_without_follow_only_what_the_image_holds_is_read(mount: MakeMount, overlay: Path) -> None:
    it = mount(overlay)
    assert pread(it / "disk.raw", 640 << 10, 4) == b"\6" * 4
    assert pread(it / "disk.raw", 0, 4) == bytes(4)
    with pytest.raises(PermissionError):
        pread(it / "disk.raw", 1 << 20, 4)
    (member,) = chain_of(it)
    assert member["opened"] is False
    assert member["reason"] == "no directory is followed; see --follow"
    unknown = [row for row in json.loads(it.read("image/map.json")) if "unknown" in row]
    assert sum(row["length"] for row in unknown) == 4 * MIB - 2 * CLUSTER


def test_a_data_file_is_followed(mount: MakeMount, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    options = f"data_file={tmp_path}/data"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, "1M")
    qemu_io(image, "write -P 9 64k 64k")
    expected = bytes(CLUSTER) + b"\x09" * CLUSTER
    closed = mount(image) / "disk.raw"
    assert pread(closed, 0, 10) == bytes(10)
    with pytest.raises(PermissionError):
        pread(closed, CLUSTER, 10)
    assert pread(mount(image, "--follow", str(tmp_path)) / "disk.raw", 0, 2 * CLUSTER) == expected


def test_what_is_outside_of_the_followed_directory_is_not_opened(
    mount: MakeMount, tmp_path: Path
) -> None:
    (tmp_path / "followed").mkdir()
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    builder = ImageBuilder(size=MIB, backing_file=b"../secret", backing_format=b"raw")
    image = write_image(tmp_path / "followed/image.qcow2", builder)
    it = mount(image, "--follow", str(tmp_path / "followed"))
    with pytest.raises(PermissionError):
        pread(it / "disk.raw", 0, 10)
    (member,) = chain_of(it)
    assert member["opened"] is False
    assert "in none of the followed directories" in str(member["reason"])


def test_a_directory_to_follow_must_be_one(image: Path, tmp_path: Path) -> None:
    done = instarfs("map", "--follow", image, image)
    assert done.returncode == 1
    assert "cannot be followed: Not a directory" in done.stderr


def test_the_blocks_of_a_disk_are_those_that_hold_something(
    mount: MakeMount, tmp_path: Path
) -> None:
    image = tmp_path / "sparse.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "256G")
    run("qemu-io", "-c", "write -q -P 65 0 4M", image)
    run("qemu-img", "snapshot", "-c", "one", image)
    run("qemu-io", "-c", "write -q -P 66 100G 64k", image)
    settle(image)
    it = mount(image)
    disk, snapshot = it / "disk.raw", it / "snapshots/0/disk.raw"
    with disk.open("rb"), snapshot.open("rb"):
        until(lambda: disk.stat().st_blocks == (4096 + 64) * 2, "the count")
        until(lambda: snapshot.stat().st_blocks == 4096 * 2, "that of the snapshot")
    assert disk.stat().st_size == snapshot.stat().st_size == 1 << 38
