"""What ntfs-3g's tools say of an NTFS: the judges of ours."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

Blocks = set[tuple[int, int]]
"""(cluster of the attribute, cluster of the disk)."""

TYPES = {0x80: "data", 0xA0: "index", 0xB0: "bitmap", 0x20: "list"}


def attributes_of(image: Path, inode: int) -> dict[str, Blocks]:
    """The clusters of an inode's attributes that are outside of its record, by their sort."""
    text = subprocess.run(
        ["ntfscluster", "-f", "-I", str(inode), image],
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
    ).stdout
    found: dict[str, Blocks] = {}
    kind = ""
    for line in text.splitlines():
        if match := re.match(r" +0x([0-9a-f]+) - ", line):
            kind = TYPES.get(int(match[1], 16), match[1])
        elif match := re.match(r" +(-?\d+) +(-?\d+) +(\d+) *$", line):
            virtual, cluster, count = (int(each) for each in match.groups())
            if cluster >= 0:
                pairs = {(virtual + at, cluster + at) for at in range(count)}
                found.setdefault(kind, set()).update(pairs)
    return found


def paths_in(folder: Path) -> set[tuple[bytes, int]]:
    """Every path below a folder where ntfs-3g shows it, and its inode."""
    found = set()
    for path in folder.rglob("*"):
        found.add((b"/" + os.fsencode(path.relative_to(folder)), path.lstat().st_ino))
    return found
