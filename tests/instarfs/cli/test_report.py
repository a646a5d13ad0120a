"""`instarfs report`: what a mount says of an image, and advice that can be followed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from instarfs.guest.files import hit_files
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image import locks
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.render.aftermath import Aftermath
from instarfs.render.report import report_txt
from instarfs.text import shell_path
from planner.check.check import check_image
from planner.qcow2.bitmaps import IN_USE
from planner.qcow2.entries import L1_OFFSET
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose
from planner.triage.triage import triage_leaks
from tests.advice import KINDS, blocks_of, damaged, follow, follow_all, run_here
from tests.images.builder import MIB, ImageBuilder
from tests.images.corpus import RULES
from tests.images.luks_headers import luks_bytes
from tests.mount.mounts import run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    folder = tmp_path / "some folder"
    folder.mkdir()
    return folder / "image.qcow2"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_advised_works(kind: str, image: Path) -> None:
    image.write_bytes(damaged(kind))
    follow_all(lambda: run_here(["report", image]).out, image)


NAMES = [
    "-r",
    'it\'s; $(touch hacked) `touch hacked` "$HOME" !! * ?',
    "two\nlines",
    "\x1b[31mred\x1b[0m\\x41'\x07",
    os.fsdecode(b"\xff\xfe broken \xc3"),
    "right \u202e to left",
    "~",
    "x" * 250,
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_what_is_advised_works_whatever_the_image_is_called(name: str, image: Path) -> None:
    folder = image.parent / name[:80]
    folder.mkdir()
    (folder / name).write_bytes(damaged("lost-l2-table"))
    text = run_here(["report", "--", name], folder).out
    assert all(line.isprintable() for line in text.splitlines())
    follow_all(lambda: run_here(["report", folder / name]).out, folder / name)
    made = [path for path in folder.iterdir() if path.name != name]
    assert all(path.name.startswith(name[:200]) for path in made)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_an_undo_file_that_was_named_is_named_in_what_is_advised(image: Path) -> None:
    content = damaged("leaked-clusters")
    image.write_bytes(content)
    undo = image.parent / "it's\nkept here"
    follow_all(lambda: run_here(["report", "--undo-file", undo, image]).out, image)
    assert undo.exists()
    assert not image.with_name(image.name + SUFFIX).exists()
    assert run_here(["undo", "--undo-file", undo, image]).code == 0
    assert image.read_bytes() == content


def test_what_is_advised_works_for_an_image_with_two_names(image: Path) -> None:
    image.write_bytes(damaged("lost-l2-table"))
    other = image.parent.parent / "another name"
    other.hardlink_to(image)
    text = run_here(["report", image.name], image.parent).out
    assert f"--undo-file '{image}{SUFFIX}' '{image}'\n" in text
    for block in blocks_of(text):
        assert " ./" not in "\n".join(block.commands)
    follow_all(lambda: run_here(["report", image]).out, image)
    assert other.samefile(image)


def test_nothing_is_mounted_where_nothing_can_be(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instarfs.repair.looking.FUSE", str(image.with_name("none")))
    image.write_bytes(damaged("lost-l2-table"))
    text = run_here(["report", image]).out
    assert "The copy holds the leaked clusters, too; in a mount they are files." in text
    assert "instarfs mount" not in text
    follow_all(lambda: run_here(["report", image]).out, image)


# ---- what it prints, and how it ends ----


def test_it_says_what_a_mount_says(image: Path) -> None:
    image.write_bytes(damaged("lost-l2-table"))
    ours = run_here(["report", image])
    with Image.open(str(image)) as opened:
        report = check_image(opened.source())
        triage = triage_leaks(opened.source(), report)
        proposals = {tier: propose(opened.source(), report, tier) for tier in RepairTier}
        files = hit_files(Guest(opened, Follow()), Place(Part.DISK), report, triage)
    assert ours.err == ""
    known = Aftermath(triage, proposals, files=files)
    assert ours.out.encode() == report_txt(report, str(image), known)
    assert "missing: up to" in ours.out


@pytest.mark.parametrize("kind", ["stale-bitmaps", "leaked-clusters", "corrupt-bit", "cut-short"])
def test_the_exit_code_is_that_of_the_check(kind: str, image: Path) -> None:
    image.write_bytes(damaged(kind))
    ended = run_here(["report", image])
    assert (ended.code, ended.err) == (run_here(["check", "-q", image]).code, "")
    assert image.read_bytes() == damaged(kind)


def test_a_header_that_cannot_be_read_is_reported(image: Path) -> None:
    content = bytearray(damaged("stale-bitmaps"))
    content[20:24] = (63).to_bytes(4, "big")
    image.write_bytes(content)
    ended = run_here(["report", image])
    assert (ended.code, ended.err) == (1, "")
    assert ended.out.startswith(f"{image}: unreadable\n")


def test_what_is_no_image_is_one_line(image: Path) -> None:
    image.write_bytes(b"hello\n" * 1000)
    for path, code in ((image, 63), (image.parent, 1), (image.parent / "none", 1)):
        ended = run_here(["report", path])
        assert (ended.code, ended.out, ended.err.count("\n")) == (code, "", 1)
        assert ended.err.startswith(f"instarfs: {path}: ")


def test_an_image_in_use_is_looked_at_only_on_demand_and_gets_no_advice(image: Path) -> None:
    image.write_bytes(damaged("leaked-clusters"))
    with image.open("rb") as stranger, locks.held(stranger.fileno(), "", locks.READ_WRITE):
        refused = run_here(["report", image])
        assert (refused.code, refused.out) == (1, "")
        assert "another process has the image open" in refused.err
        ended = run_here(["report", "-U", image])
    assert ended.code == 3
    assert ended.out.startswith(f"{image}: leaks\n")
    assert re.search(
        r"^As of \d\d:\d\d:\d\d, while a program writes to it\.$", ended.out, re.MULTILINE
    )
    assert "What to do now" not in ended.out


@pytest.mark.parametrize("gone", ["l1", "l2"])
@pytest.mark.parametrize("rewritten", ["0 64k", "8M 64k"], ids=["changed", "only-shared"])
def test_a_snapshot_of_which_a_table_is_gone(gone: str, rewritten: str, image: Path) -> None:
    """Also where all its data is the disk's too, so that nothing is freed: the snapshot reads
    zeros.
    """
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    run("qemu-io", "-c", "write 0 1M", image)
    run("qemu-img", "snapshot", "-c", "one", image)
    run("qemu-io", "-c", f"write {rewritten}", image)
    said = "  snapshot 0 (one): a table of it is empty or gone: leaked clusters may be missing"
    assert said not in run_here(["report", image]).out
    content = bytearray(image.read_bytes())
    at = int.from_bytes(content[64:72], "big")  # the snapshot table, which begins with the L1 table
    table = int.from_bytes(content[at : at + 8], "big")
    if gone == "l2":
        table = int.from_bytes(content[table : table + 8], "big") & L1_OFFSET
    content[table : table + 4096] = bytes(4096)
    image.write_bytes(content)
    text = run_here(["report", image]).out
    assert said in text.partition("What it means for the guest's disk")[2]
    assert said in text.partition("What the leaked clusters look like")[0]


@pytest.mark.parametrize("name", ["backup", "it's\n-odd \x1b!", "-f"])
def test_bitmaps_that_were_never_saved_are_removed_as_advised(name: str, image: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    run("qemu-img", "bitmap", "--add", "--", image, name)
    content = bytearray(image.read_bytes())
    directory = content.index(name.encode()) - 24
    content[directory + 12 : directory + 16] = IN_USE.to_bytes(4, "big")
    image.write_bytes(content)
    _, _, after = run_here(["report", image]).out.partition("can be made:\n")
    (command,) = (line for line in after.splitlines() if line.startswith("      "))
    assert follow([command], image.parent).code == 0
    assert "bitmaps:" not in run("qemu-img", "info", image)
    assert run_here(["report", image]).out.startswith(f"{image}: clean\n")


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.startswith("bitmap")])
def test_what_is_said_of_damaged_bitmaps_is_so(rule: str, image: Path) -> None:
    image.write_bytes(damaged(rule))
    info = ["qemu-img", "info", "--output=json", str(image)]
    is_opened = subprocess.run(info, check=False, capture_output=True).returncode == 0
    text = run_here(["report", image]).out
    assert ("QEMU does not open an image with a bitmap that makes no sense" in text) != is_opened
    command = f"qemu-img bitmap --remove -- {shell_path(str(image))} NAME"
    assert (command in text) == ("past_end" in rule)
    if command in text:
        before = run("qemu-io", "-r", "-c", "read -v 0 64k", image).splitlines()[:-2]
        done = follow([command.replace("NAME", "backup")], image.parent)
        assert (done.code, "Invalid argument" in done.errors) == (0, True)
        assert "bitmaps:" not in run("qemu-img", "info", image)
        assert run_here(["check", "-q", image]).code == 3
        assert run("qemu-io", "-r", "-c", "read -v 0 64k", image).splitlines()[:-2] == before


def test_what_is_in_a_backing_file_and_whether_it_is_there(image: Path) -> None:
    base = image.with_name("base.raw")
    base.write_bytes(b"b" * 65536)
    options = ["-b", base.name, "-F", "raw"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, image, "1M")
    run("qemu-io", "-c", "write -q 0 64k", image)
    named = f"  983040 of {1 << 20} bytes: in the backing file 'base.raw', which"
    follow = ("--follow", image.parent)
    assert f"{named} was not opened: no directory" in run_here(["report", image]).out
    assert f"{named} is there\n" in run_here(["report", *follow, image]).out
    base.unlink()
    ended = run_here(["report", *follow, image])
    assert f"{named} was not opened: there is no such file\n" in ended.out
    assert ended.code == 0


def test_of_a_corrupt_image_in_use_the_way_out_begins_with_its_program(image: Path) -> None:
    image.write_bytes(damaged("low-refcount"))
    with image.open("rb") as stranger, locks.held(stranger.fileno(), "", locks.READ_WRITE):
        ended = run_here(["report", "-U", image])
    assert ended.code == 2
    assert ended.out.startswith(f"{image}: corrupt\n")
    assert "  # Shut down what writes to it" in ended.out
    assert f"      instarfs report {shell_path(str(image))}\n" in ended.out
    assert "instarfs check -r" not in ended.out


def test_nothing_is_called_lost_that_may_be_on_its_way(image: Path) -> None:
    """Leaked data with a place that it can have come from, as a program's caches leave it."""
    image.write_bytes(damaged("lost-l2-table"))
    assert "Something may be lost" in run_here(["report", image]).out
    with image.open("rb") as stranger, locks.held(stranger.fileno(), "", locks.READ_WRITE):
        ended = run_here(["report", "-U", image])
    assert ended.out.startswith(f"{image}: leaks\n")
    assert "Something may be lost" not in ended.out
    assert "missing" not in ended.out
    assert "whether anything is lost shows when it has ended" in ended.out


def test_whose_files_are_hit_is_not_asked_where_nothing_is_wrong(tmp_path: Path) -> None:
    image = RULES["luks_header_counts"]().image
    path = tmp_path / "x.qcow2"
    path.write_bytes(ImageBuilder(size=MIB, crypt_method=2, luks_header=luks_bytes()).build().data)
    sound = run_here(["report", path])
    assert (sound.code, sound.err) == (0, "")
    assert "are hit" not in sound.out
    path.write_bytes(image.data)
    assert "Which files of the guest are hit is not known" in run_here(["report", path]).out
