"""What `debugfs` says of an ext2, ext3 or ext4: the judge of ours."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

Blocks = set[tuple[int | str, int]]
"""(block of the file, block of the disk); of blocks of the map and of attributes a word first."""


def debugfs(image: Path, commands: list[str]) -> list[str]:
    """What each of the commands prints."""
    script = "".join(f"{command}\n" for command in commands)
    done = subprocess.run(
        ["debugfs", "-f", "-", image],
        input=script,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        check=True,
    )
    parts = re.split(r"(?m)^debugfs: .*\n", done.stdout)
    assert len(parts) == len(commands) + 1
    return parts[1:]


def blocks_of(image: Path, inodes: list[int]) -> dict[int, Blocks]:
    """All blocks that each of the inodes has."""
    texts = debugfs(image, [f"stat <{inode}>" for inode in inodes])
    return {inode: _blocks_in(text) for inode, text in zip(inodes, texts, strict=True)}


def _blocks_in(text: str) -> Blocks:
    found: Blocks = set()
    listed = re.search(r"\n(?:BLOCKS|EXTENTS):\n(.*)", text, re.DOTALL)
    for place, first, last in re.findall(
        r"\(([^)]+)\):(\d+)(?:-(\d+))?", listed[1] if listed else ""
    ):
        logical = int(re.match(r"\d+", place)[0]) if place[0].isdigit() else None  # type: ignore[index]
        for at, block in enumerate(range(int(first), int(last or first) + 1)):
            found.add(("map" if logical is None else logical + at, block))
    attributes = re.search(r"File ACL: (\d+)", text)
    if attributes and int(attributes[1]):
        found.add(("attributes", int(attributes[1])))
    return found


def paths_in(image: Path) -> set[tuple[bytes, int]]:
    """Every path there is, and its inode."""
    found: set[tuple[bytes, int]] = set()
    folders = [(2, b"")]
    while folders:
        texts = debugfs(image, [f"ls -p <{inode}>" for inode, _ in folders])
        below = []
        for (_, folder), text in zip(folders, texts, strict=True):
            # A name may hold a newline, and debugfs does not mind: an entry begins with its inode.
            for inode, mode, name in re.findall(r"(?ms)^/(\d+)/(\d+)/\d+/\d+/(.*?)/\d*/$", text):
                path = folder + b"/" + os.fsencode(name)
                if inode == "0" or name in (".", ".."):
                    continue
                found.add((path, int(inode)))
                if mode.startswith("04"):
                    below.append((int(inode), path))
        folders = below
    return found


def free_blocks(image: Path) -> set[int]:
    """What no bitmap has as used."""
    done = subprocess.run(["dumpe2fs", image], capture_output=True, text=True, check=True)
    cluster = re.search(r"Cluster size: +(\d+)", done.stdout)
    block = re.search(r"Block size: +(\d+)", done.stdout)
    assert block is not None
    # With clusters it names the first block of the last one.
    ratio = int(cluster[1]) // int(block[1]) if cluster else 1
    found: set[int] = set()
    for line in re.findall(r"(?m)^  Free blocks: (.*)$", done.stdout):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", line):
            found.update(range(int(first), int(last or first) + ratio))
    return found


IMAP = re.compile(r"located at block (\d+), offset (0x[0-9a-f]+)")
"""Where `imap` says that a record is."""
