"""An image that changes beneath its mount, or that another program has open."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mount.mounts import INSTARFS, MakeMount, Mount, leak, make_image, run, settle


@pytest.fixture
def mounted(mount: MakeMount, image: Path) -> Mount:
    return mount(image)


def result(mounted: Mount) -> dict[str, object]:
    value: dict[str, object] = json.loads(mounted.read("check/result.json"))
    return value


def replace(path: Path, size: str, leaks: int) -> None:
    """Put another image in the place of *path*, as editors and `mv` do."""
    other = make_image(path.with_name("other"), size)
    leak(other, leaks)
    other.rename(path)


def test_written_in_place(mounted: Mount) -> None:
    assert result(mounted)["verdict"] == "clean"
    leak(mounted.image, 2)
    # Of the new state nothing is known yet: no size either.
    assert (mounted / "check/result.json").stat().st_size == 0
    assert (mounted / "check/result.json").stat().st_mtime_ns == mounted.image.stat().st_mtime_ns
    assert result(mounted)["leaks"] == 2


def test_replaced(mounted: Mount) -> None:
    assert result(mounted)["verdict"] == "clean"
    replace(mounted.image, "32M", 4)
    assert result(mounted)["leaks"] == 4
    assert json.loads(mounted.read("image/info.json"))["virtual-size"] == 32 << 20
    assert (mounted / "README.txt").stat().st_mtime_ns == mounted.image.stat().st_mtime_ns


def test_every_file_shows_the_new_state(mounted: Mount) -> None:
    names = ["check/result.json", "check/leaks", "check/report.txt", "image/info.json"]
    before = [mounted.read(name) for name in names]
    replace(mounted.image, "32M", 1)
    after = [mounted.read(name) for name in names]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_an_open_file_stays_one_snapshot(mounted: Mount) -> None:
    with (mounted / "check/result.json").open() as early:
        first = early.read()
        replace(mounted.image, "32M", 1)
        early.seek(0)
        assert early.read() == first
        assert mounted.read("check/result.json") != first
        early.seek(0)
        assert early.read() == first


def test_resized_by_qemu(mounted: Mount) -> None:
    mounted.read("image/info.json")
    run("qemu-img", "resize", "-q", mounted.image, "1G")
    assert json.loads(mounted.read("image/info.json"))["virtual-size"] == 1 << 30
    settle(mounted.image)
    assert result(mounted)["total-clusters"] == 1 << 14


def test_replaced_by_something_else_and_put_back(mounted: Mount) -> None:
    assert result(mounted)["verdict"] == "clean"
    kept = shutil.copy2(mounted.image, mounted.image.with_name("kept"))
    mounted.image.write_bytes(b"not qcow2 any more")
    assert "not a qcow2 image" in mounted.read("check/report.txt")
    assert "not a qcow2 image" in mounted.read("image/header.json")
    Path(kept).rename(mounted.image)
    assert result(mounted)["verdict"] == "clean"


def commands(report: str) -> list[str]:
    """The commands that a report tells its reader to run."""
    return [line.strip() for line in report.splitlines() if line.startswith(" " * 6)]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_deleted_is_still_readable_and_can_be_brought_back(
    mount: MakeMount, tmp_path: Path, is_damaged: bool
) -> None:
    image = make_image(tmp_path / "the image's.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 1M", image)
    if is_damaged:
        leak(image, 2)
    settle(image)
    mounted, content = mount(image), image.read_bytes()
    assert "image-gone" not in result(mounted)
    image.unlink()
    gone = result(mounted)
    assert (gone["verdict"], gone["image-gone"]) == ("leaks" if is_damaged else "clean", "deleted")
    assert "was deleted since it was opened" in mounted.log
    run("ls", "-lR", mounted.path)
    with pytest.raises(FileNotFoundError):
        (mounted / "repair/tier").write_text("leaks")
    told = json.loads(mounted.read("repair/result.json"))
    assert (told["status"], told["errno"]) == ("refused", "ENOENT")
    assert "bring it back first: check/report.txt says how" in told["reason"]
    report = mounted.read("check/report.txt")
    assert "was deleted. What is open here is all that is left of it" in report
    bring_back, copy_out = commands(report)
    run("bash", "-e", "-c", f'instarfs() {{ {shlex.join(INSTARFS)} "$@"; }}; {copy_out}')
    assert (tmp_path / "the image's.qcow2.raw").read_bytes()[: 1 << 20] == b"\1" * (1 << 20)
    run("bash", "-e", "-c", bring_back)
    assert image.read_bytes() == content
    settle(image)
    assert "image-gone" not in result(mounted)
    assert "was deleted" not in mounted.read("check/report.txt")
    (mounted / "repair/tier").write_text("leaks")


def test_renamed_is_still_readable_and_says_so(mounted: Mount) -> None:
    away = mounted.image.with_name("away")
    mounted.image.rename(away)
    assert result(mounted)["image-gone"] == "moved"
    assert "was renamed or moved" in mounted.read("check/report.txt")
    with pytest.raises(FileNotFoundError):
        (mounted / "repair/tier").write_text("leaks")
    assert "was renamed or moved" in json.loads(mounted.read("repair/result.json"))["reason"]
    away.rename(mounted.image)
    assert "image-gone" not in result(mounted)
    (mounted / "repair/tier").write_text("leaks")


def test_one_of_two_links_that_is_removed_is_not_a_deleted_file(mounted: Mount) -> None:
    mounted.image.with_name("other").hardlink_to(mounted.image)
    mounted.image.unlink()
    assert result(mounted)["image-gone"] == "moved"


# ---- in use ----


def test_an_image_in_use_is_checked_as_of_a_moment(
    mount: MakeMount, image: Path, vm: subprocess.Popen[str]
) -> None:
    mounted = mount(image)
    used = result(mounted)
    assert (used["verdict"], used["image-in-use"]) == ("clean", True)
    assert used["as-of"]
    assert "while a program writes to it" in mounted.read("check/report.txt")
    assert json.loads(mounted.read("image/info.json"))["virtual-size"] == 64 << 20
    vm.terminate()
    vm.wait()
    settle(image)
    clean = result(mounted)
    assert (clean["verdict"], clean["image-in-use"]) == ("clean", False)


def test_a_vm_starts_beside_an_idle_mount(mounted: Mount, request: pytest.FixtureRequest) -> None:
    assert result(mounted)["verdict"] == "clean"
    request.getfixturevalue("vm")
    assert result(mounted)["image-in-use"]
