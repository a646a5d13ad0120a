"""The directory that is mounted on: whether it can be, what is there, and taking it off again.

Everything about mount tables, and about finding the process behind a mount, lives here. What the
mount shows does not matter here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from instarfs.errors import (
    FuseForbidden,
    FuseMissing,
    FusermountMissing,
    MountFailed,
    MountpointBusy,
    MountpointDead,
    MountpointForbidden,
    MountpointIsNoDirectory,
    MountpointMissing,
    MountpointNotEmpty,
    MountTableMissing,
    NotMounted,
    UnmountBusy,
    UnmountFailed,
    reason_of,
)
from instarfs.guest.follow import FILESYSTEM_TYPE
from instarfs.image.linux import follow_no_links_in
from instarfs.image.mount_table import MOUNT_TABLE, mounts_in

DAEMON_FILE = ".daemon"
"""A file in a mount's root that no listing shows: the identity of the process behind it."""

DAEMON_ATTRIBUTE = b"user.instarfs.daemon"
"""The same as an extended attribute, for as long as nobody has asked for another."""

STOP_COMPUTING = signal.SIGUSR1
"""Tells that process to end what it computes, so that those who wait for it let go."""

_DEVICE = Path("/dev/fuse")
_LOOP_DEVICES = Path("/sys/block")
_READ_AHEAD = Path("/sys/class/bdi")
_READ_AHEAD_KIB = 1024
_PROGRAMS = (("fusermount3", "-u"), ("fusermount", "-u"), ("umount",))

_SHELL = "/bin/sh"
# Once told where and what that is, it unmounts nothing else, whoever tells it to and however late.
# Two empty lines, for want of a mount table: it cannot compare. Where a folder above it has another
# name by now, what the table says of the place is unescaped: as a format, which takes octal digits.
_UNMOUNT_WHEN_TOLD = r"""
read -r there && read -r ours && read -r told || exit 0
path=$1
if [ -n "$ours" ]; then
    place=
    while read -r id parent device root where rest; do
        what=${rest#* - }
        if [ "$id $parent $device $root ${what% *}" = "$ours" ]; then
            place=$where topmost=1
        elif [ "$where" = "$place" ]; then
            topmost=
        fi
    done </proc/self/mountinfo
    [ -n "$place" ] && [ -n "$topmost" ] || exit 0
    if [ "$place" != "$there" ]; then
        path=$(printf "$(printf %s "$place" | sed 's/%/%%/g')/")
        path=${path%/}
    fi
fi
fusermount3 -u -z -- "$path" || umount -l -- "$path"
"""

# Readers close their files within milliseconds of an error; the process unmounts and ends as fast.
_RELEASE_SECONDS = 2.0
_POLL_SECONDS = 0.02
_END_SECONDS = 10.0

_CLAIM_BYTES = 64
_CLAIM_SECONDS = 5.0


# ---- before mounting ----


def check_mountpoint(directory: str) -> None:
    """Raise the error that says why nothing can be mounted on *directory*, if there is one."""
    try:
        is_mounted = _find_mount(directory) is not None
        mode = Path(directory).stat().st_mode
        if not stat.S_ISDIR(mode):
            raise MountpointIsNoDirectory(directory)
        if is_mounted:
            raise MountpointBusy(directory)
        with os.scandir(directory) as entries:
            if any(entries):
                raise MountpointNotEmpty(directory)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MountpointMissing(directory) from error
    except PermissionError as error:
        raise MountpointForbidden(directory) from error
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountpointDead(directory) from error
        raise MountFailed(directory, reason_of(error)) from error
    if not os.access(directory, os.W_OK):
        raise MountpointForbidden(directory)


def check_fuse(directory: str) -> None:
    """Raise the error that says what FUSE lacks here, if anything."""
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        reason = f"{_DEVICE}: {reason_of(error)}"
        if error.errno in (errno.EACCES, errno.EPERM):
            raise FuseForbidden(reason) from error
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            raise FuseMissing(reason) from error
        raise
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise FusermountMissing(directory)


