"""From `instarfs mount` to the end of its process, in the background as users run it."""

import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from instarfs.cli.main import main
from instarfs.errors import UnmountFailed
from instarfs.mount import mountpoint
from tests.block_devices import attached, require_loop_devices
from tests.mount.mounts import (
    DEADLINE,
    INSTARFS,
    MakeMount,
    Mount,
    daemon_of,
    descriptors_of,
    environment,
    instarfs,
    make_image,
    mounted,
    mounted_type,
    run,
    until,
)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount on, which is no mountpoint any more when the test has ended."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    yield directory
    left = mounted_type(directory) is not None
    if left:
        subprocess.run(["fusermount3", "-u", "-z", directory], check=True)
    assert not left


def has_ended(pid: int) -> bool:
    try:
        # A process whose new parent does not wait for it stays as a zombie; it has ended.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_no_mount_can_have_the_process_of_another_or_a_stranger_signalled(
    mount: MakeMount, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it names is signalled by whoever unmounts it; only the kernel vouches for it."""
    one, other = mount(image), mount(make_image(tmp_path / "other.qcow2"))
    found = mountpoint._find_mount(str(one.path))
    assert found is not None
    claims = {
        "its own": (one / mountpoint.DAEMON_FILE).read_bytes(),
        "a stranger": mountpoint.identity(),
    }
    told = Path(f"/proc/{other.process.pid}/fdinfo")
    fuse = next(fd for fd, name in descriptors_of(other.process.pid) if name == "/dev/fuse")
    if "fuse_connection:" in (told / fuse).read_text():  # older kernels do not say it
        claims["another"] = (other / mountpoint.DAEMON_FILE).read_bytes()
    believed = set()
    for whose, claim in claims.items():
        monkeypatch.setattr(mountpoint, "_claim_of", lambda directory, claim=claim: claim)
        with mountpoint._daemon_of(str(one.path), found) as daemon:
            if daemon is not None:
                believed.add(whose)
    assert believed == {"its own"}


def test_mount_and_umount(image: Path, directory: Path) -> None:
    done = instarfs("mount", image, directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert mounted_type(directory) == "fuse.instarfs"
    assert '"clean"' in (directory / "check/result.json").read_text()
    pid = daemon_of(directory)
    assert not has_ended(pid)
    done = instarfs("umount", directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert mounted_type(directory) is None
    assert has_ended(pid)
    assert list(directory.iterdir()) == []


def test_the_daemon_holds_on_to_nothing_of_its_caller(image: Path, directory: Path) -> None:
    # Relative paths, and a pipe that is at its end only when nobody holds it any more.
    done = instarfs("mount", image.name, directory.name, cwd=directory.parent)
    assert (done.returncode, done.stderr) == (0, "")
    pid = daemon_of(directory)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    assert os.getsid(pid) == pid
    for standard in range(3):
        assert Path(f"/proc/{pid}/fd/{standard}").readlink() == Path(os.devnull)
    assert instarfs("umount", directory.name, cwd=directory.parent).returncode == 0


def test_closed_standard_descriptors_are_not_taken_for_the_image(
    image: Path, directory: Path
) -> None:
    command = " ".join([shlex.join(INSTARFS), "mount", '"$0"', '"$1"', "<&-", ">&-", "2>&-"])
    subprocess.run(
        ["bash", "-c", command, image, directory], check=True, env=environment(), timeout=DEADLINE
    )
    assert '"clean"' in (directory / "check/result.json").read_text()
    assert instarfs("umount", directory).returncode == 0


@pytest.mark.parametrize("option", ["-f", "--read-only"], ids=["foreground", "background"])
def test_of_the_descriptors_of_its_caller_none_is_left(
    image: Path, directory: Path, option: str
) -> None:
    secret = image.with_name("secret")
    secret.touch()
    words = [
        shlex.join(INSTARFS),
        "mount",
        option,
        '"$0"',
        '"$1"',
        '7<"$2"',
        '300>>"$2"',
        '<"$2"',
        '>"$2"',
    ]
    command: list[str | Path] = ["bash", "-c", " ".join(words), image, directory, secret]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as caller:
        until(lambda: mounted_type(directory) is not None, "it was mounted")
        assert '"clean"' in (directory / "check/result.json").read_text()
        daemon = daemon_of(directory)
        told = Path(f"/proc/{daemon}/task/{daemon}/children").read_text()
        helpers = [int(pid) for pid in told.split()]
        assert len(helpers) == 2
        for process in (daemon, *helpers):
            opened = dict(descriptors_of(process))
            assert opened["0"] == os.devnull or opened["0"].startswith("pipe:")
            assert opened["1"] == os.devnull
            assert str(secret) not in opened.values()
        assert instarfs("umount", directory).returncode == 0
    assert caller.returncode == 0


def stop_by_signal(number: signal.Signals) -> Callable[[Path], None]:
    return lambda directory: os.kill(daemon_of(directory), number)


@pytest.mark.parametrize(
    "stop",
    [
        stop_by_signal(signal.SIGTERM),
        stop_by_signal(signal.SIGINT),
        lambda directory: run("fusermount3", "-u", directory),
        lambda directory: run("fusermount3", "-u", "-z", directory),
    ],
    ids=["SIGTERM", "SIGINT", "fusermount3", "lazily"],
)
def test_every_way_to_the_end(image: Path, directory: Path, stop: Callable[[Path], object]) -> None:
    assert instarfs("mount", image, directory).returncode == 0
    (directory / "check/leaks").read_text()
    pid = daemon_of(directory)
    stop(directory)
    until(lambda: has_ended(pid), "the daemon had ended")
    assert mounted_type(directory) is None


def test_a_mount_in_the_place_of_one_before_stays(image: Path, directory: Path) -> None:
    """The process of that one may end later, and its mount have had the same numbers."""
    assert instarfs("mount", image, directory).returncode == 0
    first = daemon_of(directory)
    run("fusermount3", "-u", directory)
    assert instarfs("mount", image, directory).returncode == 0
    until(lambda: has_ended(first), "the first had ended")
    assert mounted_type(directory) == "fuse.instarfs"
    assert instarfs("umount", directory).returncode == 0


def test_a_mount_below_a_folder_that_was_renamed_is_taken_off(image: Path, tmp_path: Path) -> None:
    folder, renamed = tmp_path / "folder", tmp_path / "renamed 1"
    (folder / "mnt").mkdir(parents=True)
    assert instarfs("mount", image, folder / "mnt").returncode == 0
    folder.rename(renamed)
    try:
        pid = daemon_of(renamed / "mnt")
        os.kill(pid, signal.SIGTERM)
        until(lambda: has_ended(pid), "the daemon had ended")
        assert mounted_type(renamed / "mnt") is None
    finally:
        subprocess.run(["umount", "-l", renamed / "mnt"], check=False, stderr=subprocess.DEVNULL)


def test_in_the_foreground(mount: MakeMount, image: Path) -> None:
    it = mount(image)
    until(lambda: it.log == "instarfs: mounted\n", "it said so")
    assert instarfs("umount", it.path).returncode == 0
    assert it.wait_for_end() == 0


def test_a_mount_outlives_the_terminal_that_nohup_was_to_keep_it_from(
    image: Path, tmp_path: Path
) -> None:
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *INSTARFS, "mount", "-f"]
    with mounted([*command, image, tmp_path / "mnt"], image, tmp_path / "mnt") as it:
        assert (it / "README.txt").read_text()  # it answers: by then its signals are its own
        it.process.send_signal(signal.SIGHUP)
        assert '"clean"' in it.read("check/result.json")
        it.process.send_signal(signal.SIGTERM)
        assert it.wait_for_end() == 0
        assert "SIGTERM: unmounting" in it.log
        assert "SIGHUP" not in it.log


def test_a_pyfuse3_whose_inside_is_not_known_serves_in_its_own_way(
    image: Path, directory: Path
) -> None:
    program = Path(__file__).with_name("plain_turns.py")
    with mounted([sys.executable, program, image, directory], image, directory) as it:
        with ThreadPoolExecutor(8) as readers:
            read = readers.map(it.read, ["check/result.json", "README.txt", "check/leaks"] * 8)
            assert {len(text) > 10 for text in read} == {True}
        assert "pyfuse3 99.0 waits for requests in its own way" in it.log


def test_a_caller_that_was_killed_gets_no_mount(image: Path, directory: Path) -> None:
    with subprocess.Popen(
        [*INSTARFS, "mount", image, directory],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
    ) as caller:
        caller.kill()
        assert caller.stdout is not None
        # At its end once the last process that the caller left behind has ended or gone on.
        caller.stdout.read()
    until(lambda: mounted_type(directory) is None, "nothing was mounted")


def test_mounting_below_the_folder_of_the_image(image: Path) -> None:
    directory = image.parent / "inside"
    directory.mkdir()
    for path in (image, directory / ".." / image.name):
        assert instarfs("mount", path, directory).returncode == 0
        assert '"clean"' in (directory / "check/result.json").read_text()
        run("ls", "-lR", image.parent)
        assert instarfs("umount", directory).returncode == 0


def test_a_busy_mount_stays(image: Path, directory: Path) -> None:
    assert instarfs("mount", image, directory).returncode == 0
    with (directory / "README.txt").open() as file:
        done = instarfs("umount", directory)
        assert done.returncode == 1
        assert done.stderr == (
            f"instarfs: {directory}: in use; leave the directory and close its files"
            f" (fuser -vm {directory}), then unmount again\n"
        )
        assert file.read().startswith("This is the inside")
    assert instarfs("umount", directory).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts what is no FUSE")
def test_a_mount_that_is_mounted_elsewhere_too_is_named(
    mount: MakeMount, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process goes on there."""
    it, copy = mount(image), tmp_path / "a copy"
    copy.mkdir()
    run("mount", "--bind", it.path, copy)
    monkeypatch.setattr(mountpoint, "_END_SECONDS", 0.0)
    try:
        with pytest.raises(UnmountFailed, match=r"it is unmounted, but .*/a copy too$"):
            mountpoint.unmount(str(it.path))
        assert not it.is_mounted()
        assert (copy / "README.txt").read_text()
        assert instarfs("umount", copy).returncode == 0
        assert it.wait_for_end() == 0
    finally:
        subprocess.run(["umount", "-l", copy], check=False, stderr=subprocess.DEVNULL)


