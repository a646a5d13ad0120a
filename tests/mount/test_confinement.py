"""What the daemon of a mount can still do: tried from inside, and as the kernel sees it."""

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from instarfs.daemon.broker import CHANNELS
from tests.mount.mounts import (
    DEADLINE,
    INSTARFS,
    PROJECT,
    MakeMount,
    Mount,
    leak,
    make_image,
    mounted,
    mounted_type,
    settle,
    shell_as,
    state_of,
    until,
)
from tests.mount.test_bad_disk import Disk, disk
from tests.mount.test_waiting_for_itself import abort, number_of

__all__ = ["disk"]  # a fixture

NOBODY = 65534
KERNEL = tuple(map(int, os.uname().release.split(".")[:2]))
USERS = [os.geteuid()]
"""Who mounts: whoever runs the tests; of root also somebody else, if others than root may."""
if USERS == [0] and Path("/dev/fuse").stat().st_mode & 0o006 == 0o006:
    USERS.append(NOBODY)

REFUSED = {
    # by Landlock: the call may be made, but not of these
    "read-passwd": "EACCES",
    "list-root": "EACCES",
    "open-image": "EACCES",
    "list-directory": "EACCES",
    "read-neighbour": "EACCES",
    "read-neighbour-by-descriptor": "EACCES",
    "list-followed": "EACCES",
    "read-environment-of-its-parent": "EACCES",
    "open-what-its-parent-has-open": "EACCES",
    "enter-root-of-its-parent": "EACCES",
    # by the kernel, as to anybody
    "have-3-gibibytes": "ENOMEM",
    "have-a-stack-of-3-gibibytes": "ENOMEM",
    "fill-a-file-in-memory": "EPERM",
    "read-memory-of-children": "EACCES",
    # by the filter of system calls
    "have-memory-that-could-be-shared": "EPERM",
    "have-a-pipe": "EPERM",
    "write-elsewhere": "EPERM",
    "write-its-own-memory": "EPERM",
    "write-followed": "EPERM",
    "empty-followed": "EPERM",
    "write-neighbour-by-descriptor": "EPERM",
    "make-neighbour-by-descriptor": "EPERM",
    "open-neighbour-for-neither": "EPERM",
    "open-a-device-for-neither": "EPERM",
    "open-by-openat2": "EPERM",
    "make-elsewhere": "EPERM",
    "run-a-program": "EPERM",
    "tcp-socket": "EPERM",
    "tcp6-socket": "EPERM",
    "udp-socket": "EPERM",
    "packet-socket": "EPERM",
    "local-stream-socket": "EPERM",
    "local-datagram-socket": "EPERM",
    "pair-of-sockets": "EPERM",
    "unmount": "EPERM",
    "change-root": "EPERM",
    "signal-its-parent": "EPERM",
    "limit-its-parent": "EPERM",
    "make-a-program-set-user-id": "EPERM",
    "run-from-memory": "EPERM",
    "open-image-again-to-write": "EPERM",
    "write-neighbour": "EPERM",
    "cut-neighbour": "EPERM",
    "open-neighbour-to-all": "EPERM",
    "give-neighbour-away": "EPERM",
    "label-neighbour": "EPERM",
    "change-times-of-neighbour": "EPERM",
    "rename-neighbour": "EPERM",
    "remove-neighbour": "EPERM",
    "replace-neighbour": "EPERM",
    "make-neighbour": "EPERM",
    "take-neighbour-for-undo-file": "EPERM",
    "link-neighbour-for-undo-file": "EPERM",
    "connect-to-a-listener": "EPERM",
    "send-a-descriptor": "EPERM",
    "have-core-dumps-collected": "EPERM",
    "have-more-descriptors": "EPERM",
    "choose-how-far-is-read-ahead": "EPERM",
    "lift-its-limit-on-memory": "EPERM",
}
STILL_DONE = (
    "read-followed",
    "read-what-its-parent-was-started-with",
    "read-what-is-mounted-for-its-parent",
    "read-connections-of-its-parent",
    "what-is-said-of-any-file",
    "read-a-pipe-that-it-writes-to",
    "look-at-any-file",
    "may-it-write-any-file",
    "where-any-link-leads",
    "how-full-any-disk-is",
    "lock-followed",
    "lock-image",
    "write-image",
    "cut-what-is-its-stderr",
    "start-a-thread",
    "send-a-datagram",
    "have-another-name",
    "signal-itself",
    "have-image-opened",
    "have-image-opened-to-write",
    "have-undo-file-made",
    "fill-the-disk-with-an-undo-file",
    "fill-the-disk-with-what-has-no-name",
    "have-followed-flushed",
    "fill-the-disk-with-the-image",
)
"""What SECURITY.md says that a daemon which was taken over can do."""


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
    neighbour = make_image(folder / "neighbour.qcow2")
    directory.mkdir()
    followed, listener = folder / "followed", folder / "listener"
    followed.mkdir()
    (followed / "base").write_bytes(b"base")
    program = Path(__file__).with_name("confined.py")
    command: list[str | Path] = [sys.executable, program, image, directory, str(request.param)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(listener))
        for path in (folder, image, neighbour, directory, followed, followed / "base", listener):
            os.chown(path, request.param, request.param)
        with mounted(command, image, directory) as it:
            yield it


