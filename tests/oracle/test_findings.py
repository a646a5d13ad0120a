"""What `qemu-img check` really makes of single damages, pinned down, and that we agree.

Each is one word changed in one of a few small images. Most were surprises: places where the
specification, or a plain reading of QEMU, suggests another answer. Differences that we want are
in test_exceptions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from planner.qcow2.entries import COMPRESSED, COPIED, L2_OFFSET, ZERO
from planner.qcow2.header import CRYPT_AES, CRYPT_LUKS
from tests.images.matrix import Row, build, copy, run
from tests.oracle.judge import judge
from tests.oracle.scene import Anatomy, Scene, dissect

CLUSTER = 4096
TOP = (1 << 63) - (1 << 30)
"""QEMU reads nothing that reaches further; anywhere below, past the end of the file are zeros."""


@dataclass(frozen=True, slots=True)
class Base:
    """A small image: how it is made, and the tables that the damage goes by."""

    row: Row
    path: Path
    anatomy: Anatomy


CREATE = ("qemu-img", "create", "-q", "-f", "qcow2", "-o")
RECIPES: dict[str, tuple[Row, list[list[str]]]] = {
    "plain": (
        Row(cluster_bits=12),
        [
            [*CREATE, "cluster_size=4096", "@", "1M"],
            ["qemu-io", "-c", "write -q 0 64k", "@"],
            ["qemu-img", "snapshot", "-c", "snap", "@"],
            ["qemu-io", "-c", "write -q 0 8k", "@"],
        ],
    ),
    "v2": (
        Row(cluster_bits=12, version=2),
        [
            [*CREATE, "compat=0.10", "@", "1M"],
        ],
    ),
    "bitmap": (
        Row(cluster_bits=12),
        [
            [*CREATE, "cluster_size=4096", "@", "1M"],
            ["qemu-img", "bitmap", "--add", "-g", "512", "@", "b0"],
            ["qemu-img", "bitmap", "--add", "-g", "512", "@", "b1"],
            ["qemu-io", "-c", "write -q 0 64k", "@"],
        ],
    ),
    "extended": (
        Row(cluster_bits=14, extended_l2=True),
        [
            [*CREATE, "cluster_size=16k,extended_l2=on", "@", "1M"],
            ["qemu-io", "-c", "write -q 0 64k", "@"],
        ],
    ),
    "compressed": (
        Row(cluster_bits=12),
        [
            [*CREATE, "cluster_size=4096", "@", "1M"],
            ["qemu-io", "-c", "write -q -c 0 4k", "-c", "write -q -c 4k 4k", "@"],
        ],
    ),
    "one-bit": (
        Row(cluster_bits=9, refcount_bits=1),
        [
            [*CREATE, "cluster_size=512,refcount_bits=1", "@", "4M"],
            ["qemu-io", "-c", "write -q 0 3M", "@"],
        ],
    ),
    "luks": (Row(cluster_bits=12, encryption="luks"), []),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Each image is made when first asked for."""
    made: dict[str, Base] = {}

    def base(name: str) -> Base:
        if name not in made:
            row, commands = RECIPES[name]
            directory = tmp_path_factory.mktemp(name)
            path = directory / "base.qcow2"
            for command in commands:
                run(*(path if word == "@" else word for word in command))
            if not commands:
                path = build(row, directory, "findings")
            made[name] = Base(row, path, dissect(path))
        return made[name]

    return base


