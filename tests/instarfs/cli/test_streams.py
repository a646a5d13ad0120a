"""What could not be printed is one line and exit code 1, whatever the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.images.builder import ImageBuilder

INSTARFS = (sys.executable, "-m", "instarfs")

COMMANDS = (
    "--help",
    "--version",
    "mount --help",
    "umount -h",
    "check --help",
    "check x.qcow2",
    "check --output=json x.qcow2",
    "check x.qcow2 x.qcow2",
    "check -r all x.qcow2",
    "plan all x.qcow2",
    "plan all --output json x.qcow2",
    "trim x.qcow2",
    "info x.qcow2",
    "info --output json --backing-chain x.qcow2",
    "map x.qcow2",
    "report x.qcow2",
    "map --output json x.qcow2",
    "files x.qcow2",
    "rescue x.qcow2",
    "rescue --output json x.qcow2",
    "export x.qcow2 x.raw",
    "scan --state state x.qcow2",
    "scan --output jsonl x.qcow2",
    "schema check",
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.qcow2").write_bytes(ImageBuilder().build().data)


def shell(redirected: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'"$@" {redirected}', "sh", *INSTARFS, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)


def into_a_broken_pipe(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [*INSTARFS, *arguments],
            check=False,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=20,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_printed(command: str) -> None:
    for done, reason in (
        (shell(">/dev/full", *command.split()), "No space left on device"),
        (shell(">&-", *command.split()), "it is closed"),
        (into_a_broken_pipe(command.split()), "Broken pipe"),
    ):
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"instarfs: what was to be printed cannot be written to standard output: {reason}"
        ]


def test_what_prints_nothing_needs_no_output() -> None:
    for redirected in (">/dev/full", ">&-", ">&- 2>&-", ">&- 2>&- <&-"):
        assert shell(redirected, "check", "-q", "x.qcow2").returncode == 0


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_the_exit_code_stays_where_nothing_can_be_said(redirected: str) -> None:
    Path("other").write_bytes(b"no image")
    for arguments, code in (
        (("check", "other"), 63),
        (("check", "missing"), 1),
        (("check", "--bogus"), 1),
        (("check", "-p", "x.qcow2"), 0),
        ((), 1),
    ):
        done = shell(redirected, *arguments)
        assert (done.returncode, bool(done.stdout)) == (code, code == 0)


def test_an_output_that_is_slow_and_does_not_block_gets_all() -> None:
    """As where another program made the pipe so, for itself."""
    names = ["x.qcow2"] * 400
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen([*INSTARFS, "check", *names], stdout=writer) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            text = file.read()
        assert process.wait(20) == 0
    assert text.count(b"No errors were found") == 400


def test_a_name_that_is_not_utf8_is_printed() -> None:
    name = os.fsdecode(b"\xff.qcow2")
    Path(name).write_bytes(Path("x.qcow2").read_bytes())
    done = subprocess.run([*INSTARFS, "map", name], check=False, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, b"")
