"""`instarfs files`: paths of what is hit, in columns; and the report that names them."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.advice import run_here
from tests.images.builder import Image
from tests.images.damage import DAMAGES
from tests.images.guest_files import make_disk, make_ext

MIB = 1 << 20
HEADER = "#harm\tguest-offset\tlength\tvolume\tfilesystem\tinode\tpath\tfile-offset\twhat"
HOSTILE = os.fsdecode(b"h\x1b[31m\xff\n\t\\n \xe2\x80\xaeostile")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with an ext4 in a partition: one large file with two names, one of them hostile."""
    root: Path = tmp_path_factory.mktemp("files")
    (root / "tree" / "d").mkdir(parents=True)
    (root / "tree" / "d" / "large").write_bytes(random.Random(1).randbytes(6 * MIB))
    (root / "tree" / HOSTILE).hardlink_to(root / "tree" / "d" / "large")
    make_ext(root / "ext4", root / "tree", ["-t", "ext4", "-b", "4096"], 16 * MIB)
    script = 'label: gpt\nstart=2048, size=32768, name="data"\n'
    make_disk(root / "disk", script, {MIB: root / "ext4"}, 24 * MIB)
    image = root / "image.qcow2"
    command: list[str | Path] = ["qemu-img", "convert", "-O", "qcow2", root / "disk", image]
    subprocess.run(command, check=True)
    return image


@pytest.fixture
def image(sound: Path, tmp_path: Path) -> Path:
    shutil.copyfile(sound, tmp_path / "image.qcow2")
    return tmp_path / "image.qcow2"


def inflict(path: Path, *names: str) -> None:
    image, rng = Image(bytearray(path.read_bytes())), random.Random(4)
    for name in names:
        DAMAGES[name](image, rng)
    path.write_bytes(image.data)


def rows_of(text: str) -> list[list[str]]:
    header, *lines = text.splitlines()
    assert header == HEADER
    return [line.split("\t") for line in lines if not line.startswith("#")]


def test_of_a_clean_image_there_is_nothing_to_list(image: Path) -> None:
    done = run_here(["files", image])
    assert (done.code, done.out, done.err) == (0, HEADER + "\n", "")


def test_a_file_that_is_hit_is_named_by_each_of_its_names(image: Path) -> None:
    inflict(image, "data-past-end")
    done = run_here(["files", image])
    assert done.code == 2
    rows = rows_of(done.out)
    assert {(row[0], row[3], row[4], row[8]) for row in rows} == {
        ("lost", "partition 1 (data)", "ext4", "data")
    }
    assert {row[6] for row in rows} == {"/d/large", "/h\\x1b[31m\\xff\\n\\t\\\\n \\u202eostile"}
    assert sum(int(row[2]) for row in rows if row[6] == "/d/large") == 65536
    assert done.err.startswith("1 file is hit:\n  lost: /")


def test_a_hostile_name_is_escaped_and_can_be_had_back(image: Path) -> None:
    inflict(image, "data-past-end")
    for done in (run_here(["files", image]), run_here(["report", image])):
        for line in (done.out + done.err).splitlines():
            assert line.replace("\t", "").isprintable()
    (name,) = {row[6] for row in rows_of(run_here(["files", image]).out)} - {"/d/large"}
    back = name.replace("\\\\", "\0").replace("\\n", "\n").replace("\\t", "\t")
    back = back.replace("\\x1b", "\x1b").replace("\\xff", "\udcff").replace("\\u202e", "\u202e")
    assert back.replace("\0", "\\") == "/" + HOSTILE


def test_the_report_names_it(image: Path) -> None:
    inflict(image, "data-misaligned")
    text = run_here(["report", image]).out
    assert "1 file is hit:\n  lost: /" in text
    assert "(partition 1 (data), ext4)" in text


def test_what_is_missing_is_told_of_where_its_table_was(image: Path) -> None:
    inflict(image, "lost-l2-table")
    rows = rows_of(run_here(["files", image]).out)
    assert {row[0] for row in rows} == {"missing"}
    assert sum(int(row[2]) for row in rows) == 24 * MIB


def test_of_what_is_no_image_there_is_no_list(image: Path) -> None:
    image.write_bytes(b"something else" * 20)
    done = run_here(["files", image])
    assert (done.code, done.out) == (63, "")


def test_a_snapshot_of_that_name_is_wanted(image: Path) -> None:
    done = run_here(["files", "--snapshot", "none", image])
    assert done.code == 1
    assert "none" in done.err


def test_a_snapshot_has_the_damage_that_it_shares(image: Path) -> None:
    subprocess.run(["qemu-img", "snapshot", "-c", "before", image], check=True)
    broken = Image(bytearray(image.read_bytes()))
    cluster = sorted(broken.mapped(0))[40]
    broken.set_word(broken.l2_at(cluster), 1 << 40)  # in the table that both have
    image.write_bytes(broken.data)
    of_snapshot = rows_of(run_here(["files", "--snapshot", "before", image]).out)
    active = rows_of(run_here(["files", image]).out)
    assert "/d/large" in {row[6] for row in of_snapshot if row[0] == "lost"}
    assert of_snapshot == active


def test_what_is_over_a_backing_file_is_named_where_that_may_be_opened(image: Path) -> None:
    cluster = sorted(Image(bytearray(image.read_bytes())).mapped(0))[40]
    overlay = image.with_name("overlay.qcow2")
    create: list[str | Path] = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        image.name,
        "-F",
        "qcow2",
        overlay,
    ]
    subprocess.run(create, check=True)
    write = f"write -q -P 1 {cluster * 65536} 64k"
    subprocess.run(["qemu-io", "-c", write, overlay], check=True)
    broken = Image(bytearray(overlay.read_bytes()))
    broken.set_word(broken.l2_at(cluster), 1 << 40)
    overlay.write_bytes(broken.data)
    alone = rows_of(run_here(["files", overlay]).out)
    assert {(row[6], row[8]) for row in alone} == {("-", "unknown")}
    followed = rows_of(run_here(["files", "--follow", image.parent, overlay]).out)
    lost = [row for row in followed if row[0] == "lost"]
    assert "/d/large" in {row[6] for row in lost}
    assert {int(row[1]) // 65536 for row in lost} == {cluster}
