"""A real file system that is full: a tmpfs in a mount namespace of its own.

Programs run inside it; a test looks in from outside, through /proc.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.mounts import DEADLINE, INSTARFS, environment

_SCRIPT = (
    'mount -t tmpfs -o "size=$1,nr_inodes=$3,mode=700" instarfs-tests "$2" &&'
    " echo ready && exec cat"
)


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """``path``: where the file system is mounted, for programs that `run`."""

    path: Path
    pid: int

    @property
    def outside(self) -> Path:
        """The same folder, as others reach it."""
        return Path(f"/proc/{self.pid}/root{self.path}")

    def run(
        self, *command: str | Path, timeout: float = DEADLINE
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the namespace to its end."""
        enter = ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt"]
        if os.geteuid() != 0:
            enter += [f"--user=/proc/{self.pid}/ns/user", "--preserve-credentials"]
        return subprocess.run(
            [*enter, *map(str, command)],
            check=False,
            capture_output=True,
            text=True,
            env=environment(),
            cwd=self.path.parent,
            timeout=timeout,
        )

    def instarfs(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return self.run(*INSTARFS, *arguments)

    def fill(self, left: int) -> None:
        """Use up all of its space but *left* bytes, with a file of no other use."""
        statistics = os.statvfs(self.outside)
        free = statistics.f_bavail * statistics.f_frsize
        assert free > left
        with (self.outside / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, free - left)

    def names(self) -> set[str]:
        """What is in it, the filler left out."""
        return {path.name for path in self.outside.iterdir()} - {"filler"}


@contextlib.contextmanager
def small_disk(path: Path, size: int, files: int = 1000) -> Iterator[SmallDisk]:
    """A file system on the new folder *path*, seen by nobody else.

    Of *size* bytes, and with at most so many *files*, its own folder among them.
    """
    path.mkdir()
    identity = [] if os.geteuid() == 0 else ["--map-root-user"]
    words = ["sh", "-c", _SCRIPT, "sh", str(size), str(path), str(files)]
    command = ["unshare", "--mount", *identity, *words]
    program = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stderr is not None
    with program:
        if program.stdout.readline() != "ready\n":
            why = f"no mount namespace: {program.stderr.read().strip()}"
            # Root always can, and so can whoever tests for others.
            assert os.geteuid() != 0, why
            assert "CI" not in os.environ, why
            pytest.skip(why)
        try:
            yield SmallDisk(path, program.pid)
        finally:
            program.stdin.close()
            program.wait(DEADLINE)
