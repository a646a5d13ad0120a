"""An image on a real block device, which has no time, no folder beside it, and does not grow."""

import errno
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.advice import follow_all, run_here
from tests.block_devices import attached, require_loop_devices
from tests.images.builder import MIB
from tests.images.damage import DAMAGES
from tests.images.sample import sample
from tests.mount.mounts import MakeMount, instarfs

DEVICE_SIZE = 16 * MIB
LEAKS = "leaked-clusters"


def write_image(path: Path, *names: str, size: int = DEVICE_SIZE) -> Path:
    image = sample().build()
    for name in names:
        DAMAGES[name](image, random.Random(1))
    path.write_bytes(image.data)
    os.truncate(path, max(size, len(image.data)))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_image(tmp_path / "disk", LEAKS)


@pytest.fixture
def device(file: Path) -> Iterator[Path]:
    require_loop_devices()
    with attached(file) as it:
        yield it


def checked_by_qemu(device: Path) -> int:
    command = ["qemu-img", "check", "-q", "-f", "qcow2", str(device)]
    return subprocess.run(command, check=False, capture_output=True).returncode


def overwrite(device: Path, offset: int, data: bytes) -> None:
    with device.open("r+b") as it:
        it.seek(offset)
        it.write(data)
        it.flush()
        os.fsync(it.fileno())


def test_the_check_is_that_of_a_file(device: Path, file: Path) -> None:
    of_device, of_file = (
        json.loads(instarfs("check", "--output", "json", path).stdout) for path in (device, file)
    )
    assert of_device.pop("filename") == str(device)
    assert of_file.pop("filename") == str(file)
    assert of_device == of_file
    assert of_device["leaks"] == 11


def test_a_repair_needs_to_be_told_that_it_cannot_be_taken_back(device: Path, file: Path) -> None:
    before = file.read_bytes()
    refused = instarfs("check", "-r", "leaks", device)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert "does not outlive a restart" in refused.stderr
    assert "--no-undo" in refused.stderr
    assert file.read_bytes() == before
    assert checked_by_qemu(device) == 3


def test_a_repair_without_undo(device: Path) -> None:
    done = instarfs("check", "-r", "leaks", "--no-undo", device)
    assert (done.returncode, done.stderr) == (0, "")
    assert "11 leaked clusters" in done.stdout
    assert checked_by_qemu(device) == 0
    assert not device.with_name(f"{device.name}.instarfs-undo").exists()
    undone = instarfs("undo", device)
    assert undone.returncode == 1
    assert "nothing to undo" in undone.stderr


def test_with_an_undo_file_elsewhere_it_is_taken_back_to_the_first_byte(
    device: Path, tmp_path: Path, file: Path
) -> None:
    before, undo = file.read_bytes(), tmp_path / "undo"
    done = instarfs("check", "-r", "leaks", "--undo-file", undo, device)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"instarfs undo --undo-file {undo} {device}" in done.stdout
    assert checked_by_qemu(device) == 0
    undone = instarfs("undo", "--undo-file", undo, device)
    assert (undone.returncode, undone.stderr) == (0, "")
    assert file.read_bytes() == before
    assert not undo.exists()


def test_a_mount_with_an_undo_file_elsewhere_takes_it_back(
    device: Path, mount: MakeMount, tmp_path: Path, file: Path
) -> None:
    before, undo = file.read_bytes(), tmp_path / "undo"
    it = mount(device, "--undo-file", str(undo))
    (it / "repair/tier").write_text("leaks")
    assert json.loads(it.read("repair/result.json"))["undo-file"] == str(undo)
    assert undo.exists()
    (it / "repair/undo").write_text("undo")
    assert json.loads(it.read("repair/result.json"))["status"] == "undone"
    assert file.read_bytes() == before
    assert not undo.exists()


def test_new_refcounts_have_room_on_the_device(tmp_path: Path) -> None:
    require_loop_devices()
    file = write_image(tmp_path / "disk", "lost-refblock")
    with attached(file) as device:
        done = instarfs("check", "-q", "-r", "all", "--no-undo", device)
        assert (done.returncode, done.stderr) == (0, "")
        assert checked_by_qemu(device) == 0
    assert file.stat().st_size == DEVICE_SIZE


