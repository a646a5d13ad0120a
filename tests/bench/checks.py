"""Checks beside ``qemu-img check``: by size, by shape, in a mount and as a whole process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from instarfs.image.file import FileSource, Image
from planner.check.check import check_image
from tests.bench.disks import GIB, TIB, Disk, write_disk
from tests.bench.race import Enter, Race, Row, Side, Unavailable, process_cpu
from tests.bench.samples import Samples
from tests.mount.mounts import INSTARFS, Mount, mounted, settle

QEMU = "qemu-img check"
MOUNT = "first read of check/result.json"
COMMAND = "instarfs check"

TMPFS = "/dev/shm"  # noqa: S108 - the mount that every Linux has
DISK = "/var/tmp"  # noqa: S108 - what outlives a restart is on a disk

SHUFFLED_SIZE = 256 * GIB
"""Of the aged disk: qemu-img, which then reads a refcount block a cluster, takes minutes for it."""


def command(*words: str | Path) -> Callable[[], object]:
    """A process, run to its end; its output is dropped, a failure is not."""
    return lambda: subprocess.run(
        words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def qemu_check(image: Path | str) -> Callable[[], object]:
    """`qemu-img check` of an image, or of what a URI names."""
    return command("qemu-img", "check", "-f", "qcow2", image)


def our_check(image: Path) -> Callable[[], object]:
    """`instarfs check` as a whole process."""
    return command(*INSTARFS, "check", image)


def whole_process(make: Callable[[Samples], Path], peer_turns: int | None = None) -> Enter:
    """The sides `COMMAND` and `QEMU` for an image."""

    @contextmanager
    def enter(samples: Samples) -> Iterator[Mapping[str, Side]]:
        image = make(samples)
        yield {
            COMMAND: Side(our_check(image)),
            QEMU: Side(qemu_check(image), turns=peer_turns),
        }

    return enter


@contextmanager
def served(image: Path, samples: Samples) -> Iterator[Mount]:
    """A running mount of *image*."""
    directory = samples.folder / "mnt"
    with mounted([*INSTARFS, "mount", "-f", image, directory], image, directory) as mount:
        yield mount


@contextmanager
def in_a_mount(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """The 1 TiB disk three ways. The image is touched before each turn of the mount."""
    image = samples.preallocated("1T")
    with served(image, samples) as mount:

        def touch() -> None:
            os.utime(image)
            settle(image)

        yield {
            MOUNT: Side(
                (mount / "check/result.json").read_bytes,
                touch,
                lambda: process_cpu(mount.process.pid),
            ),
            COMMAND: Side(our_check(image)),
            QEMU: Side(qemu_check(image)),
        }


@contextmanager
def in_a_new_mount(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """The first check that a mount makes: each turn has a mount of its own."""
    image = samples.preallocated("1T")
    with ExitStack() as stack:
        current: list[Mount] = []

        def mount() -> None:
            stack.close()
            current[:] = [stack.enter_context(served(image, samples))]

        def read() -> None:
            (current[0] / "check/result.json").read_bytes()

        yield {
            MOUNT: Side(read, mount, lambda: process_cpu(current[0].process.pid)),
            QEMU: Side(qemu_check(image)),
        }


@contextmanager
def against_numpy(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """A small image costs what the interpreter loads."""
    image = samples.preallocated("64M")
    yield {
        COMMAND: Side(our_check(image)),
        "import numpy": Side(command(sys.executable, "-c", "import numpy")),
        QEMU: Side(qemu_check(image)),
    }


@contextmanager
def second_read(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """A file that is known already, beside the same bytes in memory."""
    image = samples.preallocated("1T")
    with served(image, samples) as mount, tempfile.NamedTemporaryFile(dir=TMPFS) as plain:
        plain.write((mount / "check/result.json").read_bytes())
        plain.flush()
        yield {
            "cat, again": Side(
                command("cat", mount / "check/result.json"),
                daemon_cpu=lambda: process_cpu(mount.process.pid),
            ),
            "cat of a file on tmpfs": Side(command("cat", plain.name)),
        }


# ---- cold ----


def forget(image: Path) -> None:
    """Have the kernel drop its copy of a file; works for file systems on disks."""
    with image.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def cold(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """An image of which nothing is cached; for that it must be on a disk, not on a tmpfs."""
    with tempfile.TemporaryDirectory(prefix="instarfs-bench-", dir=DISK) as folder:
        image = Samples(Path(folder)).preallocated("1T")
        yield {
            COMMAND: Side(our_check(image), lambda: forget(image)),
            QEMU: Side(qemu_check(image), lambda: forget(image)),
        }


class SlowSource(FileSource):
    """A source that takes 1 ms a request, however many are under way."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        time.sleep(0.001)
        super().read_into(offset, buffer)