# ---- the process behind a mount ----


def identity() -> bytes:
    """Names the calling process, also once its number has been given to another."""
    pid = os.getpid()
    return f"{pid} {_start_time(pid)}".encode()


@contextlib.contextmanager
def _daemon_of(directory: str, mount: _Mount) -> Iterator[int | None]:
    """A pidfd of the process behind *mount* on *directory*; None where it cannot be found.

    Any filesystem may call itself instarfs and name any process: only one of the user who mounted
    it is believed, which the kernel says serves it.
    """
    with contextlib.ExitStack() as stack:
        pidfd = None
        with contextlib.suppress(OSError, ValueError, OverflowError):
            pid, started = _claim_in_time(directory).decode().split()
            candidate = os.pidfd_open(int(pid))
            stack.callback(os.close, candidate)
            # In another PID namespace the number would be that of a stranger.
            is_theirs = Path(f"/proc/{pid}").stat().st_uid == mount.user
            if is_theirs and _start_time(int(pid)) == started and _serves(int(pid), mount):
                pidfd = candidate
        yield pidfd


def _claim_in_time(directory: str) -> bytes:
    """What a mount says of the process behind it. Raises OSError, also where it does not answer.

    A process of its own asks, for it can be killed where that one was stopped, and is not in the
    way of unmounting then. Who has read the question and does not answer keeps it, for all to see.
    """
    answer, tell = os.pipe()
    asking = os.fork()
    if asking == 0:
        with contextlib.suppress(OSError):
            os.write(tell, _claim_of(directory))
        os._exit(0)
    os.close(tell)
    try:
        readable, _, _ = select.select([answer], [], [], _CLAIM_SECONDS)
        if not readable:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        return os.read(answer, _CLAIM_BYTES)
    finally:
        os.close(answer)
        os.kill(asking, signal.SIGKILL)
        deadline = time.monotonic() + _RELEASE_SECONDS
        while os.waitpid(asking, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def _claim_of(directory: str) -> bytes:
    """What a mount says of the process behind it. Raises OSError."""
    try:
        # Whose mount it is nobody knows yet: no link is followed out of it, no pipe waited for.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(f"{directory}/{DAEMON_FILE}", flags)
    except FileNotFoundError:  # it was mounted by an instarfs that had the attribute alone
        return os.getxattr(directory, DAEMON_ATTRIBUTE)
    try:
        return os.read(fd, _CLAIM_BYTES)
    finally:
        os.close(fd)


def _serves(pid: int, mount: _Mount) -> bool:
    """Whether a process holds the other end of a mount, or of one of FUSE where no more is told."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if link.readlink() == _DEVICE:
                told = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
                connection = re.search(r"^fuse_connection:\t(\d+)$", told, re.MULTILINE)
                if connection is None or f"0:{connection[1]}" == mount.device:
                    return True
    return False


def _start_time(pid: int) -> str:
    # The name of the program, in parentheses, may contain anything.
    return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]


def _has_ended(pidfd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(int(timeout * 1000)))


# ---- unmounting ----


def unmount(directory: str) -> None:
    """Unmount the instarfs on *directory*, and wait for its process to end.

    A computation that somebody waits for is ended; any other use makes it `UnmountBusy`.
    """
    try:
        mount = _find_mount(directory)
    except FileNotFoundError as error:  # the caller's own directory is gone
        raise NotMounted(directory) from error
    except OSError as error:  # a folder on its way cannot be entered
        raise UnmountFailed(directory, reason_of(error)) from error
    if mount is None or mount.filesystem != FILESYSTEM_TYPE:
        raise NotMounted(directory)
    target = _real_path(directory)
    with _daemon_of(target, mount) as daemon:
        complaint = _try_to_unmount(target)
        if daemon is not None:
            deadline = time.monotonic() + _RELEASE_SECONDS
            while _is_busy(complaint) and time.monotonic() < deadline:
                # Each time anew: some programs write once more what has failed.
                with contextlib.suppress(OSError):  # it has ended, or is not ours to signal
                    signal.pidfd_send_signal(daemon, STOP_COMPUTING)
                time.sleep(_POLL_SECONDS)
                complaint = _try_to_unmount(target)
        if _is_busy(complaint):
            raise UnmountBusy(directory, _loop_devices(target))
        if complaint:
            raise UnmountFailed(directory, complaint)
        if daemon is not None and not _has_ended(daemon, _END_SECONDS):
            copy = _place_of(mount.device, target)
            reason = (
                f"it is unmounted, but its process serves {copy} too"
                if copy
                else "it is unmounted, but its process waits until what the image is on answers,"
                " or until it is unmounted in other namespaces, too"
            )
            raise UnmountFailed(directory, reason)


def _try_to_unmount(target: str) -> str:
    """The complaint of the last program that tried; empty once one of them succeeded."""
    complaint = "neither fusermount3 nor umount is installed"
    for program, *arguments in _PROGRAMS:
        path = shutil.which(program)
        if path is None:
            continue
        outcome = subprocess.run(  # noqa: S603 - the user's own directory, no shell
            [path, *arguments, "--", target],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
        )
        if outcome.returncode == 0:
            return ""
        complaint = " ".join(outcome.stderr.split()) or f"{program} failed"
        if _is_busy(complaint):
            break
    return complaint


def _loop_devices(target: str) -> str:
    """Which loop devices hold files of the mount on *target*, for a sentence: no process does."""
    devices = []
    for file in sorted(_LOOP_DEVICES.glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):
            if os.fsdecode(file.read_bytes()).startswith(f"{target}/"):
                devices.append(f"/dev/{file.parts[-3]}")
    if not devices:
        return ""
    names = " ".join(devices)
    return f" by {names}: unmount what is on it, then: losetup -d {names}"


def _is_busy(complaint: str) -> bool:
    return "busy" in complaint


class Unmounter:
    """Unmounts for a process that will not be allowed to: a program that waits to be told.

    To be started before the mount. It unmounts lazily, as libfuse does, and what was mounted alone;
    left without a word, as when the process is killed, it ends and the mount stays for all to see.
    """

    def __init__(self, directory: str) -> None:
        """Raises `MountFailed` where there is no shell."""
        self._target = os.path.realpath(directory)
        self._mount: _Mount | None = None
        try:
            self._program = subprocess.Popen(  # noqa: S603 - the user's own directory
                [_SHELL, "-c", _UNMOUNT_WHEN_TOLD, "sh", self._target],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # a ^C on the terminal is not for it
            )
        except FileNotFoundError as error:  # as in a container without one
            raise MountFailed(directory, f"{_SHELL}: {reason_of(error)}") from error

    def remember(self) -> None:
        """What is mounted now is what is to be unmounted."""
        self._mount = _mount_at(self._target)
        program = self._program.stdin
        if program is not None:
            with contextlib.suppress(BrokenPipeError):  # it was killed
                mount = self._mount
                program.write(b"%b\n%b\n" % ((mount.place, mount.entry) if mount else (b"", b"")))
                program.flush()

    def forget_what_is_gone(self) -> None:
        """To be called as soon as nothing is asked of the mount any more.

        If it was unmounted, what is mounted from then on is another's, though it be the same image
        on the same place: the kernel gives the numbers of a mount again at once.
        """
        with contextlib.suppress(MountTableMissing):
            if self._mount is not None and not self._is_mounted(self._mount.entry):
                self._mount = None

    def unmount(self) -> bool:
        """Whether it is unmounted, by us or by somebody before."""
        with contextlib.suppress(MountTableMissing):  # then it is taken to be there still
            if self._mount is None or not self._is_mounted(self._mount.entry):
                return True
        try:
            self._program.communicate(b"\n", _END_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return self._program.returncode == 0

    def _is_mounted(self, entry: bytes) -> bool:
        """Wherever that is by now: a folder above it may have been renamed."""
        return any(mount.entry == entry for mount in mounts_in(_mount_table(self._target)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._program.communicate(timeout=_END_SECONDS)


# ---- how it is read ----


class ReadAhead:
    """Lets the kernel read ahead as much at a time as one request can ask for.

    A request costs as much as copying 500 KiB, and the kernel's own choice is 128 KiB. Only root
    may choose another: for others all stays as it is. Made once the directory is mounted on, for
    later it may not be allowed to open anything; and widened once the kernel has been answered, as
    it makes its own choice then.
    """

    def __init__(self, directory: str) -> None:
        """*directory*: absolute, without links; nothing is asked of the mount itself."""
        self._fd = -1
        mount = _mount_at(directory)
        if mount is not None and mount.filesystem == FILESYSTEM_TYPE:
            path = _READ_AHEAD / mount.device / "read_ahead_kb"
            with contextlib.suppress(OSError):
                self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def widen(self) -> None:
        """To be called once."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self._fd, f"{_READ_AHEAD_KIB}\n".encode())
            os.close(self._fd)


def follow_no_links(directory: str) -> None:
    """Have the kernel follow no symbolic link in what is mounted there, where it can be had.

    There is none; but a process that was taken over could put one where root writes to a control
    file, and choose what is written to. Only root may ask for it (Linux 5.14), and libfuse does not
    know it. *directory*: absolute, without links; nothing is asked of the mount itself.
    """
    with contextlib.suppress(OSError):
        follow_no_links_in(directory)


# ---- the mount table ----


@dataclass(frozen=True, slots=True)
class _Mount:
    """A line of the mount table. ``place``: where, as it is written there; ``entry``: what else
    tells it from others; ``device``: names what is mounted; ``user``: who made a FUSE mount.
    """

    place: bytes
    entry: bytes
    device: str
    filesystem: str
    user: int | None


def _find_mount(directory: str) -> _Mount | None:
    """What is mounted on *directory*, the topmost if several; None: nothing.

    From the kernel's list: a mount whose process died, or hangs, answers nothing itself. Raises
    `MountTableMissing`, and FileNotFoundError for a relative path where there is no directory.
    """
    return _mount_at(_real_path(directory))


def _real_path(directory: str) -> str:
    """*directory* without links; nothing is asked of what is mounted on it, which may not answer.

    Raises as `_find_mount`.
    """
    parent, name = os.path.split(directory.rstrip("/"))
    if name not in {"", ".", ".."}:
        path = f"{os.path.realpath(parent).rstrip('/')}/{name}"
        if _mount_at(path) is not None:
            return path
    return os.path.realpath(directory)


def _mount_at(path: str) -> _Mount | None:
    """The same of a real path, which is not looked up: it may lead to the caller's own mount."""
    target, found = os.fsencode(path), None
    for mount in mounts_in(_mount_table(path)):
        if mount.point == target:
            user = re.search(rb"\buser_id=(\d+)", mount.options)
            found = _Mount(
                mount.written_point,
                mount.entry,
                mount.device,
                mount.filesystem,
                int(user[1]) if user else None,
            )
    return found


def _place_of(device: str, path: str) -> str:
    """Where what was mounted on *path* is mounted too, as by mount --bind; empty: nowhere here."""
    places = (it.point for it in mounts_in(_mount_table(path)) if it.device == device)
    return os.fsdecode(next(places, b""))


def _mount_table(path: str) -> bytes:
    """The kernel's, for whoever asks of *path*. Raises `MountTableMissing`."""
    try:
        return MOUNT_TABLE.read_bytes()
    except OSError as error:
        raise MountTableMissing(path, f"{MOUNT_TABLE}: {reason_of(error)}") from error