def broker_of(mount: Mount) -> int:
    """The process that reaches into the image's directory for the daemon."""
    pid = mount.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    [broker] = (it for it in children if "broker" in Path(f"/proc/{it}/comm").read_text())
    return int(broker)


def attempts(mount: Mount) -> dict[str, str]:
    lines = (line.removeprefix("instarfs: ").split() for line in mount.log.splitlines())
    return {words[0]: words[1] for words in lines if len(words) == 2}


def as_owner(mount: Mount, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command as the user that the mount belongs to; nobody else may look."""
    return shell_as(mount.image.stat().st_uid, command)


def test_from_inside_there_is_nothing_to_be_had(confined: Mount) -> None:
    names = {path.name for path in confined.image.parent.iterdir()}
    result = as_owner(confined, f"cat {confined.path}/check/result.json")
    assert json.loads(result.stdout)["verdict"] == "leaks"
    outcomes = attempts(confined)
    assert {name: outcomes[name] for name in REFUSED} == REFUSED
    assert {name: outcomes[name] for name in STILL_DONE} == dict.fromkeys(STILL_DONE, "done")
    if confined.image.stat().st_uid == os.geteuid():  # whose modules they are
        for name in ("read-modules", "lock-a-module", "read-its-own-environment"):
            assert outcomes[name] == "done"
    assert outcomes["read-kernel-memory"] != "done"
    is_root = confined.image.stat().st_uid == 0
    assert outcomes["choose-how-far-is-read-ahead-early"] == ("done" if is_root else "EACCES")
    assert {path.name for path in confined.image.parent.iterdir()} == names
    assert confined.image.with_name("followed").joinpath("base").read_bytes() == b"base"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have no link followed")
@pytest.mark.skipif(KERNEL < (5, 14), reason="this kernel follows links in every mount")
def test_no_link_and_no_program_that_a_daemon_shows_means_anything(
    image: Path, tmp_path: Path
) -> None:
    target, directory = tmp_path / "target", tmp_path / "mnt"
    target.write_text("precious\n")
    program = Path(__file__).with_name("taken_over.py")
    with mounted([sys.executable, program, image, directory, target], image, directory) as it:
        assert (it / "repair/tier").is_symlink()
        assert (it / "repair/tier").readlink() == target
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            (it / "repair/tier").write_text("leaks\n")
        assert (it / "README.txt").stat().st_mode & stat.S_ISUID
        with pytest.raises(PermissionError):
            subprocess.run([it / "README.txt"], check=False)
    assert target.read_text() == "precious\n"


def states_of_threads(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            yield state_of(int(path.name))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root cuts off the mounts of others")
@pytest.mark.parametrize("how", ["umount -f", "abort"])
def test_a_daemon_that_cannot_be_killed_is_cut_off(image: Path, tmp_path: Path, how: str) -> None:
    """It waits in the kernel for its own reader, and that for it."""
    directory = tmp_path / "mnt"
    program = Path(__file__).with_name("unkillable.py")
    with mounted([sys.executable, program, image, directory], image, directory) as it:
        number, pid = number_of(directory), it.process.pid
        with subprocess.Popen(["stat", it / "slow"], stderr=subprocess.DEVNULL) as reader:
            try:
                until(lambda: "D" in states_of_threads(pid), "a thread waited in the kernel")
                reader.kill()
                it.process.kill()
                until(lambda: state_of(pid) == "Z", "the others had ended")
                if how == "abort":
                    subprocess.run(["fusermount3", "-u", "-z", it.path], check=True)
                    assert not it.is_mounted()
                    abort(number)
                else:  # may find it busy, but not for long
                    subprocess.run(["umount", "-f", it.path], check=False, timeout=DEADLINE)
                assert reader.wait(DEADLINE) == -signal.SIGKILL
            finally:
                if reader.poll() is None:
                    abort(number)
        assert it.process.wait(DEADLINE) == -signal.SIGKILL


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


def test_nothing_is_left_of_the_helpers_of_a_daemon_that_was_killed(confined: Mount) -> None:
    pid = confined.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    # Of other users than root a third one mounts, and ends.
    until(lambda: len(children.read_text().split()) == 2, "two helpers were left")
    helpers = [Path(f"/proc/{word}") for word in children.read_text().split()]
    confined.process.send_signal(signal.SIGKILL)
    confined.process.wait()
    until(lambda: not any(helper.exists() for helper in helpers), "they had ended too")
    assert confined.is_mounted()  # dead, for all to see


# ---- as the kernel sees it ----


def require_confined(mount: Mount) -> None:
    """Each thread of the daemon and of the broker."""
    states = []
    for process in (mount.process.pid, broker_of(mount)):
        for path in Path(f"/proc/{process}/task").glob("*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                states.append(path.read_text())
    assert len(states) > 2 + CHANNELS
    for state in states:
        fields = dict(line.split(":\t", 1) for line in state.splitlines() if ":\t" in line)
        assert fields["NoNewPrivs"] == "1"
        assert fields["Seccomp"] == "2"
        assert int(fields["CapEff"], 16) & ~0b110 == 0
        assert int(fields["CapPrm"], 16) & ~0b110 == 0
    assert "not given up" not in mount.log


def test_of_the_threads_that_read_for_a_preview_none_is_left(
    mount: MakeMount, tmp_path: Path
) -> None:
    """They began before the mount, when nothing had been given up."""
    options = "preallocation=metadata,cluster_size=4096"  # so many tables that some read ahead
    image = make_image(tmp_path / "image.qcow2", "2G", "-o", options)
    it = mount(image, "--preview", "leaks")
    it.read("check/result.json")
    require_confined(it)


def test_no_thread_is_left_that_asked_an_image_elsewhere(mount: MakeMount, disk: Disk) -> None:
    """One that is not on a disk of this machine, and may not answer."""
    it = mount(disk.path)
    it.read("check/result.json")
    require_confined(it)


def test_every_thread_of_a_mount_is_confined(mount: MakeMount, image: Path) -> None:
    it = mount(image)
    it.read("check/result.json")
    it.read("repair/plan/all.json")
    require_confined(it)
    pid = it.process.pid
    core, data, space = (
        resource.prlimit(pid, what)
        for what in (resource.RLIMIT_CORE, resource.RLIMIT_DATA, resource.RLIMIT_AS)
    )
    assert core == (1, 1)
    assert 2 << 30 <= data[0] < 3 << 30
    assert data[0] == data[1]
    assert data[0] < space[0] < data[0] + (1 << 30)
    assert space[0] == space[1]


def test_a_broker_has_nothing_loaded_of_what_reads_and_serves(
    mount: MakeMount, image: Path
) -> None:
    """What is loaded when it is forked it keeps, and it needs none of that."""
    maps = Path(f"/proc/{broker_of(mount(image))}/maps").read_text()
    assert "python" in maps
    for library in ("numpy", "pyfuse3", "libfuse", "libssl", "zlib_ng"):
        assert library not in maps


def test_a_broker_holds_the_directory_and_nothing_else(mount: MakeMount, image: Path) -> None:
    process = Path(f"/proc/{broker_of(mount(image))}")
    opened = [str(path.readlink()) for path in (process / "fd").iterdir()]
    sockets = [name for name in opened if name.startswith("socket:")]
    assert len(sockets) == CHANNELS
    assert sorted(set(opened) - set(sockets)) == sorted({"/dev/null", str(image.parent)})
    assert resource.prlimit(int(process.name), resource.RLIMIT_CORE) == (1, 1)


def held_by_daemon(mount: Mount) -> Counter[str]:
    """What it has open once it has answered, sockets and pipes under that name.

    What it loads by then, a thread opens one after the other.
    """
    until(lambda: "instarfs: mounted\n" in mount.log, "it said so")
    code = (str(PROJECT), sys.prefix, sys.base_prefix)
    names: list[str] = []

    def loads_nothing() -> bool:
        names.clear()
        try:
            links = list(Path(f"/proc/{mount.process.pid}/fd").iterdir())
            names.extend(str(link.readlink()) for link in links)
        except FileNotFoundError:  # closed in between
            return False
        return not any(name.startswith(code) for name in names)

    until(loads_nothing, "no module was being opened")
    return Counter(
        "log" if name == str(mount.log_path) else name.partition(":[")[0] for name in names
    )


def test_a_daemon_holds_its_image_and_what_it_was_given_before(
    mount: MakeMount, image: Path
) -> None:
    """With auto_unmount a socket more: fusermount3 unmounts when it is closed."""
    plain = held_by_daemon(mount(image))
    assert set(plain) == {
        *("/dev/fuse", "/dev/null", "/memfd:stderr (deleted)", "anon_inode", "log"),
        *("pipe", "socket", str(image), str(image.parent)),
    }
    assert plain["pipe"] == plain["log"] == plain[str(image)] == 1
    held = held_by_daemon(mount(image, "-o", "auto_unmount"))
    assert (held - plain, plain - held) == (Counter({"socket": 1}), Counter())


def test_whatever_the_umask_an_undo_file_is_its_owners(image: Path, tmp_path: Path) -> None:
    leak(image, 2)
    program, directory = shlex.join([*INSTARFS, "mount", "-f"]), tmp_path / "mnt"
    command: list[str | Path] = [
        "sh",
        "-c",
        f'umask 0777; exec {program} "$0" "$1"',
        image,
        directory,
    ]
    with mounted(command, image, directory) as it:
        (it / "repair/tier").write_text("leaks")
        undo = image.with_name(f"{image.name}.instarfs-undo")
        assert stat.S_IMODE(undo.stat().st_mode) == 0o600


def test_a_broker_stays_as_long_as_its_daemon(mount: MakeMount, image: Path) -> None:
    leak(image, 2)
    it = mount(image)
    broker = broker_of(it)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(broker, number)
    (it / "repair/tier").write_text("leaks")
    assert json.loads(it.read("check/result.json"))["verdict"] == "clean"
    it.process.send_signal(signal.SIGTERM)
    assert it.wait_for_end() == 0
    assert not Path(f"/proc/{broker}").exists()


def test_when_its_broker_was_killed_a_mount_still_reads(mount: MakeMount, image: Path) -> None:
    leak(image, 2)
    it = mount(image)
    content = image.read_bytes()
    os.kill(broker_of(it), signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            (it / "repair/tier").write_text("leaks")
    assert "mount again" in it.read("repair/result.json")
    assert json.loads(it.read("check/result.json"))["leaks"] == 2
    assert image.read_bytes() == content
    make_image(image.with_name("other"), "32M").rename(image)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            it.read("check/result.json")
    assert it.read("README.txt")
    ended = [line for line in it.log.splitlines() if line.startswith("instarfs: the process that")]
    assert len(ended) == 1


def test_a_broker_that_does_not_answer_holds_no_mount_up_for_long(
    mount: MakeMount, image: Path
) -> None:
    """Nor keeps it from ending, as it would where the disk beneath the image does not answer."""
    it = mount(image)
    it.read("check/result.json")
    broker = broker_of(it)
    os.kill(broker, signal.SIGSTOP)
    try:
        make_image(image.with_name("other"), "32M").rename(image)
        with pytest.raises(OSError, match="Input/output error"):
            it.read("check/result.json")
        it.process.send_signal(signal.SIGTERM)
        assert it.wait_for_end() == 0
        assert mounted_type(it.path) is None
    finally:
        os.kill(broker, signal.SIGKILL)


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