def check_slowly(image: Path) -> None:
    """Check *image* through a `SlowSource`."""
    with Image.open(str(image)) as opened:
        check_image(SlowSource(opened, opened.generation().size))


@contextmanager
def slow_source(samples: Samples) -> Iterator[Mapping[str, Side]]:
    """A disk that is a millisecond away, for us and, through nbdkit, for qemu-img."""
    if shutil.which("nbdkit") is None:
        raise Unavailable("nbdkit is not installed")
    image, socket = samples.preallocated("1T"), samples.folder / "nbd.socket"
    words = ["nbdkit", "-f", "-r", "-U", str(socket), "--filter=delay", "file", str(image)]
    server = subprocess.Popen([*words, "rdelay=1ms"], stderr=subprocess.DEVNULL)
    try:
        while not socket.exists():
            if server.poll() is not None:
                raise Unavailable("nbdkit did not start")
            time.sleep(0.01)
        yield {
            "check, 1 ms a request": Side(lambda: check_slowly(image)),
            QEMU: Side(
                qemu_check(f"nbd+unix:///?socket={socket}"),
                daemon_cpu=lambda: process_cpu(server.pid),
            ),
        }
    finally:
        server.terminate()
        server.wait()


def _disk(name: str, disk: Disk) -> Callable[[Samples], Path]:
    return lambda samples: samples.get(name, lambda path: write_disk(path, disk))


RACES = (
    Race(
        "check-1t",
        in_a_mount,
        (
            Row("check, 1 TiB, in a running mount", MOUNT, QEMU, 1 / 6),
            Row("check, 1 TiB, whole process", COMMAND, QEMU, 1 / 2.5),
        ),
    ),
    Race(
        "check-1t-new-mount",
        in_a_new_mount,
        (Row("check, 1 TiB, the first that a new mount makes", MOUNT, QEMU, 1 / 6),),
    ),
    Race(
        "check-8t",
        whole_process(lambda samples: samples.preallocated("8T")),
        (Row("check, 8 TiB, whole process", COMMAND, QEMU, 1 / 5),),
    ),
    Race(
        "check-snapshots",
        whole_process(_disk("snapshots", Disk(TIB, snapshots=4))),
        (Row("check, 1 TiB with 4 snapshots, whole process", COMMAND, QEMU, 1 / 4),),
    ),
    Race(
        "check-shuffled",
        whole_process(_disk("shuffled", Disk(SHUFFLED_SIZE, shuffled=True)), peer_turns=1),
        (Row("check, 256 GiB in random order, whole process", COMMAND, QEMU, 1 / 100),),
    ),
    Race(
        "check-64m",
        against_numpy,
        (
            Row("check, 64 MiB, whole process", COMMAND, "import numpy", 2),
            Row("check, 64 MiB, whole process", COMMAND, QEMU),
        ),
    ),
    Race(
        "check-cold",
        cold,
        (Row("check, 1 TiB, nothing cached, whole process", COMMAND, QEMU, 1 / 3),),
        warm=False,
    ),
    Race(
        "check-slow",
        slow_source,
        (Row("check, 1 TiB, 1 ms a request", "check, 1 ms a request", QEMU, 1 / 3),),
        warm=False,
    ),
    Race(
        "read-again",
        second_read,
        (
            Row(
                "second read of check/result.json",
                "cat, again",
                "cat of a file on tmpfs",
                more=0.001,
            ),
        ),
    ),
)
