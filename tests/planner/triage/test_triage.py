"""What is lost among the leaks, and what is only waste."""

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from planner.check.check import check_image
from planner.check.classify import Look
from planner.findings.kinds import ACTIVE, NONE
from planner.metadata.work_limits import LIMITS, Limits
from planner.qcow2 import entries
from planner.source import read_bytes
from planner.triage.l1_holes import Place, PlaceKind
from planner.triage.triage import Suspect, Triage, triage_leaks
from tests.images.builder import MIB, Image, ImageBuilder
from tests.images.damage import DAMAGES
from tests.images.sample import sample
from tests.planner.test_source import Shared


def damaged(*names: str) -> Image:
    image = sample().build()
    for name in names:
        DAMAGES[name](image, random.Random(1))
    return image


def triage(image: Image, limits: Limits = LIMITS) -> Triage:
    return triage_leaks(image.source, check_image(image.source), limits=limits)


def suspects(image: Image) -> tuple[Suspect, ...]:
    return triage(image).suspects


def full(**options: object) -> ImageBuilder:
    """A disk whose every L1 entry leads to an L2 table, in clusters of 4 KiB: 4 of them."""
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12, **options)  # type: ignore[arg-type]
    rng = random.Random(1)
    for l1_index in range(builder.geometry.l1_entries_needed):
        first = l1_index * builder.geometry.l2_entries
        builder.write(first, rng.randbytes(5 * builder.geometry.cluster_size))
    return builder


# ---- a lost L2 table ----


def test_the_table_behind_a_zeroed_l1_entry_is_a_suspect() -> None:
    image = sample().build()
    lost = image.l2_at(image.geometry.l2_entries) & -image.cluster_size
    image.set_word(image.l1_at(1), 0)
    (suspect,) = suspects(image)
    assert suspect.offset == lost
    assert not suspect.is_l1
    assert suspect.leaked_targets == suspect.targets == suspect.words == suspect.plausible > 0
    assert "a lost L2 table" in suspect.sentence


def test_the_only_empty_l1_entry_says_what_a_lost_table_mapped() -> None:
    image = full().build()
    coverage = image.geometry.l2_coverage
    image.set_word(image.l1_at(2), 0)
    (suspect,) = suspects(image)
    assert suspect.places == (Place(PlaceKind.EMPTY, ACTIVE, 2, 1, coverage),)
    assert f"{coverage} bytes at guest offset {2 * coverage} (L1 entry 2 is empty)" in (
        suspect.sentence
    )


def test_of_several_empty_l1_entries_each_may_be_the_one() -> None:
    image = damaged("lost-l2-table")
    (suspect,) = suspects(image)
    assert suspect.places == (Place(PlaceKind.EMPTY, ACTIVE, 1, 3, image.geometry.l2_coverage),)
    assert suspect.place_count == 3
    assert "L1 entries 1 to 3 are empty" in suspect.sentence


def test_a_damaged_l1_entry_is_named_before_the_empty_ones() -> None:
    image = damaged("lost-l2-table")
    image.set_word(image.l1_at(3), image.host_clusters * 16 * image.cluster_size)
    (suspect,) = suspects(image)
    assert [(place.kind, place.l1_index) for place in suspect.places] == [
        (PlaceKind.DAMAGED, 3),
        (PlaceKind.EMPTY, 1),
    ]


def test_what_two_lost_tables_mapped_belongs_to_the_first_of_them() -> None:
    """Whichever are read together: that depends on where there are holes."""
    image = full().build()
    first, second = sorted(image.l2_table(l1_index) for l1_index in (1, 2))
    image.data[second : second + image.cluster_size] = image.data[
        first : first + image.cluster_size
    ]
    for l1_index in (1, 2):
        image.set_word(image.l1_at(l1_index), 0)
    one, other = suspects(image)
    assert (one.offset, other.offset) == (first, second)
    assert one.mapped == Counter({Look.DATA: 5})
    assert not other.mapped


def test_what_a_lost_table_mapped_belongs_to_it() -> None:
    image = sample().build()
    DAMAGES["leaked-clusters"](image, random.Random(1))
    DAMAGES["lost-l2-table"](image, random.Random(1))
    found = triage(image)
    (suspect,) = found.suspects
    assert suspect.mapped == Counter({Look.DATA: 10})
    assert suspect.starts_with == Counter({"text": 10})
    assert found.looks() == Counter({Look.ZEROS: 11, Look.DATA: 10, Look.L2_TABLE: 1})
    assert np.count_nonzero(found.group != NONE) == 10


