"""What `instarfs export` makes of a disk: what `qemu-img convert` reads, and a list of the rest."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from instarfs.guest.export import Export, Outcome
from instarfs.guest.follow import Follow
from instarfs.guest.outfile import OutFile
from instarfs.image.file import Image
from planner.errors import ImageError, NotQcow2
from planner.guest.mapfile import BAD, READ, UNTRIED, Mapfile
from planner.source import SECTOR, read_bytes
from tests.images.guest_disks import first_difference, read_disk
from tests.images.matrix import MATRIX, Row, build, copy, describe, random_row
from tests.images.random_damage import inflict_some
from tests.oracle.scene import FileSource, Scene, dissect

LARGEST = 1 << 32
"""Bytes of a disk that QEMU is made to read sector by sector."""


def export(image: Path, snapshot: str | None = None) -> tuple[Path, Mapfile, Outcome]:
    """Export it to a new file."""
    raw = image.with_name("ours.raw")
    raw.unlink(missing_ok=True)
    raw.with_name("ours.raw.map").unlink(missing_ok=True)
    it = Export(Image.open(str(image)), Follow([str(image.parent)]), snapshot)
    out = OutFile.open(str(raw), it.origin())
    outcome = it.run(out)
    out.close()
    return raw, out.mapfile, outcome


def sectors(blocks: Iterable[tuple[int, int]]) -> set[int]:
    return {at for start, end in blocks for at in range(start // SECTOR, -(-end // SECTOR))}


def faults_of(row: Row, image: Path, index: int | None = None, name: str | None = None) -> str:
    """What is otherwise than by QEMU, of a snapshot by its place and id; empty where nothing is."""
    theirs = read_disk(row, image, name, image.with_name("theirs.raw"))
    if theirs is None:
        return ""
    try:
        raw, mapfile, outcome = export(image, None if index is None else str(index))
    except NotQcow2:
        return ""  # for QEMU a raw image
    except ImageError as error:
        return f"QEMU opens it, we do not: {error}"
    bad = mapfile.blocks(BAD)
    assert not mapfile.blocks(UNTRIED)
    assert mapfile.bytes_of(BAD) == outcome.unread == mapfile.size - mapfile.bytes_of(READ)
    with raw.open("rb") as file, theirs.raw.open("r+b") as other:
        os.truncate(theirs.raw, mapfile.size)  # of a snapshot as long as the disk is now
        ours, ignored = FileSource(file.fileno()), theirs.unreadable | sectors(bad)
        at = first_difference(ours, FileSource(other.fileno()), ignored)
        if at is not None:
            return f"reads otherwise at {at}"
        for start, end in bad[:1000]:
            if any(read_bytes(ours, start, min(end - start, 1 << 20))):
                return f"what cannot be read at {start} is no hole"
    lost = theirs.unreadable - sectors(bad)
    return f"sector {min(lost)} was read, QEMU cannot read it" if lost else ""


def rows(name: str, seed: int, count: int) -> Iterable[tuple[str, Row]]:
    """The matrix from a place of the seed's, and as many combinations."""
    for number in range(count):
        case = f"{name} {seed} {number}"
        rng = random.Random(case)
        row = rng.choice(MATRIX) if number % 2 else random_row(rng)
        if not row.encryption and row.cluster_bits <= 16:
            yield case, row


def test_every_disk_is_the_one_that_qemu_converts(
    tmp_path_factory: pytest.TempPathFactory, cases: int, seed: int
) -> None:
    faults, seen = [], 0
    for case, row in rows("export", seed, cases // 6):
        image = build(row, tmp_path_factory.mktemp("case"), case)
        snapshots = dissect(image).snapshots
        disks = [(None, None), *((at, each.id_str.decode()) for at, each in enumerate(snapshots))]
        for index, name in disks:
            fault = faults_of(row, image, index, name)
            if not fault:
                _, _, outcome = export(image, None if index is None else str(index))
                fault = f"{outcome.unread} bytes were not read" if outcome.unread else ""
            seen += 1
            if fault:
                faults.append(f"{case}, {name}: {describe(row)}: {fault}")
    assert not faults, "\n".join(faults)
    assert seen > 10


def test_what_qemu_reads_of_a_damaged_image(
    tmp_path_factory: pytest.TempPathFactory, cases: int, seed: int
) -> None:
    faults, lost = [], 0
    for case, row in rows("damaged export", seed, cases // 20):
        folder = tmp_path_factory.mktemp("case")
        base = build(row, folder, case)
        anatomy = dissect(base)
        if anatomy.geometry.virtual_size > LARGEST:
            continue
        for number in range(4):
            image = folder / "image.qcow2"
            copy(base, image)
            with Scene(image, anatomy) as scene:
                done = inflict_some(scene, random.Random(f"{case} {number}"))
            fault = faults_of(row, image)
            lost += (folder / "ours.raw.map").exists() and b"  -\n" in (
                folder / "ours.raw.map"
            ).read_bytes()
            if fault:
                faults.append(f"{case}, {number}: {describe(row)}: {done}: {fault}")
    assert not faults, "\n".join(faults)
    assert lost
