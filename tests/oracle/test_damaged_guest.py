"""The guest's bytes of damaged images: what QEMU can read reads the same here.

`qemu-img convert --salvage` reads around what it cannot read, but gives the whole disk up at the
first entry that it takes for corruption; we go on, so that we may read more, and never less.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from planner.errors import ImageError, NotQcow2
from planner.source import SECTOR
from tests.images.guest_disks import first_difference, read_disk
from tests.images.matrix import MATRIX, Row, build, copy, describe, random_row
from tests.images.random_damage import inflict_some
from tests.oracle.patched import Patched
from tests.oracle.scene import FileSource, Scene, dissect

LARGEST = 1 << 32
"""Bytes of a disk that QEMU is made to read sector by sector."""


def faults_of(row: Row, image: Path) -> str | None:
    """What is read of the disk otherwise than by QEMU; None where nothing is."""
    theirs = read_disk(row, image, None, image.with_name("theirs.raw"))
    if theirs is None:
        return None
    try:
        guest = Guest(Image.open(str(image)), Follow([str(image.parent)]))
    except NotQcow2:
        return None  # for QEMU a raw image
    except ImageError as error:
        return f"QEMU opens it, we do not: {error}"
    ours = Patched(guest.find(Place(Part.DISK)))
    with theirs.raw.open("rb") as file:
        at = first_difference(ours, FileSource(file.fileno()), theirs.unreadable)
    if at is None or at // SECTOR in ours.unreadable:
        lost = ours.unreadable - theirs.unreadable
        return f"sector {min(lost)} cannot be read, QEMU reads it" if lost else None
    return f"reads otherwise at {at}"


def rows(seed: int, count: int) -> Iterable[tuple[str, Row]]:
    """The matrix from a place of the seed's, and as many combinations."""
    for number in range(count):
        case = f"damaged guest {seed} {number}"
        rng = random.Random(case)
        row = rng.choice(MATRIX) if number % 2 else random_row(rng)
        if not row.encryption and row.cluster_bits <= 16:
            yield case, row


def test_what_qemu_reads_of_a_damaged_image(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, cases: int, seed: int
) -> None:
    faults, read = [], 0
    for case, row in rows(seed, cases // 30):
        folder = tmp_path_factory.mktemp("case")
        base = build(row, folder, case)
        anatomy = dissect(base)
        if anatomy.geometry.virtual_size > LARGEST:
            continue
        for number in range(3):
            image = folder / "image.qcow2"
            copy(base, image)
            with Scene(image, anatomy) as scene:
                done = inflict_some(scene, random.Random(f"{case} {number}"))
            fault = faults_of(row, image)
            read += 1
            if fault is not None:
                faults.append(f"{case}, {number}: {describe(row)}: {done}: {fault}")
    assert not faults, "\n".join(faults)
    assert read
