"""Seeded damage to images with a file system: which files are said to be hit, and which are.

What is true is what the same readers say of the disk before the damage; that this is right,
debugfs, xfs_db and the tools of ntfs-3g judge in `tests/planner/guestfs`. Which ranges are damaged
is the check's word: here is only asked whose they are.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from instarfs.guest.files import hit_files
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest, Part, Place
from instarfs.image.file import Image
from planner.arrays import I64, join_ranges
from planner.check.check import check_image
from planner.errors import ImageError
from planner.guestfs.files import FilesUnknown, HitFiles
from planner.guestfs.overlaps import overlaps
from planner.guestfs.protocol import NO_INODE
from planner.guestfs.volumes.find import find_volumes
from planner.triage.guest_damage import GuestHarm
from planner.triage.triage import triage_leaks
from tests.images.guest_files import make_ext, make_tree
from tests.images.guest_filled import fill_ntfs, make_ntfs, make_xfs, mounted_ntfs
from tests.images.random_damage import KINDS
from tests.oracle.scene import Anatomy, FileSource, Scene, dissect

MIB = 1 << 20
START = MIB
TABLES = {
    "none": "",
    "mbr": "label: dos\nstart=2048, size={sectors}, type=83\n",
    "gpt": "label: gpt\nstart=2048, size={sectors}\n",
}
FILE_SYSTEMS = ("ext4", "ext2", "xfs", "ntfs")


@dataclass(frozen=True, slots=True)
class Truth:
    """Whose each byte of the disk is: extents in columns, on the disk, ascending by nothing.

    The first ``records`` rows are the records of inodes. ``paths``: of each inode; ``above``: all
    directories on the way to it.
    """

    start: I64
    end: I64
    inode: I64
    records: int
    paths: dict[int, set[bytes]]
    above: dict[int, set[int]]

    def hit(self, start: I64, end: I64) -> set[int]:
        """The inodes that have any byte of the ranges, which ascend and are disjoint."""
        over = overlaps(self.start, self.end, start, end)
        return set(np.unique(self.inode[over.row]).tolist())

    def records_hit(self, start: I64, end: I64) -> set[int]:
        """Those whose records have any."""
        own = slice(self.records)
        over = overlaps(self.start[own], self.end[own], start, end)
        return set(np.unique(self.inode[own][over.row]).tolist())


@dataclass(frozen=True, slots=True)
class Setting:
    """An image that is to be damaged, and the truth about its disk."""

    name: str
    image: Path
    anatomy: Anatomy
    truth: Truth


@dataclass(slots=True)
class Case:
    """What came of one damage: numbers of inodes, and what was said that is not so."""

    name: str
    done: list[str]
    expected: int = 0
    found: int = 0
    unreadable: bool = False
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@contextmanager
def settings(seed: int, kinds: tuple[str, ...] = FILE_SYSTEMS) -> Iterator[list[Setting]]:
    """One of each file system under each table."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_tree(root / "tree", seed, files=60)
        made = []
        for kind in kinds:
            _make(kind, root / kind, root / "tree", seed)
            made += [_setting(kind, table, root / kind) for table in TABLES]
        yield made


def _make(kind: str, path: Path, tree: Path, seed: int) -> None:
    if kind == "xfs":
        make_xfs(path, tree, [])
    elif kind == "ntfs":
        for hostile in (tree / "dir 1").glob(
            "*ostile"
        ):  # bytes that no text is, which NTFS does not take
            hostile.unlink()
        make_ntfs(path, [])
        with mounted_ntfs(path) as folder:
            fill_ntfs(folder, tree, seed)
    else:
        make_ext(path, tree, ["-t", kind, "-b", "1024"], 32 * MIB)


