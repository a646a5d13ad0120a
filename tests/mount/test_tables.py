"""``tables/`` and ``explain/`` in a mount: names that are made when asked for, also of damage."""

from __future__ import annotations

import json
import random
import subprocess
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from planner.qcow2.entries import COPIED
from tests.images.builder import Image
from tests.images.damage import DAMAGES, TELLING
from tests.images.sample import sample
from tests.mount.mounts import MakeMount, Mount, run, settle


def write(path: Path, image: Image) -> Path:
    path.write_bytes(image.data)
    settle(path)
    return path


@cache
def sample_bytes() -> bytes:
    return bytes(sample().build().data)


def sound_sample() -> Image:
    return Image(bytearray(sample_bytes()))


def damaged_sample() -> Image:
    image, rng = sound_sample(), random.Random(1)
    for name in TELLING:
        DAMAGES[name](image, rng)
    return image


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return write(tmp_path / "damaged.qcow2", damaged_sample())


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_tables_of_the_entries_in_use(mount: MakeMount, tmp_path: Path) -> None:
    image = sound_sample()
    it = mount(write(tmp_path / "image.qcow2", image))
    assert names_in(it / "tables/l2") == ["0.tsv", "1.tsv"]
    rows = [line.split("\t") for line in it.read("tables/l2/1.tsv").splitlines()[1:]]
    assert rows[0][5] == str(image.host_offset(image.geometry.l2_entries))
    assert str(image.l2_table(1)) in it.read("tables/l1.tsv")
    for name in ("2.tsv", "01.tsv", "1", "0x1.tsv", "-1.tsv", f"{1 << 70}.tsv", "l1.tsv"):
        assert not (it / "tables/l2" / name).exists()


def test_a_lost_table_is_no_longer_listed(mount: MakeMount, tmp_path: Path) -> None:
    image = sound_sample()
    path = write(tmp_path / "image.qcow2", image)
    it = mount(path)
    assert "1.tsv" in names_in(it / "tables/l2")
    image.set_word(image.l1_at(1), 0)
    write(path, image)
    assert names_in(it / "tables/l2") == ["0.tsv"]


def test_offsets_are_explained_in_decimal_and_hexadecimal(mount: MakeMount, damaged: Path) -> None:
    it = mount(damaged)
    assert names_in(it / "explain/host") == names_in(it / "explain/guest") == []
    told = it.read("explain/host/3014656")
    assert "multiple-owners" in told
    assert it.read("explain/host/0x2e0000") == it.read("explain/host/0X2E0000") == told
    assert "The check says" not in told
    assert "host offset 3014656" in it.read("explain/guest/1376256")
    it.read("check/result.json")
    assert "The check says" in it.read("explain/host/3014656")
    for name in ("", "x", "0x", "1.5", "-1", "1e3", "٣", f"{1 << 64}", "0x1" + "0" * 16):
        assert name == "" or not (it / "explain/host" / name).exists()
        assert name == "" or not (it / "explain/guest" / name).exists()


def test_offsets_past_the_end_are_answered(mount: MakeMount, damaged: Path) -> None:
    it = mount(damaged)
    assert "past the end of the file" in it.read(f"explain/host/{1 << 63}")
    assert "the disk ends at 2147483648" in it.read("explain/guest/2147483648")


def test_an_explanation_follows_the_image(mount: MakeMount, tmp_path: Path) -> None:
    image = sound_sample()
    path = write(tmp_path / "image.qcow2", image)
    it = mount(path)
    assert "the byte at offset 65541 of this file" in it.read("explain/guest/5")
    image.set_word(image.l2_at(0), 0)
    write(path, image)
    assert "nothing is allocated there" in it.read("explain/guest/5")


def test_the_picture_has_the_numbers_of_the_list(mount: MakeMount, damaged: Path) -> None:
    it = mount(damaged)
    picture = ET.fromstring(it.read("image/map.svg"))  # noqa: S314 - our own
    totals = {
        (element.get("owner"), element.get("finding")): int(element.get("bytes") or "")
        for element in picture.iter()
        if element.tag.endswith("total")
    }
    listed = dict.fromkeys(totals, 0)
    for line in it.read("tables/clusters.tsv").splitlines()[1:]:
        _, length, owner, _, _, finding = line.split("\t")
        listed[owner, finding] += int(length)
    assert totals == listed
    drawn = damaged.with_suffix(".png")
    run("rsvg-convert", "-o", drawn, it / "image/map.svg")
    assert drawn.read_bytes().startswith(b"\x89PNG")


