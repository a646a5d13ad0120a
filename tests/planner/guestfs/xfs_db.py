"""What `xfs_db` says of an XFS: the judge of ours."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

Blocks = set[tuple[int, int]]
"""(block of the file, block of the disk), the latter counted from the file system's first."""

PROMPT = b"xfs_db> "
MARK = b"==== "


def xfs_db(image: Path, groups: list[list[str]], *options: str) -> list[bytes]:
    """What each of the groups of commands prints."""
    script = "".join(
        "".join(f"{command}\n" for command in [*group, f"echo {MARK.decode().strip()}"])
        for group in groups
    )
    done = subprocess.run(
        ["xfs_db", *options, image], input=script.encode(), capture_output=True, check=True
    )
    parts = done.stdout.replace(PROMPT, b"").split(MARK + b"\n")
    assert len(parts) == len(groups) + 1
    return parts[:-1]


def number(image: Path, field: str) -> int:
    """A field of the superblock."""
    text = xfs_db(image, [["sb 0", f"print {field}"]], "-r")[0]
    return int(text.split(b" = ")[1])


def blocks_of(image: Path, inodes: list[int]) -> dict[int, tuple[Blocks, Blocks]]:
    """The blocks of data of each of the inodes, and those of its attributes."""
    per_group = number(image, "agblocks")
    groups = [[f"inode {inode}", f"bmap {which}"] for inode in inodes for which in ("-d", "-a")]
    found = [_blocks_in(text, per_group) for text in xfs_db(image, groups, "-r")]
    return {inode: (found[2 * at], found[2 * at + 1]) for at, inode in enumerate(inodes)}


def _blocks_in(text: bytes, per_group: int) -> Blocks:
    found: Blocks = set()
    for logical, group, block, count in re.findall(
        rb"(?:data|attr) offset (\d+) startblock \d+ \((\d+)/(\d+)\) count (\d+) flag", text
    ):
        first = int(group) * per_group + int(block)
        found.update((int(logical) + at, first + at) for at in range(int(count)))
    return found


def paths_in(image: Path, root: int, known: set[int]) -> set[tuple[bytes, int]]:
    """Every path there is, and its inode. *known*: directories, where entries do not say so."""
    found: set[tuple[bytes, int]] = set()
    folders = [(root, b"")]
    while folders:
        texts = xfs_db(image, [[f"inode {inode}", "ls"] for inode, _ in folders], "-r")
        below = []
        for (_, folder), text in zip(folders, texts, strict=True):
            for match in re.finditer(
                rb"(?m)^\d+ +(\d+) +(\w+) +0x[0-9a-f]{8} +(\d+) (?!\.\.? \(good\))", text
            ):
                name = text[match.end() : match.end() + int(match[3])]
                found.add((folder + b"/" + name, int(match[1])))
                if match[2] == b"directory" or (match[2] == b"unknown" and int(match[1]) in known):
                    below.append((int(match[1]), folder + b"/" + name))
        folders = below
    return found


def free_blocks(image: Path) -> set[int]:
    """What the trees of free space have, group by group."""
    per_group = number(image, "agblocks")
    [text] = xfs_db(image, [["freesp -d"]], "-r")
    found: set[int] = set()
    for group, block, count in re.findall(rb"(?m)^ *(\d+) +(\d+) +(\d+)$", text):
        first = int(group) * per_group + int(block)
        found.update(range(first, first + int(count)))
    return found
