"""A check that takes its time: who waits for it, who does not, and how it ends."""

import errno
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounts import (
    DEADLINE,
    Gate,
    instarfs,
    is_opening,
    leak,
    run,
    settle,
    state_of,
    until,
)


def start_reading(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["cat", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def reader(gated: Gate) -> Iterator[subprocess.Popen[str]]:
    """Somebody who waits for the result of `gated`."""
    process = start_reading(gated.mount / "check/result.json")
    until(lambda: gated.checks == 1, "the check began")
    yield process
    process.kill()
    process.communicate()


def test_everything_else_answers_meanwhile(gated: Gate, reader: subprocess.Popen[str]) -> None:
    assert gated.mount.read("check/progress") == "census 43%\n"
    assert json.loads(gated.mount.read("image/info.json"))["virtual-size"] == 64 << 20
    assert gated.mount.read("repair/tier") == "[none] leaks all split bitmaps snapshots\n"
    run("ls", "-lR", gated.mount.path)
    run("df", gated.mount.path)
    assert reader.poll() is None
    gated.open()
    output, _ = reader.communicate(timeout=DEADLINE)
    assert json.loads(output)["verdict"] == "clean"
    assert gated.mount.read("check/progress") == "idle\n"


def test_progress_can_be_polled_on_one_handle(gated: Gate) -> None:
    with (gated.mount / "check/progress").open() as progress:
        assert progress.read() == "idle\n"
        with start_reading(gated.mount / "check/leaks") as reader:
            until(lambda: progress.seek(0) or progress.read() != "idle\n", "it was checking")
            progress.seek(0)
            assert progress.read() == "census 43%\n"
            gated.open()
            reader.communicate(timeout=DEADLINE)
        progress.seek(0)
        assert progress.read() == "idle\n"


def test_who_opens_a_file_to_copy_it_waits_and_has_its_size_then(gated: Gate) -> None:
    # As `tar` does, which must not be told that there is nothing yet.
    opened: list[int] = []
    flags = os.O_RDONLY | os.O_NONBLOCK
    path = gated.mount / "check/result.json"
    opening = threading.Thread(target=lambda: opened.append(os.open(path, flags)))
    opening.start()
    until(lambda: gated.checks == 1, "the check began")
    assert path.stat().st_size == 0
    assert not opened
    gated.open()
    opening.join(DEADLINE)
    (fd,) = opened
    size = os.fstat(fd).st_size
    assert size == path.stat().st_size > 0
    assert len(os.read(fd, size + 1)) == size
    os.close(fd)


def test_one_check_for_all_files_and_readers(gated: Gate) -> None:
    names = ["result.json", "result.bin", "report.txt", "leaks", "corruptions", "refcounts"]
    # More readers than pyfuse3 has tasks by default: the rest of the mount must not starve.
    readers = [start_reading(gated.mount / "check" / name) for name in names * 20]
    until(lambda: gated.checks, "the check began")
    assert gated.mount.read("check/progress") == "census 43%\n"
    gated.open()
    for reader in readers:
        reader.communicate(timeout=DEADLINE)
        assert reader.returncode == 0
    gated.mount.read("check/findings.jsonl")
    assert gated.checks == 1


def test_again_only_when_the_image_changed(gated: Gate) -> None:
    gated.open()
    for _ in range(3):
        gated.mount.read("check/result.json")
    assert gated.checks == 1
    leak(gated.mount.image, 2)
    for _ in range(3):
        assert json.loads(gated.mount.read("check/result.json"))["leaks"] == 2
    assert gated.checks == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_reader_can_be_killed_and_leaves_nothing(
    gated: Gate, reader: subprocess.Popen[str], number: signal.Signals
) -> None:
    reader.send_signal(number)
    assert reader.wait(DEADLINE) == -number
    until(lambda: gated.mount.read("check/progress") == "idle\n", "the check had ended")
    gated.open()
    assert '"clean"' in gated.mount.read("check/result.json")
    assert gated.checks == 2


def test_a_killed_reader_takes_nothing_from_the_others(
    gated: Gate, reader: subprocess.Popen[str]
) -> None:
    with start_reading(gated.mount / "check/leaks") as other:
        until(lambda: is_opening(other.pid), "both waited")
        reader.kill()
        reader.wait(DEADLINE)
        gated.open()
        output, _ = other.communicate(timeout=DEADLINE)
    assert output.startswith("#")


def test_a_reader_that_is_stopped_goes_on_where_it_was(
    gated: Gate, reader: subprocess.Popen[str]
) -> None:
    mount = gated.mount
    reader.send_signal(signal.SIGSTOP)
    assert json.loads(mount.read("image/info.json"))["virtual-size"] == 64 << 20
    gated.open()
    until(lambda: mount.read("check/progress") == "idle\n", "the check had ended")
    until(lambda: state_of(reader.pid) == "T", "it had its answer")
    (mount / "repair/tier").write_text("all")
    assert json.loads(mount.read("check/result.json"))["verdict"] == "clean"
    assert gated.checks == 1
    assert ": in use; " in instarfs("umount", mount.path).stderr
    run("fusermount3", "-u", "-z", mount.path)
    assert mount.process.poll() is None
    reader.send_signal(signal.SIGCONT)
    output, _ = reader.communicate(timeout=DEADLINE)
    assert json.loads(output)["verdict"] == "clean"
    assert mount.wait_for_end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unmounts_in_the_middle(
    gated: Gate, reader: subprocess.Popen[str], number: signal.Signals
) -> None:
    gated.mount.process.send_signal(number)
    assert gated.mount.wait_for_end() == 0
    assert reader.wait(DEADLINE) != 0
    assert f"{number.name}: unmounting" in gated.mount.log


def test_umount_in_the_middle_ends_the_check(gated: Gate, reader: subprocess.Popen[str]) -> None:
    done = instarfs("umount", gated.mount.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert gated.mount.wait_for_end() == 0
    _, complaint = reader.communicate(timeout=DEADLINE)
    assert "Operation canceled" in complaint


def test_umount_ends_what_is_being_explained(gated: Gate) -> None:
    with start_reading(gated.mount / "explain/host/65536") as reader:
        until(lambda: gated.checks == 1, "it began")
        done = instarfs("umount", gated.mount.path)
        assert (done.returncode, done.stderr) == (0, "")
        assert gated.mount.wait_for_end() == 0
        _, complaint = reader.communicate(timeout=DEADLINE)
    assert "Operation canceled" in complaint


def test_a_lazy_unmount_in_the_middle(gated: Gate, reader: subprocess.Popen[str]) -> None:
    run("fusermount3", "-u", "-z", gated.mount.path)
    gated.open()
    output, _ = reader.communicate(timeout=DEADLINE)
    assert json.loads(output)["verdict"] == "clean"
    assert gated.mount.wait_for_end() == 0


def test_an_io_error_is_that_readers_and_is_logged(gated: Gate) -> None:
    gated.open()
    (gated.folder / "fail").touch()
    gated.mount.unexpected = ("Traceback", "unexpected")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error") as caught:
            gated.mount.read("check/result.json")
        assert caught.value.errno == errno.EIO
    assert "reading at offset 65536 failed: Input/output error" in gated.mount.log
    assert json.loads(gated.mount.read("image/info.json"))["format"] == "qcow2"
    (gated.folder / "fail").unlink()
    assert json.loads(gated.mount.read("check/result.json"))["verdict"] == "clean"


def test_a_bug_in_the_check_is_logged_and_ends_no_mount(gated: Gate) -> None:
    gated.open()
    (gated.folder / "crash").touch()
    gated.mount.unexpected = ()
    with pytest.raises(OSError, match="Input/output error"):
        gated.mount.read("check/leaks")
    assert "ZeroDivisionError: a bug" in gated.mount.log
    assert gated.mount.read("check/progress") == "idle\n"
    (gated.folder / "crash").unlink()
    assert gated.mount.read("check/leaks").startswith("#")


# ---- an image that others use ----


def test_after_a_change_in_the_middle_it_is_looked_at_once_more(
    gated: Gate, reader: subprocess.Popen[str]
) -> None:
    leak(gated.mount.image, 1)
    gated.open()
    output, _ = reader.communicate(timeout=DEADLINE)
    live = json.loads(output)
    assert (live["verdict"], live["leaks"]) == ("leaks", 1)
    assert (live["changed-during-check"], live["in-use"], live["in-motion"]) == (True, False, 0)
    again = json.loads(gated.mount.read("check/result.json"))
    assert (again["verdict"], again["leaks"]) == ("leaks", 1)


def test_a_vm_cannot_start_to_write_in_the_middle_and_can_afterwards(
    gated: Gate, reader: subprocess.Popen[str]
) -> None:
    command: list[str | Path] = ["qemu-io", "-c", "write 0 4k", gated.mount.image]
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert 'Failed to get "write" lock' in refused.stderr
    gated.open()
    reader.communicate(timeout=DEADLINE)
    run(*command)
    settle(gated.mount.image)
    assert json.loads(gated.mount.read("check/result.json"))["allocated-clusters"] == 1
