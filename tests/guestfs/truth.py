"""Whose each byte of an undamaged disk is, and which files nobody can know of once it is damaged.

It is what our readers say of the disk before the damage; that they are right, the tools of each
file system say first (`tests.planner.guestfs.judges`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.arrays import I64
from planner.guestfs.btrfs.filesystem import Btrfs
from planner.guestfs.btrfs.inodes import are_subvolumes
from planner.guestfs.btrfs.roots import EXTENT_TREE
from planner.guestfs.btrfs.trees import Places
from planner.guestfs.fat.filesystem import Fat
from planner.guestfs.fat.volume import FIRST
from planner.guestfs.ntfs.filesystem import Ntfs
from planner.guestfs.overlaps import overlaps
from planner.guestfs.protocol import NO_INODE, Extents, FileSystem, What
from planner.guestfs.volumes.find import find_volumes
from planner.source import Source

ENTRY = 32
NAME_ENTRIES = 20
"""Of a directory of a FAT: where the parts of a name are, before or, in exFAT, behind the entry."""

Tree = dict[int, set[int]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Ranges of the disk and the inodes that have them, in any order; two can have the same."""

    start: I64
    end: I64
    inode: I64

    @classmethod
    def of(cls, parts: Sequence[Extents], first: int) -> Rows:
        """Those of files; *first*: where on the disk the file system begins."""
        columns = [(part.start, part.length, part.inode) for part in parts]
        start, length, inode = (np.concatenate(each) for each in zip(*columns, strict=True))
        mine = inode != NO_INODE
        return cls(start[mine] + first, (start + length)[mine] + first, inode[mine])

    def hit(self, start: I64, end: I64) -> set[int]:
        """The inodes that have any byte of the ranges, which ascend and are disjoint."""
        over = overlaps(self.start, self.end, start, end)
        return set(np.unique(self.inode[over.row]).tolist())


@dataclass(frozen=True, slots=True)
class FatRows:
    """What is known of the files of a FAT: their ``entries``, ``names``, which are beside those,
    and their ``chains`` in the first of its tables, each of which is *step* bytes behind the last.

    ``by_cluster``: directories by the place of their first cluster.
    """

    entries: Rows
    names: Rows
    chains: Rows
    copies: int
    step: int
    by_cluster: dict[int, int]


@dataclass(frozen=True, slots=True)
class Truth:
    """``owned``: all that files have; ``records``: of inodes. ``paths``: of each inode;
    ``parents``, ``above``: the directories that name it, and all on the way to those. ``goes_on``:
    records of NTFS that go on another one: with what they go on lost they look like files.
    ``btrfs``: what leads to its leaves with files, and what knows them all the same.
    """

    owned: Rows
    records: Rows
    paths: dict[int, set[bytes]]
    parents: Tree
    above: Tree
    goes_on: dict[int, int]
    fat: FatRows | None
    btrfs: tuple[Rows, Rows] | None

    def unknowable(self, start: I64, end: I64) -> tuple[set[int], set[int]]:
        """What the ranges, lost, take with them: files that nobody can know of, and those that
        nobody can know the whole names of.
        """
        if self.fat is not None:
            return self._unknowable_of_fat(self.fat, start, end)
        if self.btrfs is not None and all(rows.hit(start, end) for rows in self.btrfs):
            return set(self.above), set(self.above)
        unsure = self.owned.hit(start, end)
        nameless = {each for each, above in self.above.items() if above & unsure}
        # One whose record is lost is still in the bitmap, and in its directory.
        lost = {
            each for each in self.records.hit(start, end) if self.parents.get(each, set()) <= unsure
        }
        return lost, nameless

    def _unknowable_of_fat(self, fat: FatRows, start: I64, end: I64) -> tuple[set[int], set[int]]:
        low, high = start, end
        for copy in range(1, fat.copies):
            both = overlaps(low, high, start - copy * fat.step, end - copy * fat.step)
            order = np.argsort(both.start)
            low, high = both.start[order], both.end[order]
        unchained = fat.chains.hit(low, high)
        unlisted, unnamed = fat.entries.hit(start, end), fat.names.hit(start, end)
        doubted = unchained | self.owned.hit(start, end)
        gone = unchained | unlisted
        lost = gone - {0}
        for inode, above in self.above.items():
            way = above & gone
            # Below a directory that is found again all is known but the names above.
            if way & doubted or (way and not fat.by_cluster):
                lost.add(inode)
        nameless = {
            each for each, above in self.above.items() if (above | {each}) & (unnamed | gone)
        }
        return lost, nameless


