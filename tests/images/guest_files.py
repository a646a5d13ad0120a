"""Trees of files for a guest's file system, and file systems that mke2fs makes of them."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

EXT_VARIANTS = {
    "ext2": ["-t", "ext2"],
    "ext2 with 1 KiB blocks": ["-t", "ext2", "-b", "1024"],
    "ext3": ["-t", "ext3", "-b", "4096"],
    "ext4": ["-t", "ext4", "-b", "4096"],
    "ext4 with 1 KiB blocks": ["-t", "ext4", "-b", "1024"],
    "ext4 with small groups": ["-t", "ext4", "-b", "1024", "-g", "1024"],
    "ext4 of 32 bits": ["-t", "ext4", "-O", "^metadata_csum,^64bit"],
    "ext4 with old checksums": ["-t", "ext4", "-O", "^metadata_csum,uninit_bg", "-b", "1024"],
    "ext4 with meta groups": ["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"],
    "ext4 with clusters": ["-t", "ext4", "-O", "bigalloc", "-C", "16384"],
    "ext4 with small clusters": ["-t", "ext4", "-O", "bigalloc", "-b", "1024", "-C", "8192"],
    "ext4 with inline data": ["-t", "ext4", "-O", "inline_data", "-I", "256"],
    "ext4 with large inodes": ["-t", "ext4", "-O", "inline_data", "-I", "512", "-b", "1024"],
    "ext4 with two backups": ["-t", "ext4", "-O", "sparse_super2,^resize_inode", "-b", "1024"],
    "ext4 with a backup a group": [
        "-t", "ext4", "-O", "^flex_bg,^sparse_super,^resize_inode", "-b", "1024"
    ],
    "ext4 with quotas": ["-t", "ext4", "-O", "quota,project,metadata_csum_seed", "-I", "256"],
}  # fmt: skip


def make_tree(root: Path, seed: int, files: int = 150) -> None:
    """Some directories with *files* of all sizes; sparse ones, links, and names of all sorts."""
    rng = random.Random(f"tree {seed}")
    folders = [root, *(root / f"dir {n}" / ("below/" * (n % 3)) for n in range(6))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        path = rng.choice(folders) / f"file {number}.bin"
        size = rng.choice([0, 10, 59, 100, 150, 3000, 20_000, 70_000])
        with path.open("wb") as file:
            file.write(rng.randbytes(size))
            if rng.random() < 0.2:
                for _ in range(rng.randrange(1, 12)):
                    file.seek(rng.randrange(1, 40) * 4096, os.SEEK_CUR)
                    file.write(rng.randbytes(rng.randrange(1, 9000)))
    with (root / "in pieces").open("wb") as file:
        for number in range(600):
            file.seek(number * 9000)
            file.write(b"piece")
    (root / "many").mkdir()
    for number in range(files * 2):
        (root / "many" / f"{'a long name to fill directories ' * (number % 4)}{number}").touch()
    for number in (5, 59, 60, 300):
        (root / f"link {number}").symlink_to("x" * number)
    (root / "another name").hardlink_to(root / "in pieces")
    (root / "dir 1" / os.fsdecode(b"h\x1b[31m\xff\n\t\\ostile")).write_bytes(rng.randbytes(9000))


def make_ext(image: Path, tree: Path, options: list[str], size: int = 64 << 20) -> None:
    """A file system of *size* bytes with the files of *tree*, made by the real mke2fs."""
    with image.open("wb") as file:
        file.truncate(size)
    command: list[str | Path] = ["mke2fs", "-q", "-F", "-L", "a label", "-d", tree, *options, image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def make_disk(disk: Path, script: str, parts: dict[int, Path], size: int = 48 << 20) -> None:
    """A disk of *size* bytes that sfdisk partitions by *script*, with *parts* at their offsets."""
    with disk.open("wb") as file:
        file.truncate(size)
    done = subprocess.run(
        ["sfdisk", "--quiet", disk], input=script, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with disk.open("r+b") as file:
        for offset, part in parts.items():
            file.seek(offset)
            file.write(part.read_bytes())
