"""What the daemon of a mount can still do: tried from inside, and as the kernel sees it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounts import (
    MakeMount,
    Mount,
    leak,
    make_image,
    mounted,
    mounted_type,
    settle,
    shell_as,
    until,
)

NOBODY = 65534
USERS = [os.geteuid()]
"""Who mounts: whoever runs the tests; of root also somebody else, if others than root may."""
if USERS == [0] and Path("/dev/fuse").stat().st_mode & 0o006 == 0o006:
    USERS.append(NOBODY)

REFUSED = {
    "read-passwd": "EACCES",
    "list-root": "EACCES",
    "write-elsewhere": "EACCES",
    "make-elsewhere": "EACCES",
    "run-a-program": "EACCES",
    "tcp-socket": "EACCES",
    "tcp6-socket": "EACCES",
    "udp-socket": "EACCES",
    "packet-socket": "EACCES",
    "unmount": "EPERM",
    "change-root": "EPERM",
    "signal-its-parent": "EPERM",
    "have-3-gibibytes": "ENOMEM",
}
STILL_DONE = ("read-image", "write-image", "make-undo-file", "local-socket")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can look into, unlike those of the tests."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=USERS)
def confined(request: pytest.FixtureRequest, folder: Path) -> Iterator[Mount]:
    """A mount by a user whose check tries what it must not be able to do; see `confined.py`."""
    image, directory = make_image(folder / "image.qcow2"), folder / "mnt"
    leak(image, 3)
    directory.mkdir()
    for path in (folder, image, directory):
        os.chown(path, request.param, request.param)
    program = Path(__file__).with_name("confined.py")
    command = [sys.executable, program, image, directory, str(request.param)]
    with mounted(command, image, directory) as it:
        yield it


def attempts(mount: Mount) -> dict[str, str]:
    lines = (line.removeprefix("instarfs: ").split() for line in mount.log.splitlines())
    return {words[0]: words[1] for words in lines if len(words) == 2}


def as_owner(mount: Mount, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command as the user that the mount belongs to; nobody else may look."""
    return shell_as(mount.image.stat().st_uid, command)


def test_from_inside_there_is_nothing_to_be_had(confined: Mount) -> None:
    result = as_owner(confined, f"cat {confined.path}/check/result.json")
    assert json.loads(result.stdout)["verdict"] == "leaks"
    outcomes = attempts(confined)
    assert {name: outcomes[name] for name in REFUSED} == REFUSED
    assert {name: outcomes[name] for name in STILL_DONE} == dict.fromkeys(STILL_DONE, "done")
    assert outcomes["read-kernel-memory"] != "done"


def test_a_confined_daemon_repairs_takes_back_and_trims(confined: Mount) -> None:
    original = confined.image.read_bytes()
    repair, undo, trim = "echo leaks > tier", "echo undo > undo", "echo trim > trim"
    for command in (repair, undo, repair, trim):
        before = confined.image.read_bytes()
        done = as_owner(confined, f"cd {confined.path}/repair && {command}")
        assert (done.returncode, done.stderr) == (0, ""), command
        if command == undo:
            assert before != original
            assert confined.image.read_bytes() == original
    result = as_owner(confined, f"cat {confined.path}/check/result.json")
    assert json.loads(result.stdout)["verdict"] == "clean"


def test_a_confined_daemon_notices_that_its_image_was_replaced(confined: Mount) -> None:
    owner = confined.image.stat().st_uid
    first = as_owner(confined, f"cat {confined.path}/check/result.json")
    other = make_image(confined.image.with_name("other"), "32M")
    os.chown(other, owner, owner)
    settle(other)
    other.rename(confined.image)
    second = as_owner(confined, f"cat {confined.path}/check/result.json")
    assert json.loads(first.stdout)["total-clusters"] == 1024
    assert json.loads(second.stdout)["total-clusters"] == 512


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_confined_daemon_leaves_no_mount_behind(confined: Mount, number: signal.Signals) -> None:
    confined.process.send_signal(number)
    assert confined.wait_for_end() == 0
    assert mounted_type(confined.path) is None


def test_nothing_is_left_of_what_waited_to_unmount(confined: Mount) -> None:
    pid = confined.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    helpers = [int(word) for word in children.read_text().split()]
    assert len(helpers) == 1
    confined.process.send_signal(signal.SIGKILL)
    confined.process.wait()
    until(lambda: not Path(f"/proc/{helpers[0]}").exists(), "it had ended too")
    assert confined.is_mounted()  # dead, for all to see


# ---- as the kernel sees it ----


def test_every_thread_of_a_mount_is_confined(mount: MakeMount, image: Path) -> None:
    it = mount(image)
    it.read("check/result.json")
    it.read("repair/plan/all.json")
    pid = it.process.pid
    states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
    assert len(states) > 1
    for state in states:
        fields = dict(line.split(":\t", 1) for line in state.splitlines() if ":\t" in line)
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert int(fields["CapEff"], 16) & ~0b110 == 0
        assert int(fields["CapPrm"], 16) & ~0b110 == 0
    core, data = (
        resource.prlimit(pid, what) for what in (resource.RLIMIT_CORE, resource.RLIMIT_DATA)
    )
    assert core == (1, 1)
    assert 2 << 30 <= data[0] < 3 << 30
    assert "not given up" not in it.log


def test_a_read_only_mount_can_write_nothing(mount: MakeMount, image: Path, tmp_path: Path) -> None:
    it = mount(image, "--read-only")
    assert json.loads(it.read("check/result.json"))["verdict"] == "clean"
    with pytest.raises(OSError, match="Read-only file system"):
        (it / "repair/tier").write_text("leaks")


def test_an_image_behind_a_link_is_reached(mount: MakeMount, image: Path, tmp_path: Path) -> None:
    leak(image, 2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "link.qcow2"
    link.symlink_to(image)
    it = mount(link)
    assert json.loads(it.read("check/result.json"))["leaks"] == 2
    (it / "repair/tier").write_text("leaks")
    assert json.loads(it.read("check/result.json"))["verdict"] == "clean"
    replaced = make_image(tmp_path / "replaced.qcow2", "32M")
    replaced.rename(image)
    assert json.loads(it.read("image/info.json"))["virtual-size"] == 32 << 20