def every_file(it: Mount) -> list[str]:
    """All but the disks, of which damage takes a part."""
    disks = ("-name", "*.raw", "-o")
    names = run("find", it.path, *disks, "-type", "f", "-printf", "%P\n").splitlines()
    return [*names, "explain/host/0", "explain/host/5000000", "explain/guest/1376256"]


STRUCTURES = [
    "guest-on-metadata",
    "snapshot-l1-misaligned",
    "bad-bitmap-entry",
    "lost-refblock",
    "cut-short",
]
"""Damages, of each structure one."""


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_damage_hides_a_file(name: str, mount: MakeMount, tmp_path: Path) -> None:
    image = sound_sample()
    DAMAGES[name](image, random.Random(1))
    it = mount(write(tmp_path / "image.qcow2", image))
    shown = {path: (it / path).read_bytes() for path in every_file(it)}
    # With the end of the file the sample's refcounts and L1 table are lost.
    assert len(shown["tables/clusters.tsv"].splitlines()) > (2 if name == "cut-short" else 10)
    assert b"</svg>" in shown["image/map.svg"]
    assert shown["tables/l1.tsv"].count(b"\n") > (1 if name == "cut-short" else 2)
    assert b"Refcount" in shown["explain/host/0"]
    kinds = set(json.loads(shown["check/result.json"])["counts"])
    listed = {
        kind
        for line in shown["tables/clusters.tsv"].decode().splitlines()[1:]
        for kind in line.split("\t")[5].split("+")
    }
    assert kinds - {"corrupt-bit", "dirty-bit", "stale-bitmaps"} <= listed


def test_a_header_that_makes_no_sense_is_named_everywhere(
    mount: MakeMount, damaged: Path, tmp_path: Path
) -> None:
    image = damaged_sample()
    image.data[20:24] = (63).to_bytes(4, "big")
    it = mount(write(tmp_path / "bad.qcow2", image))
    assert names_in(it / "tables/l2") == []
    for name in (
        "tables/l1.tsv",
        "tables/clusters.tsv",
        "image/map.svg",
        "explain/host/0",
        "explain/guest/0x10",
    ):
        assert "cluster_bits is 63" in it.read(name)


def test_a_table_is_read_alone(mount: MakeMount, tmp_path: Path) -> None:
    """The word of an L1 entry that leads past the end is enough to be listed."""
    image = sound_sample()
    image.set_word(image.l1_at(1), (len(image.data) + (1 << 20)) | COPIED)
    it = mount(write(tmp_path / "image.qcow2", image))
    assert "past-end" in it.read("tables/l1.tsv")
    told = it.read("tables/l2/1.tsv").splitlines()
    assert told[1].startswith("# L1 entry 1: past-end: ")
    assert len(told) == 3 or "l1-copied" in told[2]


def test_everyday_programs_read_them(mount: MakeMount, damaged: Path) -> None:
    it = mount(damaged)
    found = subprocess.run(
        ["grep", "-c", "l2-copied", it / "tables/l2/0.tsv"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout == "2\n"
    run("cp", "-r", it / "tables", damaged.with_name("copied"))
    copied = damaged.with_name("copied") / "l2/0.tsv"
    assert copied.read_text() == it.read("tables/l2/0.tsv")


def test_a_bitmap_is_in_use_as_long_as_somebody_uses_it(
    mount: MakeMount, image: Path, request: pytest.FixtureRequest
) -> None:
    run("qemu-img", "bitmap", "--add", image, "backup")
    settle(image)
    it = mount(image)

    def flags() -> list[bool]:
        (bitmap,) = json.loads(it.read("image/bitmaps.json"))["bitmaps"]
        assert bitmap["name"] == "backup"
        return [bitmap["in-use"], bitmap["inconsistent"]]

    assert flags() == [False, False]
    vm: subprocess.Popen[str] = request.getfixturevalue("vm")
    assert flags() == [True, False]
    vm.kill()
    vm.wait()
    # The flag is still set, and nobody has it in use: nobody saved it.
    assert flags() == [True, True]


def test_one_broken_bitmap_hides_no_other(mount: MakeMount, tmp_path: Path) -> None:
    made = sample()
    made.add_bitmap("second", {1})
    image = made.build()
    image.set_bits(image.bitmaps[0].bitmap_table_offset, 1 << 60)
    it = mount(write(tmp_path / "image.qcow2", image))
    first, second = json.loads(it.read("image/bitmaps.json"))["bitmaps"]
    assert "invalid entries" in first["errors"][0]
    assert (second["dirty-bytes"], second["errors"]) == (65536, [])
