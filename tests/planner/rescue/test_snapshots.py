"""planner.rescue.snapshots: snapshots that the table lost, listed again by their L1 tables."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from planner.check.check import check_image
from planner.errors import HeaderUnknown
from planner.qcow2 import entries
from planner.repair.overlay import Overlay
from planner.rescue.rescue import Rescue, rescue
from planner.rescue.snapshots import MADE_NAME
from planner.source import Bytes, read_bytes
from tests.images.builder import Image, ImageBuilder

SIZE = 4096


@cache
def sound() -> bytes:
    builder = ImageBuilder(cluster_bits=12, size=4 << 20)
    for cluster in (0, 1, 5, 600):
        builder.write(cluster, bytes([cluster % 251 + 1]) * SIZE)
    builder.take_snapshot("before upgrade")
    builder.write(0, b"new" * 1000)
    builder.take_snapshot("after")
    builder.write(5, b"newer" * 700)
    for cluster in range(20, 120):
        builder.write(cluster, b"newest" * 600)
    return bytes(builder.build().data)


def without_count(image: Image) -> None:
    """The header counts none; the table is there."""
    image.change_header(nb_snapshots=0)


def without_table(image: Image) -> None:
    """The table is zeros, and the header counts it."""
    table = image.header.snapshots_offset
    image.data[table : table + SIZE] = bytes(SIZE)


def without_both(image: Image) -> None:
    without_table(image)
    image.change_header(nb_snapshots=0, snapshots_offset=0)


def without_the_last(image: Image) -> None:
    image.change_header(nb_snapshots=1)


LOSSES = (without_count, without_table, without_both, without_the_last)


def lost(loss: Callable[[Image], None]) -> bytes:
    image = Image(bytearray(sound()))
    loss(image)
    return bytes(image.data)


def rescued(data: bytes) -> tuple[Rescue, bytes]:
    found = rescue(Bytes(data))
    return found, read_bytes(Overlay(Bytes(data), found.plan), 0, found.plan.size_after)


def disk_of(path: Path, snapshot: str) -> bytes:
    raw = path.with_suffix(".raw")
    arguments = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    subprocess.run(
        ["qemu-img", "convert", "-O", "raw", *arguments, str(path), str(raw)], check=True
    )
    return raw.read_bytes()


@pytest.mark.parametrize("count", [3, 4, 7, 60])
def test_entries_of_zeros_are_no_snapshots_in_another_version_either(count: int) -> None:
    image = Image(bytearray(sound()))
    image.change_header(nb_snapshots=count)
    found, outcome = rescued(bytes(image.data))
    assert found.headers.best is not None
    assert found.headers.best.changed == ("nb_snapshots",)
    assert outcome == sound()


@pytest.mark.parametrize("loss", LOSSES)
def test_qemu_reads_every_snapshot_as_before(loss: Callable[[Image], None], tmp_path: Path) -> None:
    true, path = tmp_path / "true", tmp_path / "rescued"
    true.write_bytes(sound())
    found, end = rescued(lost(loss))
    path.write_bytes(end)
    assert found.count == len(found.snapshots) == (1 if loss is without_the_last else 2)
    assert found.after.verdict == "clean"
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    info = subprocess.run(
        ["qemu-img", "info", "--output=json", path], check=True, capture_output=True
    )
    listed = {each["name"] for each in json.loads(info.stdout)["snapshots"]}
    names = ["before upgrade", "after"]
    if loss in (without_table, without_both):
        names = [each.name.decode() for each in found.snapshots]
        assert all(name.startswith(f"{MADE_NAME}-") for name in names)
    assert listed == set(names)
    now = [disk_of(path, name) for name in ["", *names]]
    was = [disk_of(true, name) for name in ["", "before upgrade", "after"]]
    assert now[0] == was[0]
    assert sorted(now[1:]) == sorted(was[1:])


@pytest.mark.parametrize("loss", LOSSES)
def test_taken_back_it_is_the_image_as_it_was(loss: Callable[[Image], None]) -> None:
    data = lost(loss)
    found, end = rescued(data)
    undone = Overlay(Bytes(end), found.plan.inverse())
    assert read_bytes(undone, 0, len(data)) == data
    kinds = [stage.kind for stage in found.plan.stages]
    assert kinds == sorted(set(kinds))


def test_where_the_header_makes_no_sense_either_they_come_back() -> None:
    image = Image(bytearray(lost(without_table)))
    image.data[20:24] = bytes(4)  # cluster_bits
    found, end = rescued(bytes(image.data))
    assert found.changes_header
    assert len(found.snapshots) == 2
    assert not check_image(Bytes(end)).counters.leaks


def test_of_a_sound_image_nothing_is_listed() -> None:
    found, _ = rescued(sound())
    assert not found.snapshots
    assert found.plan.changes_nothing


def test_a_table_whose_clusters_others_have_is_no_snapshot_lost() -> None:
    """An older L1 table that was leaked leads to what is in use: nothing of it is lost."""
    image = Image(bytearray(sound()))
    old = image.data[image.header.l1_table_offset :][:SIZE]
    end = -(-len(image.data) // SIZE) * SIZE
    image.data.extend(bytes(end - len(image.data)) + old)
    image.set_refcount(end // SIZE, 1)
    found = rescue(Bytes(bytes(image.data)))
    assert not found.snapshots


def test_the_only_snapshot_of_an_image_of_qemu_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"],
        ["qemu-io", "-c", "write -P 1 0 3M", path],
        ["qemu-img", "snapshot", "-c", "monday", path],
        ["qemu-io", "-c", "write -P 2 0 1M", path],
    ):
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
    was, image = disk_of(path, "monday"), Image(bytearray(path.read_bytes()))
    image.change_header(nb_snapshots=0)
    found, end = rescued(bytes(image.data))
    assert [each.name for each in found.snapshots] == [b"monday"]
    path.write_bytes(end)
    assert disk_of(path, "monday") == was


# ---- the header is gone, too ----


def made_by_qemu(path: Path, before: str, after: Sequence[str], snapshots: int) -> Image:
    """An image of QEMU's: what *after* writes comes after each of the *snapshots*."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M"]
    subprocess.run([str(word) for word in create], check=True)
    subprocess.run(["qemu-io", "-c", before, path], check=True, capture_output=True)
    for number in range(snapshots):
        subprocess.run(["qemu-img", "snapshot", "-c", f"s{number}", path], check=True)
        for command in after:
            subprocess.run(["qemu-io", "-c", command, path], check=True, capture_output=True)
    return Image(bytearray(path.read_bytes()))


