"""What a mount may say while its image is repaired, taken back and replaced.

What every file says in every state of the image is recorded before, while nobody else is there.
Whatever is read through one open handle later must be one of these texts, whole; which of them, the
time of the read decides. Some files need more than that:

- A repair, and taking it back, change the image sector by sector, and a check may run meanwhile. So
  the texts of all mixtures of old and new sectors are recorded too, once more while somebody has
  the image open for writing, as a repair has: the verdict is `torn` then. They hold for reads
  beside a repair or an undo alone.
- What was begun with one image and ended with another is of no single moment. It has to say so:
  that it is torn, or that the image changed before it could be planned.
- ``progress`` depends on the time: its form is known. So does the disk space in
  ``image/info.json``, which is left out.
- ``repair/`` tells of the past: its texts recur with each cycle of actions. While a repair runs
  ``repair/undo`` says that.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from instarfs.image import locks
from planner.check.check import check_image
from planner.repair.plan import RepairTier
from planner.repair.tiers import propose
from planner.source import SECTOR, Bytes
from tests.images.builder import MIB, ImageBuilder
from tests.images.damage import DAMAGES
from tests.mount.mounts import Mount, settle

Content = dict[str, bytes]
"""What the files of a mount say, by their names."""

_LOOK_AGAIN = b"the image was written to meanwhile: look again"
_OF_NO_MOMENT = b"this belongs to no single moment"

TORN = {
    "check/result.json": (b'    "verdict": "torn",', b'    "as-of": '),
    "check/report.txt": (b": torn\n", b"while a program writes to it"),
    "image/map.svg": (_OF_NO_MOMENT,),
    "lost/triage.json": (b'    "torn": true,',),
    "tables/clusters.tsv": (_OF_NO_MOMENT,),
    "check/files.tsv": (_LOOK_AGAIN,),
    "snapshots/0/files.tsv": (_LOOK_AGAIN,),
    "repair/plan/all.json": (b"the image changed while it was planned",),
    "repair/plan/leaks.json": (b"the image changed while it was planned",),
    "repair/plan/split.json": (b"the image changed while it was planned",),
    "repair/plan/bitmaps.json": (b"the image changed while it was planned",),
    "repair/plan/snapshots.json": (b"the image changed while it was planned",),
}
"""What a file says of itself that was made while the image changed, or as of a moment of that."""

PROGRESS = re.compile(rb"idle\n|waiting for a check to end\n|[a-z][a-z ]+ \d{1,3}%\n")


# ---- images, and what is done with them ----


def make_image(seed: int, *damages: str) -> bytes:
    """16 MiB in clusters of 4 KiB, with compressed ones and a snapshot."""
    rng = random.Random(seed)
    builder = ImageBuilder(size=16 * MIB, cluster_bits=12)
    builder.write(0, rng.randbytes(2 * MIB))
    builder.write_compressed(1000, b"compressed" * 10)
    builder.take_snapshot("before")
    builder.skip(50)
    builder.write(5, rng.randbytes(8192))
    image = builder.build()
    for name in damages:
        DAMAGES[name](image, random.Random(1))
    return bytes(image.data)


def put_in_place(mount: Mount, data: bytes) -> None:
    """Another image, under the same name."""
    other = mount.image.with_name("other")
    other.write_bytes(data)
    settle(other)
    other.rename(mount.image)


def replace(mount: Mount, data: bytes) -> None:
    """Put another image in its place, and look at it, without which nobody may repair it."""
    put_in_place(mount, data)
    mount.read("check/result.json")


def write(mount: Mount, control: str, word: str) -> None:
    """A command, which must succeed."""
    with (mount / control).open("wb", buffering=0) as file:
        file.write(word.encode())


DAMAGED = make_image(1, "leaked-clusters", "wrong-copied")


@dataclass(frozen=True, slots=True)
class Action:
    """Something that changes what the files say. ``in_place``: one sector after the other."""

    name: str
    act: Callable[[Mount], None]
    in_place: bool = False


ACTIONS = (
    Action("repair", lambda mount: write(mount, "repair/tier", "all"), in_place=True),
    Action("undo", lambda mount: write(mount, "repair/undo", "undo"), in_place=True),
    Action("replace by a damaged one", lambda it: replace(it, make_image(2, "low-refcount"))),
    Action("replace by a clean one", lambda it: replace(it, make_image(3))),
    Action("put back", lambda it: replace(it, DAMAGED)),
)
"""After the last everything is as it was before the first."""


def half_repaired(data: bytes) -> list[bytes]:
    """Every image that may be seen beside a repair by tier `all`: each sector old, new or between.

    With the first one as it is before and the one that it becomes.
    """
    source = Bytes(data)
    plan = propose(source, check_image(source), RepairTier.ALL).plan
    versions: dict[int, dict[bytes, None]] = {}
    for stage in plan.stages:
        for sector, before, after in zip(stage.sectors, stage.before, stage.after, strict=True):
            versions.setdefault(int(sector), {}).update({bytes(before): None, bytes(after): None})
    images = []
    for mixture in itertools.product(*versions.values()):
        image = bytearray(data)
        for sector, content in zip(versions, mixture, strict=True):
            image[sector * SECTOR : (sector + 1) * SECTOR] = content
        images.append(bytes(image))
    return images


# ---- what was recorded ----


def files_of(mount: Mount) -> list[str]:
    """All but the leaked clusters, which are not always there."""
    found = (path.relative_to(mount.path) for path in mount.path.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.parent.name != "lost" or path.suffix)


def texts_of(mount: Mount) -> list[str]:
    """Those whose content is not the guest's, which no repair changes."""
    return [name for name in files_of(mount) if not name.endswith(".raw")]