def test_a_lost_table_that_is_overwritten_in_part_is_still_a_suspect() -> None:
    image = full().build()
    lost = image.l2_table(1)
    words = [image.word(lost + 8 * at) for at in range(5)]
    for at in range(60):
        image.set_word(lost + 8 * at, words[at % 5])
    image.set_word(lost + 8 * 4, 0x0123_4567_89AB_CDEF)
    image.set_word(image.l1_at(1), 0)
    (suspect,) = suspects(image)
    assert (suspect.offset, suspect.words, suspect.plausible) == (lost, 60, 59)


def test_a_table_of_a_snapshot_may_have_stood_in_any_l1_table() -> None:
    builder = full()
    builder.take_snapshot("one")
    for l1_index in range(4):
        builder.write(l1_index * builder.geometry.l2_entries, b"new")
    image = builder.build()
    image.set_word(image.l1_at(2, snapshot=0), 0)
    (suspect,) = suspects(image)
    assert [(place.snapshot, place.l1_index) for place in suspect.places] == [(0, 2)]
    assert "L1 entry 2 of snapshot 0 is empty" in suspect.sentence


def test_without_an_empty_l1_entry_a_table_may_be_left_over() -> None:
    image = full().build()
    other = image.l2_table(0)
    image.set_word(image.l1_at(1), other | entries.COPIED)
    (suspect,) = suspects(image)
    assert suspect.places
    assert all(place.kind is PlaceKind.DAMAGED for place in suspect.places)


# ---- a lost snapshot ----


def test_the_l1_table_of_a_lost_snapshot_is_a_suspect() -> None:
    found = triage(damaged("lost-snapshot"))
    (l1,) = (suspect for suspect in found.suspects if suspect.is_l1)
    (snapshot,) = found.snapshots
    assert l1.snapshot == snapshot
    assert snapshot.name == b"before upgrade"
    assert "the L1 table of a lost snapshot, ID '1', name 'before upgrade'" in l1.sentence


def test_a_lost_snapshot_is_named_behind_those_that_are_left() -> None:
    builder = full()
    for name in ("first", "second", "third\x1b[31m"):
        builder.take_snapshot(name)
        builder.write(0, name.encode())
    image = builder.build()
    image.change_header(nb_snapshots=1)
    found = triage(image)
    assert [snapshot.id_str for snapshot in found.snapshots] == [b"2", b"3"]
    sentences = "".join(suspect.sentence for suspect in found.suspects)
    assert "name 'second'" in sentences
    assert "name 'third\x1b[31m'" in sentences, "as it is: whoever shows it makes it harmless"


def test_a_table_of_a_lost_snapshot_is_placed_by_its_l1_table() -> None:
    builder = full()
    builder.take_snapshot("one")
    for l1_index in range(4):
        builder.write(l1_index * builder.geometry.l2_entries, b"new")
    image = builder.build()
    third = image.l2_table(2, snapshot=0)
    image.change_header(nb_snapshots=0)
    found = {suspect.offset: suspect for suspect in suspects(image)}
    (place,) = found[third].places
    assert (place.kind, place.l1_index) == (PlaceKind.LOST, 2)
    assert "at guest offset 4194304 in the lost snapshot" in found[third].sentence


