"""planner.rescue.scanned: a scan that was stopped goes on, and comes to the same."""

from __future__ import annotations

import contextlib
import functools
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from planner.errors import Cancelled, HeaderUnknown
from planner.progress import Progress
from planner.rescue.rescue import Rescue, rescue
from planner.rescue.scanned import Scanned, Section
from planner.source import Bytes
from tests.images.guest_files import make_ext, make_tree
from tests.planner.rescue.placing.test_place import MIB, without, wrong


@functools.cache
def large() -> bytes:
    """An image of which more is scanned than is read at once."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as name:
        tree, part, out = (Path(name) / each for each in ("tree", "part", "out"))
        make_tree(tree, 1, files=60)
        for number in range(4):
            (tree / f"large {number}").write_bytes(rng.randbytes(3 * MIB))
        make_ext(part, tree, ["-t", "ext4", "-b", "1024"], 40 * MIB)
        convert = ["qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=4096"]
        subprocess.run([*convert, part, out], check=True)
        return out.read_bytes()


class Watched:
    """A source that counts the bytes which are read of it."""

    def __init__(self, data: bytes) -> None:
        self._source = Bytes(data)
        self.read = 0

    @property
    def size(self) -> int:
        return self._source.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.read += len(buffer)
        self._source.read_into(offset, buffer)

    def data_extents(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self._source.data_extents(offset, length)


def stop_after(calls: int) -> Progress:
    """Ends the work when it has told of a scan so often."""
    left = calls

    def tell(stage: str, done: int, _total: int) -> None:
        nonlocal left
        left -= stage == "scan" and done > 0
        if left < 0:
            raise Cancelled

    return tell


def stopped(data: bytes, calls: int) -> dict[str, Section]:
    scanned = Scanned()
    with pytest.raises(Cancelled):
        rescue(Bytes(data), progress=stop_after(calls), scanned=scanned)
    return scanned.gathered()


def outcome(found: Rescue) -> tuple[object, ...]:
    return found.plan.id, list(found.placements), found.holes, found.headers.best


@pytest.mark.parametrize("losses", [("l1",), ("header",), ("header", "l1")])
def test_one_that_was_stopped_goes_on(losses: tuple[str, ...]) -> None:
    data = without(large(), *losses)
    found = rescue(Bytes(data), scanned=Scanned(stopped(data, 3)))
    at_once = rescue(Bytes(data))
    assert found.plan.id == at_once.plan.id
    assert list(found.placements) == list(at_once.placements)


@pytest.mark.parametrize("losses", [("l1",), ("header", "l1")])
def test_what_was_scanned_is_not_read_again(losses: tuple[str, ...]) -> None:
    data = without(large(), *losses)
    first, scanned = Watched(data), Scanned()
    at_once = rescue(first, scanned=scanned)
    again = Watched(data)
    found = rescue(again, scanned=Scanned(scanned.gathered()))
    assert outcome(found) == outcome(at_once)
    assert again.read < first.read - len(data) // 3


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


NONSENSE: dict[str, Callable[[Section, int], Section]] = {
    "a place that is none": lambda it, end: Section(it.done, it.again + 1, it.ends, it.filled),
    "behind the end": lambda it, end: Section(it.done, numbers(end << 12), it.ends, it.filled),
    "below the beginning": lambda it, end: Section(
        it.done, numbers(-(1 << 40)), it.ends, it.filled
    ),
    "not in order": lambda it, end: Section(it.done, it.again[::-1], it.ends, it.filled),
    "behind itself": lambda it, end: Section(512, it.again, it.ends, it.filled),
    "very far": lambda it, end: Section((1 << 62) + 1, it.again, it.ends, it.filled),
    "below zero": lambda it, end: Section(-512, it.again, it.ends, it.filled),
    "half of it": lambda it, end: Section(it.done, it.again, numbers(1024, 2048), numbers(3)),
    "very full": lambda it, end: Section(it.done, it.again, numbers(1024), numbers(1 << 50)),
}


@pytest.mark.parametrize("how", NONSENSE)
def test_what_no_scan_can_have_come_to_is_not_believed(how: str) -> None:
    end, ends = 1 << 20, numbers(1024, 70000)
    sound = Section(1 << 19, numbers(4096, 8192), ends, numbers(5, 512))
    assert Scanned({"it": sound}).known("it", end, 4096) is sound
    known = Scanned({"it": NONSENSE[how](sound, end)}).known("it", end, 4096)
    assert (known.done, len(known.again), len(known.ends)) == (0, 0, 0)


def test_who_makes_up_how_far_it_is_puts_nothing_in_a_wrong_place() -> None:
    true = large()
    data = without(true, "l1")
    name = next(iter(stopped(data, 3)))
    rng = np.random.default_rng(1)
    for seed in range(3):
        again = np.unique(rng.integers(0, len(data) >> 12, 50)) << 12
        ends = np.unique(rng.integers(0, len(data), 500))
        filled = np.array(random.Random(seed).choices(range(513), k=len(ends)))
        made_up = Section(len(data) // 512 * 512 >> seed, again, ends, filled)
        # What it hides is not found.
        with contextlib.suppress(HeaderUnknown):
            assert not wrong(rescue(Bytes(data), scanned=Scanned({name: made_up})), true)
