"""File systems of a guest for the fuzzers: any bytes as a disk with one, and disks to begin with.

A disk is given as its sectors that hold anything, then where each of them is, and how many: so that
one of hundreds of mebibytes with little in it is a small input.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from planner.guestfs.protocol import FileSystem
from planner.source import SECTOR
from tests.images.guest_files import make_ext
from tests.images.guest_filled import make_btrfs, make_ntfs, make_xfs, mtools, run
from tests.planner.guestfs.walks import require_sound
from tests.planner.sources import Sparse

TAIL = 12
"""Bytes at the end: how many sectors there are, and how many the disk has."""

MOST_SECTORS = 1 << 40


def disk_of(data: bytes) -> Sparse:
    """The disk that any bytes are."""
    tail = data[-TAIL:].rjust(TAIL, b"\0")
    body = data[:-TAIL]
    count = min(int.from_bytes(tail[:4], "little"), len(body) // (SECTOR + 4))
    size = min(int.from_bytes(tail[4:], "little"), MOST_SECTORS) * SECTOR
    places = np.frombuffer(body[len(body) - 4 * count :], dtype="<u4").tolist()
    parts = {place: body[at * SECTOR : (at + 1) * SECTOR] for at, place in enumerate(places)}
    return Sparse({place: part for place, part in parts.items() if place * SECTOR < size}, size)


def packed(image: Path) -> bytes:
    """*image* in the form that `disk_of` takes: what is all zeros or all ones is left out."""
    rows = np.fromfile(image, dtype=np.uint8).reshape(-1, SECTOR)
    places = np.flatnonzero((rows != rows[:, :1]).any(axis=1))
    index = places.astype("<u4").tobytes() + len(places).to_bytes(4, "little")
    return rows[places].tobytes() + index + len(rows).to_bytes(8, "little")


def walk(found: FileSystem | None) -> None:
    """What is asked of a disk that holds a file system, or none."""
    if found is not None:
        require_sound(found)


def _tree(root: Path) -> Path:
    """A few directories and files whose data is zeros, so that it is in no seed."""
    for folder in ("one", "one/two", "three"):
        (root / folder).mkdir(parents=True)
        for number in range(8):
            with (root / folder / f"file{number}").open("wb") as file:
                file.write(bytes(5000 * number))
    (root / "with a long name that is in pieces.text").touch()
    return root


@cache
def seeds(kind: str) -> tuple[bytes, ...]:
    """Disks with a file system of that kind."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        return tuple(packed(image) for image in MAKERS[kind](root, _tree(root / "tree")))


def _ext(root: Path, tree: Path) -> Iterator[Path]:
    for name, options in (("ext2", ["-t", "ext2"]), ("ext4", ["-t", "ext4"])):
        make_ext(root / name, tree, [*options, "-b", "1024", "-N", "64"], 1 << 20)
        yield root / name


def _xfs(root: Path, tree: Path) -> Iterator[Path]:
    for name, options in (("5", []), ("4", ["-m", "crc=0", "-b", "size=1024"])):
        make_xfs(root / name, tree, options)
        yield root / name


def _ntfs(root: Path, tree: Path) -> Iterator[Path]:
    make_ntfs(root / "ntfs", ["-c", "512"], 3 << 20)
    for path in sorted(tree.rglob("file*")):
        run("ntfscp", "-q", root / "ntfs", path, "/" + path.name + path.parent.name)
    yield root / "ntfs"


def _fat(root: Path, tree: Path) -> Iterator[Path]:
    for bits, size in (("12", 1 << 20), ("16", 9 << 20), ("32", 40 << 20)):
        image = root / bits
        with image.open("wb") as file:
            file.truncate(size)
        run("mkfs.fat", "-F", bits, "-s", "1" if bits == "32" else "4", image)
        mtools("mcopy", image, "-s", "-Q", *sorted(tree.iterdir()), "::")
        yield image


def _exfat(root: Path, _: Path) -> Iterator[Path]:
    image = root / "exfat"
    with image.open("wb") as file:
        file.truncate(4 << 20)
    run("mkfs.exfat", "-L", "label", "-c", "4096", image)
    data = bytearray(image.read_bytes())
    heap, top = (int.from_bytes(data[at : at + 4], "little") for at in (88, 96))
    at = heap * SECTOR + (top - 2) * 4096
    while data[at]:
        at += 32
    # A file in a row of clusters, and a directory in a chain of one.
    for number, (attributes, flags, first) in enumerate([(0x20, 3, 40), (0x10, 1, 50)]):
        entry = bytes((0x85, 2, 0, 0, attributes)) + bytes(27)
        stream = bytes((0xC0, flags, 0, 4)) + bytes(16) + first.to_bytes(4, "little")
        stream += (12_000).to_bytes(8, "little")
        name = bytes((0xC1, 0)) + f"nam{number}".encode("utf-16-le").ljust(30, b"\0")
        data[at : at + 96] = entry + stream + name
        at += 96
    image.write_bytes(data)
    yield image


def _btrfs(root: Path, tree: Path) -> Iterator[Path]:
    # Of blocks with one kind of checksum that is not looked at, so that more than that is fuzzed.
    for name, options in (("once", ["--csum", "xxhash", "-m", "single"]), ("twice", [])):
        make_btrfs(root / name, tree, ["-n", "4096", *options])
        yield root / name


MAKERS = {"ext": _ext, "xfs": _xfs, "ntfs": _ntfs, "fat": _fat, "exfat": _exfat, "btrfs": _btrfs}
