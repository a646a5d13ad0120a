"""instarfs.daemon.background: what is its caller's until a mount answers; and the log, by a process
that may make no socket any more.

What such a process gives up never comes back, so it is one of its own, and told what to log.
"""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.mount.mounts import environment

PROGRAM = """
import logging, sys
from instarfs.image.file import Image
from instarfs.daemon import background, confinement

background.log_to_syslog(sys.argv[1])
confinement.Confinement.of_daemon(Image.open(sys.argv[2])).enforce()
for line in sys.stdin:
    level, _, text = line.rstrip().partition(" ")
    logging.log(int(level), "%s", text.encode().decode("unicode_escape"))
    print("done", flush=True)
"""

MESSAGE = re.compile(rb"<(\d+)>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d instarfs\[(\d+)\]: (.*)")


class Listener:
    """What keeps the log: syslogd, or the journal."""

    def __init__(self, address: Path) -> None:
        address.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(address))
        self._socket.settimeout(10)

    def next(self, pid: int) -> tuple[int, str]:
        """Priority and text of the next message, which must be of process *pid*."""
        message = self._socket.recv(4096)
        found = MESSAGE.fullmatch(message)
        assert found, message
        assert int(found[2]) == pid
        return int(found[1]), found[3].decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class Confined:
    """A process that is confined as a daemon is, and logs what it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def log(self, level: int, text: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{level} {text}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def confined(address: Path, tmp_path: Path) -> Iterator[Confined]:
    (tmp_path / "image").write_bytes(b"image")
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, address, tmp_path / "image"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        yield Confined(process)
        _, complaint = process.communicate(timeout=10)
    assert complaint == ""


def test_each_message_is_a_line_with_its_severity(address: Path, confined: Confined) -> None:
    with Listener(address) as listener:
        for level, priority in ((20, 30), (30, 28), (40, 27)):
            confined.log(level, r"first\nthe same\udcff\u202e\x9b")
            assert listener.next(confined.pid) == (priority, r"first\nthe same\xff\u202e\x9b")


def test_logging_goes_on_once_syslog_was_started_anew(address: Path, confined: Confined) -> None:
    with Listener(address) as first:
        confined.log(20, "to the first")
        assert first.next(confined.pid) == (30, "to the first")
    confined.log(20, "to nobody")
    with Listener(address) as second:
        confined.log(20, "to the second")
        assert second.next(confined.pid) == (30, "to the second")


def test_where_there_is_no_syslog_nothing_is_said(confined: Confined) -> None:
    confined.log(40, "to nobody")


def test_a_syslog_that_does_not_read_holds_nobody_up(address: Path, confined: Confined) -> None:
    with Listener(address):
        for _ in range(200):
            confined.log(40, r"line\n" * 20)


IN_THE_BACKGROUND = """
import os, sys
from instarfs.image.file import Image
from instarfs.daemon import background, confinement

ready = background.to_background()
confinement.Confinement.of_daemon(Image.open(sys.argv[1])).enforce()
os.write(2, b"before")
os.close(os.open("/proc/self/fd/2", os.O_RDONLY))
ready()
os.write(2, b"after")
"""


def test_until_it_has_answered_a_confined_process_has_the_stderr_of_its_caller(
    tmp_path: Path,
) -> None:
    """And reads it, where that is a pipe; then no more."""
    (tmp_path / "image").write_bytes(b"image")
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_BACKGROUND, tmp_path / "image"],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert (done.stdout, done.stderr) == ("", "before")
