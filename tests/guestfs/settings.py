"""Images with file systems that are to be damaged, each under each partition table."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guestfs.truth import Truth, truth_of
from tests.images.guest_files import make_ext, make_tree
from tests.images.guest_filled import (
    age,
    age_btrfs,
    fill_ntfs,
    make_btrfs,
    make_exfat,
    make_fat,
    make_ntfs,
    make_xfs,
    mounted,
    mounted_ntfs,
    plain_tree,
)
from tests.oracle.scene import Anatomy, FileSource, dissect
from tests.planner.guestfs.judges import require_agreement

MIB = 1 << 20
TABLES = {
    "none": "",
    "mbr": "label: dos\nstart=2048, size={sectors}, type=83\n",
    "gpt": "label: gpt\nstart=2048, size={sectors}\n",
}
PRIMARY_GPT = (512, 33 * 512)


@dataclass(frozen=True, slots=True)
class Setting:
    """An image that is to be damaged, and the truth about its disk."""

    name: str
    image: Path
    anatomy: Anatomy
    truth: Truth


def _ext(kind: str) -> Callable[[Path, Path, int], None]:
    return lambda path, root, _: make_ext(path, root / "tree", ["-t", kind, "-b", "1024"], 48 * MIB)


def _xfs(path: Path, root: Path, _: int) -> None:
    make_xfs(path, root / "tree", [])


def _ntfs(path: Path, root: Path, seed: int) -> None:
    # Bytes that no text is, which NTFS does not take.
    for hostile in (root / "tree" / "dir 1").glob("*ostile"):
        hostile.unlink()
    make_ntfs(path, [])
    with mounted_ntfs(path) as folder:
        fill_ntfs(folder, root / "tree", seed)


def _fat(variant: str) -> Callable[[Path, Path, int], None]:
    return lambda path, root, _: make_fat(path, root / "plain", variant)


def _exfat(path: Path, root: Path, _: int) -> None:
    make_exfat(path, root / "plain", [])


def _btrfs(path: Path, root: Path, seed: int) -> None:
    # Of what is there twice nothing is hit while there is one.
    make_btrfs(path, root / "tree", ["-m", "single"])
    with mounted(path, "compress=zlib") as folder:
        age_btrfs(folder, seed)


MAKERS: dict[str, Callable[[Path, Path, int], None]] = {
    "ext4": _ext("ext4"),
    "ext2": _ext("ext2"),
    "xfs": _xfs,
    "fat32": _fat("FAT32"),
    "fat16": _fat("FAT16"),
    "fat12": _fat("FAT12"),
    "exfat": _exfat,
    "ntfs": _ntfs,
    "btrfs": _btrfs,
}
AGED = ("ext4", "ext2", "xfs")
"""Those that a kernel writes to and deletes from in turns; the others' makers do so themselves."""

WITH_COPIES = ("ext4", "ext2", "xfs", "fat32", "exfat", "ntfs", "btrfs")
"""Those that have a second superblock or boot sector."""

SUPERBLOCKS = {"ext4": (1024, 1024), "ext2": (1024, 1024), "btrfs": (64 << 10, 4096)}
"""Where the first superblock is, and how long; of the others the first sector."""


@contextmanager
def settings(
    seed: int,
    kinds: tuple[str, ...] = tuple(MAKERS),
    *,
    is_long: bool = False,
    is_bare: bool = False,
) -> Iterator[list[Setting]]:
    """One of each file system under each table.

    ``is_long``: they are aged by a kernel, and their own tools agree with us. ``is_bare``: without
    the first superblock, and without the first GPT.
    """
    with tempfile.TemporaryDirectory() as folder:
        root, made = Path(folder), []
        make_tree(root / "tree", seed, files=60)
        plain_tree(root / "plain", seed)
        for kind in kinds:
            path = root / kind
            MAKERS[kind](path, root, seed)
            if is_long:
                if kind in AGED:
                    with mounted(path) as mount:
                        # All attributes of a file are in one block of ext2/3/4.
                        age(mount, seed, rounds=2, attribute_size=40)
                require_agreement(path)
            made += [_setting(kind, table, path, is_bare=is_bare) for table in TABLES]
        yield made


def _setting(kind: str, table: str, filesystem: Path, *, is_bare: bool) -> Setting:
    disk = filesystem.with_name(f"{kind}-{table}.raw")
    size, start = filesystem.stat().st_size, MIB if table != "none" else 0
    with disk.open("wb") as file:
        file.truncate(size + 2 * start)
    if start:
        script = TABLES[table].format(sectors=size // 512)
        subprocess.run(["sfdisk", "--quiet", disk], input=script, text=True, check=True)
    command = ["dd", f"if={filesystem}", f"of={disk}", "bs=1M", "conv=notrunc,sparse"]
    subprocess.run([*command, f"seek={start // MIB}"], check=True, capture_output=True)
    with disk.open("r+b") as file:
        truth = truth_of(FileSource(file.fileno()))
        if is_bare:
            offset, length = SUPERBLOCKS.get(kind, (0, 512))
            for at, count in ((start + offset, length), PRIMARY_GPT)[: 1 + (table == "gpt")]:
                file.seek(at)
                file.write(bytes(count))
    image = disk.with_suffix(".qcow2")
    options = ["-o", "cluster_size=4096"]
    convert: list[str | Path] = ["qemu-img", "convert", "-O", "qcow2", *options, disk, image]
    subprocess.run(convert, check=True)
    disk.unlink()
    return Setting(f"{kind}-{table}", image, dissect(image), truth)
