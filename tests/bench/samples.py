"""The images that the races are about: sparse, written once a run, each when first asked for.

What qemu-img makes quickly it makes; the shapes that no command of QEMU gives are from `disks`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from instarfs.image.file import Image
from planner.qcow2.entries import l1_offsets
from planner.qcow2.header import Header
from planner.qcow2.layout import Layout
from tests.bench.disks import CLUSTER


class Samples:
    """Sample images in one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, make: Callable[[Path], None]) -> Path:
        """The image *name*, made if it is not there yet."""
        path = self.folder / f"{name}.qcow2"
        if not path.exists():
            make(path)
        return path

    def preallocated(self, size: str) -> Path:
        """A disk of *size* as ``qemu-img create -o preallocation=metadata`` leaves it."""
        return self.get(f"preallocated-{size}", lambda path: preallocate(path, size))


def preallocate(path: Path, size: str) -> None:
    """Every guest cluster has a host cluster, in order, and nothing is written to any."""
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]
    subprocess.run([*create, path, size], check=True, stderr=subprocess.DEVNULL)


def copy(source: Path, target: Path) -> None:
    """A copy with the same holes."""
    subprocess.run(["cp", "--sparse=auto", source, target], check=True)


def zero_l1(path: Path) -> None:
    """Make everything that the active L1 table leads to a leak."""
    header = _header(path)
    _overwrite(path, header.l1_table_offset, bytes(8 * header.l1_size))


def zero_reftable(path: Path) -> None:
    """Make every refcount read as 0: the refcount blocks are lost."""
    header = _header(path)
    _overwrite(path, header.refcount_table_offset, bytes(header.refcount_table_clusters * CLUSTER))


def flip_bits(path: Path, share: float) -> None:
    """Change one bit, any, of this share of the L2 entries, as memory that forgets does."""
    header, rng = _header(path), np.random.default_rng(5)
    with path.open("r+b") as file:
        file.seek(header.l1_table_offset)
        tables = l1_offsets(np.frombuffer(file.read(8 * header.l1_size), ">u8").astype(np.uint64))
        for table in tables.tolist():
            file.seek(table)
            words = np.frombuffer(file.read(CLUSTER), dtype=">u8").astype(np.uint64)
            hit = rng.random(len(words)) < share
            words[hit] ^= np.uint64(1) << rng.integers(0, 64, len(words), np.uint64)[hit]
            file.seek(table)
            file.write(words.astype(">u8").tobytes())


def _header(path: Path) -> Header:
    with Image.open(str(path)) as image:
        return Layout.read(image.source()).header


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
