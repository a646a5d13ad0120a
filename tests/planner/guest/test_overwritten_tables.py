"""What a check calls lost is read by nobody who vouches for what was read."""

import random
from typing import Any

import numpy as np
import pytest

from planner.arrays import I64
from planner.check.check import check_image
from planner.guest.mapping import Flaw, Mapping, RunKind, Runs, runs_of_entries
from planner.qcow2.geometry import Geometry
from planner.source import Bytes
from planner.triage.impact import Harm, Impact, Ranges, guest_impact
from tests.images.builder import Image
from tests.images.corpus import RULES
from tests.images.corpus.rule import builder, extended

ANY_FLAW = tuple(set(Flaw) - {Flaw.NONE})


def of_disk(image: Image) -> tuple[Runs, Impact]:
    """What an active disk is read from where nothing is taken for zeros, and what became of it."""
    geometry, header, source = image.geometry, image.header, image.source
    report = check_image(source)
    data_end = 1 << 62 if geometry.external_data else source.size
    place = header.l1_table_offset, header.l1_size
    mapping = Mapping(source, geometry, *place, data_end=data_end)
    walked = Runs.concatenate(list(mapping.walk(0, geometry.virtual_size)))
    read = mapping.runs(0, geometry.virtual_size)
    assert read.joined().flaw.tolist() == walked.joined().flaw.tolist()
    return walked, guest_impact(report)


def marked_as_gone(image: Image) -> set[int]:
    """The clusters that a map of the disk calls overwritten, made of all of it and of a part."""
    geometry, header = image.geometry, image.header
    mapping = Mapping(image.source, geometry, header.l1_table_offset, header.l1_size)
    assert Flaw.TABLE_GONE not in next(iter(mapping.walk(0, geometry.virtual_size))).flaw
    found = []
    for start in (0, geometry.cluster_size):
        walked = mapping.marked(start, geometry.virtual_size).walk(start, geometry.virtual_size)
        found.append(flawed(Runs.concatenate(list(walked)), geometry.cluster_size, Flaw.TABLE_GONE))
    assert found[0] - found[1] <= {0}
    return found[0]


def covered(ranges: Ranges, size: int, step: int) -> set[int]:
    found: set[int] = set()
    for start, end in zip(ranges.start.tolist(), ranges.end.tolist(), strict=True):
        found.update(range(start // step, -(-min(end, size) // step)))
    return found


def flawed(runs: Runs, step: int, *flaws: Flaw) -> set[int]:
    some = runs.select(np.isin(runs.flaw, flaws))
    bounds = zip(some.guest.tolist(), (some.guest + some.length).tolist(), strict=True)
    return {at for start, end in bounds for at in range(start // step, -(-end // step))}


@pytest.mark.parametrize("name", RULES)
def test_what_a_check_calls_lost_is_not_read(name: str) -> None:
    image = RULES[name]().image
    report = check_image(image.source)
    if report.layout is None or report.error is not None or report.layout.header.crypt_method:
        return
    if image.geometry.virtual_size >> image.geometry.cluster_bits > 1 << 16:
        return
    runs, impact = of_disk(image)
    step = image.geometry.cluster_size
    lost = covered(impact.ranges[Harm.LOST], image.geometry.virtual_size, step)
    packed = runs.select(runs.kind == RunKind.COMPRESSED).guest // step  # if it unpacks, it reads
    assert lost - set(packed.tolist()) <= flawed(runs, step, *ANY_FLAW)
    assert flawed(runs, step, Flaw.TABLE_GONE) <= lost


OTHER_THINGS = {
    "refcounts": b"\0\1" * 256,
    "some refcounts": b"\0\1" * 100 + bytes(312),
    "text": b"2026-11-28 kernel: nothing that a table could hold\n" * 10,
    "random": random.Random(7).randbytes(512),
}


@pytest.mark.parametrize("what", OTHER_THINGS)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"version": 2}, {"cluster_bits": 16, "size": 1 << 30}, {"extended": True}]
)
def test_no_byte_of_an_overwritten_table_is_read(
    what: str, whole: bool, options: dict[str, object]
) -> None:
    made = extended() if "extended" in options else builder(**options)
    per_sector = 512 // made.geometry.l2_entry_size
    for cluster in range(0, 4 * per_sector, per_sector):  # a sector of the table each
        made.write(cluster, b"d" * made.geometry.cluster_size)
    made.write(made.geometry.l2_entries, b"e" * made.geometry.cluster_size)
    image = made.build()
    step, at = image.geometry.cluster_size, image.l2_table(0)
    count = step // 512 if whole else 1
    content = (OTHER_THINGS[what] * (count + 1))[: count * 512]
    start = at + 512 * (not whole)
    image.data[start : start + count * 512] = content
    runs, impact = of_disk(image)
    assert marked_as_gone(image) == flawed(runs, step, Flaw.TABLE_GONE)
    lost = covered(impact.ranges[Harm.LOST], image.geometry.virtual_size, step)
    first = 0 if whole else per_sector
    gone = set(range(first, first + count * per_sector))
    assert flawed(runs, step, Flaw.TABLE_GONE) == gone <= lost
    # What lies beside it is read as before.
    assert image.geometry.l2_entries not in flawed(runs, step, *ANY_FLAW)


def test_a_table_that_is_gone_is_decoded_as_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, decoded = Geometry(3, 16, 4, 0), list[int]()

    def noting(guest: I64, *arguments: Any, **options: Any) -> Runs:
        decoded.append(len(guest))
        return runs_of_entries(guest, *arguments, **options)

    monkeypatch.setattr("planner.guest.mapping.runs_of_entries", noting)
    table, l1 = random.Random(1).randbytes(1 << 16), (1 << 16).to_bytes(8, "big")
    source = Bytes(bytes(1 << 16) + table + l1)
    mapping = Mapping(source, geometry, 2 << 16, 1, data_end=source.size)
    runs = Runs.concatenate(list(mapping.walk(0, geometry.l2_coverage)))
    assert runs.flaw.tolist() == [Flaw.TABLE_GONE]
    assert decoded == [1]


def test_what_was_overwritten_is_looked_for_once_however_often_it_is_shown() -> None:
    image = builder().build()
    geometry, header = image.geometry, image.header
    mapping = Mapping(image.source, geometry, header.l1_table_offset, header.l1_size)
    whole = mapping.marked(0, geometry.virtual_size)
    assert mapping.marked(0, geometry.virtual_size) is whole
    assert mapping.marked(geometry.l2_coverage, geometry.virtual_size) is not whole
