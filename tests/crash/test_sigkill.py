"""A real process, really killed in the middle of a real repair; `--cases 3000`: 200 times."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair.interrupted import pending
from instarfs.repair.outcome import RepairOutcome
from instarfs.repair.run import Repairer
from planner.repair.overlay import Overlay
from planner.repair.plan import RepairTier
from planner.source import Bytes, read_bytes
from tests.cached import cached_check, cached_propose
from tests.crash.corpus import GROUPS, Case, cases
from tests.images.builder import Image as Made
from tests.images.damage import DAMAGES

CASES_A_KILL = 15
ENDLESS = 1 << 30

Order = Callable[..., str]


@pytest.fixture(scope="module")
def kills(cases: int) -> int:
    return max(20, cases // CASES_A_KILL)


@pytest.fixture(scope="module")
def order() -> Iterator[Order]:
    """Gives an order to the victim, and returns its answer."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.crash.victim"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        orders, answers = process.stdin, process.stdout

        def give(**order: object) -> str:
            orders.write(json.dumps(order) + "\n")
            orders.flush()
            return answers.readline().strip()

        yield give
        orders.close()
        assert process.wait(10) == 0


class Scene:
    """An image that the victim works on, and what may come of it."""

    def __init__(self, directory: Path, case: Case) -> None:
        self.path = directory / "disk.qcow2"
        self.case = case
        plan = case.proposal.plan
        self.end = read_bytes(Overlay(Bytes(case.content), plan), 0, plan.size_after)

    def begin(self) -> None:
        for each in self.path.parent.iterdir():
            each.unlink()
        self.path.write_bytes(self.case.content)

    def order(self, order: Order, work: str, calls: int) -> str:
        return order(
            path=str(self.path),
            work=work,
            tier=str(self.case.tier),
            quote=self.case.proposal.plan.id,
            calls=calls,
        )

    def run(self, work: Callable[[Repairer], RepairOutcome]) -> RepairOutcome:
        with Image.open(str(self.path)) as image:
            return work(Repairer(image, check=cached_check, propose=cached_propose))

    def names(self) -> set[str]:
        return {each.name for each in self.path.parent.iterdir()}


def choose(rng: random.Random) -> Case:
    return rng.choice(cases(rng.choice(GROUPS)))


def test_a_killed_repair_is_finished_or_taken_back(
    kills: int, seed: int, order: Order, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    for _ in range(kills):
        scene = Scene(tmp_path, choose(rng))
        scene.begin()
        calls = int(scene.order(order, "repair", ENDLESS))
        assert scene.path.read_bytes() == scene.end
        scene.begin()
        assert scene.order(order, "repair", rng.randrange(calls)) == "killed"
        if rng.random() < 0.5:
            outcome = scene.run(Repairer.undo)
            assert scene.path.read_bytes() == scene.case.content, outcome.reason
        # Where it had come to its end the plan is no longer the one to be done: nothing happens.
        quote = scene.case.proposal.plan.id
        outcome = scene.run(partial(Repairer.repair, tier=scene.case.tier, quote=quote))
        assert scene.path.read_bytes() == scene.end, outcome.reason
        with Image.open(str(scene.path)) as image:
            assert pending(image) is None
        assert scene.names() == {scene.path.name, scene.path.name + SUFFIX}


def test_a_killed_undo_is_finished(kills: int, seed: int, order: Order, tmp_path: Path) -> None:
    rng = random.Random(seed + 1)
    for _ in range(kills // 3):
        scene = Scene(tmp_path, choose(rng))
        scene.begin()
        scene.order(order, "repair", ENDLESS)
        calls = int(scene.order(order, "undo", ENDLESS))
        assert scene.path.read_bytes() == scene.case.content
        scene.begin()
        scene.order(order, "repair", ENDLESS)
        assert scene.order(order, "undo", rng.randrange(calls)) == "killed"
        outcome = scene.run(Repairer.undo)
        assert outcome.error is None or "to undo" in outcome.reason
        assert scene.path.read_bytes() == scene.case.content


def two_repairs(directory: Path, seed: int) -> tuple[Scene, Scene]:
    """Of one image: the second begins where the first ends."""
    [leaks] = [each for each in cases("damages") if each.name == "leaked-clusters, leaks"]
    dirty = Made(bytearray(leaks.content))
    DAMAGES["dirty-bit"](dirty, random.Random(seed))
    first = Scene(directory, Case("", bytes(dirty.data), RepairTier.LEAKS))
    return first, Scene(directory, Case("", first.end, RepairTier.ALL))


def take_all_back(scene: Scene) -> list[bytes]:
    """What each undo leaves, until there is nothing more."""
    left = []
    while (outcome := scene.run(Repairer.undo)).error is None:
        left.append(scene.path.read_bytes())
    assert "nothing" in outcome.reason
    assert scene.names() == {scene.path.name}
    return left


def test_a_killed_second_repair_leaves_the_way_back_to_the_first_byte(
    kills: int, seed: int, order: Order, tmp_path: Path
) -> None:
    rng = random.Random(seed + 2)
    first, second = two_repairs(tmp_path, seed)
    first.begin()
    first.order(order, "repair", ENDLESS)
    calls = int(second.order(order, "repair", ENDLESS))
    for number in rng.sample(range(calls), min(calls, kills // 3)):
        first.begin()
        first.order(order, "repair", ENDLESS)
        assert second.order(order, "repair", number) == "killed"
        left = take_all_back(first)
        assert left in ([second.case.content, first.case.content], [first.case.content])


def test_a_killed_second_undo_leaves_the_way_back_to_the_first_byte(
    kills: int, seed: int, order: Order, tmp_path: Path
) -> None:
    rng = random.Random(seed + 3)
    first, second = two_repairs(tmp_path, seed)

    def repair_twice() -> None:
        first.begin()
        assert first.order(order, "repair", ENDLESS) != "killed"
        assert second.order(order, "repair", ENDLESS) != "killed"
        assert first.path.read_bytes() == second.end

    repair_twice()
    for undone in (0, 1):
        calls = int(first.order(order, "undo", ENDLESS))
        for number in rng.sample(range(calls), min(calls, kills // 4)):
            repair_twice()
            for _ in range(undone):
                first.order(order, "undo", ENDLESS)
            assert first.order(order, "undo", number) == "killed"
            left = take_all_back(first)
            assert set(left) <= {second.case.content, first.case.content}
            assert first.path.read_bytes() == first.case.content
        repair_twice()
        first.order(order, "undo", ENDLESS)
