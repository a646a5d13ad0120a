"""A tree whose files fail: what the caller sees, and that the mount goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from instarfs.mount.mountpoint import STOP_COMPUTING
from tests.mount.mounts import DEADLINE, Mount, is_opening, mounted, run, until


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    directory = tmp_path_factory.mktemp("fake") / "mnt"
    command: list[str | Path] = [
        sys.executable,
        Path(__file__).with_name("fake_tree.py"),
        directory,
        "fails-to-load",
    ]
    with mounted(command, Path(os.devnull), directory) as it:
        it.unexpected = ("the mount ended",)
        yield it
        assert it.read("good") == "content"


@pytest.mark.parametrize("name", ["bug", "error", "text"])
def test_a_file_that_fails_fails_alone(fake: Mount, name: str) -> None:
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            fake.read(name)
    assert fake.read("good") == "content"


def test_what_is_expected_has_no_traceback(fake: Mount) -> None:
    before = fake.log
    with pytest.raises(OSError, match="Input/output error"):
        fake.read("error")
    assert fake.log == before


def test_what_is_not_has_one(fake: Mount) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        fake.read("bug")
    assert "unexpected error in open" in fake.log
    assert "ZeroDivisionError: a bug" in fake.log


def test_what_is_loaded_once_it_answers_may_fail(fake: Mount) -> None:
    until(lambda: "not all of instarfs could be loaded" in fake.log, "it was tried")
    assert fake.log.index("mounted") < fake.log.index("not all of instarfs could be loaded")
    assert fake.read("good") == "content"


@pytest.mark.parametrize(("name", "short"), [("huge", "memory"), ("threaded", "room for a thread")])
def test_what_takes_too_much_memory_says_so(fake: Mount, name: str, short: str) -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"):
        fake.read(name)
    assert fake.log.endswith(f"not enough {short} in open\n")
    assert fake.read("good") == "content"


def test_a_write_that_fails(fake: Mount) -> None:
    with (
        pytest.raises(OSError, match="Input/output error"),
        (fake / "control").open("w") as control,
    ):
        control.write("go\n")
    assert fake.read("control") == "state\n"


def test_attributes_that_fail(fake: Mount) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        (fake / "below/unknown").stat()
    with pytest.raises(OSError, match="Input/output error"):
        list((fake / "below").iterdir())
    assert list((fake / "empty").iterdir()) == []


def test_a_directory_of_many_reads(fake: Mount) -> None:
    names = sorted(entry.name for entry in os.scandir(fake / "many"))
    assert names == [f"{n:0200}" for n in range(2000)]


def test_a_file_of_many_reads(fake: Mount) -> None:
    whole = bytes(range(256)) * 20_000
    assert (fake / "large").read_bytes() == whole
    with (fake / "large").open("rb") as file:
        assert os.pread(file.fileno(), 1000, 3_000_001) == whole[3_000_001:3_001_001]
        assert os.pread(file.fileno(), 1000, len(whole)) == b""
        assert os.pread(file.fileno(), 1000, 1 << 60) == b""


@pytest.mark.parametrize("number", [STOP_COMPUTING, signal.SIGTERM])
def test_who_opens_a_file_without_an_end_holds_no_unmount_up(tmp_path: Path, number: int) -> None:
    directory = tmp_path / "mnt"
    command: list[str | Path] = [
        sys.executable,
        Path(__file__).with_name("fake_tree.py"),
        directory,
    ]
    cat: list[str | Path] = ["cat", directory / "endless"]
    with mounted(command, Path(os.devnull), directory) as it:
        reader = subprocess.Popen(cat, stderr=subprocess.PIPE, text=True)
        try:
            until(lambda: is_opening(reader.pid), "it was being opened")
            it.process.send_signal(number)
            # As umount does, again and again: what is not begun yet cannot be ended.
            while number == STOP_COMPUTING and reader.poll() is None:
                it.process.send_signal(number)
                time.sleep(0.02)
            _, complaint = reader.communicate(timeout=DEADLINE)
        finally:
            reader.kill()
        if number == STOP_COMPUTING:
            assert "Operation canceled" in complaint
            run("fusermount3", "-u", directory)
        assert it.wait_for_end() == 0