def truth_of(source: Source) -> Truth:
    """What is so on a disk with one file system."""
    (volume,) = find_volumes(source).volumes
    filesystem = volume.filesystem
    assert filesystem is not None
    first = volume.space.segments[0].legs[0]
    records = filesystem.records(np.array([0]), np.array([filesystem.size]))
    extents = list(filesystem.extents())
    paths, parents, above = _tree(filesystem)
    return Truth(
        Rows.of([records, *extents], first),
        Rows.of([records], first),
        paths,
        parents,
        above,
        _goes_on(filesystem) if isinstance(filesystem, Ntfs) else {},
        _fat_rows(filesystem, extents, paths, first) if isinstance(filesystem, Fat) else None,
        _btrfs_rows(filesystem, first) if isinstance(filesystem, Btrfs) else None,
    )


def _btrfs_rows(filesystem: Btrfs, first: int) -> tuple[Rows, Rows]:
    forest = filesystem._forest
    leading, others = [forest.root], [forest.root]
    for step in forest.trees.walk(forest.others):
        leading.append(step.place.select(are_subvolumes(step.place.tree) & (step.place.level > 0)))
        others.append(step.place.select(step.place.tree == EXTENT_TREE))

    def rows(places: list[Places]) -> Rows:
        at = forest.trees.copies(Places.joined(places).logical).reshape(-1)
        at = at[at >= 0] + first
        return Rows(at, at + forest.trees.superblock.node_size, np.zeros(len(at), dtype=np.int64))

    return rows(leading), rows(others)


def _tree(filesystem: FileSystem) -> tuple[dict[int, set[bytes]], Tree, Tree]:
    inside: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for names in filesystem.names():
        for row in range(len(names)):
            inside[int(names.parent[row])].append((names.name(row), int(names.child[row])))
    paths: dict[int, set[bytes]] = defaultdict(set, {filesystem.root: {b"/"}})
    parents: Tree = defaultdict(set)
    above: Tree = defaultdict(set)
    folders: list[tuple[int, bytes, set[int]]] = [(filesystem.root, b"", set())]
    while folders:
        folder, path, way = folders.pop()
        for name, child in inside.pop(folder, []):
            paths[child].add(path + b"/" + name)
            parents[child].add(folder)
            above[child] |= way | {folder}
            folders.append((child, path + b"/" + name, way | {folder}))
    return dict(paths), dict(parents), dict(above)


def _goes_on(filesystem: Ntfs) -> dict[int, int]:
    found: dict[int, int] = {}
    for records in filesystem._table.walk():
        some = records.base > 0
        found.update(zip(records.number[some].tolist(), records.base[some].tolist(), strict=True))
    return found


def _fat_rows(
    filesystem: Fat, extents: list[Extents], paths: dict[int, set[bytes]], first: int
) -> FatRows:
    volume = filesystem._volume
    inode = np.array(sorted(paths.keys() - {filesystem.root}), dtype=np.int64)
    place = inode + first
    beside = NAME_ENTRIES * ENTRY
    entries, names = Rows(place, place + ENTRY, inode), Rows(place - beside, place + ENTRY, inode)
    if volume.is_exfat:  # of which all entries of a file are needed
        entries = names = Rows(place, place + beside, inode)
    rows, by_cluster = [], dict[int, int]()
    for each in extents:
        some = each.select((each.inode != NO_INODE) & (each.start >= volume.heap))
        rows.append(some)
        begins = (some.what == What.DIRECTORY) & (some.file_offset == 0)
        by_cluster.update(
            zip(some.start[begins].tolist(), some.inode[begins].tolist(), strict=True)
        )
    data = Rows.of(rows, -volume.heap)
    table = first + volume.tables[0]
    low = (data.start // volume.cluster_size + FIRST) * volume.bits // 8
    high = (data.end // volume.cluster_size + FIRST) * volume.bits // 8 + 1
    step = volume.tables[1] - volume.tables[0] if len(volume.tables) > 1 else 0
    return FatRows(
        entries,
        names,
        Rows(table + low, table + high, data.inode),
        len(volume.tables),
        step,
        {} if volume.is_exfat else by_cluster,
    )
