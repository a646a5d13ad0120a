"""An image on a disk that fails: the right errno, a line in the log, and a mount that goes on."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from instarfs.errors import UnmountFailed
from instarfs.image.directory import SUFFIX
from instarfs.mount import mountpoint
from planner.guest.mapfile import BAD, parse_mapfile
from planner.source import SECTOR
from tests.images.builder import MIB, Image, ImageBuilder
from tests.mount.mounts import DEADLINE, MakeMount, Mount, instarfs, mounted, settle, until

CLUSTER = 1 << 16
CONTENT = b"the guest's data" * (CLUSTER // 16)

Fault = dict[str, object]


@dataclass(frozen=True, slots=True)
class Disk:
    """``path``: of the image, as the mount sees it; ``beneath``: where it really is."""

    path: Path
    beneath: Path
    faults: Path
    server: subprocess.Popen[bytes]

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """It answers nothing at all meanwhile, as a server over the network that has gone."""
        self.server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.send_signal(signal.SIGCONT)

    def fail(self, *faults: Fault) -> None:
        """From now on fail like this; without faults, no more."""
        new = self.faults.with_suffix(".new")
        new.write_text(json.dumps(faults))
        new.rename(self.faults)

    def requests(self, op: str) -> int:
        """How many there were so far."""
        count = self.faults.with_suffix(".count")
        lines = count.read_text().splitlines() if count.exists() else []
        return sum(line.startswith(f"{op} image.qcow2 ") for line in lines)


def damaged() -> bytes:
    """64 clusters of data, and three leaked ones."""
    builder = ImageBuilder(size=64 * MIB)
    builder.write(0, CONTENT * 64)
    image = builder.build()
    end = image.host_clusters
    for cluster in range(end, end + 3):
        image.set_refcount(cluster, 1)
    image.data += bytes(3 * CLUSTER)
    return bytes(image.data)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder, directory = tmp_path / "beneath", tmp_path / "disk"
    folder.mkdir()
    image, faults = folder / "image.qcow2", tmp_path / "faults"
    image.write_bytes(damaged())
    settle(image)
    faults.write_text("[]")
    program = Path(__file__).with_name("bad_disk.py")
    command: list[str | Path] = [sys.executable, program, folder, directory, faults]
    with mounted(command, directory / "image.qcow2", directory) as below:
        yield Disk(below.image, image, faults, below.process)


@pytest.fixture
def mount_of_disk(mount: MakeMount, disk: Disk) -> Mount:
    it = mount(disk.path)
    it.unexpected = ("Traceback", "unexpected")
    return it


def result(mount: Mount) -> dict[str, object]:
    value: dict[str, object] = json.loads(mount.read("check/result.json"))
    return value


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_tables_that_cannot_be_read(disk: Disk, mount_of_disk: Mount, code: int) -> None:
    disk.fail({"op": "read", "errno": code, "from": CLUSTER})
    with pytest.raises(OSError, match="Input/output error"):
        mount_of_disk.read("check/result.json")
    assert "reading at offset" in mount_of_disk.log
    assert os.strerror(code) in mount_of_disk.log
    assert mount_of_disk.read("README.txt")
    assert mount_of_disk.read("check/progress") == "idle\n"
    disk.fail()
    assert result(mount_of_disk)["leaks"] == 3


def test_guest_data_that_cannot_be_read_is_missing_alone(disk: Disk, mount_of_disk: Mount) -> None:
    with (mount_of_disk / "disk.raw").open("rb", buffering=0) as raw:
        assert os.pread(raw.fileno(), 16, 0) == CONTENT[:16]
        where = disk.beneath.read_bytes().index(CONTENT, 3 * CLUSTER) + 39 * CLUSTER
        disk.fail({"op": "read", "errno": errno.EIO, "from": where, "to": where + 1})
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(raw.fileno(), 512, 40 * CLUSTER)
        assert os.pread(raw.fileno(), 512, 60 * CLUSTER) == CONTENT[:512]
        disk.fail()
        assert os.pread(raw.fileno(), 512, 40 * CLUSTER) == CONTENT[:512]


def test_reads_that_come_in_pieces_are_put_together(disk: Disk, mount_of_disk: Mount) -> None:
    disk.fail({"op": "read", "short": 1000})
    assert result(mount_of_disk)["leaks"] == 3
    with (mount_of_disk / "disk.raw").open("rb", buffering=0) as raw:
        assert os.pread(raw.fileno(), CLUSTER, 3 * CLUSTER) == CONTENT


def test_nobody_else_waits_for_a_slow_disk(disk: Disk, mount_of_disk: Mount) -> None:
    disk.fail({"op": "read", "delay": 1.0, "from": CLUSTER})
    before = disk.requests("read")
    reader = threading.Thread(target=mount_of_disk.read, args=["check/result.json"])
    reader.start()
    until(lambda: disk.requests("read") > before, "the check was reading")
    start = time.monotonic()
    assert mount_of_disk.read("README.txt")
    assert mount_of_disk.read("check/progress") != "idle\n"
    assert time.monotonic() - start < 1.0
    disk.fail()
    reader.join(DEADLINE)
    assert not reader.is_alive()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"op": "write", "errno": errno.ENOSPC, "name": "image.qcow2"}, "No space left"),
        ({"op": "write", "errno": errno.EIO, "name": "image.qcow2"}, "Input/output error"),
        ({"op": "create", "errno": errno.ENOSPC}, "No space left"),
    ],
    ids=["no-space", "bad-block", "no-space-for-undo"],
)
def test_a_repair_that_cannot_be_written(
    disk: Disk, mount_of_disk: Mount, fault: Fault, words: str
) -> None:
    original = disk.beneath.read_bytes()
    disk.fail(fault)
    with pytest.raises(OSError, match=words):
        (mount_of_disk / "repair/tier").write_text("leaks")
    assert disk.beneath.read_bytes() == original
    assert "leaks: " in mount_of_disk.log
    assert json.loads(mount_of_disk.read("repair/result.json"))["reason"]
    disk.fail()
    assert result(mount_of_disk)["leaks"] == 3
    (mount_of_disk / "repair/undo").read_text()
    assert list(disk.beneath.parent.glob("*undo*")) == []


def test_a_repair_that_cannot_be_flushed_keeps_the_way_back(
    disk: Disk, mount_of_disk: Mount
) -> None:
    original = disk.beneath.read_bytes()
    disk.fail({"op": "fsync", "errno": errno.EIO, "name": "image.qcow2"})
    with pytest.raises(OSError, match="Input/output error"):
        (mount_of_disk / "repair/tier").write_text("leaks")
    # It reads as it was, and nobody knows what is on the disk.
    assert disk.beneath.read_bytes() == original
    assert list(disk.beneath.parent.glob("*undo")) != []
    assert "leaks: " in mount_of_disk.log
    disk.fail()
    (mount_of_disk / "repair/undo").write_text("undo")
    assert disk.beneath.read_bytes() == original


def test_an_undo_that_cannot_be_flushed_can_be_finished(disk: Disk, mount_of_disk: Mount) -> None:
    original = disk.beneath.read_bytes()
    (mount_of_disk / "repair/tier").write_text("leaks")
    disk.fail({"op": "fsync", "errno": errno.EIO, "name": "image.qcow2"})
    with pytest.raises(OSError, match="Input/output error"):
        (mount_of_disk / "repair/undo").write_text("undo")
    disk.fail()
    assert "interrupted" in mount_of_disk.read("repair/undo")
    (mount_of_disk / "repair/undo").write_text("undo")
    assert disk.beneath.read_bytes() == original


FULL: Fault = {"op": "write", "errno": errno.ENOSPC}
FULL_IMAGE, FULL_UNDO = FULL | {"name": "image.qcow2"}, FULL | {"name": f"image.qcow2{SUFFIX}"}
WORDS = [{"from": SECTOR, "to": 2 * SECTOR}, {"from": 2 * SECTOR, "to": 3 * SECTOR}]
"""Where an undo file has its word, in turn."""


@pytest.mark.parametrize(
    "faults",
    [
        [FULL_UNDO],
        [FULL_IMAGE],
        *([FULL_IMAGE, FULL_UNDO | word] for word in WORDS),  # one of them as it is put back
    ],
    ids=["undo-file", "image", "image-and-one-word", "image-and-the-other"],
)
def test_an_undo_on_a_full_disk_changes_nothing_and_goes_through_once_there_is_space(
    disk: Disk, mount_of_disk: Mount, faults: list[Fault]
) -> None:
    original = disk.beneath.read_bytes()
    (mount_of_disk / "repair/tier").write_text("leaks")
    repaired = disk.beneath.read_bytes()
    disk.fail(*faults)
    for _ in range(2):  # the second may find that the first was interrupted
        with (
            (mount_of_disk / "repair/undo").open("wb", buffering=0) as control,
            pytest.raises(OSError, match="No space left"),
        ):
            control.write(b"undo")
        told = json.loads(mount_of_disk.read("repair/result.json"))
        assert told["errno"] == "ENOSPC"
        assert "No space left on device" in told["reason"]
        assert "make space" in told["reason"]
        assert told["reason"] in mount_of_disk.log
        assert disk.beneath.read_bytes() == repaired
    disk.fail()
    (mount_of_disk / "repair/undo").write_text("undo")
    assert disk.beneath.read_bytes() == original
    assert list(disk.beneath.parent.glob("*undo*")) == []


def test_a_file_that_is_cut_while_it_is_read(disk: Disk, mount_of_disk: Mount) -> None:
    disk.fail({"op": "read", "delay": 0.3, "from": CLUSTER})
    before, found = disk.requests("read"), []
    reader = threading.Thread(target=lambda: found.append(result(mount_of_disk)))
    reader.start()
    until(lambda: disk.requests("read") > before, "the check was reading")
    os.truncate(disk.beneath, 5 * CLUSTER)
    reader.join(DEADLINE)
    # It was looked at again until what was found is of one moment: that after the cut.
    assert found[0]["verdict"] == "corrupt"
    assert found[0]["as-of"]
    disk.fail()
    settle(disk.beneath)
    assert result(mount_of_disk)["verdict"] == "corrupt"


def test_an_export_goes_around_what_cannot_be_read(disk: Disk, tmp_path: Path) -> None:
    """Data, part of an L2 table, and refcounts on sectors that fail."""
    image = Image(bytearray(disk.beneath.read_bytes()))
    data, table = image.host_offset(3), image.l2_table(0)
    disk.fail(
        {"op": "read", "errno": errno.EIO, "from": data + 8193, "to": data + 12287},
        {"op": "read", "errno": errno.EIO, "from": table + 100, "to": table + 101},
        {"op": "read", "errno": errno.EIO, "from": image.refblock(0), "to": image.refblock(0) + 1},
    )
    out = tmp_path / "out"
    done = instarfs("export", disk.path, out)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    bad = parse_mapfile((tmp_path / "out.map").read_bytes()).blocks(BAD)
    assert bad == [(0, 64 * CLUSTER)]  # a sector of the table
    disk.fail({"op": "read", "errno": errno.EIO, "from": data + 8193, "to": data + 12287})
    assert instarfs("export", disk.path, out).returncode == 1
    bad = parse_mapfile((tmp_path / "out.map").read_bytes()).blocks(BAD)
    assert bad == [(3 * CLUSTER + 8192, 3 * CLUSTER + 12288)]
    expected = bytearray((CONTENT * 64).ljust(64 * MIB, b"\0"))
    expected[bad[0][0] : bad[0][1]] = bytes(4096)
    assert out.read_bytes() == expected
    disk.fail()
    assert instarfs("export", disk.path, out).returncode == 0
    assert out.read_bytes() == (CONTENT * 64).ljust(64 * MIB, b"\0")


# ---- a disk that answers nothing ----

SECONDS = 15.0
"""In which a mount must have ended, whatever its image does."""


def nobody(_mount: Mount) -> None:
    pass


def who_checks(mount: Mount) -> subprocess.Popen[bytes]:
    return in_background("cat", mount / "check/result.json")


def who_reads(mount: Mount) -> subprocess.Popen[bytes]:
    return in_background("cat", mount / "disk.raw")


def who_repairs(mount: Mount) -> subprocess.Popen[bytes]:
    return in_background("dd", f"of={mount / 'repair/tier'}", "conv=notrunc", stdin=b"leaks")


def in_background(*command: str | Path, stdin: bytes = b"") -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(stdin)
    process.stdin.close()
    return process


def answers(*command: str | Path) -> bool:
    """Whether a program ends well, and in time."""
    with in_background(*command) as process:
        try:
            return process.wait(SECONDS) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            return False


@pytest.mark.parametrize("waiting", [nobody, who_checks, who_reads, who_repairs])
def test_a_signal_ends_a_mount_whose_image_answers_nothing(
    disk: Disk, mount_of_disk: Mount, waiting: Callable[[Mount], subprocess.Popen[bytes] | None]
) -> None:
    mount = mount_of_disk
    assert result(mount)["leaks"] == 3
    os.utime(disk.beneath)  # nothing that is known holds any more
    with disk.silent():
        waiter = waiting(mount)
        assert answers("cat", mount / "README.txt")
        assert answers("ls", mount / "image")
        mount.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        while mount.is_mounted():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    # A thread that the kernel keeps waiting keeps the process, and no longer.
    assert mount.wait_for_end() == 0
    if waiter is not None:
        assert waiter.wait(DEADLINE) != 0


def test_umount_ends_a_mount_whose_image_answers_nothing(
    disk: Disk, mount_of_disk: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = mount_of_disk
    assert result(mount)["leaks"] == 3
    os.utime(disk.beneath)
    monkeypatch.setattr(mountpoint, "_END_SECONDS", 0.5)
    with disk.silent():
        waiter = who_checks(mount)
        assert answers("cat", mount / "README.txt")
        with pytest.raises(UnmountFailed, match=r"it is unmounted, .* until .* answers"):
            mountpoint.unmount(str(mount.path))
        assert not mount.is_mounted()
    assert mount.wait_for_end() == 0
    assert waiter.wait(DEADLINE) != 0


def test_who_waits_for_an_image_that_answers_again_gets_an_answer(
    disk: Disk, mount_of_disk: Mount
) -> None:
    mount = mount_of_disk
    assert result(mount)["leaks"] == 3
    os.utime(disk.beneath, (1e9, 1e9))
    with disk.silent():
        waiters = [who_checks(mount), who_reads(mount)]
        # However many look at it, the mount waits for that once.
        begun = time.monotonic()
        for _ in range(20):
            assert answers("stat", mount.path)
        assert time.monotonic() - begun < SECONDS
        assert [waiter.poll() for waiter in waiters] == [None, None]
    assert [waiter.wait(DEADLINE) for waiter in waiters] == [0, 0]
