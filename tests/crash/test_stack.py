"""Power cuts at every moment of several repairs and of their undoing, of both files at once.

Whatever is left leads back, one repair after the other, to the first byte; and forward again.
"""

import random
from functools import cache
from pathlib import Path

import pytest

from instarfs.errors import UndoEmpty, UndoFileMissing
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair.outcome import RepairOutcome, Status
from instarfs.repair.run import Repairer
from planner.repair.plan import RepairTier
from tests.cached import cached_check, cached_propose, propose_bytes
from tests.crash.files import Event, Files, Recorder, power_cuts
from tests.images.builder import Image as Made
from tests.images.builder import ImageBuilder
from tests.images.damage import DAMAGES

LEAKS, ALL = RepairTier.LEAKS, RepairTier.ALL
NAME = "disk.qcow2"

SCENES = {
    "flags": (("leaked-clusters", "dirty-bit"), (LEAKS, ALL)),
    "refcounts": (("leaked-clusters", "low-refcount", "wrong-copied"), (LEAKS, ALL)),
    "a rebuild": (("lost-l2-table", "lost-refblock"), (ALL, LEAKS)),
}


@cache
def content_of(scene: str) -> bytes:
    builder = ImageBuilder(cluster_bits=9, size=1 << 20)
    for cluster in range(0, 600, 2):
        builder.write(cluster, b"x" * 512)
    builder.skip(3)
    builder.write(900, b"y" * 512)
    if scene != "a rebuild":
        builder.take_snapshot("before")
        builder.write(2, b"z" * 512)
    image = Made(bytearray(builder.build().data))
    for name in SCENES[scene][0]:
        DAMAGES[name](image, random.Random(1))
    return bytes(image.data)


def repair(path: Path, tier: RepairTier, *, keep_undo: bool = True) -> RepairOutcome:
    quote = propose_bytes(path.read_bytes(), tier).plan.id
    with Image.open(str(path)) as image:
        repairer = Repairer(image, check=cached_check, propose=cached_propose, keep_undo=keep_undo)
        return repairer.repair(tier, quote)


def undo(path: Path) -> RepairOutcome:
    with Image.open(str(path)) as image:
        return Repairer(image, check=cached_check).undo()


def put(directory: Path, files: Files) -> Path:
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)
        (directory / name).chmod(0o600)
    return directory / NAME


def play(directory: Path, scene: str) -> tuple[list[Event], list[bytes]]:
    """Repair, repair again, and take both back: what was done, and the image at each stage."""
    path = put(directory, {NAME: content_of(scene)})
    states = [path.read_bytes()]
    with Recorder(directory) as recorder:
        for tier in SCENES[scene][1]:
            assert repair(path, tier).stands
            states.append(path.read_bytes())
        for state in states[-2::-1]:
            assert undo(path).status is Status.UNDONE
            assert path.read_bytes() == state
    assert len(set(states)) == len(states)
    assert {path.name for path in directory.iterdir()} == {NAME}
    return recorder.log, states


@pytest.mark.parametrize("scene", SCENES)
def test_from_every_power_cut_the_way_leads_back_to_the_first_byte(
    tmp_path: Path, scene: str
) -> None:
    log, states = play(tmp_path, scene)
    assert {event.name for event in log} == {"", NAME, NAME + SUFFIX}
    cuts, interrupted, depths = 0, 0, set()
    for number, files in power_cuts({NAME: states[0]}, log, random.Random(1)):
        where = f"after event {number} of {len(log)}"
        path = put(tmp_path, files)
        cuts += 1
        undone = 0
        while (outcome := undo(path)).error is None:
            undone += 1
            assert path.read_bytes() in states, where
            interrupted += outcome.recovered
        assert isinstance(outcome.error, UndoFileMissing | UndoEmpty), f"{where}: {outcome.reason}"
        depths.add(undone)
        assert path.read_bytes() == states[0], where
        assert {path.name for path in tmp_path.iterdir()} == {NAME}, where
    assert cuts > 50
    assert interrupted > 10
    assert depths == {0, 1, 2}


@pytest.mark.parametrize("scene", SCENES)
def test_from_every_power_cut_the_repairs_can_be_made_and_then_taken_back(
    tmp_path: Path, scene: str
) -> None:
    """The next repair takes back what was interrupted, and what was kept below stays kept."""
    log, states = play(tmp_path, scene)
    for number, files in power_cuts({NAME: states[0]}, log, random.Random(2)):
        where = f"after event {number} of {len(log)}"
        path = put(tmp_path, files)
        for tier in SCENES[scene][1]:
            outcome = repair(path, tier)
            if outcome.recovered and not outcome.stands:  # the plan was of the half-repaired image
                outcome = repair(path, tier)
            assert outcome.error is None or outcome.stands, f"{where}: {outcome.reason}"
        assert path.read_bytes() == states[-1], where
        while undo(path).status is Status.UNDONE:
            assert path.read_bytes() in states, where
        assert path.read_bytes() == states[0], where


def test_from_every_power_cut_of_a_repair_without_undo_nothing_wrong_is_taken_back(
    tmp_path: Path,
) -> None:
    """Its own way back stays until it stands; then nothing below it is taken back any more."""
    scene = "flags"
    path = put(tmp_path, {NAME: content_of(scene)})
    states = [path.read_bytes()]
    assert repair(path, LEAKS).stands
    states.append(path.read_bytes())
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with Recorder(tmp_path) as recorder:
        assert repair(path, ALL, keep_undo=False).stands
    states.append(path.read_bytes())
    ends = set()
    for number, files in power_cuts(before, recorder.log, random.Random(3)):
        path = put(tmp_path, files)
        while undo(path).status is Status.UNDONE:
            assert path.read_bytes() in states[:2], number
        ends.add(states.index(path.read_bytes()))
    assert ends == {0, 2}
