"""instarfs.mount.mountpoint: what may be mounted on, and how unmounting goes on."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from instarfs import errors
from instarfs.image.mount_table import mounts_in
from instarfs.mount import mountpoint
from instarfs.text import printable


def with_a_file(directory: Path) -> None:
    directory.mkdir()
    (directory / "file").touch()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: None, errors.MountpointMissing),
        (lambda path: path.symlink_to("nowhere"), errors.MountpointMissing),
        (Path.touch, errors.MountpointIsNoDirectory),
        (with_a_file, errors.MountpointNotEmpty),
        (lambda path: path.symlink_to("/proc"), errors.MountpointBusy),
    ],
    ids=["nothing", "dangling", "file", "not-empty", "mounted"],
)
def test_refuses_what_cannot_be_mounted_on(
    tmp_path: Path, make: Callable[[Path], None], kind: type[errors.InstarfsError]
) -> None:
    directory = tmp_path / "mnt"
    make(directory)
    with pytest.raises(kind, match=f"^{directory}: ") as caught:
        mountpoint.check_mountpoint(str(directory))
    assert caught.value.exit_code != 0


@pytest.mark.parametrize("name", ["a folder", "it's\n\x1b[31m $(id)", os.fsdecode(b"\xff")])
def test_the_command_that_makes_a_mountpoint_can_be_pasted(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    with pytest.raises(errors.MountpointMissing) as caught:
        mountpoint.check_mountpoint(str(directory))
    command = str(caught.value).rpartition("make it with: ")[2]
    subprocess.run(["bash", "-e", "-c", printable(command)], check=True)
    assert directory.is_dir()


def test_takes_an_empty_directory(tmp_path: Path) -> None:
    mountpoint.check_mountpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EACCES, errors.MountpointForbidden),
        (errno.ENOTCONN, errors.MountpointDead),
        (errno.ELOOP, errors.MountFailed),
        (errno.ENAMETOOLONG, errors.MountFailed),
        (errno.EIO, errors.MountFailed),
    ],
)
def test_what_the_kernel_says_of_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[errors.InstarfsError]
) -> None:
    def fail(path: Path) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(kind):
        mountpoint.check_mountpoint(str(tmp_path))


def test_what_cannot_be_looked_up_is_not_unmounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below /proc/1/root of somebody else."""

    def fail(path: str) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os.path, "realpath", fail)
    with pytest.raises(errors.UnmountFailed, match="Permission denied"):
        mountpoint.unmount(f"{tmp_path}/x")


def test_a_directory_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(errors.MountpointForbidden):
        mountpoint.check_mountpoint(str(tmp_path))


def test_no_fuse_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "_DEVICE", tmp_path / "fuse")
    with pytest.raises(errors.FuseMissing, match="No such file or directory"):
        mountpoint.check_fuse("/mnt")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EACCES, errors.FuseForbidden),
        (errno.EPERM, errors.FuseForbidden),
        (errno.ENODEV, errors.FuseMissing),
        (errno.ENXIO, errors.FuseMissing),
        (errno.EMFILE, OSError),
    ],
)
def test_a_fuse_device_that_cannot_be_opened(
    code: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(kind, match=os.strerror(code)) as caught:
        mountpoint.check_fuse("/mnt")
    assert ("modprobe" in str(caught.value)) == (kind is errors.FuseMissing)


def test_without_a_mount_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "MOUNT_TABLE", tmp_path / "none")
    for refused in (mountpoint.check_mountpoint, mountpoint.unmount):
        with pytest.raises(errors.MountTableMissing, match=f"^{tmp_path}: .*No such file"):
            refused(str(tmp_path))


