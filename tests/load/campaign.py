"""A mount under load: readers everywhere, while its image is repaired, taken back and replaced.

One writer goes through a cycle of actions. Every read, through one open handle, must be what
`tests.load.truth` knows of the file at that time, and no read may fail. Of the guest's disk, and of
the image itself, whoever has it open reads on in what is there by then: each page must be as in a
state on either side. How long it runs is decided by callers.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.load.truth import ACTIONS, DAMAGED, Truth, comparable, files_of, under_way
from tests.mount.mounts import Mount, settle

READERS = 64
HANDLES = 2000
CHUNK = 1 << 16
PAUSE = 0.3
PAGE = 4096
READ_IN_PARTS = ("disk.raw", "image.qcow2")
STUCK_SECONDS = 90.0
"""So long no single read may take, on a machine that does a great deal beside."""

GROWTH_BYTES = 64 << 20
GROWTH_DESCRIPTORS = 8

SAMPLE_SECONDS = 0.25
LONG_SECONDS = 120.0
"""From so long a run on, what is held has to stop growing in its second half."""
PLATEAU = 1.1


# ---- the load ----


@dataclass
class Load:
    """Everything that goes on at a time; ``wrong``: what was read that could not be.

    ``quiet``: reads that no action overlapped; ``cycles``: each a repair and an undo; ``sizes``: of
    the daemon, from time to time.
    """

    mount: Mount
    truth: Truth
    wrong: list[str] = field(default_factory=list)
    reads: int = 0
    quiet: int = 0
    cycles: int = 0
    sizes: list[Size] = field(default_factory=list)
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
            time.sleep(SAMPLE_SECONDS)
            self._look_for_stuck()
            self.sizes.append(Size.of(self.mount))
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
                    action.act(self.mount)
                except OSError as error:
                    self.wrong.append(f"{action.name}: {error}")
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
        names = self.truth.names
        me = threading.get_ident()
        while not self._stop.is_set() and not self.wrong:
            name = rng.choice(names)
            offset = None
            if name.endswith(READ_IN_PARTS):
                offset = rng.randrange(self.truth.shortest(name) // PAGE) * PAGE
            before = self.truth.version
            self._since[me] = time.monotonic()
            content: bytes | OSError
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
        self.quiet += before == after and before % 2 == 0
        if isinstance(content, OSError):
            problem = str(content)
        elif offset is not None:
            right = self._has_pages_of(name, offset, content, before, after)
            problem = "" if right else f"at {offset}"
        else:
            right = self.truth.explains(name, content, before, after)
            problem = "" if right else repr(content[:4000])
        if problem:
            during = [action.name for action in under_way(before, after)]
            self.wrong.append(f"{name}, version {before} to {after} {during}: {problem}")

    def _has_pages_of(
        self, name: str, offset: int, content: bytes, before: int, after: int
    ) -> bool:
        """Whether each page is as in a state on either side, and as many are there as in one."""
        states = self.truth.possible(before, after)
        parts = [state[name][offset : offset + CHUNK] for state in states if name in state]
        return len(content) in map(len, parts) and all(
            any(content[at : at + PAGE] == part[at : at + PAGE] for part in parts)
            for at in range(0, len(content), PAGE)
        )


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

    @classmethod
    def most(cls, sizes: Sequence[Size]) -> Size:
        """The largest of each."""
        return cls(max(it.memory for it in sizes), max(it.descriptors for it in sizes))


def prepare(image: Path) -> None:
    """Put the first image in place."""
    image.write_bytes(DAMAGED)
    settle(image)


def has_settled(sizes: Sequence[Size]) -> bool:
    """Whether in the second half no more was held than in the first, give or take a little."""
    half = len(sizes) // 2
    first, second = Size.most(sizes[:half]), Size.most(sizes[half:])
    return (
        second.memory <= PLATEAU * first.memory
        and second.descriptors <= first.descriptors + GROWTH_DESCRIPTORS
    )


def summary(load: Load) -> str:
    """A line for a person who waited."""
    half = len(load.sizes) // 2
    halves = [Size.most(load.sizes[:half]), Size.most(load.sizes[half:])]
    return json.dumps(
        {
            "reads": load.reads,
            "reads beside no change": load.quiet,
            "repairs, each with its undo": load.cycles,
            "most memory in each half": [size.memory for size in halves],
            "most descriptors in each half": [size.descriptors for size in halves],
        }
    )
