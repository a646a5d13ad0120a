"""Real mounts for the tests: started as a user would, watched, and taken off again.

A mount runs in the foreground with its log in a file, so that a test can look at both. What a
test waits for it polls, with a deadline; nothing here sleeps for a while and hopes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from instarfs.image.mount_table import MOUNT_TABLE, mounts_in
from instarfs.mount.mountpoint import DAEMON_FILE
from tests.schemas import require_valid_file, require_valid_output

DEADLINE = 20.0
PROJECT = Path(__file__).parents[2]
INSTARFS = (sys.executable, "-m", "instarfs")


def environment() -> dict[str, str]:
    """For programs of ours: the package is found from any directory."""
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "LC_ALL": "C.UTF-8"}


def instarfs(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    done = subprocess.run(
        [*INSTARFS, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        cwd=cwd,
        timeout=DEADLINE,
    )
    require_valid_output(arguments, done.stdout)
    return done


def run(*command: str | Path, timeout: float = DEADLINE) -> str:
    """What a command prints, which must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=timeout,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def shell_as(user: int, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command as *user*, with that user's group alone."""
    return subprocess.run(
        ["sh", "-c", command],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        user=user,
        group=user,
        extra_groups=[],
        timeout=DEADLINE,
    )


def until(condition: Callable[[], object], what: str) -> None:
    """Poll until *condition* holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.01)


def daemon_of(directory: Path) -> int:
    """The number of the process behind a mount."""
    return int((directory / DAEMON_FILE).read_text().split()[0])


def descriptors_of(pid: int) -> Iterator[tuple[str, str]]:
    """The number of each open file of a process, and what it is open on.

    A mount goes on loading modules after it answers: what it closes meanwhile is left out.
    """
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield link.name, str(link.readlink())


def mounted_type(directory: Path) -> str | None:
    """The type of the topmost mount on *directory*."""
    found = None
    for mount in mounts_in(MOUNT_TABLE.read_bytes()):
        if os.fsdecode(mount.point) == str(directory.resolve()):
            found = mount.filesystem
    return found


@dataclass
class Mount:
    """A mount of *image* on *path*, served by *process*, which logs to *log_path*."""

    image: Path
    path: Path
    process: subprocess.Popen[bytes]
    log_path: Path
    unexpected: tuple[str, ...] = field(
        default=("Traceback", "error", "Error", "unexpected", "Warning"), repr=False
    )

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def is_mounted(self) -> bool:
        return mounted_type(self.path) is not None

    def read(self, name: str) -> str:
        text = (self.path / name).read_text()
        require_valid_file(name, text)
        return text

    def wait_for_end(self) -> int:
        """The exit code of the process, once it has ended; the mount is gone then."""
        code = self.process.wait(DEADLINE)
        assert not self.is_mounted()
        return code

    def stop(self) -> None:
        """End it, whatever state it is in; its log must hold nothing unexpected."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.is_mounted():
            subprocess.run(["fusermount3", "-u", "-z", self.path], check=True)
        for word in self.unexpected:
            assert word not in self.log, self.log


MakeMount = Callable[..., Mount]
"""Mounts an image in the foreground: the image, then further arguments of the command."""


@contextlib.contextmanager
def mounted(command: Sequence[str | Path], image: Path, directory: Path) -> Iterator[Mount]:
    """Run *command*, which mounts *image* on *directory* and stays; taken off at the end."""
    directory.mkdir(exist_ok=True)
    log_path = directory.with_name(f"{directory.name}.log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(word) for word in command], stderr=log, stdout=log, env=environment()
        )
    mount = Mount(image, directory, process, log_path)
    try:
        until(
            lambda: mount.is_mounted() or process.poll() is not None,
            "it was mounted",
        )
        assert process.poll() is None, mount.log
        yield mount
    finally:
        mount.stop()


@dataclass
class Gate:
    """Holds up the check of a mount, or its repairs; see `gated.py` and `gated_repair.py`."""

    mount: Mount
    folder: Path

    def open(self) -> None:
        (self.folder / "gate").touch()

    def close(self) -> None:
        (self.folder / "gate").unlink()

    @property
    def checks(self) -> int:
        """How often a check has begun."""
        return self.steps

    @property
    def steps(self) -> int:
        """How often something came to the gate."""
        count = self.folder / "count"
        return len(count.read_text().splitlines()) if count.exists() else 0


def make_image(path: Path, size: str = "64M", *options: str) -> Path:
    """A clean image, and the file system's clock well past its last write."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)
    settle(path)
    return path


CLUSTER = 1 << 16


def leak(path: Path, clusters: int, cluster_size: int = CLUSTER) -> None:
    """Count so many clusters past the end of the file as used, which nothing refers to."""
    end = -(-path.stat().st_size // cluster_size)
    with path.open("r+b") as file:
        file.seek(2 * cluster_size + 2 * end)  # where qemu-img puts the first refcount block
        file.write(b"\0\1" * clusters)
        file.truncate((end + clusters) * cluster_size)
    settle(path)


def settle(path: Path) -> None:
    """A file written this very moment is checked again at the next read; this one is not."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))


OPENAT = ("257", "56")
"""Its number on x86-64 and on arm64."""


def is_opening(pid: int) -> bool:
    """Whether the process sleeps while it opens a file, which of this machine's own takes none."""
    system_call = Path(f"/proc/{pid}/syscall").read_text().split()[0]
    return system_call in OPENAT and state_of(pid) in "SD"


def state_of(pid: int) -> str:
    """The letter that ps(1) shows."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