def test_a_loop_device_that_holds_a_mount_is_named_and_released(
    image: Path, directory: Path
) -> None:
    require_loop_devices()
    assert instarfs("mount", image, directory).returncode == 0
    with attached(directory / "disk.raw") as device:
        done = instarfs("umount", directory)
        assert done.returncode == 1
        release = f"losetup -d {device}"
        assert f": in use by {device}: unmount what is on it, then: {release};" in done.stderr
    done = instarfs("umount", directory)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mount_whose_process_was_stopped_is_unmounted(
    monkeypatch: pytest.MonkeyPatch, mount: MakeMount, image: Path
) -> None:
    """As by ^Z in the foreground: it answers nothing, and ends when it goes on."""
    it = mount(image)
    monkeypatch.setattr(mountpoint, "_CLAIM_SECONDS", 0.2)
    it.process.send_signal(signal.SIGSTOP)
    try:
        command = ["instarfs", "umount", str(it.path)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (None, 0)
        assert not it.is_mounted()
    finally:
        it.process.send_signal(signal.SIGCONT)
    assert it.wait_for_end() == 0


def test_a_dead_mount_is_named_and_cleared(image: Path, directory: Path) -> None:
    assert instarfs("mount", image, directory).returncode == 0
    pid = daemon_of(directory)
    os.kill(pid, signal.SIGKILL)
    until(lambda: has_ended(pid), "it was dead")
    done = instarfs("mount", image, directory)
    assert done.returncode == 1
    assert "instarfs umount" in done.stderr
    done = instarfs("umount", directory)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_no_mount_of_ours_is_not_unmounted(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nothing", Path("/proc")):
        done = instarfs("umount", directory)
        assert done.returncode == 1
        assert done.stderr == (
            f"instarfs: {directory}: no instarfs mount is there; see: findmnt -t fuse.instarfs\n"
        )


def test_two_mounts_of_one_image(mount: MakeMount, image: Path) -> None:
    first, second = mount(image), mount(image)
    assert first.read("check/result.json") == second.read("check/result.json")


ARENA = 64 << 20
"""What glibc sets aside for an arena of a thread's, at a multiple of as much."""


def test_the_threads_of_a_mount_have_no_memory_each_for_itself(
    mount: MakeMount, image: Path
) -> None:
    """What one of them has freed the next takes, and no check gets its memory anew."""
    it = mount(image)
    it.read("check/report.txt")
    (it / "disk.raw").read_bytes()
    lines = Path(f"/proc/{it.process.pid}/maps").read_text().splitlines()
    places = [tuple(int(each, 16) for each in line.split()[0].split("-")) for line in lines]
    halves = itertools.pairwise(zip(places, (line.split()[1] for line in lines), strict=True))
    arenas = [
        low
        for ((low, middle), mode), ((begin, end), rest) in halves
        if (mode, rest, middle, end - low, low % ARENA) == ("rw-p", "---p", begin, ARENA, 0)
    ]
    assert not arenas


def test_a_copy_of_the_image_may_be_unmounted_from_anywhere(
    mount: MakeMount, image: Path, tmp_path: Path
) -> None:
    # The daemon must keep no directory busy but the one that its image is in.
    other = tmp_path / "elsewhere"
    other.mkdir()
    it = mount(Path(shutil.copy(image, other)))
    assert Path(f"/proc/{it.process.pid}/cwd").readlink() == Path("/")


def test_the_kernel_reads_ahead_as_much_as_a_request_can_ask_for(shared: Mount) -> None:
    device = run("findmnt", "-no", "MAJ:MIN", shared.path).strip()
    ahead = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    expected = 1024 if os.geteuid() == 0 else 128  # only root may choose
    until(lambda: int(ahead.read_text()) == expected, "it was set")


@pytest.mark.parametrize(
    "limit", ["ulimit -c 0", "ulimit -d 2000000", "ulimit -v 4000000"], ids=lambda text: text[7:9]
)
def test_a_hard_limit_that_is_lower_already(limit: str, image: Path, tmp_path: Path) -> None:
    """As a service that forbids core dumps starts it, or a shell that bounds its memory."""
    command: list[str | Path] = [
        "sh",
        "-c",
        f'{limit}; exec "$@"',
        "sh",
        *INSTARFS,
        "mount",
        "-f",
        image,
    ]
    with mounted([*command, tmp_path / "mnt"], image, tmp_path / "mnt") as it:
        assert json.loads(it.read("check/result.json"))["verdict"] == "clean"
        core = resource.prlimit(it.process.pid, resource.RLIMIT_CORE)
        assert core in ((0, 0), (1, 1))


@pytest.mark.parametrize("descriptors", [8, 12, 16, 20, 24, 28, 32])
def test_few_descriptors_are_one_line_or_enough(
    descriptors: int, image: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *INSTARFS, "mount"]
    done = subprocess.run(
        [*command, image, directory],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=DEADLINE,
    )
    if done.returncode:
        line = "instarfs: there are too few file descriptors for that (ulimit -n)\n"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
        assert mounted_type(directory) is None
    else:
        assert instarfs("umount", directory).returncode == 0
