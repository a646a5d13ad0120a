"""Cases of a campaign: an aged disk, a loss, and what a rescue makes of it, held to the truth."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from instarfs.image.file import Image
from instarfs.repair.rescue import write_copy
from planner.errors import PlannerError
from planner.qcow2.header import Header
from planner.rescue.rescue import Rescue, rescue
from tests.oracle.scene import FileSource
from tests.rescue.disks import MIB, Made, run
from tests.rescue.losses import Truth, lose, truth_of

FILE_SYSTEMS = ("ext4", "xfs", "ntfs")
TABLES = ("gpt", "mbr", "none")
SHAPES = ((14, 2048 * MIB), (16, 12 * 1024 * MIB))


def made(seed: int, number: int) -> Made:
    """How the disk of that number is made."""
    rng = random.Random(f"made {seed} {number}")
    bits, size = SHAPES[number // 3 % 2]
    return Made(
        filesystem=FILE_SYSTEMS[number % 3],
        table=rng.choice(TABLES),
        cluster_bits=bits,
        size=size,
        files=rng.randrange(100, 300),
        snapshot=rng.random() < 0.5,
    )


@dataclass(slots=True)
class Case:
    """What came of one: numbers of tables by sort, and what is wrong, in words.

    ``by_order``: how many tables with data the order of the file would put right. ``is_whole``:
    whether every byte of the disk came back.
    """

    name: str
    tables: Counter[str] = field(default_factory=Counter)
    placed: Counter[str] = field(default_factory=Counter)
    by_order: int = 0
    is_whole: bool = False
    wrong: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Before:
    """An image before it lost anything: the ``truth`` of its tables, and what it reads, raw: its
    ``disk``, and its only ``snapshot``.
    """

    truth: Truth
    disk: Path
    snapshot: Path | None

    def delete(self) -> None:
        """The files of it."""
        for path in (self.disk, self.snapshot):
            if path is not None:
                path.unlink()


def look_at(image: Path, folder: Path) -> Before:
    """*image* as it is; what `qemu-img` reads of it in files in *folder*."""
    snapshots = json.loads(run("qemu-img", "info", "--output=json", image)).get("snapshots", [])
    disk, theirs = folder / "before.raw", None
    run("qemu-img", "convert", "-O", "raw", image, disk)
    for each in snapshots:
        theirs = folder / "snapshot.raw"
        run("qemu-img", "convert", "-O", "raw", "-l", f"snapshot.id={each['id']}", image, theirs)
    return Before(truth_of(image), disk, theirs)


def run_case(image: Path, was: Before, how: Made, loss: str, seed: str) -> Case:
    """One loss of *image*, which is left as it is, and and was as *was* says."""
    truth = was.truth
    case = Case(f"{how}, {loss}")
    damaged, out = image.with_suffix(".damaged"), image.with_suffix(".out")
    lose(image, damaged, loss, truth, seed)
    before = _fingerprint(damaged)
    out.unlink(missing_ok=True)
    try:
        with Image.open(str(damaged)) as opened:
            found = rescue(opened.source())
            _judge(case, truth, found)
            write_copy(opened, opened.generation(), found.plan, str(out))
        _judge_outcome(case, was, out, found)
        if was.snapshot is not None:
            _judge_snapshot(case, was.snapshot, out)
    except PlannerError as error:
        case.wrong.append(f"{type(error).__name__}: {error}")
    finally:
        if _fingerprint(damaged) != before:
            case.wrong.append("the source was changed")
        damaged.unlink(missing_ok=True)
        out.unlink(missing_ok=True)
    return case


def _fingerprint(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, status.st_mtime_ns, status.st_size


def _judge(case: Case, truth: Truth, found: Rescue) -> None:
    lost = {each.offset: each for each in found.placements}
    for offset, index in truth.tables.items():
        if offset in lost and offset in truth.with_data:
            sort = "metadata" if index in truth.of_metadata else "data"
            case.tables[sort] += 1
            case.placed[sort] += lost[offset].placed
            if not lost[offset].placed:
                case.missed.append(f"{sort} {index}: {lost[offset]}")
    for each in found.placements:
        if each.placed and truth.tables.get(each.offset) != each.l1_index:
            case.wrong.append(f"{each} belongs to {truth.tables.get(each.offset)}")
    kept = {index for offset, index in truth.tables.items() if offset not in lost}
    vacant = [n for n in range(truth.header.geometry.l1_entries_needed) if n not in kept]
    order = zip(sorted(lost), vacant, strict=False)
    case.by_order = sum(
        truth.tables.get(offset) == index for offset, index in order if offset in truth.with_data
    )


def _judge_outcome(case: Case, was: Before, out: Path, found: Rescue) -> None:
    truth, size = was.truth, was.truth.header.size
    header = found.after.layout.header if found.after.layout is not None else truth.header
    if found.headers.size is not None and found.headers.size.is_exact and header.size != size:
        case.wrong.append(f"the disk is said to have exactly {header.size} bytes, not {size}")
    coverage = truth.header.geometry.l2_coverage
    if not found.holes:
        # Without them it is to be the whole disk, however many tables found a place.
        case.wrong += _complaints("compare", "-f", "raw", "-F", "qcow2", was.disk, out)
        # What leaks is no harm: tables of nothing but zeros.
        case.wrong += _complaints("check", "-f", "qcow2", out, ends=(0, 3))
        case.is_whole = not case.wrong
        return
    first: list[str | Path] = [
        "qemu-io",
        "-r",
        "-f",
        "qcow2",
        "-c",
        f"read {found.holes[0] * coverage} 512",
        out,
    ]
    said = subprocess.run(first, check=False, capture_output=True, text=True)
    if "Input/output error" not in said.stdout + said.stderr:
        case.wrong.append(f"what is open can be read: {said.stdout}{said.stderr}")
    _make_zeros(out, header, found.holes)
    reads = out.with_suffix(".reads")
    try:
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", out, reads)
        case.wrong += _differences(was.disk, reads, coverage, frozenset(found.holes))
    finally:
        reads.unlink(missing_ok=True)


def _make_zeros(image: Path, header: Header, indices: tuple[int, ...]) -> None:
    """Empty those entries of the L1 table, so that `qemu-img` can read on behind them."""
    with image.open("r+b", buffering=0) as file:
        for index in indices:
            os.pwrite(file.fileno(), bytes(8), header.l1_table_offset + index * 8)


def _judge_snapshot(case: Case, was: Path, out: Path) -> None:
    """Whether *out* has a snapshot, and one that reads as it *was*."""
    listed = json.loads(run("qemu-img", "info", "--output=json", out)).get("snapshots", [])
    if len(listed) != 1:
        case.wrong.append(f"{len(listed)} snapshots are listed")
        return
    reads, name = out.with_suffix(".reads"), f"snapshot.id={listed[0]['id']}"
    try:
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", name, out, reads)
        said = _complaints("compare", "-f", "raw", "-F", "raw", was, reads)
        case.wrong += [f"the snapshot: {line}" for line in said]
    finally:
        reads.unlink(missing_ok=True)


def _complaints(*arguments: str | Path, ends: tuple[int, ...] = (0,)) -> list[str]:
    """What `qemu-img` says, where it ends otherwise than with one of *ends*."""
    done = subprocess.run(
        ["qemu-img", *arguments], check=False, capture_output=True, text=True, errors="replace"
    )
    if done.returncode in ends:
        return []
    return [f"qemu-img {arguments[0]}: {done.stdout[-300:]}{done.stderr[-300:]}"]


def _differences(was: Path, reads: Path, coverage: int, holes: frozenset[int]) -> list[str]:
    """The windows, of those that are no *holes*, of which the bytes of two raw disks differ."""
    with was.open("rb") as one, reads.open("rb") as other:
        files, wrong = (one.fileno(), other.fileno()), set()
        for start, end in itertools.chain.from_iterable(map(_extents, files)):
            for at in range(start, end, MIB):
                length = min(MIB, end - at)
                # Behind the end of one of them zeros are.
                first, second = (os.pread(fd, length, at).ljust(length, b"\0") for fd in files)
                if first != second:
                    differs = np.frombuffer(first, np.uint8) != np.frombuffer(second, np.uint8)
                    wrong.update(((np.flatnonzero(differs) + at) // coverage).tolist())
    return [f"what L1 entry {window} maps reads otherwise" for window in sorted(wrong - holes)]


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    size = os.fstat(fd).st_size
    source = FileSource(fd)
    yield from source.data_extents(0, size)