def test_no_fusermount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "_DEVICE", Path(os.devnull))
    monkeypatch.setattr(shutil, "which", lambda program: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(errors.FusermountMissing, match=r"^/mnt: "):
        mountpoint.check_fuse("/mnt")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    mountpoint.check_fuse("/mnt")


# ---- unmounting ----


class Programs:
    """Stands in for the programs that unmount: which are there, and what each complains of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, complaints: dict[str, str]) -> None:
        self.called: list[list[str]] = []
        self.complaints = complaints
        monkeypatch.setattr(shutil, "which", lambda name: name if name in complaints else None)
        monkeypatch.setattr(subprocess, "run", self.run)
        found = mountpoint._Mount(b"", b"", "0:99", "fuse.instarfs", os.getuid())
        monkeypatch.setattr(mountpoint, "_find_mount", lambda directory: found)
        monkeypatch.setattr(mountpoint, "_RELEASE_SECONDS", 0.0)

    def run(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.called.append(command)
        complaint = self.complaints[command[0]]
        return subprocess.CompletedProcess(command, int(bool(complaint)), "", complaint)


def test_fusermount3_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch, {"fusermount3": "", "fusermount": "", "umount": ""})
    mountpoint.unmount(str(tmp_path))
    assert programs.called == [["fusermount3", "-u", "--", str(tmp_path)]]


def test_the_next_one_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = Programs(monkeypatch, {"fusermount": "entry not found in /etc/mtab", "umount": ""})
    mountpoint.unmount(str(tmp_path))
    assert [command[0] for command in programs.called] == ["fusermount", "umount"]


def test_busy_is_busy_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "fusermount3: failed to unmount /mnt: Device or resource busy"
    programs = Programs(monkeypatch, {"fusermount3": busy, "umount": ""})
    with pytest.raises(errors.UnmountBusy, match="fuser -vm"):
        mountpoint.unmount(str(tmp_path))
    assert [command[0] for command in programs.called] == ["fusermount3"]


def test_the_last_complaint_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Programs(monkeypatch, {"fusermount3": "not yours\n", "umount": "umount: must be superuser\n"})
    with pytest.raises(errors.UnmountFailed, match=r"must be superuser$"):
        mountpoint.unmount(str(tmp_path))


def test_nothing_to_unmount_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Programs(monkeypatch, {})
    with pytest.raises(errors.UnmountFailed, match="neither fusermount3 nor umount"):
        mountpoint.unmount(str(tmp_path))


@pytest.mark.parametrize("directory", ["/proc", "/nowhere/at/all", "/tmp/../usr"])  # noqa: S108
def test_other_mounts_and_no_mounts_are_left_alone(directory: str) -> None:
    with pytest.raises(errors.NotMounted, match=f"^{directory}: "):
        mountpoint.unmount(directory)


def test_what_the_mount_table_says_of_a_directory() -> None:
    found = mountpoint._find_mount("/proc")
    assert found is not None
    assert (found.filesystem, found.user) == ("proc", None)


def test_an_identity_names_a_process_and_when_it_began() -> None:
    pid, started = mountpoint.identity().split()
    assert int(pid) == os.getpid()
    assert int(started) > 0


def test_a_mount_is_believed_only_about_its_own_users_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pid, started = mountpoint.identity().decode().split()
    monkeypatch.setattr(mountpoint, "_serves", lambda pid, mount: True)
    claims: list[tuple[str, int | None]] = [
        (f"{pid} {started}", os.getuid()),
        (f"{pid} {started}", os.getuid() + 1),
        (f"{pid} {started}", None),
        (f"{pid} {int(started) + 1}", os.getuid()),
        (f"{1 << 22} 1", os.getuid()),
        (f"{1 << 40} 1", os.getuid()),
        ("nonsense", os.getuid()),
    ]
    believed = []
    for claim, user in claims:
        monkeypatch.setattr(mountpoint, "_claim_of", lambda path, claim=claim: claim.encode())
        mount = mountpoint._Mount(b"", b"", "0:99", "fuse.instarfs", user)
        with mountpoint._daemon_of("/mnt", mount) as daemon:
            believed.append(daemon is not None)
    assert believed == [True, *[False] * 6]


def test_what_stands_in_the_place_of_its_claim_is_not_followed_or_waited_for(
    tmp_path: Path,
) -> None:
    """Any file system may call itself instarfs; root asks it, too."""
    claim, elsewhere = tmp_path / mountpoint.DAEMON_FILE, tmp_path / "elsewhere"
    elsewhere.write_bytes(mountpoint.identity())
    mount = mountpoint._Mount(b"", b"", "0:99", "fuse.instarfs", os.getuid())
    for make in (lambda: claim.symlink_to(elsewhere), lambda: os.mkfifo(claim), claim.mkdir):
        make()
        with mountpoint._daemon_of(str(tmp_path), mount) as daemon:
            assert daemon is None
        claim.rmdir() if claim.is_dir() and not claim.is_symlink() else claim.unlink()
    with mountpoint._daemon_of(str(tmp_path), mount) as daemon:  # none there: nor an attribute
        assert daemon is None


# ---- unmounting for a process that may not ----


def test_without_a_shell_nothing_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "_SHELL", str(tmp_path / "sh"))
    with pytest.raises(errors.MountFailed, match=r"cannot be mounted: .*/sh: No such file"):
        mountpoint.Unmounter(str(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts what is no FUSE")
def test_what_unmounts_when_it_is_told_unmounts_nothing_else(tmp_path: Path) -> None:
    """Whoever tells it may have been taken over, and something else be mounted there by then."""
    directory = tmp_path / "a folder, [with] a name"
    directory.mkdir()

    def mount(source: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", source, directory], check=True)

    def told(unmounter: mountpoint.Unmounter) -> int:
        """How many mounts are left there."""
        unmounter._program.communicate(b"\n", 10)
        found = mounts_in(Path("/proc/self/mountinfo").read_bytes())
        return sum(it.point == os.fsencode(directory) for it in found)

    try:
        for over_it in (True, False):
            with mountpoint.Unmounter(str(directory)) as unmounter:
                mount("ours")
                unmounter.remember()
                if over_it:
                    mount("theirs")
                else:
                    subprocess.run(["umount", directory], check=True)
                    mount("theirs")
                assert told(unmounter) == 1 + over_it
            if over_it:
                subprocess.run(["umount", directory], check=True)
            subprocess.run(["umount", directory], check=True)
        with mountpoint.Unmounter(str(directory)) as unmounter:
            mount("ours")
            unmounter.remember()
            assert told(unmounter) == 0
    finally:
        while os.path.ismount(directory):
            subprocess.run(["umount", directory], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts what is no FUSE")
def test_what_is_mounted_after_ours_was_unmounted_stays(tmp_path: Path) -> None:
    """The same source on the same place: mostly it has the same numbers, too."""
    mount = ["mount", "-t", "tmpfs", "ours", str(tmp_path)]
    with mountpoint.Unmounter(str(tmp_path)) as unmounter:
        subprocess.run(mount, check=True)
        try:
            unmounter.remember()
            unmounter.forget_what_is_gone()
            subprocess.run(["umount", tmp_path], check=True)
            unmounter.forget_what_is_gone()
            subprocess.run(mount, check=True)
            assert unmounter.unmount()
            assert os.path.ismount(tmp_path)
        finally:
            subprocess.run(["umount", tmp_path], check=False, stderr=subprocess.DEVNULL)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts what is no FUSE")
@pytest.mark.parametrize("name", ["moved", "100% 7 \\n moved %s\n", os.fsdecode(b"\xff\t\\"), "-o"])
def test_what_was_mounted_is_unmounted_where_it_is_by_now(tmp_path: Path, name: str) -> None:
    """A folder above it was renamed, and something else is mounted where it was."""
    folder, moved = tmp_path / "folder", tmp_path / name
    directory = folder / f"mnt{name}"
    directory.mkdir(parents=True)
    with mountpoint.Unmounter(str(directory)) as unmounter:
        subprocess.run(["mount", "-t", "tmpfs", "ours", directory], check=True)
        unmounter.remember()
        folder.rename(moved)
        directory.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "theirs", directory], check=True)
        try:
            assert unmounter.unmount()
            assert not os.path.ismount(moved / directory.name)
            assert os.path.ismount(directory)
        finally:
            for left in (moved / directory.name, directory):
                subprocess.run(["umount", left], check=False, stderr=subprocess.DEVNULL)