def comparable(name: str, content: bytes) -> bytes:
    """Without what the file system beneath decides."""
    if name == "image/info.json":
        return re.sub(rb'"actual-size": \d+', b"", content)
    return content


@dataclass
class Truth:
    """``states``: after each action; ``between``: in the middle of those that work in place.

    Counts begins and ends of actions: an odd ``version`` while one is under way.
    """

    states: list[Content]
    between: list[Content]
    version: int = 0

    @classmethod
    def record(cls, mount: Mount) -> Truth:
        """Go through all actions once, and through what is in between."""
        states, between = [], []
        for action in ACTIONS:
            action.act(mount)
            states.append(_record(mount, files_of(mount)))
            if action.in_place:
                with _written(mount):
                    between.append(_record(mount, texts_of(mount)))
        for image in half_repaired(DAMAGED):
            put_in_place(mount, image)
            between.append(_record(mount, texts_of(mount)))
            with _written(mount):
                between.append(_record(mount, texts_of(mount)))
        replace(mount, DAMAGED)
        return cls(states, between)

    @property
    def names(self) -> list[str]:
        """The files that are there in every state."""
        return sorted(set.intersection(*(set(state) for state in self.states)))

    def shortest(self, name: str) -> int:
        """Bytes that a file has in every state."""
        return min(len(state[name]) for state in self.states)

    def possible(self, before: int, after: int) -> list[Content]:
        """The states that were true, or may have been, at some moment between two versions."""
        numbers = range(before // 2, (after + 1) // 2 + 1)
        around = [self.states[(number - 1) % len(self.states)] for number in numbers]
        in_place = any(action.in_place for action in under_way(before, after))
        return around + self.between if in_place else around

    def explains(self, name: str, content: bytes, before: int, after: int) -> bool:
        """Whether a file may say this to one who read it between two versions."""
        if name.endswith("progress"):
            return PROGRESS.fullmatch(content) is not None
        actions = list(under_way(before, after))
        is_running = any(action.in_place for action in actions)
        if is_running and name == "repair/undo" and content == b"a repair is running\n":
            return True
        if any(content == state[name] for state in self.possible(before, after)):
            return True
        return bool(actions) and any(mark in content for mark in TORN.get(name, ()))


def under_way(before: int, after: int) -> Iterator[Action]:
    """The actions that went on at some moment between two versions."""
    for version in range(before, after + 1):
        if version % 2:
            yield ACTIONS[version // 2 % len(ACTIONS)]


def _record(mount: Mount, names: list[str]) -> Content:
    return {name: comparable(name, (mount / name).read_bytes()) for name in names}


@contextmanager
def _written(mount: Mount) -> Iterator[None]:
    """The image, held open for writing as a virtual machine and a repair hold it."""
    with (
        mount.image.open("r+b") as file,
        locks.held(file.fileno(), str(mount.image), locks.READ_WRITE),
    ):
        yield
