"""What a file is after each word that a program writes to it, and in how many ways one gets there.

A position is a number of words written: 0 is before the first. Words that are written as they were
make none, so that there are no more positions than there are different files, one after the other.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from tests.live.model import WORD, Step, Truncate, Write, apply

Cut = Callable[[list[Step]], list[Step]]
"""Of a write, word by word, the parts in which it is seen."""

Value = TypeVar("Value", bytes, int)

Ways = tuple[tuple[int, ...], ...]
"""By position, and for a position in the middle of a write by looks since that began, up to the one
at which it has ended: in how many ways a program and a check get there together."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """``words``: by host offset, each word that changes, at every position; ``sizes``: of the file.

    ``ends``: the position at which the write has ended that is under way; at its end that itself.
    ``start``: the file before, with zeros up to the longest that it becomes.
    """

    start: bytes
    words: dict[int, list[bytes]]
    offsets: list[int]
    sizes: list[int]
    ends: list[int]

    @classmethod
    def of(cls, before: bytes, steps: Iterable[Step], cut: Cut) -> Timeline:
        """Of a program that takes these *steps* with that file, each write as *cut* says."""
        file, sizes, ends = bytearray(before), [len(before)], [0]
        changes: list[dict[int, bytes]] = []
        for step in steps:
            for part in cut(list(_parts(step, bytes(file)))):
                touched = _touched(part, len(file))
                old = {at: _word(file, at) for at in touched}
                apply(file, part)
                changed = {at: _word(file, at) for at in touched if _word(file, at) != old[at]}
                changes.append(changed)
                sizes.append(len(file))
            ends += [len(sizes) - 1] * (len(sizes) - len(ends))
        start = before.ljust(max(sizes), b"\0")
        words = {at: [_word(start, at)] for changed in changes for at in changed}
        for changed in changes:
            for at, values in words.items():
                values.append(changed.get(at, values[-1]))
        return cls(start, words, sorted(words), sizes, ends)

    def __len__(self) -> int:
        """The last position."""
        return len(self.sizes) - 1

    def file(self, position: int) -> bytes:
        """All of it, there."""
        file = bytearray(self.start)
        for at, values in self.words.items():
            file[at : at + WORD] = values[position]
        return bytes(file[: self.sizes[position]])

    def windows(self, length: int, step: int) -> Iterator[Timeline]:
        """Each *step* positions a part of it, *length* positions long and to the end of a write."""
        for first in range(0, max(1, len(self) - length + step), step):
            yield self._between(first, self.ends[min(first + length, len(self))])

    def _between(self, first: int, last: int) -> Timeline:
        here = slice(first, last + 1)
        sizes, ends = self.sizes[here], [end - first for end in self.ends[here]]
        start = bytearray(self.start)
        for at, values in self.words.items():
            start[at : at + WORD] = values[first]
        words = {at: values[here] for at, values in self.words.items()}
        words = {at: values for at, values in words.items() if len(set(values)) > 1}
        return Timeline(bytes(start), words, sorted(words), sizes, ends)

    def changing(self, offset: int, end: int) -> list[int]:
        """Where words are within the range, also in part, that change."""
        first = bisect_left(self.offsets, offset - WORD + 1)
        return self.offsets[first : bisect_left(self.offsets, end)]

    # -- ways ----------------------------------------------------------------------------------

    def beginning(self) -> Ways:
        """Nothing is written, nothing was read."""
        return tuple((int(position == 0), 0, 0) for position in range(len(self) + 1))

    def go_on(self, ways: Ways) -> Ways:
        """The program writes as many words as it likes, before one is read."""
        after, done, torn = [], 0, [0, 0, 0]
        for position, here in enumerate(ways):
            torn = [begun + more for begun, more in zip(torn, here, strict=True)]
            if self.ends[position] == position:
                done, torn = done + sum(torn), [0, 0, 0]
                after.append((done, 0, 0))
            else:
                after.append((done + torn[0], torn[1], 0))
        return tuple(after)

    def look(self, ways: Ways) -> Ways:
        """The check looks once more. What is under way ends before it looks for the second time.

        A write is a copy within memory, and takes no time against that; but a look may begin while
        it goes on.
        """
        return tuple(
            here if self.ends[position] == position else (0, here[0], here[1] + here[2])
            for position, here in enumerate(ways)
        )


def split(ways: Ways, values: Sequence[Value]) -> dict[Value, Ways]:
    """By what is read, of something that has these *values*, by position: all that can be read."""
    nothing = (0, 0, 0)
    found: dict[Value, list[tuple[int, ...]]] = {}
    for position, (value, here) in enumerate(zip(values, ways, strict=True)):
        if any(here):
            found.setdefault(value, [nothing] * len(ways))[position] = here
    return {value: tuple(there) for value, there in found.items()}


def total(ways: Ways) -> int:
    """How many there are in all."""
    return sum(map(sum, ways))


def joined(one: Ways, other: Ways) -> Ways:
    """The ways of either."""
    pairs = zip(one, other, strict=True)
    return tuple(tuple(a + b for a, b in zip(*here, strict=True)) for here in pairs)


# ---- steps in parts ------------------------------------------------------------------------------


def _parts(step: Step, file: bytes) -> Iterator[Step]:
    """A write word by word, each with those before it that stay as they are."""
    if isinstance(step, Truncate):
        if step.size != len(file):
            yield step
        return
    end, begin = step.offset + len(step.data), step.offset
    for at in range(begin // WORD * WORD, end, WORD):
        low, high = max(at, step.offset), min(at + WORD, end)
        data = step.data[low - step.offset : high - step.offset]
        if data != file[low:high].ljust(high - low, b"\0"):
            yield Write(begin, step.data[begin - step.offset : high - step.offset])
            begin = high
    if begin < end and end > len(file):
        yield Write(begin, step.data[begin - step.offset :])


def _touched(part: Step, size: int) -> Iterable[int]:
    """Where the words are that it may change in a file so long."""
    if isinstance(part, Truncate):
        return range(part.size // WORD * WORD, size, WORD)
    return range(part.offset // WORD * WORD, part.offset + len(part.data), WORD)


def everywhere(parts: list[Step]) -> list[Step]:
    """Cut between any two words."""
    return parts


def at_random(rng: random.Random, most: int) -> Cut:
    """Cut into *most* parts, between any words."""

    def cut(parts: list[Step]) -> list[Step]:
        if len(parts) <= most:
            return parts
        ends = [0, *sorted(rng.sample(range(1, len(parts)), most - 1)), len(parts)]
        return [_together(parts[low:high]) for low, high in pairwise(ends)]

    return cut


def _together(parts: list[Step]) -> Step:
    """One write of what several write, one behind the other."""
    writes = [part for part in parts if isinstance(part, Write)]
    return Write(writes[0].offset, b"".join(part.data for part in writes))


def _word(file: bytes | bytearray, at: int) -> bytes:
    return bytes(file[at : at + WORD]).ljust(WORD, b"\0")
