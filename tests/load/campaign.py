"""A mount under load: readers everywhere, while its image is repaired, taken back and replaced.

One writer goes through a cycle of actions. What every file says after each of them was recorded
before, while nobody else was there, and a read that overlaps no action must be that, byte for byte.
The guest's disk must be right during them too: each page as in a state on either side. How long it
runs is decided by callers.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from examples.make_image import DAMAGES, MIB, ImageBuilder
from tests.mount.mounts import Mount, settle

READERS = 64
HANDLES = 2000
CHUNK = 1 << 16
PAUSE = 0.3
PAGE = 4096
STUCK_SECONDS = 90.0
"""So long no single read may take, on a machine that does a great deal beside."""

GROWTH_BYTES = 96 << 20
GROWTH_DESCRIPTORS = 8

_OWN_STATE = ("repair/", "README.txt")
"""What follows from more than the bytes of the image."""

Content = dict[str, bytes]


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


def replace(mount: Mount, data: bytes) -> None:
    """Put another image in its place, and look at it, without which nobody may repair it."""
    other = mount.image.with_name("other")
    other.write_bytes(data)
    settle(other)
    other.rename(mount.image)
    mount.read("check/result.json")


def write(mount: Mount, control: str, word: str) -> None:
    """A command, which must succeed."""
    with (mount / control).open("wb", buffering=0) as file:
        file.write(word.encode())


DAMAGED = make_image(1, "leaked-clusters", "wrong-copied")
ACTIONS: list[Callable[[Mount], None]] = [
    lambda mount: write(mount, "repair/tier", "all"),
    lambda mount: write(mount, "repair/undo", "undo"),
    lambda mount: replace(mount, make_image(2, "low-refcount")),
    lambda mount: replace(mount, make_image(3)),
    lambda mount: replace(mount, DAMAGED),
]
"""After the last everything is as it was before the first."""


# ---- what is true ----


def files_of(mount: Mount) -> list[str]:
    """Those whose content follows from the image."""
    found = (path.relative_to(mount.path) for path in mount.path.rglob("*") if path.is_file())
    names = (str(path) for path in found if path.parts[0] != "lost" and path.name != "progress")
    return sorted(name for name in names if not name.startswith(_OWN_STATE))


def comparable(name: str, content: bytes) -> bytes:
    """Without what the file system beneath decides."""
    if name == "image/info.json":
        return re.sub(rb'"actual-size": \d+', b"", content)
    return content


def record(mount: Mount) -> list[Content]:
    """What every file says after each action."""
    states: list[Content] = []
    for action in ACTIONS:
        action(mount)
        names = files_of(mount)
        states.append({name: comparable(name, (mount / name).read_bytes()) for name in names})
    return states


@dataclass
class Truth:
    """Counts begins and ends of actions: an odd ``version`` while one is under way."""

    states: list[Content]
    version: int = 0

    def around(self, before: int, after: int) -> list[Content]:
        """The states that were true at some moment between two versions."""
        numbers = range(before // 2, (after + 1) // 2 + 1)
        return [self.states[(number - 1) % len(self.states)] for number in numbers]


# ---- the load ----


@dataclass
class Load:
    """Everything that goes on at a time; ``wrong``: what was read that could not be."""

    mount: Mount
    truth: Truth
    wrong: list[str] = field(default_factory=list)
    reads: int = 0
    exact: int = 0
    cycles: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _since: dict[int, float] = field(default_factory=dict)

    def run(self, seconds: float) -> None:
        """Until the time is over, something is wrong, or somebody is stuck."""
        rngs = [random.Random(number) for number in range(READERS)]
        threads = [threading.Thread(target=self._read, args=[rng], daemon=True) for rng in rngs]
        threads += [
            threading.Thread(target=task, daemon=True) for task in (self._act, self._be_killed)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.wrong:
            time.sleep(0.05)
            self._look_for_stuck()
        self._stop.set()
        for thread in threads:
            thread.join(STUCK_SECONDS)
            if thread.is_alive():
                self.wrong.append("a thread did not end")

    def _look_for_stuck(self) -> None:
        now = time.monotonic()
        if any(now - since > STUCK_SECONDS for since in list(self._since.values())):
            self.wrong.append("a read did not end")

    def _act(self) -> None:
        while not self._stop.is_set():
            for action in ACTIONS:
                self.truth.version += 1
                try:
                    action(self.mount)
                except OSError as error:
                    self.wrong.append(f"action {self.truth.version // 2 % len(ACTIONS)}: {error}")
                    return
                self.truth.version += 1
                self._stop.wait(PAUSE)
            self.cycles += 1

    def _be_killed(self) -> None:
        """Processes that end in the middle of a read."""
        rng = random.Random("killed")
        while not self._stop.is_set():
            names = [self.mount / name for name in ("check/findings.jsonl", "disk.raw")]
            with subprocess.Popen(["cat", *names], stdout=subprocess.DEVNULL) as reader:
                self._stop.wait(rng.uniform(0, 0.1))
                reader.send_signal(signal.SIGKILL)

    def _read(self, rng: random.Random) -> None:
        names = sorted(set.intersection(*(set(state) for state in self.truth.states)))
        me = threading.get_ident()
        while not self._stop.is_set() and not self.wrong:
            name = rng.choice(names)
            offset = rng.randrange(16 * MIB // PAGE) * PAGE if name.endswith("disk.raw") else None
            before = self.truth.version
            self._since[me] = time.monotonic()
            try:
                content = self._content(name, offset)
            except OSError as error:
                content = error
            del self._since[me]
            after = self.truth.version
            self._judge(name, offset, content, before, after)

    def _content(self, name: str, offset: int | None) -> bytes:
        if offset is None:
            return comparable(name, (self.mount / name).read_bytes())
        with (self.mount / name).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), CHUNK, offset)

    def _judge(
        self, name: str, offset: int | None, content: bytes | OSError, before: int, after: int
    ) -> None:
        self.reads += 1
        possible = [state[name] for state in self.truth.around(before, after)]
        quiet = before == after and before % 2 == 0
        self.exact += quiet
        if isinstance(content, OSError):
            if quiet:
                self.wrong.append(f"{name}: {content}")
        elif offset is not None:
            pages = range(0, len(content), PAGE)
            whole = [state[offset : offset + CHUNK] for state in possible]
            if any(
                all(content[at : at + PAGE] != each[at : at + PAGE] for each in whole)
                for at in pages
            ) or len(content) != len(whole[0]):
                self.wrong.append(f"{name} at {offset}, version {before} to {after}")
        elif quiet and content not in possible:
            self.wrong.append(f"{name}, version {before}: {content[:2000]!r}")


def open_many(mount: Mount, stack: ExitStack) -> None:
    """Handles that stay: read for a few bytes, or never; and writers that never write."""
    names = files_of(mount)
    for number in range(HANDLES):
        file = stack.enter_context((mount / names[number % len(names)]).open("rb", buffering=0))
        if number % 10:
            file.read(10)
    for name in ("tier", "undo", "trim"):
        stack.enter_context((mount / f"repair/{name}").open("wb", buffering=0))


@dataclass(frozen=True, slots=True)
class Size:
    """What the daemon of a mount holds: bytes of memory, and descriptors."""

    memory: int
    descriptors: int

    @classmethod
    def of(cls, mount: Mount) -> Size:
        process = Path(f"/proc/{mount.process.pid}")
        pages = int((process / "statm").read_text().split()[1])
        return cls(pages * PAGE, len(list((process / "fd").iterdir())))


def prepare(image: Path) -> None:
    """Put the first image in place."""
    image.write_bytes(DAMAGED)
    settle(image)


def clean_up(image: Path) -> None:
    """Remove the image's undo files, that it may be prepared again."""
    for path in image.parent.glob(f"{image.name}.instarfs-undo*"):
        path.unlink()
    shutil.rmtree(image.parent / "other", ignore_errors=True)


def summary(load: Load, before: Size, after: Size) -> str:
    """A line for a person who waited."""
    return json.dumps(
        {
            "reads": load.reads,
            "reads compared byte for byte": load.exact,
            "cycles": load.cycles,
            "memory": [before.memory, after.memory],
            "descriptors": [before.descriptors, after.descriptors],
        }
    )