def test_without_room_nothing_is_written(tmp_path: Path) -> None:
    require_loop_devices()
    file = write_image(tmp_path / "disk", "lost-refblock", size=0)
    before = file.read_bytes()
    with attached(file) as device:
        for command in (["plan", "all"], ["check", "-r", "all", "--no-undo"]):
            refused = instarfs(*command, device)
            assert refused.returncode == 1
            assert len(refused.stderr.splitlines()) == 1
            assert "does not grow; make the device larger" in refused.stderr
    assert file.read_bytes() == before


def test_it_is_not_trimmed(device: Path) -> None:
    refused = instarfs("trim", device)
    assert refused.returncode == 1
    assert refused.stderr == f"instarfs: {device}: cannot be trimmed: it is a block device\n"


def test_a_mount_notices_that_it_was_written_to(device: Path, mount: MakeMount) -> None:
    it = mount(device)
    assert json.loads(it.read("check/result.json"))["leaks"] == 11
    image = sample().build()
    clean = image.data[image.refblock(0) : image.refblock(0) + image.cluster_size]
    overwrite(device, image.refblock(0), bytes(clean))
    assert json.loads(it.read("check/result.json"))["verdict"] == "clean"


def test_a_mount_without_undo_repairs_it(device: Path, mount: MakeMount) -> None:
    it = mount(device, "--no-undo")
    (it / "repair/tier").write_text("leaks")
    assert json.loads(it.read("repair/result.json"))["status"] == "repaired"
    assert json.loads(it.read("check/result.json"))["verdict"] == "clean"
    with pytest.raises(OSError, match="not supported") as refused:
        (it / "repair/trim").write_text("trim")
    assert refused.value.errno == errno.EOPNOTSUPP
    assert checked_by_qemu(device) == 0


def test_a_mount_with_undo_refuses(device: Path, mount: MakeMount, file: Path) -> None:
    before = file.read_bytes()
    it = mount(device)
    with pytest.raises(OSError, match="needs cleaning") as refused:
        (it / "repair/tier").write_text("leaks")
    assert refused.value.errno == errno.EUCLEAN
    assert "does not outlive a restart" in json.loads(it.read("repair/result.json"))["reason"]
    assert file.read_bytes() == before


def test_leaked_clusters_of_a_device_are_files_too(
    device: Path, mount: MakeMount, file: Path
) -> None:
    it = mount(device)
    offset = int(it.read("check/leaks").splitlines()[1].split("\t")[0])
    data = (it / f"lost/{offset}").read_bytes()
    assert data == file.read_bytes()[offset : offset + len(data)]


@pytest.mark.parametrize("option", ["", "--no-undo", "--read-only"])
def test_what_a_mount_advises_works_and_keeps_nothing_beside_it(
    device: Path, mount: MakeMount, tmp_path: Path, option: str
) -> None:
    it = mount(device, *filter(None, [option]))
    follow_elsewhere(lambda: it.read("check/report.txt"), device, tmp_path)


def test_what_is_advised_without_a_mount_works_too(tmp_path: Path, file: Path) -> None:
    require_loop_devices()
    write_image(file, "lost-l2-table", "shared-cluster")
    with attached(file) as device:
        follow_elsewhere(lambda: run_here(["report", device]).out, device, tmp_path)


def follow_elsewhere(report: Callable[[], str], device: Path, tmp_path: Path) -> None:
    """Follow all of it, in a folder where somebody has kept something under the same name."""
    folder, before = tmp_path / "elsewhere", set(device.parent.iterdir())
    folder.mkdir()
    first = folder / f"{device.name}.copy"
    first.write_bytes(b"the first copy")
    text = report()
    assert "What lies beside a device is in memory: go to a folder with room" in text
    named, gone = f"--undo-file ./{device.name}.instarfs-undo", "That cannot be taken back"
    assert (named in text) != (gone in text)
    follow_all(report, device, folder)
    assert (folder / f"{device.name}.copy.~1~").read_bytes() == b"the first copy"
    assert set(device.parent.iterdir()) == before