def without_header_and_table(image: Image) -> bytes:
    without_table(image)
    image.data[:SIZE] = bytes(SIZE)
    return bytes(image.data)


@pytest.mark.parametrize(
    ("after", "snapshots"),
    [
        (["write -P 2 512k 1M"], 1),
        (["write -P 2 5M 64k"], 1),
        (["write -P 2 0 1M"], 1),
        (["write -P 2 512k 1M", "write -P 3 5M 64k"], 3),
    ],
    ids=["some of it anew", "more", "all of it anew", "three snapshots"],
)
def test_without_the_header_the_disk_is_told_from_its_snapshots(
    after: list[str], snapshots: int, tmp_path: Path
) -> None:
    path = tmp_path / "image"
    image = made_by_qemu(path, "write -P 1 0 1M", after, snapshots)
    now, l1 = disk_of(path, ""), image.header.l1_table_offset
    then = [disk_of(path, f"s{number}") for number in range(snapshots)]
    found, end = rescued(without_header_and_table(image))
    assert found.after.layout is not None
    assert found.after.layout.header.l1_table_offset == l1
    assert found.after.verdict in ("clean", "leaks")
    # What they lead to is a table of the disk or a snapshot; the snapshots' own are no lost tables.
    assert not found.placements
    path.write_bytes(end)
    subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", path], check=True)
    assert disk_of(path, "").rstrip(b"\0") == now.rstrip(b"\0")
    back = [disk_of(path, each.name.decode()).rstrip(b"\0") for each in found.snapshots]
    assert sorted(back) == sorted(each.rstrip(b"\0") for each in then)


def test_where_nothing_was_written_since_either_is_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "image"
    image = made_by_qemu(path, "write -P 1 0 1M", [], 1)
    was = disk_of(path, "")
    found, end = rescued(without_header_and_table(image))
    path.write_bytes(end)
    assert len(found.snapshots) == 1
    assert disk_of(path, "").rstrip(b"\0") == was.rstrip(b"\0")


def test_headers_that_nothing_tells_apart_are_named_and_one_can_be_assumed() -> None:
    """Tables that only snapshots have were written to: that is not QEMU's way."""
    image = Image(bytearray(sound()))
    l1 = image.header.l1_table_offset
    for number in range(len(image.snapshots)):
        for cluster in (0, 1, 5, 600):
            image.set_bits(image.l2_at(cluster, number), entries.COPIED)
    data = without_header_and_table(image)
    with pytest.raises(HeaderUnknown, match=r"l1_table_offset \d+ or \d+") as caught:
        rescue(Bytes(data))
    assert "--assume l1_table_offset=" in str(caught.value)
    chosen = rescue(Bytes(data), assumed={"l1_table_offset": l1})
    assert chosen.after.layout is not None
    assert chosen.after.layout.header.l1_table_offset == l1