def test_the_table_of_a_deleted_snapshot_names_nobody() -> None:
    image = damaged("lost-snapshot")
    for suspect in suspects(image):
        image.set_refcount(suspect.offset // image.cluster_size, 0)
    assert not triage(image).snapshots


# ---- what is no loss ----


def test_leaked_data_is_no_suspect() -> None:
    assert not suspects(damaged("leaked-clusters"))


@pytest.mark.parametrize(
    "content", [b"text " * 800, random.Random(1).randbytes(4096), b"\0\1" * 999]
)
def test_content_of_any_sort_is_no_suspect(content: bytes) -> None:
    builder = full()
    at = builder.place(content) // builder.geometry.cluster_size
    image = builder.build()
    image.set_refcount(at, 1)
    found = triage(image)
    assert found.leaked == 1
    assert not found.suspects


def test_an_old_table_whose_targets_are_in_use_is_no_suspect() -> None:
    builder = full()
    copy_at = builder.place(bytes(builder.geometry.cluster_size))
    image = builder.build()
    size, table = image.cluster_size, image.l2_table(1)
    image.data[copy_at : copy_at + size] = image.data[table : table + size]
    image.set_refcount(copy_at // size, 1)
    found = triage(image)
    assert not found.suspects
    (old,) = found.tables
    assert (old.offset, old.leaked_targets, old.looks_lost) == (copy_at, 0, False)


def counted_once_more(image: Image) -> Image:
    """As a snapshot that shared everything leaves it, if its deletion was cut off."""
    refcounts = image.refcounts()
    for cluster in range(1, image.host_clusters):
        image.set_refcount(cluster, refcounts[cluster] + (refcounts[cluster] > 0))
    return image


def test_an_l2_table_that_lost_one_of_its_l1_entries_is_a_suspect() -> None:
    image = shared_by_a_snapshot(lost=1)
    (suspect,) = suspects(image)
    (place,) = suspect.places
    assert suspect.offset == image.l2_table(1)
    assert (place.kind, place.l1_index) == (PlaceKind.SHARED, 1)
    assert f"it maps {image.geometry.l2_coverage} bytes at guest offset" in suspect.sentence
    assert "something else that it mapped is lost" in suspect.sentence


def shared_by_a_snapshot(lost: int) -> Image:
    """A snapshot with the tables of the disk, but for one, which its L1 table leads to no more."""
    builder = full()
    builder.take_snapshot("one")
    image = builder.build()
    (snapshot,) = check_image(image.source).snapshots
    image.set_word(snapshot.l1_table_offset + 8 * lost, 0)
    return image


@pytest.mark.parametrize("l1_indices", [(0, 1, 2, 3), (0, 1), (1, 3)])
def test_what_a_deleted_snapshot_still_counts_is_not_called_lost(
    l1_indices: tuple[int, ...],
) -> None:
    """Wherever the disk has no table: of the same disk no two entries share one."""
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12)
    for l1_index in l1_indices:
        builder.write(l1_index * builder.geometry.l2_entries, b"data" * 9000)
    found = triage(counted_once_more(builder.build()))
    assert found.leaked
    assert not found.suspects
    assert not found.is_evidence


# ---- bounds ----


def test_how_many_leaked_clusters_were_looked_at_is_said() -> None:
    image = damaged("leaked-clusters")
    found = triage(image)
    assert found.looked_at == found.leaked == check_image(image.source).counters.leaks


def test_of_very_many_a_share_is_read_and_the_tables_are_found_all_the_same() -> None:
    image = full().build()
    lost = {image.l2_table(l1_index) for l1_index in range(4)}
    for l1_index in range(4):
        image.set_word(image.l1_at(l1_index), 0)
    found = triage(image, Limits(triaged_bytes=8 * image.cluster_size))
    assert {suspect.offset for suspect in found.suspects} == lost
    assert found.looked_at <= 8 < found.leaked
    assert found.looks()[Look.UNREAD] == found.leaked - found.looked_at


def test_tables_beyond_those_that_are_described_are_counted() -> None:
    image = full().build()
    for l1_index in range(4):
        image.set_word(image.l1_at(l1_index), 0)
    found = triage(image, Limits(former_tables=2))
    assert len(found.tables) == 2
    assert found.suspect_count == 4


def test_says_how_much_of_it_was_read() -> None:
    image = damaged("leaked-clusters")
    report = check_image(image.source)
    told: list[tuple[str, int, int]] = []
    triage_leaks(image.source, report, progress=lambda *far: told.append(far))
    stages, done, totals = zip(*told, strict=True)
    assert set(stages) == {"leaks"}
    assert set(totals) - {0} == {report.counters.leaks * image.cluster_size}  # 0: not known yet
    assert list(done) == sorted(done)
    assert 0 < done[-1] <= totals[-1]


class Watched(Shared):
    """Notes which threads read it."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        READERS.add(threading.get_ident())
        super().read_into(offset, buffer)


READERS: set[int] = set()


def test_other_threads_read_ahead_what_leaked_and_who_asked_is_told() -> None:
    builder = ImageBuilder(size=8 * MIB, cluster_bits=12)
    builder.write(0, random.Random(1).randbytes(5 * MIB))
    image = builder.build()
    for l1_index in range(3):
        image.set_word(image.l1_at(l1_index), 0)
    report = check_image(image.source)
    told: set[int] = set()
    READERS.clear()
    with ThreadPoolExecutor(2) as executor:
        source = Watched(read_bytes(image.source, 0, image.source.size), executor)
        found = triage_leaks(source, report, progress=lambda *_: told.add(threading.get_ident()))
    assert READERS > {threading.get_ident()} == told
    assert found.looks() == triage(image).looks()


def test_lost_tables_and_what_they_map_are_counted() -> None:
    builder = ImageBuilder(cluster_bits=12, size=4 << 20)
    for cluster in (0, 1, 5, 600):
        builder.write(cluster, b"data")
    image = builder.build()
    assert triage_leaks(image.source, check_image(image.source)).lost_tables == 0
    image.set_word(image.l1_at(0), 0)
    found = triage_leaks(image.source, check_image(image.source))
    assert (found.lost_tables, found.mapped) == (1, 3)
