"""What is lost, and what is only leaked, in images that QEMU wrote."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from instarfs.render.aftermath import Aftermath
from instarfs.render.report import report_txt
from planner.check.check import check_image
from planner.qcow2.bitmaps import Bitmap, read_bitmaps
from planner.qcow2.header import Header, read_header
from planner.qcow2.layout import Layout
from planner.repair.plan import DETERMINED, RepairTier
from planner.repair.tiers import propose
from planner.source import Bytes
from planner.triage.triage import Triage, triage_leaks
from tests.images.matrix import run

SHAPES = [
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,compat=0.10",
    "cluster_size=4k,refcount_bits=64,lazy_refcounts=on",
]
L1_ENTRIES = 4
NB_SNAPSHOTS_AT = 60


def create(directory: Path, options: str) -> tuple[Path, Header]:
    """A disk that has written data behind each of its `L1_ENTRIES` L1 entries."""
    path = directory / "disk.qcow2"
    size = dict(word.split("=") for word in options.split(","))["cluster_size"]
    cluster = int(size[:-1]) << 10
    coverage = cluster * cluster // (16 if "extended_l2" in options else 8)
    virtual = L1_ENTRIES * coverage
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(virtual))
    for number in range(L1_ENTRIES):
        write(path, f"write -q -P {65 + number} {number * coverage} {8 * cluster}")
    return path, header_of(path)


def read_bitmaps_of(path: Path) -> tuple[Bitmap, ...]:
    source = Bytes(path.read_bytes())
    layout = Layout.read(source)
    pointer = layout.extensions.bitmaps
    assert pointer is not None
    return tuple(read_bitmaps(source, pointer, layout.geometry))


def write(path: Path, *commands: str) -> None:
    run("qemu-io", *(word for command in commands for word in ("-c", command)), path)


def header_of(path: Path) -> Header:
    return read_header(Bytes(path.read_bytes()[:4096]))


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def examine(path: Path) -> tuple[Triage, str, bool]:
    """The triage, the report for a reader, and whether `leaks` wants its plan quoted."""
    source = Bytes(path.read_bytes())
    report = check_image(source)
    triage = triage_leaks(source, report)
    proposals = {tier: propose(source, report, tier, triage=triage) for tier in DETERMINED}
    text = report_txt(report, str(path), Aftermath(triage, proposals)).decode()
    return triage, text, proposals[RepairTier.LEAKS].needs_quote


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("l1_index", [0, L1_ENTRIES - 1])
def test_a_zeroed_l1_entry_is_named_with_its_table_and_what_it_mapped(
    tmp_path: Path, options: str, l1_index: int
) -> None:
    path, header = create(tmp_path, options)
    at = header.l1_table_offset + 8 * l1_index
    table = int.from_bytes(path.read_bytes()[at : at + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    patch(path, at, bytes(8))
    triage, text, needs_quote = examine(path)
    (suspect,) = triage.suspects
    assert suspect.offset == table
    coverage = header.geometry.l2_coverage
    assert f"the leaked cluster at {table} looks like a lost L2 table" in text
    assert (
        f"it could have mapped {coverage} bytes at guest offset {l1_index * coverage}"
        f" (L1 entry {l1_index} is empty)"
    ) in text
    assert needs_quote


BITMAP_DAMAGE = {
    "zero": lambda _: 0,
    "misaligned": lambda word: word | 512,
    "past the end": lambda word: word + (1 << 40),
    "reserved": lambda word: word | 1 << 60,
}


@pytest.mark.parametrize("what", BITMAP_DAMAGE)
@pytest.mark.parametrize("which", [0, 1, 3])
def test_what_a_bitmap_has_lost_is_not_missing_from_the_disk(
    tmp_path: Path, which: int, what: str
) -> None:
    """Four clusters of a bitmap, and one of a disk that has room for more."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "64M")
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "backup")
    write(path, *(f"write -q {number << 24} 64k" for number in range(4)))
    (bitmap,) = read_bitmaps_of(path)
    at = bitmap.bitmap_table_offset + 8 * which
    word = int.from_bytes(path.read_bytes()[at : at + 8], "big")
    assert word
    patch(path, at, BITMAP_DAMAGE[what](word).to_bytes(8, "big"))
    source = Bytes(path.read_bytes())
    triage = triage_leaks(source, check_image(source))
    assert triage.leaked == 1
    # Of the first there is no entry before it that would show that it was not the disk's.
    assert (triage.losses.missing == 0) == ((which, what) != (0, "zero"))


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("left", [0, 1])
def test_a_lowered_number_of_snapshots_is_told_with_their_names(
    tmp_path: Path, options: str, left: int
) -> None:
    path, _ = create(tmp_path, options)
    for name in ("before upgrade", "after upgrade"):
        run("qemu-img", "snapshot", "-c", name, path)
        write(path, "write -q -P 1 0 64k", f"write -q -P 2 {header_of(path).size - 65536} 64k")
    patch(path, NB_SNAPSHOTS_AT, left.to_bytes(4, "big"))
    triage, text, needs_quote = examine(path)
    lost = ["before upgrade", "after upgrade"][left:]
    assert [snapshot.name.decode() for snapshot in triage.snapshots] == lost
    assert any(suspect.is_l1 and suspect.snapshot for suspect in triage.suspects)
    for name in lost:
        assert f"a snapshot that the header does not count: '{name}'" in text
    assert "missing: a snapshot that the image no longer counts" in text
    assert needs_quote


CONTENTS = {
    "a pattern": b"\xa5",
    "zeros": b"\0",
    "text": b"the quick brown fox jumps over the lazy dog\n",
    "small numbers": b"\0\0\0\0\0\1\0\0",
    "noise": random.Random(1).randbytes(1 << 16),
}


@pytest.mark.parametrize(
    ("options", "content"),
    [(SHAPES[0], content) for content in CONTENTS] + [(shape, "noise") for shape in SHAPES[1:]],
)
def test_leaked_data_is_no_alarm(tmp_path: Path, options: str, content: str) -> None:
    """A crash between the allocation of clusters, the last of the file, and their entries."""
    path, header = create(tmp_path, options)
    cluster, last = header.geometry.cluster_size, L1_ENTRIES - 1
    size, piece = 4 * cluster, CONTENTS[content]
    (tmp_path / "data").write_bytes((piece * (size // len(piece) + 1))[:size])
    guest = last * header.geometry.l2_coverage + size
    write(path, f"write -q -s {tmp_path / 'data'} {guest} {size}")
    at = header.l1_table_offset + 8 * last
    table = int.from_bytes(path.read_bytes()[at : at + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    width = header.geometry.l2_entry_size
    patch(path, table + 4 * width, bytes(4 * width))
    triage, text, needs_quote = examine(path)
    assert triage.leaked == 4
    assert not triage.suspects
    assert "nothing among them looks like a lost table" in text
    # So many bytes may be missing, all the same: if not their content, then zeros in their place.
    missing = f"missing: up to {size} bytes, which leaked clusters may hold"
    assert (missing in text) == (content != "zeros")
    assert not needs_quote
