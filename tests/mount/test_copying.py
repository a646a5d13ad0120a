"""Programs that copy files copy those of a mount whole: on one where nothing has been read yet.

None of them may be told that a file is empty, or has another length than is read then: what they
copy is what somebody keeps of a damaged disk.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.images.matrix import Row, build
from tests.mount.mounts import MakeMount, Mount, leak, make_image, run

EXTRACT = "mkdir {copy} && tar -C {copy} -xf {copy}.tar"
DIRECTORIES = "mkdir {copy} && cd {source} && find . -type d -exec mkdir -p {copy}/{{}} ';'"
COPY = {
    "tar": f"tar -C {{source}} -cf {{copy}}.tar . && {EXTRACT}",
    "tar --sparse": f"tar -C {{source}} -cSf {{copy}}.tar . && {EXTRACT}",
    "rsync -a": "rsync -a {source}/ {copy}/",
    "rsync again": "rsync -a {source}/ {copy}/ && rsync -a {source}/ {copy}/",
    "rsync -az --inplace": "rsync -az --inplace {source}/ {copy}/",
    "cp -r": "cp -r {source} {copy}",
    "cp -a --sparse": "cp -a --sparse=always {source} {copy}",
    "install": f"{DIRECTORIES} && find . -type f -exec install {{{{}}}} {{copy}}/{{{{}}}} ';'",
    "cat": f"{DIRECTORIES} && find . -type f -exec sh -c 'cat {{{{}}}} > {{copy}}/{{{{}}}}' ';'",
}


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    """An image with a snapshot and leaked clusters."""
    image = make_image(tmp_path / "lossy.qcow2", "4M")
    run("qemu-io", "-c", "write -P 0x61 0 1M", image)
    run("qemu-img", "snapshot", "-c", "before", image)
    leak(image, 3)
    return image


def files_below(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()}


def require_whole(mount: Mount, copy: Path, expected: set[str]) -> None:
    assert files_below(copy) >= expected
    for name in files_below(copy):
        assert (copy / name).read_bytes() == (mount / name).read_bytes(), name
    for name in expected - {"lost/triage.json"}:
        assert (copy / name).stat().st_size > 0, name


@pytest.mark.parametrize("program", COPY)
def test_every_file_is_copied_whole(
    mount: MakeMount, lossy: Path, tmp_path: Path, program: str
) -> None:
    fresh, copy = mount(lossy), tmp_path / "copy"
    there = files_below(fresh.path)
    assert {"check/result.json", "repair/plan/all.json", "snapshots/0/disk.raw"} <= there
    assert (fresh / "check/result.json").stat().st_size == 0  # and nothing has been computed
    command = COPY[program].format(source=fresh.path, copy=copy)
    done = subprocess.run(["sh", "-c", command], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    require_whole(fresh, copy, there)


@pytest.mark.parametrize("why", ["overlay", "luks"])
@pytest.mark.parametrize("program", ["tar", "rsync -a", "cp -r"])
def test_of_a_disk_that_cannot_be_read_all_but_that_is_copied(
    mount: MakeMount, tmp_path: Path, program: str, why: str
) -> None:
    image, copy = tmp_path / "image.qcow2", tmp_path / "copy"
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if why == "luks":
        image = build(Row(encryption="luks"), tmp_path, "copied")
    else:
        run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "base", "1M")
        run(*create, "-b", "base", "-F", "raw", image)
    fresh = mount(image)
    there = files_below(fresh.path)
    copying, _, extracting = COPY[program].format(source=fresh.path, copy=copy).partition(" && ")
    done = subprocess.run(["sh", "-c", copying], check=False, capture_output=True, text=True)
    assert done.returncode not in (0, None)
    assert "disk.raw" in done.stderr
    assert "Permission denied" in done.stderr
    if extracting:
        subprocess.run(["sh", "-c", extracting], check=True)
    for name in there - {"disk.raw"}:
        assert (copy / name).read_bytes() == (fresh / name).read_bytes(), name


def test_python_copies_every_file_whole(mount: MakeMount, lossy: Path, tmp_path: Path) -> None:
    fresh = mount(lossy)
    there = files_below(fresh.path)
    shutil.copytree(fresh.path, tmp_path / "copy")
    require_whole(fresh, tmp_path / "copy", there)
    assert (tmp_path / "copy/check/leaks").stat().st_mtime_ns == lossy.stat().st_mtime_ns
    again = mount(lossy)
    shutil.make_archive(str(tmp_path / "archive"), "zip", again.path)
    shutil.unpack_archive(tmp_path / "archive.zip", tmp_path / "unpacked")
    require_whole(again, tmp_path / "unpacked", there)


@pytest.mark.parametrize("program", ["tar", "rsync -a"])
def test_also_of_an_image_of_which_nothing_is_kept(
    mount: MakeMount, lossy: Path, tmp_path: Path, program: str
) -> None:
    # Its clock is ahead of ours: a value is good for those who have a file open, and nobody else.
    tomorrow = time.time_ns() + 24 * 3600 * 10**9
    os.utime(lossy, ns=(tomorrow, tomorrow))
    fresh, copy = mount(lossy), tmp_path / "copy"
    there = files_below(fresh.path)
    run("sh", "-c", COPY[program].format(source=fresh.path, copy=copy))
    require_whole(fresh, copy, there)
    # A check has run: what it found leaked can be copied.
    run("cp", "-r", fresh / "lost", tmp_path / "lost")
    (lost,) = files_below(tmp_path / "lost") - {"triage.json"}
    assert (tmp_path / "lost" / lost).read_bytes() == lossy.read_bytes()[int(lost) :]


def test_looking_around_computes_nothing(mount: MakeMount, lossy: Path) -> None:
    fresh = mount(lossy)
    for command in (
        "find . -size +1G",
        "du -a",
        "ls -laR",
        "stat check/* repair/*",
        "test -s check/leaks || true",
    ):
        run("sh", "-c", f"cd {fresh.path} && {command}")
    assert fresh.read("check/progress") == "idle\n"
    assert (fresh / "check/result.json").stat().st_size == 0
    assert (fresh / "image/info.json").stat().st_size == 0
