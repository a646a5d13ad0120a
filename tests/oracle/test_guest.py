"""The guest's bytes, and the map of them, over the whole matrix: byte for byte as QEMU reads them.

`qemu-img convert` writes out what QEMU reads of a disk or a snapshot; our reads of all that any of
the two takes for data, and of random places, must give the same. Encrypted images are left out
here: nothing is read of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from instarfs.errors import GuestEncrypted
from instarfs.guest.disk import Disk
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from instarfs.render.guest_map import map_json
from planner.qcow2.snapshots import read_snapshots
from tests.images import matrix
from tests.images.guest_disks import first_difference
from tests.images.matrix import MATRIX, Row, describe, random_row
from tests.oracle.scene import FileSource

PLAIN = [row for row in MATRIX if not row.encryption]
ENCRYPTED = [row for row in MATRIX if row.name in ("aes", "luks")]  # LUKS takes its time
RANDOM_READS = 60


@dataclass
class Shown:
    """A disk of ours as a source; what is no data in any map is not read."""

    disk: Disk
    size: int
    extents: Iterable[tuple[int, int]]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        content = self.disk.read(offset, len(buffer))
        buffer[: len(content)] = content
        buffer[len(content) :] = bytes(len(buffer) - len(content))

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self.extents


def opened(image: Path) -> Guest:
    return Guest(Image.open(str(image)), Follow([str(image.parent)]))


def converted(row: Row, image: Path, snapshot: str | None, raw: Path) -> None:
    done = subprocess.run(
        matrix.convert_command(row, image, snapshot, raw),
        check=False,
        capture_output=True,
        text=True,
        cwd=image.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")


def must_read_alike(disk: Disk, raw: Path, rng: random.Random) -> None:
    """All data, and random places; QEMU shows a snapshot as long as the disk is now."""
    with raw.open("rb") as file:
        size = min(disk.size, os.fstat(file.fileno()).st_size)
        os.truncate(raw, size)
        theirs = FileSource(file.fileno())
        mapped = [
            (start, start + length)
            for runs in disk.layer.mapping.walk(0, size)
            for start, length, kind in zip(
                runs.guest.tolist(), runs.length.tolist(), runs.kind.tolist(), strict=True
            )
            if kind >= 2
        ]
        assert first_difference(theirs, Shown(disk, size, mapped)) is None
        places = [start for start, _ in mapped] + [end for _, end in mapped] + [0, size]
        for _ in range(RANDOM_READS):
            near = rng.choice(places) + rng.randrange(-5000, 5000)
            offset = max(0, min(rng.choice((near, rng.randrange(size + 1))), size))
            length = rng.choice((1, 511, 512, 4096, 70_000, 1 << 18))
            assert disk.read(offset, length) == os.pread(
                file.fileno(), min(length, size - offset), offset
            )


def must_map_alike(guest: Guest, image: Path) -> None:
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", image.name],
        check=True,
        capture_output=True,
        cwd=image.parent,
    )
    ours = json.loads(b"".join(map_json(guest.extents(), guest.members)))
    for entry in ours:
        packed = entry.pop("compressed")
        assert not packed or (entry["data"] and "offset" not in entry)
    assert ours == json.loads(done.stdout)


def must_agree(row: Row, folder: Path, seed: str) -> None:
    """Disk, snapshots and map of one image."""
    image = matrix.build(row, folder, seed)
    guest, rng = opened(image), random.Random(seed)
    must_map_alike(guest, image)
    raw = folder / "theirs.raw"
    converted(row, image, None, raw)
    must_read_alike(guest.find(Place(Part.DISK)), raw, rng)
    layout = guest.layout
    table = read_snapshots(Image.open(str(image)).source(), layout.header, layout.geometry)
    for index, snapshot in enumerate(table.snapshots):
        raw.unlink()
        converted(row, image, snapshot.id_str.decode(), raw)
        must_read_alike(guest.find(Place(Part.SNAPSHOT, index)), raw, rng)


@pytest.mark.parametrize("row", PLAIN, ids=lambda row: row.name)
def test_matrix(row: Row, tmp_path: Path) -> None:
    must_agree(row, tmp_path, row.name)


def test_mixed_rows(tmp_path: Path, cases: int, seed: int) -> None:
    for number in range(cases // 50):
        case = f"guest {seed + number}"
        row = random_row(random.Random(case))
        if row.encryption:
            continue
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            must_agree(row, folder, case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {describe(row)}: {error}") from error


@pytest.mark.parametrize("row", ENCRYPTED, ids=lambda row: row.name)
def test_nothing_is_read_of_what_is_encrypted(row: Row, tmp_path: Path) -> None:
    guest = opened(matrix.build(row, tmp_path, row.name))
    for place in (Place(Part.DISK), Place(Part.SNAPSHOT, 0), Place(Part.VMSTATE, 0)):
        with pytest.raises(GuestEncrypted):
            guest.find(place)
