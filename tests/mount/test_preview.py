"""An image as it would be after a repair, mounted: what it shows is what the repair then writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.instarfs.cli.test_repair import LEAKY, LOST, TWO_OWNERS, content
from tests.mount.mounts import MakeMount, instarfs

CASES = {
    "leaks": ("leaked-clusters",),
    "all": LEAKY,
    "what must be quoted": LOST,
    "what is left": TWO_OWNERS,
    "no refcounts": ("lost-refblock",),
    "nothing": (),
}


def damaged(folder: Path, *damages: str) -> Path:
    path = folder / "disk.qcow2"
    path.write_bytes(content(*damages))
    return path


def qemu_check(path: Path) -> tuple[int, dict[str, object]]:
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", path], check=False, capture_output=True, text=True
    )
    value = json.loads(done.stdout)
    del value["filename"]
    return done.returncode, value


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_repair_makes_of_the_image(
    name: str, mount: MakeMount, tmp_path: Path
) -> None:
    image = damaged(tmp_path, *CASES[name])
    before = image.read_bytes()
    tier = "leaks" if name == "leaks" else "all"
    preview = mount(image, "--preview", tier)
    shown = (preview / "image.qcow2").read_bytes()
    checked = qemu_check(preview / "image.qcow2")
    value = json.loads(preview.read("check/result.json"))
    report = preview.read("check/report.txt")
    plan = value["preview"]["plan-id"]
    disk = (preview / "disk.raw").read_bytes()
    assert value["preview"]["tier"] == tier
    assert f"`{tier}`, plan {plan}" in report
    assert plan in preview.read("README.txt")
    preview.stop()
    assert image.read_bytes() == before

    repaired = shutil.copy(image, tmp_path / "repaired.qcow2")
    instarfs("check", "-q", "-r", tier, "--plan", plan, repaired)
    assert shown == Path(repaired).read_bytes()
    assert checked == qemu_check(Path(repaired))
    after = json.loads(instarfs("check", "--output=json", repaired).stdout)
    assert value["verdict"] == after["verdict"]
    exported = tmp_path / "exported"
    instarfs("export", "-q", repaired, exported)
    assert disk == exported.read_bytes()


def test_what_it_advises_makes_it_so(mount: MakeMount, tmp_path: Path) -> None:
    image = damaged(tmp_path, *LEAKY)
    preview = mount(image, "--preview", "all")
    shown = (preview / "image.qcow2").read_bytes()
    (command,) = [
        line for line in preview.read("check/report.txt").splitlines() if "check -r" in line
    ]
    assert instarfs(*command.split()[1:]).returncode == 0
    assert image.read_bytes() == shown


def test_nothing_can_be_repaired_in_it(mount: MakeMount, tmp_path: Path) -> None:
    preview = mount(damaged(tmp_path, *LEAKY), "--preview", "leaks")
    assert "repair" not in {path.name for path in preview.path.iterdir()}
    with pytest.raises(OSError, match=r"Read-only|denied"):
        (preview / "image.qcow2").open("r+b")


def test_a_virtual_machine_can_write_to_an_overlay_over_it(
    mount: MakeMount, tmp_path: Path
) -> None:
    preview = mount(damaged(tmp_path, *LEAKY), "--preview", "all")
    above = tmp_path / "above.qcow2"
    backing: list[str | Path] = ["-F", "qcow2", "-b", preview / "image.qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, above], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 64k", above], check=True, capture_output=True)


def written(image: Path) -> None:
    subprocess.run(["qemu-io", "-c", "write 0 64k", image], check=True, capture_output=True)


def replaced(image: Path) -> None:
    other = image.with_name("other")
    other.write_bytes(content())
    other.rename(image)


@pytest.mark.parametrize("happen", [written, replaced])
@pytest.mark.parametrize("name", ["image.qcow2", "disk.raw", "check/report.txt", "image/info.json"])
def test_once_the_image_is_another_nothing_is_read(
    name: str, happen: Callable[[Path], None], mount: MakeMount, tmp_path: Path
) -> None:
    image = damaged(tmp_path, *LEAKY)
    preview = mount(image, "--preview", "all")
    preview.read("check/report.txt")
    happen(image)
    with pytest.raises(OSError, match="Stale"):
        (preview / name).read_bytes()


def test_a_repair_that_is_refused_cannot_be_looked_at(tmp_path: Path) -> None:
    image, folder = damaged(tmp_path, "snapshot-l1-misaligned", "leaked-clusters"), tmp_path / "mnt"
    folder.mkdir()
    plan = instarfs("plan", "leaks", image)
    refused = instarfs("mount", "--preview", "leaks", image, folder)
    is_mounted = os.path.ismount(folder)
    instarfs("umount", folder)
    assert (refused.returncode, refused.stderr) == (plan.returncode, plan.stderr)
    assert not is_mounted


def test_the_image_of_a_mount_is_the_image(mount: MakeMount, tmp_path: Path) -> None:
    image = damaged(tmp_path, *LEAKY)
    it = mount(image)
    assert (it / "image.qcow2").read_bytes() == image.read_bytes()
    (it / "repair/tier").write_text("all")
    assert (it / "image.qcow2").read_bytes() == image.read_bytes()
    status = (it / "image.qcow2").stat()
    assert (status.st_size, status.st_blocks) == (image.stat().st_size, image.stat().st_blocks)
