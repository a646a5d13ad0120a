"""Who may do what in a mount: its owner, and others with and without allow_other."""

import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounts import INSTARFS, Mount, leak, make_image, mounted, shell_as

STRANGER = 65534
KERNEL = tuple(map(int, os.uname().release.split(".")[:2]))

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every user can look into, unlike those of the tests."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def image(folder: Path) -> Path:
    image = make_image(folder / "image.qcow2")
    leak(image, 3)
    return image


@pytest.fixture(scope="module")
def opened(image: Path, folder: Path) -> Iterator[Mount]:
    """A mount that all users may read."""
    directory = folder / "opened"
    command: list[str | Path] = [*INSTARFS, "mount", "-f", "-o", "allow_other", image, directory]
    with mounted(command, image, directory) as it:
        yield it


@pytest.fixture(scope="module")
def private(image: Path, folder: Path) -> Iterator[Mount]:
    """A mount for the user who made it."""
    directory = folder / "private"
    with mounted([*INSTARFS, "mount", "-f", image, directory], image, directory) as it:
        yield it


def stranger(command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command as a user who has nothing to do with the mount."""
    return shell_as(STRANGER, command)


CONTROLS = ("tier", "undo", "trim")


def every_file(mount: Mount) -> list[Path]:
    return [path for path in sorted(mount.path.rglob("*")) if path.is_file()]


def test_a_private_mount_shows_a_stranger_nothing(private: Mount) -> None:
    for command in (f"ls {private.path}", f"cat {private.path}/README.txt"):
        done = stranger(command)
        assert done.returncode != 0
        assert "Permission denied" in done.stderr


def test_an_open_mount_shows_a_stranger_all_but_the_controls(opened: Mount) -> None:
    controls = {opened / f"repair/{name}" for name in CONTROLS}
    for path in every_file(opened):
        done = stranger(f"head -c 1000 '{path}' >/dev/null")
        assert (done.returncode == 0) == (path not in controls), (path, done.stderr)


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize(
    "attempt",
    ["echo {word} > {file}", "echo {word} >> {file}", "cat {file}", "truncate -s 0 {file}"],
)
def test_a_stranger_controls_nothing(opened: Mount, name: str, attempt: str) -> None:
    before = opened.image.read_bytes()
    word = "leaks" if name == "tier" else name
    done = stranger(attempt.format(word=word, file=opened / f"repair/{name}"))
    assert done.returncode != 0
    assert "Permission denied" in done.stderr
    assert opened.image.read_bytes() == before
    assert opened.read("repair/tier") == "[none] leaks all split bitmaps snapshots\n"


@pytest.mark.parametrize("change", ["chmod 777", "chown 65534", "rm -f", "touch -d now"])
def test_nobody_changes_the_tree(opened: Mount, change: str) -> None:
    for name in ("repair/tier", "check/result.json"):
        for run in (stranger, as_root):
            done = run(f"{change} {opened / name}")
            assert done.returncode != 0
    assert stat.S_IMODE((opened / "repair/tier").stat().st_mode) == 0o600


def as_root(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", command], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(("kind", "for_files"), [("private", 0o600), ("opened", 0o644)])
def test_everything_belongs_to_who_mounted_it(
    kind: str, for_files: int, request: pytest.FixtureRequest
) -> None:
    mount: Mount = request.getfixturevalue(kind)
    controls = {mount / f"repair/{name}" for name in CONTROLS}
    for path in [mount.path, *mount.path.rglob("*")]:
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
        mode = for_files | (for_files & 0o444) >> 2 if path.is_dir() else for_files
        assert stat.S_IMODE(status.st_mode) == (0o600 if path in controls else mode), path
        assert stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)


@pytest.mark.parametrize("copy", ["cp -r", "cp -a", "rsync -a", "rsync -r"])
def test_who_copies_files_can_change_and_remove_the_copy(
    opened: Mount, folder: Path, copy: str
) -> None:
    opened.read("check/result.json")  # from then on there are files in lost/
    theirs = folder / "theirs"
    theirs.mkdir()
    os.chown(theirs, STRANGER, STRANGER)
    try:
        for done in (
            stranger(f"cd {theirs} && {copy} {opened.path}/lost {opened.path}/check ."),
            stranger(f"cd {theirs} && ls lost/[0-9]* && echo a note >> check/report.txt"),
            stranger(f"rm -r {theirs}/*"),
        ):
            assert (done.returncode, done.stderr) == (0, "")
        assert not list(theirs.iterdir())
    finally:
        shutil.rmtree(theirs)


@pytest.mark.parametrize("option", ["suid,dev,exec", "defaults", "nosuid,nodev,noexec"])
def test_no_device_no_program_and_no_link_could_matter(
    image: Path, folder: Path, option: str
) -> None:
    directory = folder / "options"
    with mounted([*INSTARFS, "mount", "-f", "-o", option, image, directory], image, directory):
        table = Path("/proc/self/mountinfo").read_text()
        options = re.search(rf" {re.escape(str(directory))} (\S+)", table)
        assert options is not None
        assert {"nosuid", "nodev", "noexec"} <= set(options[1].split(","))
        if KERNEL >= (5, 14):
            assert "nosymfollow" in options[1].split(",")