Change = Callable[[Scene], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """A change to a base, QEMU's exit code, and those of its counters that the change is about."""

    name: str
    base: str
    change: Change
    exit_code: int
    counters: dict[str, int]

    def __str__(self) -> str:
        return self.name


def _found(name: str, base: str, change: Change, exit_code: int, **counters: int) -> Finding:
    shown = {key.replace("_", "-"): value for key, value in counters.items()}
    return Finding(name, base, change, exit_code, shown)


def _header(offset: int, value: int, width: int = 8) -> Change:
    return lambda scene: scene.put(offset, value, width)


def _l1(value: int, index: int = 0) -> Change:
    return lambda scene: scene.put(scene.at.l1.offset + 8 * index, value)


def _l2(value: int, bitmap: int | None = None, index: int = 0) -> Change:
    def change(scene: Scene) -> None:
        table = scene.at.l2[0]
        scene.put(table.offset + table.width * index, value)
        if bitmap is not None:
            scene.put(table.offset + table.width * index + 8, bitmap)

    return change


def _reftable(value: int, index: int = 0) -> Change:
    return lambda scene: scene.put(scene.at.reftable.offset + 8 * index, value)


def _snapshot(offset: int, value: int, width: int = 8) -> Change:
    return lambda scene: scene.put(scene.at.snapshots[0].offset + offset, value, width)


def _bitmap(offset: int, value: int, width: int, in_use: bool) -> Change:
    def change(scene: Scene) -> None:
        for bitmap in scene.at.bitmaps:
            scene.put(bitmap.offset + 12, int(in_use), 4)
        scene.put(scene.at.bitmaps[0].offset + offset, value, width)

    return change


def _bitmap_entry(value: int, in_use: bool) -> Change:
    def change(scene: Scene) -> None:
        for bitmap in scene.at.bitmaps:
            scene.put(bitmap.offset + 12, int(in_use), 4)
        scene.put(scene.at.bitmap_tables[0].offset, value)

    return change


def _same_names(in_use: bool) -> Change:
    def change(scene: Scene) -> None:
        first, second = scene.at.bitmaps
        scene.write(second.offset + 24, first.name)
        for bitmap in scene.at.bitmaps:
            scene.put(bitmap.offset + 12, int(in_use), 4)

    return change


def _bitmaps(offset: int, value: int, width: int = 8) -> Change:
    def change(scene: Scene) -> None:
        start = scene.at.bitmaps_extension
        assert start is not None
        scene.put(start + offset, value, width)

    return change


def _crypto(offset: int, value: int) -> Change:
    def change(scene: Scene) -> None:
        start = scene.at.crypto_extension
        assert start is not None
        scene.put(start + offset, value)

    return change


def _extension(kind: int, length: int, data: bytes = b"") -> Change:
    def change(scene: Scene) -> None:
        scene.put(scene.at.extension_area, kind, 4)
        scene.put(scene.at.extension_area + 4, length, 4)
        scene.write(scene.at.extension_area + 8, data)

    return change


def _both(*changes: Change) -> Change:
    def change(scene: Scene) -> None:
        for each in changes:
            each(scene)

    return change


def _shared_refblock(scene: Scene) -> None:
    scene.put(scene.at.reftable.offset + 8, scene.at.refblocks[0])


def _misaligned_data(bitmap: int) -> Change:
    def change(scene: Scene) -> None:
        table = scene.at.l2[0]
        scene.put(table.offset, (scene.get(table.offset) & L2_OFFSET) + 512 | COPIED)
        scene.put(table.offset + 8, bitmap)

    return change


def _compressed_at(from_end: int, sectors: int) -> Change:
    def change(scene: Scene) -> None:
        offset = -(-scene.size // 512) * 512 + from_end
        shift = scene.at.geometry.compressed_shift
        scene.put(scene.at.l2[0].offset, COMPRESSED | offset | (sectors - 1) << shift)

    return change


def _resized(by: int) -> Change:
    return lambda scene: scene.resize(scene.size + by)


def _nothing(scene: Scene) -> None:
    pass


HUGE = (1 << 62, 1 << 56, 1 << 40, 1 << 20)
UNREADABLE = (TOP, (1 << 63) - CLUSTER, 1 << 63, (1 << 64) - CLUSTER)

TABLES = [
    _found("clean", "plain", _nothing, 0, allocated_clusters=16, fragmented_clusters=1),
    # An L1 entry is skipped only where all of it is 0. Offset 0 walks the header as an L2 table.
    *(
        _found(f"l1-entry-without-offset-{word:#x}", "plain", _l1(word), 2, allocated_clusters=7)
        for word in (1, 0x1FF, COPIED, 1 << 62, 1 << 56)
    ),
    _found("l1-entry-zero", "plain", _l1(0), 3, allocated_clusters=0, leaks=17),
    _found("l2-table-past-the-end", "plain", _l1(1 << 40), 2, corruptions=1),
    _found("l2-table-past-the-end-copied", "plain", _l1(1 << 40 | COPIED), 2, corruptions=2),
    *(
        _found(f"l1-table-unreadable-{offset:#x}", "plain", _header(40, offset), 1)
        for offset in UNREADABLE
    ),
    _found("l1-size-zero", "plain", _header(36, 0, 4), 1),
    # Reads of a refcount block far outside give zeros; further than any file, they fail.
    *(_found(f"refblock-outside-{o:#x}", "plain", _reftable(o), 2, corruptions=29) for o in HUGE),
    *(
        _found(
            f"refblock-unreadable-{offset:#x}",
            "plain",
            _reftable(offset),
            1,
            check_errors=26,
            corruptions=1,
            image_end_offset=CLUSTER,
        )
        for offset in UNREADABLE
    ),
    _found("refblock-unreadable-unused", "plain", _reftable(1 << 63, 1), 2, corruptions=1),
    _found("no-reftable", "plain", _header(56, 0, 4), 2, corruptions=27, leaks=0),
    _found("reftable-unreadable", "plain", _header(48, TOP), 1),
    _found("shared-refblock", "plain", _shared_refblock, 2, corruptions=2),
    # With one bit there is no second reference: an overflow, and then the count is 1 after all.
    _found("shared-refblock-one-bit", "one-bit", _shared_refblock, 2, corruptions=1, leaks=1),
    _found("compressed-within-last-cluster", "compressed", _compressed_at(0, 7), 0),
    _found("compressed-a-cluster-too-far", "compressed", _compressed_at(0, 8), 2, corruptions=1),
]

SUBCLUSTERS = [
    _found("subclusters-bit-0-ignored", "extended", _l2(ZERO, 0, index=8), 0),
    _found("subclusters-zero-unallocated", "extended", _l2(0, 1 << 40, index=8), 0),
    _found("subclusters-unallocated", "extended", _l2(0, 1, index=8), 2, corruptions=1),
    _found("subclusters-copied-only", "extended", _l2(COPIED, 1, index=8), 2, corruptions=1),
    _found(
        "subclusters-compressed",
        "extended",
        _l2(COMPRESSED | 0x4000, 1, index=8),
        2,
        corruptions=1,
        allocated_clusters=4,
        compressed_clusters=0,
    ),
    _found(
        "subclusters-compressed-copied",
        "extended",
        _l2(COMPRESSED | COPIED | 0x4000, 1 << 32, index=8),
        2,
        corruptions=2,
        allocated_clusters=4,
    ),
    *(
        _found(f"subclusters-misaligned-{b:#x}", "extended", _misaligned_data(b), 2, corruptions=2)
        for b in (0, 1, 1 << 32)
    ),
]

SNAPSHOTS = [
    *(
        _found(f"snapshot-l1-outside-{o:#x}", "plain", _snapshot(0, o), 2, corruptions=1, leaks=18)
        for o in HUGE
    ),
    *(_found(f"snapshot-l1-unreadable-{o:#x}", "plain", _snapshot(0, o), 1) for o in UNREADABLE),
    _found("snapshot-l1-misaligned", "plain", _snapshot(0, 1), 2, corruptions=1, leaks=18),
    _found("snapshot-l1-is-the-header", "plain", _snapshot(0, 0), 2, corruptions=3, leaks=18),
    _found(
        "snapshot-l1-empty-unreadable",
        "plain",
        _both(_snapshot(0, 1 << 63), _snapshot(8, 0, 4)),
        3,
        corruptions=0,
        leaks=18,
    ),
    _found("snapshots-misaligned-none", "plain", _both(_header(60, 0, 4), _header(64, 512)), 1),
    _found("snapshots-far-none", "plain", _both(_header(60, 0, 4), _header(64, 1 << 40)), 3),
    _found("snapshots-far", "plain", _header(64, 1 << 40), 2, corruptions=2, leaks=19),
    _found("snapshots-unreadable", "plain", _header(64, (1 << 63) - CLUSTER), 1),
    _found("snapshots-too-many", "plain", _header(60, 65537, 4), 1),
]

BITMAPS = [
    _found("bitmap-clean", "bitmap", _nothing, 0),
    *(
        _found(f"bitmap-entry-malformed-{w:#x}-{u}", "bitmap", _bitmap_entry(w, u), 1)
        for w in (0x200, 1 << 60, 2, 0x5001)
        for u in (False, True)
    ),
    *(
        _found(f"bitmap-entry-far-{u}", "bitmap", _bitmap_entry(1 << 40, u), 2, corruptions=1)
        for u in (False, True)
    ),
    # Its size must fit exactly, where QEMU loads it: it loads what is not in use.
    _found("bitmap-size-loaded", "bitmap", _bitmap(8, 2, 4, in_use=False), 1),
    _found("bitmap-size-in-use", "bitmap", _bitmap(8, 2, 4, in_use=True), 0),
    _found("bitmap-size-disk-of-a-byte", "bitmap", _header(24, 0x1FF), 1),
    *(
        _found(f"bitmap-far-{u}", "bitmap", _bitmap(0, 1 << 40, 8, u), 2, corruptions=1)
        for u in (False, True)
    ),
    *(
        _found(f"bitmap-unreadable-{u}", "bitmap", _bitmap(0, 1 << 63, 8, u), 1)
        for u in (False, True)
    ),
    _found("bitmap-flag-extra-data", "bitmap", _bitmap(12, 4, 4, in_use=False), 1),
    _found("bitmaps-same-name-loaded", "bitmap", _same_names(in_use=False), 1),
    _found("bitmaps-same-name-in-use", "bitmap", _same_names(in_use=True), 0),
    _found("bitmaps-too-few", "bitmap", _bitmaps(0, 3, 4), 1),
    _found("bitmaps-too-many", "bitmap", _bitmaps(0, 1, 4), 1),
    _found("bitmaps-directory-far", "bitmap", _bitmaps(16, 1 << 40), 1),
    _found("bitmaps-stale", "bitmap", _header(88, 0), 3, corruptions=0),
    _found("bitmaps-stale-none", "bitmap", _both(_header(88, 0), _bitmaps(0, 0, 4)), 3),
    _found("bitmaps-stale-misaligned", "bitmap", _both(_header(88, 0), _bitmaps(16, 512)), 3),
    _found("bitmaps-stale-short", "bitmap", _both(_header(88, 0), _bitmaps(-4, 16, 4)), 1),
    _found("bitmaps-vouched-but-absent", "bitmap", _bitmaps(-8, 0x12345678, 4), 3),
]

HEADER = [
    *(_found(f"virtual-size-{s:#x}", "plain", _header(24, s), 1) for s in (1 << 62, 1 << 63)),
    *(_found(f"compatible-bit-{b}", "plain", _header(80, 1 << b), 0) for b in (1, 63)),
    *(_found(f"autoclear-bit-{b}", "plain", _header(88, 1 << b), 0) for b in (2, 63)),
    _found("autoclear-raw-without-data-file", "plain", _header(88, 2), 1),
    *(_found(f"incompatible-bit-{b}", "plain", _header(72, 1 << b), 1) for b in (3, 4, 5, 63)),
    *(_found(f"incompatible-{b}", "plain", _header(72, b), 0) for b in (1, 2, 3)),
    *(_found(f"header-length-{n}", "plain", _header(100, n, 4), 0) for n in (104, 105, CLUSTER)),
    *(_found(f"header-length-{n}", "plain", _header(100, n, 4), 1) for n in (103, CLUSTER + 1)),
    _found("crypt-3", "plain", _header(32, 3, 4), 1),
    _found("crypt-luks-without-header", "plain", _header(32, CRYPT_LUKS, 4), 1),
    _found("crypt-aes-with-luks-header", "luks", _header(32, CRYPT_AES, 4), 1),
    _found("luks-header-too-long", "luks", _crypto(8, 1 << 40), 2, corruptions=1),
    # As a signed number that is less than nothing: not counted, and no corruption either.
    _found("luks-header-negative", "luks", _crypto(8, (1 << 64) - 1), 3, corruptions=0),
    _found("luks-header-misaligned", "luks", _crypto(0, CLUSTER + 512), 1),
    _found("extension-fills-the-cluster", "v2", _extension(0x1234, 65536 - 80), 0),
    _found("extension-too-long", "v2", _extension(0x1234, 65536 - 79), 1),
    _found("extension-end-too-long", "v2", _extension(0, 65536), 1),
    _found("extension-end-with-length", "v2", _extension(0, 8), 0),
    _found("backing-format-15", "v2", _extension(0xE2792ACA, 15, b"a" * 15), 0),
    _found("backing-format-16", "v2", _extension(0xE2792ACA, 16, b"a" * 16), 1),
    _found("bitmaps-in-version-2", "v2", _extension(0x23852875, 24), 0),
    _found("data-file-name-in-version-2", "v2", _extension(0x44415441, 3, b"abc"), 0),
    _found("feature-names-cut-off", "v2", _extension(0x6803F857, 50), 0),
]

FILES = [
    *(
        _found(f"cut-by-{n}", "plain", _resized(-n), code)
        for n, code in ((1, 0), (512, 0), (CLUSTER - 1, 0), (CLUSTER, 2), (CLUSTER + 1, 2))
    ),
    *(_found(f"grown-by-{n}", "plain", _resized(n), 0) for n in (1, 511, 512, CLUSTER + 1)),
]


@pytest.mark.parametrize(
    "finding", [*TABLES, *SUBCLUSTERS, *SNAPSHOTS, *BITMAPS, *HEADER, *FILES], ids=str
)
def test_finding(finding: Finding, bases: Callable[[str], Base]) -> None:
    base = bases(finding.base)
    image = base.path.with_name("case.qcow2")
    copy(base.path, image)
    with Scene(image, base.anatomy) as scene:
        finding.change(scene)
    judged = judge(base.row, image)
    assert judged.qemu.exit_code == finding.exit_code, judged.qemu
    seen = {name: judged.qemu.counters[name] for name in finding.counters}
    assert seen == finding.counters, judged.qemu
    assert not judged.exception
    assert judged.agreed, judged
