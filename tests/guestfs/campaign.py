"""Seeded damage to images with a file system: which files are said to be hit, and which are.

Which ranges are damaged is the check's word: here is only asked whose they are.
"""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from instarfs.guest.files import hit_files
from instarfs.guest.follow import Follow
from instarfs.guest.guest import Guest
from instarfs.guest.place import Part, Place
from instarfs.image.file import Image
from planner.arrays import join_ranges
from planner.check.check import check_image
from planner.errors import ImageError
from planner.guestfs.files import FilesUnknown, HitFiles
from planner.triage.guest_damage import GuestHarm
from planner.triage.triage import triage_leaks
from tests.guestfs.settings import Setting
from tests.guestfs.truth import Truth
from tests.images.random_damage import KINDS
from tests.oracle.scene import Scene

NO_FILE_SYSTEM = "no file system is found"


@dataclass(slots=True)
class Case:
    """What came of one damage: numbers of inodes, and what was said that is not so.

    ``excused``: files that are hit and that nobody can know of any more. ``unread``: why the disk
    or what is on it could not be read at all, "" if it could.
    """

    name: str
    done: list[str]
    expected: int = 0
    found: int = 0
    excused: int = 0
    unread: str = ""
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


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
        case.unread = found.reason
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


def _found(path: Path) -> HitFiles | FilesUnknown:
    with Image.open(str(path)) as image:
        report = check_image(image.source())
        if report.error is not None:
            return FilesUnknown("the check of the image is stopped by its header")
        try:
            triage = triage_leaks(image.source(), report)
            return hit_files(Guest(image, Follow()), Place(Part.DISK), report, triage)
        except ImageError as error:
            return FilesUnknown(str(error))


def _judge(case: Case, truth: Truth, found: HitFiles) -> None:
    hits = found.hits
    harmed = join_ranges(hits.start, hits.start + hits.length)
    expected = truth.owned.hit(*harmed)
    case.expected = len(expected)
    if expected and not any(each.filesystem for each in found.layout.volumes):
        case.unread = NO_FILE_SYSTEM
        return
    # What cannot be named is what hangs on bytes that are not to be believed.
    doubted = np.isin(hits.harm, (GuestHarm.LOST, GuestHarm.SUSPECT, GuestHarm.MISSING))
    ranges = join_ranges(hits.start[doubted], (hits.start + hits.length)[doubted])
    lost, nameless = truth.unknowable(*ranges)
    named: dict[int, set[bytes]] = defaultdict(set)
    for row in found.rows():
        if row.inode is None or row.path is None:
            continue
        if truth.goes_on.get(row.inode) not in lost:
            named[_meant(truth, row.inode)].add(row.path)
    case.found, case.excused = len(named), len((expected & lost) - set(named))
    for inode in sorted(expected - set(named) - lost):
        case.lost.append(f"inode {inode}: {truth.paths.get(inode)}")
    for inode in sorted(set(named) - expected):
        case.wrong.append(f"inode {inode}: {named[inode]}")
    for inode in sorted(expected & set(named)):
        known, told = truth.paths.get(inode, set()), named[inode]
        if inode not in nameless and known and told != known:
            case.lost.append(f"inode {inode}: {known} is called {told}")
        whole = {path for path in told if path.startswith(b"/")}
        if whole - known and not (truth.fat and inode in nameless):  # a FAT has short names too
            case.wrong.append(f"inode {inode}: {known} is called {whole}")


def _meant(truth: Truth, inode: int) -> int:
    """The file that is meant by a number: a directory of a FAT may have been found again."""
    return truth.fat.by_cluster.get(inode, inode) if truth.fat else inode
