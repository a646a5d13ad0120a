"""Reads of a guest's disk beside those who offer the same: disk.raw, QEMU's FUSE export, qcowmount.

The image is warm, what the kernel has cached of the files is dropped before each turn. The images
are on a disk: a file system in memory is read in another way.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

from tests.bench.checks import DISK
from tests.bench.race import Enter, Race, Row, Side, Unavailable, process_cpu
from tests.bench.samples import Samples
from tests.mount.mounts import INSTARFS, mounted, settle, until

OURS = "disk.raw"
EXPORT = "qemu-storage-daemon's FUSE export"
QCOWMOUNT = "qcowmount"

MIB = 1 << 20
PLAIN_MIB, PACKED_MIB, RANDOM_MIB = 2048, 512, 256


def write_plain(raw: Path) -> None:
    """Bytes of no pattern that a disk or a file system could make use of."""
    block = random.Random(1).randbytes(64 * MIB)
    with raw.open("wb") as file:
        for at in range(PLAIN_MIB // 64):
            file.write(block[at:] + block[:at])


def write_text(raw: Path) -> None:
    """Words, which compress to two thirds."""
    rng = random.Random(2)
    words = [bytes(rng.choices(b"etaoinshrdlu", k=rng.randrange(2, 10))) for _ in range(5000)]
    block = b" ".join(rng.choices(words, k=800_000))[: 4 * MIB]
    with raw.open("wb") as file:
        for _ in range(PACKED_MIB // 4):
            at = rng.randrange(len(block))
            file.write(block[at:] + block[:at])


def convert(folder: Path, write: Callable[[Path], None], *options: str) -> Path:
    """A qcow2 image of what *write* writes."""
    raw, image = folder / "raw", folder / "image.qcow2"
    write(raw)
    command: list[str | Path] = [
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        *options,
        raw,
        image,
    ]
    subprocess.run(command, check=True)
    raw.unlink()
    settle(image)
    return image


@contextmanager
def exported(image: Path, folder: Path) -> Iterator[tuple[Path, int]]:
    """QEMU's FUSE export of *image*: the file, and the process behind it."""
    target = folder / "export"
    target.touch()
    node = f"driver=qcow2,node-name=disk,read-only=on,file.driver=file,file.filename={image}"
    export = f"type=fuse,id=export,node-name=disk,mountpoint={target}"
    program = subprocess.Popen(
        ["qemu-storage-daemon", "--blockdev", node, "--export", export],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: target.stat().st_size or program.poll() is not None, "it was exported")
        if program.poll() is not None:
            raise Unavailable("qemu-storage-daemon exports nothing by FUSE here")
        yield target, program.pid
    finally:
        program.terminate()
        program.wait()


@contextmanager
def qcowmounted(image: Path, folder: Path) -> Iterator[tuple[Path, int]]:
    """The file that libqcow's qcowmount shows, and the process behind it."""
    if shutil.which("qcowmount") is None:
        raise Unavailable("no qcowmount (Debian: libqcow-utils)")
    directory = folder / "qcow"
    directory.mkdir()
    subprocess.run(["qcowmount", image, directory], check=True, stdout=subprocess.DEVNULL)
    try:
        yield directory / "qcow1", _process_of(directory)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", directory], check=True)


def _process_of(directory: Path) -> int:
    """The process whose last argument is *directory*."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().split(b"\0")[-2:-1] == [os.fsencode(directory)]:
                return int(entry.parent.name)
        except OSError:
            continue
    raise Unavailable("qcowmount ended")


def drop_cache(path: Path) -> None:
    """Of what the kernel keeps of *path* nothing is left."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def warm(image: Path) -> None:
    """The image is in memory as a whole."""
    with image.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


def in_sequence(path: Path) -> None:
    """All of it, a MiB at a time."""
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def at_random(path: Path, readers: int) -> None:
    """4 KiB at a time, by fio, `RANDOM_MIB` in all."""
    command = ["fio", "--name=random", f"--filename={path}", "--rw=randread", "--bs=4k"]
    command += ["--ioengine=psync", "--thread", "--readonly", "--allow_file_create=0"]
    command += [f"--numjobs={readers}", f"--io_size={RANDOM_MIB // readers}m", "--randseed=7"]
    command += [f"--size={PLAIN_MIB}m"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def busy() -> Iterator[None]:
    """Every processor has other work meanwhile, which never waits."""
    command = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()


def side_by_side(
    write: Callable[[Path], None],
    read: Callable[[Path], None],
    *options: str,
    beside: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Enter:
    """The three of them, which all show the same disk; *beside* goes on meanwhile."""

    @contextmanager
    def enter(_samples: Samples) -> Iterator[Mapping[str, Side]]:
        with ExitStack() as stack:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory("-instarfs-reads", dir=DISK))
            )
            image = convert(folder, write, *options)
            directory = folder / "mnt"
            command: list[str | Path] = [*INSTARFS, "mount", "-f", image, directory]
            mount = stack.enter_context(mounted(command, image, directory))
            shown = {
                OURS: (mount / "disk.raw", mount.process.pid),
                EXPORT: stack.enter_context(exported(image, folder)),
                QCOWMOUNT: stack.enter_context(qcowmounted(image, folder)),
            }

            def prepare(path: Path) -> None:
                warm(image)
                drop_cache(path)

            stack.enter_context(beside())
            yield {
                name: Side(partial(read, path), partial(prepare, path), partial(process_cpu, pid))
                for name, (path, pid) in shown.items()
            }

    return enter


def _race(name: str, work: str, enter: Enter, export: float, qcowmount: float) -> Race:
    rows = Row(work, OURS, EXPORT, at_most=export), Row(work, OURS, QCOWMOUNT, at_most=qcowmount)
    return Race(name, enter, rows)


RACES = (
    _race(
        "read-sequence", "disk.raw in sequence, 2 GiB, warm",
        side_by_side(write_plain, in_sequence), 1 / 2.5, 1,
    ),
    _race(
        "read-random-1", "disk.raw, random 4 KiB, 1 reader",
        side_by_side(write_plain, partial(at_random, readers=1)), 1, 1,
    ),
    _race(
        "read-random-4", "disk.raw, random 4 KiB, 4 readers",
        side_by_side(write_plain, partial(at_random, readers=4)), 1, 1,
    ),
    _race(
        "read-random-busy", "disk.raw, random 4 KiB, all processors busy",
        side_by_side(write_plain, partial(at_random, readers=1), beside=busy), 2, 2,
    ),
    _race(
        "read-packed", "disk.raw of a compressed image in sequence, 512 MiB",
        side_by_side(write_text, in_sequence, "-c"), 1 / 1.5, 1 / 1.5,
    ),
)  # fmt: skip