def _setting(kind: str, table: str, filesystem: Path) -> Setting:
    disk = filesystem.with_name(f"{kind}-{table}.raw")
    size = filesystem.stat().st_size
    if table == "none":
        disk = filesystem
    else:
        script = TABLES[table].format(sectors=size // 512)
        with disk.open("wb") as file:
            file.truncate(size + 2 * MIB)
        subprocess.run(["sfdisk", "--quiet", disk], input=script, text=True, check=True)
        command = ["dd", f"if={filesystem}", f"of={disk}", "bs=1M", "seek=1", "conv=notrunc,sparse"]
        subprocess.run(command, check=True, capture_output=True)
    image = disk.with_suffix(".qcow2")
    options = ["-o", "cluster_size=4096"]
    convert: list[str | Path] = ["qemu-img", "convert", "-O", "qcow2", *options, disk, image]
    subprocess.run(convert, check=True)
    with disk.open("rb") as file:
        truth = _truth(FileSource(file.fileno()))
    return Setting(f"{kind}-{table}", image, dissect(image), truth)


def _truth(source: FileSource) -> Truth:
    (volume,) = find_volumes(source).volumes
    filesystem = volume.filesystem
    assert filesystem is not None
    first = volume.space.segments[0].legs[0]
    whole = np.array([0]), np.array([filesystem.size])
    parts = [filesystem.records(*whole), *filesystem.extents()]
    columns = [(part.start, part.length, part.inode) for part in parts]
    start, length, inode = (np.concatenate(each) for each in zip(*columns, strict=True))
    mine = inode != NO_INODE
    inside: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for names in filesystem.names():
        for row in range(len(names)):
            inside[int(names.parent[row])].append((names.name(row), int(names.child[row])))
    paths: dict[int, set[bytes]] = defaultdict(set, {filesystem.root: {b"/"}})
    above: dict[int, set[int]] = defaultdict(set)
    folders: list[tuple[int, bytes, set[int]]] = [(filesystem.root, b"", set())]
    while folders:
        folder, path, way = folders.pop()
        for name, child in inside.pop(folder, []):
            paths[child].add(path + b"/" + name)
            above[child] |= way | {folder}
            folders.append((child, path + b"/" + name, way | {folder}))
    return Truth(
        start[mine] + first,
        (start + length)[mine] + first,
        inode[mine],
        len(parts[0]),
        dict(paths),
        dict(above),
    )


def run(made: list[Setting], seed: int, number: int, folder: Path) -> Case:
    """One case: some damage to one of the images."""
    rng = random.Random(f"{seed} {number}")
    setting = made[number % len(made)]
    path = folder / "case.qcow2"
    shutil.copyfile(setting.image, path)
    with Scene(path, setting.anatomy) as scene:
        case = Case(setting.name, _inflict_one(scene, rng))
    found = _found(path)
    if isinstance(found, HitFiles):
        _judge(case, setting.truth, found)
    else:
        case.unreadable = True
    return case


def _inflict_one(scene: Scene, rng: random.Random) -> list[str]:
    """One kind of damage: of two the second may hide the first from every check.

    None that has an entry lead to a new cluster of zeros: that it did otherwise nobody can tell.
    """
    names = [name for name in KINDS if not name.startswith("grown")]
    while True:
        name = rng.choice(names)
        what = KINDS[name].inflict(scene, rng)
        if what is not None:
            return [f"{name}: {what}"]


def _found(path: Path) -> HitFiles | FilesUnknown | None:
    with Image.open(str(path)) as image:
        report = check_image(image.source())
        if report.error is not None:
            return None
        try:
            triage = triage_leaks(image.source(), report)
            return hit_files(Guest(image, Follow()), Place(Part.DISK), report, triage)
        except ImageError:
            return None


def _judge(case: Case, truth: Truth, found: HitFiles) -> None:
    hits = found.hits
    harmed = join_ranges(hits.start, hits.start + hits.length)
    expected = truth.hit(*harmed)
    case.expected = len(expected)
    case.unreadable = bool(expected) and not any(v.filesystem for v in found.layout.volumes)
    if case.unreadable:
        return
    # What cannot be named is what hangs on bytes that are not to be believed.
    doubted = np.isin(hits.harm, (GuestHarm.LOST, GuestHarm.SUSPECT, GuestHarm.MISSING))
    ranges = join_ranges(hits.start[doubted], (hits.start + hits.length)[doubted])
    unsure, recordless = truth.hit(*ranges), truth.records_hit(*ranges)
    named: dict[int, set[bytes]] = defaultdict(set)
    for row in found.rows():
        if row.inode is not None and row.path is not None:
            named[row.inode].add(row.path)
    case.found = len(named)
    # Of one whose record is lost only a bitmap or a name can tell that it was in use.
    for inode in sorted(expected - set(named) - recordless):
        case.lost.append(f"inode {inode}: {truth.paths.get(inode)}")
    for inode in sorted(set(named) - expected):
        case.wrong.append(f"inode {inode}: {named[inode]}")
    for inode in sorted(expected & set(named)):
        known, told = truth.paths.get(inode, set()), named[inode]
        is_sure = not (truth.above.get(inode, set()) & unsure)
        # NTFS keeps names with the files too, and they are taken from there.
        is_sure &= inode not in recordless or not case.name.startswith("ntfs")
        whole = {path for path in told if path.startswith(b"/")}
        if is_sure and known and told != known:
            case.lost.append(f"inode {inode}: {known} is called {told}")
        if whole - known:
            case.wrong.append(f"inode {inode}: {known} is called {whole}")
