"""File systems of a guest that their own tools make and fill, and that a kernel ages."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

XFS_SIZE = 320 << 20
"""mkfs.xfs makes none below 300 MB."""

XFS_VARIANTS = {
    "xfs": [],
    "xfs with 1 KiB blocks": ["-b", "size=1024", "-d", "agcount=3"],
    "xfs with large directory blocks": ["-b", "size=1024", "-n", "size=8192"],
    "xfs with 2 KiB inodes": ["-i", "size=2048,nrext64=1", "-s", "size=4096"],
    "xfs with reverse maps": ["-m", "rmapbt=1,reflink=1", "-b", "size=2048", "-d", "agcount=2"],
    "xfs of version 5, bare": ["-m", "finobt=0,rmapbt=0,reflink=0", "-i", "sparse=0"],
    "xfs of version 4": ["-m", "crc=0"],
    "xfs of version 4 without types": ["-m", "crc=0", "-n", "ftype=0", "-b", "size=1024"],
}


def run(*command: str | Path) -> str:
    """What a command prints that is to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def make_xfs(image: Path, tree: Path, options: Sequence[str]) -> None:
    """An XFS with the files of *tree*, filled by mkfs.xfs: names have no white space there."""
    with image.open("wb") as file:
        file.truncate(XFS_SIZE)
    proto, links = image.with_suffix(".proto"), image.with_suffix(".links")
    links.mkdir()
    with proto.open("wb") as out:
        out.write(b"/dev/null\n0 0\nd--755 0 0\n")
        _describe(out.write, tree, links)
        out.write(b"$\n")
    run("mkfs.xfs", "-q", "-f", "-L", "a label", *options, "-p", proto, image)


def _describe(write: Callable[[bytes], object], folder: Path, links: Path) -> None:
    for path in sorted(folder.iterdir()):
        name = b"_".join(os.fsencode(path.name).split())
        if path.is_symlink():
            write(name + b" l--777 0 0 " + os.fsencode(path.readlink()) + b"\n")
        elif path.is_dir():
            write(name + b" d--755 0 0\n")
            _describe(write, path, links)
            write(b"$\n")
        else:
            link = links / str(sum(1 for _ in links.iterdir()))
            link.symlink_to(path.absolute())
            write(name + b" ---644 0 0 " + os.fsencode(link) + b"\n")


@contextlib.contextmanager
def mounted(image: Path, *options: str) -> Iterator[Path]:
    """A folder where the kernel shows the file system in *image*; only root can have that."""
    folder = image.with_suffix(".mounted")
    folder.mkdir(exist_ok=True)
    run("mount", "-o", ",".join(["loop", *options]), image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def age(folder: Path, seed: int, rounds: int = 3) -> None:
    """Write and delete in *folder* in turns: files lie in pieces, and in each other's gaps."""
    rng = random.Random(f"age {seed}")
    for turn in range(rounds):
        for part in range(8):
            for number in range(30):
                _append(folder / f"aged {turn} {number}", rng)
            if part % 4 == 3:
                run("sync", "-f", folder)
        old = sorted(path for path in folder.iterdir() if path.name.startswith("aged"))
        for path in rng.sample(old, len(old) // 3):
            path.unlink()
    fill(folder)
    for number in range(6):
        value = rng.randbytes(900 * number + 30)
        os.setxattr(folder / "woven 1", f"user.attribute{number}", value)


def _append(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        return
    with path.open("ab") as file:
        if rng.random() < 0.2:
            file.seek(rng.randrange(1, 9) * 5000, os.SEEK_CUR)
        file.write(rng.randbytes(rng.randrange(1, 12_000)))


def fill(folder: Path, pieces: int = 700) -> None:
    """A folder with a crowd in it, some of which has left, and two files of many *pieces*."""
    crowd = folder / "crowd"
    crowd.mkdir()
    names = [f"{number:04} {'of a crowd ' * (number % 9)}" for number in range(2500)]
    for name in names:
        (crowd / name).touch()
    for name in names[::3]:
        (crowd / name).unlink()
    first, second = folder / "woven 1", folder / "woven 2"
    with first.open("wb") as one, second.open("wb") as two:
        for number in range(pieces):
            for file in (one, two):
                file.seek(number * 8192 + (4096 if file is two else 0))
                file.write(b"woven" * 700)


NTFS_VARIANTS = {
    "ntfs": [],
    "ntfs with small clusters": ["-c", "512"],
    "ntfs with large clusters": ["-c", "32768"],
}

NTFS_COMPRESSED = 0x800


def make_ntfs(image: Path, options: Sequence[str], size: int = 48 << 20) -> None:
    """An NTFS with nothing in it, made by mkntfs."""
    with image.open("wb") as file:
        file.truncate(size)
    run("mkntfs", "-q", "-F", "-f", "-L", "a label", "-p", "0", "-H", "0", "-S", "0",
        *options, image)  # fmt: skip


@contextlib.contextmanager
def mounted_ntfs(image: Path) -> Iterator[Path]:
    """A folder where ntfs-3g shows the file system in *image*, system files too."""
    folder = image.with_suffix(".mounted")
    folder.mkdir(exist_ok=True)
    options = "streams_interface=windows,compression,show_sys_files"
    run("ntfs-3g", "-o", options, image, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


def fill_ntfs(folder: Path, tree: Path, seed: int) -> None:
    """What is only there on NTFS: streams, compressed files, and lists of attributes."""
    rng = random.Random(f"ntfs {seed}")
    run("cp", "-r", "--no-preserve=all", tree, folder / "tree")
    (folder / "pressed").mkdir()
    attributes = (NTFS_COMPRESSED | 0x20).to_bytes(4, "big")
    os.setxattr(folder / "pressed", "system.ntfs_attrib_be", attributes)
    for number in range(6):
        text = b"".join(rng.choice((b"of few words ", b"again ")) for _ in range(20_000))
        (folder / "pressed" / f"text {number}").write_bytes(text + rng.randbytes(70_000))
    for number in range(5):
        path = folder / "tree" / f"with streams {number}"
        path.write_bytes(rng.randbytes(5000))
        for stream in ("a stream", "other"):
            Path(f"{path}:{stream}").write_bytes(rng.randbytes(9000 * number + 10))
        for number_of_link in range(number * 10):
            (
                folder / "tree" / f"a rather long name of a hard link {number} {number_of_link}"
            ).hardlink_to(path)
    fill(folder / "tree")
