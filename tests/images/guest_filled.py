"""File systems of a guest that their own tools make and fill, and that a kernel ages."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.block_devices import attached

_TRIES, _PAUSE = 300, 0.1

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
        _wait_until_written(image)


def _wait_until_written(image: Path) -> None:
    """A mount namespace that was made meanwhile has it mounted, too, for as long as it is there."""
    for _ in range(_TRIES):
        if not run("losetup", "--associated", image):
            return
        time.sleep(_PAUSE)
    raise AssertionError(f"{image} is still mounted somewhere")


def age(folder: Path, seed: int, rounds: int = 3, attribute_size: int = 900) -> None:
    """Write and delete in *folder* in turns: files lie in pieces, and in each other's gaps.

    One has attributes, each *attribute_size* bytes longer than the last.
    """
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
        value = rng.randbytes(attribute_size * number + 30)
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


BTRFS_VARIANTS = {
    "btrfs": [],
    "btrfs with all once and small nodes": ["-m", "single", "-n", "4096"],
    "btrfs with all twice": ["-d", "dup"],
    "btrfs with mixed chunks": ["-M"],
    "btrfs with other checksums": ["--csum", "xxhash", "-R", "^free-space-tree"],
}


def make_btrfs(image: Path, tree: Path, options: Sequence[str]) -> None:
    """A btrfs with the files of *tree*, made by mkfs.btrfs.

    It looks at the source of whatever is mounted, also by others, and gives up where nobody serves
    that any more.
    """
    with image.open("wb") as file:
        file.truncate(160 << 20)
    command: list[str | Path]
    command = ["mkfs.btrfs", "-q", "-f", "-L", "a label", "--rootdir", tree, *options, image]
    for _ in range(_TRIES):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "cannot check mount status" not in done.stderr:
            break
        time.sleep(_PAUSE)
    assert done.returncode == 0, done.stderr


def age_btrfs(folder: Path, seed: int) -> None:
    """What is only there on btrfs: subvolumes, snapshots, and files that share extents."""
    run("btrfs", "subvolume", "create", folder / "a subvolume")
    # An attribute has to fit into a small node.
    age(folder / "a subvolume", seed, attribute_size=500)
    run("btrfs", "subvolume", "create", folder / "a subvolume" / "one in it")
    for name in ("one", "two"):
        text = f"text that can be packed, of {name} ".encode() * 9000
        (folder / "a subvolume" / "one in it" / name).write_bytes(text)
    run("btrfs", "subvolume", "snapshot", folder / "a subvolume", folder / "a snapshot")
    woven = folder / "a subvolume" / "woven 1"
    run("cp", "--reflink=always", woven, folder / "shared")
    with woven.open("r+b") as file:
        file.seek(9000)
        file.write(random.Random(seed).randbytes(50_000))
    run("btrfs", "subvolume", "snapshot", "-r", folder, folder / "another snapshot")
    run("btrfs", "subvolume", "delete", "--commit-after", folder / "another snapshot")


FAT_VARIANTS = {
    "FAT12": (["-F", "12"], 6 << 20),
    "FAT16": (["-F", "16", "-s", "4"], 24 << 20),
    "FAT32": (["-F", "32", "-s", "1"], 40 << 20),
    "FAT32 with large clusters": (["-F", "32", "-s", "16", "-f", "1"], 600 << 20),
}


def plain_tree(root: Path, seed: int, files: int = 60) -> None:
    """Some directories with files that any file system can have; one with many names."""
    rng = random.Random(f"plain {seed}")
    folders = [root / f"dir {n}" / ("below/" * (n % 3)) for n in range(5)]
    for folder in [*folders, root / "Many"]:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        size = rng.choice([0, 10, 600, 3000, 20_000, 70_000])
        (rng.choice(folders) / f"file {number}.bin").write_bytes(rng.randbytes(size))
    for number in range(300):
        name = f"{'a long name to fill directories ' * (number % 5)}{number}"
        (root / "Many" / name).write_bytes(b"x" * (number % 3))
    for name in ("SHORT.TXT", "lower.txt", "MiXeD.Txt", "NOEXT", "\u00e4\u00f6 \u20ac \U0001f600"):
        (root / name).write_bytes(rng.randbytes(5000))


def make_fat(image: Path, tree: Path, variant: str) -> None:
    """A FAT that mkfs.fat makes and mtools fill; some files in the gaps that others left."""
    options, size = FAT_VARIANTS[variant]
    with image.open("wb") as file:
        file.truncate(size)
    run("mkfs.fat", "-n", "A LABEL", *options, image)
    mtools("mcopy", image, "-s", "-Q", *sorted(tree.iterdir()), "::")
    small, large = image.with_suffix(".small"), image.with_suffix(".large")
    small.write_bytes(b"small" * 500)
    large.write_bytes(random.Random(variant).randbytes(900_000))
    for turn in range(2):
        names = [f"::gap {turn} {number}" for number in range(120)]
        for name in names[::30]:
            mtools("mcopy", image, small, name)
        mtools("mmd", image, f"::more {turn}")
        for name in names:
            mtools("mcopy", image, "-D", "o", small, name)
        mtools("mdel", image, *names[turn::2])
        if "FAT32" in variant:
            # Where to look for free clusters next: nobody knows.
            with image.open("r+b") as file:
                file.seek(512 + 488)
                file.write(b"\xff" * 8)
        mtools("mcopy", image, large, f"::more {turn}/in pieces")


def mtools(tool: str, image: Path, *arguments: str | Path) -> str:
    """What one of the mtools prints."""
    command = ["env", "MTOOLS_SKIP_CHECK=1", "LC_ALL=C.UTF-8", tool, "-i", image, *arguments]
    return run(*command)


EXFAT_VARIANTS = {"exFAT": [], "exFAT with small clusters": ["-c", "512"]}


def make_exfat(image: Path, tree: Path, options: Sequence[str]) -> None:
    """An exFAT that mkfs.exfat makes and the FUSE driver fills; some files in others' gaps."""
    with image.open("wb") as file:
        file.truncate(48 << 20)
    run("mkfs.exfat", "-L", "a label", *options, image)
    with mounted_exfat(image) as folder:
        run("cp", "-r", tree, folder / "tree")
        names = [folder / f"gap {number}" for number in range(150)]
        for name in names:
            name.write_bytes(b"small" * 2000)
        for name in names[::2]:
            name.unlink()
        rng = random.Random("exfat")
        files = [folder / f"woven {number}" for number in range(4)]
        for _ in range(60):
            for path in files:
                with path.open("ab") as file:
                    file.write(rng.randbytes(5000))


@contextlib.contextmanager
def mounted_exfat(image: Path) -> Iterator[Path]:
    """A folder where the FUSE driver shows the exFAT in *image*."""
    folder = image.with_suffix(".mounted")
    folder.mkdir(exist_ok=True)
    # It takes nothing but a block device.
    with attached(image) as device:
        run("mount.exfat-fuse", "-o", "noatime", device, folder)
        try:
            yield folder
        finally:
            run("umount", folder)
