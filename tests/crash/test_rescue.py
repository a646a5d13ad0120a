"""Power cuts at every moment of a rescue in place, and of its undoing, of both files at once.

Whatever is left reads as before, or as rescued; and leads back to the first byte, and forward.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from instarfs.errors import UndoEmpty, UndoFileMissing
from instarfs.image.directory import SUFFIX
from instarfs.image.file import Image
from instarfs.repair.outcome import RepairOutcome, Status
from instarfs.repair.run import Repairer
from planner.progress import Progress
from planner.qcow2.header import Header, Incompatible, decode_header, encode_header
from planner.repair.overlay import Overlay
from planner.repair.plan import StageKind
from planner.rescue.headers import with_fields
from planner.rescue.rescue import Rescue
from planner.rescue.rescue import rescue as find
from planner.source import Bytes, Source, read_bytes
from tests.cached import cached_check, check_bytes
from tests.crash.files import Event, Files, Recorder, power_cuts
from tests.crash.test_stack import put
from tests.images.builder import Image as BuiltImage
from tests.images.builder import ImageBuilder
from tests.planner.rescue.placing.test_place import image as disk_with_files
from tests.planner.rescue.test_snapshots import lost, without_table

NAME = "disk.qcow2"


@cache
def sound() -> bytes:
    builder = ImageBuilder(cluster_bits=11, size=1 << 20)
    for cluster in range(0, 200, 3):
        builder.write(cluster, bytes([cluster]) * 2048)
    builder.take_snapshot("before")
    builder.write(3, b"z" * 2048)
    return bytes(builder.build().data)


def header_of(content: bytes) -> Header:
    return decode_header(content[:104])


def _with_header(**fields: int) -> bytes:
    changed = encode_header(with_fields(header_of(sound()), fields))
    return changed + sound()[len(changed) :]


def _garbage_behind() -> bytes:
    """Fields that lead to tables, but to others; and garbage for extensions."""
    wrong = _with_header(refcount_table_offset=0, l1_table_offset=0)
    return wrong[:112] + random.Random(1).randbytes(2048 - 112) + wrong[2048:]


SCENES = {
    "garbage": lambda: random.Random(1).randbytes(2048) + sound()[2048:],
    "a field": lambda: _with_header(cluster_bits=3),
    "a field that can be read": lambda: _with_header(refcount_order=3),
    "what stands behind the fields": _garbage_behind,
}


def _without_entries(*, refcounts: bool = True) -> bytes:
    """The first two entries of the L1 table are gone, and the table of refcounts too, or not."""
    image = bytearray(disk_with_files("ext4", "gpt"))
    header = header_of(bytes(image))
    image[header.l1_table_offset : header.l1_table_offset + 16] = bytes(16)
    if not refcounts:
        image[header.refcount_table_offset : header.refcount_table_offset + 8] = bytes(8)
    return bytes(image)


def _without_snapshots_and_refcounts() -> bytes:
    """The snapshot table is gone, and the refcounts of some of what it led to."""
    image = BuiltImage(bytearray(lost(without_table)))
    for cluster in range(10, 40):
        image.set_refcount(cluster, 0)
    return bytes(image.data)


TABLES = {
    "entries of the L1 table": _without_entries,
    "refcounts too": lambda: _without_entries(refcounts=False),
    "a snapshot table": lambda: lost(without_table),
    "a snapshot table, refcounts too": _without_snapshots_and_refcounts,
}
SCENES |= TABLES

PLAYED = 24
"""Cuts of a scene that are played, of all at random."""


@cache
def rescue_of(content: bytes) -> Rescue:
    return find(Bytes(content))


def cached_find(source: Source, *, can_grow: bool, progress: Progress) -> Rescue:
    return rescue_of(read_bytes(source, 0, source.size))


def rescue(path: Path, quote: str) -> RepairOutcome:
    with Image.open(str(path)) as image:
        return Repairer(image, check=cached_check).rescue(quote, cached_find)


def undo(path: Path) -> RepairOutcome:
    with Image.open(str(path)) as image:
        return Repairer(image, check=cached_check).undo()


def play(directory: Path, content: bytes) -> tuple[list[Event], bytes]:
    """Rescue, and take it back: what was done, and what the image was in between."""
    path = put(directory, {NAME: content})
    with Recorder(directory) as recorder:
        outcome = rescue(path, rescue_of(content).plan.id)
        assert outcome.status is Status.REPAIRED, outcome.reason
        end = path.read_bytes()
        assert undo(path).status is Status.UNDONE
    assert path.read_bytes() == content
    assert {path.name for path in directory.iterdir()} == {NAME}
    return recorder.log, end


def cuts_of(directory: Path, scene: str) -> Iterator[tuple[str, Files, bytes, bytes]]:
    content = SCENES[scene]()
    log, end = play(directory, content)
    assert {event.name for event in log} == {"", NAME, NAME + SUFFIX}
    rng = random.Random(scene)
    cuts = list(power_cuts({NAME: content}, log, rng))
    for number, files in rng.sample(cuts, min(PLAYED, len(cuts))):
        yield f"after event {number} of {len(log)}", files, content, end


@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene not in TABLES])
def test_what_is_rescued_is_what_was_promised(scene: str) -> None:
    found = rescue_of(SCENES[scene]())
    end = read_bytes(Overlay(Bytes(SCENES[scene]()), found.plan), 0, found.plan.size_after)
    assert end[2048:] == sound()[2048:]
    assert check_bytes(end).counters == found.after.counters
    assert not any(found.headers.hypotheses[0].score)


@pytest.mark.parametrize("scene", SCENES)
def test_every_power_cut_leaves_a_way_back_and_a_way_on(tmp_path: Path, scene: str) -> None:
    interrupted = 0
    for where, files, content, end in cuts_of(tmp_path, scene):
        left = files[NAME]
        assert left in (content, end) or is_marked(left) or is_unreadable(left, content), where
        path = put(tmp_path, files)
        while (outcome := undo(path)).error is None:
            interrupted += outcome.recovered
        assert isinstance(outcome.error, UndoFileMissing | UndoEmpty), f"{where}: {outcome.reason}"
        assert path.read_bytes() == content, where
        assert {path.name for path in tmp_path.iterdir()} == {NAME}, where
        path = put(tmp_path, files)
        rescue(path, rescue_of(content).plan.id)
        assert path.read_bytes() == end, where
        assert undo(path).status is Status.UNDONE, where
        assert path.read_bytes() == content, where
    assert interrupted


def test_each_kind_of_stage_comes_once_and_in_its_order() -> None:
    seen: set[StageKind] = set()
    for scene, content in SCENES.items():
        kinds = [stage.kind for stage in rescue_of(content()).plan.stages]
        assert kinds == sorted(set(kinds)), scene
        seen |= set(kinds)
    assert seen == set(StageKind) - {StageKind.REPOINT}
    assert rescue_of(TABLES["entries of the L1 table"]()).after.verdict == "clean"


@pytest.mark.parametrize("scene", SCENES)
def test_until_all_is_prepared_the_header_leads_where_it_led(scene: str) -> None:
    content = SCENES[scene]()
    plan = rescue_of(content).plan
    before = [stage for stage in plan.stages if stage.kind < StageKind.SWITCH]
    for stage in before:
        for row in stage.after[stage.sectors == 0]:
            header = header_of(row.tobytes())
            marked = header.incompatible_features & ~Incompatible.CORRUPT
            assert replace(header, incompatible_features=marked) == header_of(content)
    if before and plan.stages[-1].kind is StageKind.RELEASE:
        assert before[0].kind is StageKind.GUARD


def is_marked(left: bytes) -> bool:
    layout = check_bytes(left).layout
    return layout is not None and bool(layout.header.incompatible_features & Incompatible.CORRUPT)


def is_unreadable(left: bytes, content: bytes) -> bool:
    """Whether it cannot be read, as it could not before."""
    return check_bytes(left).error is not None and check_bytes(content).error is not None
