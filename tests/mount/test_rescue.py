"""Rescues and mounts: of an image whose header is gone, and of what a rescue would make of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from instarfs.image.directory import SUFFIX
from tests.crash.test_rescue import rescue_of, sound
from tests.images.builder import MIB
from tests.instarfs.cli.test_rescue import LOST, PLAN, interrupted
from tests.mount.mounts import MakeMount, instarfs
from tests.mount.test_preview import qemu_check, written
from tests.schemas import require_valid_file


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(LOST)
    return path


def test_one_that_was_interrupted_is_taken_back_in_a_mount(mount: MakeMount, lost: Path) -> None:
    """Its header is not there yet, and all the same it can be mounted: to take it back."""
    folder = lost.parent / "empty"
    folder.mkdir()
    assert instarfs("mount", lost, folder).returncode == 63
    interrupted(lost)
    it = mount(lost)
    assert "interrupted" in it.read("check/report.txt")
    assert "interrupted" in it.read("repair/undo")
    (it / "repair/undo").write_text("undo")
    assert lost.read_bytes() == LOST
    assert not lost.with_name(lost.name + SUFFIX).exists()


def test_a_preview_is_what_the_rescue_makes_of_the_image(mount: MakeMount, lost: Path) -> None:
    preview = mount(lost, "--preview", "rescue")
    shown = (preview / "image.qcow2").read_bytes()
    assert qemu_check(preview / "image.qcow2")[0] == 0
    report, disk = preview.read("check/report.txt"), (preview / "disk.raw").read_bytes()
    files = {name: preview.read(f"rescue/{name}") for name in RESCUE}
    assert "rescue/report.txt" in preview.read("README.txt")
    assert "repair" not in {path.name for path in preview.path.iterdir()}
    preview.stop()
    assert lost.read_bytes() == LOST

    assert files["placements.tsv"].startswith("#offset\tl1-index\tevidence\t")
    require_valid_file("rescue/plan.json", files["plan.json"])
    assert PLAN.id in files["plan.json"]
    assert "its header is gone" in files["report.txt"]
    (command,) = (line for line in report.splitlines() if "instarfs rescue" in line)
    assert instarfs(*command.split()[1:]).returncode == 0
    assert lost.read_bytes() == shown
    true = lost.with_name("true.qcow2")
    true.write_bytes(sound())
    raw = lost.with_name("true.raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", true, raw], check=True)
    assert disk == raw.read_bytes()[: len(disk)]


RESCUE = ("report.txt", "placements.tsv", "plan.json")


def test_once_the_image_is_another_nothing_is_read_of_a_preview(
    mount: MakeMount, tmp_path: Path
) -> None:
    image = tmp_path / "disk.qcow2"
    image.write_bytes(sound())
    preview = mount(image, "--preview", "rescue")
    assert "makes sense" in preview.read("rescue/report.txt")
    written(image)
    for name in ("image.qcow2", "disk.raw", *(f"rescue/{name}" for name in RESCUE)):
        with pytest.raises(OSError, match="Stale"):
            (preview / name).read_bytes()


def test_a_preview_takes_what_is_known_of_the_header(mount: MakeMount, lost: Path) -> None:
    like = lost.with_name("like it.qcow2")
    like.write_bytes(sound())
    for known in (["--assume", "size=0x90000"], ["--header", str(like)]):
        preview = mount(lost, "--preview", "rescue", *known)
        size = (preview / "disk.raw").stat().st_size
        assert size == (0x90000 if "--assume" in known else MIB)
        told = preview.read("rescue/report.txt")
        assert told.count(known[0]) == 2
        plan = preview.read("rescue/plan.json")
        preview.stop()
        assert plan == instarfs("rescue", "--output", "json", *known, lost).stdout
        out = lost.with_name("out.raw")
        assert instarfs("export", "-q", "--preview", "rescue", *known, lost, out).returncode == 0
        assert out.stat().st_size == size
        out.unlink()
        out.with_name("out.raw.map").unlink()


@pytest.mark.parametrize("words", [["mount"], ["export"]])
@pytest.mark.parametrize(
    ("known", "says"),
    [
        (["--preview", "rescue", "--assume", "bogus=1"], "fields are"),
        (["--preview", "rescue", "--assume", "size"], "is a number"),
        (["--preview", "rescue", "--header", "/nowhere"], "/nowhere"),
        (["--preview", "all", "--assume", "size=1"], "for --preview rescue"),
        (["--header", "/nowhere"], "/nowhere"),
    ],
)
def test_of_what_is_known_the_same_is_refused(
    words: list[str], known: list[str], says: str, lost: Path
) -> None:
    folder = lost.parent / "empty"
    folder.mkdir()
    refused = instarfs(*words, *known, lost, folder)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert says in refused.stderr


def test_where_nothing_is_believed_nothing_is_mounted(tmp_path: Path) -> None:
    image, folder = tmp_path / "disk.qcow2", tmp_path / "mnt"
    image.write_bytes(b"no image" * 10_000)
    folder.mkdir()
    refused = instarfs("mount", "--preview", "rescue", image, folder)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "--assume" in refused.stderr


def test_the_disk_of_a_preview_can_be_exported(lost: Path) -> None:
    out = lost.with_name("out.raw")
    assert instarfs("export", "-q", lost, out).returncode == 63
    done = instarfs("export", "-q", "--preview", "rescue", lost, out)
    assert (done.returncode, done.stderr) == (0, "")
    lost.write_bytes(sound())
    true = lost.with_name("true.raw")
    instarfs("export", "-q", lost, true)
    assert out.read_bytes() == true.read_bytes()[: out.stat().st_size]
    # Another plan is another disk: what was copied of one is not gone on with.
    again = instarfs("export", "-q", "--preview", "all", lost, out)
    assert again.returncode == 1
    assert "name another file" in again.stderr
    assert rescue_of(LOST).plan.id == PLAN.id
