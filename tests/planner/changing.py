"""An image that changes while it is read: bytes, and a script of what happens at each read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from planner.check.live import Clock
from planner.source import Bytes


@dataclass
class Changing:
    """``data``: what the file holds now. ``meanwhile`` is called before every read of it."""

    data: bytearray
    meanwhile: Callable[[], object] = lambda: None
    looks: int = 0
    reads: list[tuple[int, int]] = field(default_factory=list)

    def look(self) -> ChangingSource:
        """The image as it is now."""
        self.looks += 1
        return ChangingSource(self, len(self.data))


@dataclass
class ChangingSource:
    """One opening of it: the size is that of the moment, the bytes are not."""

    image: Changing
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.image.meanwhile()
        self.image.reads.append((offset, len(buffer)))
        Bytes(bytes(self.image.data[: self.size])).read_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return Bytes(bytes(self.image.data[: self.size])).data_extents(offset, length)


@dataclass
class Hourglass:
    """A clock that goes on by *step* each time it is looked at, and by what was paused."""

    step: float = 0.001
    time: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def now(self) -> float:
        self.time += self.step
        return self.time

    def pause(self, seconds: float) -> None:
        self.time += seconds
        self.pauses.append(seconds)

    @property
    def clock(self) -> Clock:
        return Clock(self.now, self.pause)


def in_turn(*steps: Callable[[], object]) -> Callable[[], None]:
    """What does one of *steps* after the other, and after the last the first again."""

    def forever() -> Iterator[None]:
        while True:
            for step in steps:
                step()
                yield

    script = forever()
    return lambda: next(script)
